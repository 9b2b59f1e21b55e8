//! Forged segments: how a FIN gets into a receive queue, and a connection into an accept queue.
//!
//! Repair mode fills a receive queue with bytes, but the kernel has no call that puts the peer's FIN behind
//! them, nor one that acknowledges ours. A connection that no program has accepted has no descriptor to call anything
//! with. So the engine sends the socket the segment that its peer would have
//! sent, through a raw socket and the host's own stack. The segment carries [`MARK`], which the network
//! lock lets pass; other people's firewall rules may not, and then a passage is opened through them for the
//! moment ([`crate::lock::passage`]).

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::connection::{FourTuple, State};
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::{SysError, raw, sockopt, tcp};
use crate::lock::{LockError, Passage};

pub use crate::lock::MARK;

/// A segment from the peer: an ACK, maybe with bytes or FIN.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment<'a> {
    pub tuple: FourTuple,
    pub data: &'a [u8],
    pub fin: bool,
    /// The peer's sequence: our rcv_nxt.
    pub seq: u32,
    /// What the peer acknowledges.
    pub ack: u32,
    /// The peer's window as the header has it, scaled.
    pub window: u16,
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
        /// "FIN" or "ACK".
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
}

/// Where a segment is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub ns: NetNs,
    /// A VRF has routes and addresses of its own, which only what is bound to its device sees.
    pub device: Vec<u8>,
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

    /// Sends the segment to `socket` until its state is `reaches`.
    pub(crate) fn deliver(
        &self,
        socket: BorrowedFd<'_>,
        segment: &Segment<'_>,
        reaches: State,
    ) -> Result<(), ForgeError> {
        let way = Way { ns: NetNs::of_socket(socket)?, device: sockopt::bound_device(socket)? };
        if self.send(&way, segment, || Ok(tcp::info(socket)?.state == reaches as u8))? {
            return Ok(());
        }
        let state = tcp::info(socket)?.state;
        Err(ForgeError::Lost { segment: if segment.fin { "FIN" } else { "ACK" }, state })
    }

    /// Sends the segment until it has `arrived`; `false`: it does not.
    pub(crate) fn send(
        &self,
        way: &Way,
        segment: &Segment<'_>,
        arrived: impl Fn() -> Result<bool, SysError>,
    ) -> Result<bool, ForgeError> {
        self.tools().send(way, segment, &arrived)
    }

    /// As [`Forge::send`], where it is not a firewall that may be in the way: only once.
    pub(crate) fn send_once(
        &self,
        way: &Way,
        segment: &Segment<'_>,
        arrived: impl Fn() -> Result<bool, SysError>,
    ) -> Result<bool, ForgeError> {
        self.tools().send_and_see(way, segment, &arrived)
    }

    fn tools(&self) -> MutexGuard<'_, Tools> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn send(
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
        let wire = Segment { tuple: segment.tuple.on_wire(), ..*segment };
        let ipv6 = wire.tuple.local.is_ipv6();
        match raw::send(self.raw_socket(way, ipv6)?, &wire.packet(), wire.tuple.local) {
            // EPERM: a rule drops it on its way out already.
            Ok(()) | Err(SysError { errno: Errno::EPERM, .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(soon(arrived)?)
    }

    fn raw_socket(&mut self, way: &Way, ipv6: bool) -> Result<BorrowedFd<'_>, ForgeError> {
        let is_it = |it: &RawSocket| it.ipv6 == ipv6 && it.way == *way;
        let index = self.sockets.iter().position(is_it).unwrap_or(self.sockets.len());
        if index == self.sockets.len() {
            let fd = open(&way.ns, &way.device, ipv6)?;
            self.sockets.push(RawSocket { way: way.clone(), ipv6, fd });
        }
        Ok(self.sockets[index].fd.as_fd())
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

const TCP_HEADER: usize = 20;
const PROTOCOL_TCP: u8 = 6;
/// The most that IP knows: a socket with IP_MINTTL would drop less.
const TTL: u8 = 255;

impl Segment<'_> {
    /// The packet from the IP header on; the tuple must be as on the wire.
    fn packet(&self) -> Vec<u8> {
        match (self.tuple.remote.ip(), self.tuple.local.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                // The kernel fills in length, identification and checksum.
                let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, TTL, PROTOCOL_TCP, 0, 0];
                packet.extend(from.octets());
                packet.extend(to.octets());
                packet.extend(self.tcp(&from.octets(), &to.octets()));
                packet
            }
            (from, to) => {
                let (from, to) = (v6(from), v6(to));
                let [high, low] = self.length().to_be_bytes();
                let mut packet = vec![0x60, 0, 0, 0, high, low, PROTOCOL_TCP, TTL];
                packet.extend(from);
                packet.extend(to);
                packet.extend(self.tcp(&from, &to));
                packet
            }
        }
    }

    /// Of header and data. The longest packet of an interface has 64 KiB, and the kernel refuses a longer one.
    fn length(&self) -> u16 {
        u16::try_from(TCP_HEADER + self.data.len()).unwrap_or(u16::MAX)
    }

    fn tcp(&self, from: &[u8], to: &[u8]) -> Vec<u8> {
        const FIN: u8 = 0x01;
        const PSH: u8 = 0x08;
        const ACK: u8 = 0x10;
        let mut segment = vec![0; TCP_HEADER];
        segment[0..2].copy_from_slice(&self.tuple.remote.port().to_be_bytes());
        segment[2..4].copy_from_slice(&self.tuple.local.port().to_be_bytes());
        segment[4..8].copy_from_slice(&self.seq.to_be_bytes());
        segment[8..12].copy_from_slice(&self.ack.to_be_bytes());
        segment[12] = 5 << 4; // header length in words
        segment[13] = ACK | if self.fin { FIN } else { 0 } | if self.data.is_empty() { 0 } else { PSH };
        segment[14..16].copy_from_slice(&self.window.to_be_bytes());
        segment.extend(self.data);
        let length = self.length().to_be_bytes();
        let sum = checksum([from, to, &[0, PROTOCOL_TCP], &length, &segment].into_iter());
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        segment
    }
}

fn v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
    }
}

/// The Internet checksum (RFC 1071) of parts of which only the last may have an odd length; together at most 64 KiB.
fn checksum<'a>(parts: impl Iterator<Item = &'a [u8]>) -> u16 {
    let words = parts.flat_map(|part| part.chunks(2));
    let word = |bytes: &[u8]| u16::from_be_bytes([bytes[0], bytes.get(1).copied().unwrap_or(0)]);
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
