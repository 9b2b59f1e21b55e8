//! The kernel interface: one typed function per socket option, ioctl and system call.
//!
//! This is the only place of the engine with `unsafe` code; nothing above it knows a raw number.

#![allow(unsafe_code)]

pub mod addr;
pub mod ao;
pub mod bpf;
pub mod btf;
pub mod diag;
pub mod ecn;
pub mod interface;
pub mod neighbour;
pub mod netlink;
pub mod netns;
pub mod options;
mod page;
pub mod parked;
pub mod process;
pub mod raw;
pub mod reqsk;
mod sock_ops;
pub mod sockopt;
pub mod tcp;
pub mod warm;
pub(crate) mod wire;

use nix::errno::Errno;

/// A system call that failed: what was asked of the kernel, and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {call}: {errno}")]
pub struct SysError {
    /// What was tried, such as "set TCP_REPAIR".
    pub call: &'static str,
    /// The kernel's error.
    pub errno: Errno,
}

impl SysError {
    /// The error of the call that just failed on this thread.
    #[must_use]
    pub fn last(call: &'static str) -> Self {
        Self { call, errno: Errno::last() }
    }
}

/// A function of this module succeeded, or the system call in it failed.
pub type SysResult<T> = Result<T, SysError>;

/// Turns the kernel's "-1 and errno" into a result.
pub(crate) fn check(call: &'static str, ret: libc::c_int) -> SysResult<libc::c_int> {
    if ret < 0 { Err(SysError::last(call)) } else { Ok(ret) }
}
