//! Forged segments: how a FIN gets into a receive queue, and ECN into a connection.
//!
//! Repair mode fills a receive queue with bytes, but the kernel has no call that puts the peer's FIN behind
//! them, nor one that acknowledges ours, nor one that says that SYN segments have agreed on ECN. So the engine sends
//! the socket the segment that its peer would have sent, through a raw socket and the host's own stack. The segment carries [`MARK`], which the network
//! lock lets pass; other people's firewall rules may not, and then a passage is opened through them for the
//! moment ([`crate::lock::passage`]).

use std::net::{IpAddr, SocketAddr};
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
pub(crate) struct Segment {
    pub tuple: FourTuple,
    pub kind: Kind,
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

#[derive(Debug)]
struct RawSocket {
    ns: NetNs,
    /// A VRF has routes and addresses of its own, which only what is bound to its device sees.
    device: Vec<u8>,
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

    fn tools(&self) -> MutexGuard<'_, Tools> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the segment to `socket` until its state is `reaches`.
    pub(crate) fn deliver(
        &self,
        socket: BorrowedFd<'_>,
        segment: &Segment,
        reaches: State,
    ) -> Result<(), ForgeError> {
        self.tools().deliver(socket, segment, reaches)
    }

    /// Sends the segment to whatever socket has its addresses where `socket` is.
    pub(crate) fn send(&self, socket: BorrowedFd<'_>, segment: &Segment) -> Result<(), ForgeError> {
        let ns = NetNs::of_socket(socket)?;
        self.tools().send(&ns, socket, segment)
    }

    /// Sends a socket in `ns`, bound to `device`, segments that its peer has sent before, from the TCP header on. Whether
    /// they arrive nobody tells.
    pub(crate) fn replay(
        &self,
        ns: &NetNs,
        device: Vec<u8>,
        tuple: &FourTuple,
        segments: Vec<Vec<u8>>,
    ) -> Result<(), ForgeError> {
        let wire = tuple.on_wire();
        let mut tools = self.tools();
        let raw_socket = tools.raw_socket(ns, device, wire.local.is_ipv6())?;
        let mut packets = segments.into_iter().map(|segment| packet(&wire, segment));
        Ok(packets.try_for_each(|packet| raw::send(raw_socket, &packet, wire.local))?)
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
    fn deliver(
        &mut self,
        socket: BorrowedFd<'_>,
        segment: &Segment,
        reaches: State,
    ) -> Result<(), ForgeError> {
        let ns = NetNs::of_socket(socket)?;
        if self.send_and_see(&ns, socket, segment, reaches)? {
            return Ok(());
        }
        if self.passages.iter().all(|(open, _)| *open != ns) {
            self.passages.push((ns.clone(), Passage::open(&ns)?));
            if self.send_and_see(&ns, socket, segment, reaches)? {
                return Ok(());
            }
        }
        let state = tcp::info(socket)?.state;
        Err(ForgeError::Lost { segment: segment.kind.name(), state })
    }

    fn send_and_see(
        &mut self,
        ns: &NetNs,
        socket: BorrowedFd<'_>,
        segment: &Segment,
        reaches: State,
    ) -> Result<bool, ForgeError> {
        self.send(ns, socket, segment)?;
        arrived(socket, reaches)
    }

    fn send(&mut self, ns: &NetNs, socket: BorrowedFd<'_>, segment: &Segment) -> Result<(), ForgeError> {
        let wire = segment.tuple.on_wire();
        let device = sockopt::bound_device(socket)?;
        let raw_socket = self.raw_socket(ns, device, wire.local.is_ipv6())?;
        match raw::send(raw_socket, &packet(&wire, segment.tcp()), wire.local) {
            // EPERM: a rule drops it on its way out already.
            Ok(()) | Err(SysError { errno: Errno::EPERM, .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn raw_socket(&mut self, ns: &NetNs, device: Vec<u8>, ipv6: bool) -> Result<BorrowedFd<'_>, ForgeError> {
        let is_it = |it: &RawSocket| it.ipv6 == ipv6 && it.device == device && it.ns == *ns;
        let index = self.sockets.iter().position(is_it).unwrap_or(self.sockets.len());
        if index == self.sockets.len() {
            let fd = open(ns, &device, ipv6)?;
            self.sockets.push(RawSocket { ns: ns.clone(), device, ipv6, fd });
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

fn open(ns: &NetNs, device: &[u8], ipv6: bool) -> Result<OwnedFd, ForgeError> {
    let socket = ns.run(|| raw::open(ipv6))??;
    sockopt::set_mark(socket.as_fd(), MARK)?;
    if !device.is_empty() {
        sockopt::bind_to_device(socket.as_fd(), device)?;
    }
    Ok(socket)
}

/// The loopback path delivers before sendto() returns, unless the softirq was put off to its thread; no event
/// tells of FIN_WAIT2, so the state is asked for, and only a short while.
fn arrived(socket: BorrowedFd<'_>, reaches: State) -> Result<bool, ForgeError> {
    const PATIENCE: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + PATIENCE;
    loop {
        if tcp::info(socket)?.state == reaches as u8 {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::yield_now();
    }
}

const TCP_HEADER: usize = 20;
const PROTOCOL_TCP: u8 = 6;
/// The most that IP knows: a socket with IP_MINTTL would drop less.
const TTL: u8 = 255;

impl Segment {
    fn tcp(&self) -> Vec<u8> {
        let mut header = vec![0; TCP_HEADER];
        header[4..8].copy_from_slice(&self.seq.to_be_bytes());
        header[8..12].copy_from_slice(&self.ack.to_be_bytes());
        header[13] = self.kind.flags();
        header[14..16].copy_from_slice(&self.window.to_be_bytes());
        if let Kind::SynAck(negotiated) = &self.kind {
            header.extend(syn_options(negotiated));
        }
        #[allow(clippy::cast_possible_truncation)] // 40 bytes at most
        let words = (header.len() / 4) as u8;
        header[12] = words << 4;
        header
    }
}

impl Kind {
    fn flags(self) -> u8 {
        const FIN: u8 = 0x01;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const ACK: u8 = 0x10;
        const ECE: u8 = 0x40;
        match self {
            Self::Fin => FIN | ACK,
            Self::Ack => ACK,
            Self::Rst => RST,
            Self::SynAck(_) => SYN | ACK | ECE,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Fin => "FIN",
            Self::Ack => "ACK",
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
/// wire; its ports and the checksum are filled in.
fn packet(tuple: &FourTuple, mut tcp: Vec<u8>) -> Vec<u8> {
    tcp[0..2].copy_from_slice(&tuple.remote.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&tuple.local.port().to_be_bytes());
    tcp[16..18].fill(0);
    #[allow(clippy::cast_possible_truncation)] // no packet is longer; who gives more gets an invalid one
    let len = (tcp.len() as u16).to_be_bytes();
    let (mut packet, from, to) = match (tuple.remote.ip(), tuple.local.ip()) {
        // The kernel fills in length, identification and checksum.
        (IpAddr::V4(from), IpAddr::V4(to)) => (
            vec![0x45, 0, 0, 0, 0, 0, 0, 0, TTL, PROTOCOL_TCP, 0, 0],
            from.octets().to_vec(),
            to.octets().to_vec(),
        ),
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
