//! The TCP connections among the files.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use protobuf::Enum;

use super::connections::{self, Connections, Found, InetConnection};
use crate::connection::{FourTuple, State};
use crate::criu::image::allowance::{Allowance, in_tree, in_vector};
use crate::criu::image::container::{Magic, Reader};
use crate::criu::image::proto::sk_inet::Inet_sk_entry;
use crate::criu::image::proto::sk_opts::Sk_shutdown;
use crate::criu::image::wire::{self, Value};
use crate::criu::image::{Fault, ImageDir, ImageError};
use crate::encoding::decode::decode;
use crate::encoding::{port_of, state_of};

/// A TCP socket without a peer, as CRIU's images know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unconnected {
    /// Its file's id.
    pub file_id: u32,
    /// Its inode at the dump.
    pub ino: u32,
    /// Its network namespace.
    pub net_ns_id: Option<u32>,
}

/// Reads the connections, by file id, and the other TCP sockets.
pub(super) fn read(
    dir: &ImageDir,
    allowance: &mut Allowance,
) -> Result<(Connections, Vec<Unconnected>), ImageError> {
    let streams = streams(dir)?;
    let (mut found, mut unconnected) = (Found::default(), Vec::new());
    for_each(dir, |reader, entry, length| {
        if entry.dst_port() == 0 {
            let memory = allowance.take(in_vector::<Unconnected>(), length);
            memory.map_err(|fault| reader.bad_message(fault))?;
            let (file_id, ino, net_ns_id) = (entry.id(), entry.ino(), entry.ns_id);
            unconnected.push(Unconnected { file_id, ino, net_ns_id });
            return Ok(());
        }
        let connection = connection(entry, &streams).map_err(|fault| reader.bad_message(fault))?;
        let names = [&connection.ifname, &connection.bound_device].into_iter().flatten();
        let memory = connections::ENTRY + names.map(|name| name.len()).sum::<usize>();
        allowance.take(memory, length).map_err(|fault| reader.bad_message(fault))?;
        found.push(connection);
        Ok(())
    })?;
    let mut twice = None;
    let connections = Connections::of(found, |id| twice = Some(id));
    twice.map_or(Ok((connections, unconnected)), |id| Err(stands_twice(dir, id)))
}

/// An address that a socket is bound to, with the id of its network namespace.
pub type BoundAddress = (Option<u32>, IpAddr);

/// The addresses that TCP sockets are bound to, listeners too; but those of closed sockets, which need none, and those that may
/// be bound before they are there: IP_FREEBIND, which CRIU sets only after it has bound a listener of IPv4.
///
/// # Errors
/// What is wrong with the file.
pub fn bound_addresses(dir: &ImageDir) -> Result<BTreeSet<BoundAddress>, ImageError> {
    const CLOSE: u32 = State::Close as u32;
    let (mut addresses, mut allowance) = (BTreeSet::new(), Allowance::of_index());
    for_each(dir, |reader, entry, length| {
        let local = address(&entry, &entry.src_addr, entry.src_port(), "src_addr");
        let local = local.map_err(|fault| reader.bad_message(fault))?.ip().to_canonical();
        let freebind = entry.ip_opts.freebind() && (local.is_ipv6() || entry.dst_port() != 0);
        if !local.is_unspecified() && entry.state() != CLOSE && !freebind {
            let memory = allowance.take(in_tree::<BoundAddress>(), length);
            memory.map_err(|fault| reader.bad_message(fault))?;
            addresses.insert((entry.ns_id, local));
        }
        Ok(())
    })?;
    Ok(addresses)
}

/// Calls `visit` with the entry of each TCP socket, and how long it is in the file.
fn for_each(
    dir: &ImageDir,
    mut visit: impl FnMut(&Reader, Inet_sk_entry, usize) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let name_and_magic = [("files.img", Magic::Files), ("inetsk.img", Magic::InetSk)];
    for (name, magic) in name_and_magic {
        let Some(mut reader) = Reader::open_if_there(dir, name, magic)? else { continue };
        while let Some(message) = reader.next_bytes()? {
            let length = 4 + message.len();
            let entry = match magic {
                Magic::Files => inet_entry(message),
                _ => decode(message).map(Some),
            };
            match entry.map_err(|(at, fault)| reader.bad_byte(at, fault))? {
                Some(entry) if is_tcp(&entry) => visit(&reader, entry, length)?,
                _ => {}
            }
        }
        break;
    }
    Ok(())
}

/// The error that says where the connection `id` stands for the second time.
fn stands_twice(dir: &ImageDir, id: u32) -> ImageError {
    let mut times = 0;
    let second = for_each(dir, |reader, entry, _| {
        times += u32::from(entry.id() == id && entry.dst_port() != 0);
        let fault = || Fault::value("id", format!("{id} stands here twice"));
        if times == 2 { Err(reader.bad_message(fault())) } else { Ok(()) }
    });
    // Between the two times of reading the file has changed.
    second.err().unwrap_or_else(|| ImageError::malformed("files.img", 0, Fault::value("id", "changes")))
}

/// The inode numbers for which there are tcp-stream images.
fn streams(dir: &ImageDir) -> Result<HashSet<u32>, ImageError> {
    let mut streams = HashSet::new();
    dir.for_each_name(|name| {
        let hex = name.strip_prefix("tcp-stream-").and_then(|rest| rest.strip_suffix(".img"));
        streams.extend(hex.and_then(|hex| u32::from_str_radix(hex, 16).ok()));
    })?;
    Ok(streams)
}

/// The inet socket in a `file_entry`, if it is one. Looked for in the raw message: the entry of
/// another kind of file (an epoll descriptor lists all that it watches) may be large.
pub(super) fn inet_entry(file: &[u8]) -> Result<Option<Inet_sk_entry>, (usize, Fault)> {
    const ISK: u32 = 4;
    let mut found = None;
    for field in wire::fields(file) {
        let field = field.map_err(|e| (e.0, Fault::Wire))?;
        let (ISK, Value::Bytes(bytes)) = (field.number, field.value) else { continue };
        let start = field.span.end - bytes.len();
        let entry = decode(bytes).map_err(|(at, fault)| (start + at, fault))?;
        if found.replace(entry).is_some() {
            return Err((start, Fault::value("isk", "stands here twice")));
        }
    }
    Ok(found)
}

pub(super) fn is_tcp(entry: &Inet_sk_entry) -> bool {
    const SOCK_STREAM: u32 = libc::SOCK_STREAM.unsigned_abs();
    const IPPROTO_TCP: u32 = libc::IPPROTO_TCP.unsigned_abs();
    entry.type_() == SOCK_STREAM && entry.proto() == IPPROTO_TCP
}

fn connection(entry: Inet_sk_entry, streams: &HashSet<u32>) -> Result<InetConnection, Fault> {
    let tuple = FourTuple {
        local: address(&entry, &entry.src_addr, entry.src_port(), "src_addr")?,
        remote: address(&entry, &entry.dst_addr, entry.dst_port(), "dst_addr")?,
    };
    let file_id = entry.id();
    let has_stream = entry.ino.is_some_and(|ino| streams.contains(&ino));
    // Without a stream it is CRIU's own affair.
    if let Some(why) = tuple.impossible().filter(|_| has_stream) {
        return Err(Fault::value("src_addr, dst_addr", why));
    }
    let shutdown = entry.shutdown.map_or(0, |shutdown| shutdown.value());
    let opts = entry.opts.into_option().unwrap_or_default();
    Ok(InetConnection {
        file_id,
        ino: entry.ino.unwrap_or_default(),
        tuple,
        state: state_of(entry.state.unwrap_or_default())?,
        net_ns_id: entry.ns_id,
        ifname: entry.ifname.map(Into::into),
        shutdown_read: shutdown & Sk_shutdown::READ.value() != 0,
        shutdown_write: shutdown & Sk_shutdown::WRITE.value() != 0,
        reuseaddr: opts.reuseaddr(),
        reuseport: opts.so_reuseport,
        bound_device: opts.so_bound_dev.map(Into::into),
        has_stream,
    })
}

/// CRIU copies addresses into arrays of `u32` as they lie in memory, in network byte order; hence
/// the words' native bytes are the address.
pub(super) fn address(
    entry: &Inet_sk_entry,
    words: &[u32],
    port: u32,
    field: &'static str,
) -> Result<SocketAddr, Fault> {
    const AF_INET: u32 = libc::AF_INET.unsigned_abs();
    const AF_INET6: u32 = libc::AF_INET6.unsigned_abs();
    let port = port_of(port, field)?;
    match (entry.family(), words) {
        (AF_INET, [word, ..]) => Ok((Ipv4Addr::from(word.to_ne_bytes()), port).into()),
        (AF_INET6, [a, b, c, d]) => {
            let mut octets = [0; 16];
            for (bytes, word) in octets.chunks_exact_mut(4).zip([a, b, c, d]) {
                bytes.copy_from_slice(&word.to_ne_bytes());
            }
            Ok((Ipv6Addr::from(octets), port).into())
        }
        (family, words) => Err(Fault::value(field, format!("{} words in family {family}", words.len()))),
    }
}
