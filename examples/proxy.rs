//! A TCP proxy that hands its live connections to its successor, as a new version of itself would be.
//!
//! ```sh
//! proxy 127.0.0.1:8000 127.0.0.1:9000 /run/proxy.sock     # serves, until a successor comes
//! proxy 127.0.0.1:8000 127.0.0.1:9000 /run/proxy.sock     # the same command again: the successor
//! ```
//!
//! The successor connects to the Unix socket and gets the listener (SCM_RIGHTS) and all connections as bytes. When it
//! has said that it has them, the old proxy lets its sockets go, and the end of the Unix socket tells the successor to
//! thaw. Should it die before it has them, or a connection not be one that can be carried, the old proxy goes on.
//!
//! The proxy keeps nothing between a client and its upstream: it looks at what is to be read, writes as much of it as
//! the other side takes, and takes only that. So what is on its way is in the sockets' queues, which travel.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use soccr::Connection;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// One way through the proxy.
struct Way {
    /// Bytes wait at its beginning, and its end has no room.
    blocked: bool,
    /// The beginning has come to its end, which was passed on.
    done: bool,
}

/// A client and its upstream, and the ways there and back.
struct Pair {
    ends: [TcpStream; 2],
    ways: [Way; 2],
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, upstream, path] = &arguments[..] else {
        return Err("usage: proxy LISTEN UPSTREAM UNIX_SOCKET".into());
    };
    let (listener, pairs) = match UnixStream::connect(path) {
        Ok(predecessor) => take_over(predecessor)?,
        Err(_) => (TcpListener::bind(listen)?, Vec::new()),
    };
    listener.set_nonblocking(true)?;
    let _ = fs::remove_file(path); // the predecessor's, or one left by a crash
    let successors = UnixListener::bind(path)?;
    println!("serving, {} connections taken over", pairs.len() * 2);
    serve(&listener, &successors, upstream, pairs)
}

/// Serves until a successor has taken over.
fn serve(
    listener: &TcpListener,
    successors: &UnixListener,
    upstream: &str,
    mut pairs: Vec<Pair>,
) -> Result<()> {
    loop {
        let mut waiting = vec![
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(successors.as_fd(), PollFlags::POLLIN),
        ];
        waiting.extend(pairs.iter().flat_map(Pair::waits_for));
        poll(&mut waiting, PollTimeout::NONE)?;
        let ready = |place: usize| waiting[place].any().unwrap_or(false);
        if ready(1) {
            match hand_over(successors.accept()?.0, listener, pairs) {
                Ok(()) => return Ok(()),
                Err((back, why)) => {
                    eprintln!("going on: {why}");
                    pairs = back;
                    continue;
                }
            }
        }
        if ready(0) {
            pairs.extend(accept(listener, upstream)?);
        }
        pairs.retain_mut(|pair| {
            // A connection that breaks ends its pair, no more.
            let alive = pair.forward(0).and_then(|()| pair.forward(1));
            alive.is_ok() && !pair.ways.iter().all(|way| way.done)
        });
    }
}

fn accept(listener: &TcpListener, upstream: &str) -> io::Result<Option<Pair>> {
    let client = match listener.accept() {
        Ok((client, _)) => client,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    // A client whose upstream is away is told so by the end of its connection.
    TcpStream::connect(upstream).and_then(|upstream| Pair::new([client, upstream])).map(Some).or(Ok(None))
}

impl Pair {
    fn new(ends: [TcpStream; 2]) -> io::Result<Self> {
        for end in &ends {
            end.set_nonblocking(true)?;
        }
        let way = || Way { blocked: false, done: false };
        Ok(Self { ends, ways: [way(), way()] })
    }

    /// For each way, its beginning to have something, or its end to have room.
    fn waits_for(&self) -> impl Iterator<Item = PollFd<'_>> {
        (0..2).filter(|from| !self.ways[*from].done).map(|from| {
            if self.ways[from].blocked {
                PollFd::new(self.ends[1 - from].as_fd(), PollFlags::POLLOUT)
            } else {
                PollFd::new(self.ends[from].as_fd(), PollFlags::POLLIN)
            }
        })
    }

    /// Passes on what there is at the end `from`.
    fn forward(&mut self, from: usize) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        let (mut source, mut target) = (&self.ends[from], &self.ends[1 - from]);
        while !self.ways[from].done {
            let there = match source.peek(&mut buffer) {
                Ok(there) => there,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            if there == 0 {
                self.ways[from].done = true;
                return target.shutdown(Shutdown::Write).or_else(|error| match error.kind() {
                    ErrorKind::NotConnected => Ok(()), // it is closed by now
                    _ => Err(error),
                });
            }
            match target.write(&buffer[..there]) {
                Ok(written) => source.read_exact(&mut buffer[..written])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.ways[from].blocked = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        self.ways[from].blocked = false;
        Ok(())
    }
}

/// Gives everything to the successor, or everything back.
fn hand_over(
    mut successor: UnixStream,
    listener: &TcpListener,
    pairs: Vec<Pair>,
) -> std::result::Result<(), (Vec<Pair>, Box<dyn Error>)> {
    let sockets: Vec<TcpStream> = pairs.into_iter().flat_map(|pair| pair.ends).collect();
    let order: Vec<i32> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    let (frozen, refused) = soccr::freeze(sockets);
    let given = match refused.first() {
        None => give(&mut successor, listener.as_fd(), frozen.connections()),
        Some(refused) => Err(soccr::chain(&refused.error).into()),
    };
    match given {
        Ok(()) => {
            drop(frozen.release()); // and then `successor`: the sign that the addresses are free
            Ok(())
        }
        Err(why) => {
            let (mut sockets, errors) = frozen.resume();
            errors.iter().for_each(|error| eprintln!("{}", soccr::chain(error)));
            sockets.extend(refused.into_iter().map(|refused| refused.socket));
            sockets.sort_by_key(|socket| order.iter().position(|fd| *fd == socket.as_raw_fd()));
            Err((paired(sockets), why))
        }
    }
}

/// Returns when the successor has got all of it.
fn give<'a>(
    successor: &mut UnixStream,
    listener: BorrowedFd<'_>,
    connections: impl ExactSizeIterator<Item = &'a Connection>,
) -> Result<()> {
    let count = connections.len().to_le_bytes();
    let rights = [listener.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&rights)];
    sendmsg::<()>(successor.as_raw_fd(), &[IoSlice::new(&count)], &message, MsgFlags::empty(), None)?;
    for connection in connections {
        let bytes = connection.to_bytes();
        successor.write_all(&bytes.len().to_le_bytes())?;
        successor.write_all(&bytes)?;
    }
    Ok(successor.read_exact(&mut [0])?)
}

fn take_over(mut predecessor: UnixStream) -> Result<(TcpListener, Vec<Pair>)> {
    let (listener, count) = receive_listener(&predecessor)?;
    let mut connections = Vec::new();
    for _ in 0..count {
        let mut length = [0; size_of::<usize>()];
        predecessor.read_exact(&mut length)?;
        let mut bytes = Vec::new();
        (&mut predecessor).take(usize::from_le_bytes(length) as u64).read_to_end(&mut bytes)?;
        connections.push(Connection::from_bytes(&bytes).map_err(|error| soccr::chain(&error))?);
    }
    predecessor.write_all(b"!")?;
    predecessor.read_to_end(&mut Vec::new())?; // it has let go of its sockets
    let sockets = soccr::thaw(&connections).map_err(|error| soccr::chain(&error))?;
    Ok((listener, paired(sockets.into_iter().map(TcpStream::from).collect())))
}

fn receive_listener(predecessor: &UnixStream) -> Result<(TcpListener, usize)> {
    let mut count = [0; size_of::<usize>()];
    let mut space = nix::cmsg_space!(OwnedFd);
    let mut parts = [IoSliceMut::new(&mut count)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(predecessor.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let listener = message.cmsgs()?.find_map(|message| match message {
        // SAFETY: the kernel has just made this descriptor for us.
        ControlMessageOwned::ScmRights(fds) => fds.first().map(|fd| unsafe { TcpListener::from_raw_fd(*fd) }),
        _ => None,
    });
    let listener = listener.ok_or("the predecessor keeps its connections")?;
    Ok((listener, usize::from_le_bytes(count)))
}

/// Pairs of sockets in the order in which they were frozen. Those that break are left out.
fn paired(sockets: Vec<TcpStream>) -> Vec<Pair> {
    let mut sockets = sockets.into_iter();
    let mut pairs = Vec::new();
    while let (Some(client), Some(upstream)) = (sockets.next(), sockets.next()) {
        pairs.extend(Pair::new([client, upstream]));
    }
    pairs
}
