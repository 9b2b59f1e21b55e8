//! The listeners of a tree: who connects to them while it is away shall wait, and not be refused.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockaddrStorage;
use soccr::chain;
use soccr::kernel::netns::NetNs;
use soccr::kernel::{diag, interface};
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

/// The ports at which somebody listens in `ns`. Images can name any: what somebody else accepts he shall accept.
pub fn taken_ports(ns: &NetNs) -> HashSet<u16> {
    of_all(ns).iter().map(|listener| listener.local.port()).collect()
}

/// Their addresses of IPv4 that `ns` does not have. CRIU makes listeners itself, and sets IP_FREEBIND after the bind() that
/// this fails at (of IPv6 ones before it); IP_TRANSPARENT comes with the extras, later still.
pub fn without_address(ns: &NetNs, listeners: &[Listener]) -> Vec<SocketAddr> {
    let away = |local: &SocketAddr| matches!(ns.run(|| interface::is_local(local.ip())), Ok(Ok(false)));
    listeners.iter().map(|listener| listener.local).filter(|local| local.is_ipv4() && away(local)).collect()
}

/// These with an address each, as other namespaces see them: of those at any address one for each address of `ns`.
pub fn addresses(ns: &NetNs, listeners: &[Listener]) -> Vec<Listener> {
    let own: Vec<IpAddr> = match ns.run(getifaddrs) {
        Ok(Ok(interfaces)) => interfaces.filter_map(|interface| ip_of(&interface.address?)).collect(),
        _ => Vec::new(),
    };
    let mut all = Vec::new();
    for listener in listeners {
        let candidates =
            if listener.local.ip().is_unspecified() { own.clone() } else { vec![listener.local.ip()] };
        let ends = candidates.into_iter().map(|ip| SocketAddr::new(ip.to_canonical(), listener.local.port()));
        let reachable = ends.filter(|end| !end.ip().is_loopback() && listener.hears(*end));
        all.extend(reachable.map(|local| Listener { local, v6only: true }));
    }
    all
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    v4.or(address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
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
