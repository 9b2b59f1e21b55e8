//! The server that tests dump: one thread, epoll, nothing open but its sockets.

mod conn;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{Backlog, setsockopt, sockopt};
use soccr_testkit::server::{reuses, say_ready};

use conn::{Conn, Parked};

/// Serves: what the tests dump; prints `ready ADDR` once it listens
#[derive(clap::Args)]
pub struct Options {
    /// Where
    #[arg(long, value_name = "ADDR", required_unless_present = "connect")]
    listen: Option<SocketAddr>,
    /// Listen there too
    #[arg(long, value_name = "ADDR")]
    also: Option<SocketAddr>,
    /// Be the client of that server (`--join child` does so)
    #[arg(long, value_name = "ADDR", hide = true)]
    connect: Option<SocketAddr>,
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// stream: exit once N connections have ended, with 0 if all was right
    #[arg(long, value_name = "N")]
    conns: Option<usize>,
    /// stream: how much to send
    #[arg(long, value_name = "BYTES", default_value_t)]
    send: u64,
    /// stream: read nothing before SIGUSR1
    #[arg(long)]
    hold: bool,
    /// stream: end the own stream as soon as it is written, not after the client's
    #[arg(long)]
    shutdown: bool,
    /// stream: close nothing before SIGUSR1
    #[arg(long)]
    keep: bool,
    /// Of accepted sockets
    #[arg(long, value_name = "BYTES")]
    rcvbuf: Option<usize>,
    /// Of accepted sockets
    #[arg(long, value_name = "BYTES")]
    sndbuf: Option<usize>,
    /// SO_REUSEADDR off in about half of the accepted sockets
    #[arg(long)]
    reuse_half: bool,
    /// Connect to this unix socket too: no dump can take that along
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// stream: be the client too
    #[arg(long, value_enum)]
    join: Option<Join>,
    /// stream: how much that client sends
    #[arg(long, value_name = "BYTES", default_value_t)]
    back: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// Send everything back
    #[default]
    Echo,
    /// Answer each line `INCR KEY` with `:N`, as redis does
    Counter,
    /// Send a pattern, check the client's pattern
    Stream,
    /// Echo, but each accepted socket waits inside a unix socket until SIGUSR1
    Inflight,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Join {
    /// In this process
    #[value(name = "self")]
    Itself,
    /// In a child
    Child,
}

pub fn run(options: Options) -> Result<()> {
    // A dump wants a whole session; a child that we start is in ours.
    if options.listen.is_some() {
        nix::unistd::setsid().context("setsid")?;
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let mut server = Loop::new(options)?;
    server.run()
}

struct Loop {
    options: Options,
    epoll: Epoll,
    released: SignalFd,
    listeners: Vec<TcpListener>,
    conns: HashMap<RawFd, Conn>,
    /// Finished connections that `--keep` keeps open.
    kept: Vec<Conn>,
    parked: Vec<Parked>,
    counters: HashMap<String, u64>,
    ended: usize,
    child: Option<Child>,
    // Held for what it is to a dump, never used.
    _unix: Option<UnixStream>,
}

impl Loop {
    fn new(options: Options) -> Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGUSR1);
        signals.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let mut server = Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            released: SignalFd::with_flags(&signals, flags)?,
            listeners: Vec::new(),
            conns: HashMap::new(),
            kept: Vec::new(),
            parked: Vec::new(),
            counters: HashMap::new(),
            ended: 0,
            child: None,
            _unix: options.unix.as_ref().map(UnixStream::connect).transpose()?,
            options,
        };
        server.watch(&server.released, EpollFlags::EPOLLIN)?;
        server.open()?;
        Ok(server)
    }

    fn open(&mut self) -> Result<()> {
        if let Some(peer) = self.options.connect {
            return self.join(peer);
        }
        let address = self.listen(self.options.listen.context("nowhere to listen")?)?;
        if let Some(also) = self.options.also {
            self.listen(also)?;
        }
        match self.options.join {
            Some(Join::Itself) => self.join(address)?,
            Some(Join::Child) => self.child = Some(self.spawn_client(address)?),
            None => {}
        }
        say_ready(address)
    }

    fn listen(&mut self, address: SocketAddr) -> Result<SocketAddr> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        // The standard library's backlog is short, and a SYN that finds it full waits for a second.
        nix::sys::socket::listen(&listener, Backlog::MAXALLOWABLE)?;
        // Accepted sockets inherit these.
        if let Some(bytes) = self.options.rcvbuf {
            setsockopt(&listener, sockopt::RcvBufForce, &bytes)?;
        }
        if let Some(bytes) = self.options.sndbuf {
            setsockopt(&listener, sockopt::SndBufForce, &bytes)?;
        }
        self.watch(&listener, EpollFlags::EPOLLIN)?;
        let address = listener.local_addr()?;
        self.listeners.push(listener);
        Ok(address)
    }

    /// Becomes the client of a server.
    fn join(&mut self, server: SocketAddr) -> Result<()> {
        let stream = TcpStream::connect(server).with_context(|| format!("cannot connect to {server}"))?;
        let port = stream.local_addr()?.port();
        let conn = Conn::stream(stream, port, true, &self.options)?;
        self.add(conn)
    }

    fn spawn_client(&self, server: SocketAddr) -> Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("server")
            .arg("--connect")
            .arg(server.to_string())
            .args(["--mode", "stream", "--conns", "1"]);
        command.arg("--back").arg(self.options.back.to_string());
        for (flag, set) in [("--hold", self.options.hold), ("--shutdown", self.options.shutdown)] {
            if set {
                command.arg(flag);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().context("cannot start the child")
    }

    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        while self.options.conns.is_none_or(|wanted| self.ended < wanted) {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                ready => ready?,
            };
            for event in &events[..ready] {
                self.handle(RawFd::try_from(event.data())?)?;
            }
        }
        self.child.as_mut().map_or(Ok(()), |child| {
            ensure!(child.wait()?.success(), "the child was not content");
            Ok(())
        })
    }

    fn handle(&mut self, fd: RawFd) -> Result<()> {
        if let Some(nth) = self.listeners.iter().position(|listener| listener.as_raw_fd() == fd) {
            return self.accept(nth);
        }
        if fd == self.released.as_raw_fd() {
            return self.release();
        }
        self.step(fd)
    }

    fn accept(&mut self, nth: usize) -> Result<()> {
        loop {
            let (stream, peer) = match self.listeners[nth].accept() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                accepted => accepted.context("accept")?,
            };
            if self.options.reuse_half {
                setsockopt(&stream, sockopt::ReuseAddr, &reuses(peer))?;
            }
            match self.options.mode {
                Mode::Echo => self.add(Conn::echo(stream)?)?,
                Mode::Counter => self.add(Conn::counter(stream)?)?,
                Mode::Stream => self.add(Conn::stream(stream, peer.port(), false, &self.options)?)?,
                Mode::Inflight => self.parked.push(Parked::new(stream)?),
            }
        }
    }

    /// SIGUSR1 came.
    fn release(&mut self) -> Result<()> {
        while self.released.read_signal()?.is_some() {}
        self.options.hold = false;
        self.options.keep = false;
        self.ended += self.kept.len();
        self.kept.clear();
        for parked in std::mem::take(&mut self.parked) {
            self.add(Conn::echo(parked.take()?)?)?;
        }
        let waiting: Vec<_> = self.conns.keys().copied().collect();
        for fd in waiting {
            if let Some(conn) = self.conns.get_mut(&fd) {
                conn.release();
            }
            self.step(fd)?;
        }
        Ok(())
    }

    fn add(&mut self, conn: Conn) -> Result<()> {
        let fd = conn.socket().as_raw_fd();
        self.watch(conn.socket(), EpollFlags::empty())?;
        self.conns.insert(fd, conn);
        self.step(fd)
    }

    /// Does what can be done for one connection and waits for what cannot.
    fn step(&mut self, fd: RawFd) -> Result<()> {
        let Some(conn) = self.conns.get_mut(&fd) else { return Ok(()) };
        conn.step(&mut self.counters)?;
        if conn.done() {
            return self.finish(fd);
        }
        let mut event = EpollEvent::new(conn.interest(), u64::try_from(fd)?);
        Ok(self.epoll.modify(conn.socket(), &mut event)?)
    }

    fn finish(&mut self, fd: RawFd) -> Result<()> {
        let conn = self.conns.remove(&fd).context("a connection ends once")?;
        self.epoll.delete(conn.socket())?;
        if self.options.keep {
            self.kept.push(conn);
        } else {
            self.ended += 1;
        }
        Ok(())
    }

    fn watch(&self, fd: &impl AsFd, flags: EpollFlags) -> Result<()> {
        let data = u64::try_from(fd.as_fd().as_raw_fd())?;
        Ok(self.epoll.add(fd, EpollEvent::new(flags, data))?)
    }
}
