//! Stock CRIU's locks of single connections, where a tree shares criu's network namespace.
//!
//! With its default method a stock dump puts two rules per connection into iptables' table `filter`,
//! one in INPUT and one in OUTPUT, and nothing but a stock restore with `--tcp-established` takes
//! them out. With nf_tables it makes a table `inet CRIU-<run id>`, which such a restore removes.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use crate::connection::FourTuple;
use crate::kernel::netns::NetNs;
use crate::lock::xtables::{Family, XtablesError};
use crate::lock::{self, BadLockName, LockError, LockName, MARK, Method};

/// How often the rules are read anew because one went away before it was removed.
const TRIES: usize = 3;

/// One of stock CRIU's rules: it drops the packets of one direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StockRule {
    /// The chain.
    pub chain: StockChain,
    /// Where the packets come from.
    pub source: SocketAddr,
    /// Where they go.
    pub destination: SocketAddr,
}

/// The chains that stock CRIU puts rules into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StockChain {
    /// Packets for this host.
    Input,
    /// Packets of this host.
    Output,
}

impl StockRule {
    /// The two rules of a connection.
    fn of(tuple: &FourTuple) -> [Self; 2] {
        let FourTuple { local, remote } = tuple.on_wire();
        [
            Self { chain: StockChain::Input, source: unscoped(remote), destination: unscoped(local) },
            Self { chain: StockChain::Output, source: unscoped(local), destination: unscoped(remote) },
        ]
    }

    /// The connection that the rule locks, as its socket on this host saw it.
    #[must_use]
    pub fn tuple(&self) -> FourTuple {
        match self.chain {
            StockChain::Input => FourTuple { local: self.destination, remote: self.source },
            StockChain::Output => FourTuple { local: self.source, remote: self.destination },
        }
    }
}

/// iptables knows no scope.
fn unscoped(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip(), addr.port())
}

/// All of stock CRIU's rules in `ns`, of every dump.
///
/// # Errors
/// [`LockError::Iptables`]. Where iptables is not installed there are none, which is no error.
pub fn find_rules(ns: &NetNs) -> Result<Vec<StockRule>, LockError> {
    let mut all = Vec::new();
    for family in Family::BOTH {
        let saved = match family.save(ns) {
            Err(e) if e.not_installed() => continue,
            other => other.map_err(|e| failed("find", ns, e))?,
        };
        all.extend(saved.lines().filter_map(parse));
    }
    Ok(all)
}

/// Removes stock CRIU's rules for these connections, those that are there, and no others, with one
/// run of iptables for all where that is possible; counts them.
///
/// # Errors
/// [`LockError::Iptables`]; rules are still there.
pub fn remove_rules(ns: &NetNs, tuples: &[FourTuple]) -> Result<usize, LockError> {
    let wanted: HashSet<StockRule> = tuples.iter().flat_map(StockRule::of).collect();
    let mut removed = 0;
    for family in Family::BOTH {
        if wanted.iter().any(|rule| family.holds(&rule.source)) {
            removed += remove_of_family(ns, family, &wanted).map_err(|e| failed("remove", ns, e))?;
        }
    }
    Ok(removed)
}

/// Removes the table `inet CRIU-<run_id>` of a stock dump. `false`: there was none.
///
/// # Errors
/// [`RemoveTableError`].
pub fn remove_table(ns: &NetNs, run_id: &str) -> Result<bool, RemoveTableError> {
    Ok(lock::remove(ns, Method::Nftables, &LockName::criu(run_id)?)?)
}

/// A stock dump's table could not be removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveTableError {
    /// No table can have that name.
    #[error(transparent)]
    Name(#[from] BadLockName),
    /// nf_tables refused.
    #[error(transparent)]
    Lock(#[from] LockError),
}

fn remove_of_family(ns: &NetNs, family: Family, wanted: &HashSet<StockRule>) -> Result<usize, XtablesError> {
    let mut tries = TRIES;
    loop {
        let saved = match family.save(ns) {
            Err(e) if e.not_installed() => return Ok(0),
            other => other?,
        };
        let lines = removal(&saved, wanted);
        if lines.is_empty() {
            return Ok(0);
        }
        tries -= 1;
        match restore(ns, family, &lines) {
            Err(XtablesError::Failed { .. }) if tries > 0 => (), // somebody else removes them, too
            other => return other.map(|()| lines.len()),
        }
    }
}

/// One run for all lines, or as many as it takes: without CAP_NET_ADMIN in the initial user
/// namespace, iptables cannot send more than a few hundred rules at once.
fn restore(ns: &NetNs, family: Family, lines: &[String]) -> Result<(), XtablesError> {
    match family.restore(ns, &lines.concat()) {
        Err(XtablesError::Failed { message, .. })
            if message.contains("Message too long") && lines.len() > 1 =>
        {
            let (first, second) = lines.split_at(lines.len() / 2);
            restore(ns, family, first)?;
            restore(ns, family, second)
        }
        other => other,
    }
}

/// The lines for `iptables-restore`. A rule that is there twice goes twice: two dumps of one
/// connection put it there.
fn removal(saved: &str, wanted: &HashSet<StockRule>) -> Vec<String> {
    let ours = saved.lines().filter(|line| parse(line).is_some_and(|rule| wanted.contains(&rule)));
    ours.filter_map(|line| Some(format!("-D {}\n", line.strip_prefix("-A ")?))).collect()
}

/// Reads a line of `iptables-save` such as `-A INPUT -s 10.0.0.7/32 -d 10.0.0.2/32 -p tcp -m mark
/// ! --mark 0xc114 -m tcp --sport 51514 --dport 443 -j DROP`; `None` for any other rule. The order
/// of the matches is the version's own, so it does not count.
fn parse(line: &str) -> Option<StockRule> {
    let mut words = line.split(' ');
    let chain = match (words.next()?, words.next()?) {
        ("-A", "INPUT") => StockChain::Input,
        ("-A", "OUTPUT") => StockChain::Output,
        _ => return None,
    };
    let (mut source, mut destination, mut sport, mut dport) = (None, None, None, None);
    let (mut tcp, mut unmarked, mut drops) = (false, false, false);
    while let Some(word) = words.next() {
        match (word, words.next()?) {
            ("-s", address) => source = Some(host(address)?),
            ("-d", address) => destination = Some(host(address)?),
            ("--sport", port) => sport = Some(port.parse().ok()?),
            ("--dport", port) => dport = Some(port.parse().ok()?),
            ("-p", "tcp") => tcp = true,
            ("!", "--mark") => unmarked = mark(words.next()?)? == MARK,
            ("-m", "mark" | "tcp") => (),
            ("-j", "DROP") => drops = true,
            _ => return None,
        }
    }
    (tcp && unmarked && drops).then_some(())?;
    let (source, destination) = (SocketAddr::new(source?, sport?), SocketAddr::new(destination?, dport?));
    Some(StockRule { chain, source, destination })
}

/// One host, not a network.
fn host(address: &str) -> Option<IpAddr> {
    let (address, bits) = address.split_once('/').unwrap_or((address, ""));
    let address: IpAddr = address.parse().ok()?;
    matches!((address, bits), (_, "") | (IpAddr::V4(_), "32") | (IpAddr::V6(_), "128")).then_some(address)
}

pub(super) fn mark(value: &str) -> Option<u32> {
    u32::from_str_radix(value.strip_prefix("0x")?, 16).ok()
}

fn failed(verb: &str, ns: &NetNs, source: XtablesError) -> LockError {
    LockError::Iptables { action: format!("{verb} stock CRIU's rules"), ns: ns.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: &str = "-A INPUT -s 10.0.0.7/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp \
        --sport 51514 --dport 443 -j DROP";

    fn connection() -> FourTuple {
        FourTuple { local: "10.0.0.2:443".parse().unwrap(), remote: "10.0.0.7:51514".parse().unwrap() }
    }

    #[test]
    fn stock_rules_are_known() {
        let rule = parse(RULE).unwrap();
        assert_eq!(rule, StockRule::of(&connection())[0]);
        assert_eq!(rule.tuple(), connection());
        let six = "-A OUTPUT -s fd00::1/128 -d fe80::2/128 -p tcp -m mark ! --mark 0xc114 -m tcp \
            --sport 1 --dport 2 -j DROP";
        assert_eq!(parse(six).unwrap().chain, StockChain::Output);
    }

    #[test]
    fn an_address_within_ipv6_is_ipv4_there() {
        let mapped = FourTuple {
            local: "[::ffff:10.0.0.2]:443".parse().unwrap(),
            remote: "[::ffff:10.0.0.7]:51514".parse().unwrap(),
        };
        assert_eq!(StockRule::of(&mapped), StockRule::of(&connection()));
    }

    #[test]
    fn rules_of_others_are_not() {
        for (from, to) in [
            ("INPUT", "FORWARD"),
            ("! --mark", "--mark"),
            ("0xc114", "0xc115"),
            ("DROP", "ACCEPT"),
            ("-p tcp", "-p udp"),
            ("/32", "/24"),
            (" --dport 443", ""),
            ("-m mark ! --mark 0xc114 ", ""),
            ("-j DROP", "-m comment --comment x -j DROP"),
            ("-s 10", "! -s 10"),
            (" DROP", ""),
        ] {
            let other = RULE.replace(from, to);
            assert_ne!(other, RULE);
            assert_eq!(parse(&other), None, "{other}");
        }
    }

    #[test]
    fn only_wanted_rules_go_and_all_of_them() {
        let saved =
            format!("*filter\n:INPUT ACCEPT [0:0]\n{RULE}\n{}\n{RULE}\nCOMMIT\n", RULE.replace("443", "80"));
        let wanted = StockRule::of(&connection()).into_iter().collect();
        assert_eq!(removal(&saved, &wanted), vec![format!("{}\n", RULE.replace("-A", "-D")); 2]);
    }
}
