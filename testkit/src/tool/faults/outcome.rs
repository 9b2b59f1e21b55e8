//! What a user finds after a fault, and what he does then.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use soccr_testkit::criu::last_errors;
use soccr_testkit::fleet::Seen;
use soccr_testkit::stage::PATIENCE;
use soccr_testkit::task::{Task, name_and_state, wait_until};
use soccr_testkit::waiting::Waiting;
use soccr_testkit::{Client, Fleet, Server};

use crate::faults::scene::Scene;

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The server runs on with all connections.
    Lives,
    /// A restore brought all connections back.
    Restored,
    /// The case killed the server itself, while its connections were nowhere else.
    EndedWithTask,
    /// CRIU died while the server ran code of CRIU's own, whose breakpoint killed it (SIGTRAP).
    Breakpoint,
}

pub struct Verdict {
    pub kind: Kind,
    /// The server and its clients, for the next case.
    pub living: Option<(Server, Vec<Client>)>,
    pub connections: usize,
    pub lost: Vec<String>,
    /// What was left behind.
    pub left: Option<anyhow::Error>,
    /// Whether `soccr clean` was needed first.
    pub cleaned: bool,
}

impl Verdict {
    fn of(
        scene: &Scene,
        kind: Kind,
        living: Option<(Server, Vec<Client>)>,
        connections: usize,
        lost: Vec<String>,
        cleaned: bool,
    ) -> Self {
        let left = scene.check_spotless(living.as_ref().map(|(server, _)| server)).err();
        Self { kind, living, connections, lost, left, cleaned }
    }

    /// The same with those that nobody had accepted. Where it was `told` that some are lost they may be, and the others go on
    /// in their order.
    pub fn with_waiting(mut self, waiting: Vec<Waiting>, told: bool) -> Result<Self> {
        /// Of lost ones nobody may hear any more.
        const SILENCE: Duration = Duration::from_millis(500);
        let Some((server, _)) = &self.living else { return Ok(self) };
        server.release()?;
        let mut place = 0;
        for mut client in waiting {
            if told {
                client.set_patience(SILENCE)?;
            }
            match client.goes_on(place) {
                Ok(()) => place += 1,
                Err(_) if told => continue,
                Err(error) => self.lost.push(format!("{error:#}")),
            }
            self.connections += 1;
        }
        Ok(self)
    }

    /// Whether nothing was lost and nothing left.
    pub fn is_good(&self) -> bool {
        self.lost.is_empty() && self.left.is_none()
    }
}

/// After a dump, whatever became of it. `killed`: the case killed the server before the images were complete.
pub fn of_dump(
    scene: &Scene,
    server: Server,
    fleet: Fleet<Client>,
    images: &Path,
    killed: bool,
) -> Result<Verdict> {
    scene.wait_until_quiet()?;
    wait_until("the server is traced no more", PATIENCE, || Ok(!server.task.is_traced()))?;
    let cleaned = scene.clean_orphans()?;
    let connections = fleet.size();
    if server.task.is_alive()? {
        // Whoever's lock there was: the agent knows that the server runs on, and nobody else may be there to clean up.
        go_on(server.pid());
        let Seen { alive, lost, .. } = fleet.stop(PATIENCE);
        if lost.is_empty() || server.task.is_alive()? {
            return Ok(Verdict::of(scene, Kind::Lives, Some((server, alive)), connections, lost, cleaned));
        }
        // It was about to die when we looked.
        return match server.task.end()? {
            Some(Signal::SIGTRAP) => over(scene, server, Kind::Breakpoint, connections, cleaned),
            end => bail!("the server died ({end:?}) after it had been let go:\n{}", lost.join("\n")),
        };
    }
    if server.task.end()? == Some(Signal::SIGTRAP) {
        drop(fleet);
        return over(scene, server, Kind::Breakpoint, connections, cleaned);
    }
    if killed {
        drop(fleet);
        return over(scene, server, Kind::EndedWithTask, connections, cleaned);
    }
    let address = server.address;
    server.task.wait(PATIENCE)?;
    restored(scene, address, fleet, images, cleaned)
}

/// After a restore, whatever became of it. `killed`: the case killed the restored server after it was complete.
pub fn of_restore(
    scene: &Scene,
    pid: Pid,
    address: SocketAddr,
    fleet: Fleet<Client>,
    images: &Path,
    killed: bool,
) -> Result<Verdict> {
    scene.wait_until_quiet()?;
    let cleaned = scene.clean_orphans()?;
    let status = scene.status()?;
    let connections = fleet.size();
    if status.has("dumped") {
        // What there is of the server is not whole.
        if kill(pid, None).is_ok() {
            drop(Task::adopt(pid));
        }
        return restored(scene, address, fleet, images, cleaned);
    }
    ensure!(status.states().is_empty(), "soccr status: {status}");
    let lives = || name_and_state(pid).is_some_and(|(_, state)| state != 'Z');
    if killed {
        wait_until("the killed task has ended", PATIENCE, || Ok(!lives()))?;
    }
    if !lives() {
        drop(fleet);
        ensure!(killed, "the server is gone, and no record says that the dump waits for its restore");
        drop(Task::adopt(pid));
        return Ok(Verdict::of(scene, Kind::EndedWithTask, None, connections, Vec::new(), cleaned));
    }
    let server = Server::restored(address, Task::adopt(pid), scene.dir());
    wait_until("the server is traced no more", PATIENCE, || Ok(!server.task.is_traced()))?;
    go_on(pid);
    let Seen { alive, lost, .. } = fleet.stop(PATIENCE);
    Ok(Verdict::of(scene, Kind::Lives, Some((server, alive)), connections, lost, cleaned))
}

fn restored(
    scene: &Scene,
    address: SocketAddr,
    fleet: Fleet<Client>,
    images: &Path,
    cleaned: bool,
) -> Result<Verdict> {
    let connections = fleet.size();
    let server = scene.restore_all(images, address).with_context(|| {
        let log = last_errors(&images.join("dump.log"));
        format!("all {connections} connections are lost; of the dump:\n{log}")
    })?;
    let Seen { alive, lost, .. } = fleet.stop(PATIENCE);
    scene.wait_until_quiet()?;
    Ok(Verdict::of(scene, Kind::Restored, Some((server, alive)), connections, lost, cleaned))
}

fn over(scene: &Scene, server: Server, kind: Kind, connections: usize, cleaned: bool) -> Result<Verdict> {
    server.task.wait(PATIENCE)?;
    let cleaned = cleaned | scene.clean_locks()?;
    Ok(Verdict::of(scene, kind, None, connections, Vec::new(), cleaned))
}

/// A task that somebody left stopped goes on.
fn go_on(pid: Pid) {
    if name_and_state(pid).is_some_and(|(_, state)| state == 'T') {
        let _ = kill(pid, Signal::SIGCONT);
    }
}
