//! Connection → socket.
//!
//! In repair mode connect() sends nothing and makes an ESTABLISHED socket at once, from the sequences that it
//! was given before. The rest is put in behind that:
//!
//! 1. bind() and both sequences, each as far back as its queue is long (and one more for a FIN): what is
//!    appended to a queue moves its sequence forward again;
//! 2. connect(). Outside repair mode, so that a SYN goes into the lock, only for two: SYN_SENT, since its SYN has yet to be
//!    answered; and a connection with ECN, which nothing but SYN segments agrees on: a forged SYN-ACK answers (module `forge`);
//! 3. what the SYN segments agreed on, then the clock of the timestamps;
//! 4. the receive queue, the part of the send queue that was sent, and outside repair mode the part that was
//!    not, which the kernel treats as written just now; the buffers have room for all of them until the end;
//! 5. the windows. They are set when both queues are in place, since the kernel checks them against
//!    rcv_nxt;
//! 6. FINs, in the order in which the state says they came: ours by shutdown(), the peer's by a forged
//!    segment (module `forge`), and the windows again, which the forged segment has touched.
//!
//! The socket stays in repair mode and must be locked from the network until [`Paused::resume`]: a segment
//! from the peer in between would be taken for one of a connection that is half built.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::chain;
use crate::connection::{ControlBlock, FourTuple, OPT_ECN, OPT_SACK, State, Window};
use crate::forge::{self, Forge, ForgeError, Kind, Segment};
use crate::kernel::netns::NetNs;
use crate::kernel::tcp::{Direction, Queue, Repair, RepairOption};
use crate::kernel::{SysError, addr, diag, interface, sockopt, tcp};
use crate::repair::Paused;

/// A connection could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// A system call failed.
    #[error("cannot restore {tuple}")]
    Sys {
        /// The connection.
        tuple: FourTuple,
        /// The call.
        source: SysError,
    },
    /// The description contradicts itself.
    #[error("cannot restore {tuple}: {what}")]
    Inconsistent {
        /// The connection.
        tuple: FourTuple,
        /// What does not fit.
        what: &'static str,
    },
    /// The kernel took only a part of a queue.
    #[error("cannot restore {tuple}: the {queue} queue takes {taken} of {len} bytes")]
    Queue {
        /// The connection.
        tuple: FourTuple,
        /// "receive", "send" or "unsent".
        queue: &'static str,
        /// Bytes that went in.
        taken: usize,
        /// Bytes there are.
        len: usize,
        /// The last call.
        source: SysError,
    },
    /// A segment of the peer could not be brought in.
    #[error("cannot restore {tuple}: a segment of the peer cannot be forged")]
    Forge {
        /// The connection.
        tuple: FourTuple,
        /// Why.
        source: ForgeError,
    },
}

impl<F: AsFd> Paused<F> {
    /// Builds the connection in a socket that is not bound yet, and leaves it in repair mode.
    ///
    /// `recv` and `send` are the queues' bytes, `tcp.recv_len` and `tcp.send_len` of them. The socket's buffers are to
    /// have the program's sizes, which they keep.
    ///
    /// # Errors
    /// A [`RestoreError`] that names the connection; the socket is of no use then but to be closed, of which the peer
    /// hears nothing.
    pub fn restore(
        &self,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        recv: &[u8],
        send: &[u8],
        forge: &Forge,
    ) -> Result<(), RestoreError> {
        self.finish(tuple, tcp, recv, send, forge, |restoring| {
            restoring.sys(restoring.bind())?;
            restoring.open()
        })
    }

    /// Sends the SYN of a connection with ECN ahead of all else, so that its answer can come as late as the peer's does: that
    /// is the first round trip time that the kernel measures. `None`, and nothing done, without ECN.
    ///
    /// # Errors
    /// As [`Paused::restore`].
    pub fn open(
        &self,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        rtt: Duration,
        forge: &Forge,
    ) -> Result<Option<Opening>, RestoreError> {
        let restoring = Restoring { fd: self.socket(), tuple, tcp, forge };
        if !restoring.has_ecn() || tuple.impossible().is_some() {
            return Ok(None);
        }
        restoring.sys(restoring.bind())?;
        let sent = restoring.sys(restoring.send_syn());
        Ok(Some(Opening(sent.map(|()| Instant::now() + rtt.min(LATEST_ANSWER)))))
    }

    /// Answers the SYN, when that is due.
    #[must_use]
    pub fn answer(&self, opening: Opening, tuple: &FourTuple, tcp: &ControlBlock, forge: &Forge) -> Opened {
        Opened(opening.0.and_then(|due| {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            Restoring { fd: self.socket(), tuple, tcp, forge }.answer()
        }))
    }

    /// [`Paused::restore`] of a connection that is open.
    ///
    /// # Errors
    /// As [`Paused::restore`].
    pub fn restore_opened(
        &self,
        opened: Opened,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        recv: &[u8],
        send: &[u8],
        forge: &Forge,
    ) -> Result<(), RestoreError> {
        self.finish(tuple, tcp, recv, send, forge, |restoring| restoring.take(opened.0))
    }

    /// Takes the clock of the timestamps as it is described, unit and all: for a description of which it is known that its
    /// bit 0 is no noise ([`tcp::timestamp_tells_unit`]).
    ///
    /// # Errors
    /// EPERM outside repair mode.
    pub fn trust_clock(&self, tcp: &ControlBlock) -> Result<(), SysError> {
        tcp.negotiated.timestamp.map_or(Ok(()), |tsval| tcp::set_timestamp(self.socket(), tsval))
    }

    fn finish(
        &self,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        recv: &[u8],
        send: &[u8],
        forge: &Forge,
        open: impl FnOnce(&Restoring<'_>) -> Result<(), RestoreError>,
    ) -> Result<(), RestoreError> {
        consistent(tuple, tcp, recv, send)
            .map_err(|what| RestoreError::Inconsistent { tuple: *tuple, what })?;
        let fd = self.socket();
        let restoring = Restoring { fd, tuple, tcp, forge };
        let result = open(&restoring).and_then(|()| restoring.fill(recv, send));
        if result.is_err() {
            // What is half built would close with a FIN, and hold the addresses until that is answered. In repair mode
            // it goes without a word. The error to tell is the first one.
            let _ = tcp::set_repair(fd, Repair::On).and_then(|()| tcp::disconnect(fd));
        }
        result
    }
}

/// A connection whose SYN is in the lock: when its answer is due, or why it was not sent.
#[derive(Debug)]
pub struct Opening(Result<Instant, RestoreError>);

/// A connection whose SYN was answered, or why it was not.
#[derive(Debug)]
pub struct Opened(Result<(), RestoreError>);

/// A SYN is sent again after a second, and then its answer tells the kernel nothing.
const LATEST_ANSWER: Duration = Duration::from_millis(900);

fn consistent(tuple: &FourTuple, tcp: &ControlBlock, recv: &[u8], send: &[u8]) -> Result<(), &'static str> {
    if let Some(why) = tuple.impossible() {
        return Err(why);
    }
    if recv.len() != tcp.recv_len as usize {
        return Err("the receive queue's bytes are not as many as announced");
    }
    if send.len() != tcp.send_len as usize {
        return Err("the send queue's bytes are not as many as announced");
    }
    if tcp.unsent_len > tcp.send_len {
        return Err("more bytes are unsent than there are in the send queue");
    }
    if tcp.negotiated.wscale.is_some_and(|scale| scale.snd > 14 || scale.rcv > 14) {
        return Err("a window scale is beyond 14");
    }
    if tcp.state == State::SynSent && (tcp.send_len, tcp.recv_len) != (0, 0) {
        return Err("a SYN_SENT connection has bytes in a queue");
    }
    if tcp.state.fin_acked() && tcp.send_len != 0 {
        return Err("the peer has acknowledged the FIN, but not the bytes before it");
    }
    if tcp.window.is_some_and(|window| window.is_too_large()) {
        return Err("a window is larger than a header can announce");
    }
    Ok(())
}

struct Restoring<'a> {
    fd: BorrowedFd<'a>,
    tuple: &'a FourTuple,
    tcp: &'a ControlBlock,
    forge: &'a Forge,
}

impl Restoring<'_> {
    /// What is there to do when queues can be filled.
    fn fill(&self, recv: &[u8], send: &[u8]) -> Result<(), RestoreError> {
        self.local_address()?;
        self.sys(self.options())?;
        let by_window = self.window_bounds_segments();
        // Before the bytes of the send queue are cut into segments.
        if !by_window || !send.is_empty() {
            self.sys(tcp::sync_segment_size(self.fd))?;
        }
        let room = self.sys(RoomForQueues::make(self.fd, self.tcp))?;
        self.receive_queue(recv)?;
        self.send_queue(send)?;
        self.sys(self.window_before_fin())?;
        self.fins()?;
        self.sys(room.map_or(Ok(()), RoomForQueues::give_back))?;
        if by_window { self.sys(tcp::sync_segment_size(self.fd)) } else { Ok(()) }
    }

    fn sys<T>(&self, result: Result<T, SysError>) -> Result<T, RestoreError> {
        result.map_err(|source| RestoreError::Sys { tuple: *self.tuple, source })
    }

    fn forged(&self, result: Result<(), ForgeError>) -> Result<(), RestoreError> {
        result.map_err(|source| RestoreError::Forge { tuple: *self.tuple, source })
    }

    /// Both sequences, and the state in which queues can be filled.
    fn open(&self) -> Result<(), RestoreError> {
        if self.tcp.state == State::SynSent {
            self.sys(self.send_syn())?;
            return self.sys(tcp::set_repair(self.fd, Repair::On));
        }
        if self.has_ecn() {
            return self.take(self.sys(self.send_syn()).and_then(|()| self.answer()));
        }
        self.open_in_repair()
    }

    fn open_in_repair(&self) -> Result<(), RestoreError> {
        let (sent, received) = self.first_sequences();
        self.sys(self.set_sequences(sent, received))?;
        self.sys(self.connect(|| tcp::connect(self.fd, self.tuple.remote)))
    }

    /// CLOSE has no use for it, and SYN_SENT has not agreed on it yet.
    fn has_ecn(&self) -> bool {
        self.tcp.negotiated.mask & OPT_ECN != 0
            && !matches!(self.tcp.state, State::Close | State::SynSent)
            && self.forge.brings_ecn()
    }

    /// Goes on with a connection that was to be opened with ECN.
    fn take(&self, opened: Result<(), RestoreError>) -> Result<(), RestoreError> {
        let Err(error) = opened else { return Ok(()) };
        log::warn!("{} goes on without ECN: {}", self.tuple, chain(&error));
        self.sys(self.disconnect())?;
        self.open_in_repair()
    }

    /// The answer to a SYN that asks for ECN.
    fn answer(&self) -> Result<(), RestoreError> {
        let (sent, received) = self.first_sequences();
        self.deliver(Kind::SynAck(self.tcp.negotiated), received.wrapping_sub(1), sent, State::Established)?;
        self.sys(tcp::set_repair(self.fd, Repair::On))?;
        self.sys(tcp::select_queue(self.fd, Queue::Receive))?;
        if u32::from(self.sys(tcp::info(self.fd))?.options) & OPT_ECN == 0 {
            log::warn!("{} goes on without ECN: its SYN did not ask for it", self.tuple);
        }
        Ok(())
    }

    /// A SYN, which takes a sequence number as a FIN does. It ends in the lock, outside repair mode where it is to be
    /// answered.
    fn send_syn(&self) -> Result<(), SysError> {
        let (sent, received) = self.first_sequences();
        self.set_sequences(sent.wrapping_sub(1), received)?;
        tcp::set_repair(self.fd, Repair::OffNoProbe)?;
        self.connect(|| {
            sockopt::with_nonblocking(self.fd, || {
                if self.has_ecn() {
                    self.forge.connect_with_ecn(self.fd, self.tuple.remote)
                } else {
                    tcp::connect(self.fd, self.tuple.remote)
                }
            })
        })
    }

    fn set_sequences(&self, sent: u32, received: u32) -> Result<(), SysError> {
        tcp::select_queue(self.fd, Queue::Send)?;
        tcp::set_queue_seq(self.fd, sent)?;
        tcp::select_queue(self.fd, Queue::Receive)?;
        tcp::set_queue_seq(self.fd, received)
    }

    /// Back to a bound socket in repair mode.
    fn disconnect(&self) -> Result<(), SysError> {
        tcp::set_repair(self.fd, Repair::On)?;
        tcp::disconnect(self.fd)?;
        // The kernel notes for the program that its connection is gone.
        sockopt::clear_error(self.fd)
    }

    /// Of the first byte of each queue, sent and received. A FIN behind them takes one as well.
    fn first_sequences(&self) -> (u32, u32) {
        let tcp = self.tcp;
        let first = |next: u32, fin, len| next.wrapping_sub(u32::from(fin)).wrapping_sub(len);
        (
            first(tcp.write_seq, tcp.state.fin_sent(), tcp.send_len),
            first(tcp.rcv_nxt, tcp.state.fin_received(), tcp.recv_len),
        )
    }

    /// bind() of an IPv4 socket takes a broadcast address of a subnet for none at all, and connect() then chooses another.
    fn local_address(&self) -> Result<(), RestoreError> {
        if self.tuple.local.is_ipv6() {
            return Ok(());
        }
        let local = self.sys(addr::local(self.fd))?;
        if local.ip() == self.tuple.local.ip() {
            return Ok(());
        }
        let what = "the local address is not one of a connection";
        Err(RestoreError::Inconsistent { tuple: *self.tuple, what })
    }

    /// Half of the peer's largest window bounds the segment size, too: where that matters it is computed again
    /// when the window is known.
    fn window_bounds_segments(&self) -> bool {
        self.tcp.window.is_some_and(|window| window.max_window / 2 < self.tcp.negotiated.mss_clamp)
    }

    fn bind(&self) -> Result<(), SysError> {
        match tcp::bind(self.fd, self.tuple.local) {
            // An IPv6 address that was added a moment ago is "tentative" and cannot be bound yet.
            Err(SysError { errno: Errno::EADDRNOTAVAIL, .. }) if self.tuple.local.is_ipv6() => {
                let before = sockopt::free_bind(self.fd)?;
                sockopt::set_free_bind(self.fd, true)?;
                let result = tcp::bind(self.fd, self.tuple.local);
                sockopt::set_free_bind(self.fd, before)?;
                result
            }
            other => other,
        }
    }

    /// Where an agent died before it could close the old socket silently, its task's end has closed it with a FIN: it
    /// waits behind the lock, without an owner, for an answer to that, and holds the four-tuple.
    fn connect(&self, connect: impl Fn() -> Result<(), SysError>) -> Result<(), SysError> {
        match connect() {
            Err(SysError { errno: Errno::EADDRNOTAVAIL, .. }) if destroy_orphan(self.fd, self.tuple)? => {
                log::info!("{}: destroyed an orphan that held the addresses", self.tuple);
                self.connect_after_orphan(connect)
            }
            other => other.map_err(|error| self.without_address(error)),
        }
    }

    /// Older kernels (Debian's 5.10) empty the send queue of an orphan that is to be destroyed, and leave it there: its
    /// peer's RST ends it on each of them.
    fn connect_after_orphan(&self, connect: impl Fn() -> Result<(), SysError>) -> Result<(), SysError> {
        const PATIENCE: Duration = Duration::from_millis(20);
        let rst = Segment {
            tuple: *self.tuple,
            kind: Kind::Rst,
            data: &[],
            seq: self.tcp.rcv_nxt,
            ack: 0,
            window: 0,
        };
        let mut deadline = None;
        loop {
            match (connect(), deadline) {
                (Err(SysError { errno: Errno::EADDRNOTAVAIL, .. }), None) => {
                    if let Err(error) = self.forge.send(self.fd, &rst) {
                        log::warn!("{}: cannot reset the orphan: {error}", self.tuple);
                    }
                    deadline = Some(Instant::now() + PATIENCE);
                }
                (Err(SysError { errno: Errno::EADDRNOTAVAIL, .. }), Some(end)) if Instant::now() < end => {
                    std::thread::yield_now();
                }
                (result, _) => return result,
            }
        }
    }

    /// With IP_FREEBIND bind() takes an IPv4 address that is not here, and connect() says of it whatever comes first.
    fn without_address(&self, error: SysError) -> SysError {
        const CALL: &str =
            "connect from an address that is not here, which takes more than IP_FREEBIND (IP_TRANSPARENT)";
        if error.errno == Errno::EADDRNOTAVAIL || sockopt::free_bind(self.fd) != Ok(true) {
            return error;
        }
        let local = self.tuple.on_wire().local.ip();
        match NetNs::of_socket(self.fd).map(|ns| ns.run(|| interface::is_local(local))) {
            Ok(Ok(Ok(false))) => SysError { call: CALL, errno: Errno::EADDRNOTAVAIL },
            _ => error,
        }
    }

    fn options(&self) -> Result<(), SysError> {
        if self.tcp.state != State::SynSent {
            let negotiated = &self.tcp.negotiated;
            tcp::set_options(
                self.fd,
                [
                    (negotiated.mask & OPT_SACK != 0).then_some(RepairOption::SackPermitted),
                    negotiated
                        .wscale
                        .map(|scale| RepairOption::WindowScale { snd: scale.snd, rcv: scale.rcv }),
                    negotiated.timestamp.map(|_| RepairOption::Timestamps),
                    Some(RepairOption::MaxSegment(negotiated.mss_clamp)),
                ],
            )?;
        }
        self.timestamp()
    }

    /// Bit 0 of the timestamp turns on microsecond ticks since Linux 6.7. In an image of an older kernel it is
    /// noise, so it counts only where the route asks for such ticks, which connect() has looked up, or who restores knows
    /// better ([`Paused::trust_clock`]).
    fn timestamp(&self) -> Result<(), SysError> {
        let Some(mut tsval) = self.tcp.negotiated.timestamp else { return Ok(()) };
        if tsval & 1 != 0 && tcp::timestamp(self.fd)? & 1 == 0 {
            tsval &= !1;
        }
        tcp::set_timestamp(self.fd, tsval)
    }

    fn receive_queue(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        // `open` has left this queue chosen.
        if bytes.is_empty() { Ok(()) } else { self.append("receive", bytes) }
    }

    fn send_queue(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let (sent, unsent) = bytes.split_at(bytes.len() - self.tcp.unsent_len as usize);
        if !sent.is_empty() {
            self.sys(tcp::select_queue(self.fd, Queue::Send))?;
            self.append("send", sent)?;
        }
        if !unsent.is_empty() {
            self.sys(tcp::set_repair(self.fd, Repair::OffNoProbe))?;
            let result = self.append("unsent", unsent);
            self.sys(tcp::set_repair(self.fd, Repair::On))?;
            result?;
        }
        Ok(())
    }

    /// The kernel allocates a receive queue's piece in one go and refuses one that is too large for that, so
    /// pieces get smaller before we give up.
    fn append(&self, queue: &'static str, bytes: &[u8]) -> Result<(), RestoreError> {
        const SMALLEST: usize = 1024;
        let (mut taken, mut piece) = (0, bytes.len());
        while taken < bytes.len() {
            let end = bytes.len().min(taken + piece);
            match tcp::send(self.fd, &bytes[taken..end]) {
                Ok(sent) if sent > 0 => taken += sent,
                _ if piece > SMALLEST => piece = piece.div_ceil(2),
                refused => {
                    let nothing = SysError { call: "append to a queue", errno: Errno::ENOBUFS };
                    let source = refused.err().unwrap_or(nothing);
                    return Err(RestoreError::Queue {
                        tuple: *self.tuple,
                        queue,
                        taken,
                        len: bytes.len(),
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// The window as repair mode takes it, with `snd_wl1` at most at its right edge. It lies beyond where the kernel had no
    /// memory for what came, and so closed the window to rcv_nxt (ICSK_ACK_NOMEM): it believed the window of a segment that
    /// it then dropped. That one comes again, from rcv_nxt on.
    fn window(&self) -> Option<Window> {
        self.tcp.window.map(|window| {
            let edge = self.tcp.rcv_nxt.wrapping_add(window.rcv_wnd);
            let beyond = window.snd_wl1.wrapping_sub(edge).cast_signed() > 0;
            Window { snd_wl1: if beyond { edge } else { window.snd_wl1 }, ..window }
        })
    }

    /// With the peer's FIN still to come rcv_nxt is one less, and so must be what we announced; the window's
    /// right edge stays.
    fn window_before_fin(&self) -> Result<(), SysError> {
        let Some(window) = self.window() else { return Ok(()) };
        if !self.tcp.state.fin_received() {
            return tcp::set_window(self.fd, &window);
        }
        let before = Window {
            rcv_wup: window.rcv_wup.wrapping_sub(1),
            rcv_wnd: window.rcv_wnd.saturating_add(1),
            ..window
        };
        tcp::set_window(self.fd, &before)
    }

    fn fins(&self) -> Result<(), RestoreError> {
        match self.tcp.state {
            State::Established | State::SynSent => return Ok(()),
            State::FinWait1 => self.our_fin()?,
            State::FinWait2 => {
                self.our_fin()?;
                self.acknowledge(State::FinWait2)?;
            }
            State::Closing => {
                self.our_fin()?;
                self.peer_fin(State::Closing)?;
            }
            State::CloseWait => self.peer_fin(State::CloseWait)?,
            State::LastAck => {
                self.peer_fin(State::CloseWait)?;
                self.our_fin()?;
            }
            State::Close => {
                self.peer_fin(State::CloseWait)?;
                self.our_fin()?;
                self.acknowledge(State::Close)?;
            }
        }
        // A forged segment carries a window that the kernel believes.
        match self.window() {
            Some(window) => self.sys(tcp::set_window(self.fd, &window)),
            None => Ok(()),
        }
    }

    /// With the send queue chosen the kernel takes the FIN for sent; without, it is sent as soon as it can be.
    fn our_fin(&self) -> Result<(), RestoreError> {
        let queue = if self.tcp.unsent_len == 0 { Queue::Send } else { Queue::None };
        self.sys(tcp::select_queue(self.fd, queue))?;
        self.sys(tcp::shutdown(self.fd, Direction::Send))?;
        self.sys(tcp::select_queue(self.fd, Queue::None))
    }

    /// The segment that the peer closed its direction with.
    fn peer_fin(&self, reaches: State) -> Result<(), RestoreError> {
        let unacked = self.tcp.send_len.wrapping_add(u32::from(self.tcp.state.fin_sent()));
        let seq = self.tcp.rcv_nxt.wrapping_sub(1);
        self.deliver(Kind::Fin, seq, self.tcp.write_seq.wrapping_sub(unacked), reaches)
    }

    /// The segment by which the peer acknowledged our FIN, and with it all that we sent.
    fn acknowledge(&self, reaches: State) -> Result<(), RestoreError> {
        self.deliver(Kind::Ack, self.tcp.rcv_nxt, self.tcp.write_seq, reaches)
    }

    fn deliver(&self, kind: Kind, seq: u32, ack: u32, reaches: State) -> Result<(), RestoreError> {
        let port = self.sys(addr::local(self.fd))?.port();
        let segment = Segment {
            tuple: forge::with_local_port(self.tuple, port),
            kind,
            data: &[],
            seq,
            ack,
            window: match kind {
                // As repair mode leaves it: nothing is sent, nor cut to its size, until the windows are set.
                Kind::SynAck(_) => 0,
                Kind::Ack | Kind::Urgent | Kind::Fin | Kind::Rst => self.header_window(),
            },
        };
        self.forged(self.forge.deliver(self.fd, &segment, reaches))
    }

    fn header_window(&self) -> u16 {
        let scale = self.tcp.negotiated.wscale.map_or(0, |scale| scale.snd);
        forge::header_window(self.tcp.window.map_or(0, |window| window.snd_wnd), scale)
    }
}

fn destroy_orphan(socket: BorrowedFd<'_>, tuple: &FourTuple) -> Result<bool, SysError> {
    let Ok(ns) = NetNs::of_socket(socket) else { return Ok(false) };
    ns.run(|| diag::destroy_orphan(&tuple.on_wire())).unwrap_or(Ok(false))
}

/// Buffers that were too small for the queues and have room for them now, and then what they were.
///
/// They grow when the socket is connected: connect() makes of the receive buffer's size the largest window that is ever
/// announced (TCP_WINDOW_CLAMP), and what is announced beyond the true size ends in a buffer that grows by all that arrives.
///
/// The sizes and whether the program fixed them (SO_BUF_LOCK) are put back by [`RoomForQueues::give_back`]; bytes
/// beyond the size stay, as they do in a running socket whose buffer shrinks. Before 5.14 there is no SO_BUF_LOCK, and a
/// size that was ever set is fixed: a buffer that has room is left alone.
#[derive(Debug)]
struct RoomForQueues<'fd> {
    fd: BorrowedFd<'fd>,
    send: Option<i32>,
    receive: Option<i32>,
    locks: Option<u32>,
}

impl<'fd> RoomForQueues<'fd> {
    /// Makes room for as many bytes as `tcp` has in its queues; most buffers have it.
    fn make(fd: BorrowedFd<'fd>, tcp: &ControlBlock) -> Result<Option<Self>, SysError> {
        use sockopt::Buffer::{Receive, Send};
        if tcp.recv_len == 0 && tcp.send_len == 0 {
            return Ok(None);
        }
        let sizes = sockopt::buffer_sizes(fd)?;
        let too_small = |size, len| (len > 0 && size < accounted(len)).then_some(size);
        let (send, receive) = (too_small(sizes.send, tcp.send_len), too_small(sizes.receive, tcp.recv_len));
        if send.is_none() && receive.is_none() {
            return Ok(None);
        }
        let locks = match sockopt::buffer_locks(fd) {
            Ok(locks) => Some(locks),
            Err(SysError { errno: Errno::ENOPROTOOPT, .. }) => None,
            Err(error) => return Err(error),
        };
        for (buffer, size, len) in [(Send, send, tcp.send_len), (Receive, receive, tcp.recv_len)] {
            size.map_or(Ok(()), |_| sockopt::set_buffer_size(fd, buffer, accounted(len)))?;
        }
        Ok(Some(Self { fd, send, receive, locks }))
    }

    /// Puts the program's sizes back.
    fn give_back(self) -> Result<(), SysError> {
        use sockopt::Buffer::{Receive, Send};
        for (buffer, size) in [(Send, self.send), (Receive, self.receive)] {
            size.map_or(Ok(()), |size| sockopt::set_buffer_size(self.fd, buffer, size))?;
        }
        self.locks.map_or(Ok(()), |locks| sockopt::set_buffer_locks(self.fd, locks))
    }
}

/// What the kernel accounts for so many bytes at most: each small piece has a buffer of its own.
fn accounted(len: u32) -> i32 {
    const PER_BYTE: u32 = 8;
    const AT_LEAST: u32 = 1 << 16;
    i32::try_from(len.saturating_mul(PER_BYTE).saturating_add(AT_LEAST)).unwrap_or(i32::MAX)
}
