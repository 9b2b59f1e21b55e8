//! The network lock: no packet of the chosen connections passes, in either direction, while their
//! sockets are read, gone, or not yet restored.
//!
//! A connection whose socket is gone is answered with a reset as soon as its peer sends, and a
//! socket that is read while packets arrive has no one state. So the lock comes first and goes
//! last. All connections of one network namespace are locked by one transaction: it is there for
//! all of them at once or, after an error, for none, and its cost per connection is constant.
//!
//! Packets that carry the mark [`MARK`] pass: they are the segments that soccr forges itself.
//!
//! ```no_run
//! # use soccr::{connection::FourTuple, kernel::netns::NetNs, lock::*};
//! # fn f(socket: std::os::fd::BorrowedFd, tuples: &[FourTuple]) -> Result<(), Box<dyn std::error::Error>> {
//! let ns = NetNs::of_socket(socket)?;
//! let lock = NetworkLock::lock(&ns, &LockName::criu("1f3a")?, tuples, &LockOptions::from_env()?)?;
//! // … read the sockets; then either
//! lock.unlock()?; // they live on here, or
//! # let lock = NetworkLock::lock(&ns, &LockName::criu("1f3a")?, tuples, &LockOptions::from_env()?)?;
//! lock.keep(); // they are gone, and who restores them unlocks
//! # Ok(()) }
//! ```

pub mod conntrack;
mod error;
pub mod forward;
pub mod held;
mod iptables;
mod name;
mod netfilter;
mod nft;
mod options;
mod packet_log;
pub mod passage;
pub(crate) mod xtables;

use std::net::SocketAddr;
use std::time::Duration;

use crate::four_tuple::FourTuple;
use crate::kernel::netns::NetNs;

pub use error::LockError;
pub use name::{BadLockName, LockName};
pub(crate) use nft::fuzzing::read_answers;
pub(crate) use nft::whole;
pub use nft::{MARK, NftError};
pub(crate) use options::variable;
pub use options::{
    BadOption, HOLD_NEW_VARIABLE, HOLD_VARIABLE, LEASE_VARIABLE, LockOptions, METHOD_VARIABLE, Method,
};
pub use passage::Passage;
pub use xtables::XtablesError;

/// Where connections are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listener {
    /// The address, maybe any, and the port.
    pub local: SocketAddr,
    /// Whether one at any address of IPv6 leaves IPv4 to others.
    pub v6only: bool,
}

impl Listener {
    /// Whether a connection to this address, as packets have it, would be this one's.
    #[must_use]
    pub fn hears(&self, to: SocketAddr) -> bool {
        let own = self.local.ip().to_canonical();
        let any = own.is_unspecified() && (own.is_ipv4() == to.is_ipv4() || (own.is_ipv6() && !self.v6only));
        self.local.port() == to.port() && (own == to.ip() || any)
    }
}

/// A lock that was found in a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// The method: how to remove it.
    pub method: Method,
    /// Its name. Of an iptables lock only the id is known; the prefix is a guess.
    pub name: LockName,
    /// Set elements, one for a connection (stock CRIU's: two); or iptables' rules that drop: two for a connection, or one
    /// for each direction of those that have both ends in the namespace.
    pub entries: usize,
}

/// Connections of one network namespace, locked. Dropping it unlocks, as far as that works.
#[derive(Debug)]
#[must_use = "dropping a lock unlocks"]
pub struct NetworkLock {
    ns: NetNs,
    name: LockName,
    options: LockOptions,
    armed: bool,
}

impl NetworkLock {
    /// Locks `tuples` in `ns`, all or none, under `name`. A lock of that name that is there already
    /// is replaced at one stroke: what both lock stays locked throughout (with iptables, where
    /// the families are apart, for each family).
    ///
    /// # Errors
    /// [`LockError`]; nothing was changed then.
    pub fn lock(
        ns: &NetNs,
        name: &LockName,
        tuples: &[FourTuple],
        options: &LockOptions,
    ) -> Result<Self, LockError> {
        match options.method {
            Method::Nftables => nft::lock(ns, name, tuples, &nft::AT_SOCKET, options)?,
            Method::Iptables if options.lease.is_some() => return Err(LockError::LeaseNeedsNftables),
            Method::Iptables => iptables::lock(ns, name, tuples)?,
            Method::Skip => log::warn!("{ns}: connections are not locked ({METHOD_VARIABLE}=skip)"),
        }
        Ok(Self::adopt(ns, name, options))
    }

    /// Locks connections of sockets in other namespaces where their packets pass through `ns`, all or none, under
    /// `name`; replaces a lock of that name. `tuples` are the addresses of packets: as the sockets see them, and for
    /// connections that are [translated](conntrack) on the way those of both sides. `None`: only nf_tables can lock
    /// on the way, and the options ask for another method.
    ///
    /// # Errors
    /// [`LockError`]; nothing was changed then.
    pub fn lock_on_path(
        ns: &NetNs,
        name: &LockName,
        tuples: &[FourTuple],
        options: &LockOptions,
    ) -> Result<Option<Self>, LockError> {
        if options.method != Method::Nftables {
            return Ok(None);
        }
        nft::lock(ns, name, tuples, &nft::ON_PATH, options)?;
        Ok(Some(Self::adopt(ns, name, options)))
    }

    /// Takes over a lock that is there already, such as one that was [kept](Self::keep) at the
    /// dump; nothing is looked at or changed.
    pub fn adopt(ns: &NetNs, name: &LockName, options: &LockOptions) -> Self {
        Self { ns: ns.clone(), name: name.clone(), options: *options, armed: true }
    }

    /// Locks more connections; those locked already stay as they are.
    ///
    /// # Errors
    /// [`LockError`]; nothing was changed then.
    pub fn add(&mut self, tuples: &[FourTuple]) -> Result<(), LockError> {
        match self.options.method {
            Method::Nftables => nft::add(&self.ns, &self.name, tuples),
            Method::Iptables => iptables::add(&self.ns, &self.name, tuples),
            Method::Skip => Ok(()),
        }
    }

    /// Has who would connect to these listeners wait: each SYN is dropped, so that it is sent again. After `time` the kernel
    /// lets them through by itself, to whoever listens then. With `held`, what is dropped goes to the
    /// [log](LockOptions::log), too. A lock that is [made](Self::lock) anew under this name stops nobody.
    ///
    /// iptables, which knows no end, stops nobody.
    ///
    /// # Errors
    /// [`LockError`]; nothing was changed then.
    pub fn stop_newcomers(
        &self,
        listeners: &[Listener],
        time: Duration,
        held: bool,
    ) -> Result<(), LockError> {
        let log = self.options.log.filter(|_| held);
        match self.options.method {
            Method::Nftables if !listeners.is_empty() && !time.is_zero() => {
                nft::stop_newcomers(&self.ns, &self.name, listeners, time, log)
            }
            _ => Ok(()),
        }
    }

    /// Removes the lock. `false`: somebody else had removed it already.
    ///
    /// # Errors
    /// [`LockError`]; the lock is still there, and is not tried again.
    pub fn unlock(mut self) -> Result<bool, LockError> {
        self.armed = false;
        remove(&self.ns, self.options.method, &self.name)
    }

    /// Leaves the lock where it is, for whoever restores the connections.
    pub fn keep(mut self) {
        self.armed = false;
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &NetNs {
        &self.ns
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &LockName {
        &self.name
    }
}

impl Drop for NetworkLock {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Err(error) = remove(&self.ns, self.options.method, &self.name) {
            log::error!("the network lock stays: {}", crate::chain(&error));
        }
    }
}

/// Removes the lock `name`, whoever made it. `false`: there was none.
///
/// # Errors
/// [`LockError`]; the lock is still there.
pub fn remove(ns: &NetNs, method: Method, name: &LockName) -> Result<bool, LockError> {
    match method {
        Method::Nftables => nft::remove(ns, name),
        Method::Iptables => iptables::remove(ns, name),
        Method::Skip => Ok(true),
    }
}

/// Makes the lock `to` for `tuples` and removes the lock `from`, which must exist: in one
/// transaction with nf_tables, the new one first with iptables.
///
/// # Errors
/// [`LockError`]; with nf_tables nothing was changed then.
pub fn rename(
    ns: &NetNs,
    from: &LockName,
    to: &LockName,
    tuples: &[FourTuple],
    options: &LockOptions,
) -> Result<NetworkLock, LockError> {
    match options.method {
        Method::Nftables => {
            nft::rename(ns, from, to, tuples, options)?;
            Ok(NetworkLock::adopt(ns, to, options))
        }
        Method::Iptables | Method::Skip => {
            let new = NetworkLock::lock(ns, to, tuples, options)?;
            if from.id() != to.id() {
                remove(ns, options.method, from)?; // else they are the same chain
            }
            Ok(new)
        }
    }
}

/// Whether the nf_tables lock `name` is there.
///
/// # Errors
/// [`LockError`].
pub fn is_there(ns: &NetNs, name: &LockName) -> Result<bool, LockError> {
    nft::is_there(ns, name)
}

/// All locks in `ns`: those of soccr, and those that stock CRIU made in nf_tables.
///
/// # Errors
/// [`LockError`]. A kernel without nf_tables has none of these, which is no error.
pub fn list(ns: &NetNs) -> Result<Vec<LockInfo>, LockError> {
    let mut locks = nft::list(ns)?;
    locks.extend(iptables::list(ns)?);
    Ok(locks)
}
