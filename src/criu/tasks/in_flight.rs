//! Descriptors in flight: sent through a unix socket (SCM_RIGHTS) and not yet received. No task has them in its
//! table, so they are looked for in the queues of the tasks' unix sockets, without taking anything out.

use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recvmsg};

use crate::kernel::process::received_fds;
use crate::kernel::{SysError, sockopt};

/// A queued message that carries descriptors.
#[derive(Debug)]
pub struct Message {
    /// Duplicates of what it carries, in order.
    pub files: Vec<OwnedFd>,
}

/// Whether the descriptor is a unix socket.
pub fn is_unix(socket: BorrowedFd<'_>) -> bool {
    sockopt::domain(socket) == Ok(libc::AF_UNIX)
}

/// Looks at all messages in a unix socket's queue and returns those with descriptors.
///
/// # Errors
/// The kernel's answer; EMFILE when more descriptors are in flight than this process may hold.
pub fn peek(socket: BorrowedFd<'_>) -> Result<Vec<Message>, SysError> {
    let before = sockopt::peek_offset(socket)?;
    sockopt::set_peek_offset(socket, 0)?;
    let found = peek_all(socket);
    sockopt::set_peek_offset(socket, before)?;
    found
}

fn peek_all(socket: BorrowedFd<'_>) -> Result<Vec<Message>, SysError> {
    /// SCM_MAX_FD of the kernel.
    const MOST: usize = 253;
    let mut data = vec![0; 1 << 16];
    let mut found = Vec::new();
    loop {
        let mut control = cmsg_space!([RawFd; MOST], nix::sys::socket::UnixCredentials);
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
        let mut parts = [IoSliceMut::new(&mut data)];
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            // Empty; a listening socket; a socket that never was connected.
            Err(Errno::EAGAIN | Errno::EINVAL | Errno::ENOTCONN) => return Ok(found),
            other => other.map_err(|errno| SysError { call: "peek into a unix socket", errno })?,
        };
        let cut = message.flags.contains(MsgFlags::MSG_CTRUNC);
        let files: Vec<OwnedFd> = message.cmsgs().map(received_fds).unwrap_or_default();
        if cut {
            return Err(SysError { call: "take all descriptors in flight", errno: Errno::EMFILE });
        }
        let end = message.bytes == 0 && files.is_empty();
        if !files.is_empty() {
            found.push(Message { files });
        }
        if end && sockopt::kind(socket)? != libc::SOCK_DGRAM {
            return Ok(found);
        }
    }
}
