//! The TCP connections of tasks: in their descriptor tables, and in flight in their unix sockets.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::kernel::diag::Seen;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::{SysError, addr, ao, options, sockopt};
use crate::repair::four_tuple;

use super::duplicates::Duplicates;
use super::found::{FindError, Found, FoundConnection, Place, Unconnected};
use super::monitored::{Monitored, Table};
use super::{Task, in_flight, keys};

/// Visits each socket once, however many descriptors lead to it: those in tasks' tables and, inside unix sockets,
/// those in flight.
#[derive(Debug, Default)]
pub struct Walker {
    inodes: HashSet<u64>,
    unix: HashSet<u64>,
}

/// Takes a duplicate of a socket, or gives it back: only a unix socket that was given back is looked into.
type Visit<'a> = &'a mut dyn FnMut(OwnedFd, Place) -> Result<Option<OwnedFd>, FindError>;

impl Walker {
    /// Calls `visit` with a duplicate of every socket of `task` that was not seen before, and of those in flight in its unix
    /// sockets.
    ///
    /// # Errors
    /// [`FindError`], or that of `visit`; what is left is not visited then.
    pub fn walk(
        &mut self,
        task: &Task,
        mut visit: impl FnMut(OwnedFd, Place) -> Result<Option<OwnedFd>, FindError>,
    ) -> Result<(), FindError> {
        self.walk_table(task, table(task)?, &mut visit)
    }

    fn walk_table(&mut self, task: &Task, table: Table, visit: Visit<'_>) -> Result<(), FindError> {
        for (fd, inode) in table {
            if !self.inodes.insert(inode) {
                continue;
            }
            let place = Place::Table(task.pid, fd);
            let socket = match task.copy(fd) {
                Err(SysError { errno: Errno::EBADF, .. }) => continue, // closed meanwhile: the task runs
                other => other.map_err(|error| FindError::Sys(place, error))?,
            };
            if let Some(socket) = visit(socket, place)?
                && in_flight::is_unix(socket.as_fd())
            {
                self.queued_in(&socket, Place::InFlight(task.pid, fd), visit)?;
            }
        }
        Ok(())
    }

    fn queued_in(&mut self, unix: &OwnedFd, place: Place, visit: Visit<'_>) -> Result<(), FindError> {
        let sys = |error| FindError::Sys(place, error);
        let messages = in_flight::peek(unix.as_fd()).map_err(sys)?;
        for socket in messages.into_iter().flat_map(|message| message.files) {
            if let Some(socket) = visit(socket, place)?
                && in_flight::is_unix(socket.as_fd())
                && self.unix.insert(sockopt::cookie(socket.as_fd()).map_err(sys)?)
            {
                self.queued_in(&socket, place, visit)?;
            }
        }
        Ok(())
    }
}

fn table(task: &Task) -> Result<Table, FindError> {
    task.sockets().map_err(|error| FindError::Proc(task.pid, error))
}

/// Finds each connection once, however many descriptors lead to it, and refuses those that cannot be carried.
#[derive(Debug, Default)]
pub struct Finder {
    walker: Walker,
    seen: HashSet<u64>,
    namespaces: SocketNamespaces,
    /// Whether the kernel has TCP-AO at all, once that is known.
    no_ao: bool,
}

/// What a descriptor is to the finder.
enum Kind {
    Connection(FoundConnection),
    /// One of which the monitor has told already what has to be known.
    Monitored(FoundConnection),
    Unconnected(Unconnected),
    /// A TCP socket that was found before.
    Known,
    Other(OwnedFd),
}

impl Finder {
    /// The sockets of a task that were not found before.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn of_task(&mut self, task: &Task, duplicates: &mut Duplicates) -> Result<Found, FindError> {
        self.of_tasks(std::slice::from_ref(task), duplicates)
    }

    /// The sockets of tasks that were not found before.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn of_tasks(&mut self, tasks: &[Task], duplicates: &mut Duplicates) -> Result<Found, FindError> {
        let tables: Vec<Table> = tasks.iter().map(table).collect::<Result<_, _>>()?;
        let mut monitored = Monitored::of(tasks, &tables);
        let (mut found, mut asked) = (Found::default(), Vec::new());
        let mut walker = std::mem::take(&mut self.walker);
        for (task, table) in tasks.iter().zip(tables) {
            walker.walk_table(task, table, &mut |socket, place| {
                match self.examine(socket, place, &mut monitored, duplicates)? {
                    Kind::Monitored(connection) => found.connections.push(connection),
                    Kind::Connection(connection) => asked.push(connection),
                    Kind::Unconnected(socket) => found.unconnected.push(socket),
                    Kind::Known => {}
                    Kind::Other(socket) => return Ok(Some(socket)),
                }
                Ok(None)
            })?;
        }
        self.walker = walker;
        keys::refuse(&asked, &found.unconnected, duplicates)?;
        found.connections.append(&mut asked);
        Ok(found)
    }

    /// Whether the socket with this inode was come across.
    #[must_use]
    pub fn knows(&self, inode: u64) -> bool {
        self.walker.inodes.contains(&inode)
    }

    /// The connection behind a descriptor: `None` for another kind of file, for a socket without a peer, and
    /// for a connection that was found before.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn connection(
        &mut self,
        socket: OwnedFd,
        place: Place,
        duplicates: &mut Duplicates,
    ) -> Result<Option<FoundConnection>, FindError> {
        let examined = self.examine(socket, place, &mut Monitored::default(), duplicates)?;
        let Kind::Connection(found) = examined else {
            return Ok(None);
        };
        keys::refuse(std::slice::from_ref(&found), &[], duplicates)?;
        Ok(Some(found))
    }

    fn examine(
        &mut self,
        socket: OwnedFd,
        place: Place,
        monitored: &mut Monitored,
        duplicates: &mut Duplicates,
    ) -> Result<Kind, FindError> {
        let sys = |error| FindError::Sys(place, error);
        let cookie = sockopt::cookie(socket.as_fd()).map_err(sys)?;
        let told = monitored.take(cookie);
        if told.is_none() && !sockopt::is_tcp(socket.as_fd()) {
            return Ok(Kind::Other(socket));
        }
        if !self.seen.insert(cookie) {
            return Ok(Kind::Known);
        }
        let refused = if !self.no_ao && self.has_ao_keys(&socket, place)? {
            Some(keys::AO)
        } else {
            options::refused(socket.as_fd()).map_err(sys)?
        };
        let reuse_addr = sockopt::reuse_addr(socket.as_fd()) == Ok(1);
        let mut connection = |socket, inode, tuple, ns| {
            let socket = duplicates.add(socket).map_err(sys)?;
            Ok(FoundConnection { socket, inode, cookie, tuple, reuse_addr, ns, place })
        };
        if let Some((Seen { inode, tuple, md5, upper_layer, .. }, ns)) = told {
            return match refused.or(keys::refused(md5, upper_layer)) {
                Some(why) => Err(FindError::Refused { tuple, place, why }),
                None => connection(socket, inode, tuple, ns).map(Kind::Monitored),
            };
        }
        let tuple = four_tuple(socket.as_fd()).ok().filter(|tuple| tuple.remote.port() != 0);
        let stat =
            nix::sys::stat::fstat(&socket).map_err(|errno| sys(SysError { call: "stat a socket", errno }))?;
        let (inode, why) = match u32::try_from(stat.st_ino) {
            Ok(inode) => (inode, refused),
            Err(_) => (0, Some("its inode number does not fit CRIU's images")),
        };
        let ns = self.namespaces.of(socket.as_fd()).map_err(|error| FindError::NetNs(place, error))?;
        let Some(tuple) = tuple else {
            let local = addr::local(socket.as_fd()).map_err(sys)?;
            return match why {
                Some(why) => Err(FindError::RefusedUnconnected { local, place, why }),
                None => Ok(Kind::Unconnected(Unconnected {
                    socket: socket.into(),
                    inode,
                    cookie,
                    local,
                    ns,
                    place,
                })),
            };
        };
        match why {
            Some(why) => Err(FindError::Refused { tuple, place, why }),
            None => connection(socket, inode, tuple, ns).map(Kind::Connection),
        }
    }

    /// A kernel without TCP-AO is asked once.
    fn has_ao_keys(&mut self, socket: &OwnedFd, place: Place) -> Result<bool, FindError> {
        let keys = ao::has_keys(socket.as_fd()).map_err(|error| FindError::Sys(place, error))?;
        self.no_ao = keys.is_none();
        Ok(keys == Some(true))
    }
}

/// The network namespaces of sockets, each opened once.
#[derive(Debug, Default)]
pub struct SocketNamespaces {
    by_cookie: HashMap<u64, NetNs>,
}

impl SocketNamespaces {
    /// The namespace that the socket was made in.
    ///
    /// # Errors
    /// [`NetNsError`].
    pub fn of(&mut self, socket: BorrowedFd<'_>) -> Result<NetNs, NetNsError> {
        let Ok(cookie) = sockopt::netns_cookie(socket) else { return NetNs::of_socket(socket) };
        match self.by_cookie.get(&cookie) {
            Some(ns) => Ok(ns.clone()),
            None => Ok(self.by_cookie.entry(cookie).or_insert(NetNs::of_socket(socket)?).clone()),
        }
    }
}
