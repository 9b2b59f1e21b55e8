//! Raw sockets, for segments that the engine forges.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

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
