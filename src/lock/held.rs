//! Packets that a lock keeps from their sockets, and that are brought to them when it is gone.
//!
//! What a lock drops its sender has to send again, and it waits longer each time: after a lock of three seconds a
//! connection may stay silent for as long again. So whoever locks can hold what is dropped: the lock's rules give a copy
//! of each packet to the [netfilter log](LockOptions::log), and after the unlocking the engine
//! [forges](crate::forge) the same segments. The peers hear at once that all has come.
//!
//! Nothing depends on it: where the kernel has no such log, where the holder died, or where it holds all that it may,
//! packets are dropped and their senders send them again.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};

use super::conntrack::Translation;
use super::options::{BadOption, LockOptions, Method, hold_new_time, hold_time};
use super::packet_log::PacketLog;
use super::{Listener, LockError, LockName, NetworkLock};
use crate::chain;
use crate::forge::{self, Forge, Way};
use crate::four_tuple::FourTuple;
use crate::kernel::netns::NetNs;
use crate::kernel::sockopt;

/// What one connection may have held. Without acknowledgements its peer does not send more than a window.
const PER_CONNECTION: Bounds = Bounds { packets: 256, bytes: 1 << 20 };
const IN_ALL: Bounds = Bounds { packets: 1 << 16, bytes: 32 << 20 };
/// What those who would connect may have held, whoever they are: a flood of SYNs takes nothing from the connections.
const OF_NEWCOMERS: Bounds = Bounds { packets: 1 << 12, bytes: 1 << 20 };

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Bounds {
    packets: usize,
    bytes: usize,
}

impl Bounds {
    fn with(self, bytes: usize) -> Self {
        Self { packets: self.packets + 1, bytes: self.bytes + bytes }
    }

    fn and(self, other: Self) -> Self {
        Self { packets: self.packets + other.packets, bytes: self.bytes + other.bytes }
    }

    fn without(self, other: Self) -> Self {
        Self { packets: self.packets - other.packets, bytes: self.bytes - other.bytes }
    }

    fn within(self, most: Self) -> bool {
        self.packets <= most.packets && self.bytes <= most.bytes
    }
}

/// Reads what the locks of some namespaces drop.
#[derive(Debug, Default)]
pub struct Holder {
    /// How long it is worth it; zero: not at all.
    pub patience: Duration,
    /// For how long who would connect is kept waiting; zero: not at all.
    pub newcomers: Duration,
    logs: Vec<(NetNs, PacketLog)>,
    /// Namespaces that have no log.
    deaf: Vec<NetNs>,
    packets: HeldPackets,
    /// One of the sockets has sent.
    heard: bool,
}

impl Holder {
    /// Holds packets for so long; for no time, it holds none.
    #[must_use]
    pub fn new(patience: Duration) -> Self {
        Self { patience, ..Self::default() }
    }

    /// Holds packets for as long as `SOCCR_HOLD` and `SOCCR_HOLD_NEW` say.
    ///
    /// # Errors
    /// [`BadOption`].
    pub fn from_env() -> Result<Self, BadOption> {
        Ok(Self { newcomers: hold_new_time()?, ..Self::new(hold_time()?) })
    }

    /// The same options for a lock in `ns` whose packets are to be held.
    pub fn options(&mut self, ns: &NetNs, options: &LockOptions) -> LockOptions {
        let holds = options.method == Method::Nftables && !self.patience.is_zero();
        let log = if holds { self.group_in(ns) } else { None };
        LockOptions { log, ..*options }
    }

    fn group_in(&mut self, ns: &NetNs) -> Option<u16> {
        if let Some((_, log)) = self.logs.iter().find(|(known, _)| known == ns) {
            return Some(log.group());
        }
        if self.deaf.contains(ns) {
            return None;
        }
        match PacketLog::open(ns) {
            Ok(log) => {
                let group = log.group();
                self.logs.push((ns.clone(), log));
                Some(group)
            }
            Err(error) => {
                log::warn!("{ns}: packets are dropped and not held: {}", chain(&error));
                self.deaf.push(ns.clone());
                None
            }
        }
    }

    /// Holds what comes for these sockets.
    pub fn expect(&mut self, tuples: impl IntoIterator<Item = FourTuple>) {
        tuples.into_iter().for_each(|tuple| self.packets.expect(tuple));
    }

    /// Holds the SYNs of who would connect to these listeners.
    pub fn expect_newcomers(&mut self, listeners: &[Listener]) {
        self.packets.listeners.extend(listeners);
    }

    /// Knows packets by the addresses that they have before they are translated.
    pub fn expect_translated(&mut self, translations: &[Translation]) {
        translations.iter().for_each(|translation| self.packets.expect_translated(translation));
    }

    /// Holds from now on only what is dropped in this namespace.
    pub fn keep_only(&mut self, ns: &NetNs) {
        for (_, log) in self.logs.extract_if(.., |(other, _)| other != ns) {
            log.finish(|packet| self.packets.take(packet));
        }
    }

    /// Whether anything can be held.
    #[must_use]
    pub fn listens(&self) -> bool {
        !self.logs.is_empty()
    }

    /// The logs, to be waited for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.logs.iter().map(|(_, log)| log.as_fd())
    }

    /// Takes what has come.
    pub fn read(&mut self) {
        for (_, log) in &mut self.logs {
            log.read(|packet| {
                self.heard |= self.packets.is_from_socket(packet);
                self.packets.take(packet);
            });
        }
    }

    /// Whether one of the sockets has sent, as far as was [read](Self::read), since this was asked the last time. A lock
    /// on the way sees both directions; while a dump waits only a socket that was restored can send.
    pub fn heard_socket(&mut self) -> bool {
        std::mem::take(&mut self.heard)
    }

    /// What is held by now.
    pub fn held(&mut self) -> &HeldPackets {
        self.read();
        &self.packets
    }

    /// Takes out what is held for these connections.
    pub fn take_for(&mut self, tuples: impl Iterator<Item = FourTuple>) -> HeldPackets {
        // The kernel keeps the last ones for a hundredth of a second, to give them together.
        const TOGETHER_MS: u16 = 20;
        self.read();
        let mut logs: Vec<PollFd<'_>> = self.fds().map(|log| PollFd::new(log, PollFlags::POLLIN)).collect();
        let _ = poll(&mut logs, TOGETHER_MS);
        self.read();
        self.packets.split_off(tuples)
    }

    /// Takes out what has come by now for sockets and listeners at this address.
    pub fn take_at(&mut self, address: IpAddr) -> HeldPackets {
        self.read();
        self.packets.split_off_at(address)
    }

    /// Takes a packet, from the IP header on, that no lock has met.
    pub fn take_packet(&mut self, packet: &[u8]) {
        self.packets.take(packet);
    }

    /// Whether something could come for this address.
    #[must_use]
    pub fn expects_at(&self, address: IpAddr) -> bool {
        let HeldPackets { wanted, listeners, .. } = &self.packets;
        let mut ports =
            listeners.iter().map(|listener| (listener, SocketAddr::new(address, listener.local.port())));
        wanted.values().any(|tuple| tuple.local.ip() == address)
            || ports.any(|(listener, at)| listener.hears(at))
    }

    /// Whether there is something for this address, as far as it was [read](Self::read).
    #[must_use]
    pub fn has_at(&self, address: IpAddr) -> bool {
        self.packets.tuples().any(|tuple| tuple.local.ip() == address)
    }

    /// All that was held.
    pub fn finish(mut self) -> HeldPackets {
        for (_, log) in self.logs.drain(..) {
            log.finish(|packet| self.packets.take(packet));
        }
        self.packets
    }
}

/// Whether what a lock in this namespace drops can be held. A lock of this name is there for the moment.
///
/// # Errors
/// [`LockError`]: the kernel has no `nfnetlink_log`, no `nft_log`, or no nf_tables at all.
pub fn check(ns: &NetNs, name: &LockName) -> Result<(), LockError> {
    let log = PacketLog::open(ns).map_err(|source| LockError::Nftables {
        action: "take a group of the netfilter log".into(),
        ns: ns.clone(),
        source,
    })?;
    let logging = LockOptions { log: Some(log.group()), ..LockOptions::default() };
    NetworkLock::lock(ns, name, &[], &LockOptions::default())?.keep();
    // A lock for connections does without a log where there is none, but not this.
    let lock = NetworkLock::adopt(ns, name, &logging);
    let nobody = Listener { local: (Ipv4Addr::LOCALHOST, 0).into(), v6only: false };
    lock.stop_newcomers(&[nobody], Duration::from_secs(1), true)?;
    lock.unlock().map(drop)
}

/// Segments of known connections, in the order in which they came. That is also the order in which their timestamps may come:
/// a segment that is sent again has a later one, and sockets take what comes after it with an earlier one for old (RFC 7323, 5).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct HeldPackets {
    /// The sockets, by source and destination of the packets for them.
    wanted: HashMap<(SocketAddr, SocketAddr), FourTuple>,
    segments: HashMap<FourTuple, Segments>,
    listeners: Vec<Listener>,
    size: Bounds,
    /// The SYNs of who would connect.
    newcomers: HashMap<FourTuple, Vec<u8>>,
    size_of_newcomers: Bounds,
}

#[derive(Clone, Default, PartialEq, Eq)]
struct Segments {
    list: Vec<Vec<u8>>,
    size: Bounds,
}

impl Segments {
    /// Whether a segment brings nothing new. What is sent again may be cut otherwise than before.
    fn have(&self, head: Head) -> bool {
        let held = || self.list.iter().filter_map(|held| Head::of(held));
        if head.len == 0 {
            return held().any(|held| held == head);
        }
        let mut at = head.seq;
        while after(head.end(), at) {
            let next = held()
                .map(|held| (held.seq, held.end()))
                .find(|(seq, end)| !after(*seq, at) && after(*end, at));
            let Some((_, end)) = next else { return false };
            at = end;
        }
        true
    }
}

impl HeldPackets {
    fn expect(&mut self, tuple: FourTuple) {
        let tuple = tuple.on_wire();
        self.wanted.insert((unscoped(tuple.remote), unscoped(tuple.local)), tuple);
    }

    fn expect_translated(&mut self, Translation { original, reply }: &Translation) {
        // Which end is here: the one that was connected to, or the one that connected.
        for (packet, other) in [(original, reply), (reply, original)] {
            if let Some(tuple) = self.wanted.get(&(other.destination, other.source)) {
                self.wanted.insert((packet.source, packet.destination), *tuple);
            }
        }
    }

    /// How many packets there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.size.packets + self.newcomers.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The SYNs of who would connect, by the connection that their listener would get.
    pub fn newcomers(&self) -> impl Iterator<Item = (FourTuple, &[u8])> {
        self.newcomers.iter().map(|(tuple, syn)| (*tuple, syn.as_slice()))
    }

    /// The sockets, each with its segments from the TCP header on, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (FourTuple, &[u8])> {
        self.segments
            .iter()
            .flat_map(|(tuple, segments)| segments.list.iter().map(|segment| (*tuple, segment.as_slice())))
    }

    /// Takes a packet from the IP header on, if it is for one of the sockets and may be held.
    fn take(&mut self, packet: &[u8]) {
        let Some((source, destination, segment)) = tcp_in(packet) else { return };
        if let Some(tuple) = self.wanted.get(&(source, destination)).copied() {
            self.add(tuple, segment);
        } else if self.listeners.iter().any(|listener| listener.hears(destination)) {
            self.add_newcomer(FourTuple { local: destination, remote: source }, segment);
        }
    }

    /// Whether one of the sockets has sent this. A reset comes from where there is none.
    fn is_from_socket(&self, packet: &[u8]) -> bool {
        tcp_in(packet).is_some_and(|(source, destination, segment)| {
            self.wanted.contains_key(&(destination, source))
                && Head::of(segment).is_some_and(|head| head.flags & RST == 0)
        })
    }

    /// Adds a SYN that somebody else has held; `false`: it is none. Of one that was sent more than once the first counts.
    pub fn add_newcomer(&mut self, tuple: FourTuple, segment: &[u8]) -> bool {
        let opens = Head::of(segment).is_some_and(|head| head.flags & (SYN | ACK | RST | FIN) == SYN);
        let size = self.size_of_newcomers.with(segment.len());
        let fits = size.within(OF_NEWCOMERS) && !is_link_local(&tuple);
        if opens && fits && !self.newcomers.contains_key(&tuple) {
            self.newcomers.insert(tuple, segment.to_vec());
            self.size_of_newcomers = size;
        }
        opens
    }

    /// Adds what somebody else has held, a SYN as that of a newcomer.
    pub fn add_any(&mut self, tuple: FourTuple, segment: &[u8]) {
        if !self.add_newcomer(tuple, segment) {
            self.add(tuple, segment);
        }
    }

    /// Adds a segment that somebody else has held. One that is there already, sent once more, adds nothing.
    pub fn add(&mut self, tuple: FourTuple, segment: &[u8]) {
        let Some(head) = Head::of(segment) else { return };
        let all = self.size.with(segment.len());
        if !all.within(IN_ALL) {
            return;
        }
        let segments = self.segments.entry(tuple.on_wire()).or_default();
        let size = segments.size.with(segment.len());
        if segments.have(head) || !size.within(PER_CONNECTION) {
            return;
        }
        segments.list.push(segment.to_vec());
        (segments.size, self.size) = (size, all);
    }

    fn split_off(&mut self, tuples: impl Iterator<Item = FourTuple>) -> Self {
        let mut other = Self::default();
        for tuple in tuples {
            if let Some((wire, segments)) = self.segments.remove_entry(&tuple.on_wire()) {
                self.size = self.size.without(segments.size);
                other.size = other.size.and(segments.size);
                other.segments.insert(wire, segments);
            }
        }
        other
    }

    fn split_off_at(&mut self, address: IpAddr) -> Self {
        let is_at = |tuple: &FourTuple| tuple.local.ip() == address;
        let mut other =
            self.split_off(self.segments.keys().copied().filter(is_at).collect::<Vec<_>>().into_iter());
        for (tuple, syn) in self.take_newcomers(is_at) {
            other.size_of_newcomers = other.size_of_newcomers.with(syn.len());
            other.newcomers.insert(tuple, syn);
        }
        other
    }

    fn tuples(&self) -> impl Iterator<Item = &FourTuple> {
        self.segments.keys().chain(self.newcomers.keys())
    }

    /// As packets, from the IP header on.
    pub(super) fn to_packets(&self) -> impl Iterator<Item = Vec<u8>> {
        let all = self.newcomers().chain(self.iter());
        all.map(|(tuple, segment)| forge::packet(&tuple.on_wire(), segment.to_vec()))
    }

    /// Adds what `later` has held.
    pub fn append(&mut self, later: &Self) {
        later.iter().for_each(|(tuple, segment)| self.add(tuple, segment));
        for (tuple, syn) in later.newcomers() {
            self.add_newcomer(tuple, syn);
        }
    }

    /// The same for sockets that have other addresses now.
    #[must_use]
    pub fn readdressed(self, new: impl Fn(FourTuple) -> FourTuple) -> Self {
        let segments = self.segments.into_iter().map(|(tuple, it)| (new(tuple), it)).collect();
        let newcomers = self.newcomers.into_iter().map(|(tuple, syn)| (new(tuple), syn)).collect();
        Self { segments, newcomers, ..self }
    }

    /// Forgets who would connect to other listeners than these.
    pub fn keep_newcomers_of(&mut self, listeners: &[Listener]) {
        let others =
            |tuple: &FourTuple| !listeners.iter().any(|listener| listener.hears(unscoped(tuple.local)));
        self.take_newcomers(others);
    }

    fn take_newcomers(&mut self, which: impl Fn(&FourTuple) -> bool) -> HashMap<FourTuple, Vec<u8>> {
        let taken: HashMap<_, _> = self.newcomers.extract_if(|tuple, _| which(tuple)).collect();
        let size = Bounds { packets: taken.len(), bytes: taken.values().map(Vec::len).sum() };
        self.size_of_newcomers = self.size_of_newcomers.without(size);
        taken
    }

    /// Brings the listeners in `ns`, which nothing locks any more, who would connect to them.
    pub fn let_in(&mut self, ns: &NetNs) -> usize {
        let (forge, newcomers) = (Forge::new(), self.take_newcomers(|_| true));
        let way = Way { ns: ns.clone(), device: Vec::new() };
        let brought = newcomers.into_iter().filter(|(tuple, syn)| {
            let replayed = forge.replay(&way, tuple, vec![syn.clone()]);
            replayed.inspect_err(|error| log::debug!("{tuple}: has to ask again: {}", chain(error))).is_ok()
        });
        brought.count()
    }

    /// Brings each of these sockets, which nothing locks any more, the segments that were held for it. Gives their number.
    ///
    /// What does not reach its socket is sent again by the peer, as if it had not been held.
    pub fn release<'a>(self, sockets: impl IntoIterator<Item = (BorrowedFd<'a>, FourTuple)>) -> usize {
        let sockets: Vec<_> = sockets.into_iter().collect();
        let mut release = self.release_to(sockets.iter().map(|(_, tuple)| *tuple));
        sockets.iter().for_each(|(socket, tuple)| release.bring(*socket, *tuple));
        release.count()
    }

    /// The same for sockets that are not all open at once: these are their addresses.
    #[must_use]
    pub fn release_to(self, tuples: impl Iterator<Item = FourTuple>) -> Release {
        let mut segments = self.segments;
        // Connections of two namespaces can have the same addresses, and nobody knows whose a segment is.
        if !segments.is_empty() {
            let mut seen = HashSet::new();
            for wire in tuples.map(|tuple| tuple.on_wire()) {
                if !seen.insert(wire) {
                    segments.remove(&wire);
                }
            }
        }
        Release { segments, forge: Forge::new(), count: 0 }
    }
}

/// Held segments on their way to the sockets.
pub struct Release {
    segments: HashMap<FourTuple, Segments>,
    forge: Forge,
    count: usize,
}

impl Release {
    /// Whether there is something for this connection.
    #[must_use]
    pub fn has(&self, tuple: &FourTuple) -> bool {
        self.segments.contains_key(&tuple.on_wire())
    }

    /// Brings the socket what is there for it.
    pub fn bring(&mut self, socket: BorrowedFd<'_>, tuple: FourTuple) {
        let Some(held) = self.segments.remove(&tuple.on_wire()) else { return };
        if !is_reachable(socket, &tuple) {
            return;
        }
        let packets = held.list.len();
        match Way::to(socket).and_then(|way| self.forge.replay(&way, &tuple, held.list)) {
            Ok(()) => self.count += packets,
            Err(error) => log::debug!("{tuple}: what was held has to be sent again: {}", chain(&error)),
        }
    }

    /// How many segments were brought.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

/// Without what peers have sent, which no log shall have.
impl fmt::Debug for HeldPackets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets of {} bytes", self.size.packets, self.size.bytes)
    }
}

/// A forged segment comes in from the loopback device. A socket that is bound to another one by its index would not get
/// it, and the stack would answer with RST. (An IPv4 address stands for its device.)
fn is_reachable(socket: BorrowedFd<'_>, tuple: &FourTuple) -> bool {
    tuple.on_wire().local.is_ipv4()
        || (sockopt::bound_device(socket).is_ok_and(|device| device.is_empty()) && !is_link_local(tuple))
}

fn is_link_local(tuple: &FourTuple) -> bool {
    [tuple.local, tuple.remote].iter().any(|end| match end.ip() {
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
        IpAddr::V4(_) => false,
    })
}

/// Packets do not tell the interface index that the sockets of link-local addresses have.
fn unscoped(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip(), end.port())
}

const TCP_HEADER: usize = 20;

/// Source, destination, and all from the TCP header on; `None` of fragments, of what is cut short, and of what is no TCP.
fn tcp_in(packet: &[u8]) -> Option<(SocketAddr, SocketAddr, &[u8])> {
    const TCP: u8 = 6;
    let word = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (source, destination, segment): (IpAddr, IpAddr, _) = match packet.first()? >> 4 {
        4 => {
            let (header, total) = (usize::from(packet[0] & 0xf) * 4, usize::from(word(2)?));
            let is_fragment = word(6)? & 0x3fff != 0;
            if is_fragment || header < 20 || *packet.get(9)? != TCP {
                return None;
            }
            let address = |at: usize| Some(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?.into());
            (address(12)?, address(16)?, packet.get(header..total)?)
        }
        6 => {
            if *packet.get(6)? != TCP {
                return None; // extension headers are rare
            }
            let address = |at: usize| Some(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?.into());
            (address(8)?, address(24)?, packet.get(40..40 + usize::from(word(4)?))?)
        }
        _ => return None,
    };
    Head::of(segment)?;
    let port = |at: usize| u16::from_be_bytes([segment[at], segment[at + 1]]);
    Some((SocketAddr::new(source, port(0)), SocketAddr::new(destination, port(2)), segment))
}

/// What tells segments of one connection apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Head {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    /// In sequence numbers: a SYN and a FIN have one each.
    len: u32,
}

impl Head {
    /// `None` of what is no segment.
    fn of(segment: &[u8]) -> Option<Self> {
        let header = usize::from(segment.get(12)? >> 4) * 4;
        if header < TCP_HEADER {
            return None;
        }
        let data = u32::try_from(segment.len().checked_sub(header)?).ok()?;
        let word = |at: usize| Some(u32::from_be_bytes(segment.get(at..at + 4)?.try_into().ok()?));
        let flags = *segment.get(13)?;
        let window = u16::from_be_bytes([*segment.get(14)?, *segment.get(15)?]);
        let len = data + u32::from(flags & FIN != 0) + u32::from(flags & SYN != 0);
        Some(Self { seq: word(4)?, ack: word(8)?, flags, window, len })
    }

    fn end(self) -> u32 {
        self.seq.wrapping_add(self.len)
    }
}

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Whether `a` comes after `b`, as sequence numbers go (RFC 9293, 3.4).
fn after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A segment without data from the IPv4 header on.
    fn packet(from: SocketAddr, to: SocketAddr, flags: u8) -> Vec<u8> {
        let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else { panic!("IPv4") };
        let head = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0];
        let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
        let rest = [0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 0, 0, 0, 0, 0, 0];
        [&head[..], &source.octets(), &destination.octets(), &ports, &rest].concat()
    }

    #[test]
    fn only_a_socket_is_heard_and_only_its_peer_held() {
        let end = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (local, remote, other) = (end("10.0.0.1:7"), end("10.0.0.2:40000"), end("10.0.0.3:7"));
        let mut packets = HeldPackets::default();
        packets.expect(FourTuple { local, remote });
        for (from, to, flags, is_heard, held) in [
            (local, remote, ACK, true, 0),
            (local, remote, FIN | ACK, true, 0),
            (local, remote, RST, false, 0),
            (local, remote, RST | ACK, false, 0),
            (other, remote, ACK, false, 0),
            (remote, local, ACK, false, 1),
        ] {
            let packet = packet(from, to, flags);
            packets.take(&packet);
            assert_eq!(
                (packets.is_from_socket(&packet), packets.len()),
                (is_heard, held),
                "{from} {to} {flags}"
            );
        }
    }
}
