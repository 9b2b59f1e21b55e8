//! A page of address space that TCP_ZEROCOPY_RECEIVE takes for its target.
//!
//! With a page of bytes or more to read, that call answers EINVAL, its counts included, unless it is given memory that
//! was mapped from a TCP socket, any one. So one such page is mapped, once in the life of the process, and nothing is
//! ever put there. It keeps the socket that it was mapped from, which is closed and of no other use.
//!
//! A socket keeps its network namespace. Where a thread has entered another namespace than its process, no page is
//! mapped, or that namespace would last as long as the process.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::null_mut;
use std::sync::OnceLock;

use super::sockopt;

static PAGE: OnceLock<u64> = OnceLock::new();

/// The page's address, 0 if there is none (yet).
pub(super) fn known() -> u64 {
    PAGE.get().copied().unwrap_or(0)
}

/// Maps the page where nobody has tried to yet; whether there is one.
pub(super) fn made() -> bool {
    if PAGE.get().is_none() && !in_own_namespace() {
        return false;
    }
    *PAGE.get_or_init(|| map().unwrap_or(0)) != 0
}

fn in_own_namespace() -> bool {
    let namespace = |of| fs::read_link(format!("/proc/{of}/ns/net")).ok();
    let own = namespace("self");
    own.is_some() && own == namespace("thread-self")
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
