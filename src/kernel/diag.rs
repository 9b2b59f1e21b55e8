//! The socket monitor (`sock_diag(7)`): finds and destroys sockets that no process has any more.

use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use super::netlink::NetlinkSocket;
use super::{SysError, SysResult};
use crate::four_tuple::FourTuple;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;

const HEADER: usize = 16;
/// `struct inet_diag_sockid`.
const SOCK_ID: usize = 48;
/// `struct inet_diag_req_v2`: eight bytes, then the id.
const REQUEST: usize = 8 + SOCK_ID;
/// `struct inet_diag_msg`: four bytes, the id, then five words, of which the last is the inode.
const REPLY: usize = 4 + SOCK_ID + 20;
const PORTS: std::ops::Range<usize> = 0..4;
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
    let Some(found) = find(socket, tuple)?.filter(|found| !found.owned) else { return Ok(false) };
    let mut id = sock_id(tuple);
    id[COOKIE].copy_from_slice(&found.cookie);
    match ask(socket, Request::DESTROY, tuple, &id) {
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
        if find(&socket, &tuple.on_wire())?.is_some_and(|found| found.owned) {
            return Ok(Some(*tuple));
        }
    }
    Ok(None)
}

/// Whether the segments of the socket with these addresses in the current network namespace are signed by keys of its
/// program (TCP_MD5SIG, RFC 2385). A listener's remote address is the unspecified one, with port 0.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN, by which alone the kernel tells; ENOENT without such a socket.
pub fn has_md5_keys(tuple: &FourTuple) -> SysResult<bool> {
    const INET_DIAG_MD5SIG: u16 = 18;
    const INET_DIAG_MARK: u16 = 15;
    const INET_DIAG_INFO: u8 = 2;
    // What a protocol adds comes with its information only.
    let request = Request { extensions: 1 << (INET_DIAG_INFO - 1), ..Request::FIND };
    let found = ask(&NetlinkSocket::sock_diag()?, request, tuple, &sock_id(tuple))?;
    let kinds = attribute_kinds(found.get(HEADER + REPLY..).unwrap_or_default());
    // A mark is told to the same callers as keys are, whether or not there is one.
    if !kinds.contains(&INET_DIAG_MARK) {
        return Err(SysError { call: "ask the socket monitor for keys", errno: Errno::EPERM });
    }
    Ok(kinds.contains(&INET_DIAG_MD5SIG))
}

/// The types of all netlink attributes in a row.
fn attribute_kinds(mut attributes: &[u8]) -> Vec<u16> {
    let mut kinds = Vec::new();
    while let [l0, l1, k0, k1, ..] = *attributes {
        kinds.push(u16::from_ne_bytes([k0, k1]));
        let length = usize::from(u16::from_ne_bytes([l0, l1])).max(4).next_multiple_of(4);
        attributes = attributes.get(length..).unwrap_or_default();
    }
    kinds
}

struct FoundSocket {
    owned: bool,
    cookie: [u8; 8],
}

/// The socket with exactly these addresses, listeners left out.
fn find(socket: &NetlinkSocket, tuple: &FourTuple) -> SysResult<Option<FoundSocket>> {
    let id = sock_id(tuple);
    let found = match ask(socket, Request::FIND, tuple, &id) {
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
    Ok(Some(FoundSocket { owned: reply[REPLY - 4..] != [0; 4], cookie }))
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
        id[36..40].copy_from_slice(&local.scope_id().to_ne_bytes());
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

/// What is asked for.
#[derive(Clone, Copy)]
struct Request {
    kind: u16,
    flags: u16,
    /// A bit for each kind of attribute that is wanted.
    extensions: u8,
}

impl Request {
    const FIND: Self = Self { kind: SOCK_DIAG_BY_FAMILY, flags: NLM_F_REQUEST, extensions: 0 };
    const DESTROY: Self = Self { kind: SOCK_DESTROY, flags: NLM_F_REQUEST | NLM_F_ACK, extensions: 0 };
}

/// Sends one request and returns the answer's message; an acknowledgement of success is an empty one.
fn ask(
    socket: &NetlinkSocket,
    request: Request,
    tuple: &FourTuple,
    id: &[u8; SOCK_ID],
) -> SysResult<Vec<u8>> {
    const CALL: &str = "ask the socket monitor";
    const TCP: u8 = 6;
    let family: u8 = if tuple.local.is_ipv4() { 2 } else { 10 };
    let length: u32 = 16 + 56;
    const { assert!(HEADER + REQUEST == 16 + 56) };
    let mut message = Vec::with_capacity(HEADER + REQUEST);
    message.extend(length.to_ne_bytes());
    message.extend(request.kind.to_ne_bytes());
    message.extend(request.flags.to_ne_bytes());
    message.extend([0; 8]); // sequence and port
    message.extend([family, TCP, request.extensions, 0]);
    message.extend(u32::MAX.to_ne_bytes()); // in any state
    message.extend(id);
    socket.send(&message)?;
    let mut answer = vec![0; 4096];
    let len = socket.receive(&mut answer)?.ok_or(SysError { call: CALL, errno: Errno::ENOENT })?;
    answer.truncate(len);
    if answer.get(4..6) == Some(&NLMSG_ERROR.to_ne_bytes()) {
        let code = answer
            .get(HEADER..HEADER + 4)
            .and_then(|word| word.try_into().ok())
            .map_or(0, i32::from_ne_bytes);
        if code != 0 {
            return Err(SysError { call: CALL, errno: Errno::from_raw(code.wrapping_neg()) });
        }
        answer.clear();
    }
    Ok(answer)
}
