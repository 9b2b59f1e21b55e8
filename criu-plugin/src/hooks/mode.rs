//! Whether the plugin deals with TCP at all in this run of criu.

use std::path::PathBuf;

use super::host::{self, Stage};

/// Why CRIU is left alone with TCP; `None` when the plugin does the work.
///
/// `SOCCR_TCP=close` says that connections are to be closed, as `--tcp-close` means without a plugin. A dump with
/// `--tcp-established` and without `--tcp-close` is CRIU's own: it would do all of it again.
#[must_use]
pub fn stand_aside(stage: Stage) -> Option<String> {
    match std::env::var("SOCCR_TCP").as_deref() {
        Ok("close") => return Some("SOCCR_TCP=close".into()),
        Ok("" | "carry") | Err(_) => {}
        Ok(other) => log_unknown(other),
    }
    (stage == Stage::Dump && established_only())
        .then(|| "CRIU carries the connections itself (--tcp-established without --tcp-close)".into())
}

fn log_unknown(value: &str) {
    let text = format!("SOCCR_TCP={value} is unknown (carry or close); connections are carried");
    host::print(log::Level::Warn, &text);
}

fn established_only() -> bool {
    let arguments: Vec<String> =
        std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    arguments.iter().any(|word| word == "--tcp-established")
        && !arguments.iter().any(|word| word == "--tcp-close")
        && !config_files(&arguments).iter().any(|path| asks_to_close(path))
}

/// The configuration files that CRIU reads (criu(8), "CONFIGURATION FILES").
fn config_files(arguments: &[String]) -> Vec<PathBuf> {
    if arguments.iter().any(|word| word == "--no-default-config") {
        return Vec::new();
    }
    let mut files = vec![PathBuf::from("/etc/criu/default.conf")];
    files.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".criu/default.conf")));
    files.extend(std::env::var_os("CRIU_CONFIG_FILE").map(PathBuf::from));
    for (index, word) in arguments.iter().enumerate() {
        match word.strip_prefix("--config") {
            Some("") => files.extend(arguments.get(index + 1).map(PathBuf::from)),
            Some(rest) => files.extend(rest.strip_prefix('=').map(PathBuf::from)),
            None => {}
        }
    }
    files
}

fn asks_to_close(path: &std::path::Path) -> bool {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().any(|line| line.split('#').next().is_some_and(|words| words.trim() == "tcp-close"))
}
