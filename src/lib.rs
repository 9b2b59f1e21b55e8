//! Live TCP connections, out of one socket and into another, without the peer noticing.
//!
//! A connection is more than its socket's descriptor: it is where both ends are in their sequences, what they agreed on
//! at the beginning, how much each may send, and the bytes that one end has written and the other has not yet taken.
//! Linux keeps all of that in the socket, and it ends with the socket: a FIN or RST tells the peer so.
//!
//! With this crate a connection can outlive its socket. [`freeze`] reads all of it into a [`Connection`], which is plain
//! data: it can be stored, or sent to another process. [`thaw`] makes a new socket that continues where the old one was,
//! in the same process, another one, or on another host that has the same address by then.
//!
//! ```no_run
//! use std::net::TcpStream;
//! use soccr::Connection;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let stream = TcpStream::connect("192.0.2.1:7")?;
//!
//! // Locks the connection from the network, then reads it.
//! let (frozen, refused) = soccr::freeze([stream]);
//! for refused in refused {
//!     eprintln!("{}", soccr::chain(&refused.error)); // `refused.socket` is as it was
//! }
//! let bytes: Vec<Vec<u8>> = frozen.connections().map(Connection::to_bytes).collect();
//! // Up to here there is a way back: `frozen.resume()`, or dropping it, and nothing has happened.
//! drop(frozen.release()); // closes the socket without a word, and the lock stays
//!
//! // Here, or in whatever process has the bytes:
//! let connections = bytes.iter().map(|bytes| Connection::from_bytes(bytes)).collect::<Result<Vec<_>, _>>()?;
//! for socket in soccr::thaw(&connections)? {
//!     let stream = TcpStream::from(socket); // the peer has heard nothing of all this
//! }
//! # Ok(()) }
//! ```
//!
//! Between the two no socket has the connection, and a host answers a segment for a connection that it does not have with
//! RST. So `freeze` also tells the kernel to drop the connection's packets, both ways: the *network lock*, a table of
//! nf_tables with one element for each connection. It stays until `thaw` has made all sockets. To the peer this is a
//! network that loses packets for a while: it sends them again, and its patience is the limit (TCP's own timeouts are
//! minutes; what the peer's program demands may be less).
//!
//! # Use cases
//!
//! - A server or proxy that hands its connections to its own next version: `examples/proxy.rs`.
//! - A process that ends, and another that goes on later: `examples/save_restore.rs`.
//! - Moving connections to another host together with their address.
//! - Checkpoint and restore of whole processes: the project's plugin for CRIU is built upon this crate.
//!
//! # What travels
//!
//! State (any but LISTEN, SYN_RECV and TIME_WAIT), both sequences, windows, MSS, window scaling, SACK, timestamps, ECN, both
//! queues, FINs sent and received, and the socket options that a program may have set.
//!
//! # Limitations
//!
//! - The caller needs CAP_NET_ADMIN and CAP_NET_RAW in the user namespace of the sockets' network namespace; buffers
//!   larger than net.core.wmem_max want CAP_NET_ADMIN in the first one.
//! - Connections with unread urgent data, keys of TCP-AO or TCP-MD5, a filter that is an eBPF program, or a protocol on top of TCP in the
//!   kernel (TLS, SMC) are refused by name.
//! - ECN, on which only SYN segments agree, wants CAP_SYS_ADMIN in the first user namespace (a BPF program asks for it), or
//!   net.ipv4.tcp_ecn=1: elsewhere a connection goes on without it.
//! - Congestion control's memory (window, round trip time) does not travel.
//! - Flags of the descriptor do not travel: the new socket is close-on-exec and in blocking mode.
//! - A process that dies between `freeze` and `thaw` leaves the lock, with no socket behind it: `soccr status` shows it, `soccr clean`
//!   removes it, and a lease ([`LockOptions`]) makes the kernel do so.
//! - Under connection tracking and address translation of another namespace or host, that has to let the connection's packets pass as
//!   before.
//! - [`Connection::to_bytes`] holds what program and peer have told each other: it is as secret as that.
//!
//! # Compatibility
//!
//! IPv4 and IPv6; nf_tables, or iptables by [`freeze_with`]. Tried on Linux 5.10 to 7.2, on x86-64 only. Bytes of this version
//! are read by later ones; fields of later versions are kept by this one.
//!
//! # How it is tested
//!
//! On real sockets in network namespaces: each state, address family and queue (`tests/engine.rs`), this interface with
//! its failures (`tests/handover.rs`), both examples with peers that check every byte (`tests/examples.rs`), and bytes
//! from hostile hands (unit tests and fuzz targets). With CRIU, the project's end-to-end tests, fault injection, and
//! a soak under loss, delay and reordering.

#![deny(unsafe_code, missing_docs)]
// CRIU's half uses more of the engine than TCP's does.
#![cfg_attr(not(feature = "criu"), allow(dead_code, unused_imports))]

#[doc(hidden)]
pub mod accept_queue;
mod carried;
mod chain;
#[doc(hidden)]
pub mod checkpoint;
pub mod connection;
#[cfg(feature = "criu")]
#[doc(hidden)]
pub mod criu;
mod encoding;
#[doc(hidden)]
pub mod forge;
mod four_tuple;
mod freeze;
#[doc(hidden)]
pub mod kernel;
#[doc(hidden)]
pub mod lock;
#[doc(hidden)]
pub mod repair;
#[doc(hidden)]
pub mod restore;
mod thaw;

pub use carried::{BadBytes, Connection};
pub use chain::chain;
pub use connection::FourTuple;
pub use freeze::{Cause, FreezeError, Frozen, Refused, freeze, freeze_unlocked, freeze_with};
#[doc(hidden)]
pub use freeze::{freeze_each, lock_name};
pub use lock::{LockOptions, Method};
pub use thaw::{ThawError, thaw, thaw_with};
#[doc(hidden)]
pub use thaw::{build, thaw_each};

/// Ways into parsers that are otherwise private, for the fuzz targets in `fuzz/`. Not a part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    /// Reads `datagrams` as the kernel's answer to each request that this crate sends to nf_tables.
    pub fn read_netlink_answers(datagrams: &[&[u8]]) {
        crate::lock::read_answers(datagrams);
    }
}
