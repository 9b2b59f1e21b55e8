//! Makes the images ones that stock CRIU restores with `--tcp-established`: it must find no `tcp_close` in them, and a
//! lock that it removes by itself.

use soccr::criu::image::ImageDir;
use soccr::criu::image::index;
use soccr::criu::image::inventory::{self, Inventory, NetworkLock as ImageLock};
use soccr::criu::image::{netns, nftables};
use soccr::criu::tasks::Task;
use soccr::kernel::netns::NetNs;
use soccr::lock::{LockName, LockOptions, Method};

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
/// gives to its own. Where the tree has a namespace of its own, CRIU has locked that one as a whole. If it dumps the
/// namespace, its rules are in the images: ours is not needed there. If others make that namespace, others may live there (a
/// pod's containers share one), and the next restore of any of them would take CRIU's lock away from all: so ours stays there, in
/// its place. Other namespaces of the tree CRIU does not lock.
#[derive(Debug)]
pub struct Arrangement {
    /// The namespace that CRIU has locked as a whole, and that stays so.
    locked_by_criu: Option<NetNs>,
    replaces_criu: bool,
    /// A table that CRIU made beside ours, and that nobody would delete.
    extra_table: Option<(NetNs, LockName)>,
}

impl Arrangement {
    /// Where the images could not be made stock's: the plugin restores them all the same.
    pub fn as_it_is() -> Self {
        Self { locked_by_criu: None, replaces_criu: false, extra_table: None }
    }

    /// The namespace that CRIU has locked as a whole, and that stays so.
    pub fn locked_by_criu(&self) -> Option<&NetNs> {
        self.locked_by_criu.as_ref()
    }

    /// Whether CRIU's lock of a whole namespace goes.
    pub fn replaces_criu(&self) -> bool {
        self.replaces_criu
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
        criu: &Task,
    ) -> Result<Option<Self>, AgentError> {
        if !images.contains(inventory::NAME) {
            return Ok(Some(Self::as_it_is())); // a host that is not CRIU
        }
        let inventory = Inventory::read(images)?;
        if !inventory.tcp_close {
            return Ok(None);
        }
        let mut locked_by_criu = tree.locked_by_criu(inventory.network_lock);
        let replaces_criu = locked_by_criu.is_some()
            && inventory.dump_run_id.is_some()
            && knows_tables(criu)
            && LockOptions::from_env()?.method == Method::Nftables
            && is_root_external(images)?;
        locked_by_criu.take_if(|_| replaces_criu);
        let shared = tree.own.is_none();
        let only_lock =
            if shared || locked_by_criu.is_some() { None } else { index::root_net_ns_id(images)? };
        nftables::strip_table_elsewhere(images, "inet", lock.as_str(), only_lock)?;
        let id = if locked_by_criu.is_none() { Some(lock.id()) } else { None };
        inventory::release_to_stock(images, id)?;
        let made = shared && inventory.network_lock == ImageLock::Nftables;
        let id = inventory.dump_run_id.filter(|_| made);
        let name = id.and_then(|id| LockName::of_run(&id));
        let extra_table = name.map(|name| (tree.criu.clone(), name));
        Ok(Some(Self { locked_by_criu, replaces_criu, extra_table }))
    }

    /// The arrangement of an agent that died, as far as its record and the images tell.
    pub fn of_dead_agent(
        images: &ImageDir,
        lock: &LockName,
        tree: &Namespaces<'_>,
        criu: &Task,
    ) -> Result<Self, AgentError> {
        if let Some(made) = Self::make(images, lock, tree, criu)? {
            return Ok(made);
        }
        // Without --tcp-close there would have been nothing to take over: it had changed the images.
        let inventory = Inventory::read(images)?;
        let ours = inventory.dump_run_id.as_deref() == Some(lock.id());
        let locked_by_criu = tree.locked_by_criu(inventory.network_lock).filter(|_| !ours);
        Ok(Self { locked_by_criu, replaces_criu: ours && tree.own.is_some(), extra_table: None })
    }
}

/// Where CRIU was built without libnftables, it cannot restore what a table locks in the tree's own namespace.
fn knows_tables(criu: &Task) -> bool {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", criu.pid));
    maps.is_ok_and(|maps| maps.contains("/libnftables"))
}

fn is_root_external(images: &ImageDir) -> Result<bool, AgentError> {
    let id = index::root_net_ns_id(images)?;
    Ok(id.map_or(Ok(false), |id| netns::is_external(images, id))?)
}
