//! Connections that are translated (NAT) on their way, as conntrack knows them.
//!
//! The peer of a container that is reached by a published port, or that goes out through masquerading, sends to other
//! addresses than the container's socket has. While the socket is away these packets have to be locked by the
//! addresses that they carry before any translation. And when an interface goes down, masquerading forgets its
//! entries: without them the next packet is not translated, meets no socket, and is answered with RST. So entries
//! are looked up when the connections are locked, and [put back](restore) before they are unlocked.
//!
//! What peers have sent into the lock conntrack has not seen, nor what went on while the connection was on another host.
//! It may take what they send afterwards for invalid, by its idea of their windows: such a packet is not translated
//! either, and many a firewall drops it. Where it knows nothing of the connection, what the restored end sends first
//! begins a new one, which rules for what goes out may translate. So before they are unlocked connections are made
//! [known](establish) as established ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use nix::errno::Errno;

use super::netfilter::NetfilterSocket;
use super::nft::wire::{Attributes, Header, Malformed, Messages, Writer};
use crate::four_tuple::FourTuple;
use crate::kernel::SysError;
use crate::kernel::netns::{NetNs, NetNsError};

/// One direction of a connection, as its packets carry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "criu", derive(serde::Serialize, serde::Deserialize))]
pub struct Direction {
    /// Where the packets come from.
    pub source: SocketAddr,
    /// Where they go.
    pub destination: SocketAddr,
}

impl Direction {
    /// The way back of packets that nobody translates.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source }
    }

    /// The connection whose socket at the source sends such packets.
    #[must_use]
    pub fn tuple(self) -> FourTuple {
        FourTuple { local: self.source, remote: self.destination }
    }
}

/// A translated connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "criu", derive(serde::Serialize, serde::Deserialize))]
pub struct Translation {
    /// Packets from whoever opened the connection, before any translation.
    pub original: Direction,
    /// The answers, before they are translated back.
    pub reply: Direction,
}

/// conntrack could not be asked or told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConntrackError {
    /// The namespace could not be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
    /// The netlink socket failed.
    #[error(transparent)]
    Socket(SysError),
    /// An answer makes no sense.
    #[error("conntrack gave a malformed answer")]
    Malformed(#[from] Malformed),
    /// The kernel refused.
    #[error("cannot {action} the conntrack entry of {connection}: {errno}")]
    Refused {
        /// "find", "make" or "change".
        action: &'static str,
        /// The connection as its opener sees it.
        connection: FourTuple,
        /// The kernel's answer.
        errno: Errno,
    },
}

/// The translated ones among `connections`, whose sockets see them so, in the namespace where packets pass.
///
/// A kernel without conntrack translates nothing.
///
/// # Errors
/// [`ConntrackError`].
pub fn find(ns: &NetNs, connections: &[FourTuple]) -> Result<Vec<Translation>, ConntrackError> {
    let Some(client) = Client::open(ns)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for chunk in connections.chunks(REQUESTS_AT_ONCE) {
        client.look_up(chunk, &mut found)?;
    }
    Ok(found)
}

/// Puts those entries back that are gone. They are what connections in mid-stream have: established, assured, and
/// liberal about windows.
///
/// # Errors
/// [`ConntrackError`], of the first that cannot be put back; the others are tried all the same.
pub fn restore(ns: &NetNs, translations: &[Translation]) -> Result<(), ConntrackError> {
    if translations.is_empty() {
        return Ok(());
    }
    let Some(client) = Client::open(ns)? else { return Ok(()) };
    let make = |chunk| client.make(chunk, ESTABLISHED_TIMEOUT);
    translations.chunks(REQUESTS_AT_ONCE).map(make).fold(Ok(()), Result::and)
}

/// Makes `connections` known as what they are, established: their entries, translated or not, become liberal about windows, and
/// those that have none get one, without a translation.
///
/// # Errors
/// [`ConntrackError`].
pub fn establish(ns: &NetNs, connections: &[FourTuple]) -> Result<(), ConntrackError> {
    let Some(client) = Client::open(ns)? else { return Ok(()) };
    connections.chunks(REQUESTS_AT_ONCE).try_for_each(|chunk| {
        let unknown = client.loosen(chunk)?;
        client.make(&unknown, UNTIL_FIRST_PACKET)
    })
}

/// Whether conntrack can be asked and told here. It cannot where nothing has loaded it, which is where it translates nothing.
///
/// # Errors
/// [`ConntrackError`].
pub fn is_there(ns: &NetNs) -> Result<bool, ConntrackError> {
    let Some(client) = Client::open(ns)? else { return Ok(false) };
    let nobody = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let mut there = false;
    client.of_each(
        &[FourTuple { local: nobody, remote: nobody }],
        "find",
        abi::GET,
        |_| (),
        |_, _| {
            there = true;
            Ok(())
        },
    )?;
    Ok(there)
}

/// So many answers fit a socket's receive buffer.
const REQUESTS_AT_ONCE: usize = 64;
const RECEIVE_BUFFER: usize = 64 * 1024;

struct Client(NetfilterSocket);

impl Client {
    /// `None`: there is no netfilter netlink, or no conntrack, which is not loaded by being asked.
    fn open(ns: &NetNs) -> Result<Option<Self>, ConntrackError> {
        let modules = Path::new("/sys/module");
        if modules.exists() && !modules.join("nf_conntrack").exists() {
            return Ok(None);
        }
        match NetfilterSocket::open(ns)? {
            Ok(socket) => Ok(Some(Self(socket))),
            Err(SysError { errno: Errno::EPROTONOSUPPORT, .. }) => Ok(None),
            Err(error) => Err(ConntrackError::Socket(error)),
        }
    }

    fn look_up(&self, connections: &[FourTuple], found: &mut Vec<Translation>) -> Result<(), ConntrackError> {
        self.of_each(
            connections,
            "find",
            abi::GET,
            |_| (),
            |_, entry| {
                let translation = entry.map(read_entry).transpose()?;
                found.extend(translation.filter(|it| it.reply != it.original.reversed()));
                Ok(())
            },
        )
    }

    /// Gives those back that have no entry, as if the peers had opened them: there is nobody to tell.
    fn loosen(&self, connections: &[FourTuple]) -> Result<Vec<Translation>, ConntrackError> {
        let mut unknown = Vec::new();
        self.of_each(connections, "change", abi::NEW, put_established, |connection, entry| {
            if entry.is_none() {
                let reply = sent(connection);
                unknown.push(Translation { original: reply.reversed(), reply });
            }
            Ok(())
        })?;
        Ok(unknown)
    }

    /// Sends one message for the entry of each connection, all at once, and shows the entries that come back; of a
    /// connection that conntrack knows nothing of, none. A kernel without conntrack is no error.
    fn of_each(
        &self,
        connections: &[FourTuple],
        action: &'static str,
        message: u16,
        more: impl Fn(&mut Writer),
        mut each: impl FnMut(&FourTuple, Option<Attributes<'_>>) -> Result<(), Malformed>,
    ) -> Result<(), ConntrackError> {
        let mut requests = Writer::default();
        for (seq, connection) in (0..).zip(connections) {
            let header = Header { kind: kind(message), flags: abi::REQUEST, seq };
            let direction = sent(connection);
            requests.message(header, family(direction), 0, |w| {
                put_tuple(w, abi::TUPLE_ORIGINAL, direction);
                more(w);
            });
        }
        self.0.send(requests.bytes()).map_err(ConntrackError::Socket)?;
        self.answers(connections, |connection, answer| match answer {
            Answer::Entry(found) => Ok(each(connection, Some(found))?),
            Answer::Errno(Errno::ENOENT) => Ok(each(connection, None)?),
            Answer::Errno(Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(()), // EINVAL: no such subsystem
            Answer::Errno(errno) => Err(ConntrackError::Refused { action, connection: *connection, errno }),
        })
    }

    /// Makes these entries, those that are not there.
    fn make(&self, entries: &[Translation], timeout: u32) -> Result<(), ConntrackError> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut requests = Writer::default();
        for (seq, Translation { original, reply }) in (0..).zip(entries) {
            let flags = abi::REQUEST | abi::CREATE | abi::EXCLUSIVE;
            requests.message(Header { kind: kind(abi::NEW), flags, seq }, family(*original), 0, |w| {
                // The kernel translates the untranslated pair itself, by the two ranges of one address each.
                put_tuple(w, abi::TUPLE_ORIGINAL, *original);
                put_tuple(w, abi::TUPLE_REPLY, original.reversed());
                if reply.source != original.destination {
                    put_range(w, abi::NAT_DESTINATION, reply.source);
                }
                if reply.destination != original.source {
                    put_range(w, abi::NAT_SOURCE, reply.destination);
                }
                w.put_u32(abi::STATUS, abi::SEEN_REPLY | abi::ASSURED | abi::CONFIRMED);
                w.put_u32(abi::TIMEOUT, timeout);
                put_established(w);
            });
        }
        self.0.send(requests.bytes()).map_err(ConntrackError::Socket)?;
        self.answers(entries, |entry, answer| match answer {
            Answer::Entry(_) | Answer::Errno(Errno::EEXIST) => Ok(()),
            Answer::Errno(errno) => {
                Err(ConntrackError::Refused { action: "make", connection: entry.original.tuple(), errno })
            }
        })
    }

    /// All answers to what was sent about each of `asked`; of several errors the first.
    fn answers<T>(
        &self,
        asked: &[T],
        mut each: impl FnMut(&T, Answer<'_>) -> Result<(), ConntrackError>,
    ) -> Result<(), ConntrackError> {
        let mut buffer = vec![0; RECEIVE_BUFFER];
        let mut result = Ok(());
        while let Some(len) = self.0.receive(&mut buffer).map_err(ConntrackError::Socket)? {
            for message in Messages::new(&buffer[..len]) {
                let message = message?;
                let answer = if i32::from(message.header.kind) == libc::NLMSG_ERROR {
                    match message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
                        0 => continue,
                        code => Answer::Errno(Errno::from_raw(code.saturating_neg())),
                    }
                } else {
                    Answer::Entry(message.netfilter()?.1)
                };
                let asked = usize::try_from(message.header.seq).ok().and_then(|seq| asked.get(seq));
                let asked = asked.ok_or(Malformed { what: "an answer to nothing", offset: 0 })?;
                result = result.and(each(asked, answer));
            }
        }
        result
    }
}

enum Answer<'a> {
    Entry(Attributes<'a>),
    Errno(Errno),
}

/// As long as an established connection's entry lives by the kernel's default, five days: the first packet sets what
/// this host has configured.
const ESTABLISHED_TIMEOUT: u32 = 432_000;

/// For what the first packet has conntrack take for an established connection; where nothing passes conntrack, for nothing.
/// Connections may be unlocked some time later than they are made known.
const UNTIL_FIRST_PACKET: u32 = 600;

/// What the connection's socket sends.
fn sent(connection: &FourTuple) -> Direction {
    let wire = connection.on_wire();
    Direction { source: wire.local, destination: wire.remote }
}

fn kind(message: u16) -> u16 {
    (abi::SUBSYSTEM << 8) | message
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 2 and 10
fn family(direction: Direction) -> u8 {
    (if direction.source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn put_tuple(w: &mut Writer, attribute: u16, direction: Direction) {
    w.nest(attribute, |w| {
        w.nest(abi::TUPLE_IP, |w| {
            put_address(w, [abi::V4_SOURCE, abi::V6_SOURCE], direction.source);
            put_address(w, [abi::V4_DESTINATION, abi::V6_DESTINATION], direction.destination);
        });
        w.nest(abi::TUPLE_PROTOCOL, |w| {
            w.put(abi::PROTOCOL_NUMBER, &[abi::TCP]);
            w.put(abi::SOURCE_PORT, &direction.source.port().to_be_bytes());
            w.put(abi::DESTINATION_PORT, &direction.destination.port().to_be_bytes());
        });
    });
}

/// TCP's part of an entry: established, and liberal about both windows.
fn put_established(w: &mut Writer) {
    w.nest(abi::PROTOCOL_INFO, |w| {
        w.nest(abi::INFO_TCP, |w| {
            w.put(abi::TCP_STATE, &[abi::STATE_ESTABLISHED]);
            for direction in [abi::TCP_FLAGS_ORIGINAL, abi::TCP_FLAGS_REPLY] {
                w.put(direction, &[abi::BE_LIBERAL, abi::BE_LIBERAL]);
            }
        });
    });
}

/// A range of this one address and port.
fn put_range(w: &mut Writer, attribute: u16, to: SocketAddr) {
    w.nest(attribute, |w| {
        put_address(w, [abi::NAT_V4_FIRST, abi::NAT_V6_FIRST], to);
        put_address(w, [abi::NAT_V4_LAST, abi::NAT_V6_LAST], to);
        w.nest(abi::NAT_PROTOCOL, |w| {
            w.put(abi::NAT_FIRST_PORT, &to.port().to_be_bytes());
            w.put(abi::NAT_LAST_PORT, &to.port().to_be_bytes());
        });
    });
}

fn put_address(w: &mut Writer, [v4, v6]: [u16; 2], address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => w.put(v4, &ip.octets()),
        IpAddr::V6(ip) => w.put(v6, &ip.octets()),
    }
}

fn read_entry(entry: Attributes<'_>) -> Result<Translation, Malformed> {
    Ok(Translation {
        original: read_tuple(&entry.require(abi::TUPLE_ORIGINAL)?.nested())?,
        reply: read_tuple(&entry.require(abi::TUPLE_REPLY)?.nested())?,
    })
}

fn read_tuple(tuple: &Attributes<'_>) -> Result<Direction, Malformed> {
    let ip = tuple.require(abi::TUPLE_IP)?.nested();
    let ports = tuple.require(abi::TUPLE_PROTOCOL)?.nested();
    let port = |attribute| Ok(u16::from_be_bytes(fixed(ports.require(attribute)?.bytes())?));
    let source = read_address(&ip, [abi::V4_SOURCE, abi::V6_SOURCE])?;
    let destination = read_address(&ip, [abi::V4_DESTINATION, abi::V6_DESTINATION])?;
    Ok(Direction {
        source: SocketAddr::new(source, port(abi::SOURCE_PORT)?),
        destination: SocketAddr::new(destination, port(abi::DESTINATION_PORT)?),
    })
}

fn read_address(ip: &Attributes<'_>, [v4, v6]: [u16; 2]) -> Result<IpAddr, Malformed> {
    if let Some(address) = ip.find(v4)? {
        return Ok(Ipv4Addr::from(fixed::<4>(address.bytes())?).into());
    }
    Ok(Ipv6Addr::from(fixed::<16>(ip.require(v6)?.bytes())?).into())
}

fn fixed<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Malformed> {
    bytes
        .try_into()
        .map_err(|_| Malformed { what: "an address or a port of an impossible length", offset: 0 })
}

/// Numbers of `linux/netfilter/nfnetlink_conntrack.h` and its neighbours.
mod abi {
    pub const SUBSYSTEM: u16 = 1; // NFNL_SUBSYS_CTNETLINK
    pub const NEW: u16 = 0;
    pub const GET: u16 = 1;
    pub const REQUEST: u16 = 0x1;
    pub const EXCLUSIVE: u16 = 0x200;
    pub const CREATE: u16 = 0x400;

    // enum ctattr_type
    pub const TUPLE_ORIGINAL: u16 = 1;
    pub const TUPLE_REPLY: u16 = 2;
    pub const STATUS: u16 = 3;
    pub const PROTOCOL_INFO: u16 = 4;
    pub const NAT_SOURCE: u16 = 6;
    pub const TIMEOUT: u16 = 7;
    pub const NAT_DESTINATION: u16 = 13;
    // enum ctattr_tuple, ctattr_ip, ctattr_l4proto
    pub const TUPLE_IP: u16 = 1;
    pub const TUPLE_PROTOCOL: u16 = 2;
    pub const V4_SOURCE: u16 = 1;
    pub const V4_DESTINATION: u16 = 2;
    pub const V6_SOURCE: u16 = 3;
    pub const V6_DESTINATION: u16 = 4;
    pub const PROTOCOL_NUMBER: u16 = 1;
    pub const SOURCE_PORT: u16 = 2;
    pub const DESTINATION_PORT: u16 = 3;
    // enum ctattr_nat, ctattr_protonat
    pub const NAT_V4_FIRST: u16 = 1;
    pub const NAT_V4_LAST: u16 = 2;
    pub const NAT_PROTOCOL: u16 = 3;
    pub const NAT_V6_FIRST: u16 = 4;
    pub const NAT_V6_LAST: u16 = 5;
    pub const NAT_FIRST_PORT: u16 = 1;
    pub const NAT_LAST_PORT: u16 = 2;
    // enum ctattr_protoinfo, ctattr_protoinfo_tcp
    pub const INFO_TCP: u16 = 1;
    pub const TCP_STATE: u16 = 1;
    pub const TCP_FLAGS_ORIGINAL: u16 = 4;
    pub const TCP_FLAGS_REPLY: u16 = 5;

    pub const TCP: u8 = 6; // IPPROTO_TCP
    pub const STATE_ESTABLISHED: u8 = 3; // TCP_CONNTRACK_ESTABLISHED
    pub const BE_LIBERAL: u8 = 0x08; // IP_CT_TCP_FLAG_BE_LIBERAL
    // IPS_*: both directions were seen, do not drop it early, it is in the table.
    pub const SEEN_REPLY: u32 = 1 << 1;
    pub const ASSURED: u32 = 1 << 2;
    pub const CONFIRMED: u32 = 1 << 3;
}
