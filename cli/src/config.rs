//! CRIU's configuration files: what their lines say, and the lines that `soccr enable` has put there.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Serialize;

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement<'a> {
    /// `tcp-close`, without which CRIU carries the connections itself.
    TcpClose(bool),
    /// `tcp-established`, which means nothing beside `tcp-close`.
    TcpEstablished,
    /// `libdir DIR`: the folder of the plugins.
    LibDir(&'a str),
    /// Nothing that matters here.
    Other,
    /// What no criu takes: it ends with an error.
    Wrong(&'static str),
}

/// The statements of a file with their line numbers.
pub fn statements(text: &str) -> impl Iterator<Item = (usize, Statement<'_>)> {
    let lines = text.lines().zip(1..).map(|(line, number)| (number, line.trim()));
    lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')).map(|(n, line)| (n, statement(line)))
}

fn statement(line: &str) -> Statement<'_> {
    let (option, rest) = line.split_once([' ', '\t', '=']).unwrap_or((line, ""));
    let Some(value) = value(rest.trim()) else { return Statement::Wrong("more than one value") };
    match option {
        "tcp-close" => Statement::TcpClose(true),
        "no-tcp-close" => Statement::TcpClose(false),
        "tcp-established" => Statement::TcpEstablished,
        // Options may be cut short as long as they stay clear.
        "lib" | "libd" | "libdi" | "libdir" if value.is_empty() => {
            Statement::Wrong("libdir without a folder")
        }
        "lib" | "libd" | "libdi" | "libdir" => Statement::LibDir(value),
        _ if option.starts_with('-') => Statement::Wrong("options are written without dashes here"),
        _ => Statement::Other,
    }
}

/// One word or one quoted text, maybe with a comment behind it.
fn value(rest: &str) -> Option<&str> {
    if let Some(quoted) = rest.strip_prefix('"') {
        return quoted.split_once('"').map(|(value, _)| value);
    }
    let value = rest.split('#').next().unwrap_or_default().trim_end();
    (!value.contains([' ', '\t'])).then_some(value)
}

/// What criu makes of several files, of which a later one counts more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Settings {
    pub tcp_close: bool,
    pub lib_dir: Option<PathBuf>,
}

impl Settings {
    /// Goes on with the next file.
    pub fn read(&mut self, text: &str) {
        for (_, statement) in statements(text) {
            match statement {
                Statement::TcpClose(on) => self.tcp_close = on,
                Statement::LibDir(dir) => self.lib_dir = Some(dir.into()),
                Statement::TcpEstablished | Statement::Other | Statement::Wrong(_) => {}
            }
        }
    }
}

/// What `soccr enable` made, and so what `soccr disable` takes back when nothing else is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Made {
    Lines,
    File,
    Folder,
}

const BEGIN: &str = "# >>> soccr enable ";
const END: &str = "# <<< soccr enable <<<";

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lines => "added these lines; `soccr disable` takes them back >>>",
            Self::File => "made this file; `soccr disable` takes it back >>>",
            Self::Folder => "made this file and its folder; `soccr disable` takes them back >>>",
        })
    }
}

impl Made {
    /// What the first line of ours says.
    fn of(line: &str) -> Option<Self> {
        let words = line.strip_prefix(BEGIN)?;
        [Self::Lines, Self::File, Self::Folder].into_iter().find(|made| made.to_string() == words)
    }
}

/// Our lines. They come first in a file: what stands there already stays as it is to the last byte, also where its last
/// line has no end.
pub fn ours(made: Made, lib_dir: &str) -> String {
    format!("{BEGIN}{made}\ntcp-close\nlibdir {lib_dir}\n{END}\n")
}

/// The text without our lines, and what we made; `None` when there are none.
pub fn without_ours(text: &str) -> Result<Option<(Made, String)>> {
    let Some(start) = text.find(BEGIN).filter(|at| *at == 0 || text[..*at].ends_with('\n')) else {
        return Ok(None);
    };
    let ours = &text[start..];
    let Some(made) = ours.lines().next().and_then(Made::of) else {
        bail!("a line begins with {BEGIN:?} and goes on as `soccr enable` does not write it");
    };
    let Some(end) = ours.find(&format!("\n{END}\n")) else {
        bail!("the line {END:?} that ends the lines of `soccr enable` is missing");
    };
    let rest = &ours[end + END.len() + 2..];
    Ok(Some((made, format!("{}{rest}", &text[..start]))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Vec<(usize, Statement<'_>)> {
        statements(text).collect()
    }

    #[test]
    fn lines_say_what_criu_makes_of_them() {
        use Statement::{LibDir, Other, TcpClose, TcpEstablished, Wrong};
        let text = "# libdir /no\n\n  tcp-close # yes\nlibdir\t\"/a b\"\nlib /c  # d\nlibdir=/e\nno-tcp-close\ntcp-established\nlog-file x\n";
        let want = [
            (3, TcpClose(true)),
            (4, LibDir("/a b")),
            (5, LibDir("/c")),
            (6, LibDir("/e")),
            (7, TcpClose(false)),
            (8, TcpEstablished),
            (9, Other),
        ];
        assert_eq!(said(text), want);
        for wrong in ["libdir /a /b", "--tcp-close", "libdir", "libdir \"/a"] {
            assert!(matches!(said(wrong)[..], [(1, Wrong(_))]), "{wrong}");
        }
    }

    #[test]
    fn a_later_file_counts_more() {
        let mut settings = Settings::default();
        settings.read("tcp-close\nlibdir /a");
        settings.read("libdir /b");
        assert_eq!(settings, Settings { tcp_close: true, lib_dir: Some("/b".into()) });
        settings.read("no-tcp-close");
        assert!(!settings.tcp_close);
    }

    #[test]
    fn our_lines_leave_no_trace() {
        for others in ["", "log-file x", "log-file x\n", "\n\n# end"] {
            for made in [Made::Lines, Made::File, Made::Folder] {
                let text = ours(made, "/plugins") + others;
                assert_eq!(without_ours(&text).unwrap(), Some((made, others.to_owned())));
                // Somebody put a line before ours.
                let moved = format!("first\n{text}");
                assert_eq!(without_ours(&moved).unwrap(), Some((made, format!("first\n{others}"))));
            }
            assert_eq!(without_ours(others).unwrap(), None);
        }
    }

    #[test]
    fn lines_that_somebody_changed_are_refused() {
        let text = ours(Made::File, "/plugins");
        assert!(without_ours(&text.replace("made", "makes")).is_err());
        assert!(without_ours(&text.replace(END, "")).is_err());
    }
}
