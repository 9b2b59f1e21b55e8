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
    text.push_str(CONNECTION);
    text
}

const HEAD: &str = "\
# What comes back

Printed from the table in `src/kernel/options/table.rs` by `SOCCR_PRINT=1 cargo test --test options fidelity`; do not edit.

All socket options of Linux 6.18 at the levels that a TCP socket has, on connections and on listeners. What a program has never
set is the default of the kernel that it runs on, before and after: options with the value of a fresh socket in the same
network namespace are not carried. What CRIU's images have no field for is in `soccr.img`, by the socket's inode, with the socket's
owner (`options::owners_share_their_port_again`). With `--tcp-established` alone CRIU carries the connections, and the plugin adds the same
(`options::come_back_beside_tcp_established`); `options::stock_loses_some` shows what is missing without it.

An option that decides by which addresses and routes a connection goes must be set again, or the restore fails. Any other that the
target does not take is named in the log, and the connection goes on with the default: a congestion control algorithm that is not there, say.
";
const COLUMNS: &str = "\
| option | Linux | stock CRIU 4.2 | with the plugin | set | test |
|---|---|---|---|---|---|
";
const CONNECTION: &str = "
## The connection itself

State, sequences, windows, segment size, window scaling, SACK, timestamps, queues and FINs: all that TCP_REPAIR sets. And:

| what | Linux | stock CRIU 4.2 | with the plugin | test |
|---|---|---|---|---|
| ECN | 5.7, or net.ipv4.tcp_ecn=1 | lost | carried | `ecn::over_ipv4` and others, `marked_segments_are_echoed` |
| the smoothed round trip time | | lost | carried with ECN, up to 0.9 s; otherwise measured anew | `ecn::the_round_trip_time_comes_back` |
| the unit of the timestamps' clock | 6.7 | carried; by chance from images of older kernels | carried | `a_clock_keeps_its_unit` |
| the clock itself, on a host with another uptime | 3.9 | carried | carried | `the_peer_sees_one_clock` |
| the peer's last timestamp (ts_recent) | | lost: 0 until the peer sends | lost: 0 until the peer sends | |
| the congestion window | | lost | lost | |
| segments that came before their turn | | lost: the peer sends them again | lost: the peer sends them again | `segments_out_of_order_are_sent_again` |
| queues of 64 MiB each | | | carried | `content::queues_of_64_mib_each` |
| the time of TCP_USER_TIMEOUT and of keepalive that has run | | | begins anew | `timers_go_on` |
| the interface of a link-local address, by its name | | the restore fails | carried | `content::a_link_local_address_finds_its_interface` |
| CLOSE, where its address is not there any more | | the restore fails | carried | `content::a_closed_connection_needs_no_address` |
";
/// Where this machine's kernel cannot show it.
const UNTRIED: [&str; 2] = ["SO_RESERVE_MEM", "IPV6_RTHDR"];

/// The row of an option that a socket keeps.
fn line(known: &Known) -> Option<String> {
    let Known { text, since, stock, .. } = known;
    let tried = match known.level {
        _ if UNTRIED.contains(text) => "",
        _ if *text == "TCP_FASTOPEN_CONNECT" => "`every_option_goes_over`",
        Level::Ipv6 => "`options::come_back_ipv6`",
        _ => "`options::come_back_ipv4`",
    };
    let (ours, test) = match known.care {
        Care::Carried(_, On::Unconnected) => {
            ("carried on listeners; of no effect on a connection".into(), tried)
        }
        Care::Carried(..) => ("carried".into(), tried),
        Care::ByCriu(_) => ("carried by CRIU".into(), tried),
        Care::Buffer => ("carried by CRIU".into(), "`options::buffers_come_back`"),
        Care::OfConnection(what) => (what.into(), "`engine`"),
        Care::Refused(why) => (format!("refused by name: {why}"), refusal(text)),
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

fn refusal(option: &str) -> &'static str {
    match option {
        "SO_ATTACH_BPF" => "`options::refused_by_name`",
        "TCP_MD5SIG" | "TCP_MD5SIG_EXT" => "`promises::connections_and_listeners_with_md5_keys_are_refused`",
        _ => "",
    }
}

/// One that it does not keep.
fn aside(known: &Known) -> Option<String> {
    match known.care {
        Care::NoState(why) | Care::NotTcp(why) => Some(format!("`{}` ({why})", known.text)),
        _ => None,
    }
}
