//! What CRIU's images do not tell of sockets: read while criu is busy with other things, since that takes some ten
//! microseconds a socket, in which the tasks would stand still. Only two are read before that: what is wrong with all of them fails the dump.
//! What is wrong with one is told by its name; no hook comes any more that could fail for it.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use soccr::chain;
use soccr::connection::{FourTuple, Negotiated, OPT_ECN, OPT_TIMESTAMPS};
use soccr::criu::image::side::{SocketExtra, Sockets};
use soccr::criu::tasks::{Duplicates, Opened, Owner, OwnerMap, Slot, Unconnected};
use soccr::criu::warm::CongestionWindow;
use soccr::kernel::netns::NetNs;
use soccr::kernel::options::{Beside, Reader};
use soccr::kernel::{SysError, tcp};

use crate::agent::error::AgentError;

/// So many are read before somebody who asks meanwhile gets an answer.
const AT_ONCE: usize = 16;

/// The extras that are read, and the sockets whose are not.
#[derive(Debug, Default)]
pub struct Extras {
    read: Sockets,
    unread: Vec<Unread>,
    readers: HashMap<NetNs, (Reader, Restarts)>,
    owners: Option<OwnerMap>,
    opened: Opened,
    failed: Vec<AgentError>,
}

#[derive(Debug)]
struct Unread {
    inode: u32,
    ns: NetNs,
    socket: Socket,
}

#[derive(Debug)]
enum Socket {
    /// In this slot of those that the dump holds; and whether it may be unlike others, so that it is worth asking.
    Connection(Slot, FourTuple, bool),
    Unconnected(Rc<OwnedFd>, SocketAddr),
}

impl Extras {
    /// Numbers of owners are written as this task sees them.
    pub fn set_owners(&mut self, owners: OwnerMap) {
        self.owners.get_or_insert(owners);
    }

    /// One more connection, in this slot of those that the dump holds. What is `agreed` on, where that is known, tells that
    /// most are not to be asked for ECN or the unit of their clock.
    pub fn add_connection(
        &mut self,
        inode: u32,
        ns: NetNs,
        (slot, tuple): (Slot, FourTuple),
        agreed: Option<&Negotiated>,
    ) {
        let special =
            agreed.is_none_or(|it| it.mask & OPT_ECN != 0 || it.timestamp.is_some_and(|t| t & 1 != 0));
        self.unread.push(Unread { inode, ns, socket: Socket::Connection(slot, tuple, special) });
    }

    /// Sockets without a peer.
    pub fn add_unconnected(&mut self, sockets: Vec<Unconnected>) {
        let unread = |Unconnected { socket, inode, ns, local, .. }| Unread {
            inode,
            ns,
            socket: Socket::Unconnected(socket, local),
        };
        self.unread.extend(sockets.into_iter().map(unread));
    }

    /// Whether there is something left to read.
    pub fn is_behind(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Reads a connection and a socket without a peer, if there are such, while the dump can still fail.
    pub fn try_two(&mut self, held: &Duplicates) -> Result<(), AgentError> {
        for connected in [true, false] {
            let is_such = |unread: &Unread| matches!(unread.socket, Socket::Connection(..)) == connected;
            if let Some(at) = self.unread.iter().position(is_such) {
                let unread = self.unread.swap_remove(at);
                self.read(unread, held)?;
            }
        }
        Ok(())
    }

    /// Reads some of them.
    pub fn read_some(&mut self, held: &Duplicates) {
        let rest = self.unread.len().saturating_sub(AT_ONCE);
        for unread in self.unread.split_off(rest) {
            if let Err(error) = self.read(unread, held) {
                self.failed.push(error);
            }
        }
    }

    /// Reads all that is left.
    pub fn read_all(&mut self, held: &Duplicates) {
        while self.is_behind() {
            self.read_some(held);
        }
        self.opened = Opened::default();
    }

    /// What was read; says of which sockets that failed.
    pub fn into_sockets(self, say: log::Level) -> Sockets {
        self.failed.iter().for_each(|error| log::log!(say, "{}", chain(error)));
        self.read
    }

    fn read(&mut self, unread: Unread, held: &Duplicates) -> Result<(), AgentError> {
        let (inode, name) = (unread.inode, unread.socket.to_string());
        let extra = self.extra(unread, held);
        let extra = extra.map_err(|error| AgentError::Extras { socket: name, source: error.into() })?;
        if !extra.is_plain() {
            self.read.add(inode, &extra);
        }
        Ok(())
    }

    fn extra(&mut self, unread: Unread, held: &Duplicates) -> Result<SocketExtra, AgentError> {
        let Unread { ns, socket, .. } = unread;
        let (socket, connected, special): (BorrowedFd<'_>, bool, bool) = match &socket {
            Socket::Connection(slot, _, special) => {
                let socket = held.get(*slot, &mut self.opened).map_err(AgentError::Duplicates)?;
                (socket, true, *special)
            }
            Socket::Unconnected(socket, _) => (socket.as_fd(), false, false),
        };
        if !self.readers.contains_key(&ns) {
            let looked_at = (Reader::new(&ns, Beside::Criu)?, ns.run(Restarts::read)?);
            self.readers.insert(ns.clone(), looked_at);
        }
        let (reader, restarts) = self.readers.get_mut(&ns).expect("inserted");
        let options = reader.read(socket, connected).map_err(AgentError::Unreadable)?;
        let inside = |owner| self.owners.as_ref()?.inside(owner);
        let owner = Owner::of_socket(socket).ok().and_then(inside).unwrap_or_default();
        let mut extra = SocketExtra { owner, options, ..SocketExtra::default() };
        if connected {
            of_connection(socket, special, *restarts, &mut extra).map_err(AgentError::Unreadable)?;
        }
        Ok(extra)
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(_, tuple, _) => write!(f, "{tuple}"),
            Self::Unconnected(_, local) => write!(f, "the socket at {local}"),
        }
    }
}

/// Whether a connection begins with a small window again after a silence, in this namespace.
#[derive(Clone, Copy, Debug)]
struct Restarts(bool);

impl Restarts {
    /// What cannot be read is the kernel's default.
    fn read() -> Self {
        let value = std::fs::read("/proc/sys/net/ipv4/tcp_slow_start_after_idle");
        Self(!value.is_ok_and(|value| value.starts_with(b"0")))
    }
}

/// A round trip below a millisecond makes no difference.
fn of_connection(
    socket: BorrowedFd<'_>,
    special: bool,
    Restarts(restarts): Restarts,
    extra: &mut SocketExtra,
) -> Result<(), SysError> {
    let info = tcp::info(socket)?;
    extra.cwnd = CongestionWindow::of_connection(&info, restarts);
    if special {
        let agreed_on = |option| u32::from(info.options) & option != 0;
        extra.rtt = Some(info.rtt).filter(|rtt| agreed_on(OPT_ECN) && *rtt >= Duration::from_millis(1));
        extra.usec_ts = agreed_on(OPT_TIMESTAMPS) && tcp::ticks_in_microseconds(socket)?;
    }
    Ok(())
}
