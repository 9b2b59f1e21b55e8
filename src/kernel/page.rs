//! A page of address space that TCP_ZEROCOPY_RECEIVE takes for its target.
//!
//! With a page of bytes or more to read, that call answers EINVAL, its counts included, unless it is given memory that
//! was mapped from a TCP socket, any one. So one such page is mapped, once in the life of the process, and nothing is
//! ever put there. It keeps the socket that it was mapped from, which is closed and of no other use.
//!
//! A socket keeps its network namespace. So it is made in that of the process, or the one that a thread has entered for a
//! moment would last as long as the process.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::OnceLock;

use super::netns::NetNs;
use super::sockopt;

static PAGE: OnceLock<u64> = OnceLock::new();

/// The page's address, 0 if there is none (yet).
pub(super) fn known() -> u64 {
    PAGE.get().copied().unwrap_or(0)
}

/// Maps the page where nobody has tried to yet; whether there is one.
pub(super) fn made() -> bool {
    let map_in_own_namespace = || NetNs::open(Path::new("/proc/self/ns/net")).ok()?.run(map).ok()?;
    *PAGE.get_or_init(|| map_in_own_namespace().unwrap_or(0)) != 0
}

fn map() -> Option<u64> {
    let socket = sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        .or_else(|_| sockopt::socket(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP))
        .ok()?;
    // SAFETY: no precondition.
    let size = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: a new mapping, wherever the kernel likes; nobody reads it.
    let page = unsafe { libc::mmap(null_mut(), size, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
    if page == libc::MAP_FAILED { None } else { u64::try_from(page.addr()).ok() }
}
