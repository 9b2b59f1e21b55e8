//! A lock for connections that are about to come here.
//!
//! Where a restore comes from another host, or into a container's new network, packets reach this host as soon as it
//! has the address: before criu runs, and so before anybody has locked. They meet no socket and are answered with
//! RST. So the connections are locked beforehand, where their packets will pass, and the record of that is what a dump
//! on this host would have left: the restore takes it over, and unlocks.

use std::os::fd::AsFd;

use super::image::external::ExternalImage;
use super::image::index::Index;
use super::image::side::{Accepted, SideImage};
use super::image::{ImageDir, ImageError, inventory};
use super::keeper::Keeper;
use super::record::{
    ConnectionRecord, LockRecord, NsId, Phase, RECORD_VARIABLE, RecordError, RecordId, Recorder, Store,
};
use crate::four_tuple::FourTuple;
use crate::kernel::netns::NetNs;
use crate::lock::conntrack::Translation;
use crate::lock::held::Holder;
use crate::lock::{BadOption, LockError, LockName, LockOptions, METHOD_VARIABLE, Method, NetworkLock};

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
    let packets = held.packets();
    if packets.is_empty() {
        return Err(HoldError::Nothing);
    }
    let (id, name) = (held.id()?, held.name()?.on_path());
    if known(&id)? {
        return Err(HoldError::Known(id));
    }
    let (mut holder, own) = (Holder::from_env()?, std::process::id().cast_signed());
    let mut recorder = Recorder::new(id.as_str(), Phase::Dumped, images.as_fd(), own)?;
    let connections = held.connections.len();
    let tuples: Vec<FourTuple> = held.connections.iter().map(ConnectionRecord::tuple).collect();
    recorder.add_connections(held.connections);
    recorder.add_lock(LockRecord { ns: NsId::from(ns), name: name.clone(), method: options.method });
    recorder.set_translations(&held.translations);
    recorder.save(Phase::Dumped)?;
    if !known(&id)? {
        return Err(HoldError::NoRecord);
    }
    holder.expect(tuples);
    holder.expect_translated(&held.translations);
    match NetworkLock::lock_on_path(ns, &name, &packets, &holder.options(ns, options)) {
        Ok(lock) => lock.map(NetworkLock::keep).ok_or(HoldError::Method)?,
        Err(error) => {
            recorder.remove()?;
            return Err(error.into());
        }
    }
    let door = recorder.held().filter(|_| holder.listens());
    let keeper = door.map(|door| Keeper::new(holder, ns, vec![name], door, &id));
    let keeper = keeper.transpose().unwrap_or_else(|error| {
        log::warn!("what peers send until the restore is dropped: {error}");
        None
    });
    Ok(Hold { id, connections, keeper })
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
        let translations = side.as_ref().map(|side| side.translations_of(&index)).unwrap_or_default();
        let accepted = side.map(|side| side.accepted_of(&index, images)).unwrap_or_default();
        Ok(Self { connections, accepted, translations, name })
    }

    fn id(&self) -> Result<RecordId, HoldError> {
        self.name()?.id().parse().map_err(|_| HoldError::Nameless)
    }

    fn name(&self) -> Result<&LockName, HoldError> {
        self.name.as_ref().ok_or(HoldError::Nameless)
    }

    /// The addresses of all packets, as the sockets see them and before and behind a translation.
    fn packets(&self) -> Vec<FourTuple> {
        let accepted = self.accepted.iter().map(|accepted| accepted.tuple);
        let sockets = self.connections.iter().map(ConnectionRecord::tuple).chain(accepted);
        let reachable = sockets.filter(|tuple| tuple.local.port() != 0 && tuple.leaves_its_host());
        let sides = self.translations.iter().flat_map(|t| [t.original.tuple(), t.reply.tuple()]);
        reachable.chain(sides).collect()
    }
}
