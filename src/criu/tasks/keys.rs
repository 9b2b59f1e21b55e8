//! What the socket monitor tells of sockets and no image can hold: signatures with keys that nobody can read back
//! (TCP-MD5, RFC 2385), and protocols on top of TCP in the kernel.
//!
//! Without its key a restored connection would send segments that its peer drops, silently.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use super::duplicates::{Duplicates, Opened};
use super::found::{FindError, FoundConnection, Unconnected};
use crate::connection::State;
use crate::kernel::diag::{self, Family, Filter};
use crate::kernel::netns::NetNs;
use crate::kernel::tcp;

pub(super) const AO: &str = "it has keys for TCP-AO (RFC 5925), which cannot be read back from the kernel: \
    close it, or have its keys removed (TCP_AO_DEL_KEY), before the dump";
const MD5: &str = "it has keys for TCP-MD5 signatures (RFC 2385), which cannot be read back from the kernel: \
    close it, or have its keys removed (TCP_MD5SIG with no key), before the dump";
const UPPER_LAYER: &str = "a protocol on top of TCP in the kernel (TLS) cannot be carried";
const HIDDEN: &str = "the socket monitor does not show it, so that it may have keys that would be lost";

/// A dump of the monitor can miss a socket whose neighbours in a hash chain go away meanwhile.
const TRIES: usize = 3;

/// Refuses the first of these sockets that cannot be carried. One dump of the monitor per network namespace, family, and
/// kind of socket.
pub(super) fn refuse(
    found: &[FoundConnection],
    unconnected: &[Unconnected],
    duplicates: &Duplicates,
) -> Result<(), FindError> {
    for (ns, sockets) in by_namespace(unconnected.iter().map(|socket| (&socket.ns, socket))) {
        refuse_listeners(ns, &sockets)?;
    }
    for (ns, connections) in by_namespace(found.iter().map(|connection| (&connection.ns, connection))) {
        refuse_connections(ns, &connections, duplicates)?;
    }
    Ok(())
}

fn by_namespace<'a, T>(sockets: impl Iterator<Item = (&'a NetNs, T)>) -> HashMap<&'a NetNs, Vec<T>> {
    let mut by_namespace: HashMap<_, Vec<T>> = HashMap::new();
    sockets.for_each(|(ns, socket)| by_namespace.entry(ns).or_default().push(socket));
    by_namespace
}

fn refuse_listeners(ns: &NetNs, sockets: &[&Unconnected]) -> Result<(), FindError> {
    let wanted: HashMap<u64, &Unconnected> = sockets.iter().map(|socket| (socket.cookie, *socket)).collect();
    let ends = sockets.iter().map(|socket| socket.local);
    let mut refused = None;
    monitor(ns, ends, diag::Kind::Listening, |seen| {
        if seen.md5 {
            refused = refused.or(wanted.get(&seen.cookie).copied());
        }
    })?;
    match refused {
        Some(Unconnected { local, place, .. }) => {
            Err(FindError::RefusedUnconnected { local: *local, place: *place, why: MD5 })
        }
        None => Ok(()),
    }
}

fn refuse_connections(
    ns: &NetNs,
    connections: &[&FoundConnection],
    duplicates: &Duplicates,
) -> Result<(), FindError> {
    let mut left: HashMap<u64, &FoundConnection> =
        connections.iter().map(|connection| (connection.cookie, *connection)).collect();
    let mut opened = Opened::default();
    for _ in 0..TRIES {
        let ends: Vec<SocketAddr> = left.values().map(|connection| connection.tuple.local).collect();
        let mut refused = None;
        monitor(ns, ends.into_iter(), diag::Kind::Connected, |seen| {
            if let Some(connection) = left.remove(&seen.cookie) {
                let why = self::refused(seen.md5, seen.upper_layer);
                refused = refused.or(why.map(|why| (connection, why)));
            }
        })?;
        if let Some((connection, why)) = refused {
            return Err(refuse_one(connection, why));
        }
        // A closed connection is in no table of the kernel, and needs keys no more.
        let mut closed = HashSet::new();
        for (cookie, connection) in &left {
            let sys = |error| FindError::Sys(connection.place, error);
            let socket = duplicates.get(connection.socket, &mut opened).map_err(sys)?;
            if tcp::has_upper_layer(socket).map_err(sys)? {
                return Err(refuse_one(connection, UPPER_LAYER));
            }
            if tcp::info(socket).is_ok_and(|info| info.state == State::Close as u8) {
                closed.insert(*cookie);
            }
        }
        left.retain(|cookie, _| !closed.contains(cookie));
        if left.is_empty() {
            return Ok(());
        }
    }
    left.values().next().map_or(Ok(()), |connection| Err(refuse_one(connection, HIDDEN)))
}

/// Why a connection of which the monitor tells this cannot be carried.
pub(super) fn refused(md5: bool, upper_layer: bool) -> Option<&'static str> {
    if md5 { Some(MD5) } else { upper_layer.then_some(UPPER_LAYER) }
}

fn refuse_one(connection: &FoundConnection, why: &'static str) -> FindError {
    FindError::Refused { tuple: connection.tuple, place: connection.place, why }
}

/// Asks for the families of these ends.
fn monitor(
    ns: &NetNs,
    ends: impl Iterator<Item = SocketAddr>,
    kind: diag::Kind,
    mut each: impl FnMut(diag::Seen),
) -> Result<(), FindError> {
    let mut ports: HashMap<Family, HashSet<u16>> = HashMap::new();
    for end in ends {
        let family = if end.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
        ports.entry(family).or_default().insert(end.port());
    }
    let asked = ns.run(|| {
        ports.iter().try_for_each(|(&family, ports)| {
            let local_port = ports.iter().copied().next().filter(|port| ports.len() == 1 && *port != 0);
            diag::for_each(Filter { family, kind, local_port }, &mut each)
        })
    })?;
    asked.map_err(|source| FindError::Monitor { ns: ns.clone(), source })
}
