//! Forged segments: how a FIN gets into a receive queue, ECN into a connection, and a connection into an accept queue.
//!
//! Repair mode fills a receive queue with bytes, but the kernel has no call that puts the peer's FIN behind
//! them, nor one that acknowledges ours, nor one that says that SYN segments have agreed on ECN. A connection that no
//! program has accepted has no descriptor to call anything with. So the engine sends the socket the segment that its peer
//! would have sent, through a raw socket and the host's own stack. The segment carries [`MARK`], which the network
//! lock lets pass; other people's firewall rules may not, and then a passage is opened through them for the
//! moment ([`crate::lock::passage`]).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::connection::{FourTuple, Negotiated, OPT_SACK, State};
use crate::kernel::ecn::AskForEcn;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::{SysError, raw, sockopt, tcp};
use crate::lock::{LockError, Method, Passage};

pub use crate::lock::MARK;

/// A segment from the peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub tuple: FourTuple,
    pub kind: Kind,
    pub data: &'a [u8],
    /// The peer's sequence.
    pub seq: u32,
    /// What the peer acknowledges.
    pub ack: u32,
    /// The peer's window as the header has it, scaled.
    pub window: u16,
}

/// What a segment is for; all but a RST acknowledge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Fin,
    Ack,
    /// An ACK whose last byte is urgent.
    Urgent,
    Rst,
    /// Answers a SYN that asks for ECN, and agrees to this.
    SynAck(Negotiated),
}

/// A forged segment could not be brought to its socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForgeError {
    /// A system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The way through other rules could not be opened or closed.
    #[error("cannot open a way through the firewall for the forged segment")]
    Passage(#[source] Box<LockError>),
    /// The network namespace could not be entered.
    #[error("cannot work in the socket's network namespace")]
    Namespace(#[from] NetNsError),
    /// The socket did not react.
    #[error(
        "the forged {segment} did not reach the socket, which stays in state {state}: a firewall rule drops it"
    )]
    Lost {
        /// "FIN", "ACK" or "SYN-ACK".
        segment: &'static str,
        /// The state's number.
        state: u8,
    },
}

impl From<LockError> for ForgeError {
    fn from(error: LockError) -> Self {
        Self::Passage(Box::new(error))
    }
}

/// Forges segments; keeps its raw sockets, one per network namespace, device and IP version, and any passage that it
/// had to open, until it is dropped. Connections are restored from few namespaces at a time, and most need no forge at
/// all: lists cost nothing then. Threads that restore at the same time share one, and take turns.
#[derive(Debug, Default)]
pub struct Forge(Mutex<Tools>);

#[derive(Debug, Default)]
struct Tools {
    sockets: Vec<RawSocket>,
    passages: Vec<(NetNs, Passage)>,
    ecn: Ecn,
}

/// What has SYN segments ask for ECN.
#[derive(Debug, Default)]
enum Ecn {
    /// No connection had it yet.
    #[default]
    Unused,
    Asked(AskForEcn),
    /// Only the settings of the namespace, or the route.
    AsConfigured,
    /// No SYN segment is sent for it.
    Never,
}

/// Where a segment is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub ns: NetNs,
    /// A VRF has routes and addresses of its own, which only what is bound to its device sees.
    pub device: Vec<u8>,
}

impl Way {
    /// To this socket.
    pub fn to(socket: BorrowedFd<'_>) -> Result<Self, ForgeError> {
        Ok(Self { ns: NetNs::of_socket(socket)?, device: sockopt::bound_device(socket)? })
    }

    /// By which address a packet for `local` finds its way: its header has `local` all the same. That may be an address
    /// which this host does not have (IP_TRANSPARENT), and to which the packet would leave it; loopback is always here. An
    /// address with a scope, and a socket with a device, hear only what comes by it.
    fn route_to(&self, local: SocketAddr) -> SocketAddr {
        let loopback: IpAddr = match local.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unicast_link_local() => return local,
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        if self.device.is_empty() { SocketAddr::new(loopback, local.port()) } else { local }
    }
}

#[derive(Debug)]
struct RawSocket {
    way: Way,
    ipv6: bool,
    fd: OwnedFd,
}

impl Forge {
    /// A forge without any socket yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A forge for connections behind such a lock. Where there is none their peers would see the SYN segments that bring ECN
    /// back, so they go on without it.
    #[must_use]
    pub fn behind(lock: Method) -> Self {
        let ecn = if lock == Method::Skip { Ecn::Never } else { Ecn::Unused };
        Self(Mutex::new(Tools { ecn, ..Tools::default() }))
    }

    /// Sends the segment to `socket` until its state is `reaches`.
    pub(crate) fn deliver(
        &self,
        socket: BorrowedFd<'_>,
        segment: &Segment<'_>,
        reaches: State,
    ) -> Result<(), ForgeError> {
        let arrived = || Ok(tcp::info(socket)?.state == reaches as u8);
        if self.bring(&Way::to(socket)?, segment, arrived)? {
            return Ok(());
        }
        let state = tcp::info(socket)?.state;
        Err(ForgeError::Lost { segment: segment.kind.name(), state })
    }

    /// Sends the segment until it has `arrived`; `false`: it does not.
    pub(crate) fn bring(
        &self,
        way: &Way,
        segment: &Segment<'_>,
        arrived: impl Fn() -> Result<bool, SysError>,
    ) -> Result<bool, ForgeError> {
        self.tools().bring(way, segment, &arrived)
    }

    /// As [`Forge::bring`], where it is not a firewall that may be in the way: only once.
    pub(crate) fn bring_once(
        &self,
        way: &Way,
        segment: &Segment<'_>,
        arrived: impl Fn() -> Result<bool, SysError>,
    ) -> Result<bool, ForgeError> {
        self.tools().send_and_see(way, segment, &arrived)
    }

    /// Sends the segment to whatever socket has its addresses where `socket` is.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>, segment: &Segment<'_>) -> Result<(), ForgeError> {
        self.tools().send(&Way::to(socket)?, segment)
    }

    /// Sends segments that the peer has sent before, from the TCP header on. Whether they arrive nobody tells.
    pub(crate) fn replay(
        &self,
        way: &Way,
        tuple: &FourTuple,
        segments: Vec<Vec<u8>>,
    ) -> Result<(), ForgeError> {
        let wire = tuple.on_wire();
        let to = way.route_to(wire.local);
        let mut tools = self.tools();
        let raw_socket = tools.raw_socket(way, wire.local.is_ipv6())?;
        let mut packets = segments.into_iter().map(|segment| packet(&wire, segment));
        Ok(packets.try_for_each(|packet| raw::send(raw_socket, &packet, to))?)
    }

    fn tools(&self) -> MutexGuard<'_, Tools> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether connections may be opened by SYN segments.
    pub(crate) fn brings_ecn(&self) -> bool {
        !matches!(self.tools().ecn, Ecn::Never)
    }

    /// A connect() that sends a SYN, which asks for ECN. Where that is not allowed it does so if the namespace is
    /// configured to.
    pub(crate) fn connect_with_ecn(
        &self,
        socket: BorrowedFd<'_>,
        remote: SocketAddr,
    ) -> Result<(), SysError> {
        self.tools().ecn.connect(socket, remote)
    }

    /// Closes the passages, if any, and reports what goes wrong with it.
    ///
    /// # Errors
    /// The first rule that cannot be removed.
    pub fn finish(self) -> Result<(), LockError> {
        let mut result = Ok(());
        for (_, passage) in self.0.into_inner().unwrap_or_else(PoisonError::into_inner).passages {
            result = result.and(passage.close());
        }
        result
    }
}

impl Tools {
    fn bring(
        &mut self,
        way: &Way,
        segment: &Segment<'_>,
        arrived: &dyn Fn() -> Result<bool, SysError>,
    ) -> Result<bool, ForgeError> {
        if self.send_and_see(way, segment, arrived)? {
            return Ok(true);
        }
        if self.passages.iter().any(|(open, _)| *open == way.ns) {
            return Ok(false);
        }
        self.passages.push((way.ns.clone(), Passage::open(&way.ns)?));
        self.send_and_see(way, segment, arrived)
    }

    fn send_and_see(
        &mut self,
        way: &Way,
        segment: &Segment<'_>,
        arrived: &dyn Fn() -> Result<bool, SysError>,
    ) -> Result<bool, ForgeError> {
        self.send(way, segment)?;
        Ok(soon(arrived)?)
    }

    fn send(&mut self, way: &Way, segment: &Segment<'_>) -> Result<(), ForgeError> {
        let wire = segment.tuple.on_wire();
        let raw_socket = self.raw_socket(way, wire.local.is_ipv6())?;
        match raw::send(raw_socket, &packet(&wire, segment.tcp()), way.route_to(wire.local)) {
            // EPERM: a rule drops it on its way out already.
            Ok(()) | Err(SysError { errno: Errno::EPERM, .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn raw_socket(&mut self, way: &Way, ipv6: bool) -> Result<BorrowedFd<'_>, ForgeError> {
        let is_it = |it: &RawSocket| it.ipv6 == ipv6 && it.way == *way;
        let index = self.sockets.iter().position(is_it).unwrap_or(self.sockets.len());
        if index == self.sockets.len() {
            let fd = open(way, ipv6)?;
            self.sockets.push(RawSocket { way: way.clone(), ipv6, fd });
        }
        Ok(self.sockets[index].fd.as_fd())
    }
}

impl Ecn {
    fn connect(&mut self, socket: BorrowedFd<'_>, remote: SocketAddr) -> Result<(), SysError> {
        if let Self::Unused = self {
            *self = AskForEcn::attach().map_or_else(Self::not_allowed, Self::Asked);
        }
        match self {
            Self::Asked(ask) => ask.during(socket, || tcp::connect(socket, remote)),
            Self::Unused | Self::AsConfigured | Self::Never => tcp::connect(socket, remote),
        }
    }

    fn not_allowed(error: SysError) -> Self {
        log::info!("connections have ECN only where net.ipv4.tcp_ecn is 1: {error}");
        Self::AsConfigured
    }
}

fn open(way: &Way, ipv6: bool) -> Result<OwnedFd, ForgeError> {
    let socket = way.ns.run(|| raw::open(ipv6))??;
    sockopt::set_mark(socket.as_fd(), MARK)?;
    if !way.device.is_empty() {
        sockopt::bind_to_device(socket.as_fd(), &way.device)?;
    }
    Ok(socket)
}

/// The loopback path delivers before sendto() returns, unless the softirq was put off to its thread; no event
/// tells of FIN_WAIT2, so it is asked for, and only a short while.
fn soon(arrived: &dyn Fn() -> Result<bool, SysError>) -> Result<bool, SysError> {
    const PATIENCE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if arrived()? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::yield_now();
    }
}

const IPV4_HEADER: usize = 20;
const TCP_HEADER: usize = 20;
const PROTOCOL_TCP: u8 = 6;
/// The most that IP knows: a socket with IP_MINTTL would drop less.
const TTL: u8 = 255;

impl Segment<'_> {
    fn tcp(&self) -> Vec<u8> {
        const PSH: u8 = 0x08;
        let options = match &self.kind {
            Kind::SynAck(negotiated) => syn_options(negotiated),
            _ => Vec::new(),
        };
        let mut header = Vec::with_capacity(TCP_HEADER + options.len() + self.data.len());
        header.resize(TCP_HEADER, 0);
        header[4..8].copy_from_slice(&self.seq.to_be_bytes());
        header[8..12].copy_from_slice(&self.ack.to_be_bytes());
        #[allow(clippy::cast_possible_truncation)] // 60 bytes at most
        let words = ((TCP_HEADER + options.len()) / 4) as u8;
        header[12] = words << 4;
        header[13] = self.kind.flags() | if self.data.is_empty() { 0 } else { PSH };
        header[14..16].copy_from_slice(&self.window.to_be_bytes());
        if self.kind == Kind::Urgent {
            // Where BSD has it, and Linux unless net.ipv4.tcp_stdurg is set: behind the byte.
            let behind = u16::try_from(self.data.len()).unwrap_or(u16::MAX);
            header[18..20].copy_from_slice(&behind.to_be_bytes());
        }
        header.extend(options);
        header.extend(self.data);
        header
    }
}

impl Kind {
    fn flags(self) -> u8 {
        const FIN: u8 = 0x01;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const ACK: u8 = 0x10;
        const URG: u8 = 0x20;
        const ECE: u8 = 0x40;
        match self {
            Self::Fin => FIN | ACK,
            Self::Ack => ACK,
            Self::Urgent => ACK | URG,
            Self::Rst => RST,
            Self::SynAck(_) => SYN | ACK | ECE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Fin => "FIN",
            Self::Ack | Self::Urgent => "ACK",
            Self::Rst => "RST",
            Self::SynAck(_) => "SYN-ACK",
        }
    }
}

/// The options of a SYN segment (RFC 9293, 7323, 2018), in whole words. TSval is 0: the kernel takes that for a peer
/// that has not told its clock yet, and believes the first that it tells.
fn syn_options(negotiated: &Negotiated) -> Vec<u8> {
    const NOP: u8 = 1;
    let [high, low] = u16::try_from(negotiated.mss_clamp).unwrap_or(u16::MAX).to_be_bytes();
    let mut options = vec![2, 4, high, low];
    if negotiated.mask & OPT_SACK != 0 {
        options.extend([NOP, NOP, 4, 2]);
    }
    if negotiated.timestamp.is_some() {
        options.extend([NOP, NOP, 8, 10]);
        options.extend([0; 8]);
    }
    if let Some(scale) = negotiated.wscale {
        options.extend([NOP, 3, 3, scale.snd]);
    }
    options
}

/// The packet that brings `tcp`, a header and maybe data, from the peer: from the IP header on. The tuple must be as on the
/// wire; its ports and the checksums are filled in.
pub(crate) fn packet(tuple: &FourTuple, mut tcp: Vec<u8>) -> Vec<u8> {
    tcp[0..2].copy_from_slice(&tuple.remote.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&tuple.local.port().to_be_bytes());
    tcp[16..18].fill(0);
    #[allow(clippy::cast_possible_truncation)] // no packet is longer; who gives more gets an invalid one
    let len = (tcp.len() as u16).to_be_bytes();
    let (mut packet, from, to) = match (tuple.remote.ip(), tuple.local.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let (from, to) = (from.octets().to_vec(), to.octets().to_vec());
            (ipv4_header(tcp.len(), &from, &to).to_vec(), from, to)
        }
        (from, to) => {
            (vec![0x60, 0, 0, 0, len[0], len[1], PROTOCOL_TCP, TTL], v6(from).to_vec(), v6(to).to_vec())
        }
    };
    let pseudo = [&from[..], &to, &[0, PROTOCOL_TCP, len[0], len[1]]];
    let sum = checksum(pseudo.into_iter().chain([&tcp[..]]));
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    for part in [from, to, tcp] {
        packet.extend(part);
    }
    packet
}

/// The header up to the addresses.
fn ipv4_header(data: usize, from: &[u8], to: &[u8]) -> [u8; 12] {
    #[allow(clippy::cast_possible_truncation)] // as above
    let len = ((IPV4_HEADER + data) as u16).to_be_bytes();
    let mut header = [0x45, 0, len[0], len[1], 0, 0, 0, 0, TTL, PROTOCOL_TCP, 0, 0];
    let sum = checksum([&header[..], from, to].into_iter());
    header[10..].copy_from_slice(&sum.to_be_bytes());
    header
}

fn v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
    }
}

/// The Internet checksum (RFC 1071) of parts that are, but for the last, of even length; of 64 KiB in all.
fn checksum<'a>(parts: impl Iterator<Item = &'a [u8]>) -> u16 {
    let words = parts.flat_map(|part| part.chunks(2));
    let word = |word: &[u8]| u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
    let mut sum: u32 = words.map(|bytes| u32::from(word(bytes))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[allow(clippy::cast_possible_truncation)] // folded to 16 bits above
    {
        !(sum as u16)
    }
}

/// The peer's window as a header shows it: at most 16 bits after scaling.
pub(crate) fn header_window(snd_wnd: u32, snd_wscale: u8) -> u16 {
    u16::try_from(snd_wnd >> snd_wscale.min(14)).unwrap_or(u16::MAX)
}

/// The address that a forged segment's port must match: the socket's, which bind() may have chosen.
pub(crate) fn with_local_port(tuple: &FourTuple, port: u16) -> FourTuple {
    let mut local: SocketAddr = tuple.local;
    local.set_port(port);
    FourTuple { local, remote: tuple.remote }
}
