//! The way from a task's descriptor to its connection.
//!
//! `pstree.img` lists the tasks, `core-<pid>.img` tells which of them live, `ids-<pid>.img` names
//! each one's descriptor table, `fdinfo-<table>.img` maps descriptors to file ids, `files.img` (in
//! older images `inetsk.img`) holds the sockets, and `tcp-stream-<inode>.img` the connections.
//! Sockets that were in flight inside a unix socket are in no table: `sk-queues.img` has them.
//!
//! Every file is read once, message by message, so that time stays proportional to the files' sizes. Memory does not
//! exceed them by more than 16 MiB, whatever they hold.

mod connections;
mod in_flight;
mod readdress;
mod sockets;
mod tasks;

use std::collections::{BTreeMap, HashMap};

pub use connections::{Connections, InetConnection};
pub use in_flight::Packet;
pub use readdress::readdress;
pub use sockets::{BoundAddress, Unconnected, bound_addresses};
pub use tasks::{DumpedTask, Fd, root_net_ns_id};

use super::allowance::Allowance;
use super::inventory::{Inventory, NetworkLock};
use super::{ImageDir, ImageError};
use crate::lock::LockName;

/// All that a restore has to know before the first connection is read.
#[derive(Clone, Debug)]
pub struct Index {
    /// Names the dump, and its nftables table; `None` in images of CRIU before 4.2.
    pub dump_run_id: Option<String>,
    /// How the dump kept packets away.
    pub network_lock: NetworkLock,
    /// Made with `--tcp-close`.
    pub tcp_close: bool,
    /// The network namespace in which the dumping criu itself ran.
    pub root_net_ns_id: Option<u32>,
    /// The tasks by pid, as they see it themselves inside their pid namespace.
    pub tasks: BTreeMap<u32, DumpedTask>,
    /// The pid of the tree's root.
    pub root: Option<u32>,
    /// The connections by file id.
    pub connections: Connections,
    /// Other TCP sockets, listeners among them.
    pub unconnected: Vec<Unconnected>,
    /// For each unix socket, by file id, the unread packets that carry descriptors, first come first.
    pub in_flight: HashMap<u32, Vec<Packet>>,
}

impl Index {
    /// The index of a folder without an image of tasks.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            dump_run_id: None,
            network_lock: NetworkLock::Nftables,
            tcp_close: false,
            root_net_ns_id: None,
            tasks: BTreeMap::new(),
            root: None,
            connections: Connections::default(),
            unconnected: Vec::new(),
            in_flight: HashMap::new(),
        }
    }

    /// The table of the criu that dumped.
    #[must_use]
    pub fn run_lock(&self) -> Option<LockName> {
        LockName::of_run(self.dump_run_id.as_deref()?)
    }

    /// The connections that have an image of their own.
    pub fn carried(&self) -> impl Iterator<Item = &InetConnection> {
        self.connections.values().filter(|connection| connection.has_stream)
    }

    /// Leaves the images of some connections out of account, as if they were not there.
    pub fn leave_out(&mut self, which: impl Fn(&InetConnection) -> bool) {
        for connection in self.connections.values_mut() {
            connection.has_stream &= !which(connection);
        }
    }

    /// Reads the index of the image in `dir`.
    ///
    /// # Errors
    /// What is wrong with which file, and where in it.
    pub fn read(dir: &ImageDir) -> Result<Self, ImageError> {
        let Inventory { tcp_close, network_lock, dump_run_id, root_net_ns_id } = Inventory::read(dir)?;
        let mut allowance = Allowance::of_index();
        let (tasks, root) = tasks::read(dir, &mut allowance)?;
        let (connections, unconnected) = sockets::read(dir, &mut allowance)?;
        Ok(Self {
            dump_run_id,
            network_lock,
            tcp_close,
            root_net_ns_id,
            tasks,
            root,
            connections,
            unconnected,
            in_flight: in_flight::read(dir, &mut allowance)?,
        })
    }
}
