//! Connections → sockets, behind the lock that they were frozen with.

use std::borrow::Cow;
use std::collections::HashMap;
use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crate::carried::Connection;
use crate::chain;
use crate::connection::{FourTuple, Queues};
use crate::encoding::Head;
use crate::forge::Forge;
use crate::freeze::{Cause, lock_name, wake};
use crate::kernel::netns::NetNs;
use crate::kernel::options::{self, When};
use crate::kernel::sockopt;
use crate::lock::{LockError, LockName, LockOptions, Method, NetworkLock};
use crate::repair::{Paused, Probe};
use crate::restore::RestoreError;

/// No connection was thawed. They are as they were before, and can be tried again.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ThawError {
    /// Some connections that were frozen together are missing: unlocked without a socket, they would be reset.
    #[error("{here} of {together} connections that were frozen together are here: they are thawed together")]
    Apart {
        /// How many are here.
        here: usize,
        /// How many were frozen.
        together: u32,
    },
    /// The network lock could not be taken over or removed.
    #[error("cannot take the network lock over, or remove it")]
    Lock(#[source] Cause),
    /// Some could not be built; those that could are gone again, without a word to their peers.
    #[error("{} of {of} connections cannot be thawed; the first: {}", failed.len(), failed[0].0)]
    Connections {
        /// Which, and why. There is at least one.
        failed: Vec<(FourTuple, Cause)>,
        /// Of how many.
        of: usize,
        /// The first one's reason.
        source: Cause,
    },
}

/// Makes sockets of connections, in the order given: all of them, or none.
///
/// They are made in the calling thread's network namespace, which has the connections' local addresses; the lock that
/// [`freeze`](crate::freeze) left there is taken over, and in another namespace or on another host a new one is set.
/// It ends when all sockets are whole, and then a window probe wakes each flow.
///
/// The sockets are new ones: close-on-exec, and in blocking mode.
///
/// # Errors
/// [`ThawError`]. The lock that `freeze` left is there still, so that the peers wait for another try.
pub fn thaw(connections: &[Connection]) -> Result<Vec<OwnedFd>, ThawError> {
    thaw_with(connections, &LockOptions::default())
}

/// As [`thaw`], with the choice of [`freeze_with`](crate::freeze_with).
///
/// ```no_run
/// use soccr::{Connection, LockOptions, Method};
///
/// # fn thaw(connections: &[Connection]) -> Result<(), soccr::ThawError> {
/// let lock = LockOptions { method: Method::Iptables, ..LockOptions::default() };
/// let sockets = soccr::thaw_with(connections, &lock)?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`thaw`].
pub fn thaw_with(connections: &[Connection], lock: &LockOptions) -> Result<Vec<OwnedFd>, ThawError> {
    thaw_each(connections, lock, &mut |at| Ok(Cow::Borrowed(&connections[at])))
}

/// As [`thaw_with`], for many connections: only `load` has the queues of each, which need not be in memory together.
///
/// # Errors
/// As [`thaw`].
#[doc(hidden)]
pub fn thaw_each<'a>(
    connections: &[Connection],
    lock: &LockOptions,
    load: &mut dyn FnMut(usize) -> Result<Cow<'a, Connection>, Cause>,
) -> Result<Vec<OwnedFd>, ThawError> {
    let locks = Locks::of(connections, lock)?;
    let thawed = build_all(connections, lock.method, load).and_then(|built| {
        let mut sockets = Sockets(Vec::with_capacity(built.len()));
        for (paused, tuple) in built {
            let reuse_addr = paused.reuse_addr();
            let socket =
                paused.resume(Probe::None).map_err(|error| failed(tuple, error, connections.len()))?;
            sockets.0.push((socket, reuse_addr));
        }
        Ok(sockets)
    });
    let mut sockets = match thawed {
        Ok(sockets) => sockets,
        Err(error) => {
            locks.stay();
            return Err(error);
        }
    };
    locks.unlock()?;
    let sockets = std::mem::take(&mut sockets.0);
    for (socket, reuse_addr) in &sockets {
        wake(socket.as_fd(), *reuse_addr);
    }
    Ok(sockets.into_iter().map(|(socket, _)| socket).collect())
}

/// The locks of some connections: those that came with them, and one for those that were not locked.
struct Locks {
    carried: Vec<NetworkLock>,
    own: Option<NetworkLock>,
}

impl Locks {
    fn of(connections: &[Connection], options: &LockOptions) -> Result<Self, ThawError> {
        let mut groups: HashMap<Option<LockName>, (Vec<FourTuple>, u32)> = HashMap::new();
        for connection in connections {
            let (name, together) = connection.lock().unzip();
            let (tuples, of) = groups.entry(name).or_default();
            tuples.push(connection.four_tuple());
            *of = together.unwrap_or_default();
        }
        for (tuples, together) in groups.iter().filter_map(|(name, group)| name.as_ref().map(|_| group)) {
            if tuples.len() != *together as usize {
                return Err(ThawError::Apart { here: tuples.len(), together: *together });
            }
        }
        let mut locks = Self { carried: Vec::new(), own: None };
        let set = |name: &LockName, tuples: &[FourTuple]| {
            NetNs::current()
                .map_err(|error| ThawError::Lock(Arc::new(error)))
                .and_then(|ns| NetworkLock::lock(&ns, name, tuples, options).map_err(lock_failed))
        };
        for (name, (tuples, _)) in groups {
            let locked = match &name {
                Some(name) => set(name, &tuples).map(|lock| locks.carried.push(lock)),
                None => set(&lock_name(), &tuples).map(|lock| locks.own = Some(lock)),
            };
            if let Err(error) = locked {
                locks.stay();
                return Err(error);
            }
        }
        Ok(locks)
    }

    /// After a failure: those that came along are for another try.
    fn stay(self) {
        self.carried.into_iter().for_each(NetworkLock::keep);
    }

    /// Removes all. From the first one on there is no way back, so the others are tried whatever it says.
    fn unlock(self) -> Result<(), ThawError> {
        let mut result = Ok(());
        for lock in self.carried.into_iter().chain(self.own) {
            result = result.and(lock.unlock().map(drop).map_err(lock_failed));
        }
        result
    }
}

fn lock_failed(error: LockError) -> ThawError {
    ThawError::Lock(Arc::new(error))
}

fn failed(tuple: FourTuple, error: impl Error + Send + Sync + 'static, of: usize) -> ThawError {
    let source: Cause = Arc::new(error);
    ThawError::Connections { failed: vec![(tuple, Arc::clone(&source))], of, source }
}

/// Sockets out of repair mode, not yet anybody's: they end without a word.
struct Sockets(Vec<(OwnedFd, bool)>);

impl Drop for Sockets {
    fn drop(&mut self) {
        for (socket, _) in self.0.drain(..) {
            match Paused::pause_only(socket) {
                Ok(paused) => drop(paused.release()),
                Err(error) => log::error!("closed with a FIN: {}", chain(&error)),
            }
        }
    }
}

/// Builds all, each in repair mode; where one fails, the others are closed silently.
fn build_all<'a>(
    connections: &[Connection],
    method: Method,
    load: &mut dyn FnMut(usize) -> Result<Cow<'a, Connection>, Cause>,
) -> Result<Vec<(Paused<OwnedFd>, FourTuple)>, ThawError> {
    let forge = Forge::behind(method);
    let (mut built, mut failed) = (Vec::with_capacity(connections.len()), Vec::new());
    for (at, tuple) in connections.iter().map(Connection::four_tuple).enumerate() {
        let loaded = load(at).and_then(|loaded| match loaded.four_tuple() == tuple {
            true => Ok(loaded),
            false => Err(Cause::from(Box::from("another connection was loaded"))), // it is not locked
        });
        let paused = loaded.and_then(|connection| {
            build(&connection.head, &connection.queues, &forge).map_err(|error| Arc::new(error) as Cause)
        });
        match paused {
            Ok(paused) => built.push((paused, tuple)),
            Err(error) => failed.push((tuple, error)),
        }
    }
    let finished = forge.finish().map_err(lock_failed);
    let result = match failed.first() {
        Some((_, first)) => {
            let source = Arc::clone(first);
            Err(ThawError::Connections { failed, of: connections.len(), source })
        }
        None => finished,
    };
    match result {
        Ok(()) => Ok(built),
        Err(error) => {
            built.into_iter().for_each(|(paused, _)| drop(paused.release()));
            Err(error)
        }
    }
}

/// Makes a socket for one connection, and leaves it in repair mode: locked, or to be closed silently.
///
/// # Errors
/// A [`RestoreError`] that names the connection.
#[doc(hidden)]
pub fn build(head: &Head, queues: &Queues, forge: &Forge) -> Result<Paused<OwnedFd>, RestoreError> {
    let sys = |source| RestoreError::Sys { tuple: head.tuple, source };
    let socket = sockopt::tcp_socket(head.tuple.local.is_ipv6()).map_err(sys)?;
    let lost = |error| log::warn!("{}: {error}: it goes on with the default", head.tuple);
    options::write(socket.as_fd(), &head.options, When::Early, lost).map_err(sys)?;
    let paused = Paused::pause(socket).map_err(|error| sys(error.source))?;
    let restored = (|| {
        paused.restore(&head.tuple, &head.tcp, &queues.recv, &queues.send, forge)?;
        if head.usec_ts_known {
            paused.trust_clock(&head.tcp).map_err(sys)?;
        }
        options::write(paused.socket(), &head.options, When::Late, lost).map_err(sys)
    })();
    match restored {
        Ok(()) => Ok(paused),
        Err(error) => {
            drop(paused.release()); // in repair mode it is closed silently
            Err(error)
        }
    }
}
