//! Runs iptables' programs: whole tables in and out, never a run per rule.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::net::SocketAddr;
use std::process::{Command, ExitStatus, Output, Stdio};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::nft::{self, NftError};
use crate::kernel::netns::{NetNs, NetNsError};

/// An iptables program did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum XtablesError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// The program could not be started or fed.
    #[error("cannot run {program}")]
    Run {
        /// The program.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The program says no.
    #[error("{program} failed ({status}): {message}")]
    Failed {
        /// The program.
        program: &'static str,
        /// Its exit.
        status: ExitStatus,
        /// What it said, in one line.
        message: String,
    },
}

/// IPv4 or IPv6: iptables has a set of programs for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `iptables`.
    V4,
    /// `ip6tables`.
    V6,
}

/// Which of the two kernel interfaces the programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The one that the host's administrator chose.
    Default,
    /// The old `ip_tables`, beside nf_tables and invisible there.
    Legacy,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Whether addresses of this kind are this family's.
    pub fn holds(self, address: &SocketAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }

    /// The table `filter` as `iptables-save` prints it. With no such table that is an empty text,
    /// for which no program is run, or a table with no rules, as the variant of iptables likes.
    pub fn save(self, ns: &NetNs) -> Result<String, XtablesError> {
        if !self.has_filter(ns) {
            return Ok(String::new());
        }
        self.save_with(ns, Variant::Default, &["-t", "filter"])
    }

    /// Whether the table `filter` is in use, in either of the kernel's interfaces; `true` where nobody can tell.
    fn has_filter(self, ns: &NetNs) -> bool {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the constants are 2 and 10
        let family = match self {
            Self::V4 => libc::NFPROTO_IPV4 as u8,
            Self::V6 => libc::NFPROTO_IPV6 as u8,
        };
        let through_nftables = || match nft::has_table(ns, family, "filter") {
            Err(NftError::Missing) => false,
            other => other.unwrap_or(true),
        };
        let legacy = || legacy_tables(ns, self).map_or(true, |tables| tables.iter().any(|t| t == "filter"));
        through_nftables() || legacy()
    }

    /// What `iptables-save` prints with these arguments.
    pub fn save_with(self, ns: &NetNs, variant: Variant, args: &[&str]) -> Result<String, XtablesError> {
        let program = match (self, variant) {
            (Self::V4, Variant::Default) => "iptables-save",
            (Self::V6, Variant::Default) => "ip6tables-save",
            (Self::V4, Variant::Legacy) => "iptables-legacy-save",
            (Self::V6, Variant::Legacy) => "ip6tables-legacy-save",
        };
        let output = run(ns, program, args, "")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Applies `lines` to the table `filter`, all or none of them; other rules stay.
    pub fn restore(self, ns: &NetNs, lines: &str) -> Result<(), XtablesError> {
        self.restore_with(ns, Variant::Default, &format!("*filter\n{lines}COMMIT\n"))
    }

    /// Applies a script of `iptables-restore`, all or none of it in each table; other rules stay.
    pub fn restore_with(self, ns: &NetNs, variant: Variant, script: &str) -> Result<(), XtablesError> {
        let program = match (self, variant) {
            (Self::V4, Variant::Default) => "iptables-restore",
            (Self::V6, Variant::Default) => "ip6tables-restore",
            (Self::V4, Variant::Legacy) => "iptables-legacy-restore",
            (Self::V6, Variant::Legacy) => "ip6tables-legacy-restore",
        };
        // -w: wait for another iptables that holds the lock.
        run(ns, program, &["-n", "-w"], script).map(drop)
    }
}

impl XtablesError {
    /// Whether the program is not installed: then nobody can have used it here.
    pub fn not_installed(&self) -> bool {
        matches!(self, Self::Run { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Runs a program inside `ns`, its input given as a file so that it and we cannot wait for each other.
fn run(ns: &NetNs, program: &'static str, args: &[&str], input: &str) -> Result<Output, XtablesError> {
    let output =
        ns.run(|| start(program, args, input))?.map_err(|source| XtablesError::Run { program, source })?;
    if output.status.success() {
        return Ok(output);
    }
    let message = String::from_utf8_lossy(&output.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
    Err(XtablesError::Failed { program, status: output.status, message })
}

fn start(program: &str, args: &[&str], input: &str) -> io::Result<Output> {
    let mut file = File::from(memfd_create("soccr-iptables", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(input.as_bytes())?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    // A service's PATH may lack the sbin directories.
    for directory in ["", "/usr/sbin/", "/sbin/"] {
        file.rewind()?;
        let output = Command::new(format!("{directory}{program}"))
            .args(args)
            .stdin(Stdio::from(file.try_clone()?))
            .output();
        match output {
            Err(e) if e.kind() == io::ErrorKind::NotFound => last = e,
            other => return other,
        }
    }
    Err(last)
}

/// The tables of `ip_tables` that are in use in `ns`; asking any other way would put them in use.
pub(super) fn legacy_tables(ns: &NetNs, family: Family) -> Result<Vec<String>, XtablesError> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    match ns.run(|| std::fs::read_to_string(path))? {
        Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()), // no such module
        Err(source) => Err(XtablesError::Run { program: path, source }),
    }
}
