//! Socket → connection.
//!
//! A connection is read in repair mode (`TCP_REPAIR`, Linux 3.5), in which the kernel shows what a
//! program never sees: both sequences, the windows, and the bytes of the send queue.
//!
//! ```text
//!              send queue                            receive queue
//!   |--- sent ---|--- never sent ---|          |--- not yet read ---|
//!   snd_una      snd_nxt            write_seq  copied_seq           rcv_nxt
//! ```
//!
//! The kernel tells write_seq, rcv_nxt and the lengths; snd_una, snd_nxt and copied_seq follow. A FIN
//! takes a sequence number behind the last byte of its direction: the sequences count it, the lengths
//! here do not.
//!
//! Entering repair mode makes the kernel set SO_REUSEADDR to 2 and leaving it clears the option, so
//! [`Paused`] puts the program's value back. Repair mode belongs to the socket, not to the descriptor or
//! the process that set it: a program that runs on with its socket in repair mode gets EPERM and EINVAL
//! from its calls. So [`Paused`] is a guard, and what the last guard leaves is decided by
//! [`Paused::resume`] (the program goes on) or [`Paused::release`] (the socket is about to be closed, which in
//! repair mode sends neither FIN nor RST).
//!
//! Nothing may reach the socket or leave it between the first read and the end of the old socket:
//! that is the network lock's task (the `lock` module), before [`Paused::pause`].

use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use crate::connection::{
    FourTuple, OPT_TIMESTAMPS, OPT_WSCALE, Options, Queues, State, TcpState, UnsupportedState, WindowScale,
};
use crate::kernel::tcp::{Info, Queue, Repair};
use crate::kernel::{SysError, addr, sockopt, tcp};

/// A socket in repair mode, borrowed or owned. Dropping it leaves repair mode as [`Paused::resume`] would, without
/// a probe and without a report.
#[derive(Debug)]
pub struct Paused<F: AsFd> {
    /// Present until `resume` or `release` take it.
    fd: Option<F>,
    reuse_addr: bool,
}

/// Whether the end of repair mode tells the peer that we are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Send a window probe (in ESTABLISHED): the peer answers with its window, and a flow that waits goes on.
    Send,
    /// Send nothing.
    None,
}

impl<F: AsFd> Paused<F> {
    /// Puts a socket into repair mode.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN in the user namespace of the socket's network namespace, or for a
    /// listening socket; ENOPROTOOPT or EOPNOTSUPP for what is not a TCP socket.
    pub fn pause(fd: F) -> Result<Self, PauseError> {
        let socket = fd.as_fd();
        let fail = |source| PauseError { who: Who::of(socket), source };
        // SO_REUSEADDR reads 2 when somebody left the socket in repair mode: the program's own value is
        // lost then, and 0 is what the kernel would make of it.
        let reuse_addr = sockopt::reuse_addr(socket).map_err(fail)? == 1;
        tcp::set_repair(socket, Repair::On).map_err(fail)?;
        Ok(Self { fd: Some(fd), reuse_addr })
    }

    /// Reads the whole state of the connection; `queues` is cleared and gets the bytes of both queues.
    ///
    /// # Errors
    /// A [`SaveError`] that names the connection. The socket stays in repair mode and nothing is taken from it.
    pub fn save(&self, queues: &mut Queues) -> Result<TcpState, SaveError> {
        let tcp = self.inspect()?;
        copy_to_vec(self.socket(), Queue::Receive, tcp.recv_len, &mut queues.recv)
            .map_err(|source| SaveError::ReceiveQueue { who: Who::of(self.socket()), source })?;
        copy_to_vec(self.socket(), Queue::Send, tcp.send_len, &mut queues.send)
            .map_err(|source| SaveError::SendQueue { who: Who::of(self.socket()), source })?;
        Ok(tcp)
    }

    /// Reads all of the connection but the bytes in its queues, for a caller who has memory of its own for
    /// these: see [`Paused::copy_queue`].
    ///
    /// # Errors
    /// As [`Paused::save`].
    pub fn inspect(&self) -> Result<TcpState, SaveError> {
        inspect(self.socket())
    }

    /// Copies a queue, whose length [`Paused::inspect`] tells, to the head of `into`. That has room for one byte
    /// more than the queue has, which shows that there is none.
    ///
    /// # Errors
    /// [`QueueError::Length`] when the queue is not that long.
    pub fn copy_queue(&self, queue: Queue, into: &mut [MaybeUninit<u8>]) -> Result<(), QueueError> {
        let want = into.len().saturating_sub(1);
        copy_queue(self.socket(), queue, want, |fd| tcp::peek(fd, into))
    }

    /// Both ends' addresses.
    ///
    /// # Errors
    /// ENOTCONN for a socket that never was connected.
    pub fn four_tuple(&self) -> Result<FourTuple, SysError> {
        four_tuple(self.socket())
    }

    /// What SO_REUSEADDR will be after [`Paused::resume`]; a restored socket gets the saved value here.
    pub fn set_reuse_addr(&mut self, on: bool) {
        self.reuse_addr = on;
    }

    /// Leaves repair mode; the program can use its socket again.
    ///
    /// # Errors
    /// The kernel's answer; the guard has no further effect then.
    pub fn resume(mut self, probe: Probe) -> Result<(), PauseError> {
        let mode = match probe {
            Probe::Send => Repair::Off,
            Probe::None => Repair::OffNoProbe,
        };
        let result = leave(self.socket(), mode, self.reuse_addr);
        let result = result.map_err(|source| PauseError { who: Who::of(self.socket()), source });
        self.fd = None;
        result
    }

    /// Forgets the guard and leaves the socket in repair mode, to be closed silently.
    pub fn release(mut self) -> Option<F> {
        self.fd.take()
    }

    /// The socket.
    ///
    /// # Panics
    /// Never: only the calls that consume the guard take the socket out of it.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect("taken only with the guard itself").as_fd()
    }
}

fn leave(socket: BorrowedFd<'_>, mode: Repair, reuse_addr: bool) -> Result<(), SysError> {
    tcp::set_repair(socket, mode)?;
    if reuse_addr { sockopt::set_reuse_addr(socket, true) } else { Ok(()) }
}

impl<F: AsFd> Drop for Paused<F> {
    fn drop(&mut self) {
        let Some(fd) = &self.fd else { return };
        if let Err(error) = leave(fd.as_fd(), Repair::OffNoProbe, self.reuse_addr) {
            log::error!("{}: {error}", Who::of(fd.as_fd()));
        }
    }
}

/// Both ends' addresses of any connected (or once connected) socket.
///
/// # Errors
/// ENOTCONN for a socket that never was connected.
pub fn four_tuple(fd: BorrowedFd<'_>) -> Result<FourTuple, SysError> {
    Ok(FourTuple { remote: addr::remote(fd)?, local: addr::local(fd)? })
}

/// The connection that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A connection.
    Connection(FourTuple),
    /// A socket without a peer.
    Unconnected,
}

impl Who {
    /// What the socket is connected to, if anything.
    #[must_use]
    pub fn of(fd: BorrowedFd<'_>) -> Self {
        four_tuple(fd).map_or(Self::Unconnected, Self::Connection)
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(tuple) => tuple.fmt(f),
            Self::Unconnected => f.write_str("socket without a peer"),
        }
    }
}

/// Repair mode could not be entered or left.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{who}: {source}")]
pub struct PauseError {
    /// The connection.
    pub who: Who,
    /// The call that failed.
    pub source: SysError,
}

/// A connection could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The socket is in a state without a connection to carry.
    #[error("{who}: {source}")]
    State {
        /// The connection.
        who: Who,
        /// The state.
        source: UnsupportedState,
    },
    /// State or queue lengths could not be read.
    #[error("{who}: {source}")]
    Sizes {
        /// The connection.
        who: Who,
        /// The call that failed.
        source: SysError,
    },
    /// More bytes are unsent than are in the queue: the connection was not locked and moved meanwhile.
    #[error("{who}: {unsent} bytes unsent of {send} in the send queue; is the connection locked?")]
    Moving {
        /// The connection.
        who: Who,
        /// Bytes never sent.
        unsent: u32,
        /// Bytes in the send queue.
        send: u32,
    },
    /// Unread urgent data: it has a mark in the stream that a restore cannot set.
    #[error("{who}: {unread} bytes with urgent data among them are unread, which cannot be carried")]
    Urgent {
        /// The connection.
        who: Who,
        /// Bytes in the receive queue.
        unread: u32,
    },
    /// Negotiated options could not be read.
    #[error("{who}: {source}")]
    Options {
        /// The connection.
        who: Who,
        /// The call that failed.
        source: SysError,
    },
    /// The windows could not be read.
    #[error("{who}: {source}")]
    Window {
        /// The connection.
        who: Who,
        /// The call that failed.
        source: SysError,
    },
    /// The receive queue could not be read.
    #[error("{who}: receive queue: {source}")]
    ReceiveQueue {
        /// The connection.
        who: Who,
        /// Why.
        source: QueueError,
    },
    /// The send queue could not be read.
    #[error("{who}: send queue: {source}")]
    SendQueue {
        /// The connection.
        who: Who,
        /// Why.
        source: QueueError,
    },
}

/// A queue could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// It holds another number of bytes than it said before: the connection was not locked.
    #[error("holds {got} bytes where {want} were announced; is the connection locked?")]
    Length {
        /// Bytes found.
        got: usize,
        /// Bytes announced.
        want: usize,
    },
    /// There is no memory for a copy.
    #[error("no memory for {0} bytes")]
    Memory(usize),
}

struct Lengths {
    recv: u32,
    send: u32,
    unsent: u32,
}

fn inspect(fd: BorrowedFd<'_>) -> Result<TcpState, SaveError> {
    let who = || Who::of(fd);
    let sizes = |source| SaveError::Sizes { who: who(), source };
    let info = tcp::info(fd).map_err(sizes)?;
    let state = State::try_from(info.state).map_err(|source| SaveError::State { who: who(), source })?;
    let lengths = lengths(fd, &info, state)?;
    let options = options(fd, &info).map_err(|source| SaveError::Options { who: who(), source })?;
    let window = tcp::window(fd).map_err(|source| SaveError::Window { who: who(), source })?;
    let rcv_nxt = sequence(fd, Queue::Receive)
        .map_err(|source| SaveError::ReceiveQueue { who: who(), source: source.into() })?;
    let write_seq = sequence(fd, Queue::Send)
        .map_err(|source| SaveError::SendQueue { who: who(), source: source.into() })?;
    Ok(TcpState {
        state,
        recv_len: lengths.recv,
        rcv_nxt,
        send_len: lengths.send,
        write_seq,
        unsent_len: lengths.unsent,
        options,
        window,
    })
}

fn sequence(fd: BorrowedFd<'_>, queue: Queue) -> Result<u32, SysError> {
    tcp::select_queue(fd, queue)?;
    tcp::queue_seq(fd)
}

fn lengths(fd: BorrowedFd<'_>, info: &Info, state: State) -> Result<Lengths, SaveError> {
    let sizes = |source| SaveError::Sizes { who: Who::of(fd), source };
    // One call tells which queues are empty, as most are; kernels before 4.12 do not have it.
    let (any_received, any_to_send) = match sockopt::queue_memory(fd) {
        Ok(memory) => (memory.receive > 0, memory.send > 0),
        Err(SysError { errno: Errno::ENOPROTOOPT, .. }) => (true, true),
        Err(error) => return Err(sizes(error)),
    };
    let recv = if any_received { receive_len(fd)? } else { 0 };
    // A closed connection sends no more: what was unacknowledged at a reset is lost to both ends.
    if !any_to_send || state == State::Close {
        return Ok(Lengths { recv, send: 0, unsent: 0 });
    }
    let fin = u32::from(state.fin_sent());
    let send = tcp::send_queue_len(fd).map_err(sizes)?.saturating_sub(fin);
    let unsent = info.unsent.map_or_else(|| tcp::unsent_len(fd), Ok).map_err(sizes)?.saturating_sub(fin);
    if unsent > send {
        return Err(SaveError::Moving { who: Who::of(fd), unsent, send });
    }
    Ok(Lengths { recv, send, unsent })
}

/// SIOCINQ counts up to an urgent mark only (unless SO_OOBINLINE is on), and MSG_PEEK stops there: what
/// follows would be lost without a word. Two counts that differ show the mark.
fn receive_len(fd: BorrowedFd<'_>) -> Result<u32, SaveError> {
    let (len, other) = count_both_ways(fd).map_err(|source| SaveError::Sizes { who: Who::of(fd), source })?;
    if len == other { Ok(len) } else { Err(SaveError::Urgent { who: Who::of(fd), unread: len.max(other) }) }
}

fn count_both_ways(fd: BorrowedFd<'_>) -> Result<(u32, u32), SysError> {
    let inline = sockopt::oob_inline(fd)?;
    let len = tcp::receive_queue_len(fd)?;
    sockopt::set_oob_inline(fd, !inline)?;
    let other = tcp::receive_queue_len(fd);
    sockopt::set_oob_inline(fd, inline)?;
    Ok((len, other?))
}

fn options(fd: BorrowedFd<'_>, info: &Info) -> Result<Options, SysError> {
    let mask = u32::from(info.options);
    Ok(Options {
        mask,
        mss_clamp: tcp::max_segment(fd)?,
        wscale: (mask & OPT_WSCALE != 0)
            .then_some(WindowScale { snd: info.snd_wscale, rcv: info.rcv_wscale }),
        timestamp: if mask & OPT_TIMESTAMPS != 0 { Some(tcp::timestamp(fd)?) } else { None },
    })
}

fn copy_to_vec(fd: BorrowedFd<'_>, queue: Queue, len: u32, bytes: &mut Vec<u8>) -> Result<(), QueueError> {
    let want = len as usize;
    bytes.clear();
    if want == 0 {
        return Ok(());
    }
    // One byte more than announced shows a queue that is longer than that.
    bytes.try_reserve(want + 1).map_err(|_| QueueError::Memory(want))?;
    copy_queue(fd, queue, want, |fd| tcp::peek_append(fd, bytes, want + 1))
}

fn copy_queue(
    fd: BorrowedFd<'_>,
    queue: Queue,
    want: usize,
    peek: impl FnOnce(BorrowedFd<'_>) -> Result<usize, SysError>,
) -> Result<(), QueueError> {
    tcp::select_queue(fd, queue)?;
    // A program's own SO_PEEK_OFF (TCP has it since Linux 6.9) would shift what we see. Only the receive queue
    // heeds it.
    let offset = match queue {
        Queue::Receive => sockopt::peek_offset(fd).ok().filter(|offset| *offset >= 0),
        Queue::Send | Queue::None => None,
    };
    if offset.is_some() {
        sockopt::set_peek_offset(fd, -1)?;
    }
    let got = peek(fd);
    if let Some(offset) = offset {
        sockopt::set_peek_offset(fd, offset)?;
    }
    match got? {
        got if got == want => Ok(()),
        got => Err(QueueError::Length { got, want }),
    }
}
