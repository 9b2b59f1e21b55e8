//! The server that is dumped: a listener of each family, shared by two processes of one thread each
//! with an epoll of its own; what each connection is to do is the client's order.
//!
//! It writes a line to standard error for each connection that does not end as it should, begun by
//! [`WRONG`] or [`DEAD`], and goes on with the others.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::{ForkResult, dup2_stdout, fork};
use soccr_testkit::Pattern;
use soccr_testkit::server::say_ready;

use crate::soak::fault::Fault;
use crate::soak::order::{OPEN, Order, STAMP, block};

/// Where IPv4 sockets are.
pub const PORT: u16 = 7001;

/// Where IPv6 sockets are, which also take IPv4-mapped connections.
pub const PORT_V6: u16 = 7002;

/// Begins the line of a connection that broke.
pub const DEAD: &str = "dead:";

/// Begins the line of a connection whose content was not what the client had to send.
pub const WRONG: &str = "wrong:";

const TICK: Duration = Duration::from_millis(10);

/// Bytes that one connection may read or write before others have their turn.
const TURN: usize = 256 << 10;

pub fn serve() -> Result<()> {
    nix::unistd::setsid().context("setsid")?;
    let listeners = listen()?;
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { .. } => say_ready(listeners[0].local_addr()?)?,
        // The starter reads until nobody holds the other end of the pipe.
        ForkResult::Child => dup2_stdout(File::options().write(true).open("/dev/null")?)?,
    }
    Loop::new(listeners)?.run()
}

fn listen() -> Result<[TcpListener; 2]> {
    let addresses: [SocketAddr; 2] =
        [(Ipv4Addr::UNSPECIFIED, PORT).into(), (Ipv6Addr::UNSPECIFIED, PORT_V6).into()];
    let [v4, v6] = addresses
        .map(|address| TcpListener::bind(address).with_context(|| format!("cannot listen on {address}")));
    Ok([v4?, v6?])
}

struct Loop {
    epoll: Epoll,
    listeners: [TcpListener; 2],
    sessions: HashMap<RawFd, Session>,
    next_tick: Instant,
}

impl Loop {
    fn new(listeners: [TcpListener; 2]) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for listener in &listeners {
            listener.set_nonblocking(true)?;
            epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, key(listener)))?;
        }
        Ok(Self { epoll, listeners, sessions: HashMap::new(), next_tick: Instant::now() })
    }

    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        loop {
            let left = self.next_tick.saturating_duration_since(Instant::now());
            let timeout = EpollTimeout::try_from(left + Duration::from_millis(1))?;
            let ready = match self.epoll.wait(&mut events, timeout) {
                Err(Errno::EINTR) => 0,
                ready => ready?,
            };
            for event in &events[..ready] {
                let fd = RawFd::try_from(event.data())?;
                match self.listeners.iter().position(|listener| listener.as_raw_fd() == fd) {
                    Some(listener) => self.accept(listener)?,
                    None => self.step(fd)?,
                }
            }
            if Instant::now() >= self.next_tick {
                self.tick()?;
            }
        }
    }

    fn tick(&mut self) -> Result<()> {
        self.next_tick = Instant::now() + TICK;
        let paced: Vec<_> =
            self.sessions.iter().filter(|(_, session)| session.is_paced()).map(|(&fd, _)| fd).collect();
        for fd in paced {
            if let Some(session) = self.sessions.get_mut(&fd) {
                session.allow();
            }
            self.step(fd)?;
        }
        Ok(())
    }

    fn accept(&mut self, listener: usize) -> Result<()> {
        loop {
            let (stream, peer) = match self.listeners[listener].accept() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                accepted => accepted.context("accept")?,
            };
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            let fd = stream.as_raw_fd();
            self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, key(&stream)))?;
            self.sessions.insert(fd, Session::new(stream, peer.port()));
            self.step(fd)?;
        }
    }

    /// Does what can be done for one connection and waits for what cannot.
    fn step(&mut self, fd: RawFd) -> Result<()> {
        let Some(session) = self.sessions.get_mut(&fd) else { return Ok(()) };
        let stepped = session.step();
        if let Err(fault) = &stepped {
            complain(session.port, fault);
        }
        if stepped.is_err() || session.done() {
            let session = self.sessions.remove(&fd).context("a connection ends once")?;
            return Ok(self.epoll.delete(&session.socket)?);
        }
        let mut event = EpollEvent::new(session.interest(), key(&session.socket));
        Ok(self.epoll.modify(&session.socket, &mut event)?)
    }
}

fn key(fd: &impl AsFd) -> u64 {
    u64::try_from(fd.as_fd().as_raw_fd()).expect("descriptors are no negative numbers")
}

fn complain(port: u16, fault: &Fault) {
    let kind = if fault.is_wrong() { WRONG } else { DEAD };
    eprintln!("{kind} client port {port}: {fault}");
}

/// One connection.
struct Session {
    socket: TcpStream,
    port: u16,
    head: Vec<u8>,
    order: Option<Order>,
    received: u64,
    eof: bool,
    out: Vec<u8>,
    out_at: usize,
    blocks: u64,
    last_stamped: bool,
    shut: bool,
    may_read: usize,
    may_write: usize,
}

impl Session {
    fn new(socket: TcpStream, port: u16) -> Self {
        Self {
            socket,
            port,
            head: Vec::new(),
            order: None,
            received: 0,
            eof: false,
            out: Vec::new(),
            out_at: 0,
            blocks: 0,
            last_stamped: false,
            shut: false,
            may_read: TURN,
            may_write: 0,
        }
    }

    fn is_paced(&self) -> bool {
        self.order.is_some_and(|order| order.read > 0 || order.write > 0)
    }

    /// A new tick, or a new turn for those that have no pace.
    fn allow(&mut self) {
        let amount = |bytes| if bytes == 0 { TURN } else { usize::try_from(bytes).unwrap_or(TURN) };
        if let Some(order) = self.order {
            (self.may_read, self.may_write) = (amount(order.read), amount(order.write));
        }
    }

    fn interest(&self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, !self.eof && self.may_read > 0);
        flags.set(EpollFlags::EPOLLOUT, self.may_write > 0 && self.has_output());
        flags
    }

    fn done(&self) -> bool {
        self.eof && self.shut
    }

    fn step(&mut self) -> Result<(), Fault> {
        if !self.is_paced() {
            self.allow();
        }
        while !self.eof && self.may_read > 0 && self.read()? {}
        while self.may_write > 0 && self.write()? {}
        if self.last_stamped && self.out.is_empty() && !self.shut {
            self.socket.shutdown(Shutdown::Write).map_err(Fault::dead("shutdown"))?;
            self.shut = true;
        }
        if !self.is_paced() {
            self.allow(); // interest() shall not see a used-up turn
        }
        Ok(())
    }

    /// One read; false when there was nothing.
    fn read(&mut self) -> Result<bool, Fault> {
        let mut buf = [0; 64 << 10];
        let room = buf.len().min(self.may_read);
        let len = match self.socket.read(&mut buf[..room]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            read => read.map_err(Fault::dead("read"))?,
        };
        self.may_read -= len;
        if len == 0 {
            self.eof = true;
            return self.check_end().map(|()| true);
        }
        self.take(&buf[..len])?;
        Ok(true)
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let (head, bytes) = bytes.split_at(bytes.len().min(Order::LEN - self.head.len()));
        self.head.extend(head);
        if self.order.is_none()
            && let Some(head) = self.head.first_chunk()
        {
            self.begin(Order::decode(head))?;
        }
        Pattern::to_server(self.port).check(self.received, bytes).map_err(Fault::wrong)?;
        self.received += bytes.len() as u64;
        Ok(())
    }

    fn begin(&mut self, order: Order) -> Result<(), Fault> {
        self.order = Some(order);
        self.allow();
        let buffers = usize::try_from(order.buffers).map_err(Fault::wrong)?;
        if buffers > 0 {
            setsockopt(&self.socket, sockopt::SndBuf, &buffers).map_err(Fault::dead("SO_SNDBUF"))?;
            setsockopt(&self.socket, sockopt::RcvBuf, &buffers).map_err(Fault::dead("SO_RCVBUF"))?;
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), Fault> {
        let Some(order) = self.order else { return Err(Fault::wrong("ended before its order")) };
        if order.upload != OPEN && order.upload != self.received {
            let said = format!("{} of {} bytes came before the end", self.received, order.upload);
            return Err(Fault::wrong(said));
        }
        Ok(())
    }

    fn has_output(&self) -> bool {
        !self.out.is_empty() || self.next_is_block() || self.next_is_last_stamp()
    }

    fn next_is_block(&self) -> bool {
        self.order.is_some_and(|order| self.blocks < order.blocks && !(order.blocks == OPEN && self.eof))
    }

    /// The last stamp of an open upload counts all of it, so its end must have come.
    fn next_is_last_stamp(&self) -> bool {
        let due = |order: Order| !self.next_is_block() && (self.eof || order.upload != OPEN);
        !self.last_stamped && self.order.is_some_and(due)
    }

    /// One write; false when there was nothing to write or no room.
    fn write(&mut self) -> Result<bool, Fault> {
        if self.out.is_empty() && !self.refill() {
            return Ok(false);
        }
        let bytes = &self.out[self.out_at..];
        let bytes = &bytes[..bytes.len().min(self.may_write)];
        let len = match self.socket.write(bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            written => written.map_err(Fault::dead("write"))?,
        };
        self.may_write -= len;
        self.out_at += len;
        if self.out_at == self.out.len() {
            self.out.clear();
            self.out_at = 0;
        }
        Ok(true)
    }

    fn refill(&mut self) -> bool {
        if self.next_is_block() {
            self.out = block(Pattern::to_client(self.port), self.blocks, self.received);
            self.blocks += 1;
        } else if self.next_is_last_stamp() {
            self.out = self.received.to_be_bytes().to_vec();
            debug_assert_eq!(self.out.len(), STAMP);
            self.last_stamped = true;
        }
        !self.out.is_empty()
    }
}
