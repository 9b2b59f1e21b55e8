//! Random instants of a dump of many busy connections: criu and the agent are killed in turn.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::sys::signal::{Signal, kill};
use soccr_testkit::criu::last_errors;
use soccr_testkit::stage::PATIENCE;
use soccr_testkit::task::{pid_of, pidfd_open, wait_readable, wait_until};
use soccr_testkit::{Client, Fleet, Place, Server, interrupt};

use crate::faults::outcome::{self, Verdict};
use crate::faults::prefix;
use crate::faults::report::Report;
use crate::faults::scene::{PLUGIN, Scene, Tools};

/// So many failures in a row of deaths of one victim are told; each takes the time of [`PATIENCE`].
const ENOUGH: usize = 5;
/// Each sends this often.
const PERIOD: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Criu,
    Agent,
}

pub fn run(
    tools: &Tools,
    place: Place,
    report: &mut Report,
    count: usize,
    connections: usize,
    seed: u64,
) -> Result<()> {
    let scene = Scene::new(tools, place)?;
    scene.keep_in_memory()?;
    let mut rng = Rng::with_seed(seed);
    let mut living = Some(scene.plain(connections)?);
    let whole = duration(&scene, &mut living)?;
    println!("a whole dump takes {whole:?}");
    for victim in [Victim::Criu, Victim::Agent] {
        let (mut hits, mut misses, mut bad) = (0, 0, 0);
        let wanted = if victim == Victim::Criu { count.div_ceil(2) } else { count / 2 };
        while hits < wanted && bad < ENOUGH {
            interrupt::check()?;
            let (server, clients) = match living.take() {
                Some(living) => living,
                None => scene.plain(connections)?,
            };
            let fleet = scene.busy(&server, clients, 0, PERIOD)?;
            // A bit longer, since a dump takes longer now and then: those that come too late do not count.
            let instant = whole.mul_f64(1.25 * rng.f64());
            let name = format!("{}{victim:?} killed after {instant:?}", prefix(place));
            let (hit, verdict) = match once(&scene, server, fleet, victim, instant) {
                Ok((hit, verdict)) => (hit, Ok(verdict)),
                Err(error) => (true, Err(error)),
            };
            let good = verdict.as_ref().is_ok_and(Verdict::is_good);
            if hit || !good {
                hits += 1;
                report.fault("", &name, &verdict);
            } else {
                misses += 1;
            }
            if good {
                living = verdict?.living;
            } else {
                bad += 1;
                drop(verdict);
                scene.sweep()?;
            }
            scene.reap(living.as_ref().map(|(server, _)| server.pid()))?;
        }
        println!("{victim:?} killed {hits} times ({misses} came too late), {bad} failed");
    }
    Ok(())
}

/// The longest of three whole dumps.
fn duration(scene: &Scene, living: &mut Option<(Server, Vec<Client>)>) -> Result<Duration> {
    let mut took = Vec::new();
    for _ in 0..3 {
        let (server, clients) = living.take().context("the server lives")?;
        let fleet = scene.busy(&server, clients, 0, PERIOD)?;
        let images = scene.images()?;
        let (address, pid) = (server.address, server.pid());
        let done = scene.dump(PLUGIN, pid, &images).quiet().dump_and_wait(server.task)?;
        took.push(done.took);
        let server = scene.restore_all(&images, address)?;
        let seen = fleet.stop(PATIENCE);
        anyhow::ensure!(seen.lost.is_empty(), "without a fault: {}", seen.lost.join("\n"));
        *living = Some((server, seen.alive));
    }
    took.into_iter().max().context("three dumps")
}

/// One dump and one death in it, and whether that came in time.
fn once(
    scene: &Scene,
    server: Server,
    fleet: Fleet<Client>,
    victim: Victim,
    instant: Duration,
) -> Result<(bool, Verdict)> {
    let images = scene.images()?;
    let (mut criu, log) = scene.dump(PLUGIN, server.pid(), &images).quiet().spawn()?;
    let hit = match victim {
        Victim::Criu => kill_at(&mut criu, instant)?,
        Victim::Agent => kill_agent_at(scene, &mut criu, instant)?,
    };
    let verdict = outcome::of_dump(scene, server, fleet, &images, false)
        .with_context(|| format!("{} {}", log.display(), last_errors(&log)))?;
    Ok((hit, verdict))
}

/// Whether that came in time; a criu that has ended by itself is not hit.
pub fn kill_at(criu: &mut Child, instant: Duration) -> Result<bool> {
    let ended = wait_readable(&pidfd_open(pid_of(criu))?, instant)?;
    if !ended {
        criu.kill()?;
    }
    criu.wait()?;
    Ok(!ended)
}

/// The agent dies at `instant` after its start, and criu ends as it likes.
fn kill_agent_at(scene: &Scene, criu: &mut Child, instant: Duration) -> Result<bool> {
    let start = Instant::now();
    let mut agent = None;
    wait_until("the agent is there", PATIENCE, || {
        agent = scene.agents()?.first().map(|agent| agent.pid);
        Ok(agent.is_some() || criu.try_wait()?.is_some())
    })?;
    let mut hit = false;
    if let Some(agent) = agent {
        let gone = pidfd_open(agent)
            .and_then(|fd| wait_readable(&fd, instant.saturating_sub(start.elapsed())))
            .unwrap_or(true);
        hit = !gone && kill(agent, Signal::SIGKILL).is_ok();
    }
    let ended = wait_readable(&pidfd_open(pid_of(criu))?, PATIENCE);
    if !matches!(ended, Ok(true)) {
        criu.kill()?;
        criu.wait()?;
        anyhow::bail!("criu hangs after its agent has died");
    }
    criu.wait()?;
    Ok(hit)
}
