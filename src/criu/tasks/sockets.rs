//! The TCP connections of tasks: in their descriptor tables, and in flight in their unix sockets.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use crate::connection::FourTuple;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::process::RemoteFd;
use crate::kernel::{SysError, sockopt, tcp};
use crate::repair::four_tuple;

use super::{Task, in_flight};

/// A connection that is to be carried.
#[derive(Debug)]
pub struct Found {
    /// Our duplicate of the socket.
    pub socket: OwnedFd,
    /// Its inode, which names its image.
    pub inode: u32,
    /// The kernel's number for it (`SO_COOKIE`), which no other socket gets until the next boot.
    pub cookie: u64,
    /// Both ends.
    pub tuple: FourTuple,
    /// The socket's own network namespace.
    pub ns: NetNs,
    /// Where it was found.
    pub place: Place,
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
    #[error("{0}: {1}")]
    NetNs(Place, NetNsError),
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
}

/// Visits each socket once, however many descriptors lead to it: those in tasks' tables and, inside unix sockets,
/// those in flight.
#[derive(Debug, Default)]
pub struct Walker {
    inodes: HashSet<u64>,
    unix: HashSet<u64>,
}

impl Walker {
    /// Calls `visit` with a duplicate of every socket of `task` that was not seen before and is no unix socket.
    ///
    /// # Errors
    /// [`FindError`], or that of `visit`; what is left is not visited then.
    pub fn walk(
        &mut self,
        task: &Task,
        mut visit: impl FnMut(OwnedFd, Place) -> Result<(), FindError>,
    ) -> Result<(), FindError> {
        let sockets = task.sockets().map_err(|error| FindError::Proc(task.pid, error))?;
        for (fd, inode) in sockets {
            if !self.inodes.insert(inode) {
                continue;
            }
            let place = Place::Table(task.pid, fd);
            let socket = match task.copy(fd) {
                Err(SysError { errno: Errno::EBADF, .. }) => continue, // closed meanwhile: the task runs
                other => other.map_err(|error| FindError::Sys(place, error))?,
            };
            if in_flight::is_unix(socket.as_fd()) {
                self.queued_in(&socket, Place::InFlight(task.pid, fd), &mut visit)?;
            } else {
                visit(socket, place)?;
            }
        }
        Ok(())
    }

    fn queued_in(
        &mut self,
        unix: &OwnedFd,
        place: Place,
        visit: &mut dyn FnMut(OwnedFd, Place) -> Result<(), FindError>,
    ) -> Result<(), FindError> {
        let sys = |error| FindError::Sys(place, error);
        let packets = in_flight::peek(unix.as_fd()).map_err(sys)?;
        for socket in packets.into_iter().flat_map(|packet| packet.files) {
            if !in_flight::is_unix(socket.as_fd()) {
                visit(socket, place)?;
            } else if self.unix.insert(sockopt::cookie(socket.as_fd()).map_err(sys)?) {
                self.queued_in(&socket, place, visit)?;
            }
        }
        Ok(())
    }
}

/// Finds each connection once, however many descriptors lead to it.
#[derive(Debug, Default)]
pub struct Finder {
    walker: Walker,
    known: Known,
}

#[derive(Debug, Default)]
struct Known {
    cookies: HashSet<u64>,
    namespaces: HashMap<u64, NetNs>,
}

impl Finder {
    /// The connections of a task that were not found before.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn of_task(&mut self, task: &Task) -> Result<Vec<Found>, FindError> {
        let mut found = Vec::new();
        let Self { walker, known } = self;
        walker.walk(task, |socket, place| {
            found.extend(known.connection(socket, place)?);
            Ok(())
        })?;
        Ok(found)
    }

    /// The connection behind a descriptor: `None` for another kind of file, for a socket without a peer, and
    /// for a connection that was found before.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn connection(&mut self, socket: OwnedFd, place: Place) -> Result<Option<Found>, FindError> {
        self.known.connection(socket, place)
    }
}

impl Known {
    fn connection(&mut self, socket: OwnedFd, place: Place) -> Result<Option<Found>, FindError> {
        let sys = |error| FindError::Sys(place, error);
        if !sockopt::is_tcp(socket.as_fd()) {
            return Ok(None);
        }
        // A socket that never had a peer (a listener, a fresh one) is CRIU's matter.
        let Ok(tuple) = four_tuple(socket.as_fd()) else { return Ok(None) };
        if tuple.remote.port() == 0 {
            return Ok(None);
        }
        let cookie = sockopt::cookie(socket.as_fd()).map_err(sys)?;
        if !self.cookies.insert(cookie) {
            return Ok(None);
        }
        if tcp::has_upper_layer(socket.as_fd()).map_err(sys)? {
            let why = "a protocol on top of TCP in the kernel (TLS) cannot be carried";
            return Err(FindError::Refused { tuple, place, why });
        }
        let inode = nix::sys::stat::fstat(&socket)
            .map_err(|errno| sys(SysError { call: "stat a socket", errno }))?
            .st_ino;
        let Ok(inode) = u32::try_from(inode) else {
            let why = "its inode number does not fit CRIU's images";
            return Err(FindError::Refused { tuple, place, why });
        };
        let ns = self.namespace(&socket, place)?;
        Ok(Some(Found { socket, inode, cookie, tuple, ns, place }))
    }

    fn namespace(&mut self, socket: &OwnedFd, place: Place) -> Result<NetNs, FindError> {
        let open = || NetNs::of_socket(socket.as_fd()).map_err(|error| FindError::NetNs(place, error));
        let Ok(cookie) = sockopt::netns_cookie(socket.as_fd()) else { return open() };
        match self.namespaces.get(&cookie) {
            Some(ns) => Ok(ns.clone()),
            None => Ok(self.namespaces.entry(cookie).or_insert(open()?).clone()),
        }
    }
}
