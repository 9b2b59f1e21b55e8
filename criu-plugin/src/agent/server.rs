//! The agent's end of the way from the hooks.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{MsgFlags, recvmsg};
use soccr::kernel::process::received_fds;

use crate::protocol::{REQUEST, Reply, Request};

/// Where requests come in.
#[derive(Debug)]
pub struct Server(OwnedFd);

/// A request with the way to answer it.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// The descriptor that came along.
    pub file: Option<OwnedFd>,
    /// Where the answer goes.
    pub answer: Answer,
}

impl Server {
    /// Serves the hooks behind this socket.
    #[must_use]
    pub fn new(control: OwnedFd) -> Self {
        Self(control)
    }

    /// The next request; `None` when every client is gone.
    ///
    /// # Errors
    /// A broken packet, or the kernel's answer.
    pub fn next(&self) -> io::Result<Option<Asked>> {
        let mut packet = [0; REQUEST];
        let mut control = cmsg_space!([RawFd; 2]);
        let mut parts = [IoSliceMut::new(&mut packet)];
        let received =
            recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut files = received_fds(received.cmsgs()?).into_iter();
        if received.bytes == 0 {
            return Ok(None);
        }
        let answer = files.next().ok_or(io::ErrorKind::InvalidData)?;
        let file = files.next();
        drop(files);
        let request = Request::decode(packet).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some(Asked { request, file, answer: Answer(answer) }))
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where the answer to one request goes.
#[derive(Debug)]
pub struct Answer(OwnedFd);

impl Answer {
    /// Sends a part that is not the last. A client that is gone does not mind.
    pub fn send(&self, reply: Reply<'_>) {
        let _ = nix::sys::socket::send(self.0.as_raw_fd(), &reply.encode(), MsgFlags::MSG_NOSIGNAL);
    }

    /// Sends the result, which ends the answer.
    pub fn finish(self, done: bool) {
        self.send(if done { Reply::Done } else { Reply::Refused });
    }

    /// Another handle on the same answer, for the log.
    ///
    /// # Errors
    /// EMFILE.
    pub fn duplicate(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}
