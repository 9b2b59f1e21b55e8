//! Every named point of dump and restore, with everybody who can die there.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use soccr_testkit::criu::{Call, last_errors};
use soccr_testkit::interrupt;
use soccr_testkit::stage::PATIENCE;
use soccr_testkit::task::{name_and_state, pid_of, wait_until};
use soccr_testkit::waiting::Waiting;
use soccr_testkit::{Client, Fleet, Place, Server};

use crate::faults::outcome::{self, Verdict};
use crate::faults::prefix;
use crate::faults::report::Report;
use crate::faults::scene::{PLUGIN, Scene, Tools};

const DUMP: &str = "\
    dump.init dump.asked dump.tree dump.found dump.recorded dump.locked dump.accepted dump.queue-locked \
    dump.paused dump.read dump.resumed dump.written dump.queue-written dump.saved dump.extras dump.end dump.arranged dump.dead dump.closing dump.closed";
/// From here on connections that nobody has accepted are with the agent alone.
const TAKEN: &str = "dump.accepted";
/// From here on the images are complete.
const COMPLETE: &str = "dump.end";

const RESTORE: &str = "\
    restore.init restore.prepared restore.locked restore.forked restore.asked restore.copied \
    restore.disconnected restore.syn-sent restore.syn-acked restore.built restore.all-built queue.closed queue.put \
    restore.unlocking restore.unlocked restore.released \
    restore.waking restore.awake restore.end";
/// In a hook of CRIU's that is called since 4.2.
const FORKED: &str = "restore.forked";
/// From here on the restored server has its connections.
const GIVEN_BACK: &str = "restore.unlocked";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    KillCriu,
    /// Stopped, then continued.
    StopCriu,
    /// Stopped, then killed.
    EndStoppedCriu,
    KillAgent,
    StopAgent,
    KillTask,
    Error,
}

const ACTIONS: [Action; 7] = [
    Action::KillCriu,
    Action::StopCriu,
    Action::EndStoppedCriu,
    Action::KillAgent,
    Action::StopAgent,
    Action::KillTask,
    Action::Error,
];

impl Action {
    /// What the plugin is told.
    fn word(self) -> &'static str {
        match self {
            Self::KillCriu => "kill-criu",
            Self::StopCriu | Self::EndStoppedCriu => "stop-criu",
            Self::KillAgent => "kill-agent",
            Self::StopAgent => "stop-agent",
            Self::KillTask => "kill-task",
            Self::Error => "error",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::EndStoppedCriu => "stop-and-kill-criu",
            _ => self.word(),
        }
    }

    /// Before the first hook no task is known; after the last there is none, and nobody hears of an error.
    fn suits(self, point: &str) -> bool {
        match self {
            Self::KillTask => !matches!(
                point,
                "dump.init"
                    | "dump.dead"
                    | "dump.closing"
                    | "dump.closed"
                    | "restore.init"
                    | "restore.prepared"
                    | "restore.locked"
                    | "restore.forked"
            ),
            Self::Error => !matches!(point, "dump.extras" | "dump.dead" | "dump.closing" | "dump.closed"),
            _ => true,
        }
    }
}

const CONNECTIONS: usize = 8;
/// So many more that nobody has accepted.
const WAITING: u8 = 3;
/// Of these the first have full queues, the others talk.
const FULL: usize = 4;
const PERIOD: Duration = Duration::from_millis(40);

pub fn run(
    tools: &Tools,
    place: Place,
    report: &mut Report,
    only: Option<&str>,
    every: NonZeroUsize,
) -> Result<()> {
    let scene = Scene::new(tools, place)?;
    let mut living = None;
    let mut turn = (0..every.get()).cycle();
    let forks = tools.criu.has_post_forking()?;
    for point in DUMP.split(' ').chain(RESTORE.split(' ')) {
        if point == FORKED && !forks {
            println!(
                "{:29} not there: CRIU calls nobody then before 4.2",
                format!("{}{point}", prefix(place))
            );
            continue;
        }
        let mut line = Vec::new();
        for action in ACTIONS.into_iter().filter(|action| action.suits(point)) {
            interrupt::check()?;
            let name = format!("{}{point}:{}", prefix(place), action.name());
            if only.is_some_and(|only| !name.contains(only)) || turn.next() != Some(0) {
                continue;
            }
            let (server, clients) = match living.take() {
                Some(living) => living,
                None => scene.small(CONNECTIONS)?,
            };
            let waiting = scene.connect_waiting(&server, WAITING)?;
            let fleet = scene.busy(&server, clients, FULL, PERIOD)?;
            let start = Instant::now();
            let verdict = if DUMP.contains(point) {
                in_dump(&scene, server, fleet, waiting, point, action)
            } else {
                in_restore(&scene, server, fleet, waiting, point, action)
            };
            let ended = report.fault(action.name(), &name, &verdict);
            line.push(format!("{ended} {:.1} s", start.elapsed().as_secs_f64()));
            match verdict {
                Ok(verdict) if verdict.is_good() => living = verdict.living,
                _ => scene.sweep()?,
            }
            scene.reap(living.as_ref().map(|(server, _)| server.pid()))?;
        }
        if !line.is_empty() {
            println!("{:29} {}", format!("{}{point}", prefix(place)), line.join(", "));
        }
    }
    Ok(())
}

fn in_dump(
    scene: &Scene,
    server: Server,
    fleet: Fleet<Client>,
    waiting: Vec<Waiting>,
    point: &str,
    action: Action,
) -> Result<Verdict> {
    let images = scene.images()?;
    let call = scene.dump(PLUGIN, server.pid(), &images).plugins(&scene.tools.faulty);
    run_with_fault(scene, call, point, action, &images.join("dump.log"))?;
    let killed = action == Action::KillTask && DUMP.find(point) < DUMP.find(COMPLETE);
    let alone = DUMP.find(TAKEN) <= DUMP.find(point) && DUMP.find(point) < DUMP.find(COMPLETE);
    // One that is stopped is killed by criu's side after a while.
    let agent = matches!(action, Action::KillAgent | Action::StopAgent);
    let told = alone && agent && says(&images, "that nobody had accepted at")?;
    outcome::of_dump(scene, server, fleet, &images, killed)
        .and_then(|verdict| verdict.with_waiting(waiting, told))
        .with_context(|| log_of(&images, "dump.log"))
}

fn in_restore(
    scene: &Scene,
    server: Server,
    fleet: Fleet<Client>,
    waiting: Vec<Waiting>,
    point: &str,
    action: Action,
) -> Result<Verdict> {
    let images = scene.images()?;
    let (pid, address) = (server.pid(), server.address);
    scene.dump(PLUGIN, pid, &images).dump_and_wait(server.task)?;
    let call = scene.restore(PLUGIN, &images)?.plugins(&scene.tools.faulty);
    run_with_fault(scene, call, point, action, &images.join("restore.log"))?;
    let killed = action == Action::KillTask && RESTORE.find(point) >= RESTORE.find(GIVEN_BACK);
    outcome::of_restore(scene, pid, address, fleet, &images, killed)
        .and_then(|verdict| verdict.with_waiting(waiting, false))
        .with_context(|| log_of(&images, "restore.log"))
}

/// Whether the dump's log says that connections are lost.
fn says(images: &Path, what: &str) -> Result<bool> {
    let log = fs::read_to_string(images.join("dump.log"))?;
    Ok(log.lines().any(|line| line.contains(what) && line.contains("are lost")))
}

fn log_of(images: &Path, name: &str) -> String {
    format!("{name}:\n{}", last_errors(&images.join(name)))
}

/// Runs criu with a fault in it to its end, whatever that is.
fn run_with_fault(scene: &Scene, call: Call, point: &str, action: Action, log: &Path) -> Result<()> {
    let told = scene.dir().join("told");
    let _ = fs::remove_file(&told);
    let fault = format!("{point}:{}", action.word());
    let call = call.env("SOCCR_FAULT", &fault).env("SOCCR_FAULT_TOLD", &told);
    let (mut criu, _) = call.spawn()?;
    end_of(&mut criu, action).with_context(|| last_errors(log))?;
    let said = fs::read_to_string(&told).unwrap_or_default();
    ensure!(said == fault, "the point was not passed ({said:?}):\n{}", last_errors(log));
    Ok(())
}

fn end_of(criu: &mut Child, action: Action) -> Result<()> {
    let pid = pid_of(criu);
    let mut stops = 0;
    let waited = wait_until("criu ends", PATIENCE, || {
        if criu.try_wait()?.is_some() {
            return Ok(true);
        }
        if name_and_state(pid).is_some_and(|(_, state)| state == 'T') {
            stops += 1;
            let signal = if action == Action::EndStoppedCriu { Signal::SIGKILL } else { Signal::SIGCONT };
            kill(pid, signal)?;
        }
        Ok(false)
    });
    if waited.is_err() {
        let _ = criu.kill();
        criu.wait()?;
    }
    waited
}
