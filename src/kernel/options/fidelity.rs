//! The table as documentation.

use std::fmt::Write;

use super::{Care, Known, Level, On, TABLE, When};

/// `docs/FIDELITY.md`.
#[must_use]
pub fn fidelity() -> String {
    let mut text = String::from(HEAD);
    for (level, title) in [
        (Level::Socket, "SOL_SOCKET"),
        (Level::Tcp, "SOL_TCP"),
        (Level::Ip, "SOL_IP (of IPv6 sockets, too)"),
        (Level::Ipv6, "SOL_IPV6"),
    ] {
        let of_level = || TABLE.iter().filter(move |known| known.level == level);
        write!(text, "\n## {title}\n\n{COLUMNS}").expect("memory");
        of_level().filter_map(line).for_each(|line| text.push_str(&line));
        text.push_str("\nNot among them: ");
        let others: Vec<String> = of_level().filter_map(aside).collect();
        text.push_str(&others.join("; "));
        text.push_str(".\n");
    }
    text
}

const HEAD: &str = "\
# What comes back

Printed from the table in `src/kernel/options/table.rs` by `SOCCR_PRINT=1 cargo test --test options fidelity`; do not edit.

All socket options of Linux 6.18 at the levels that a TCP socket has. What a program has never set is the default of the
kernel that it runs on, before and after: options that have the value of a fresh socket in the same network namespace are not carried.
";
const COLUMNS: &str = "\
| option | Linux | stock CRIU 4.2 | with the plugin | set | test |
|---|---|---|---|---|---|
";
const SAME: &str = "`options::come_back`";

/// The row of an option that a socket keeps.
fn line(known: &Known) -> Option<String> {
    let Known { text, since, stock, .. } = known;
    let (ours, test) = match known.care {
        Care::Carried(_, On::Any) => ("carried".into(), SAME),
        Care::Carried(_, On::Unconnected) => {
            ("carried on listeners; of no effect on a connection".into(), SAME)
        }
        Care::Carried(_, On::AnyButIpv4) => ("carried".into(), SAME),
        Care::ByCriu(_) => ("carried by CRIU".into(), SAME),
        Care::Buffer => ("carried by CRIU".into(), "`options::buffers_come_back`"),
        Care::OfConnection(what) => (what.into(), "`engine`"),
        Care::Refused(why) => (format!("refused by name: {why}"), "`options::refused_by_name`"),
        Care::Lost(why) => (format!("lost: {why}"), ""),
        Care::NoState(_) | Care::NotTcp(_) => return None,
    };
    let when = match known.when() {
        Some(When::Early) => "before bind() and connect()",
        Some(When::Late) => "at the end",
        None => "",
    };
    Some(format!("| `{text}` | {since} | {stock} | {ours} | {when} | {test} |\n"))
}

/// One that it does not keep.
fn aside(known: &Known) -> Option<String> {
    match known.care {
        Care::NoState(why) | Care::NotTcp(why) => Some(format!("`{}` ({why})", known.text)),
        _ => None,
    }
}
