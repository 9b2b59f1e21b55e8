//! Socket addresses to and from the kernel's structures.

use std::mem::{MaybeUninit, size_of};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use super::{SysError, SysResult, check};

#[allow(clippy::cast_possible_truncation)] // 16 and 28
const V4_LEN: libc::socklen_t = size_of::<libc::sockaddr_in>() as libc::socklen_t;
#[allow(clippy::cast_possible_truncation)]
const V6_LEN: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;
#[allow(clippy::cast_possible_truncation)] // AF_INET is 2, AF_INET6 is 10
const FAMILIES: (libc::sa_family_t, libc::sa_family_t) = (libc::AF_INET as u16, libc::AF_INET6 as u16);

/// The kernel's form of an IPv4 address.
#[must_use]
pub fn to_sockaddr_in(addr: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: FAMILIES.0,
        sin_port: addr.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
        sin_zero: [0; 8],
    }
}

/// The kernel's form of an IPv6 address.
#[must_use]
pub fn to_sockaddr_in6(addr: SocketAddrV6) -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: FAMILIES.1,
        sin6_port: addr.port().to_be(),
        sin6_flowinfo: addr.flowinfo(),
        sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
        sin6_scope_id: addr.scope_id(),
    }
}

/// An address from the kernel's IPv4 form.
#[must_use]
pub fn from_sockaddr_in(sa: &libc::sockaddr_in) -> SocketAddr {
    let ip = Ipv4Addr::from(sa.sin_addr.s_addr.to_ne_bytes());
    SocketAddrV4::new(ip, u16::from_be(sa.sin_port)).into()
}

/// An address from the kernel's IPv6 form.
#[must_use]
pub fn from_sockaddr_in6(sa: &libc::sockaddr_in6) -> SocketAddr {
    let ip = Ipv6Addr::from(sa.sin6_addr.s6_addr);
    SocketAddrV6::new(ip, u16::from_be(sa.sin6_port), sa.sin6_flowinfo, sa.sin6_scope_id).into()
}

/// Calls `f` with the kernel's form of `addr` and its length.
pub(super) fn with_raw<R>(
    addr: SocketAddr,
    f: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> R,
) -> R {
    match addr {
        SocketAddr::V4(v4) => f(std::ptr::from_ref(&to_sockaddr_in(v4)).cast(), V4_LEN),
        SocketAddr::V6(v6) => f(std::ptr::from_ref(&to_sockaddr_in6(v6)).cast(), V6_LEN),
    }
}

/// The socket's own address.
///
/// # Errors
/// EAFNOSUPPORT for a socket that is neither IPv4 nor IPv6.
pub fn local(fd: BorrowedFd<'_>) -> SysResult<SocketAddr> {
    read("get the local address", V6_LEN, |sa, len| {
        // SAFETY: `read` gives a buffer of at least `len` bytes.
        unsafe { libc::getsockname(fd.as_raw_fd(), sa.cast(), len) }
    })
}

/// The peer's address, also of a connection that is closed by now (SO_PEERNAME, where getpeername()
/// answers ENOTCONN).
///
/// # Errors
/// ENOTCONN for a socket that never was connected.
pub fn remote(fd: BorrowedFd<'_>) -> SysResult<SocketAddr> {
    const CALL: &str = "get the peer's address";
    // SO_PEERNAME refuses a buffer larger than the address, so the length must fit the family.
    let len = match super::sockopt::domain(fd)? {
        libc::AF_INET => V4_LEN,
        libc::AF_INET6 => V6_LEN,
        _ => return Err(SysError { call: CALL, errno: Errno::EAFNOSUPPORT }),
    };
    read(CALL, len, |sa, len| {
        // SAFETY: `read` gives a buffer of at least `len` bytes.
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERNAME, sa.cast(), len) }
    })
}

fn read(
    call: &'static str,
    mut len: libc::socklen_t,
    ask: impl FnOnce(*mut libc::sockaddr_in6, *mut libc::socklen_t) -> libc::c_int,
) -> SysResult<SocketAddr> {
    let mut storage = MaybeUninit::<libc::sockaddr_in6>::zeroed();
    check(call, ask(storage.as_mut_ptr(), &raw mut len))?;
    // SAFETY: zeroed before; integers have no invalid patterns.
    let sa6 = unsafe { storage.assume_init() };
    match i32::from(sa6.sin6_family) {
        libc::AF_INET if len >= V4_LEN => {
            // SAFETY: sockaddr_in is smaller than sockaddr_in6, aligned no stricter, and initialised.
            Ok(from_sockaddr_in(unsafe { &*storage.as_ptr().cast::<libc::sockaddr_in>() }))
        }
        libc::AF_INET6 if len >= V6_LEN => Ok(from_sockaddr_in6(&sa6)),
        _ => Err(SysError { call, errno: Errno::EAFNOSUPPORT }),
    }
}
