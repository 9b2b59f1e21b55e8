//! Raw and packet sockets, for segments that the engine forges or sends on.

use std::mem::{size_of, zeroed};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::{SysError, SysResult, addr, check, sockopt};

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

/// A packet socket of the current network namespace on the interface with this index, which hears what comes to this host's
/// link-layer address for `ip`; packets are given and taken with their IP header.
///
/// # Errors
/// EPERM without CAP_NET_RAW in the namespace.
pub fn open_link(device: u32, ip: IpAddr) -> SysResult<OwnedFd> {
    let socket = sockopt::socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?; // hears nothing before bind()
    let mut filter = packets_for(ip);
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).unwrap_or_default(),
        filter: filter.as_mut_ptr(),
    };
    let len = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or_default();
    // SAFETY: a live structure of that length, which points to as many live instructions as it says.
    let ret = unsafe {
        let program = (&raw const program).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program, len)
    };
    check("filter what comes by a link", ret)?;
    let (addr, len) = link_addr(device, ip.is_ipv6(), &[])?;
    // SAFETY: a live address of that length.
    let ret = unsafe { libc::bind(socket.as_raw_fd(), (&raw const addr).cast(), len) };
    check("hear what comes by a link", ret)?;
    Ok(socket)
}

/// Sends one packet, IP header included, out of the interface with this index to a link-layer address: past routes and firewall.
///
/// # Errors
/// EMSGSIZE: the packet is larger than the interface's MTU, or the address than any Ethernet's.
pub fn send_on_link(fd: BorrowedFd<'_>, packet: &[u8], device: u32, to: &[u8]) -> SysResult<()> {
    let is_ipv6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let (addr, len) = link_addr(device, is_ipv6, to)?;
    // SAFETY: the packet and the address are live for the call, with their lengths.
    let sent = unsafe {
        libc::sendto(fd.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0, (&raw const addr).cast(), len)
    };
    if sent < 0 { Err(SysError::last("send a packet on")) } else { Ok(()) }
}

fn link_addr(device: u32, ipv6: bool, to: &[u8]) -> SysResult<(libc::sockaddr_ll, libc::socklen_t)> {
    let too_long = SysError { call: "send a packet on", errno: Errno::EMSGSIZE };
    let protocol = if ipv6 { libc::ETH_P_IPV6 } else { libc::ETH_P_IP };
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut addr: libc::sockaddr_ll = unsafe { zeroed() };
    addr.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or_default();
    addr.sll_protocol = u16::try_from(protocol).unwrap_or_default().to_be();
    addr.sll_ifindex = device.cast_signed();
    addr.sll_addr.get_mut(..to.len()).ok_or(too_long)?.copy_from_slice(to);
    addr.sll_halen = u8::try_from(to.len()).unwrap_or_default();
    Ok((addr, libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap_or_default()))
}

/// Classic BPF: packets to this host's link-layer address whose destination is `ip`.
fn packets_for(ip: IpAddr) -> Vec<libc::sock_filter> {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const PACKET_TYPE: u32 = 0xffff_f000 + 4; // SKF_AD_OFF + SKF_AD_PKTTYPE
    let (destination, address) = match ip {
        IpAddr::V4(ip) => (16, ip.octets().to_vec()),
        IpAddr::V6(ip) => (24, ip.octets().to_vec()),
    };
    let words = address.chunks_exact(4).map(|word| u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    let wanted: Vec<(u32, u32)> = [(PACKET_TYPE, u32::from(libc::PACKET_HOST))]
        .into_iter()
        .chain((destination..).step_by(4).zip(words))
        .collect();
    let step = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let compare = wanted.iter().zip((1_u8..=u8::try_from(wanted.len()).unwrap_or_default()).rev()).flat_map(
        // What differs goes to the last step: over the loads and comparisons that follow, and the return before it.
        |((at, value), left)| [step(LOAD_WORD, 0, *at), step(JUMP_IF_EQUAL, 2 * left - 1, *value)],
    );
    compare.chain([step(RETURN, 0, u32::MAX), step(RETURN, 0, 0)]).collect()
}
