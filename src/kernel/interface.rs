//! Network interfaces of the current namespace and their addresses, and waiting for one.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::ifaddrs::InterfaceAddressIterator;
use nix::net::if_::InterfaceFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netlink::NetlinkSocket;
use super::wire::{Attributes, Message, Messages};
use super::{SysError, SysResult, sockopt, tcp};

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
    if tcp::bind(trial.as_fd(), SocketAddr::new(ip, 0)).is_ok() { Ok(true) } else { is_assigned(ip) }
}

/// Whether an interface here has this address.
///
/// # Errors
/// The kernel's answer.
pub fn is_assigned(ip: IpAddr) -> SysResult<bool> {
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
    let mut changes = AddressChanges::hear()?;
    while !is_local(ip)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = [PollFd::new(changes.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
        changes.deleted(); // what they are does not matter
    }
    Ok(true)
}

/// The kernel tells of addresses that come to interfaces of a namespace and go.
#[derive(Debug)]
pub struct AddressChanges(NetlinkSocket);

impl AddressChanges {
    /// Of the current namespace, from now on.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn hear() -> SysResult<Self> {
        NetlinkSocket::route(libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR).map(Self)
    }

    /// The addresses that are gone since the last call, each with the index of the interface that had it. Waits for nothing;
    /// the kernel may have lost some.
    pub fn deleted(&mut self) -> Vec<(IpAddr, u32)> {
        let mut all = Vec::new();
        let mut buffer = [0; 8192];
        loop {
            match self.0.receive(&mut buffer) {
                Ok(Some(len)) => all.extend(Messages::new(&buffer[..len]).flatten().filter_map(deleted_in)),
                Err(error) if error.errno == Errno::ENOBUFS => {}
                Ok(None) | Err(_) => return all,
            }
        }
    }
}

/// Readable when something has changed.
impl AsFd for AddressChanges {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `struct ifaddrmsg`, and the attributes behind it.
fn deleted_in(message: Message<'_>) -> Option<(IpAddr, u32)> {
    let (head, attributes) = message.payload.split_first_chunk::<8>()?;
    let [.., a, b, c, d] = *head;
    let attributes = Attributes::new(attributes);
    let find = |kind| attributes.find(kind).ok().flatten();
    // Of the two ends of a point-to-point link this is ours.
    let ip = find(libc::IFA_LOCAL).or_else(|| find(libc::IFA_ADDRESS))?;
    let is_deleted = message.header.kind == libc::RTM_DELADDR;
    is_deleted.then_some((ip_of(ip.bytes())?, u32::from_ne_bytes([a, b, c, d])))
}

/// An address as netlink has it.
pub(super) fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4().or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}
