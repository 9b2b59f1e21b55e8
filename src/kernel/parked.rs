//! Descriptors that do not count among those that a process has open, since they are in flight: in the queue of a unix socket
//! of its own (SCM_RIGHTS). Of more than `RLIMIT_NOFILE` in flight a user needs CAP_SYS_ADMIN or CAP_SYS_RESOURCE.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};

use super::process::received_fds;
use super::{SysError, SysResult};

/// Some descriptors, in one message that is looked at and never taken. Dropping it closes them.
#[derive(Debug)]
pub struct Parked(OwnedFd);

impl Parked {
    /// As many as one message takes (the kernel's SCM_MAX_FD).
    pub const MOST: usize = 253;

    /// Parks descriptors, [`Self::MOST`] of them at most, and at least one.
    ///
    /// # Errors
    /// ETOOMANYREFS where the user may not have so many in flight.
    pub fn park(files: &[OwnedFd]) -> SysResult<Self> {
        let failed = |errno| SysError { call: "park descriptors in a unix socket", errno };
        let pair = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC);
        let (end, queue) = pair.map_err(failed)?;
        let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let (data, rights) = ([IoSlice::new(&[0])], [ControlMessage::ScmRights(&raw)]);
        sendmsg::<()>(end.as_raw_fd(), &data, &rights, MsgFlags::MSG_NOSIGNAL, None).map_err(failed)?;
        Ok(Self(queue))
    }

    /// Duplicates of all of them, in their order.
    ///
    /// # Errors
    /// EMFILE where the process may not have so many open.
    pub fn open(&self) -> SysResult<Vec<OwnedFd>> {
        let failed = |errno| SysError { call: "open parked descriptors", errno };
        let mut control = cmsg_space!([RawFd; Self::MOST]);
        let mut byte = [0];
        let (mut data, flags) =
            ([IoSliceMut::new(&mut byte)], MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC);
        let message =
            recvmsg::<()>(self.0.as_raw_fd(), &mut data, Some(&mut control), flags).map_err(failed)?;
        if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(failed(Errno::EMFILE));
        }
        message.cmsgs().map(received_fds).map_err(failed)
    }
}
