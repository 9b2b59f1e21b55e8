//! The accept queue: connections that are established, and that no program has accepted yet.
//!
//! A listener holds them in the order in which they came. Each can be [taken](take) out and read as any other connection.
//! No call puts one back, but since Linux 6.9 a BPF program that sees a packet arrive may say that it is the ACK which
//! ends a handshake, and of which listener (`bpf_sk_assign_tcp_reqsk`, made for SYN cookies of one's own). The kernel
//! then makes a connection of that segment, with the options that the program names, and appends it to the queue:
//!
//! 1. the program is shown what arrives at the loopback interface (tcx, Linux 6.6), where a raw socket's packets to an
//!    address of the host itself pass. It looks only at packets with our [`MARK`], and takes exactly those that a map
//!    tells it of;
//! 2. the forged ACK (module `forge`): its acknowledgement becomes snd_una, its sequence rcv_nxt less the unread bytes;
//! 3. the unread bytes, and the peer's FIN, as further forged segments, each when the one before has arrived, which
//!    the socket monitor tells.
//!
//! The program is made here of a few instructions, and gone with its descriptor. The connection must be locked from the
//! network, and no other socket may have its addresses.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::connection::{ControlBlock, FourTuple, OPT_ECN, OPT_SACK, State};
use crate::forge::{Forge, ForgeError, Kind, MARK, Segment, Way, header_window};
use crate::kernel::bpf::{Callee, Insn, Map, MapKind, Program, Register, Width};
use crate::kernel::btf::Btf;
use crate::kernel::netlink::NetlinkSocket;
use crate::kernel::netns::{NetNs, NetNsError};
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

/// Why such a connection cannot be put back into a queue, if so.
#[must_use]
pub fn unfit(tuple: &FourTuple, tcp: &ControlBlock) -> Option<&'static str> {
    let wire = tuple.on_wire();
    let least = if wire.local.is_ipv4() { 536 } else { 1220 };
    if let Some(why) = wire.impossible() {
        Some(why)
    } else if !matches!(tcp.state, State::Established | State::CloseWait) {
        Some("it is in a state in which no connection waits to be accepted")
    } else if tcp.send_len != 0 {
        Some("it has sent bytes before it was accepted")
    } else if !(least..=u32::from(u16::MAX)).contains(&tcp.negotiated.mss_clamp) {
        Some("the kernel makes no connection of this segment size in an accept queue")
    } else if matches!(wire.local.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        Some("a link-local address belongs to an interface, and the accept queue is reached by another")
    } else {
        None
    }
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
    /// The segment that is to become a connection, and what of.
    requests: Map,
    /// Its listener.
    listeners: Map,
    monitor: NetlinkSocket,
    _attached: OwnedFd,
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
        let (program, requests, listeners) = load()?;
        let (attached, monitor) = ns.run(|| {
            check_settings(ns)?;
            let attached = program.attach_to_ingress(interface::index("lo")?)?;
            Ok::<_, Unavailable>((attached, NetlinkSocket::sock_diag()?))
        })??;
        Ok(Self { ns: ns.clone(), requests, listeners, monitor, _attached: attached })
    }

    /// Appends a connection to the queue of `listener`, a socket of this namespace. `unread` are the bytes of its receive
    /// queue.
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
    ) -> Result<(), PutError> {
        let long =
            (unread.len() != tcp.recv_len as usize).then_some("its bytes are not as many as announced");
        if let Some(what) = unfit(tuple, tcp).or(long) {
            return Err(PutError::Unfit { tuple: *tuple, what });
        }
        let sys = |source| PutError::Sys { tuple: *tuple, source };
        let device = sockopt::bound_device(listener).map_err(sys)?;
        let way = Way { ns: self.ns.clone(), device };
        Putting { queues: self, forge, way, tuple, tcp, wire: tuple.on_wire() }.run(listener, unread)
    }
}

struct Putting<'a> {
    queues: &'a AcceptQueues,
    forge: &'a Forge,
    way: Way,
    tuple: &'a FourTuple,
    tcp: &'a ControlBlock,
    wire: FourTuple,
}

impl Putting<'_> {
    fn run(&self, listener: BorrowedFd<'_>, unread: &[u8]) -> Result<(), PutError> {
        self.sys(self.queues.listeners.insert(&FIRST, &listener.as_raw_fd().to_ne_bytes()))?;
        let put = self.handshake();
        // It stays a plain listener: in the map it would have operations of its own.
        put.and(self.sys(self.queues.listeners.remove(&FIRST)))?;
        self.fill(unread)?;
        if self.tcp.state.fin_received() { self.fin() } else { Ok(()) }
    }

    fn sys<T>(&self, result: Result<T, SysError>) -> Result<T, PutError> {
        result.map_err(|source| PutError::Sys { tuple: *self.tuple, source })
    }

    /// The ACK that ends a handshake.
    fn handshake(&self) -> Result<(), PutError> {
        let ack = self.segment(self.first_seq(), &[]);
        let key = key(&ack);
        self.sys(self.queues.requests.insert(&key, &request(self.tcp)))?;
        let sent = self.forge.bring(&self.way, &ack, || Ok(self.receiving()?.is_some()));
        let mut said = [0; REQUEST];
        let read = self.queues.requests.read(&key, &mut said);
        self.sys(read.and(self.queues.requests.remove(&key)))?;
        if sent.map_err(|source| PutError::Forge { tuple: *self.tuple, source })? {
            return Ok(());
        }
        let [a, b, c, d, ..] = said;
        match i32::from_ne_bytes([a, b, c, d]) {
            NOT_SEEN => Err(self.unfit("the forged ACK does not pass the loopback interface: a firewall rule drops it, or the listener is in a VRF")),
            0 => Err(self.unfit("the queue is full, or the kernel denies a connection of these addresses")),
            refused => {
                let errno = Errno::from_raw(refused.wrapping_neg());
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
            let end = unread.len().min(taken + piece);
            let seq = u32::try_from(taken).unwrap_or(u32::MAX).wrapping_add(self.first_seq());
            let arrived = || Ok(self.receiving()?.is_some_and(|now| now.unread as usize >= end));
            if self.send(&self.segment(seq, &unread[taken..end]), arrived)? {
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
        diag::receiving(&self.queues.monitor, &self.wire)
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

/// What the program knows a packet by: addresses, ports, sequence and acknowledgement, as they lie in it.
const KEY: usize = KEY_V6 as usize;
const KEY_V4: u8 = 20;
const KEY_V6: u8 = 44;

fn key(segment: &Segment<'_>) -> [u8; KEY] {
    let (from, to) = (segment.tuple.remote, segment.tuple.local);
    let address = |end: SocketAddr| match end.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let ports = [from.port(), to.port()].map(u16::to_be_bytes);
    let numbers = [segment.seq, segment.ack].map(u32::to_be_bytes);
    let mut key = [0; KEY];
    let bytes = [address(from), address(to), ports.concat(), numbers.concat()].concat();
    key[..bytes.len()].copy_from_slice(&bytes);
    key
}

/// What the program has to say of a packet, then `struct bpf_tcp_req_attrs`.
const REQUEST: usize = 4 + ATTRIBUTES as usize;
const ATTRIBUTES: u8 = 20;
const NOT_SEEN: i32 = 1;
/// The only element of `listeners`.
const FIRST: [u8; 4] = [0; 4];

fn request(tcp: &ControlBlock) -> [u8; REQUEST] {
    let negotiated = &tcp.negotiated;
    let scale = negotiated.wscale.unwrap_or_default();
    let clock = negotiated.timestamp.unwrap_or(0);
    let flag = |on: bool| u8::from(on);
    let mut request = [0; REQUEST];
    request[..4].copy_from_slice(&NOT_SEEN.to_ne_bytes());
    // rcv_tsval, the peer's clock, is not known: 0 stands for any.
    request[8..12].copy_from_slice(&clock.to_ne_bytes());
    let mss = u16::try_from(negotiated.mss_clamp).unwrap_or(u16::MAX);
    request[12..14].copy_from_slice(&mss.to_ne_bytes());
    request[14..21].copy_from_slice(&[
        scale.rcv,
        scale.snd,
        flag(negotiated.mask & OPT_ECN != 0),
        flag(negotiated.wscale.is_some()),
        flag(negotiated.mask & OPT_SACK != 0),
        flag(negotiated.timestamp.is_some()),
        flag(clock & 1 != 0), // a kernel that has the function shows the clock's unit here
    ]);
    request
}

fn load() -> Result<(Program, Map, Map), Unavailable> {
    let function = function()?;
    let requests = Map::new(MapKind::Hash, KEY, REQUEST, 1)?;
    let listeners = Map::new(MapKind::Sockets, FIRST.len(), size_of::<i32>(), 1)?;
    let program = Program::of_packets(&program(function, &requests, &listeners))?;
    Ok((program, requests, listeners))
}

/// The kernel's number of the function; its description is read once.
fn function() -> Result<u32, Unavailable> {
    static NUMBER: OnceLock<u32> = OnceLock::new();
    if let Some(number) = NUMBER.get() {
        return Ok(*number);
    }
    let btf = Btf::of_kernel().map_err(Unavailable::Btf)?;
    let number = btf.function("bpf_sk_assign_tcp_reqsk").ok_or(Unavailable::Function)?;
    Ok(*NUMBER.get_or_init(|| number))
}

fn program(function: u32, requests: &Map, listeners: &Map) -> Vec<Insn> {
    use Register::{R0, R1, R2, R3, R4, R6, R7, R8, R10};
    use Width::{Double, Word};
    const MAP_LOOKUP: Callee = Callee::Helper(1);
    const LOAD_BYTES: Callee = Callee::Helper(26);
    const SK_RELEASE: Callee = Callee::Helper(86);
    // Of `struct __sk_buff`.
    const SKB_MARK: i16 = 8;
    const SKB_PROTOCOL: i16 = 16;
    // Where the addresses begin, behind the Ethernet header.
    const ADDRESSES_V4: i32 = 14 + 12;
    const ADDRESSES_V6: i32 = 14 + 8;
    // In the frame: the key, with a word to fill its last double, and a key of `listeners`.
    const FRAME_KEY: i16 = -48;
    const FRAME_FIRST: i16 = -52;
    let ipv6 = u32::from(u16::from_ne_bytes([0x86, 0xdd]));
    let [leave, exit] = [Insn::set(R0, -1), Insn::exit()]; // TCX_NEXT: as if nobody had looked
    let mut code = vec![Insn::copy(R6, R1)];
    code.extend([Insn::load(Word, R0, R6, SKB_MARK), Insn::skip_if(R0, MARK, 2), leave, exit]);

    code.extend((0..6).map(|double| Insn::store_number(Double, R10, FRAME_KEY + 8 * double, 0)));
    code.extend([Insn::set(R2, ADDRESSES_V4), Insn::set(R4, KEY_V4.into())]);
    code.extend([Insn::load(Word, R0, R6, SKB_PROTOCOL), Insn::skip_unless(R0, ipv6, 2)]);
    code.extend([Insn::set(R2, ADDRESSES_V6), Insn::set(R4, KEY_V6.into())]);
    code.extend([Insn::copy(R1, R6), Insn::copy(R3, R10), Insn::add(R3, FRAME_KEY.into())]);
    code.extend([Insn::call(LOAD_BYTES), Insn::skip_if(R0, 0, 2), leave, exit]);

    code.extend(Insn::map(R1, requests));
    code.extend([Insn::copy(R2, R10), Insn::add(R2, FRAME_KEY.into()), Insn::call(MAP_LOOKUP)]);
    code.extend([Insn::skip_unless_null(R0, 2), leave, exit, Insn::copy(R7, R0)]);

    code.extend(Insn::map(R1, listeners));
    code.push(Insn::store_number(Word, R10, FRAME_FIRST, 0));
    code.extend([Insn::copy(R2, R10), Insn::add(R2, FRAME_FIRST.into()), Insn::call(MAP_LOOKUP)]);
    code.extend([Insn::skip_unless_null(R0, 2), leave, exit, Insn::copy(R8, R0)]);

    code.extend([Insn::copy(R1, R6), Insn::copy(R2, R8), Insn::copy(R3, R7), Insn::add(R3, 4)]);
    code.extend([Insn::set(R4, ATTRIBUTES.into()), Insn::call(Callee::Kernel(function))]);
    code.extend([Insn::store(Word, R7, 0, R0), Insn::copy(R1, R8), Insn::call(SK_RELEASE), leave, exit]);
    code
}
