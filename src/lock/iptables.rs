//! The network lock in iptables, for kernels without nf_tables: a chain `SOCCR-ID` in the table
//! `filter` of each family, made by one run of `iptables-restore` for all connections.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;

use super::xtables::{Family, XtablesError};
use super::{LockError, LockInfo, LockName, MARK, Method};
use crate::four_tuple::FourTuple;
use crate::kernel::netns::NetNs;

const CHAIN_PREFIX: &str = "SOCCR-";
/// The chains that jump to ours.
const HOOKS: [&str; 2] = ["INPUT", "OUTPUT"];

/// See [`super::NetworkLock::lock`].
pub(super) fn lock(ns: &NetNs, name: &LockName, tuples: &[FourTuple]) -> Result<(), LockError> {
    let directions = Directions::of(tuples)?;
    let mut done = Vec::new();
    for family in Family::BOTH {
        if let Err(error) = lock_family(ns, name, family, &directions) {
            for family in done {
                let _ = remove_family(ns, name, family);
            }
            return Err(failed("set", name, ns, error));
        }
        done.push(family);
    }
    Ok(())
}

fn lock_family(
    ns: &NetNs,
    name: &LockName,
    family: Family,
    directions: &Directions,
) -> Result<(), XtablesError> {
    let drops = directions.rules(name, family);
    if drops.is_empty() {
        // What an older lock of this name has there is not ours to keep.
        return remove_family(ns, name, family).map(drop);
    }
    let chain = chain(name);
    let saved = family.save(ns)?;
    // A chain that is declared is emptied first, even with -n.
    let mut lines = format!(":{chain} - [0:0]\n-A {chain} -m mark --mark {MARK:#x} -j RETURN\n{drops}");
    for hook in HOOKS {
        if !saved.lines().any(|line| line == jump(hook, &chain)) {
            let _ = writeln!(lines, "-I {hook} 1 -j {chain}");
        }
    }
    family.restore(ns, &lines)
}

/// See [`super::NetworkLock::add`].
pub(super) fn add(ns: &NetNs, name: &LockName, tuples: &[FourTuple]) -> Result<(), LockError> {
    let directions = Directions::of(tuples)?;
    for family in Family::BOTH {
        let error = |e| failed("add to", name, ns, e);
        let drops = directions.rules(name, family);
        if drops.is_empty() {
            continue;
        }
        if has_chain(&family.save(ns).map_err(error)?, &chain(name)) {
            family.restore(ns, &drops).map_err(error)?;
        } else {
            lock_family(ns, name, family, &directions).map_err(error)?;
        }
    }
    Ok(())
}

/// See [`super::remove`].
pub(super) fn remove(ns: &NetNs, name: &LockName) -> Result<bool, LockError> {
    let results = Family::BOTH.map(|family| remove_family(ns, name, family));
    let mut found = false;
    for result in results {
        found |= result.map_err(|e| failed("remove", name, ns, e))?;
    }
    Ok(found)
}

fn remove_family(ns: &NetNs, name: &LockName, family: Family) -> Result<bool, XtablesError> {
    let chain = chain(name);
    let saved = family.save(ns)?;
    if !has_chain(&saved, &chain) {
        return Ok(false);
    }
    let mut lines = String::new();
    for hook in HOOKS {
        let jump = jump(hook, &chain);
        for _ in saved.lines().filter(|line| *line == jump) {
            let _ = writeln!(lines, "-D {hook} -j {chain}");
        }
    }
    let _ = writeln!(lines, "-F {chain}\n-X {chain}");
    family.restore(ns, &lines).map(|()| true)
}

/// See [`super::list`].
pub(super) fn list(ns: &NetNs) -> Result<Vec<LockInfo>, LockError> {
    let mut locks: Vec<LockInfo> = Vec::new();
    for family in Family::BOTH {
        let saved = match family.save(ns) {
            Ok(saved) => saved,
            Err(XtablesError::Run { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                continue;
            }
            Err(source) => {
                return Err(LockError::Iptables {
                    action: "list network locks".into(),
                    ns: ns.clone(),
                    source,
                });
            }
        };
        for lock in parse(&saved) {
            match locks.iter_mut().find(|known| known.name == lock.name) {
                Some(known) => known.entries += lock.entries,
                None => locks.push(lock),
            }
        }
    }
    Ok(locks)
}

fn parse(saved: &str) -> Vec<LockInfo> {
    let chains = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    let locks = chains.filter_map(|chain| {
        let name = LockName::criu(chain.strip_prefix(CHAIN_PREFIX)?).ok()?;
        let rule = format!("-A {chain} ");
        let entries = saved.lines().filter(|l| l.starts_with(&rule) && l.ends_with(" -j DROP")).count();
        Some(LockInfo { method: Method::Iptables, name, entries })
    });
    locks.collect()
}

fn chain(name: &LockName) -> String {
    format!("{CHAIN_PREFIX}{}", name.id())
}

fn jump(hook: &str, chain: &str) -> String {
    format!("-A {hook} -j {chain}")
}

fn has_chain(saved: &str, chain: &str) -> bool {
    saved.lines().any(|line| line.strip_prefix(':').and_then(|l| l.split(' ').next()) == Some(chain))
}

fn failed(verb: &str, name: &LockName, ns: &NetNs, source: XtablesError) -> LockError {
    LockError::Iptables { action: format!("{verb} the network lock {name}"), ns: ns.clone(), source }
}

/// Source and destination of the packets to drop, each pair only once.
struct Directions(BTreeSet<(SocketAddr, SocketAddr)>);

impl Directions {
    fn of(tuples: &[FourTuple]) -> Result<Self, LockError> {
        let mut all = BTreeSet::new();
        for tuple in tuples {
            let FourTuple { local, remote } = tuple.on_wire();
            if local.is_ipv4() != remote.is_ipv4() {
                return Err(LockError::MixedFamilies(*tuple));
            }
            all.extend([(local, remote), (remote, local)]);
        }
        Ok(Self(all))
    }

    fn rules(&self, name: &LockName, family: Family) -> String {
        let chain = chain(name);
        let mut lines = String::new();
        for (from, to) in self.0.iter().filter(|(from, _)| family.holds(from)) {
            let (source, sport, destination, dport) = (from.ip(), from.port(), to.ip(), to.port());
            let _ = writeln!(
                lines,
                "-A {chain} -s {source} -d {destination} -p tcp -m tcp --sport {sport} --dport {dport} -j DROP"
            );
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "*filter\n:INPUT ACCEPT [0:0]\n:SOCCR-a - [0:0]\n:SOCCR-ab - [0:0]\n:OTHER - [0:0]\n\
        -A INPUT -j SOCCR-a\n-A SOCCR-a -m mark --mark 0xc114 -j RETURN\n-A SOCCR-a -s 1.2.3.4/32 -j DROP\n\
        -A SOCCR-ab -j DROP\nCOMMIT\n";

    #[test]
    fn locks_are_found_by_their_chains() {
        let found: Vec<_> = parse(SAVED).into_iter().map(|l| (l.name.id().to_owned(), l.entries)).collect();
        assert_eq!(found, [("a".to_owned(), 1), ("ab".to_owned(), 1)]);
        assert!(has_chain(SAVED, "SOCCR-a") && !has_chain(SAVED, "SOCCR-"));
    }

    #[test]
    fn both_ends_in_one_namespace_make_two_rules() {
        let one = FourTuple { local: "10.0.0.1:1".parse().unwrap(), remote: "10.0.0.2:2".parse().unwrap() };
        let other = FourTuple { local: one.remote, remote: one.local };
        let rules = Directions::of(&[one, other]).unwrap().rules(&LockName::criu("x").unwrap(), Family::V4);
        assert_eq!(
            rules,
            "-A SOCCR-x -s 10.0.0.1 -d 10.0.0.2 -p tcp -m tcp --sport 1 --dport 2 -j DROP\n\
             -A SOCCR-x -s 10.0.0.2 -d 10.0.0.1 -p tcp -m tcp --sport 2 --dport 1 -j DROP\n"
        );
    }
}
