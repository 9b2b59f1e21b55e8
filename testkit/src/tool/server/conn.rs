//! One connection of the test server, in each of its modes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use soccr_testkit::Pattern;

use super::Options;
use super::session::{Session, TURN};

/// Bytes that wait to be sent at most, before reading stops.
const PENDING: usize = 1 << 20;

pub struct Conn {
    socket: TcpStream,
    role: Role,
    /// The peer's stream has ended; ours has.
    eof: bool,
    shut: bool,
    /// What waits to be sent, from `at` on.
    out: Vec<u8>,
    at: usize,
}

pub enum Role {
    Echo { hold: bool },
    Counter { line: Vec<u8>, counters: Rc<RefCell<HashMap<String, u64>>> },
    Stream(Stream),
    Ordered(Session),
}

pub struct Stream {
    ours: Pattern,
    theirs: Pattern,
    to_send: u64,
    sent: u64,
    received: u64,
    hold: bool,
    client: bool,
    shut_early: bool,
}

impl Stream {
    /// `port` is the client's, `client` tells which of the two ends this is.
    pub fn new(port: u16, client: bool, options: &Options) -> Self {
        let (down, up) = (Pattern::to_client(port), Pattern::to_server(port));
        let (ours, theirs, to_send) =
            if client { (up, down, options.back) } else { (down, up, options.send) };
        // One of the two must end first.
        let shut_early = options.shutdown || (client && !options.hold);
        Self { ours, theirs, to_send, sent: 0, received: 0, hold: options.hold, client, shut_early }
    }
}

/// What the modes differ in.
impl Role {
    /// How many bytes to read now, while so many wait to be sent.
    fn may_read(&self, waiting: usize) -> usize {
        match self {
            Self::Echo { hold: true } => 0,
            Self::Echo { .. } | Self::Counter { .. } => PENDING.saturating_sub(waiting),
            Self::Stream(stream) => {
                if stream.hold {
                    0
                } else {
                    TURN
                }
            }
            Self::Ordered(session) => session.may_read,
        }
    }

    fn may_write(&self) -> usize {
        if let Self::Ordered(session) = self { session.may_write } else { TURN }
    }

    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>, socket: &TcpStream) -> Result<()> {
        match self {
            Self::Echo { .. } => out.extend(bytes),
            Self::Counter { line, counters } => count(line, out, bytes, &mut counters.borrow_mut())?,
            Self::Stream(stream) => {
                stream.theirs.check(stream.received, bytes).context("the peer's stream")?;
                stream.received += bytes.len() as u64;
            }
            Self::Ordered(session) => session.take(bytes, socket)?,
        }
        Ok(())
    }

    /// Whether there is something to send that nobody has asked for just now.
    fn has_more(&self, eof: bool) -> bool {
        match self {
            Self::Echo { .. } | Self::Counter { .. } => false,
            Self::Stream(stream) => stream.sent < stream.to_send,
            Self::Ordered(session) => session.has_more(eof),
        }
    }

    fn more(&mut self, eof: bool) -> Vec<u8> {
        match self {
            Self::Echo { .. } | Self::Counter { .. } => Vec::new(),
            Self::Stream(stream) => {
                let left = (stream.to_send - stream.sent).min(64 << 10);
                let bytes = stream.ours.bytes(stream.sent, usize::try_from(left).expect("at most 64 KiB"));
                stream.sent += left;
                bytes
            }
            Self::Ordered(session) => session.more(eof),
        }
    }

    /// Whether our stream ends when all is sent; an echo's ends with its socket.
    fn may_shut(&self, eof: bool) -> bool {
        match self {
            Self::Echo { .. } | Self::Counter { .. } => false,
            Self::Stream(stream) => eof || stream.shut_early,
            Self::Ordered(session) => session.is_over(),
        }
    }

    /// A client that goes away takes nobody with it, but a stream must be whole.
    fn forgives(&self) -> bool {
        matches!(self, Self::Echo { .. } | Self::Counter { .. })
    }
}

impl Conn {
    pub fn new(socket: TcpStream, role: Role) -> Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, role, eof: false, shut: false, out: Vec::new(), at: 0 })
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// SIGUSR1 came.
    pub fn release(&mut self) {
        match &mut self.role {
            Role::Echo { hold } => *hold = false,
            Role::Stream(stream) => {
                stream.hold = false;
                stream.shut_early |= stream.client;
            }
            Role::Counter { .. } | Role::Ordered(_) => {}
        }
    }

    /// A new tick; whether that is anything to this connection.
    pub fn tick(&mut self) -> bool {
        if let Role::Ordered(session) = &mut self.role {
            session.allow();
            return session.is_paced();
        }
        false
    }

    /// The client's port, where its end takes nobody with it.
    pub fn ordered(&self) -> Option<u16> {
        if let Role::Ordered(session) = &self.role { Some(session.port()) } else { None }
    }

    /// Whether both streams have ended; an echo ends with its client.
    pub fn done(&self) -> bool {
        self.eof && self.out.is_empty() && (self.shut || self.role.forgives())
    }

    pub fn interest(&self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, !self.eof && self.may_read() > 0);
        flags.set(EpollFlags::EPOLLOUT, self.has_output() && self.role.may_write() > 0);
        flags
    }

    fn may_read(&self) -> usize {
        self.role.may_read(self.out.len() - self.at)
    }

    fn has_output(&self) -> bool {
        !self.out.is_empty() || self.role.has_more(self.eof)
    }

    /// Reads and writes what can be read and written now, within a turn.
    pub fn step(&mut self) -> Result<()> {
        let mut left = TURN;
        while !self.eof && left > 0 && self.may_read() > 0 && self.read(&mut left)? {}
        let mut left = TURN;
        while self.has_output() && left > 0 && self.role.may_write() > 0 && self.write(&mut left)? {}
        if !self.shut && !self.has_output() && self.role.may_shut(self.eof) {
            self.shut = true;
            self.socket.shutdown(Shutdown::Write).context("shutdown")?;
        }
        if let Role::Ordered(session) = &mut self.role
            && !session.is_paced()
        {
            session.allow();
        }
        Ok(())
    }

    /// One read; false when there was nothing.
    fn read(&mut self, left: &mut usize) -> Result<bool> {
        let mut buf = [0; 64 << 10];
        let room = buf.len().min(self.may_read());
        let len = match self.socket.read(&mut buf[..room]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(_) if self.role.forgives() => 0,
            read => read.context("read")?,
        };
        *left = left.saturating_sub(len);
        self.eof = len == 0;
        if let Role::Ordered(session) = &mut self.role {
            session.may_read -= len;
            if self.eof {
                session.check_end()?;
            }
        }
        self.role.take(&buf[..len], &mut self.out, &self.socket)?;
        Ok(true)
    }

    /// One write; false when there was no room.
    fn write(&mut self, left: &mut usize) -> Result<bool> {
        if self.out.is_empty() {
            self.out = self.role.more(self.eof);
        }
        let bytes = &self.out[self.at..];
        let bytes = &bytes[..bytes.len().min(self.role.may_write())];
        let len = match self.socket.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(_) if self.role.forgives() => bytes.len(), // nobody hears it
            written => written.context("write")?,
        };
        *left = left.saturating_sub(len);
        if let Role::Ordered(session) = &mut self.role {
            session.may_write -= len;
        }
        self.at += len;
        if self.at == self.out.len() {
            self.out.clear();
            self.at = 0;
        }
        Ok(true)
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
