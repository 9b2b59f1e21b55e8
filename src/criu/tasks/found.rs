//! What is found behind the descriptors of tasks, and what is wrong with it.

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::duplicates::Slot;
use crate::four_tuple::FourTuple;
use crate::kernel::SysError;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::process::RemoteFd;

/// A connection that is to be carried.
#[derive(Debug)]
pub struct FoundConnection {
    /// Our duplicate of the socket.
    pub socket: Slot,
    /// Its inode, which names its image.
    pub inode: u32,
    /// The kernel's number for it (`SO_COOKIE`), which no other socket gets until the next boot.
    pub cookie: u64,
    /// Both ends.
    pub tuple: FourTuple,
    /// SO_REUSEADDR, which the kernel forgets when repair mode ends.
    pub reuse_addr: bool,
    /// The socket's own network namespace.
    pub ns: NetNs,
    /// Where it was found.
    pub place: Place,
}

/// A socket that has no peer: a listener, or one that was never connected. CRIU makes it anew.
#[derive(Debug)]
pub struct Unconnected {
    /// Our duplicate of the socket.
    pub socket: Rc<OwnedFd>,
    /// Its inode, by which CRIU's images know it.
    pub inode: u32,
    /// As [`FoundConnection::cookie`].
    pub cookie: u64,
    /// Its own end.
    pub local: SocketAddr,
    /// The socket's own network namespace.
    pub ns: NetNs,
    /// Where it was found.
    pub place: Place,
}

/// The TCP sockets of tasks.
#[derive(Debug, Default)]
pub struct Found {
    /// Those with a peer.
    pub connections: Vec<FoundConnection>,
    /// Those without.
    pub unconnected: Vec<Unconnected>,
}

/// Where a socket was found, for messages.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// In a task's table.
    Table(i32, RemoteFd),
    /// In flight in a unix socket of a task.
    InFlight(i32, RemoteFd),
    /// Given to us by criu.
    Given,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(pid, fd) => write!(f, "pid {pid} fd {fd}"),
            Self::InFlight(pid, fd) => write!(f, "in flight in the unix socket of pid {pid} fd {fd}"),
            Self::Given => f.write_str("given by criu"),
        }
    }
}

/// A task's sockets cannot all be found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// `/proc` cannot be read.
    #[error("pid {0}: cannot be examined in /proc: {1}")]
    Proc(i32, std::io::Error),
    /// A system call failed.
    #[error("{0}: {1}")]
    Sys(Place, SysError),
    /// The socket's namespace is out of reach.
    #[error("{0}")]
    NetNs(Place, #[source] NetNsError),
    /// The socket cannot be carried.
    #[error("{tuple} ({place}): {why}")]
    Refused {
        /// The connection.
        tuple: FourTuple,
        /// Where it was found.
        place: Place,
        /// Why.
        why: &'static str,
    },
    /// A socket without a peer has what CRIU would lose.
    #[error("{local} ({place}), not connected: {why}")]
    RefusedUnconnected {
        /// The socket's own end.
        local: SocketAddr,
        /// Where it was found.
        place: Place,
        /// Why.
        why: &'static str,
    },
    /// The socket monitor failed.
    #[error("{ns}: the keys of the connections cannot be told")]
    Monitor {
        /// The namespace that was asked for.
        ns: NetNs,
        /// The kernel's answer.
        source: SysError,
    },
    /// A network namespace could not be entered.
    #[error(transparent)]
    Enter(#[from] NetNsError),
}
