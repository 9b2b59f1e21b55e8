//! What the images say is to be restored.

use std::collections::HashMap;
use std::os::fd::AsFd;

use nix::sys::stat::fstat;
use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::{Index, InetConnection};
use soccr::criu::image::inventory;
use soccr::criu::image::side::{SideImage, Sockets, TreeListener};
use soccr::criu::record::{ConnectionRecord, Phase, RecordError, RecordId, Recorder};
use soccr::lock::LockName;
use soccr::lock::conntrack::Translation;
use soccr::lock::held::HeldPackets;

use crate::agent::error::AgentError;

/// The images, read as far as a restore needs before its first connection.
#[derive(Debug)]
pub struct Plan {
    /// The folder.
    pub images: ImageDir,
    /// Tasks, descriptors, connections.
    pub index: Index,
    /// Connections that CRIU gave to the plugin as external files, by their addresses, with their SO_REUSEADDR.
    pub external: HashMap<FourTuple, bool>,
    /// The tables that the images say they are locked by.
    pub dump_locks: Vec<LockName>,
    /// The dump's lock, where it was ours.
    our_lock: Option<LockName>,
    /// What CRIU's images do not tell of sockets.
    pub sockets: Sockets,
    /// The connections that were translated on their way.
    pub translations: Vec<Translation>,
    /// What peers have sent during the dump.
    pub held: HeldPackets,
    /// Where the tree listens.
    pub listeners: Vec<TreeListener>,
}

impl Plan {
    /// Reads the folder, which has these external files.
    pub fn read(images: &ImageDir, external_ids: &[u32]) -> Result<Self, AgentError> {
        let index = if images.contains(inventory::NAME) { Index::read(images)? } else { Index::empty() };
        let side = SideImage::read(images)?;
        let our_lock = side.as_ref().and_then(SideImage::lock);
        let mut dump_locks: Vec<LockName> = index.run_lock().into_iter().collect();
        let mut external = HashMap::new();
        ExternalImage::read_all(images, external_ids, |image| {
            let lock = image.lock_id.as_deref().and_then(|id| LockName::criu(id).ok());
            dump_locks.extend(lock.filter(|name| !dump_locks.contains(name)));
            external.insert(image.tuple, soccr::kernel::options::reuse_addr(&image.options));
        })?;
        let images = ImageDir::duplicate(images.as_fd())?;
        let translations = side.as_ref().map(|side| side.translations_of(&index)).unwrap_or_default();
        let side = side.filter(|side| side.belongs_to(&index));
        let (sockets, held, listeners) =
            side.map(|side| (side.sockets, side.held, side.listeners)).unwrap_or_default();
        Ok(Self { images, index, external, dump_locks, our_lock, sockets, translations, held, listeners })
    }

    /// The addresses of the connections that packets can reach, but for the external ones.
    pub fn tuples(&self, wanted: impl Fn(&InetConnection) -> bool) -> Vec<FourTuple> {
        let reachable = self.index.carried().filter(|connection| connection.tuple.local.port() != 0);
        reachable.filter(|connection| wanted(connection)).map(|connection| connection.tuple).collect()
    }

    /// Whether the connection belongs into the namespace in which criu itself runs.
    pub fn is_beside_criu(&self, connection: &InetConnection) -> bool {
        connection.net_ns_id.is_none() || connection.net_ns_id == self.index.root_net_ns_id
    }

    /// The connections that packets reach through criu's own namespace.
    pub fn passing(&self) -> Vec<FourTuple> {
        self.tuples(|connection| !self.is_beside_criu(connection))
    }

    /// The lock that the one on the way belongs to: the dump's, so that it is taken over, or else this restore's.
    pub fn path_owner(&self) -> Result<LockName, AgentError> {
        self.our_lock.clone().map_or_else(|| self.lock_name(), Ok)
    }

    /// The lock of this restore: the same at every try, so that the next one replaces it, and another one for other
    /// images. Where they do not name their dump, the folder does.
    pub fn lock_name(&self) -> Result<LockName, AgentError> {
        let run_id = self.index.dump_run_id.as_deref().unwrap_or_default();
        let mut id: String = run_id.chars().filter(char::is_ascii_alphanumeric).collect();
        if id.is_empty() {
            let folder = fstat(self.images.as_fd()).map_err(|errno| AgentError::Folder(errno.into()))?;
            id = format!("{:x}.{:x}", folder.st_ino, folder.st_dev);
        }
        id.truncate(20);
        Ok(LockName::soccr(&id)?)
    }

    /// The record of the dump or of an earlier try, or a new one where there is none: the dump was made by stock CRIU, on
    /// another host, or before a reboot.
    ///
    /// A record that the images name must tell of the connections that they hold: images can come from anybody, and who
    /// takes a record over removes the locks that it tells of.
    pub fn recorder(&self, lock: &LockName, criu: i32) -> Result<Recorder, AgentError> {
        let named = self.dump_locks.iter().chain([lock]).filter_map(|name| name.id().parse().ok());
        let mut taken = None;
        for id in named {
            taken = taken.or(self.take_over(&id, criu)?);
        }
        if let Some(recorder) = taken {
            return Ok(recorder);
        }
        // Other images may have been in this folder before, and left their soccr.img.
        let ours = self.our_lock.as_ref().and_then(|name| name.id().parse().ok());
        for id in ours.into_iter().chain(Recorder::id_of_folder(self.images.as_fd())?) {
            match self.take_over(&id, criu) {
                Ok(Some(recorder)) => return Ok(recorder),
                Ok(None) | Err(RecordError::OtherDump { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let mut recorder = Recorder::new(lock.id(), Phase::Restoring, self.images.as_fd(), criu)?;
        recorder.add_connections(self.index.carried().map(ConnectionRecord::from));
        let external = self.external.iter();
        recorder
            .add_connections(external.map(|(tuple, reuse)| ConnectionRecord::of_external(*tuple, *reuse)));
        Ok(recorder)
    }

    fn take_over(&self, id: &RecordId, criu: i32) -> Result<Option<Recorder>, RecordError> {
        let carried = self.index.carried().map(|connection| connection.tuple);
        match Recorder::take_over_for(id, criu, carried.chain(self.external.keys().copied())) {
            // The images have all that a restore needs.
            Err(error) if error.is_unreadable() => {
                log::warn!("{}", chain(&error));
                Ok(None)
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock_name(folder: &std::path::Path, run_id: Option<&str>) -> String {
        let images = ImageDir::open(folder).unwrap();
        let index = Index { dump_run_id: run_id.map(str::to_owned), ..Index::empty() };
        let plan = Plan {
            images,
            index,
            external: HashMap::new(),
            dump_locks: Vec::new(),
            our_lock: None,
            sockets: Sockets::default(),
            translations: Vec::new(),
            held: HeldPackets::default(),
            listeners: Vec::new(),
        };
        plan.lock_name().unwrap().to_string()
    }

    #[test]
    fn each_restore_has_a_lock_of_its_own_at_every_try() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(lock_name(one.path(), None), lock_name(one.path(), None));
        assert_ne!(lock_name(one.path(), None), lock_name(other.path(), None));
        let run_id = Some("0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f");
        assert_eq!(lock_name(one.path(), run_id), "soccr-0a1b2c3d0a1b0a1b0a1b");
        assert_eq!(lock_name(other.path(), run_id), lock_name(one.path(), run_id));
    }
}
