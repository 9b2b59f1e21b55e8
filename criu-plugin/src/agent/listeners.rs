//! The listeners of a tree: who connects to them while it is away shall wait, and not be refused.

use std::collections::HashSet;
use std::time::Duration;

use soccr::chain;
use soccr::kernel::diag;
use soccr::kernel::netns::NetNs;
use soccr::lock::{Listener, NetworkLock};

/// Those in `ns` that are the tree's alone, by their inodes. Where others listen at the same port, nobody can tell from a SYN
/// whom it is for. One that is bound to an interface does not hear what the engine forges.
pub fn of_tree(ns: &NetNs, is_ours: impl Fn(u64) -> bool) -> Vec<Listener> {
    let (ours, others): (Vec<_>, Vec<_>) =
        of_all(ns).into_iter().partition(|listener| is_ours(listener.inode.into()) && listener.device == 0);
    let taken: HashSet<u16> = others.iter().map(|listener| listener.local.port()).collect();
    let alone = ours.into_iter().filter(|listener| !taken.contains(&listener.local.port()));
    alone.map(|diag::Listener { local, v6only, .. }| Listener { local, v6only }).collect()
}

/// Those at whose ports nobody listens in `ns`. Images can name any: what somebody else accepts he shall accept.
pub fn that_are_away(ns: &NetNs, listeners: &[Listener]) -> Vec<Listener> {
    let there = of_all(ns);
    let taken = |port: u16| there.iter().any(|other| other.local.port() == port);
    listeners.iter().copied().filter(|listener| !taken(listener.local.port())).collect()
}

/// Has who would connect wait. Where that is not possible they are refused, as they would be without us.
pub fn stop_newcomers(lock: &NetworkLock, listeners: &[Listener], time: Duration, held: bool) {
    if let Err(error) = lock.stop_newcomers(listeners, time, held) {
        log::warn!("who connects meanwhile is refused: {}", chain(&error));
    }
}

fn of_all(ns: &NetNs) -> Vec<diag::Listener> {
    let unknown = |error: String| {
        log::warn!("{ns}: who connects meanwhile may be refused, since its listeners are unknown: {error}");
        Vec::new()
    };
    match ns.run(diag::listeners) {
        Ok(Ok(all)) => all,
        Ok(Err(error)) => unknown(chain(&error)),
        Err(error) => unknown(chain(&error)),
    }
}
