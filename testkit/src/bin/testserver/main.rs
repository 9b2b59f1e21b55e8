//! The server that tests dump: one thread, epoll, nothing open but its sockets.
//!
//! `soccr-testserver --listen ADDR [OPTIONS]` prints `ready ADDR` once it listens.
//!
//! ```text
//! --also ADDR          listen there too
//! --mode echo          send everything back (the default)
//! --mode counter       answer each line `INCR KEY` with `:N`, as redis does
//! --mode stream        send a pattern, check the client's pattern
//! --mode inflight      echo, but each accepted socket waits inside a unix socket until SIGUSR1
//! --conns N            stream: exit once N connections have ended, with 0 if all was right
//! --send BYTES         stream: how much to send
//! --hold               stream: read nothing before SIGUSR1
//! --shutdown           stream: end the own stream as soon as it is written, not after the client's
//! --keep               stream: close nothing before SIGUSR1
//! --rcvbuf BYTES       of accepted sockets
//! --sndbuf BYTES       of accepted sockets
//! --reuse-half         SO_REUSEADDR off in about half of the accepted sockets
//! --unix PATH          connect to this unix socket too: no dump can take that along
//! --join self|child    stream: be the client too, in this process or in a child
//! --back BYTES         stream: how much that client sends
//! ```

mod conn;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{Backlog, setsockopt, sockopt};
use soccr_testkit::server::{reuses, say_ready};

use conn::{Conn, Parked};

/// What the command line says.
#[derive(Clone, Debug, Default)]
struct Options {
    listen: Option<SocketAddr>,
    also: Option<SocketAddr>,
    connect: Option<SocketAddr>,
    mode: Mode,
    conns: Option<usize>,
    send: u64,
    hold: bool,
    shutdown: bool,
    keep: bool,
    rcvbuf: Option<usize>,
    sndbuf: Option<usize>,
    reuse_half: bool,
    unix: Option<PathBuf>,
    join: Option<Join>,
    back: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Mode {
    #[default]
    Echo,
    Counter,
    Stream,
    Inflight,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Join {
    Itself,
    Child,
}

fn main() -> ExitCode {
    match parse().and_then(serve) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soccr-testserver: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Options> {
    use lexopt::prelude::*;
    let mut options = Options::default();
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("listen") => options.listen = Some(parser.value()?.parse()?),
            Long("also") => options.also = Some(parser.value()?.parse()?),
            Long("connect") => options.connect = Some(parser.value()?.parse()?),
            Long("mode") => options.mode = mode(&parser.value()?.string()?)?,
            Long("conns") => options.conns = Some(parser.value()?.parse()?),
            Long("send") => options.send = parser.value()?.parse()?,
            Long("hold") => options.hold = true,
            Long("shutdown") => options.shutdown = true,
            Long("keep") => options.keep = true,
            Long("rcvbuf") => options.rcvbuf = Some(parser.value()?.parse()?),
            Long("sndbuf") => options.sndbuf = Some(parser.value()?.parse()?),
            Long("unix") => options.unix = Some(parser.value()?.into()),
            Long("back") => options.back = parser.value()?.parse()?,
            Long("reuse-half") => options.reuse_half = true,
            Long("join") => options.join = Some(join(&parser.value()?.string()?)?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    Ok(options)
}

fn mode(word: &str) -> Result<Mode> {
    Ok(match word {
        "echo" => Mode::Echo,
        "counter" => Mode::Counter,
        "stream" => Mode::Stream,
        "inflight" => Mode::Inflight,
        _ => bail!("no mode {word}"),
    })
}

fn join(word: &str) -> Result<Join> {
    Ok(match word {
        "self" => Join::Itself,
        "child" => Join::Child,
        _ => bail!("cannot join {word}"),
    })
}

fn serve(options: Options) -> Result<()> {
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
        let address = self.listen(self.options.listen.context("--listen ADDR is missing")?)?;
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
        command.arg("--connect").arg(server.to_string()).args(["--mode", "stream", "--conns", "1"]);
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
