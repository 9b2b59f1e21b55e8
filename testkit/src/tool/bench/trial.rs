//! One trial: a fresh server with fresh clients, dumped, restored, and asked whether it is well.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use soccr_testkit::criu::frozen_time;
use soccr_testkit::{Client, Criu, NetNs, Server, Side, leftovers};
use tempfile::TempDir;

/// Where images are quick to write, and memory limits them.
const TMPFS: &str = "/dev/shm";

/// Bytes that each connection carries there and back after a restore.
const MESSAGE: usize = 64;

/// What one trial took.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// The tasks stood still (CRIU's own measure).
    pub frozen: Duration,
    /// `criu dump` ran.
    pub dump: Duration,
    /// `criu restore` ran.
    pub restore: Duration,
}

/// What the trials of one size share.
pub struct Stage<'a> {
    criu: &'a Criu,
    connections: usize,
}

impl<'a> Stage<'a> {
    pub fn new(criu: &'a Criu, connections: usize) -> Result<Self> {
        let kind = statfs(TMPFS).with_context(|| format!("no {TMPFS}"))?.filesystem_type();
        ensure!(kind == TMPFS_MAGIC, "{TMPFS} is no tmpfs");
        Ok(Self { criu, connections })
    }

    pub fn run(&self, side: Side) -> Result<Times> {
        let ns = NetNs::new()?;
        let dir = TempDir::with_prefix_in("soccr-bench-", TMPFS)?;
        let any_port: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        let server = Server::start(&ns, any_port, dir.path(), ["--mode", "echo"])?;
        let address = server.address;
        let mut clients: Vec<_> =
            ns.run(|| (0..self.connections).map(|_| Client::connect(address)).collect::<Result<_>>())?;
        all_answer(&mut clients).context("before the dump")?;

        let limit = Duration::from_secs(300);
        let images = dir.path();
        let pid = server.pid();
        let dump = self.criu.dump(side, pid, images).quiet().inside(&ns).limit(limit);
        let dump = dump.dump_and_wait(server.task)?;
        let frozen = frozen_time(images)?;
        let (task, restore) = self.criu.restore(side, images).quiet().inside(&ns).limit(limit).restore()?;
        all_answer(&mut clients).context("after the restore")?;
        leftovers::no_repair(task.pid())?;
        leftovers::no_rules(&ns)?;
        Ok(Times { frozen, dump: dump.took, restore: restore.took })
    }
}

fn all_answer(clients: &mut [Client]) -> Result<()> {
    clients.iter_mut().try_for_each(|client| client.ping(MESSAGE))
}
