//! Random instants of a dump of 1000 busy connections: criu and the agent are killed in turn.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use soccr_testkit::criu::last_errors;
use soccr_testkit::task::{pidfd_open, wait_readable, wait_until};
use soccr_testkit::{Client, Server};

use crate::faults::fleet::Fleet;
use crate::faults::outcome::{self, Kind, Verdict};
use crate::faults::report::Report;
use crate::faults::stage::{PATIENCE, Stage};
use crate::faults::tools::Tools;

const CONNECTIONS: usize = 1000;
/// Each sends this often.
const PERIOD: Duration = Duration::from_millis(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Criu,
    Agent,
}

struct Outcomes {
    lives: usize,
    restored: usize,
    breakpoint: usize,
    cleaned: usize,
}

pub fn run(tools: &Tools, report: &mut Report, count: usize, seed: u64) -> Result<()> {
    let mut stage = Stage::new(tools)?;
    stage.keep_in_memory()?;
    let mut rng = Rng::with_seed(seed);
    let mut living = Some(fresh(&stage)?);
    let whole = duration(&mut stage, &mut living)?;
    println!("a whole dump takes {whole:?}");
    for victim in [Victim::Criu, Victim::Agent] {
        let mut seen = Outcomes { lives: 0, restored: 0, breakpoint: 0, cleaned: 0 };
        let (mut hits, mut misses) = (0, 0);
        let wanted = if victim == Victim::Criu { count.div_ceil(2) } else { count / 2 };
        while hits < wanted {
            let (server, clients) = match living.take() {
                Some(living) => living,
                None => fresh(&stage)?,
            };
            let fleet = Fleet::start(clients, 0, PERIOD)?;
            // A bit longer, since a dump takes longer now and then: those that come too late do not count.
            let instant = whole.mul_f64(1.25 * rng.f64());
            let name = format!("{victim:?} killed after {instant:?}");
            let (hit, verdict) = match once(&mut stage, server, fleet, victim, instant) {
                Ok((hit, verdict)) => (hit, Ok(verdict)),
                Err(error) => (true, Err(error)),
            };
            if hit {
                hits += 1;
                report.fault("", &name, &verdict);
            } else {
                misses += 1;
            }
            match verdict {
                Ok(verdict) if verdict.lost.is_empty() => {
                    if hit {
                        seen.add(&verdict);
                    }
                    living = verdict.living;
                }
                Ok(verdict) => {
                    drop(verdict);
                    stage.sweep()?;
                }
                Err(_) => stage.sweep()?,
            }
            stage.reap(living.as_ref().map(|(server, _)| server.pid()))?;
        }
        let Outcomes { lives, restored, breakpoint, cleaned } = seen;
        println!(
            "{victim:?} killed {hits} times ({misses} came too late): the server lived on {lives}, was restored \
             {restored}, CRIU's breakpoint killed it {breakpoint}, soccr clean was needed {cleaned}"
        );
    }
    Ok(())
}

impl Outcomes {
    fn add(&mut self, verdict: &Verdict) {
        match verdict.kind {
            Kind::Lives => self.lives += 1,
            Kind::Restored => self.restored += 1,
            Kind::Breakpoint => self.breakpoint += 1,
            Kind::EndedWithTask => {}
        }
        self.cleaned += usize::from(verdict.cleaned);
    }
}

fn fresh(stage: &Stage) -> Result<(Server, Vec<Client>)> {
    let server = stage.serve_plain()?;
    let clients = stage.connect_plain(&server, CONNECTIONS)?;
    Ok((server, clients))
}

/// The longest of three whole dumps.
fn duration(stage: &mut Stage, living: &mut Option<(Server, Vec<Client>)>) -> Result<Duration> {
    let mut took = Vec::new();
    for _ in 0..3 {
        let (server, clients) = living.take().context("the server lives")?;
        let fleet = Fleet::start(clients, 0, PERIOD)?;
        let images = stage.images()?;
        let (address, pid) = (server.address, server.pid());
        let done = stage.dump(&stage.tools.criu, pid, &images).quiet().dump_and_wait(server.task)?;
        took.push(done.took);
        let server = stage.restore_all(&images, address)?;
        let seen = fleet.stop(PATIENCE);
        anyhow::ensure!(seen.lost.is_empty(), "without a fault: {}", seen.lost.join("\n"));
        *living = Some((server, seen.alive));
    }
    took.into_iter().max().context("three dumps")
}

/// One dump and one death in it, and whether that came in time.
fn once(
    stage: &mut Stage,
    server: Server,
    fleet: Fleet,
    victim: Victim,
    instant: Duration,
) -> Result<(bool, Verdict)> {
    let images = stage.images()?;
    let stage = &*stage;
    let (mut criu, log) = stage.dump(&stage.tools.criu, server.pid(), &images).quiet().spawn()?;
    let hit = match victim {
        Victim::Criu => kill_at(&mut criu, instant)?,
        Victim::Agent => kill_agent_at(stage, &mut criu, instant)?,
    };
    let verdict = outcome::of_dump(stage, server, fleet, &images, false)
        .with_context(|| format!("{} {}", log.display(), last_errors(&log)))?;
    Ok((hit, verdict))
}

fn kill_at(criu: &mut Child, instant: Duration) -> Result<bool> {
    // The instant is the point here; a criu that ends earlier is not hit.
    let ended = wait_readable(&pidfd_open(pid_of(criu)?)?, instant)?;
    if !ended {
        criu.kill()?;
    }
    criu.wait()?;
    Ok(!ended)
}

/// The agent dies at `instant` after its start, and criu ends as it likes.
fn kill_agent_at(stage: &Stage, criu: &mut Child, instant: Duration) -> Result<bool> {
    let start = Instant::now();
    let mut agent = None;
    wait_until("the agent is there", PATIENCE, || {
        agent = stage.agents()?.first().map(|agent| agent.pid);
        Ok(agent.is_some() || criu.try_wait()?.is_some())
    })?;
    let mut hit = false;
    if let Some(agent) = agent {
        let gone = pidfd_open(agent)
            .and_then(|fd| wait_readable(&fd, instant.saturating_sub(start.elapsed())))
            .unwrap_or(true);
        hit = !gone && kill(agent, Signal::SIGKILL).is_ok();
    }
    let ended = wait_readable(&pidfd_open(pid_of(criu)?)?, PATIENCE);
    if !matches!(ended, Ok(true)) {
        criu.kill()?;
        criu.wait()?;
        anyhow::bail!("criu hangs after its agent has died");
    }
    criu.wait()?;
    Ok(hit)
}

fn pid_of(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}
