//! What the images say is to be restored.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::fd::AsFd;

use nix::sys::stat::fstat;
use soccr::chain;
use soccr::connection::FourTuple;
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::{self, BoundAddress, Index, InetConnection};
use soccr::criu::image::inventory;
use soccr::criu::image::side::{Accepted, SideImage, Sockets, TreeListener};
use soccr::criu::record::{ConnectionRecord, Phase, RecordError, RecordId, Recorder};
use soccr::criu::rules::{Action, End, Policy, Rules};
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
    /// Those that nobody had accepted, of each listener in the order of its queue.
    pub accepted: Vec<Accepted>,
    /// What peers have sent during the dump.
    pub held: HeldPackets,
    /// Where the tree listens.
    pub listeners: Vec<TreeListener>,
    /// What the host's owner says of connections.
    pub rules: Rules,
    /// The addresses that sockets are bound to, where they are to be waited for.
    pub addresses: BTreeSet<BoundAddress>,
    /// The connections that the rules leave out.
    left_out: Vec<FourTuple>,
}

impl Plan {
    /// Reads the folder, which has these external files, and where the sockets get the addresses that the rules say.
    pub fn read(images: &ImageDir, external_ids: &[u32], rules: Rules) -> Result<Self, AgentError> {
        if !rules.remap.is_empty() {
            let count = index::readdress(images, &rules.remap)?;
            log::info!("files.img: {count} sockets have other addresses now");
        }
        let mut index = if images.contains(inventory::NAME) { Index::read(images)? } else { Index::empty() };
        let addresses = match rules.wait_address {
            Some(_) => index::bound_addresses(images)?,
            None => BTreeSet::new(),
        };
        let left_out = leave_out(&mut index, &rules.policy)?;
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
        let accepted = side.as_ref().map(|side| side.accepted_of(&index, &images)).unwrap_or_default();
        let accepted = under_rules(accepted, &rules)?;
        let (sockets, held, mut listeners) =
            side.map(|side| (side.sockets, side.held, side.listeners)).unwrap_or_default();
        let held = held.readdressed(|tuple| rules.remap.four_tuple(tuple));
        for TreeListener { listener, .. } in &mut listeners {
            listener.local = rules.remap.address(End::Local, listener.local);
        }
        Ok(Self {
            images,
            index,
            external,
            dump_locks,
            our_lock,
            sockets,
            translations,
            accepted,
            held,
            listeners,
            rules,
            addresses,
            left_out,
        })
    }

    /// Adds what was held for the sockets since the dump.
    pub fn add_held(&mut self, held: HeldPackets) {
        self.held.append(&held.readdressed(|tuple| self.rules.remap.four_tuple(tuple)));
    }

    /// The addresses of the connections in some of the network namespaces that packets can reach, but for the external
    /// ones.
    pub fn tuples(&self, wanted: impl Fn(Option<u32>) -> bool) -> Vec<FourTuple> {
        let connections = self.index.carried().map(|connection| (connection.net_ns_id, connection.tuple));
        let namespaces = self.index.unconnected.iter().map(|socket| (socket.ino, socket.net_ns_id));
        let namespaces: HashMap<u32, Option<u32>> = namespaces.collect();
        let of_listener = |accepted: &Accepted| namespaces.get(&accepted.listener).copied().flatten();
        let accepted = self.accepted.iter().map(|accepted| (of_listener(accepted), accepted.tuple));
        let reachable = connections.chain(accepted).filter(|(_, tuple)| tuple.local.port() != 0);
        reachable.filter(|(net_ns_id, _)| wanted(*net_ns_id)).map(|(_, tuple)| tuple).collect()
    }

    /// File ids and inodes of sockets without a peer that have extras, or in whose accept queues connections are to wait.
    pub fn unconnected(&self) -> HashMap<u32, u32> {
        let full: HashSet<u32> = self.accepted.iter().map(|accepted| accepted.listener).collect();
        let wanted = |ino: u32| full.contains(&ino) || self.sockets.contains(ino);
        let sockets = self.index.unconnected.iter().filter(|socket| wanted(socket.ino));
        sockets.map(|socket| (socket.file_id, socket.ino)).collect()
    }

    /// Whether this is the namespace in which criu itself runs.
    pub fn is_beside_criu(&self, net_ns_id: Option<u32>) -> bool {
        net_ns_id.is_none() || net_ns_id == self.index.root_net_ns_id
    }

    /// The connections that packets reach through criu's own namespace.
    pub fn passing(&self) -> Vec<FourTuple> {
        self.tuples(|net_ns_id| !self.is_beside_criu(net_ns_id))
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
        // External files keep their addresses; those of the record are given new ones before they are compared.
        let external = self.external.keys().map(|tuple| self.rules.remap.four_tuple(*tuple));
        let dumped = carried.chain(self.left_out.iter().copied()).chain(external);
        match Recorder::take_over_for(id, criu, dumped, &self.rules.remap) {
            // The images have all that a restore needs.
            Err(error) if error.is_unreadable() => {
                log::warn!("{}", chain(&error));
                Ok(None)
            }
            other => other,
        }
    }
}

/// Connections that are not to be carried stay as CRIU makes them: shut down. Gives their addresses.
fn leave_out(index: &mut Index, policy: &Policy) -> Result<Vec<FourTuple>, AgentError> {
    let mut left_out = Vec::new();
    for &InetConnection { tuple, .. } in index.carried() {
        if !is_carried(tuple, policy)? {
            left_out.push(tuple);
        }
    }
    index.leave_out(|connection| policy.of(&connection.tuple).0 != Action::Keep);
    Ok(left_out)
}

/// Those that are to be carried, with the addresses that their listeners have now.
fn under_rules(accepted: Vec<Accepted>, rules: &Rules) -> Result<Vec<Accepted>, AgentError> {
    let mut carried = Vec::with_capacity(accepted.len());
    for accepted in accepted {
        let tuple = rules.remap.four_tuple(accepted.tuple);
        if is_carried(tuple, &rules.policy)? {
            carried.push(Accepted { tuple, ..accepted });
        }
    }
    Ok(carried)
}

fn is_carried(tuple: FourTuple, policy: &Policy) -> Result<bool, AgentError> {
    match policy.of(&tuple) {
        (Action::Keep, _) => return Ok(true),
        (Action::Refuse, rule) => return Err(AgentError::Refused { tuple, rule: rule.to_owned() }),
        (Action::Close | Action::Reset, rule) => log::info!("{tuple}: stays closed, says {rule}"),
    }
    Ok(false)
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
            accepted: Vec::new(),
            held: HeldPackets::default(),
            listeners: Vec::new(),
            rules: Rules::default(),
            addresses: BTreeSet::new(),
            left_out: Vec::new(),
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
