//! One connection of the test server, in each of its modes.

use std::collections::HashMap;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use soccr_testkit::Pattern;

use crate::server::Options;

/// Bytes that wait to be sent at most, before reading stops.
const PENDING: usize = 1 << 20;

pub struct Conn {
    socket: TcpStream,
    role: Role,
    eof: bool,
}

enum Role {
    Echo { out: Vec<u8> },
    Counter { line: Vec<u8>, out: Vec<u8> },
    Stream(Stream),
}

struct Stream {
    ours: Pattern,
    theirs: Pattern,
    to_send: u64,
    sent: u64,
    received: u64,
    hold: bool,
    client: bool,
    shut_early: bool,
    shut: bool,
}

impl Conn {
    pub fn echo(socket: TcpStream) -> Result<Self> {
        Self::new(socket, Role::Echo { out: Vec::new() })
    }

    pub fn counter(socket: TcpStream) -> Result<Self> {
        Self::new(socket, Role::Counter { line: Vec::new(), out: Vec::new() })
    }

    /// `port` is the client's, `client` tells which of the two ends this is.
    pub fn stream(socket: TcpStream, port: u16, client: bool, options: &Options) -> Result<Self> {
        let (down, up) = (Pattern::to_client(port), Pattern::to_server(port));
        let (ours, theirs, to_send) =
            if client { (up, down, options.back) } else { (down, up, options.send) };
        let stream = Stream {
            ours,
            theirs,
            to_send,
            sent: 0,
            received: 0,
            hold: options.hold,
            client,
            // One of the two must end first.
            shut_early: options.shutdown || (client && !options.hold),
            shut: false,
        };
        Self::new(socket, Role::Stream(stream))
    }

    fn new(socket: TcpStream, role: Role) -> Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, role, eof: false })
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub fn release(&mut self) {
        if let Role::Stream(stream) = &mut self.role {
            stream.hold = false;
            stream.shut_early |= stream.client;
        }
    }

    /// Whether both streams have ended; an echo ends with its client.
    pub fn done(&self) -> bool {
        match &self.role {
            Role::Echo { out } | Role::Counter { out, .. } => self.eof && out.is_empty(),
            Role::Stream(stream) => self.eof && stream.shut,
        }
    }

    pub fn interest(&self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, !self.eof && self.may_read());
        flags.set(EpollFlags::EPOLLOUT, self.has_output());
        flags
    }

    fn may_read(&self) -> bool {
        match &self.role {
            Role::Echo { out } | Role::Counter { out, .. } => out.len() < PENDING,
            Role::Stream(stream) => !stream.hold,
        }
    }

    fn has_output(&self) -> bool {
        match &self.role {
            Role::Echo { out } | Role::Counter { out, .. } => !out.is_empty(),
            Role::Stream(stream) => stream.sent < stream.to_send,
        }
    }

    /// Reads and writes what can be read and written now.
    pub fn step(&mut self, counters: &mut HashMap<String, u64>) -> Result<()> {
        while !self.eof && self.may_read() && self.read(counters)? {}
        while self.has_output() && self.write()? {}
        if let Role::Stream(stream) = &mut self.role {
            stream.shut_if_due(&self.socket, self.eof)?;
        }
        Ok(())
    }

    /// One read; false when there was nothing.
    fn read(&mut self, counters: &mut HashMap<String, u64>) -> Result<bool> {
        let mut buf = [0; 64 << 10];
        let len = match self.socket.read(&mut buf) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            // A client that goes away takes nobody with it, but a stream must be whole.
            Err(_) if !matches!(self.role, Role::Stream(_)) => 0,
            read => read.context("read")?,
        };
        self.eof = len == 0;
        let bytes = &buf[..len];
        match &mut self.role {
            Role::Echo { out } => out.extend(bytes),
            Role::Counter { line, out } => count(line, out, bytes, counters)?,
            Role::Stream(stream) => {
                stream.theirs.check(stream.received, bytes).context("the peer's stream")?;
                stream.received += len as u64;
            }
        }
        Ok(true)
    }

    /// One write; false when there was no room.
    fn write(&mut self) -> Result<bool> {
        let bytes = match &self.role {
            Role::Echo { out } | Role::Counter { out, .. } => out.clone(),
            Role::Stream(stream) => stream.next_bytes(),
        };
        let len = match self.socket.write(&bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(_) if !matches!(self.role, Role::Stream(_)) => bytes.len(), // nobody hears it
            written => written.context("write")?,
        };
        match &mut self.role {
            Role::Echo { out } | Role::Counter { out, .. } => drop(out.drain(..len)),
            Role::Stream(stream) => stream.sent += len as u64,
        }
        Ok(true)
    }
}

impl Stream {
    fn next_bytes(&self) -> Vec<u8> {
        let left = (self.to_send - self.sent).min(64 << 10);
        self.ours.bytes(self.sent, usize::try_from(left).expect("at most 64 KiB"))
    }

    fn shut_if_due(&mut self, socket: &TcpStream, eof: bool) -> Result<()> {
        if !self.shut && self.sent == self.to_send && (eof || self.shut_early) {
            self.shut = true;
            socket.shutdown(Shutdown::Write).context("shutdown")?;
        }
        Ok(())
    }
}

/// Answers every complete line.
fn count(
    line: &mut Vec<u8>,
    out: &mut Vec<u8>,
    bytes: &[u8],
    counters: &mut HashMap<String, u64>,
) -> Result<()> {
    for &byte in bytes {
        line.push(byte);
        if byte == b'\n' {
            let text = String::from_utf8(std::mem::take(line))?;
            let Some(key) = text.trim().strip_prefix("INCR ") else { bail!("unknown command {text:?}") };
            let value = counters.entry(key.to_owned()).or_default();
            *value += 1;
            write!(out, ":{value}\r\n")?;
        }
    }
    Ok(())
}

/// An accepted socket that is in no descriptor table: it is on its way inside a unix socket.
pub struct Parked {
    // Open as long as the socket is under way.
    _sender: UnixStream,
    receiver: UnixStream,
}

impl Parked {
    pub fn new(socket: TcpStream) -> Result<Self> {
        let (sender, receiver) = UnixStream::pair()?;
        let fds = [socket.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(sender.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)
            .context("SCM_RIGHTS")?;
        Ok(Self { _sender: sender, receiver })
    }

    pub fn take(self) -> Result<TcpStream> {
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let mut byte = [0];
        let mut data = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<()>(
            self.receiver.as_raw_fd(),
            &mut data,
            Some(&mut space),
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .context("recvmsg")?;
        for cmsg in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = cmsg
                && let [fd] = fds[..]
            {
                // SAFETY: the kernel has just put this descriptor into our table for this message.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into());
            }
        }
        bail!("the socket did not arrive")
    }
}
