//! Whether the plugin deals with TCP at all in this run of criu.

use std::path::PathBuf;

use super::host::{self, Stage};

/// How much of TCP is the plugin's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: `SOCCR_TCP=close` says that connections are to be closed, as `--tcp-close` means without a plugin.
    Aside,
    /// What CRIU's images have no field for: a dump with `--tcp-established` and without `--tcp-close` is CRIU's own.
    Beside,
    /// All.
    Carry,
}

impl Mode {
    /// What the environment and CRIU's arguments say.
    #[must_use]
    pub fn of(stage: Stage) -> Self {
        match std::env::var("SOCCR_TCP").as_deref() {
            Ok("close") => return Self::Aside,
            Ok("" | "carry") | Err(_) => {}
            Ok(other) => log_unknown(other),
        }
        if stage == Stage::Dump && established_only() { Self::Beside } else { Self::Carry }
    }
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
