//! TCP: repair mode, sequences, windows, queues, and the calls that build a connection.

use std::mem::{MaybeUninit, offset_of, size_of};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;

use super::sockopt::{Plain, get, set, set_slice};
use super::{SysError, SysResult, addr, check, page, sockopt};

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

/// What to do with repair mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Repair {
    /// Enter it. The kernel also sets SO_REUSEADDR to 2, so that any address can be bound.
    On = 1,
    /// Leave it and, in ESTABLISHED, send a window probe, which wakes a flow that waits.
    Off = 0,
    /// Leave it silently (Linux 4.19). The kernel clears SO_REUSEADDR whenever repair mode ends.
    OffNoProbe = -1,
}

/// Enters or leaves repair mode.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN in the socket's network namespace, or for a listening socket.
pub fn set_repair(fd: BorrowedFd<'_>, mode: Repair) -> SysResult<()> {
    match set_repair_exactly(fd, mode) {
        Err(SysError { errno: Errno::EINVAL, .. }) if mode == Repair::OffNoProbe => {
            set_repair_exactly(fd, Repair::Off)
        }
        other => other,
    }
}

/// The same without a probe in place of a silent end.
///
/// # Errors
/// As [`set_repair`]; EINVAL for [`Repair::OffNoProbe`] before Linux 4.19.
pub fn set_repair_exactly(fd: BorrowedFd<'_>, mode: Repair) -> SysResult<()> {
    let call = match mode {
        Repair::On => "turn TCP_REPAIR on",
        Repair::Off | Repair::OffNoProbe => "turn TCP_REPAIR off",
    };
    set(fd, libc::SOL_TCP, TCP_REPAIR, &(mode as i32), call)
}

/// Whether the socket is in repair mode.
///
/// # Errors
/// The kernel's answer.
pub fn in_repair(fd: BorrowedFd<'_>) -> SysResult<bool> {
    Ok(get::<i32>(fd, libc::SOL_TCP, TCP_REPAIR, "get TCP_REPAIR")? != 0)
}

/// The queue that the repair-mode calls work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// None: a FIN that is queued now counts as not yet sent.
    None = 0,
    /// TCP_RECV_QUEUE.
    Receive = 1,
    /// TCP_SEND_QUEUE: what is queued now counts as sent.
    Send = 2,
}

/// Chooses the queue for [`queue_seq`], [`set_queue_seq`], [`peek`] and [`send`] in repair mode.
///
/// # Errors
/// EPERM outside repair mode.
pub fn select_queue(fd: BorrowedFd<'_>, queue: Queue) -> SysResult<()> {
    set(fd, libc::SOL_TCP, TCP_REPAIR_QUEUE, &(queue as i32), "set TCP_REPAIR_QUEUE")
}

/// The chosen queue's sequence: write_seq or rcv_nxt.
///
/// # Errors
/// EINVAL with no queue chosen.
pub fn queue_seq(fd: BorrowedFd<'_>) -> SysResult<u32> {
    get(fd, libc::SOL_TCP, TCP_QUEUE_SEQ, "get TCP_QUEUE_SEQ")
}

/// Sets the chosen queue's sequence on a socket that is not connected yet.
///
/// # Errors
/// EPERM on a connected socket.
pub fn set_queue_seq(fd: BorrowedFd<'_>, seq: u32) -> SysResult<()> {
    set(fd, libc::SOL_TCP, TCP_QUEUE_SEQ, &seq, "set TCP_QUEUE_SEQ")
}

/// `struct tcp_repair_window` (Linux 4.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Window {
    /// Sequence of the segment that last updated `snd_wnd` (SND.WL1).
    pub snd_wl1: u32,
    /// The peer's receive window, in bytes.
    pub snd_wnd: u32,
    /// The largest window the peer ever announced, in bytes.
    pub max_window: u32,
    /// Our receive window, in bytes.
    pub rcv_wnd: u32,
    /// `rcv_nxt` when our window was last announced.
    pub rcv_wup: u32,
}

impl Window {
    /// 65535 times 2¹⁴: what a header can announce with the largest shift of RFC 7323.
    pub const LARGEST: u32 = 65_535 << 14;

    /// Whether one of them is larger than can be announced.
    #[must_use]
    pub fn is_too_large(&self) -> bool {
        [self.snd_wnd, self.max_window, self.rcv_wnd].into_iter().any(|window| window > Self::LARGEST)
    }
}

const _: () = assert!(size_of::<Window>() == 20);
// SAFETY: five u32, no padding.
unsafe impl Plain for Window {}

/// The five window fields; `None` on a kernel before 4.8, which has no such option.
///
/// # Errors
/// EPERM outside repair mode.
pub fn window(fd: BorrowedFd<'_>) -> SysResult<Option<Window>> {
    match get(fd, libc::SOL_TCP, TCP_REPAIR_WINDOW, "get TCP_REPAIR_WINDOW") {
        Ok(window) => Ok(Some(window)),
        Err(SysError { errno: Errno::ENOPROTOOPT, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets the five window fields.
///
/// # Errors
/// EINVAL when `snd_wl1` lies beyond our receive window or `rcv_wup` beyond rcv_nxt.
pub fn set_window(fd: BorrowedFd<'_>, window: &Window) -> SysResult<()> {
    set(fd, libc::SOL_TCP, TCP_REPAIR_WINDOW, window, "set TCP_REPAIR_WINDOW")
}

/// One negotiated option for [`set_options`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepairOption {
    /// The peer's largest segment, in bytes.
    MaxSegment(u32),
    /// Shifts of the peer's and of our windows.
    WindowScale {
        /// For windows that the peer announces.
        snd: u8,
        /// For windows that we announce.
        rcv: u8,
    },
    /// Selective acknowledgements.
    SackPermitted,
    /// Timestamps.
    Timestamps,
}

/// `struct tcp_repair_opt` of linux/tcp.h.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct RepairOpt {
    code: u32,
    value: u32,
}
const _: () = assert!(size_of::<RepairOpt>() == 8);
// SAFETY: two u32, no padding.
unsafe impl Plain for RepairOpt {}

impl From<RepairOption> for RepairOpt {
    fn from(option: RepairOption) -> Self {
        // The codes are those of the options in a SYN segment (RFC 9293, 7323, 2018).
        let (code, value) = match option {
            RepairOption::MaxSegment(bytes) => (2, bytes),
            RepairOption::WindowScale { snd, rcv } => (3, u32::from(snd) | u32::from(rcv) << 16),
            RepairOption::SackPermitted => (4, 0),
            RepairOption::Timestamps => (8, 0),
        };
        Self { code, value }
    }
}

/// Sets what the ends agreed on in their SYN segments.
///
/// # Errors
/// EPERM unless the socket is ESTABLISHED, in repair mode, and has sent nothing yet.
pub fn set_options<const N: usize>(fd: BorrowedFd<'_>, options: [Option<RepairOption>; N]) -> SysResult<()> {
    let mut values = [RepairOpt::default(); N];
    let mut used = 0;
    for (slot, option) in values.iter_mut().zip(options.into_iter().flatten()) {
        *slot = option.into();
        used += 1;
    }
    set_slice(fd, libc::SOL_TCP, TCP_REPAIR_OPTIONS, &values[..used], "set TCP_REPAIR_OPTIONS")
}

/// The TSval that a segment sent now would carry. Bit 0 tells the clock's unit since Linux 6.7.
///
/// # Errors
/// The kernel's answer.
pub fn timestamp(fd: BorrowedFd<'_>) -> SysResult<u32> {
    get(fd, libc::SOL_TCP, TCP_TIMESTAMP, "get TCP_TIMESTAMP")
}

/// Whether the clock of the timestamps ticks in microseconds, and bit 0 of [`timestamp`] is no noise.
///
/// # Errors
/// The kernel's answer.
pub fn ticks_in_microseconds(fd: BorrowedFd<'_>) -> SysResult<bool> {
    Ok(timestamp(fd)? & 1 != 0 && timestamp_tells_unit(fd)?)
}

/// Whether bit 0 of [`timestamp`] tells the clock's unit, as it does since Linux 6.7: `tcpi_total_rto` came with that, too.
///
/// # Errors
/// The kernel's answer.
pub fn timestamp_tells_unit(fd: BorrowedFd<'_>) -> SysResult<bool> {
    const WITH_TOTAL_RTO: libc::socklen_t = 248;
    let mut info = [0_u8; 248];
    let mut len = WITH_TOTAL_RTO;
    let into = info.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `len` bytes, the size of `info`.
    let ret = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_TCP, libc::TCP_INFO, into, &raw mut len) };
    check("get TCP_INFO", ret).map(|_| len == WITH_TOTAL_RTO)
}

/// Sets what [`timestamp`] reads.
///
/// # Errors
/// EPERM outside repair mode.
pub fn set_timestamp(fd: BorrowedFd<'_>, tsval: u32) -> SysResult<()> {
    set(fd, libc::SOL_TCP, TCP_TIMESTAMP, &tsval, "set TCP_TIMESTAMP")
}

/// In repair mode the peer's largest segment (mss_clamp), otherwise the current segment size.
///
/// # Errors
/// The kernel's answer.
pub fn max_segment(fd: BorrowedFd<'_>) -> SysResult<u32> {
    get(fd, libc::SOL_TCP, libc::TCP_MAXSEG, "get TCP_MAXSEG")
}

/// Makes the kernel compute the segment size anew from the path's MTU and the peer's clamp.
///
/// connect() computes it while the clamp is still the default of 536, and the repair options change
/// the clamp alone; setting (no) IP options is the one call that makes the kernel compute it again.
///
/// # Errors
/// The kernel's answer.
pub fn sync_segment_size(fd: BorrowedFd<'_>) -> SysResult<()> {
    set_slice::<u8>(fd, libc::SOL_IP, libc::IP_OPTIONS, &[], "set IP_OPTIONS")
}

/// Whether a protocol such as TLS sits on top in the kernel (TCP_ULP): its keys are no part of TCP's state.
///
/// # Errors
/// The kernel's answer.
pub fn has_upper_layer(fd: BorrowedFd<'_>) -> SysResult<bool> {
    let mut name = [0_u8; 16];
    let mut len: libc::socklen_t = 16;
    // SAFETY: the kernel writes at most `len` bytes, the size of `name`.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_TCP, libc::TCP_ULP, name.as_mut_ptr().cast(), &raw mut len)
    };
    match check("get TCP_ULP", ret) {
        Ok(_) => Ok(len > 0 && name[0] != 0),
        Err(SysError { errno: Errno::ENOPROTOOPT, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What is needed of `struct tcp_info`.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// The state.
    pub state: u8,
    /// How often in a row the timer has sent something again.
    pub retransmits: u8,
    /// `TCPI_OPT_*` bits.
    pub options: u8,
    /// Shift of the peer's windows.
    pub snd_wscale: u8,
    /// Shift of our windows.
    pub rcv_wscale: u8,
    /// Segments sent and not acknowledged, a SYN or FIN among them.
    pub unacked: u32,
    /// Bytes in the send queue that were never sent, a FIN among them; `None` before Linux 4.6.
    pub unsent: Option<u32>,
    /// The smoothed round trip time; 0 before the first one is measured.
    pub rtt: Duration,
    /// After so long what was sent, and not acknowledged, is sent again.
    pub rto: Duration,
    /// Since data was sent last, or since the connection began.
    pub last_data_sent: Duration,
    /// The congestion window, in segments.
    pub snd_cwnd: u32,
}

/// The head of `struct tcp_info`, as far as `tcpi_notsent_bytes`.
#[derive(Clone, Copy)]
#[repr(C)]
struct TcpInfo {
    state: u8,
    ca_state: u8,
    retransmits: u8,
    probes: u8,
    backoff: u8,
    options: u8,
    wscale: u8,
    rate_limited: u8,
    words: [u32; 24],
    rates: [u64; 4],
    segments: [u32; 2],
    notsent_bytes: u32,
}
const _: () = assert!(offset_of!(TcpInfo, notsent_bytes) == 144);

/// Reads [`Info`].
///
/// # Errors
/// The kernel's answer; EMSGSIZE if it knows less than the state.
pub fn info(fd: BorrowedFd<'_>) -> SysResult<Info> {
    const CALL: &str = "get TCP_INFO";
    const RTO: usize = 0;
    const UNACKED: usize = 4; // tcpi_ato, tcpi_snd_mss and tcpi_rcv_mss come before it
    const LAST_DATA_SENT: usize = 9; // behind tcpi_fackets
    const RTT: usize = 15; // behind tcpi_rcv_ssthresh
    const SND_CWND: usize = 18; // behind tcpi_snd_ssthresh
    const NEEDED: usize = offset_of!(TcpInfo, words) + (SND_CWND + 1) * size_of::<u32>();
    const WITH_UNSENT: usize = offset_of!(TcpInfo, notsent_bytes) + size_of::<u32>();
    let mut value = MaybeUninit::<TcpInfo>::zeroed();
    #[allow(clippy::cast_possible_truncation)] // 148
    let mut len = WITH_UNSENT as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which fit into `value`.
    let ret = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_TCP,
            libc::TCP_INFO,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    check(CALL, ret)?;
    // SAFETY: zeroed before, and any bit pattern is a value of the integers in it.
    let value = unsafe { value.assume_init() };
    let len = len as usize;
    if len < NEEDED {
        return Err(SysError { call: CALL, errno: Errno::EMSGSIZE });
    }
    let (low, high) = (value.wscale & 0xf, value.wscale >> 4);
    let (snd_wscale, rcv_wscale) = if cfg!(target_endian = "little") { (low, high) } else { (high, low) };
    Ok(Info {
        state: value.state,
        retransmits: value.retransmits,
        options: value.options,
        snd_wscale,
        rcv_wscale,
        unacked: value.words[UNACKED],
        unsent: (len >= WITH_UNSENT).then_some(value.notsent_bytes),
        rtt: Duration::from_micros(value.words[RTT].into()),
        rto: Duration::from_micros(value.words[RTO].into()),
        last_data_sent: Duration::from_millis(value.words[LAST_DATA_SENT].into()),
        snd_cwnd: value.words[SND_CWND],
    })
}

fn ioctl_bytes(fd: BorrowedFd<'_>, request: libc::Ioctl, call: &'static str) -> SysResult<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: these requests write one int.
    check(call, unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut bytes) })?;
    u32::try_from(bytes).map_err(|_| SysError { call, errno: Errno::EOVERFLOW })
}

/// Bytes to read up to urgent data, without the FIN (SIOCINQ).
///
/// # Errors
/// EINVAL for a listening socket.
pub fn receive_queue_len(fd: BorrowedFd<'_>) -> SysResult<u32> {
    ioctl_bytes(fd, libc::FIONREAD, "get SIOCINQ")
}

/// How much there is to read, in two counts that differ where urgent data lies in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unread {
    /// Bytes to read up to urgent data, without the FIN, as SIOCINQ counts.
    pub to_mark: u32,
    /// All up to rcv_nxt, with the FIN.
    pub all: u32,
}

/// Both counts by one call; `None` when the kernel does not tell: with a page of bytes or more, with nothing but
/// a FIN, and before Linux 5.7.
///
/// The call is TCP_ZEROCOPY_RECEIVE with no memory to map pages to, which has nothing but its counts to give.
///
/// # Errors
/// The kernel's answer.
pub fn unread(fd: BorrowedFd<'_>) -> SysResult<Option<Unread>> {
    zerocopy_counts(fd, 0)
}

/// [`Unread::all`] of a connection without a FIN from its peer, however many bytes they are; `None` when the kernel
/// does not tell.
///
/// # Errors
/// The kernel's answer.
pub fn unread_without_fin(fd: BorrowedFd<'_>) -> SysResult<Option<u32>> {
    let mut counts = zerocopy_counts(fd, page::known())?;
    if counts.is_none() && page::known() == 0 && page::made() {
        counts = zerocopy_counts(fd, page::known())?;
    }
    Ok(counts.map(|unread| unread.all))
}

/// At `address` there is a [`page`], or nothing: it is 0. No byte is asked for, so none is mapped there.
fn zerocopy_counts(fd: BorrowedFd<'_>, address: u64) -> SysResult<Option<Unread>> {
    /// `struct tcp_zerocopy_receive` of linux/tcp.h as far as `inq`. With the next field, `err`, the call would take
    /// a pending error off the socket.
    #[derive(Clone, Copy, Default)]
    #[repr(C, packed)]
    struct ZerocopyReceive {
        address: u64,
        length: u32,
        recv_skip_hint: u32,
        inq: u32,
    }
    const TCP_ZEROCOPY_RECEIVE: i32 = 35;
    const CALL: &str = "get TCP_ZEROCOPY_RECEIVE";
    let mut value = ZerocopyReceive { address, ..ZerocopyReceive::default() };
    #[allow(clippy::cast_possible_truncation)] // 20
    let mut len = size_of::<ZerocopyReceive>() as libc::socklen_t;
    let into = (&raw mut value).cast();
    // SAFETY: the kernel reads and writes at most `len` bytes, the size of `value`; integers have no invalid patterns.
    let ret =
        unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_TCP, TCP_ZEROCOPY_RECEIVE, into, &raw mut len) };
    match check(CALL, ret) {
        Ok(_) if len as usize == size_of::<ZerocopyReceive>() => {
            Ok(Some(Unread { to_mark: value.recv_skip_hint, all: value.inq }))
        }
        Ok(_) | Err(SysError { errno: Errno::EINVAL | Errno::EIO | Errno::ENOPROTOOPT, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the next byte to read is the urgent one (SIOCATMARK).
///
/// # Errors
/// EINVAL for a listening socket.
pub fn at_mark(fd: BorrowedFd<'_>) -> SysResult<bool> {
    const SIOCATMARK: libc::Ioctl = 0x8905;
    Ok(ioctl_bytes(fd, SIOCATMARK, "get SIOCATMARK")? != 0)
}

/// Bytes written and not acknowledged, with the FIN (SIOCOUTQ).
///
/// # Errors
/// EINVAL for a listening socket.
pub fn send_queue_len(fd: BorrowedFd<'_>) -> SysResult<u32> {
    ioctl_bytes(fd, libc::TIOCOUTQ, "get SIOCOUTQ")
}

/// Bytes never sent, with the FIN (SIOCOUTQNSD).
///
/// # Errors
/// EINVAL for a listening socket.
pub fn unsent_len(fd: BorrowedFd<'_>) -> SysResult<u32> {
    const SIOCOUTQNSD: libc::Ioctl = 0x894B;
    ioctl_bytes(fd, SIOCOUTQNSD, "get SIOCOUTQNSD")
}

/// Copies bytes of the receive queue (or, in repair mode, of the chosen queue) without taking them; returns
/// how many.
///
/// # Errors
/// EAGAIN when there is nothing.
pub fn peek(fd: BorrowedFd<'_>, into: &mut [MaybeUninit<u8>]) -> SysResult<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `into.len()` bytes to `into`.
    let got = unsafe { libc::recv(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) };
    usize::try_from(got).map_err(|_| SysError::last("peek into a queue"))
}

/// [`peek`] at most `most` bytes to the end of `into`, as far as its capacity goes.
///
/// # Errors
/// As [`peek`].
pub fn peek_append(fd: BorrowedFd<'_>, into: &mut Vec<u8>, most: usize) -> SysResult<usize> {
    let space = into.spare_capacity_mut();
    let most = most.min(space.len());
    let got = peek(fd, &mut space[..most])?;
    // SAFETY: the kernel wrote `got` bytes, no more than the spare capacity, behind the old length.
    unsafe { into.set_len(into.len() + got) };
    Ok(got)
}

/// Appends bytes to the send queue (or, in repair mode, to the chosen queue); returns how many went.
///
/// # Errors
/// EAGAIN when the buffer is full, ENOMEM when the kernel wants smaller pieces.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> SysResult<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes.len()` bytes of a live slice.
    let sent = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(sent).map_err(|_| SysError::last("append to a queue"))
}

/// `bind()`.
///
/// # Errors
/// EADDRNOTAVAIL where this host does not have the address (or, IPv6, not yet).
pub fn bind(fd: BorrowedFd<'_>, local: SocketAddr) -> SysResult<()> {
    addr::with_raw(local, |sa, len| {
        // SAFETY: `sa` points to a valid socket address of `len` bytes.
        check("bind", unsafe { libc::bind(fd.as_raw_fd(), sa, len) }).map(drop)
    })
}

/// `connect()`; in repair mode it sends nothing and the socket is ESTABLISHED at once. EINPROGRESS
/// of a non-blocking socket counts as success.
///
/// # Errors
/// EADDRNOTAVAIL where the four-tuple is taken, ENETUNREACH without a route.
pub fn connect(fd: BorrowedFd<'_>, remote: SocketAddr) -> SysResult<()> {
    addr::with_raw(remote, |sa, len| {
        // SAFETY: `sa` points to a valid socket address of `len` bytes.
        match check("connect", unsafe { libc::connect(fd.as_raw_fd(), sa, len) }) {
            Err(SysError { errno: Errno::EINPROGRESS, .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    })
}

/// Takes the first connection out of a listener's accept queue; `None`: it is empty.
///
/// # Errors
/// The kernel's answer: EMFILE, EINVAL for a socket that does not listen.
pub fn accept(listener: BorrowedFd<'_>) -> SysResult<Option<OwnedFd>> {
    let none = std::ptr::null_mut();
    let accepted = sockopt::with_nonblocking(listener, || {
        // SAFETY: nobody asks for the peer's address.
        let fd = unsafe { libc::accept4(listener.as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC) };
        check("accept a connection", fd)
    });
    match accepted {
        // SAFETY: a descriptor the kernel just gave us; nobody else owns it.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(SysError { errno: Errno::EAGAIN, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `connect(AF_UNSPEC)`: back to a fresh, unbound socket, with any shutdown forgotten.
///
/// # Errors
/// The kernel's answer.
pub fn disconnect(fd: BorrowedFd<'_>) -> SysResult<()> {
    let unspec = libc::sockaddr { sa_family: 0, sa_data: [0; 14] };
    #[allow(clippy::cast_possible_truncation)] // 16
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: a valid address with family AF_UNSPEC.
    check("disconnect", unsafe { libc::connect(fd.as_raw_fd(), &raw const unspec, len) }).map(drop)
}

/// A direction of `shutdown()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Direction {
    /// SHUT_RD.
    Receive = libc::SHUT_RD,
    /// SHUT_WR: queues a FIN.
    Send = libc::SHUT_WR,
}

/// `shutdown()`.
///
/// # Errors
/// ENOTCONN on a closed socket.
pub fn shutdown(fd: BorrowedFd<'_>, direction: Direction) -> SysResult<()> {
    // SAFETY: no pointers.
    check("shut down", unsafe { libc::shutdown(fd.as_raw_fd(), direction as i32) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_that_can_be_announced() {
        let large = |window: u32| Window { rcv_wnd: window, ..Window::default() }.is_too_large();
        assert!(!large(1 << 29) && !large(Window::LARGEST));
        assert!(large(Window::LARGEST + 1) && large(u32::MAX));
    }
}
