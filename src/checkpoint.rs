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
//! A connection that moves meanwhile is seen to move: the receive queue's sequence is read first, then its length.
//! An empty queue was then empty before, too; of one with bytes the sequence is read again behind them, and a FIN
//! counts as a byte that is not there. So no byte is counted that is not saved. A packet on its way to the socket when
//! the lock came is enough for that, so a save begins again once or twice before it gives up.
//!
//! Nothing may reach the socket or leave it between the first read and the end of the old socket:
//! that is the network lock's task (the `lock` module), before [`Paused::pause`].

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use crate::connection::{
    ControlBlock, Negotiated, OPT_TIMESTAMPS, OPT_WSCALE, Queues, State, UnsupportedState, WindowScale,
};
use crate::kernel::tcp::{Info, Queue};
use crate::kernel::{SysError, ao, sockopt, tcp};
use crate::repair::{Paused, Who, peek_offset};

impl<F: AsFd> Paused<F> {
    /// Reads the whole state of the connection; `queues` is cleared and gets the bytes of both queues.
    ///
    /// # Errors
    /// A [`SaveError`] that names the connection. The socket stays in repair mode and nothing is taken from it; a
    /// program's SO_PEEK_OFF is as before once the guard ends in any way but [`Paused::release`].
    pub fn save(&self, queues: &mut Queues) -> Result<ControlBlock, SaveError> {
        refuse_what_is_not_carried(self.socket())?;
        self.save_carriable(queues)
    }

    /// As [`Paused::save`], for a caller who knows that there is neither a protocol on top in the kernel nor a key of TCP-AO.
    ///
    /// # Errors
    /// As [`Paused::save`].
    pub fn save_carriable(&self, queues: &mut Queues) -> Result<ControlBlock, SaveError> {
        queues.recv.clear();
        queues.send.clear();
        let tcp = save(self.socket(), self.peeked(), |queue| match queue.which() {
            Queue::Send => queue.copy_to_vec(&mut queues.send),
            Queue::Receive | Queue::None => queue.copy_to_vec(&mut queues.recv),
        })?;
        // With SO_OOBINLINE a mark that comes first hides no byte, and only asking for it shows it.
        let socket = self.socket();
        let marked = |source| SaveError::Sizes { who: Who::of(socket), source };
        if tcp.recv_len > 0 && tcp::at_mark(socket).map_err(marked)? {
            return Err(SaveError::Urgent { who: Who::of(socket), unread: tcp.recv_len });
        }
        Ok(tcp)
    }

    /// As [`Paused::save`], for a caller who has memory of its own for the queues' bytes: `copy` is called for each
    /// queue that is not empty. An urgent mark that hides no byte (the next to read, with SO_OOBINLINE) passes
    /// unnoticed.
    ///
    /// # Errors
    /// As [`Paused::save`]; an error of `copy` is that queue's.
    pub fn save_with(
        &self,
        copy: impl FnMut(&SavedQueue<'_>) -> Result<(), QueueError>,
    ) -> Result<ControlBlock, SaveError> {
        refuse_what_is_not_carried(self.socket())?;
        save(self.socket(), self.peeked(), copy)
    }
}

/// A connection could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The socket is in a state without a connection to carry.
    #[error("cannot save {who}")]
    State {
        /// The connection.
        who: Who,
        /// The state.
        source: UnsupportedState,
    },
    /// State or queue lengths could not be read.
    #[error("cannot read the state of {who}")]
    Sizes {
        /// The connection.
        who: Who,
        /// The call that failed.
        source: SysError,
    },
    /// Segments came or went while it was read.
    #[error("cannot save {who}: {what} while it was read; is the connection locked?")]
    Moving {
        /// The connection.
        who: Who,
        /// What was seen.
        what: &'static str,
    },
    /// The socket has what no restore could give it back.
    #[error("cannot save {who}: {what} cannot be carried")]
    NotCarried {
        /// The connection.
        who: Who,
        /// What it has.
        what: &'static str,
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
    #[error("cannot read the negotiated options of {who}")]
    Options {
        /// The connection.
        who: Who,
        /// The call that failed.
        source: SysError,
    },
    /// The windows could not be read.
    #[error("cannot read the windows of {who}")]
    Window {
        /// The connection.
        who: Who,
        /// The call that failed.
        source: SysError,
    },
    /// The receive queue could not be read.
    #[error("cannot read the receive queue of {who}")]
    ReceiveQueue {
        /// The connection.
        who: Who,
        /// Why.
        source: QueueError,
    },
    /// The send queue could not be read.
    #[error("cannot read the send queue of {who}")]
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

/// A queue whose bytes a save is at.
#[derive(Debug)]
pub struct SavedQueue<'a> {
    fd: BorrowedFd<'a>,
    which: Queue,
    length: usize,
    peeked: &'a Cell<usize>,
}

impl SavedQueue<'_> {
    /// [`Queue::Receive`] or [`Queue::Send`].
    #[must_use]
    pub fn which(&self) -> Queue {
        self.which
    }

    /// Bytes in it, at least one.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Copies the bytes to the head of `into`, which has room for one more: that shows that there are no more.
    ///
    /// # Errors
    /// [`QueueError::Length`] when the queue is not as long as it said, or `into` as it should be.
    pub fn copy_to(&self, into: &mut [MaybeUninit<u8>]) -> Result<(), QueueError> {
        let most = into.len().min(self.length + 1);
        self.copied(|| tcp::peek(self.fd, &mut into[..most]))
    }

    fn copy_to_vec(&self, bytes: &mut Vec<u8>) -> Result<(), QueueError> {
        bytes.try_reserve(self.length + 1).map_err(|_| QueueError::Memory(self.length))?;
        self.copied(|| {
            bytes.clear();
            tcp::peek_append(self.fd, bytes, self.length + 1)
        })
    }

    fn copied(&self, mut peek: impl FnMut() -> Result<usize, SysError>) -> Result<(), QueueError> {
        let mut got = peek();
        if self.which == Queue::Receive {
            if got == Ok(self.length) {
                // A program's SO_PEEK_OFF was 0, if any, and has moved; whether it has one is asked for when it matters.
                self.peeked.set(self.length);
            } else if let Some(offset) = peek_offset(self.fd) {
                got = self.peek_from_start(offset, got.unwrap_or(0), &mut peek)?;
            }
        }
        match got? {
            got if got == self.length => Ok(()),
            got => Err(QueueError::Length { got, want: self.length }),
        }
    }

    /// Again, without the program's SO_PEEK_OFF, which is `offset` after it has shifted a peek that `got` so many bytes.
    fn peek_from_start(
        &self,
        offset: i32,
        got: usize,
        peek: &mut impl FnMut() -> Result<usize, SysError>,
    ) -> Result<Result<usize, SysError>, SysError> {
        let before = offset.saturating_sub(i32::try_from(got).unwrap_or(i32::MAX)).max(0);
        sockopt::set_peek_offset(self.fd, -1)?;
        let got = peek();
        sockopt::set_peek_offset(self.fd, before)?;
        Ok(got)
    }
}

impl SaveError {
    fn is_of_moving(&self) -> bool {
        let (Self::ReceiveQueue { source, .. } | Self::SendQueue { source, .. }) = self else {
            return matches!(self, Self::Moving { .. });
        };
        matches!(source, QueueError::Length { .. })
    }
}

fn save(
    fd: BorrowedFd<'_>,
    peeked: &Cell<usize>,
    mut copy: impl FnMut(&SavedQueue<'_>) -> Result<(), QueueError>,
) -> Result<ControlBlock, SaveError> {
    const TRIES: usize = 3;
    for _ in 1..TRIES {
        match save_once(fd, peeked, &mut copy) {
            Err(error) if error.is_of_moving() => {}
            other => return other,
        }
    }
    save_once(fd, peeked, &mut copy)
}

/// Keys and state that belong to the socket, but that nobody can read or set. TCP-MD5 keys are not told to a socket's
/// owner: see `kernel::diag`.
fn refuse_what_is_not_carried(fd: BorrowedFd<'_>) -> Result<(), SaveError> {
    let failed = |source| SaveError::Sizes { who: Who::of(fd), source };
    let what = if tcp::has_upper_layer(fd).map_err(failed)? {
        "a protocol on top of TCP in the kernel (TLS, SMC)"
    } else if has_ao_keys(fd).map_err(failed)? {
        "a key of TCP-AO"
    } else {
        return Ok(());
    };
    Err(SaveError::NotCarried { who: Who::of(fd), what })
}

/// A kernel without TCP-AO is asked once.
fn has_ao_keys(fd: BorrowedFd<'_>) -> Result<bool, SysError> {
    static UNKNOWN_TO_KERNEL: AtomicBool = AtomicBool::new(false);
    if UNKNOWN_TO_KERNEL.load(Relaxed) {
        return Ok(false);
    }
    let keys = ao::has_keys(fd)?;
    UNKNOWN_TO_KERNEL.store(keys.is_none(), Relaxed);
    Ok(keys == Some(true))
}

fn save_once(
    fd: BorrowedFd<'_>,
    peeked: &Cell<usize>,
    copy: &mut impl FnMut(&SavedQueue<'_>) -> Result<(), QueueError>,
) -> Result<ControlBlock, SaveError> {
    let who = || Who::of(fd);
    let sizes = |source| SaveError::Sizes { who: who(), source };
    let info = tcp::info(fd).map_err(sizes)?;
    let state = State::try_from(info.state).map_err(|source| SaveError::State { who: who(), source })?;
    // Before the receive queue: a peek may open our window, in a segment that the lock drops.
    let window = tcp::window(fd).map_err(|source| SaveError::Window { who: who(), source })?;
    let received = |error| receive_error(fd, error);
    let rcv_nxt = sequence(fd, Queue::Receive).map_err(|source| received(source.into()))?;
    let recv_len = receive_len(fd, state)?;
    if recv_len > 0 {
        copy(&SavedQueue { fd, which: Queue::Receive, length: recv_len as usize, peeked })
            .map_err(received)?;
        if tcp::queue_seq(fd).map_err(|source| received(source.into()))? != rcv_nxt {
            return Err(SaveError::Moving { who: who(), what: "bytes arrived" });
        }
    }
    let (send_len, unsent_len) = send_len(fd, &info, state)?;
    let negotiated = negotiated(fd, &info).map_err(|source| SaveError::Options { who: who(), source })?;
    let sent = |source| SaveError::SendQueue { who: who(), source };
    let write_seq = sequence(fd, Queue::Send).map_err(|source| sent(source.into()))?;
    if send_len > 0 {
        copy(&SavedQueue { fd, which: Queue::Send, length: send_len as usize, peeked }).map_err(sent)?;
    }
    Ok(ControlBlock { state, recv_len, rcv_nxt, send_len, write_seq, unsent_len, negotiated, window })
}

/// All bytes to read. SIOCINQ counts up to an urgent mark only, unless SO_OOBINLINE is on, and what follows would be
/// lost without a word. MSG_PEEK always stops there, or leaves the marked byte out where it comes first and
/// SO_OOBINLINE is off: the queue then shows as too short.
fn receive_len(fd: BorrowedFd<'_>, state: State) -> Result<u32, SaveError> {
    let sizes = |source| SaveError::Sizes { who: Who::of(fd), source };
    let unread = if state.fin_received() {
        // The FIN counts until the program has read the end of the stream.
        tcp::unread(fd).map(|unread| unread.map(|u| u.all - u32::from(u.all > u.to_mark)))
    } else {
        tcp::unread_without_fin(fd)
    };
    match unread.map_err(sizes)? {
        Some(unread) => Ok(unread),
        // This count leaves a FIN out, so whether one came since the state was read is asked for.
        None => match (unread_inline(fd, true), tcp::info(fd)) {
            (Ok(unread), Ok(info)) if info.state == state as u8 => Ok(unread),
            (Ok(_), Ok(_)) => Err(SaveError::Moving { who: Who::of(fd), what: "the state changed" }),
            (Err(error), _) | (_, Err(error)) => Err(sizes(error)),
        },
    }
}

/// What SIOCINQ counts with SO_OOBINLINE so.
fn unread_inline(fd: BorrowedFd<'_>, inline: bool) -> Result<u32, SysError> {
    let before = sockopt::oob_inline(fd)?;
    if before == inline {
        return tcp::receive_queue_len(fd);
    }
    sockopt::set_oob_inline(fd, inline)?;
    let len = tcp::receive_queue_len(fd);
    sockopt::set_oob_inline(fd, before)?;
    len
}

/// A receive queue that is too short, or seems empty, ends at an urgent mark, or the connection is not locked.
fn receive_error(fd: BorrowedFd<'_>, source: QueueError) -> SaveError {
    let who = Who::of(fd);
    // In this order more bytes in between make no mark of an unmarked queue.
    match (&source, unread_inline(fd, true), unread_inline(fd, false)) {
        (QueueError::Length { .. } | QueueError::Sys(_), Ok(unread), Ok(to_mark)) if to_mark < unread => {
            SaveError::Urgent { who, unread }
        }
        _ => SaveError::ReceiveQueue { who, source },
    }
}

/// Bytes in the send queue, and how many of them were never sent.
fn send_len(fd: BorrowedFd<'_>, info: &Info, state: State) -> Result<(u32, u32), SaveError> {
    // A closed connection sends no more: what was unacknowledged at a reset is lost to both ends.
    if state == State::Close {
        return Ok((0, 0));
    }
    let sizes = |source| SaveError::Sizes { who: Who::of(fd), source };
    let fin = u32::from(state.fin_sent());
    let unsent = info.unsent.map_or_else(|| tcp::unsent_len(fd), Ok).map_err(sizes)?;
    // Most queues are empty: where nothing waits for an acknowledgement, all there is is unsent.
    let send = if info.unacked == 0 { unsent } else { tcp::send_queue_len(fd).map_err(sizes)? };
    let (send, unsent) = (send.saturating_sub(fin), unsent.saturating_sub(fin));
    if unsent > send {
        return Err(SaveError::Moving { who: Who::of(fd), what: "bytes were acknowledged" });
    }
    Ok((send, unsent))
}

fn negotiated(fd: BorrowedFd<'_>, info: &Info) -> Result<Negotiated, SysError> {
    let mask = u32::from(info.options);
    Ok(Negotiated {
        mask,
        mss_clamp: tcp::max_segment(fd)?,
        wscale: (mask & OPT_WSCALE != 0)
            .then_some(WindowScale { snd: info.snd_wscale, rcv: info.rcv_wscale }),
        timestamp: if mask & OPT_TIMESTAMPS != 0 { Some(tcp::timestamp(fd)?) } else { None },
    })
}

/// The queue's sequence; the queue stays chosen.
fn sequence(fd: BorrowedFd<'_>, which: Queue) -> Result<u32, SysError> {
    tcp::select_queue(fd, which)?;
    tcp::queue_seq(fd)
}
