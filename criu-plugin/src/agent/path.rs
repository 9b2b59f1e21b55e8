//! The lock where packets pass: in criu's own namespace, on their way to and from sockets in other ones.
//!
//! A container's network comes up before criu restores anything, and then the packets of its peers meet no socket and no
//! lock inside. On this side of the wire they can be locked all the time, from the dump on; those of connections that are
//! translated here (published ports, masquerading) by the addresses of both sides.

use std::collections::HashSet;
use std::time::Duration;

use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::record::{LockRecord, NsId};
use soccr::kernel::netns::NetNs;
use soccr::lock::conntrack::{self, Translation};
use soccr::lock::{Listener, LockError, LockName, LockOptions, Method, NetworkLock};

use super::listeners;

/// What is to be locked on the way.
#[derive(Debug)]
pub struct Path {
    ns: NetNs,
    name: LockName,
    /// As the sockets see them.
    tuples: Vec<FourTuple>,
    translations: Vec<Translation>,
    /// What packets to the listeners have for their destination here.
    pub listeners: Vec<Listener>,
    /// How many of the connections are locked.
    locked: usize,
    /// How many of them conntrack knows as established.
    known: usize,
    lock: Option<NetworkLock>,
}

impl Path {
    /// The way through `ns` of the connections that are locked by `name` at their sockets. Nothing is locked yet.
    pub fn new(ns: &NetNs, name: &LockName) -> Self {
        let (tuples, translations, listeners) = (Vec::new(), Vec::new(), Vec::new());
        let (locked, known, lock) = (0, 0, None);
        Self { ns: ns.clone(), name: name.on_path(), tuples, translations, listeners, locked, known, lock }
    }

    /// A way on which an agent that died has locked.
    pub fn adopt(ns: &NetNs, name: &LockName, translations: &[Translation], options: &LockOptions) -> Self {
        let mut path = Self::new(ns, name);
        path.translations = translations.to_vec();
        path.lock = Some(NetworkLock::adopt(ns, &path.name, options));
        path
    }

    /// These connections pass here, too, unless they never leave their host. How they are translated is looked up.
    pub fn add(&mut self, tuples: impl IntoIterator<Item = FourTuple>) {
        let first = self.tuples.len();
        self.tuples.extend(tuples.into_iter().filter(FourTuple::leaves_its_host));
        let new = self.tuples.get(first..).unwrap_or_default();
        match conntrack::find(&self.ns, new) {
            Ok(found) => self.add_translations(found),
            Err(error) => log::warn!("{}: translated connections may be reset: {}", self.ns, chain(&error)),
        }
    }

    /// These listeners in other namespaces are reached through here: by their addresses, those at any address by all that
    /// their namespace has, and by what is translated to one of them.
    pub fn add_listeners(&mut self, ns: &NetNs, inside: &[Listener]) {
        let inside = listeners::addresses(ns, inside);
        let published = |listener: &Listener| {
            let to_it = self.translations.iter().filter(|it| listener.hears(it.reply.source));
            to_it.map(|it| Listener { local: it.original.destination, v6only: true }).collect::<Vec<_>>()
        };
        let published: HashSet<Listener> = inside.iter().flat_map(published).collect();
        self.listeners.extend(inside);
        self.listeners.extend(published);
    }

    /// These are translated here.
    pub fn add_translations(&mut self, translations: impl IntoIterator<Item = Translation>) {
        for translation in translations {
            if !self.translations.contains(&translation) {
                self.translations.push(translation);
            }
        }
    }

    /// How connections are translated.
    pub fn translations(&self) -> &[Translation] {
        &self.translations
    }

    /// Whether there is a lock.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// The lock's name, if there is one.
    pub fn locked_by(&self) -> Option<&LockName> {
        self.lock.as_ref().map(NetworkLock::name)
    }

    /// What the record is to tell before anything is locked; `None` when nothing will be.
    pub fn record(&self, options: &LockOptions) -> Option<LockRecord> {
        let locks = !(self.tuples.is_empty() && self.listeners.is_empty()) || self.lock.is_some();
        let method = options.method;
        (locks && method == Method::Nftables).then(|| LockRecord {
            ns: NsId::from(&self.ns),
            name: self.name.clone(),
            method,
        })
    }

    /// Locks what was added, and has who would connect wait for that time. A lock of this name that is there is replaced
    /// at one stroke.
    pub fn lock(&mut self, options: &LockOptions, newcomers: Duration) -> Result<(), LockError> {
        let listens = self.lock.is_none() && !self.listeners.is_empty();
        if self.tuples.len() == self.locked && !listens {
            return Ok(());
        }
        let sides = self.translations.iter().flat_map(|t| [t.original.tuple(), t.reply.tuple()]);
        let packets: Vec<FourTuple> = self.tuples.iter().copied().chain(sides).collect();
        let replaced = self.lock.take();
        self.lock = NetworkLock::lock_on_path(&self.ns, &self.name, &packets, options)?;
        if let Some(replaced) = replaced {
            replaced.keep(); // it has become the new one
        }
        self.locked = self.tuples.len();
        if let Some(lock) = &self.lock {
            listeners::stop_newcomers(lock, &self.listeners, newcomers, false);
        }
        if self.lock.is_none() {
            log::warn!("{}: only nf_tables locks connections on their way", self.ns);
        }
        Ok(())
    }

    /// Connections that are locked and that somebody tells conntrack of before the end. Where any is translated that has
    /// to come first, and late: masquerading may forget it again.
    pub fn take_unknown(&mut self) -> Vec<FourTuple> {
        if !self.translations.is_empty() {
            return Vec::new();
        }
        let unknown = self.tuples.get(self.known..self.locked).unwrap_or_default().to_vec();
        self.known = self.known.max(self.locked);
        unknown
    }

    /// Lets the packets pass, translated as before.
    pub fn unlock(&mut self) -> Result<(), LockError> {
        let known = conntrack::restore(&self.ns, &self.translations);
        let unknown = self.tuples.get(self.known..).unwrap_or_default();
        if let Err(error) = known.and(conntrack::establish(&self.ns, unknown)) {
            log::warn!("{}: connections may be reset on their way: {}", self.ns, chain(&error));
        }
        self.lock.take().map_or(Ok(()), |lock| lock.unlock().map(drop))
    }

    /// Leaves the lock where it is, for whoever restores the connections.
    pub fn keep(&mut self) {
        if let Some(lock) = self.lock.take() {
            lock.keep();
        }
    }
}
