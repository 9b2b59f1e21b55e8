//! A lock for connections that are about to come here.
//!
//! Where a restore comes from another host, or into a container's new network, packets reach this host as soon as it
//! has the address: before criu runs, and so before anybody has locked. They meet no socket and are answered with
//! RST. So the connections are locked beforehand, where their packets will pass, and the record of that is what a dump
//! on this host would have left: the restore takes it over, and unlocks. Who would connect waits as after such a dump.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::time::Duration;

use super::image::external::ExternalImage;
use super::image::index::Index;
use super::image::side::{Accepted, Place, SideImage, TreeListener};
use super::image::{ImageDir, ImageError, inventory};
use super::keeper::Keeper;
use super::record::{
    ConnectionRecord, LockRecord, NsId, Phase, RECORD_VARIABLE, RecordError, RecordId, Recorder, Store,
};
use crate::chain;
use crate::four_tuple::FourTuple;
use crate::kernel::diag;
use crate::kernel::netns::NetNs;
use crate::lock::conntrack::Translation;
use crate::lock::held::Holder;
use crate::lock::{
    BadOption, Listener, LockError, LockName, LockOptions, METHOD_VARIABLE, Method, NetworkLock,
};

/// What is held.
#[derive(Debug)]
pub struct Hold {
    /// The record's id.
    pub id: RecordId,
    /// How many connections.
    pub connections: usize,
    /// Who holds what their peers send until the restore, once it is told to. Where there is none, that is dropped.
    pub keeper: Option<Keeper>,
}

/// Connections cannot be held.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// The images.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// There is nothing to hold.
    #[error("these images hold no TCP connection that leaves its host")]
    Nothing,
    /// The dump is known here already: it was made here, or is held.
    #[error("these images are known here as {0}, and their connections locked already")]
    Known(RecordId),
    /// Who restores them could not find what was held for them.
    #[error(
        "these images have no name by which a restore could take the hold over: that needs soccr.img, or CRIU 4.2"
    )]
    Nameless,
    /// Only nf_tables can.
    #[error("only nf_tables holds connections ({METHOD_VARIABLE}=nftables)")]
    Method,
    /// Nobody would know of it.
    #[error("a hold needs its record, which {RECORD_VARIABLE}=off turns off")]
    NoRecord,
    /// The record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A variable.
    #[error(transparent)]
    Option(#[from] BadOption),
    /// The lock.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// Locks in `ns` the connections that `images` hold, until their restore there is done or the hold is
/// [cleaned](super::record::clean()).
///
/// # Errors
/// [`HoldError`]; nothing is locked then.
pub fn hold(images: &ImageDir, ns: &NetNs, options: &LockOptions) -> Result<Hold, HoldError> {
    if options.method != Method::Nftables {
        return Err(HoldError::Method);
    }
    let held = Held::read(images)?;
    if held.packets().is_empty() {
        return Err(HoldError::Nothing);
    }
    let (id, name) = (held.id()?, held.name()?);
    if known(&id)? {
        return Err(HoldError::Known(id));
    }
    let (mut holder, own) = (Holder::from_env()?, std::process::id().cast_signed());
    let mut recorder = Recorder::new(id.as_str(), Phase::Dumped, images.as_fd(), own)?;
    let connections = held.connections.len();
    let tuples: Vec<FourTuple> = held.connections.iter().map(ConnectionRecord::tuple).collect();
    let newcomers = if holder.newcomers.is_zero() { Vec::new() } else { held.listeners_away(ns) };
    let mut names = vec![name.on_path()];
    names.extend((!newcomers.is_empty()).then(|| name.clone()));
    recorder.add_connections(held.connections.iter().cloned());
    for name in &names {
        recorder.add_lock(LockRecord { ns: NsId::from(ns), name: name.clone(), method: options.method });
    }
    recorder.set_translations(&held.translations);
    recorder.save(Phase::Dumped)?;
    if !known(&id)? {
        return Err(HoldError::NoRecord);
    }
    holder.expect(tuples);
    holder.expect_translated(&held.translations);
    holder.expect_newcomers(&newcomers);
    let time = options.lease.map_or(holder.newcomers, |lease| lease.min(holder.newcomers));
    let options = holder.options(ns, options);
    if let Err(error) = held.lock(ns, &newcomers, time, &options) {
        recorder.remove()?;
        return Err(error);
    }
    let door = recorder.held().filter(|_| holder.listens());
    let keeper = door.map(|door| Keeper::new(holder, ns, names, door, &id));
    let keeper = keeper.transpose().unwrap_or_else(|error| {
        log::warn!("what peers send until the restore is dropped: {error}");
        None
    });
    Ok(Hold { id, connections, keeper })
}

/// Has who would connect wait. Where that is not possible they are refused, as they would be without us.
fn stop_newcomers(lock: &NetworkLock, listeners: &[Listener], time: Duration) {
    if let Err(error) = lock.stop_newcomers(listeners, time, !lock.name().is_on_path()) {
        log::warn!("who connects until the restore is refused: {}", chain(&error));
    }
}

/// The record that a hold of these images has, or their dump on this host, and whether they have no connection at all;
/// such images may be without a name.
///
/// # Errors
/// What is wrong with the images; [`HoldError::Nameless`].
pub fn id_of(images: &ImageDir) -> Result<(Option<RecordId>, bool), HoldError> {
    let held = Held::read(images)?;
    match held.id() {
        Err(_) if held.connections.is_empty() => Ok((None, true)),
        id => Ok((Some(id?), held.connections.is_empty())),
    }
}

fn known(id: &RecordId) -> Result<bool, RecordError> {
    Ok(match Store::open()? {
        Some(store) => store.read(id)?.is_some(),
        None => false,
    })
}

/// What the images tell of their connections.
struct Held {
    connections: Vec<ConnectionRecord>,
    /// Those that nobody has accepted.
    accepted: Vec<Accepted>,
    translations: Vec<Translation>,
    listeners: Vec<TreeListener>,
    name: Option<LockName>,
}

impl Held {
    fn read(images: &ImageDir) -> Result<Self, HoldError> {
        let index = if images.contains(inventory::NAME) { Index::read(images)? } else { Index::empty() };
        let side = SideImage::read(images)?;
        let mut name = side.as_ref().and_then(SideImage::lock).or_else(|| index.run_lock());
        let mut connections: Vec<_> = index.carried().map(ConnectionRecord::from).collect();
        ExternalImage::for_each(images, |image| {
            name = name.take().or_else(|| LockName::criu(image.lock_id.as_deref()?).ok());
            let reuse_addr = crate::kernel::options::reuse_addr(&image.options);
            connections.push(ConnectionRecord::of_external(image.tuple, reuse_addr));
        })?;
        let listeners = side.as_ref().map(|side| side.listeners.clone()).unwrap_or_default();
        let translations = side.as_ref().map(|side| side.translations_of(&index)).unwrap_or_default();
        let accepted = side.map(|side| side.accepted_of(&index, images)).unwrap_or_default();
        Ok(Self { connections, accepted, translations, listeners, name })
    }

    fn id(&self) -> Result<RecordId, HoldError> {
        self.name()?.id().parse().map_err(|_| HoldError::Nameless)
    }

    fn name(&self) -> Result<&LockName, HoldError> {
        self.name.as_ref().ok_or(HoldError::Nameless)
    }

    /// The addresses of all packets, as the sockets see them and before and behind a translation.
    fn packets(&self) -> Vec<FourTuple> {
        let sides = self.translations.iter().flat_map(|t| [t.original.tuple(), t.reply.tuple()]);
        self.sockets().into_iter().chain(sides).collect()
    }

    /// The connections, as the sockets see them.
    fn sockets(&self) -> Vec<FourTuple> {
        let accepted = self.accepted.iter().map(|accepted| accepted.tuple);
        let sockets = self.connections.iter().map(ConnectionRecord::tuple).chain(accepted);
        sockets.filter(|tuple| tuple.local.port() != 0 && tuple.leaves_its_host()).collect()
    }

    /// Locks them on the way, and at the sockets where it is here that `newcomers` would be accepted: on the way a
    /// listener at any address would stop what goes anywhere else by the same port.
    fn lock(
        &self,
        ns: &NetNs,
        newcomers: &[Listener],
        time: Duration,
        options: &LockOptions,
    ) -> Result<(), HoldError> {
        let name = self.name()?;
        let on_path = NetworkLock::lock_on_path(ns, &name.on_path(), &self.packets(), options)?;
        let on_path = on_path.ok_or(HoldError::Method)?;
        if !newcomers.is_empty() {
            let at_sockets = NetworkLock::lock(ns, name, &self.sockets(), options)?;
            stop_newcomers(&at_sockets, newcomers, time);
            at_sockets.keep();
        }
        stop_newcomers(&on_path, &self.listeners_at(Place::OnPath), time);
        on_path.keep();
        Ok(())
    }

    fn listeners_at(&self, place: Place) -> Vec<Listener> {
        let there = self.listeners.iter().filter(|listener| listener.place == place);
        there.map(|listener| listener.listener).collect()
    }

    /// Those beside criu at whose ports nobody listens in `ns`. Images can name any: what somebody else accepts he shall
    /// accept.
    fn listeners_away(&self, ns: &NetNs) -> Vec<Listener> {
        let Ok(Ok(others)) = ns.run(diag::listeners) else {
            log::warn!("{ns}: who connects until the restore is refused: its listeners are unknown");
            return Vec::new();
        };
        let taken: HashSet<u16> = others.iter().map(|other| other.local.port()).collect();
        let mut listeners = self.listeners_at(Place::BesideCriu);
        listeners.retain(|listener| !taken.contains(&listener.local.port()));
        listeners
    }
}
