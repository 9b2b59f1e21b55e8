//! `union libsoccr_addr` to and from an address.

use std::net::{SocketAddr, SocketAddrV6};
use std::ptr::NonNull;

use engine::kernel::addr;

/// The address of one end: sa.sa_family tells which member holds it, AF_INET v4, AF_INET6 v6.
#[allow(non_camel_case_types)]
#[derive(Clone, Copy)]
#[repr(C)]
pub union libsoccr_addr {
    /// The family.
    pub sa: libc::sockaddr,
    /// An IPv4 address and a port.
    pub v4: libc::sockaddr_in,
    /// An IPv6 address, which may be an IPv4 one mapped into IPv6, and a port.
    pub v6: libc::sockaddr_in6,
}

impl From<SocketAddr> for libsoccr_addr {
    fn from(address: SocketAddr) -> Self {
        // All of it is initialised, also where an IPv4 address is shorter than the union.
        let unspecified = SocketAddrV6::new([0; 16].into(), 0, 0, 0);
        let mut raw = Self { v6: addr::to_sockaddr_in6(unspecified) };
        match address {
            SocketAddr::V4(v4) => raw.v4 = addr::to_sockaddr_in(v4),
            SocketAddr::V6(v6) => raw.v6 = addr::to_sockaddr_in6(v6),
        }
        raw
    }
}

/// The address that a C program wrote; `None` for a family that is neither AF_INET nor
/// AF_INET6.
///
/// # Safety `raw` points to a socket address as long as its family says, which may be shorter
/// than the union.
pub unsafe fn read(raw: NonNull<libsoccr_addr>) -> Option<SocketAddr> {
    // SAFETY: every socket address begins with its family.
    let family = unsafe { raw.cast::<libc::sa_family_t>().read_unaligned() };
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: the family says that it is a sockaddr_in.
            let v4 = unsafe { raw.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(addr::from_sockaddr_in(&v4))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that it is a sockaddr_in6.
            let v6 = unsafe { raw.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(addr::from_sockaddr_in6(&v6))
        }
        _ => None,
    }
}
