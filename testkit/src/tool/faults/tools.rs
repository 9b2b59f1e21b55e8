//! The programs under test, and the `soccr` command as a user calls it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use serde_json::Value;
use soccr_testkit::server::sibling_binary;
use soccr_testkit::{Criu, NetNs};

/// The environment variable that says where records are; also what marks the processes of a case.
pub const RUN_DIR: &str = "SOCCR_RUN_DIR";

pub struct Tools {
    pub criu: Criu,
    /// With the plugin in which faults can be injected.
    pub faulty: Criu,
    soccr: PathBuf,
}

impl Tools {
    pub fn find() -> Result<Self> {
        let criu = Criu::from_env();
        criu.check(true)?;
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/plugins-fault");
        let faulty = std::env::var_os("SOCCR_FAULT_PLUGIN_DIR").map_or(target, PathBuf::from);
        let faulty = Criu::new(criu.bin(), faulty);
        faulty.check(true).context("scripts/build --with-faults makes it")?;
        let bin = criu.bin().canonicalize()?;
        let absolute = |it: &Criu| -> Result<Criu> {
            Ok(Criu::new(&bin, it.plugin().with_file_name("").canonicalize()?))
        };
        Ok(Self { criu: absolute(&criu)?, faulty: absolute(&faulty)?, soccr: sibling_binary("soccr")? })
    }

    /// Runs `soccr ARGS` in the namespace.
    pub fn soccr(&self, ns: &NetNs, records: &Path, args: &[&str]) -> Result<String> {
        let out = ns.command(&self.soccr).args(args).env(RUN_DIR, records).output()?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "soccr {}: {}\n{said}{complaint}", args.join(" "), out.status);
        Ok(said)
    }

    pub fn status(&self, ns: &NetNs, records: &Path) -> Result<Status> {
        let json: Value = serde_json::from_str(&self.soccr(ns, records, &["status", "--json"])?)?;
        Ok(Status(json))
    }
}

/// What `soccr status` says.
#[derive(Debug)]
pub struct Status(Value);

impl Status {
    /// The states of the records.
    pub fn states(&self) -> Vec<String> {
        let records = self.0["records"].as_array();
        records.into_iter().flatten().map(|it| it["state"].as_str().unwrap_or("?").to_owned()).collect()
    }

    pub fn has(&self, state: &str) -> bool {
        self.states().iter().any(|it| it == state)
    }

    pub fn is_empty(&self) -> bool {
        let none = |key: &str| self.0[key].as_array().is_some_and(Vec::is_empty);
        none("records") && none("unreadable") && none("strays")
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A process that criu or one of its plugins has made in a case.
#[derive(Clone, Debug)]
pub struct Marked {
    pub pid: Pid,
    pub name: String,
    /// As /proc shows it: `T` is stopped.
    pub state: char,
}

/// The processes that were started with these records.
pub fn marked(records: &Path) -> Result<Vec<Marked>> {
    let mark = format!("{RUN_DIR}={}", records.display()).into_bytes();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while we look.
        let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environ.split(|byte| *byte == 0).any(|word| word == mark)
            && let Some((name, state)) = name_and_state(Pid::from_raw(pid))
        {
            found.push(Marked { pid: Pid::from_raw(pid), name, state });
        }
    }
    Ok(found)
}

/// From `/proc/PID/stat`; `None` when the process is gone.
pub fn name_and_state(pid: Pid) -> Option<(String, char)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (start, rest) = stat.rsplit_once(')')?;
    let name = start.split_once('(')?.1.to_owned();
    Some((name, rest.trim_start().chars().next()?))
}
