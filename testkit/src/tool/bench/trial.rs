//! One trial: a fresh server with fresh clients, dumped, restored, and asked whether it is well.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use soccr_testkit::criu::frozen_time;
use soccr_testkit::{Client, Criu, Side, Stage, leftovers};
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

/// A fresh server with that many connections.
pub fn run(criu: &Criu, connections: usize, side: Side) -> Result<Times> {
    let kind = statfs(TMPFS).with_context(|| format!("no {TMPFS}"))?.filesystem_type();
    ensure!(kind == TMPFS_MAGIC, "{TMPFS} is no tmpfs");
    let dir = TempDir::with_prefix_in("soccr-bench-", TMPFS)?;
    let stage = Stage::alone(criu, dir.path())?;
    let server = stage.serve("127.0.0.1:0", &["--mode", "echo"])?;
    let mut clients = stage.connect_all(&[server.address], connections, Client::connect)?;
    all_answer(&mut clients).context("before the dump")?;

    let images = stage.images()?;
    let pid = server.pid();
    let dump = stage.dump(side, pid, &images).quiet().limit(LIMIT).dump_and_wait(server.task)?;
    let frozen = frozen_time(&images)?;
    let (task, restore) = stage.restore(side, &images)?.quiet().limit(LIMIT).restore()?;
    all_answer(&mut clients).context("after the restore")?;
    leftovers::no_repair(task.pid())?;
    stage.wait_until_clean(None)?;
    Ok(Times { frozen, dump: dump.took, restore: restore.took })
}

/// For one call of criu; stock's iptables take a minute for 1000 connections.
const LIMIT: Duration = Duration::from_secs(300);

fn all_answer(clients: &mut [Client]) -> Result<()> {
    clients.iter_mut().try_for_each(|client| client.ping(MESSAGE))
}
