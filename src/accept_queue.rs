//! The accept queue: connections that are established, and that no program has accepted yet.
//!
//! A listener holds them in the order in which they came. Each can be [taken](take) out and read as any other connection.
//! No call puts one back, but since Linux 6.9 a BPF program that sees a packet arrive may say that it is the ACK which
//! ends a handshake, and of which listener (module `kernel::reqsk`). The kernel then makes a connection of that segment,
//! with the options that the program names, and appends it to the queue:
//!
//! 1. the program is shown what arrives at the loopback interface, where a raw socket's packets to an address of the
//!    host itself pass, or at the interface of a VRF, where those pass that are bound to it;
//! 2. the forged ACK (module `forge`): its acknowledgement becomes snd_una, its sequence rcv_nxt less the unread bytes;
//! 3. the unread bytes, and the peer's FIN, as further forged segments, each when the one before has arrived, which
//!    the socket monitor tells.
//!
//! The program is gone with its descriptor. The connection must be locked from the
//! network, and no other socket may have its addresses.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use crate::connection::{ControlBlock, FourTuple, State};
use crate::forge::{Forge, ForgeError, Kind, MARK, Segment, Way, header_window};
use crate::kernel::btf::Btf;
use crate::kernel::diag::{Family, Unaccepted};
use crate::kernel::netlink::NetlinkSocket;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::reqsk::{self, Ack, Answer, Requests};
use crate::kernel::{SysError, diag, interface, sockopt, tcp};
use crate::lock::{BadOption, variable};

/// How many connections wait in a listener's queue.
///
/// # Errors
/// The kernel's answer.
pub fn waiting(listener: BorrowedFd<'_>) -> Result<u32, SysError> {
    // Of a listener the kernel shows its backlog in this place.
    Ok(tcp::info(listener)?.unacked)
}

/// Takes the first connection out of a listener's queue; `None`: it is empty.
///
/// # Errors
/// The kernel's answer.
pub fn take(listener: BorrowedFd<'_>) -> Result<Option<OwnedFd>, SysError> {
    tcp::accept(listener)
}

/// What waits to be accepted by a listener at `local`, or by others there: which of them has what, nobody tells.
///
/// # Errors
/// The kernel's answer.
pub fn look(local: SocketAddr) -> Result<Vec<Unaccepted>, SysError> {
    let family = if local.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    let mut found = diag::unaccepted(family, local.port())?;
    found.retain(|seen| hears(local, seen.tuple.local));
    Ok(found)
}

/// Whether a listener at `local` gets connections to `end`, as far as addresses tell.
#[must_use]
pub fn hears(local: SocketAddr, end: SocketAddr) -> bool {
    let own = local.ip();
    local.port() == end.port() && (own.is_unspecified() || own.to_canonical() == end.ip().to_canonical())
}

/// Why a connection that stands in a queue could not be put back into that of a listener bound to this interface (0: to
/// none), if so.
#[must_use]
pub fn unfit_in_queue(seen: &Unaccepted, device: u32) -> Option<&'static str> {
    const LOOPBACK: u32 = 1; // of every namespace
    let bound_alike = seen.device == device || (device == 0 && seen.device == LOOPBACK);
    let wire = seen.tuple.on_wire();
    // Where the segments are small for another reason than the peer's limit, that limit does not show.
    unfit_addresses(&wire)
        .or(unfit_state(State::try_from(seen.state).ok()))
        .or((!bound_alike)
            .then_some("it is bound to an interface, as its listener is not (net.ipv4.tcp_l3mdev_accept)"))
        .or(unfit_segment(&wire, seen.segment))
}

/// Why such a connection cannot be put back into a queue, if so.
#[must_use]
pub fn unfit(tuple: &FourTuple, tcp: &ControlBlock) -> Option<&'static str> {
    let wire = tuple.on_wire();
    unfit_addresses(&wire)
        .or(unfit_state(Some(tcp.state)))
        .or((tcp.send_len != 0).then_some("it has sent bytes before it was accepted"))
        .or(unfit_segment(&wire, tcp.negotiated.mss_clamp))
}

fn unfit_addresses(wire: &FourTuple) -> Option<&'static str> {
    let link_local = matches!(wire.local.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local());
    wire.impossible().or(link_local.then_some(
        "a link-local address belongs to an interface, and the accept queue is reached by another",
    ))
}

fn unfit_state(state: Option<State>) -> Option<&'static str> {
    match state {
        Some(State::Established | State::CloseWait) => None,
        None => Some("its handshake is not over (TCP Fast Open)"),
        Some(_) => Some("it is in a state in which no connection waits to be accepted"),
    }
}

fn unfit_segment(wire: &FourTuple, segment: u32) -> Option<&'static str> {
    let least = if wire.local.is_ipv4() { 536 } else { 1220 };
    let fits = (least..=u32::from(u16::MAX)).contains(&segment);
    (!fits).then_some("the kernel makes no connection of this segment size in an accept queue")
}

/// The environment variable that chooses the [`Fallback`].
pub const POLICY_VARIABLE: &str = "SOCCR_ACCEPT_QUEUE";

/// What becomes of connections that nobody has accepted, where they cannot be carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fallback {
    /// They stay where they are, by which a dump fails.
    #[default]
    Refuse,
    /// They are reset.
    Reset,
}

impl Fallback {
    /// What `SOCCR_ACCEPT_QUEUE` chooses.
    ///
    /// # Errors
    /// [`BadOption`] for any other value than `refuse` or `reset`.
    pub fn from_env() -> Result<Self, BadOption> {
        match variable(POLICY_VARIABLE).as_str() {
            "" | "refuse" => Ok(Self::Refuse),
            "reset" => Ok(Self::Reset),
            other => {
                Err(BadOption { variable: POLICY_VARIABLE, value: other.into(), expected: "refuse or reset" })
            }
        }
    }
}

/// Resets all connections that wait in a listener's queue; how many that were.
///
/// # Errors
/// The kernel's answer.
pub fn reset(listener: BorrowedFd<'_>) -> Result<usize, SysError> {
    let mut count = 0;
    while let Some(socket) = take(listener)? {
        tcp::disconnect(socket.as_fd())?;
        count += 1;
    }
    Ok(count)
}

/// Connections cannot be put into accept queues here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// No BTF.
    #[error("the kernel does not describe its functions (CONFIG_DEBUG_INFO_BTF)")]
    Btf(#[source] io::Error),
    /// The kernel is too old.
    #[error("the kernel has no bpf_sk_assign_tcp_reqsk (Linux 6.9)")]
    Function,
    /// SYN cookies are off, and with them the kernel's way to make a connection from an ACK.
    #[error("{0}: net.ipv4.tcp_syncookies is 0")]
    SynCookies(NetNs),
    /// The BPF program cannot be made or attached.
    #[error("no BPF program can be used")]
    Bpf(#[from] SysError),
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
}

/// A connection could not be put into an accept queue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PutError {
    /// Its description does not fit.
    #[error("cannot put {tuple} into the accept queue: {what}")]
    Unfit {
        /// The connection.
        tuple: FourTuple,
        /// What does not fit.
        what: &'static str,
    },
    /// A system call failed.
    #[error("cannot put {tuple} into the accept queue")]
    Sys {
        /// The connection.
        tuple: FourTuple,
        /// The call.
        source: SysError,
    },
    /// The forged ACK could not be sent.
    #[error("cannot put {tuple} into the accept queue")]
    Forge {
        /// The connection.
        tuple: FourTuple,
        /// Why.
        source: ForgeError,
    },
    /// The queue takes only a part of the bytes.
    #[error("cannot put {tuple} into the accept queue: it takes {taken} of {len} bytes")]
    Bytes {
        /// The connection.
        tuple: FourTuple,
        /// Bytes that went in.
        taken: usize,
        /// Bytes there are.
        len: usize,
    },
}

/// A way into the accept queues of one network namespace. Dropping it closes it.
#[derive(Debug)]
pub struct AcceptQueues {
    ns: NetNs,
    requests: Requests,
    monitor: NetlinkSocket,
    _attached: Vec<OwnedFd>,
}

/// Whether connections can be put into accept queues of this namespace.
///
/// # Errors
/// [`Unavailable`]: why not.
pub fn check(ns: &NetNs) -> Result<(), Unavailable> {
    load()?;
    ns.run(|| check_settings(ns))?
}

/// The kernel's way to make a connection of an ACK begins where it looks whether SYN cookies are on.
fn check_settings(ns: &NetNs) -> Result<(), Unavailable> {
    match fs::read("/proc/sys/net/ipv4/tcp_syncookies") {
        Ok(text) if text.trim_ascii() == b"0" => Err(Unavailable::SynCookies(ns.clone())),
        _ => Ok(()),
    }
}

impl AcceptQueues {
    /// Opens a way into the queues of this namespace.
    ///
    /// # Errors
    /// [`Unavailable`].
    pub fn open(ns: &NetNs) -> Result<Self, Unavailable> {
        let requests = load()?;
        let (attached, monitor) = ns.run(|| {
            check_settings(ns)?;
            let attached = interface::loopbacks()?.into_iter().map(|it| requests.attach(it));
            let attached = attached.collect::<Result<_, _>>()?;
            Ok::<_, Unavailable>((attached, NetlinkSocket::sock_diag()?))
        })??;
        Ok(Self { ns: ns.clone(), requests, monitor, _attached: attached })
    }

    /// Appends a connection to the queue of `listener`, a socket of this namespace. `unread` are the bytes of its receive
    /// queue; `urgent` is the place among them of the urgent one, if any.
    ///
    /// # Errors
    /// [`PutError`]. Where only bytes are missing the connection is in the queue, without them.
    pub fn put(
        &self,
        forge: &Forge,
        listener: BorrowedFd<'_>,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        unread: &[u8],
        urgent: Option<usize>,
    ) -> Result<(), PutError> {
        let long =
            (unread.len() != tcp.recv_len as usize).then_some("its bytes are not as many as announced");
        let beyond = urgent.filter(|urgent| *urgent >= unread.len()).and(Some("no byte is urgent"));
        if let Some(what) = unfit(tuple, tcp).or(long).or(beyond) {
            return Err(PutError::Unfit { tuple: *tuple, what });
        }
        let sys = |source| PutError::Sys { tuple: *tuple, source };
        let device = sockopt::bound_index(listener).map_err(sys)?;
        let way = Way { ns: self.ns.clone(), device: sockopt::bound_device(listener).map_err(sys)? };
        Putting { queues: self, forge, way, device, tuple, tcp, urgent, wire: tuple.on_wire() }
            .run(listener, unread)
    }
}

struct Putting<'a> {
    queues: &'a AcceptQueues,
    forge: &'a Forge,
    way: Way,
    /// That of the way.
    device: u32,
    tuple: &'a FourTuple,
    tcp: &'a ControlBlock,
    urgent: Option<usize>,
    wire: FourTuple,
}

impl Putting<'_> {
    fn run(&self, listener: BorrowedFd<'_>, unread: &[u8]) -> Result<(), PutError> {
        // It would take the forged segments for its peer's.
        if self.sys(self.receiving())?.is_some() {
            return Err(self.unfit("another socket has these addresses"));
        }
        self.sys(self.queues.requests.choose(listener))?;
        let put = self.handshake();
        put.and(self.sys(self.queues.requests.leave()))?;
        self.fill(unread)?;
        if self.tcp.state.fin_received() { self.fin() } else { Ok(()) }
    }

    fn sys<T>(&self, result: Result<T, SysError>) -> Result<T, PutError> {
        result.map_err(|source| PutError::Sys { tuple: *self.tuple, source })
    }

    /// The ACK that ends a handshake.
    fn handshake(&self) -> Result<(), PutError> {
        let ack = self.segment(self.first_seq(), &[]);
        let Segment { tuple, seq, ack: acked, .. } = ack;
        let expected = Ack { tuple, seq, ack: acked, negotiated: &self.tcp.negotiated };
        self.sys(self.queues.requests.expect(&expected))?;
        let sent = self.forge.bring(&self.way, &ack, || Ok(self.receiving()?.is_some()));
        let answer = self.sys(self.queues.requests.answer(&expected))?;
        if sent.map_err(|source| PutError::Forge { tuple: *self.tuple, source })? {
            return Ok(());
        }
        match answer {
            Answer::NotSeen => Err(self.unfit(
                "the forged ACK does not pass the loopback interface, or that of its VRF: a firewall rule drops it",
            )),
            Answer::Taken => {
                Err(self.unfit("the queue is full, or the kernel denies a connection of these addresses"))
            }
            Answer::Refused(errno) => {
                self.sys(Err(SysError { call: "make a connection of the forged ACK", errno }))
            }
        }
    }

    /// The bytes, in pieces that get smaller before we give up: they must fit the window, which opens as they come. The
    /// kernel counts the memory of a packet, a power of two, against the buffer; so a piece fills one, less this much for
    /// headers and what the kernel notes beside.
    fn fill(&self, unread: &[u8]) -> Result<(), PutError> {
        const BESIDE: usize = 512;
        const LARGEST: usize = (32 << 10) - BESIDE;
        const SMALLEST: usize = 64;
        let (mut taken, mut piece) = (0, LARGEST);
        while taken < unread.len() {
            let urgent = self.urgent.filter(|urgent| (taken..taken + piece).contains(urgent));
            let end = urgent.map_or(unread.len().min(taken + piece), |urgent| urgent + 1);
            let kind = if urgent.is_some() { Kind::Urgent } else { Kind::Ack };
            let seq = u32::try_from(taken).unwrap_or(u32::MAX).wrapping_add(self.first_seq());
            let arrived = || Ok(self.receiving()?.is_some_and(|now| now.unread as usize >= end));
            let segment = Segment { kind, ..self.segment(seq, &unread[taken..end]) };
            if self.send(&segment, arrived)? {
                taken = end;
            } else if piece > SMALLEST {
                piece = if piece > BESIDE { (piece + BESIDE) / 2 - BESIDE } else { piece / 2 };
            } else {
                return Err(PutError::Bytes { tuple: *self.tuple, taken, len: unread.len() });
            }
        }
        Ok(())
    }

    fn fin(&self) -> Result<(), PutError> {
        let fin = Segment { kind: Kind::Fin, ..self.segment(self.tcp.rcv_nxt.wrapping_sub(1), &[]) };
        let closed = || Ok(self.receiving()?.is_some_and(|now| now.state == State::CloseWait as u8));
        if self.send(&fin, closed)? { Ok(()) } else { Err(self.unfit("it does not take the peer's FIN")) }
    }

    fn send(
        &self,
        segment: &Segment<'_>,
        arrived: impl Fn() -> Result<bool, SysError>,
    ) -> Result<bool, PutError> {
        let sent = self.forge.bring_once(&self.way, segment, arrived);
        sent.map_err(|source| PutError::Forge { tuple: *self.tuple, source })
    }

    fn receiving(&self) -> Result<Option<diag::Receiving>, SysError> {
        diag::receiving(&self.queues.monitor, &self.wire, self.device)
    }

    /// Sequence of the first unread byte.
    fn first_seq(&self) -> u32 {
        let fin = u32::from(self.tcp.state.fin_received());
        self.tcp.rcv_nxt.wrapping_sub(fin).wrapping_sub(self.tcp.recv_len)
    }

    fn segment<'d>(&self, seq: u32, data: &'d [u8]) -> Segment<'d> {
        let scale = self.tcp.negotiated.wscale.map_or(0, |scale| scale.snd);
        let window = header_window(self.tcp.window.map_or(0, |window| window.snd_wnd), scale);
        Segment { tuple: self.wire, kind: Kind::Ack, data, seq, ack: self.tcp.write_seq, window }
    }

    fn unfit(&self, what: &'static str) -> PutError {
        PutError::Unfit { tuple: *self.tuple, what }
    }
}

fn load() -> Result<Requests, Unavailable> {
    Ok(Requests::load(function()?, MARK)?)
}

/// The kernel's number of the function; its description is read once.
fn function() -> Result<u32, Unavailable> {
    static NUMBER: OnceLock<u32> = OnceLock::new();
    if let Some(number) = NUMBER.get() {
        return Ok(*number);
    }
    let btf = Btf::of_kernel().map_err(Unavailable::Btf)?;
    let number = btf.function(reqsk::FUNCTION).ok_or(Unavailable::Function)?;
    Ok(*NUMBER.get_or_init(|| number))
}
