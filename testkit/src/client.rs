//! Clients that stay outside the dumped tree and check every byte they get.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};

use crate::pattern::Pattern;

/// How long a client waits for one byte before it calls the connection dead.
const PATIENCE: Duration = Duration::from_secs(20);

/// One connection to a [`crate::Server`], and how much of each stream has gone over it.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    port: u16,
    sent: u64,
    received: u64,
    greedy: bool,
    /// Since then it waits for what is due.
    asked: Instant,
    silence: Duration,
}

/// Connects from the calling thread's namespace, with a receive buffer of that size or as the kernel likes. Calls that wait
/// do so for `PATIENCE`.
pub fn dial(server: SocketAddr, receive_buffer: Option<usize>) -> Result<TcpStream> {
    let family = if server.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("socket")?;
    if let Some(bytes) = receive_buffer {
        setsockopt(&fd, sockopt::RcvBuf, &bytes).context("SO_RCVBUF")?;
    }
    let stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    connect(stream.as_raw_fd(), &SockaddrStorage::from(server))
        .with_context(|| format!("cannot connect to {server}"))?;
    Ok(stream)
}

impl Client {
    /// Connects from the calling thread's namespace (see [`crate::NetNs::run`]).
    pub fn connect(server: SocketAddr) -> Result<Self> {
        Self::over(dial(server, None)?)
    }

    /// Connects with a receive buffer of about this size, which the peer can fill.
    pub fn connect_small(server: SocketAddr, receive_buffer: usize) -> Result<Self> {
        Self::over(dial(server, Some(receive_buffer))?)
    }

    /// Over a stream that [`dial`] has made.
    pub fn over(stream: TcpStream) -> Result<Self> {
        let port = stream.local_addr()?.port();
        let (asked, silence) = (Instant::now(), Duration::ZERO);
        Ok(Self { stream, port, sent: 0, received: 0, greedy: false, asked, silence })
    }

    /// The client's own port, which names its two patterns.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes written so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes read and checked so far.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// In a [`crate::Fleet`]: sends as much as it can and reads nothing until the end, which fills all queues.
    pub fn greedy(self, greedy: bool) -> Self {
        Self { greedy, ..self }
    }

    /// The longest time for which it waited in a [`crate::Fleet`] for bytes that were due.
    pub fn silence(&self) -> Duration {
        self.silence
    }

    /// Sends `len` bytes of this client's stream and has an echo server send them back.
    pub fn ping(&mut self, len: usize) -> Result<()> {
        self.send(len)?;
        self.receive_echo(len)
    }

    /// Receives `len` bytes of what an echo server sends back.
    pub fn receive_echo(&mut self, len: usize) -> Result<()> {
        self.read_checked(Pattern::to_server(self.port), len)
    }

    /// Sends `len` bytes of this client's stream.
    pub fn send(&mut self, len: usize) -> Result<()> {
        let bytes = Pattern::to_server(self.port).bytes(self.sent, len);
        self.stream.write_all(&bytes).with_context(|| self.at("cannot send"))?;
        self.sent += len as u64;
        Ok(())
    }

    /// Sends until nothing more fits into either side's buffers; how many bytes that took.
    pub fn fill(&mut self) -> Result<u64> {
        let before = self.sent;
        self.stream.set_nonblocking(true)?;
        let filled = self.write_until_blocked();
        self.stream.set_nonblocking(false)?;
        filled?;
        Ok(self.sent - before)
    }

    fn write_until_blocked(&mut self) -> Result<()> {
        // The buffers grow while the peer's kernel takes data in: full means full for a while.
        while poll(&mut [PollFd::new(self.stream.as_fd(), PollFlags::POLLOUT)], 300_u16)? != 0 {
            self.write_once(64 << 10)?;
        }
        Ok(())
    }

    fn write_once(&mut self, len: usize) -> Result<()> {
        let bytes = Pattern::to_server(self.port).bytes(self.sent, len);
        match self.stream.write(&bytes) {
            Ok(len) => self.sent += len as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).with_context(|| self.at("cannot send")),
        }
        Ok(())
    }

    /// Receives and checks `len` bytes of the server's stream.
    pub fn receive(&mut self, len: usize) -> Result<()> {
        self.read_checked(Pattern::to_client(self.port), len)
    }

    /// Receives the server's stream to its end and checks that it is `len` bytes in all.
    pub fn receive_to_end(&mut self, len: u64) -> Result<()> {
        let rest = usize::try_from(len.checked_sub(self.received).context("more than that came already")?)?;
        self.receive(rest)?;
        let more = self.stream.read(&mut [0]).with_context(|| self.at("cannot receive the end"))?;
        ensure!(more == 0, self.at("the server's stream goes on"));
        Ok(())
    }

    /// Ends this client's stream; the server's may go on.
    pub fn finish(&mut self) -> Result<()> {
        self.stream.shutdown(Shutdown::Write).with_context(|| self.at("cannot shut down"))
    }

    fn read_checked(&mut self, pattern: Pattern, len: usize) -> Result<()> {
        let mut buf = vec![0; len.min(1 << 20)];
        let mut left = len;
        while left > 0 {
            let part = &mut buf[..left.min(1 << 20)];
            let got = self.stream.read(part).with_context(|| self.at("cannot receive"))?;
            ensure!(got > 0, self.at("the server's stream ends too early"));
            pattern.check(self.received, &part[..got]).with_context(|| self.at("wrong content"))?;
            self.received += got as u64;
            left -= got;
        }
        Ok(())
    }

    pub(crate) fn at(&self, what: &str) -> String {
        format!("client {}: {what} ({} bytes sent, {} received)", self.port, self.sent, self.received)
    }
}

/// What a member of a [`crate::Fleet`] does when it is its turn. Nothing may wait there.
pub trait Talk: Send + 'static {
    /// Sends and receives what can be now; with `more` false only what is due still.
    fn turn(&mut self, more: bool) -> Result<()>;

    /// Whether anything is due still.
    fn waits(&self) -> bool;
}

/// Bytes that a client has under way at most.
const IN_FLIGHT: u64 = 16 << 10;

/// After [`Client::set_nonblocking`]: a client of an echo server.
impl Talk for Client {
    fn turn(&mut self, more: bool) -> Result<()> {
        if more && self.greedy {
            let mut before = u64::MAX;
            while self.sent != before {
                before = self.sent;
                self.write_some()?;
            }
            return Ok(());
        }
        while self.read_some()? {}
        if more && self.sent - self.received < IN_FLIGHT {
            self.write_some()?;
        }
        Ok(())
    }

    fn waits(&self) -> bool {
        self.received < self.sent
    }
}

/// For who polls: after [`Client::set_nonblocking`] nothing here waits.
impl Client {
    /// Whether calls wait, which they do unless told.
    pub fn set_nonblocking(&self, on: bool) -> Result<()> {
        Ok(self.stream.set_nonblocking(on)?)
    }

    /// Sends up to 1 KiB of this client's stream, as much as there is room for.
    pub fn write_some(&mut self) -> Result<()> {
        if !self.waits() {
            self.asked = Instant::now();
        }
        self.write_once(1 << 10)
    }

    /// Receives and checks what an echo server has sent back by now; whether that was anything.
    pub fn read_some(&mut self) -> Result<bool> {
        let mut buf = [0; 16 << 10];
        match self.stream.read(&mut buf) {
            Ok(0) => bail!(self.at("the server's stream ends")),
            Ok(len) => {
                let pattern = Pattern::to_server(self.port);
                pattern.check(self.received, &buf[..len]).with_context(|| self.at("wrong content"))?;
                self.received += len as u64;
                self.silence = self.silence.max(self.asked.elapsed());
                self.asked = Instant::now();
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error).with_context(|| self.at("cannot receive")),
        }
    }
}

/// The client's socket, for tests that look at its options.
impl AsFd for Client {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
