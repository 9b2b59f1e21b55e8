//! The socket monitor (`sock_diag(7)`): what only it tells of sockets; finds and destroys those that no process has any
//! more.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use nix::errno::Errno;

use super::netlink::NetlinkSocket;
use super::wire::{self, Attributes, Header, Message, Messages, Writer};
use super::{SysError, SysResult};
use crate::four_tuple::FourTuple;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;

const HEADER: usize = wire::HEADER_LEN;
/// `struct inet_diag_sockid`.
const SOCK_ID: usize = 48;
/// `struct inet_diag_req_v2`: eight bytes, then the id.
const REQUEST: usize = 8 + SOCK_ID;
/// `struct inet_diag_msg`: four bytes, the id, then five words, of which the last is the inode.
const REPLY: usize = 4 + SOCK_ID + 20;
/// `idiag_rqueue`.
const UNREAD: std::ops::Range<usize> = 4 + SOCK_ID + 4..4 + SOCK_ID + 8;
const PORTS: std::ops::Range<usize> = 0..4;
const BOUND_TO: std::ops::Range<usize> = 36..40;
const COOKIE: std::ops::Range<usize> = SOCK_ID - 8..SOCK_ID;

/// Destroys the socket with exactly these addresses in the current network namespace, if no process owns it: one that
/// was closed and still waits for its peer, or one in TIME_WAIT. `false`: there is none, or it has an owner.
///
/// The kernel may send a RST for it, which the network lock drops.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, EOPNOTSUPP on a kernel without CONFIG_INET_DIAG_DESTROY.
pub fn destroy_orphan(tuple: &FourTuple) -> SysResult<bool> {
    destroy(&NetlinkSocket::sock_diag()?, tuple)
}

/// As [`destroy_orphan`], for many connections; counts the sockets.
///
/// # Errors
/// As [`destroy_orphan`]; some may be destroyed by then.
pub fn destroy_orphans(tuples: &[FourTuple]) -> SysResult<usize> {
    let socket = NetlinkSocket::sock_diag()?;
    tuples.iter().map(|tuple| destroy(&socket, &tuple.on_wire()).map(usize::from)).sum()
}

fn destroy(socket: &NetlinkSocket, tuple: &FourTuple) -> SysResult<bool> {
    let mut id = sock_id(tuple);
    let Some(found) = find(socket, tuple, &id)?.filter(|found| !found.owned) else { return Ok(false) };
    id[COOKIE].copy_from_slice(&found.cookie);
    match ask(socket, (SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, 0), tuple, &id) {
        Ok(_) => Ok(true),
        Err(SysError { errno: Errno::ENOENT, .. }) => Ok(true), // it is gone by itself
        Err(error) => Err(error),
    }
}

/// The first of these connections whose socket in the current network namespace belongs to a process. `None` also on a
/// kernel that cannot tell.
///
/// # Errors
/// EMFILE, ENOBUFS.
pub fn find_owned(tuples: &[FourTuple]) -> SysResult<Option<FourTuple>> {
    let socket = match NetlinkSocket::sock_diag() {
        Err(SysError { errno: Errno::EPROTONOSUPPORT, .. }) => return Ok(None),
        other => other?,
    };
    for tuple in tuples {
        let wire = tuple.on_wire();
        if find(&socket, &wire, &sock_id(&wire))?.is_some_and(|found| found.owned) {
            return Ok(Some(*tuple));
        }
    }
    Ok(None)
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `AF_INET`.
    Ipv4 = 2,
    /// `AF_INET6`, IPv4-mapped addresses included.
    Ipv6 = 10,
}

/// A kind of TCP sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Listeners.
    Listening,
    /// Those with a peer, TIME_WAIT left out.
    Connected,
    /// Handshakes that wait for their last ACK; they are no sockets yet.
    Opening,
    /// Those that can stand in an accept queue, and [`Opening`](Self::Opening).
    Unaccepted,
}

/// What the monitor tells of a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The kernel's number for it (`SO_COOKIE`).
    pub cookie: u64,
    /// Its inode; 0 when no process has it.
    pub inode: u32,
    /// Both ends, as getsockname() and getpeername() show them, but for a flow label.
    pub tuple: FourTuple,
    /// Whether it has keys for TCP-MD5 signatures (RFC 2385).
    pub md5: bool,
    /// Whether keys would be shown: only to who has CAP_NET_ADMIN.
    pub shows_keys: bool,
    /// Whether a protocol such as TLS sits on top in the kernel.
    pub upper_layer: bool,
}

/// Which sockets to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Of one family.
    pub family: Family,
    /// Of one kind.
    pub kind: Kind,
    /// With this local port: a server's connections, without their other ends on the same host.
    pub local_port: Option<u16>,
}

/// Shows `each` these TCP sockets in the current network namespace.
///
/// # Errors
/// ENOENT where the kernel has no `tcp_diag`, EPROTONOSUPPORT where it has no socket monitor.
pub fn for_each(filter: Filter, mut each: impl FnMut(Seen)) -> SysResult<()> {
    dump(filter, |message| seen(message).map(&mut each))
}

/// A socket that waits for connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Where, maybe at any address.
    pub local: SocketAddr,
    /// Whether one of IPv6 at any address leaves IPv4 to others.
    pub v6only: bool,
    /// The interface that it is bound to, or 0.
    pub device: u32,
    /// Its inode.
    pub inode: u32,
}

/// The listeners of the current network namespace.
///
/// # Errors
/// As [`for_each`].
pub fn listeners() -> SysResult<Vec<Listener>> {
    of_both_families(Kind::Listening, listener)
}

/// The handshakes in the current network namespace that wait for their last ACK (SYN_RECV), by the connection that their
/// listener is to get.
///
/// # Errors
/// As [`for_each`].
pub fn requests() -> SysResult<Vec<FourTuple>> {
    of_both_families(Kind::Opening, |message| {
        Some(FourTuple { local: end(message, 4, 8)?, remote: end(message, 6, 24)? })
    })
}

fn of_both_families<T>(kind: Kind, read: impl Fn(&[u8]) -> Option<T>) -> SysResult<Vec<T>> {
    let mut all = Vec::new();
    for family in [Family::Ipv4, Family::Ipv6] {
        let found = dump(Filter { family, kind, local_port: None }, |message| {
            all.push(read(message)?);
            Some(())
        });
        match found {
            Err(SysError { errno: Errno::ENOENT, .. }) if family == Family::Ipv6 => {}
            other => other?,
        }
    }
    Ok(all)
}

/// A connection that no program has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unaccepted {
    /// Both ends.
    pub tuple: FourTuple,
    /// The state's number. SYN_RECV: TCP Fast Open has put it into the queue before its handshake was over.
    pub state: u8,
    /// The interface that it is bound to, or 0.
    pub device: u32,
    /// The largest segment that it sends now, options included.
    pub segment: u32,
}

/// The connections in the current network namespace that wait to be accepted at a port, by listeners of one family.
///
/// # Errors
/// As [`for_each`].
pub fn unaccepted(family: Family, port: u16) -> SysResult<Vec<Unaccepted>> {
    let mut all = Vec::new();
    dump(Filter { family, kind: Kind::Unaccepted, local_port: Some(port) }, |message| {
        // Only a socket has these; a request has not, and is in no queue yet.
        if word(message, INODE)? == 0
            && let Some(info) = attribute(message, TCP_INFO)
        {
            all.push(unaccepted_of(message, info)?);
        }
        Some(())
    })?;
    Ok(all)
}

fn unaccepted_of(message: &[u8], info: &[u8]) -> Option<Unaccepted> {
    const TIMESTAMPS: u8 = 1;
    const TIMESTAMPS_LEN: u32 = 12;
    // `tcpi_options`, `tcpi_snd_mss`.
    let options = if info.get(5)? & TIMESTAMPS == 0 { 0 } else { TIMESTAMPS_LEN };
    let tuple = FourTuple { local: end(message, 4, 8)?, remote: end(message, 6, 24)? };
    let (device, segment) = (word(message, DEVICE)?, word(info, 16)? + options);
    Some(Unaccepted { tuple, state: *message.get(1)?, device, segment })
}

/// INET_DIAG_INFO: a `struct tcp_info`.
const TCP_INFO: u16 = 2;

fn attribute(message: &[u8], wanted: u16) -> Option<&[u8]> {
    Some(Attributes::new(message.get(REPLY..)?).find(wanted).ok()??.bytes())
}

fn listener(message: &[u8]) -> Option<Listener> {
    const SKV6ONLY: u16 = 11;
    let v6only = attribute(message, SKV6ONLY).is_some_and(|value| value != [0]);
    let local = end(message, 4, 8)?;
    Some(Listener { local, v6only, device: word(message, DEVICE)?, inode: word(message, INODE)? })
}

/// Where a `struct inet_diag_msg` has the interface that the socket is bound to, and its inode.
const DEVICE: usize = 40;
const INODE: usize = REPLY - 4;

fn word(message: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?))
}

/// One end of a socket: its port and its address are at these places.
fn end(message: &[u8], port: usize, ip: usize) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(message.get(port..port + 2)?.try_into().ok()?);
    if i32::from(*message.first()?) == libc::AF_INET {
        let ip = <[u8; 4]>::try_from(message.get(ip..ip + 4)?).ok()?;
        return Some(SocketAddr::new(ip.into(), port));
    }
    let ip = Ipv6Addr::from(<[u8; 16]>::try_from(message.get(ip..ip + 16)?).ok()?);
    let scope = if ip.is_unicast_link_local() { word(message, DEVICE)? } else { 0 };
    Some(SocketAddrV6::new(ip, port, 0, scope).into())
}

/// Shows `each` the messages about all TCP sockets of a filter; `None` from it says that one makes no sense.
fn dump(filter: Filter, mut each: impl FnMut(&[u8]) -> Option<()>) -> SysResult<()> {
    const CALL: &str = "list sockets";
    const NLM_F_DUMP: u16 = 0x300;
    const NLMSG_DONE: u16 = 3;
    /// ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
    const CONNECTED: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
    const LISTEN: u32 = 1 << 10;
    const SYN_RECV: u32 = 1 << 3;
    const ESTABLISHED_OR_CLOSE_WAIT: u32 = 1 << 1 | 1 << 8;
    let states = match filter.kind {
        Kind::Listening => LISTEN,
        Kind::Connected => CONNECTED,
        Kind::Opening => SYN_RECV,
        Kind::Unaccepted => SYN_RECV | ESTABLISHED_OR_CLOSE_WAIT,
    };
    let mut id = [0; SOCK_ID];
    id[..2].copy_from_slice(&filter.local_port.unwrap_or(0).to_be_bytes());
    let socket = NetlinkSocket::sock_diag()?;
    socket.send(&request(
        SOCK_DIAG_BY_FAMILY,
        NLM_F_REQUEST | NLM_F_DUMP,
        [filter.family as u8, TCP, INFO, 0],
        states,
        &id,
    ))?;
    let mut buffer = vec![0; 1 << 16];
    let malformed = SysError { call: CALL, errno: Errno::EBADMSG };
    while let Some(len) = socket.receive(&mut buffer)? {
        for message in Messages::new(buffer.get(..len).unwrap_or_default()) {
            let Message { header, payload } = message.map_err(|_| malformed)?;
            match header.kind {
                SOCK_DIAG_BY_FAMILY => each(payload).ok_or(malformed)?,
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return Err(SysError { call: CALL, errno: error_of(payload) }),
                _ => {}
            }
        }
    }
    Err(malformed) // no end
}

/// What the monitor tells of the socket with these addresses in the current network namespace. A listener's remote
/// address is the unspecified one, with port 0.
///
/// # Errors
/// ENOENT without such a socket.
pub fn look_up(tuple: &FourTuple) -> SysResult<Seen> {
    let request = (SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, INFO);
    let answer = ask(&NetlinkSocket::sock_diag()?, request, tuple, &sock_id(tuple))?;
    let malformed = SysError { call: "look a socket up", errno: Errno::EBADMSG };
    answer.get(HEADER..).and_then(seen).ok_or(malformed)
}

/// Reads a `struct inet_diag_msg` with its attributes.
fn seen(message: &[u8]) -> Option<Seen> {
    const MD5SIG: u16 = 18;
    const ULP_INFO: u16 = 19;
    // Shown to the same callers as keys are, whether or not there is one.
    const MARK: u16 = 15;
    let half = |at: usize| word(message, 4 + at).map(u64::from);
    let cookie = half(COOKIE.start)? | half(COOKIE.start + 4)? << 32;
    let tuple = FourTuple { local: end(message, 4, 8)?, remote: end(message, 6, 24)? };
    let (inode, md5, shows_keys, upper_layer) = (word(message, INODE)?, false, false, false);
    let mut seen = Seen { cookie, inode, tuple, md5, shows_keys, upper_layer };
    for attribute in Attributes::new(message.get(REPLY..)?) {
        let (kind, value) = attribute.ok()?;
        seen.md5 |= kind == MD5SIG && !value.bytes().is_empty();
        seen.upper_layer |= kind == ULP_INFO;
        seen.shows_keys |= kind == MARK;
    }
    Some(seen)
}

/// What `monitor` tells of the connection with exactly these addresses, as on the wire, in its network namespace; `None`:
/// there is none. One that is bound to a device is found by the device's index only, any other by 0.
///
/// # Errors
/// ENOBUFS.
pub fn receiving(monitor: &NetlinkSocket, tuple: &FourTuple, device: u32) -> SysResult<Option<Receiving>> {
    let mut id = sock_id(tuple);
    if device != 0 {
        id[BOUND_TO].copy_from_slice(&device.to_ne_bytes());
    }
    Ok(find(monitor, tuple, &id)?.map(|found| found.receiving))
}

/// How far a connection's receiving half is, with nobody's descriptor to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiving {
    /// The state's number.
    pub state: u8,
    /// What waits to be read, a FIN included.
    pub unread: u32,
}

struct FoundSocket {
    owned: bool,
    cookie: [u8; 8],
    receiving: Receiving,
}

/// The socket with exactly these addresses, listeners left out.
fn find(socket: &NetlinkSocket, tuple: &FourTuple, id: &[u8; SOCK_ID]) -> SysResult<Option<FoundSocket>> {
    let found = match ask(socket, (SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0), tuple, id) {
        Err(SysError { errno: Errno::ENOENT, .. }) => return Ok(None),
        other => other?,
    };
    let Some(reply) = found.get(HEADER..HEADER + REPLY) else { return Ok(None) };
    let found_id = &reply[4..4 + SOCK_ID];
    // Without an exact match the kernel answers with a listener, whose remote port is 0.
    if found_id[PORTS] != id[PORTS] {
        return Ok(None);
    }
    let mut cookie = [0; 8];
    cookie.copy_from_slice(&found_id[COOKIE]);
    let mut unread = [0; 4];
    unread.copy_from_slice(&reply[UNREAD]);
    let receiving = Receiving { state: reply[1], unread: u32::from_ne_bytes(unread) };
    Ok(Some(FoundSocket { owned: reply[REPLY - 4..] != [0; 4], cookie, receiving }))
}

/// Addresses and ports in network order, any interface, any cookie.
fn sock_id(tuple: &FourTuple) -> [u8; SOCK_ID] {
    const ANY: u8 = 0xff;
    let mut id = [0; SOCK_ID];
    id[0..2].copy_from_slice(&tuple.local.port().to_be_bytes());
    id[2..4].copy_from_slice(&tuple.remote.port().to_be_bytes());
    put_ip(&mut id[4..20], tuple.local);
    put_ip(&mut id[20..36], tuple.remote);
    if let SocketAddr::V6(local) = tuple.local {
        id[BOUND_TO].copy_from_slice(&local.scope_id().to_ne_bytes());
    }
    id[COOKIE].fill(ANY);
    id
}

fn put_ip(field: &mut [u8], addr: SocketAddr) {
    match addr.ip() {
        IpAddr::V4(ip) => field[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => field.copy_from_slice(&ip.octets()),
    }
}

/// Sends one request and returns the answer's message; an acknowledgement of success is an empty one.
fn ask(
    socket: &NetlinkSocket,
    (kind, flags, extensions): (u16, u16, u8),
    tuple: &FourTuple,
    id: &[u8; SOCK_ID],
) -> SysResult<Vec<u8>> {
    const CALL: &str = "ask the socket monitor";
    let family = if tuple.local.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    socket.send(&request(kind, flags, [family as u8, TCP, extensions, 0], u32::MAX, id))?;
    let mut answer = vec![0; 4096];
    let len = socket.receive(&mut answer)?.ok_or(SysError { call: CALL, errno: Errno::ENOENT })?;
    answer.truncate(len);
    if answer.get(4..6) == Some(&NLMSG_ERROR.to_ne_bytes()) {
        match error_of(answer.get(HEADER..).unwrap_or_default()) {
            Errno::UnknownErrno => answer.clear(),
            errno => return Err(SysError { call: CALL, errno }),
        }
    }
    Ok(answer)
}

const TCP: u8 = 6;
/// INET_DIAG_INFO: the attributes about keys and upper layers come along with it only.
const INFO: u8 = 1 << 1;

/// A request: family, protocol and extensions, then states and id (`struct inet_diag_req_v2`).
fn request(kind: u16, flags: u16, what: [u8; 4], states: u32, id: &[u8; SOCK_ID]) -> Vec<u8> {
    let mut payload = [0; REQUEST];
    payload[..4].copy_from_slice(&what);
    payload[4..8].copy_from_slice(&states.to_ne_bytes());
    payload[8..].copy_from_slice(id);
    let mut writer = Writer::default();
    writer.plain(Header { kind, flags, seq: 0 }, &payload, |_| ());
    writer.into_bytes()
}

/// What a `struct nlmsgerr` says; an acknowledgement is the unknown error 0.
fn error_of(payload: &[u8]) -> Errno {
    let code = payload.get(..4).and_then(|word| word.try_into().ok()).map_or(0, i32::from_ne_bytes);
    Errno::from_raw(code.wrapping_neg())
}
