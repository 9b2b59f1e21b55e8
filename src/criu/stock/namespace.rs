//! Stock CRIU's lock of a whole network namespace, that of a tree which does not share criu's.
//!
//! With its default method that is a chain `CRIU` in iptables' table `filter` of both families, to which INPUT
//! and OUTPUT jump; with nf_tables a table `inet CRIU-<run id>` whose chains drop by policy. Both let packets with
//! the mark 0xc114 pass, and nothing else, so when criu is killed nothing passes for good.
//!
//! After a successful dump it waits for the restore, where the namespace is still there (it has a path).

use std::fmt;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::rules::mark;
use crate::kernel::netns::NetNs;
use crate::kernel::process::pidfd_open;
use crate::lock::xtables::{Family, XtablesError};
use crate::lock::{self, LockError, LockName, MARK, Method, NftError, whole};

const CHAIN: &str = "CRIU";
/// The chains that jump to it.
const HOOKS: [&str; 2] = ["INPUT", "OUTPUT"];

/// How often the rules are read anew because somebody else changed them.
const TRIES: usize = 3;

/// How long to wait for the programs that a killed criu has started.
const PATIENCE: Duration = Duration::from_secs(2);

/// A lock by CRIU of a whole namespace, or what an interrupted criu made of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NamespaceLock {
    /// The chain `CRIU` of iptables, for IPv4, IPv6 or both.
    Chain,
    /// A table of nf_tables.
    Table(LockName),
}

impl fmt::Display for NamespaceLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain => write!(f, "iptables chain {CHAIN}"),
            Self::Table(name) => write!(f, "table inet {name}"),
        }
    }
}

/// CRIU's locks of all of `ns`. Where there are none, no program is run.
///
/// # Errors
/// [`LockError`]. A kernel without nf_tables, or a host without iptables, has none, which is no error.
pub fn find_namespace_locks(ns: &NetNs) -> Result<Vec<NamespaceLock>, LockError> {
    let tables = whole::find(ns).map_err(|source| nft_failed(ns, source))?;
    let mut locks: Vec<_> = tables.into_iter().map(NamespaceLock::Table).collect();
    let chains = Family::BOTH.map(|family| chain_of(ns, family).map_err(|e| failed("find", ns, e)));
    for chain in chains {
        if chain?.is_some() && !locks.contains(&NamespaceLock::Chain) {
            locks.push(NamespaceLock::Chain);
        }
    }
    Ok(locks)
}

/// Removes CRIU's locks of all of `ns`, and nothing else, and says which. The programs that a killed criu has started
/// there, and that are about to lock, are waited for.
///
/// That no criu is at work in `ns` is for the caller to know.
///
/// # Errors
/// [`LockError`]; a lock is still there.
pub fn remove_namespace_locks(ns: &NetNs) -> Result<Vec<NamespaceLock>, LockError> {
    await_helpers(ns);
    let found = find_namespace_locks(ns)?;
    for lock in &found {
        match lock {
            NamespaceLock::Table(name) => lock::remove(ns, Method::Nftables, name).map(drop)?,
            NamespaceLock::Chain => {
                let removed = Family::BOTH.map(|family| remove_chain(ns, family));
                removed.into_iter().try_for_each(|done| done.map_err(|e| failed("remove", ns, e)))?;
            }
        }
    }
    Ok(found)
}

fn remove_chain(ns: &NetNs, family: Family) -> Result<(), XtablesError> {
    let mut tries = TRIES;
    loop {
        let Some(chain) = chain_of(ns, family)? else { return Ok(()) };
        tries -= 1;
        match family.restore(ns, &chain.removal()) {
            Err(XtablesError::Failed { .. }) if tries > 0 => (), // somebody else removes it, too
            other => return other,
        }
    }
}

fn chain_of(ns: &NetNs, family: Family) -> Result<Option<Chain>, XtablesError> {
    match family.save(ns) {
        Err(e) if e.not_installed() => Ok(None),
        other => Ok(Chain::parse(&other?)),
    }
}

/// The chain in one family, and how often each of [`HOOKS`] jumps to it: a second criu jumps a second time.
#[derive(Debug, PartialEq, Eq)]
struct Chain {
    jumps: [usize; 2],
}

impl Chain {
    /// Finds it in what `iptables-save` prints. A chain of that name with any other rule, or to which anything else
    /// leads, is not CRIU's.
    fn parse(saved: &str) -> Option<Self> {
        let mut lines = saved.lines();
        lines.find(|line| line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) == Some(CHAIN))?;
        let (mut rules, mut jumps) = (Vec::new(), [0; 2]);
        for line in saved.lines().filter(|line| line.starts_with("-A ")) {
            let words: Vec<_> = line.split(' ').skip(1).collect();
            match words[..] {
                [hook, "-j", CHAIN] if HOOKS.contains(&hook) => jumps[usize::from(hook == HOOKS[1])] += 1,
                [CHAIN, "-m", "mark", "--mark", value, "-j", "ACCEPT"] if mark(value) == Some(MARK) => {
                    rules.push("accept");
                }
                [CHAIN, "-j", "DROP"] => rules.push("drop"),
                [CHAIN, ..] | [.., "-j" | "-g", CHAIN] => return None,
                _ => (),
            }
        }
        matches!(rules[..], [] | ["accept"] | ["accept", "drop"]).then_some(Self { jumps })
    }

    /// Lines for `iptables-restore`.
    fn removal(&self) -> String {
        let jumps = HOOKS.iter().zip(self.jumps);
        let jumps = jumps.map(|(hook, count)| format!("-D {hook} -j {CHAIN}\n").repeat(count));
        format!("{}-F {CHAIN}\n-X {CHAIN}\n", jumps.collect::<String>())
    }
}

/// Waits until the iptables that a killed criu has started in `ns` is done: its lock would come after we looked.
fn await_helpers(ns: &NetNs) {
    let deadline = Instant::now() + PATIENCE;
    while let Some(helper) = helpers(ns).next() {
        let rest = deadline.saturating_duration_since(Instant::now());
        let mut ended = [PollFd::new(helper.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut ended, PollTimeout::try_from(rest).unwrap_or(PollTimeout::MAX)), Ok(1..)) {
            log::warn!("{ns}: a program of CRIU that may lock it does not end");
            return;
        }
    }
}

/// The processes in `ns` that criu starts there to lock: iptables, or criu itself that is about to become it.
fn helpers(ns: &NetNs) -> impl Iterator<Item = std::os::fd::OwnedFd> {
    let is_helper = |pid: &i32| {
        let inside = std::fs::metadata(format!("/proc/{pid}/ns/net"))
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == (ns.device(), ns.inode()));
        let name = || std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        inside && ["iptables", "ip6tables", "xtables", "criu"].iter().any(|known| name().starts_with(known))
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_helper).filter_map(|pid| pidfd_open(pid).ok())
}

fn nft_failed(ns: &NetNs, source: NftError) -> LockError {
    LockError::Nftables { action: "list CRIU's locks".into(), ns: ns.clone(), source }
}

fn failed(verb: &str, ns: &NetNs, source: XtablesError) -> LockError {
    LockError::Iptables { action: format!("{verb} CRIU's lock of the namespace"), ns: ns.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
        :CRIU - [0:0]\n-A INPUT -j CRIU\n-A INPUT -p tcp -j ACCEPT\n-A OUTPUT -j CRIU\n\
        -A CRIU -m mark --mark 0xc114 -j ACCEPT\n-A CRIU -j DROP\nCOMMIT\n";

    #[test]
    fn the_chain_is_known_also_half_made_or_made_twice() {
        assert_eq!(Chain::parse(SAVED), Some(Chain { jumps: [1, 1] }));
        let twice = SAVED.replace("-A INPUT -j CRIU\n", "-A INPUT -j CRIU\n-A INPUT -j CRIU\n");
        let chain = Chain::parse(&twice).unwrap();
        let jumps = "-D INPUT -j CRIU\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n";
        assert_eq!(chain.removal(), format!("{jumps}-F CRIU\n-X CRIU\n"));
        let unlocking = "*filter\n:CRIU - [0:0]\nCOMMIT\n";
        assert_eq!(Chain::parse(unlocking).unwrap().removal(), "-F CRIU\n-X CRIU\n");
    }

    #[test]
    fn a_chain_of_that_name_with_anything_else_is_not_crius() {
        for (from, to) in [
            ("0xc114", "0xc115"),
            ("-A CRIU -j DROP", "-A CRIU -j REJECT"),
            ("-A CRIU -j DROP", "-A CRIU -p tcp -j DROP"),
            ("-A CRIU -m mark --mark 0xc114 -j ACCEPT\n", ""),
            ("COMMIT", "-A CRIU -j DROP\nCOMMIT"),
            ("-A INPUT -j CRIU", "-A FORWARD -j CRIU"),
            ("-A INPUT -j CRIU", "-A INPUT -p udp -j CRIU"),
            ("-A INPUT -j CRIU", "-A INPUT -g CRIU"),
            (":CRIU", ":CRIUX"),
        ] {
            let other = SAVED.replace(from, to);
            assert_ne!(other, SAVED);
            assert_eq!(Chain::parse(&other), None, "{other}");
        }
    }
}
