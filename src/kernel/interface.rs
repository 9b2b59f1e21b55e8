//! Network interfaces of the current namespace and their addresses, and waiting for one.

use std::collections::BTreeSet;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use nix::ifaddrs::InterfaceAddressIterator;
use nix::net::if_::InterfaceFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::{SysError, SysResult, check, sockopt, tcp};

/// The index of an interface.
///
/// # Errors
/// ENODEV when there is no such interface.
pub fn index(name: &str) -> SysResult<u32> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|errno| SysError { call: "find the network interface", errno })
}

/// The indices of those by which packets arrive that the host sends to itself: the loopback interface, and that of each VRF.
///
/// # Errors
/// The kernel's answer.
pub fn loopbacks() -> SysResult<Vec<u32>> {
    // Of all masters, those of another kind never see such a packet.
    let is_one = InterfaceFlags::IFF_LOOPBACK | InterfaceFlags::IFF_MASTER;
    let names = list()?.filter(|it| it.flags.intersects(is_one)).map(|it| it.interface_name);
    names.collect::<BTreeSet<_>>().iter().map(|name| index(name)).collect()
}

/// One entry for each address, that of the link layer among them.
fn list() -> SysResult<InterfaceAddressIterator> {
    nix::ifaddrs::getifaddrs().map_err(|errno| SysError { call: "list the addresses", errno })
}

/// Whether sockets here can have this address, or soon will: one of IPv6 is first looked for at its neighbours.
///
/// # Errors
/// The kernel's answer.
pub fn is_local(ip: IpAddr) -> SysResult<bool> {
    let trial = sockopt::tcp_socket(ip.is_ipv6())?;
    if tcp::bind(trial.as_fd(), SocketAddr::new(ip, 0)).is_ok() {
        return Ok(true);
    }
    let mut addresses = list()?.filter_map(|interface| interface.address);
    Ok(addresses.any(|address| match ip {
        IpAddr::V4(ip) => address.as_sockaddr_in().is_some_and(|it| it.ip() == ip),
        IpAddr::V6(ip) => address.as_sockaddr_in6().is_some_and(|it| it.ip() == ip),
    }))
}

/// Waits until [`is_local`] or the time is over; says whether it is.
///
/// # Errors
/// The kernel's answer.
pub fn await_local(ip: IpAddr, until: Instant) -> SysResult<bool> {
    // Before the first look, so that nothing is missed in between.
    let changes = changes()?;
    while !is_local(ip)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        // What they are does not matter, nor that some were lost (ENOBUFS).
        while recv(changes.as_raw_fd(), &mut [0; 4096], MsgFlags::MSG_DONTWAIT).is_ok() {}
    }
    Ok(true)
}

/// A socket on which the kernel tells of addresses that come and go (rtnetlink(7)).
fn changes() -> SysResult<OwnedFd> {
    let socket = sockopt::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    // SAFETY: all zeroes is a valid sockaddr_nl.
    let mut addr: libc::sockaddr_nl = unsafe { zeroed() };
    addr.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or_default();
    addr.nl_groups = (libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR).cast_unsigned();
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_nl>()).unwrap_or_default();
    // SAFETY: a live address of that length.
    let ret = unsafe { libc::bind(socket.as_raw_fd(), (&raw const addr).cast(), len) };
    check("hear of addresses", ret)?;
    Ok(socket)
}
