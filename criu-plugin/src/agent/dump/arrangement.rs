//! Makes the images ones that stock CRIU restores with `--tcp-established`: it must find no `tcp_close` in them, and a
//! lock that it removes by itself.

use soccr::criu::image::ImageDir;
use soccr::criu::image::index::Index;
use soccr::criu::image::inventory::{self, Inventory, NetworkLock as ImageLock};
use soccr::criu::image::nftables;
use soccr::kernel::netns::NetNs;
use soccr::lock::LockName;

use crate::agent::error::AgentError;

/// The two network namespaces that CRIU tells apart.
#[derive(Clone, Copy, Debug)]
pub struct Namespaces<'a> {
    /// Where criu runs.
    pub criu: &'a NetNs,
    /// The root task's, where that is another one: CRIU locks it as a whole.
    pub own: Option<&'a NetNs>,
}

impl Namespaces<'_> {
    fn locked_by_criu(&self, method: ImageLock) -> Option<NetNs> {
        self.own.filter(|_| method != ImageLock::Skip).cloned()
    }
}

/// What the tasks' death makes of the locks, arranged in the images already.
///
/// Where the tree shares criu's network namespace, the lock of the images is ours: a table with the name that stock CRIU
/// gives to its own. Where the tree has a namespace of its own, CRIU has locked that one as a whole (and, if it dumps the
/// namespace, its rules are in the images): ours is not needed there. Other namespaces of the tree CRIU does not lock.
#[derive(Debug)]
pub struct Arrangement {
    /// The namespace that CRIU has locked as a whole.
    locked_by_criu: Option<NetNs>,
    /// A table that CRIU made beside ours, and that nobody would delete.
    extra_table: Option<(NetNs, LockName)>,
}

impl Arrangement {
    /// Where the images could not be made stock's: the plugin restores them all the same.
    pub fn as_it_is() -> Self {
        Self { locked_by_criu: None, extra_table: None }
    }

    /// The namespace that CRIU has locked as a whole.
    pub fn locked_by_criu(&self) -> Option<&NetNs> {
        self.locked_by_criu.as_ref()
    }

    /// Whether our lock in this namespace stays when the tasks are dead.
    pub fn ours_stays(&self, ns: &NetNs) -> bool {
        self.locked_by_criu.as_ref() != Some(ns)
    }

    /// What CRIU has left beside it.
    pub fn extra_table(&self) -> Option<(&NetNs, &LockName)> {
        self.extra_table.as_ref().map(|(ns, name)| (ns, name))
    }

    /// Changes the images. `None`: criu ran without `--tcp-close` and carried the connections itself.
    ///
    /// Of our own table none is left in the images of namespaces, but where it is the only lock: namespaces that are made
    /// anew would stay locked, since stock CRIU removes its table in the root's only.
    pub fn make(
        images: &ImageDir,
        lock: &LockName,
        tree: &Namespaces<'_>,
    ) -> Result<Option<Self>, AgentError> {
        if !images.contains(inventory::NAME) {
            return Ok(Some(Self::as_it_is())); // a host that is not CRIU
        }
        let inventory = Inventory::read(images)?;
        if !inventory.tcp_close {
            return Ok(None);
        }
        let locked_by_criu = tree.locked_by_criu(inventory.network_lock);
        let shared = tree.own.is_none();
        let only_lock = if shared || locked_by_criu.is_some() { None } else { root_net_ns_id(images)? };
        nftables::strip_table_elsewhere(images, "inet", lock.as_str(), only_lock)?;
        let id = if locked_by_criu.is_none() { Some(lock.id()) } else { None };
        inventory::release_to_stock(images, id)?;
        let made = shared && inventory.network_lock == ImageLock::Nftables;
        let id = inventory.dump_run_id.filter(|_| made);
        let name = id.and_then(|id| LockName::of_run(&id));
        let extra_table = name.map(|name| (tree.criu.clone(), name));
        Ok(Some(Self { locked_by_criu, extra_table }))
    }

    /// The arrangement of an agent that died, as far as its record and the images tell.
    pub fn of_dead_agent(
        images: &ImageDir,
        lock: &LockName,
        tree: &Namespaces<'_>,
    ) -> Result<Self, AgentError> {
        if let Some(made) = Self::make(images, lock, tree)? {
            return Ok(made);
        }
        // Without --tcp-close there would have been nothing to take over: it had changed the images.
        let network_lock = Inventory::read(images)?.network_lock;
        Ok(Self { locked_by_criu: tree.locked_by_criu(network_lock), extra_table: None })
    }
}

fn root_net_ns_id(images: &ImageDir) -> Result<Option<u32>, AgentError> {
    let index = Index::read(images)?;
    let root = index.root.and_then(|pid| index.tasks.get(&pid));
    Ok(root.and_then(|task| task.net_ns_id))
}
