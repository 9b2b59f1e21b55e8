//! Sockets → connections, all behind one lock.

use std::error::Error;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;

use crate::carried::Connection;
use crate::chain;
use crate::connection::{FourTuple, Queues};
use crate::encoding::Head;
use crate::kernel::netns::{NetNs, NetNsError};
use crate::kernel::options::{self, Beside, Reader};
use crate::kernel::{SysError, diag, sockopt, tcp};
use crate::lock::{LockName, LockOptions, Method, NetworkLock};
use crate::repair::{self, Paused, Probe, four_tuple};

/// Why something failed. [`chain`](crate::chain()) tells all of it.
pub type Cause = Arc<dyn Error + Send + Sync>;

/// A connection that was not frozen, or not let go as it should be.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// What was given is not a TCP socket, or has no peer.
    #[error("not a TCP socket with a peer")]
    NotConnected(#[source] Cause),
    /// The network lock could not be set.
    #[error("cannot lock {connection}")]
    Lock {
        /// The connection.
        connection: FourTuple,
        /// Why.
        source: Cause,
    },
    /// The connection could not be read, or has what no restore could give it back.
    #[error("cannot freeze {connection}")]
    Read {
        /// The connection.
        connection: FourTuple,
        /// Why.
        source: Cause,
    },
    /// The socket did not leave repair mode: the program's calls on it fail.
    #[error("cannot resume {connection}")]
    Resume {
        /// The connection.
        connection: FourTuple,
        /// Why.
        source: Cause,
    },
    /// The lock could not be removed: the peers hear nothing.
    #[error("the connections stay locked")]
    Unlock(#[source] Cause),
}

/// A socket that was not frozen. It is what it was before: its connection lives, and is not locked.
#[derive(Debug)]
pub struct Refused<F> {
    /// The socket.
    pub socket: F,
    /// Why.
    pub error: FreezeError,
}

/// Connections that stand still: read, locked from the network, their sockets in repair mode.
///
/// Dropping it is [`Frozen::resume`] without a report.
#[derive(Debug)]
#[must_use = "dropping it lets the connections go on"]
pub struct Frozen<F: AsFd> {
    // Dropped in this order: sockets leave repair mode before segments reach them.
    connections: Vec<(Paused<F>, Connection)>,
    locks: Vec<NetworkLock>,
}

/// Freezes the connections of `sockets`: locks them from the network, one transaction for each network namespace that
/// they live in, and reads them.
///
/// Connections that are frozen together share a lock, and are thawed together.
///
/// Every socket comes back: in [`Frozen`], or [`Refused`] with the reason.
pub fn freeze<F: AsFd>(sockets: impl IntoIterator<Item = F>) -> (Frozen<F>, Vec<Refused<F>>) {
    freeze_with(sockets, &LockOptions::default())
}

/// As [`freeze`], with a choice of the lock: iptables for kernels without nf_tables, or a lease, after which the kernel
/// removes it although nobody has thawed the connections. The same is to be chosen in [`thaw_with`](crate::thaw_with).
///
/// ```no_run
/// use std::{net::TcpStream, time::Duration};
/// use soccr::LockOptions;
///
/// # fn main() -> std::io::Result<()> {
/// let stream = TcpStream::connect("192.0.2.1:7")?;
/// let lock = LockOptions { lease: Some(Duration::from_secs(600)), ..LockOptions::default() };
/// let (frozen, refused) = soccr::freeze_with([stream], &lock);
/// # Ok(()) }
/// ```
pub fn freeze_with<F: AsFd>(
    sockets: impl IntoIterator<Item = F>,
    lock: &LockOptions,
) -> (Frozen<F>, Vec<Refused<F>>) {
    freeze_each(&lock_name(), sockets, lock, &mut |_| Ok(()))
}

/// As [`freeze_with`], for many connections of which all or none shall be frozen: the lock of each namespace has this name,
/// so that it can be recorded before it is there, and `each` takes what is to be kept of a connection as soon as that is
/// read, so that no more than one's queues need be in memory.
#[doc(hidden)]
pub fn freeze_each<F: AsFd>(
    name: &LockName,
    sockets: impl IntoIterator<Item = F>,
    lock: &LockOptions,
    each: &mut dyn FnMut(&mut Connection) -> Result<(), Cause>,
) -> (Frozen<F>, Vec<Refused<F>>) {
    let mut freezing =
        Freezing { frozen: Frozen { connections: Vec::new(), locks: Vec::new() }, refused: Vec::new() };
    for (ns, sockets) in freezing.by_namespace(sockets) {
        freezing.freeze(&ns, name, sockets, lock, each);
    }
    (freezing.frozen, freezing.refused)
}

/// As [`freeze`], but *nothing keeps segments away*. A peer that sends before the connection is thawed is answered with
/// RST, and what arrives while the socket is read fails the freeze. For peers that are known to be silent, and for
/// sockets whose network is down.
pub fn freeze_unlocked<F: AsFd>(sockets: impl IntoIterator<Item = F>) -> (Frozen<F>, Vec<Refused<F>>) {
    freeze_with(sockets, &LockOptions { method: Method::Skip, lease: None, log: None })
}

impl<F: AsFd> Frozen<F> {
    /// The connections, in the order of their sockets within each network namespace.
    pub fn connections(&self) -> impl ExactSizeIterator<Item = &Connection> {
        self.connections.iter().map(|(_, connection)| connection)
    }

    /// Lets the connections go on in their sockets as if nothing had happened: repair mode ends, then the lock, then a
    /// window probe wakes each flow.
    ///
    /// Every socket comes back, with all that went wrong.
    pub fn resume(self) -> (Vec<F>, Vec<FreezeError>) {
        let (mut sockets, mut errors) = (Vec::with_capacity(self.connections.len()), Vec::new());
        let mut reuse_addr = Vec::with_capacity(self.connections.len());
        for (paused, connection) in self.connections {
            reuse_addr.push(paused.reuse_addr());
            let (socket, resumed) = paused.give_back(Probe::None);
            sockets.push(socket);
            errors.extend(resumed.err().map(|error| FreezeError::Resume {
                connection: connection.four_tuple(),
                source: Arc::new(error),
            }));
        }
        let unlocked = self.locks.into_iter().filter_map(|lock| lock.unlock().err());
        errors.extend(unlocked.map(|error| FreezeError::Unlock(Arc::new(error))));
        for (socket, reuse_addr) in sockets.iter().zip(reuse_addr) {
            wake(socket.as_fd(), reuse_addr);
        }
        (sockets, errors)
    }

    /// Ends the connections here, for them to go on elsewhere: the lock stays until they are thawed.
    ///
    /// The sockets come back in repair mode, in which closing the last descriptor of each tells the peer nothing and
    /// gives the addresses back at once: drop them.
    pub fn release(self) -> Vec<F> {
        self.locks.into_iter().for_each(NetworkLock::keep);
        self.connections.into_iter().map(|(paused, _)| paused.release()).collect()
    }
}

/// A peer that has waited goes on at a probe; without one, at its own next segment.
pub(crate) fn wake(socket: BorrowedFd<'_>, reuse_addr: bool) {
    if let Err(error) = repair::probe(socket, reuse_addr) {
        log::warn!("{}: the connection waits for its peer to send", chain(&error));
    }
}

/// A name for a lock that nobody else has.
#[doc(hidden)]
#[must_use]
#[allow(clippy::missing_panics_doc)] // hexadecimal digits are a name
pub fn lock_name() -> LockName {
    let random = RandomState::new().build_hasher().finish();
    LockName::soccr(&format!("{random:016x}")).expect("hexadecimal digits")
}

struct Freezing<F: AsFd> {
    frozen: Frozen<F>,
    refused: Vec<Refused<F>>,
}

type Connected<F> = (F, FourTuple);

impl<F: AsFd> Freezing<F> {
    fn by_namespace(&mut self, sockets: impl IntoIterator<Item = F>) -> Vec<(NetNs, Vec<Connected<F>>)> {
        let mut namespaces = Vec::new();
        let mut grouped: Vec<(NetNs, Vec<Connected<F>>)> = Vec::new();
        for socket in sockets {
            let tuple = match connection_of(socket.as_fd()) {
                Ok(tuple) => tuple,
                Err(error) => {
                    self.refused.push(Refused { socket, error });
                    continue;
                }
            };
            match namespace(socket.as_fd(), &mut namespaces) {
                Ok(ns) => match grouped.iter_mut().find(|(known, _)| *known == ns) {
                    Some((_, sockets)) => sockets.push((socket, tuple)),
                    None => grouped.push((ns, vec![(socket, tuple)])),
                },
                Err(error) => {
                    self.refuse(socket, |source| FreezeError::Lock { connection: tuple, source }, error)
                }
            }
        }
        grouped
    }

    fn refuse(
        &mut self,
        socket: F,
        error: impl FnOnce(Cause) -> FreezeError,
        cause: impl Error + Send + Sync + 'static,
    ) {
        self.refused.push(Refused { socket, error: error(Arc::new(cause)) });
    }

    /// Locks the connections of one namespace, reads them, and unlocks those that could not be read.
    fn freeze(
        &mut self,
        ns: &NetNs,
        name: &LockName,
        sockets: Vec<Connected<F>>,
        options: &LockOptions,
        each: &mut dyn FnMut(&mut Connection) -> Result<(), Cause>,
    ) {
        let asked = sockets.len();
        let tuples: Vec<FourTuple> = sockets.iter().map(|(_, tuple)| *tuple).collect();
        let locked = NetworkLock::lock(ns, name, &tuples, options).map_err(|error| Arc::new(error) as Cause);
        let reader = || Reader::new(ns, Beside::Nobody).map_err(|error| Arc::new(error) as Cause);
        let (lock, mut options_of) = match locked.and_then(|lock| Ok((lock, reader()?))) {
            Ok(both) => both,
            Err(source) => {
                let error = |connection| FreezeError::Lock { connection, source: Arc::clone(&source) };
                let refused =
                    sockets.into_iter().map(|(socket, tuple)| Refused { socket, error: error(tuple) });
                return self.refused.extend(refused);
            }
        };
        let first = self.frozen.connections.len();
        for ((socket, tuple), keys) in sockets.into_iter().zip(md5_keys(ns, &tuples)) {
            let frozen = match keys {
                Ok(()) => read(socket, tuple, &mut options_of, |connection| {
                    if options.method != Method::Skip {
                        connection.lock_behind(name, asked);
                    }
                    each(connection)
                }),
                Err(source) => {
                    Err(Refused { socket, error: FreezeError::Read { connection: tuple, source } })
                }
            };
            match frozen {
                Ok(frozen) => self.frozen.connections.push(frozen),
                Err(refused) => self.refused.push(refused),
            }
        }
        let frozen = &mut self.frozen.connections[first..];
        if frozen.is_empty() {
            return; // dropping the lock unlocks
        }
        if frozen.len() < asked {
            if options.method != Method::Skip {
                let together = frozen.len();
                frozen.iter_mut().for_each(|(_, connection)| connection.lock_behind(name, together));
            }
            let tuples: Vec<FourTuple> =
                frozen.iter().map(|(_, connection)| connection.four_tuple()).collect();
            match NetworkLock::lock(ns, name, &tuples, options) {
                Ok(narrower) => narrower.keep(), // `lock` stands for it
                Err(error) => log::error!("connections that go on stay locked: {}", chain(&error)),
            }
        }
        self.frozen.locks.push(lock);
    }
}

fn connection_of(socket: BorrowedFd<'_>) -> Result<FourTuple, FreezeError> {
    let not_connected = |why: &'static str| FreezeError::NotConnected(Cause::from(Box::from(why)));
    if !sockopt::is_tcp(socket) {
        return Err(not_connected("another kind of descriptor"));
    }
    match four_tuple(socket) {
        Ok(tuple) if tuple.remote.port() != 0 => Ok(tuple),
        Ok(_) => Err(not_connected("it listens, or never was connected")),
        Err(error) => Err(FreezeError::NotConnected(Arc::new(error))),
    }
}

/// The socket's namespace, opened once for all sockets in it where the kernel tells them apart (since Linux 5.14).
fn namespace(socket: BorrowedFd<'_>, known: &mut Vec<(u64, NetNs)>) -> Result<NetNs, NetNsError> {
    let Ok(cookie) = sockopt::netns_cookie(socket) else { return NetNs::of_socket(socket) };
    if let Some((_, ns)) = known.iter().find(|(of, _)| *of == cookie) {
        return Ok(ns.clone());
    }
    let ns = NetNs::of_socket(socket)?;
    known.push((cookie, ns.clone()));
    Ok(ns)
}

/// Whether each has no keys of TCP-MD5, which only the socket monitor tells, and nobody can read.
fn md5_keys(ns: &NetNs, tuples: &[FourTuple]) -> Vec<Result<(), Cause>> {
    let none = |tuple: &FourTuple| match diag::look_up(&tuple.on_wire()) {
        Ok(seen) if seen.md5 => Err(Cause::from(Box::from("keys of TCP-MD5 cannot be carried"))),
        Ok(seen) if !seen.shows_keys => {
            Err(Cause::from(Box::from("CAP_NET_ADMIN is needed to see whether it has keys of TCP-MD5")))
        }
        // A closed connection is in no table, and a kernel without socket monitor has nobody to ask.
        Ok(_) | Err(SysError { errno: Errno::ENOENT | Errno::EPROTONOSUPPORT, .. }) => Ok(()),
        Err(error) => Err(Arc::new(error) as Cause),
    };
    ns.run(|| tuples.iter().map(none).collect()).unwrap_or_else(|error| {
        let error: Cause = Arc::new(error);
        tuples.iter().map(|_| Err(Arc::clone(&error))).collect()
    })
}

fn read<F: AsFd>(
    socket: F,
    tuple: FourTuple,
    options_of: &mut Reader,
    take: impl FnOnce(&mut Connection) -> Result<(), Cause>,
) -> Result<(Paused<F>, Connection), Refused<F>> {
    let error = |source: Cause| FreezeError::Read { connection: tuple, source };
    // In repair mode SO_REUSEADDR is not the program's.
    let options = match options_of.read(socket.as_fd(), true) {
        Ok(options) => options,
        Err(cause) => {
            let why = options::refused(socket.as_fd()).ok().flatten();
            let cause = why.map_or_else(|| Arc::new(cause) as Cause, |why| Cause::from(Box::from(why)));
            return Err(Refused { socket, error: error(cause) });
        }
    };
    let paused = match Paused::try_pause(socket) {
        Ok(paused) => paused,
        Err((socket, cause)) => return Err(Refused { socket, error: error(Arc::new(cause)) }),
    };
    let mut queues = Queues::default();
    let saved = paused.save(&mut queues).map_err(|cause| Arc::new(cause) as Cause);
    let taken = saved.and_then(|tcp| {
        let usec_ts_known = tcp::timestamp_tells_unit(paused.socket()).unwrap_or(false);
        let head = Head { tuple, tcp, options, shut_rd: false, usec_ts_known, lock_id: None };
        let mut connection = Connection::new(head, queues);
        take(&mut connection).map(|()| connection)
    });
    match taken {
        Ok(connection) => Ok((paused, connection)),
        Err(cause) => {
            let (socket, resumed) = paused.give_back(Probe::None);
            if let Err(error) = resumed {
                log::error!("{}", chain(&error));
            }
            Err(Refused { socket, error: error(cause) })
        }
    }
}
