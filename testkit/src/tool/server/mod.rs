//! The server that tests dump: one thread, epoll, nothing open but its sockets.

mod conn;
pub mod order;
mod session;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use nix::unistd::{ForkResult, dup2_stdout, fork};
use soccr_testkit::fleet::is_dead;
use soccr_testkit::server::{reuses, say_ready};

use conn::{Conn, Parked, Role, Stream};
use session::Session;

/// Serves: what the tests dump; prints `ready ADDR` once it listens
#[derive(clap::Args)]
pub struct Options {
    /// Where
    #[arg(long, value_name = "ADDR", required_unless_present = "connect")]
    listen: Option<SocketAddr>,
    /// Listen there too
    #[arg(long, value_name = "ADDR")]
    also: Vec<SocketAddr>,
    /// Only for what arrives by this interface
    #[arg(long, value_name = "INTERFACE")]
    device: Option<OsString>,
    /// Be the client of that server (`--join child` does so)
    #[arg(long, value_name = "ADDR", hide = true)]
    connect: Option<SocketAddr>,
    /// So many listeners at the last of the addresses, in one group (SO_REUSEPORT)
    #[arg(long, value_name = "N", default_value_t = 1)]
    group: usize,
    /// What each connection is for
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// This many share the listeners
    #[arg(long, value_name = "N", default_value_t = 1)]
    processes: u8,
    /// Each of these has a listener of its own: at 127.0.0.1, 127.0.0.2 and so on
    #[arg(long)]
    apart: bool,
    /// stream: exit once N connections have ended, with 0 if all was right
    #[arg(long, value_name = "N")]
    conns: Option<usize>,
    /// stream: how much to send
    #[arg(long, value_name = "BYTES", default_value_t)]
    send: u64,
    /// echo, stream: read nothing before SIGUSR1
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
    /// Accept at the last of the addresses only those that wait when SIGUSR1 comes, and send each its place in its queue (one
    /// byte) before anything else
    #[arg(long)]
    late: bool,
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
    /// What the client's order says; complains of a connection that is not as it should be, and goes on
    Ordered,
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

/// Begins the line of a connection that broke.
pub const DEAD: &str = "dead:";
/// Begins the line of a connection whose content was not what the client had to send.
pub const WRONG: &str = "wrong:";

/// The tick of connections that have a pace.
const TICK: Duration = Duration::from_millis(10);

pub fn run(options: Options) -> Result<()> {
    // A dump wants a whole session; a child that we start is in ours.
    if options.listen.is_some() {
        nix::unistd::setsid().context("setsid")?;
    }
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let addresses = options.listen.iter().chain(&options.also);
    let mut listeners: Vec<_> = addresses.map(|address| listen(*address, &options)).collect::<Result<_>>()?;
    for _ in 1..options.group {
        let last = listeners.last().context("nowhere to listen")?.local_addr()?;
        listeners.push(listen(last, &options)?);
    }
    for nth in 1..options.processes {
        // SAFETY: this process has one thread, so the child may do anything.
        if let ForkResult::Child = unsafe { fork() }.context("fork")? {
            // The starter reads until nobody holds the other end of the pipe.
            dup2_stdout(File::options().write(true).open("/dev/null")?)?;
            let listeners =
                if options.apart { vec![apart(&listeners[0], nth, &options)?] } else { listeners };
            return Loop::new(options, listeners)?.run();
        }
    }
    let mut server = Loop::new(options, listeners)?;
    server.open()?;
    server.run()
}

/// The listener of the process with this number, at the same port.
fn apart(first: &TcpListener, nth: u8, options: &Options) -> Result<TcpListener> {
    listen((Ipv4Addr::new(127, 0, 0, nth + 1), first.local_addr()?.port()).into(), options)
}

fn listen(address: SocketAddr, options: &Options) -> Result<TcpListener> {
    let listener = if options.group > 1 { bind_in_group(address) } else { Ok(TcpListener::bind(address)?) };
    let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
    listener.set_nonblocking(true)?;
    // The standard library's backlog is short, and a SYN that finds it full waits for a second.
    nix::sys::socket::listen(&listener, Backlog::MAXALLOWABLE)?;
    // Accepted sockets inherit these.
    if let Some(device) = &options.device {
        setsockopt(&listener, sockopt::BindToDevice, device)?;
    }
    if let Some(bytes) = options.rcvbuf {
        setsockopt(&listener, sockopt::RcvBufForce, &bytes)?;
    }
    if let Some(bytes) = options.sndbuf {
        setsockopt(&listener, sockopt::SndBufForce, &bytes)?;
    }
    Ok(listener)
}

fn bind_in_group(address: SocketAddr) -> Result<TcpListener> {
    let address = SockaddrStorage::from(address);
    let family = address.family().context("an address of IP")?;
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    setsockopt(&socket, sockopt::ReusePort, &true)?;
    bind(socket.as_raw_fd(), &address)?;
    Ok(socket.into())
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
    counters: Rc<RefCell<HashMap<String, u64>>>,
    ended: usize,
    child: Option<Child>,
    next_tick: Instant,
    // Held for what it is to a dump, never used.
    _unix: Option<UnixStream>,
}

impl Loop {
    fn new(options: Options, listeners: Vec<TcpListener>) -> Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGUSR1);
        signals.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let server = Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            released: SignalFd::with_flags(&signals, flags)?,
            listeners,
            conns: HashMap::new(),
            kept: Vec::new(),
            parked: Vec::new(),
            counters: Rc::default(),
            ended: 0,
            child: None,
            next_tick: Instant::now(),
            _unix: options.unix.as_ref().map(UnixStream::connect).transpose()?,
            options,
        };
        server.watch(&server.released, EpollFlags::EPOLLIN)?;
        let late = server.late();
        let mut watched = server.listeners.iter().enumerate().filter(|(nth, _)| !late.contains(nth));
        watched.try_for_each(|(_, listener)| server.watch(listener, EpollFlags::EPOLLIN))?;
        Ok(server)
    }

    /// The listeners that wait for SIGUSR1.
    fn late(&self) -> Range<usize> {
        let count = if self.options.late { self.options.group } else { 0 };
        self.listeners.len().saturating_sub(count)..self.listeners.len()
    }

    fn open(&mut self) -> Result<()> {
        if let Some(peer) = self.options.connect {
            return self.join(peer);
        }
        let address = self.listeners.first().context("nowhere to listen")?.local_addr()?;
        match self.options.join {
            Some(Join::Itself) => self.join(address)?,
            Some(Join::Child) => self.child = Some(self.spawn_client(address)?),
            None => {}
        }
        say_ready(address)
    }

    /// Becomes the client of a server.
    fn join(&mut self, server: SocketAddr) -> Result<()> {
        let stream = TcpStream::connect(server).with_context(|| format!("cannot connect to {server}"))?;
        let port = stream.local_addr()?.port();
        let stream_of = Stream::new(port, true, &self.options);
        self.add(Conn::new(stream, Role::Stream(stream_of))?)
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
            let ready = match self.epoll.wait(&mut events, self.timeout()?) {
                Err(Errno::EINTR) => 0,
                ready => ready?,
            };
            for event in &events[..ready] {
                self.handle(RawFd::try_from(event.data())?)?;
            }
            self.tick()?;
        }
        self.child.as_mut().map_or(Ok(()), |child| {
            ensure!(child.wait()?.success(), "the child was not content");
            Ok(())
        })
    }

    /// Only ordered connections know the time.
    fn timeout(&self) -> Result<EpollTimeout> {
        if self.options.mode != Mode::Ordered {
            return Ok(EpollTimeout::NONE);
        }
        let left = self.next_tick.saturating_duration_since(Instant::now());
        Ok(EpollTimeout::try_from(left + Duration::from_millis(1))?)
    }

    fn tick(&mut self) -> Result<()> {
        if self.options.mode != Mode::Ordered || Instant::now() < self.next_tick {
            return Ok(());
        }
        self.next_tick = Instant::now() + TICK;
        let paced: Vec<_> =
            self.conns.iter_mut().filter_map(|(&fd, conn)| conn.tick().then_some(fd)).collect();
        paced.into_iter().try_for_each(|fd| self.step(fd))
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
        let mut place = self.late().contains(&nth).then_some(0);
        loop {
            let (mut stream, peer) = match self.listeners[nth].accept() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                accepted => accepted.context("accept")?,
            };
            if let Some(place) = &mut place {
                stream.write_all(&[*place])?;
                *place += 1;
            }
            if self.options.reuse_half {
                setsockopt(&stream, sockopt::ReuseAddr, &reuses(peer))?;
            }
            let role = match self.options.mode {
                Mode::Echo => Role::Echo { hold: self.options.hold },
                Mode::Counter => Role::Counter { line: Vec::new(), counters: Rc::clone(&self.counters) },
                Mode::Stream => Role::Stream(Stream::new(peer.port(), false, &self.options)),
                Mode::Ordered => Role::Ordered(Session::new(peer.port())),
                Mode::Inflight => {
                    self.parked.push(Parked::new(stream)?);
                    continue;
                }
            };
            self.add(Conn::new(stream, role)?)?;
        }
    }

    /// SIGUSR1 came.
    fn release(&mut self) -> Result<()> {
        while self.released.read_signal()?.is_some() {}
        self.late().try_for_each(|nth| self.accept(nth))?;
        self.options.hold = false;
        self.options.keep = false;
        self.ended += self.kept.len();
        self.kept.clear();
        for parked in std::mem::take(&mut self.parked) {
            self.add(Conn::new(parked.take()?, Role::Echo { hold: false })?)?;
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
        let stepped = conn.step();
        if let (Err(error), Some(port)) = (&stepped, conn.ordered()) {
            eprintln!("{} client port {port}: {error:#}", if is_dead(error) { DEAD } else { WRONG });
            return self.finish(fd);
        }
        stepped?;
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
