//! Raw and packet sockets, for segments that the engine forges or sends on.

use std::mem::{size_of, zeroed};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{SysError, SysResult, addr, sockopt};

/// A raw socket of the current network namespace; packets are given with their IP header.
///
/// # Errors
/// EPERM without CAP_NET_RAW in the namespace.
pub fn open(ipv6: bool) -> SysResult<OwnedFd> {
    let domain = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    sockopt::socket(domain, libc::SOCK_RAW, libc::IPPROTO_RAW)
}

/// Sends one packet, IP header included, towards `to` (whose port the kernel ignores).
///
/// # Errors
/// The kernel's answer: EPERM when a firewall of this host drops it on the way out.
pub fn send(fd: BorrowedFd<'_>, packet: &[u8], to: SocketAddr) -> SysResult<()> {
    let mut to = to;
    to.set_port(0); // a raw IPv6 socket takes it for a protocol number
    addr::with_raw(to, |sa, len| {
        // SAFETY: the packet and the address are live for the call, with their lengths.
        let sent = unsafe { libc::sendto(fd.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, sa, len) };
        if sent < 0 { Err(SysError::last("send a forged segment")) } else { Ok(()) }
    })
}

/// A packet socket of the current network namespace, which receives nothing; packets are given with their IP header.
///
/// # Errors
/// EPERM without CAP_NET_RAW in the namespace.
pub fn open_link() -> SysResult<OwnedFd> {
    sockopt::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)
}

/// Sends one packet, IP header included, out of the interface with this index to a link-layer address: past routes and firewall.
///
/// # Errors
/// EMSGSIZE: the packet is larger than the interface's MTU, or the address than any Ethernet's.
pub fn send_on_link(fd: BorrowedFd<'_>, packet: &[u8], device: u32, to: &[u8]) -> SysResult<()> {
    const CALL: &str = "send a packet on";
    let protocol =
        if packet.first().is_some_and(|first| first >> 4 == 6) { libc::ETH_P_IPV6 } else { libc::ETH_P_IP };
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut addr: libc::sockaddr_ll = unsafe { zeroed() };
    addr.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or_default();
    addr.sll_protocol = u16::try_from(protocol).unwrap_or_default().to_be();
    addr.sll_ifindex = device.cast_signed();
    let room = addr.sll_addr.get_mut(..to.len()).ok_or(SysError { call: CALL, errno: Errno::EMSGSIZE })?;
    room.copy_from_slice(to);
    addr.sll_halen = u8::try_from(to.len()).unwrap_or_default();
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap_or_default();
    // SAFETY: the packet and the address are live for the call, with their lengths.
    let sent = unsafe {
        libc::sendto(fd.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, (&raw const addr).cast(), len)
    };
    if sent < 0 { Err(SysError::last(CALL)) } else { Ok(()) }
}
