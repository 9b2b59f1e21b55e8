//! What names a connection: the addresses of its two ends.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// The two ends of a connection as the socket's own address family shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FourTuple {
    /// The end on this host.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
}

impl FourTuple {
    /// Whether its packets can pass through another network namespace: loopback addresses are each namespace's own.
    #[must_use]
    pub fn leaves_its_host(&self) -> bool {
        ![self.local, self.remote].iter().any(|end| end.ip().to_canonical().is_loopback())
    }

    /// The tuple as packets carry it: an IPv4-mapped IPv6 address becomes IPv4.
    #[must_use]
    pub fn on_wire(&self) -> Self {
        Self { local: unmapped(self.local), remote: unmapped(self.remote) }
    }

    /// Why no TCP connection can have these addresses, if so. Images are somebody else's input: the kernel itself would
    /// take "any address" for the loopback address, and bind a socket to a multicast address.
    #[must_use]
    pub fn impossible(&self) -> Option<&'static str> {
        let wire = self.on_wire();
        if wire.local.is_ipv4() != wire.remote.is_ipv4() {
            Some("the two ends are of different address families")
        } else if wire.remote.port() == 0 {
            Some("the peer's port is 0")
        } else {
            not_of_one_host(wire.remote.ip())
                .map(|[_, remote]| remote)
                .or(not_of_one_host(wire.local.ip()).map(|[local, _]| local))
        }
    }
}

/// What is said of such an address at the local end and at the peer's.
fn not_of_one_host(ip: IpAddr) -> Option<[&'static str; 2]> {
    if ip.is_unspecified() {
        Some(["the local address is unspecified", "the peer's address is unspecified"])
    } else if ip.is_multicast() {
        Some(["the local address is a multicast one", "the peer's address is a multicast one"])
    } else if ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some(["the local address is the broadcast one", "the peer's address is the broadcast one"])
    } else {
        None
    }
}

fn unmapped(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(IpAddr::V4(ip), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

impl fmt::Display for FourTuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}", self.local, self.remote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(local: &str, remote: &str) -> Option<&'static str> {
        FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() }.impossible()
    }

    #[test]
    fn addresses_of_connections() {
        for (local, remote) in [
            ("127.0.0.1:0", "127.0.0.1:1"), // a closed connection may have given its port back
            ("[::1]:1", "[fe80::2%1]:1"),
            ("[::ffff:10.0.0.1]:1", "10.0.0.2:1"),
        ] {
            assert_eq!(why(local, remote), None, "{local} {remote}");
        }
        for (local, remote, reason) in [
            ("10.0.0.1:1", "[fd00::1]:1", "families"),
            ("[::ffff:10.0.0.1]:1", "[fd00::1]:1", "families"),
            ("10.0.0.1:1", "10.0.0.2:0", "port"),
            ("10.0.0.1:1", "0.0.0.0:1", "peer's address is unspecified"),
            ("[::1]:1", "[::]:1", "peer's address is unspecified"),
            ("[::ffff:10.0.0.1]:1", "[::ffff:0.0.0.0]:1", "peer's address is unspecified"),
            ("10.0.0.1:1", "224.0.0.1:1", "peer's address is a multicast"),
            ("[::1]:1", "[ff02::1]:1", "peer's address is a multicast"),
            ("10.0.0.1:1", "255.255.255.255:1", "peer's address is the broadcast"),
            ("0.0.0.0:1", "10.0.0.1:1", "local address is unspecified"),
            ("[::]:1", "[::1]:1", "local address is unspecified"),
            ("239.0.0.1:1", "10.0.0.1:1", "local address is a multicast"),
            ("255.255.255.255:1", "10.0.0.1:1", "local address is the broadcast"),
        ] {
            assert!(why(local, remote).is_some_and(|why| why.contains(reason)), "{local} {remote}");
        }
    }
}
