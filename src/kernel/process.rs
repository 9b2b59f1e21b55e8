//! Other processes: pidfds and copies of their descriptors.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::sys::socket::ControlMessageOwned;

use super::{SysError, SysResult};

/// A descriptor's number in another process: nothing that this process could use as its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RemoteFd(pub u32);

impl std::fmt::Display for RemoteFd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

fn owned(call: &'static str, fd: libc::c_long) -> SysResult<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: a descriptor the kernel just gave us; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(SysError::last(call)),
    }
}

/// A descriptor that stands for the process and becomes readable when it ends (Linux 5.3).
///
/// # Errors
/// ESRCH when there is no such process.
pub fn pidfd_open(pid: i32) -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    owned("open a pidfd", unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A duplicate of another process's descriptor (Linux 5.6).
///
/// # Errors
/// EBADF when it has none of that number, EPERM without the right to trace it, ESRCH when it is gone.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: RemoteFd) -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    owned("duplicate a task's descriptor", unsafe {
        libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd.0, 0)
    })
}

/// Sends a signal to the process that a pidfd stands for (Linux 5.1).
///
/// # Errors
/// ESRCH when it is gone, EPERM without the right to signal it.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: Signal) -> SysResult<()> {
    let (signal, none) = (signal as libc::c_int, std::ptr::null::<libc::siginfo_t>());
    // SAFETY: without a `siginfo_t` the kernel makes one as for kill().
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    if ret < 0 { Err(SysError::last("send a signal to a task")) } else { Ok(()) }
}

/// The descriptors that a message of a unix socket brought (SCM_RIGHTS), in their order.
///
/// `messages` are those of a `recvmsg()` that has just returned: each number in them is a new descriptor of ours.
#[must_use]
pub fn received_fds(messages: impl Iterator<Item = ControlMessageOwned>) -> Vec<OwnedFd> {
    let mut files = Vec::new();
    for message in messages {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just installed these for us; nobody else owns them.
            files.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    files
}
