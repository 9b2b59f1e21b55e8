//! The agent of a restore.
//!
//! CRIU has made the sockets, set their options and shut them down. What is missing is the connection. Between CRIU's own
//! unlocking and its late hook peers' packets would meet a socket without a connection and be answered with RST, so our
//! lock is there as early as can be.
//!
//! 1. init(): what the images hold is read ([`Plan`]), and locked ([`Locks`]) in criu's own namespace and in those that
//!    criu was given for the tree.
//! 2. POST_FORKING: the root task is there, and locked in its namespace where that is another one.
//!    CRIU forks meanwhile, where [nothing is to be done before that](ahead). The images are read ahead while CRIU makes the sockets.
//! 3. [`Building`]: each connection is built when the hook of its task comes, in its socket's namespace, which is locked
//!    before that at the latest; it stays in repair mode.
//! 4. [`waking`]: after the last task all leave repair mode, silently; then they are unlocked, from where there is no way
//!    back; and then a probe from each that has something to wait for wakes its flow.
//!
//! When anything fails the sockets are closed in repair mode, silently, and the lock is what it was before, under the
//! name that the images know: the restore can be tried again, by us or by stock CRIU.

mod ahead;
mod builder;
mod building;
mod locks;
mod plan;
mod preloaded;
mod waking;

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::getppid;
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::rules::Rules;
use soccr::criu::tasks::Task;
use soccr::kernel::netns::NetNs;

use crate::agent::error::AgentError;
use crate::agent::listeners;
use crate::agent::log::{self, answering};
use crate::agent::profile::Profile;
use crate::agent::server::{Asked, Server};
use crate::fault;
use crate::protocol::Request;
use building::Building;
use locks::Locks;
use plan::Plan;

/// Serves the hooks of one `criu restore`.
pub fn serve(images: ImageDir, criu: i32, server: &Server) {
    let Ok(criu) = Task::open(criu) else { return };
    fault::actors(Some(criu.pid), None);
    let mut progress = Progress::Idle(images);
    loop {
        let event = wait(&criu, server, &progress);
        if let Progress::Building(building) | Progress::Failed(building) = &mut progress {
            building.locks.holder.read();
        }
        match event {
            Event::Asked(asked) => {
                let last = matches!(asked.request, Request::RestoreEnd(_));
                progress = progress.serve(&criu, asked);
                if last {
                    return;
                }
            }
            Event::CriuGone => return progress.criu_gone(),
            Event::Idle => progress.work_ahead(),
            Event::Look => {}
            Event::TasksGone => return,
        }
    }
}

/// How far a restore has come.
#[derive(Debug)]
enum Progress<'a> {
    /// Nothing was asked yet.
    Idle(ImageDir),
    /// The connections are locked, and built as their tasks come.
    Building(Building<'a>),
    /// One of them could not be built, and no other shall be.
    Failed(Building<'a>),
    /// All connections go on. These are the tasks.
    Done(Vec<Task>),
}

enum Event {
    Asked(Asked),
    CriuGone,
    TasksGone,
    /// Nobody asks, and there is work that can be done before somebody does.
    Idle,
    Look,
}

/// A criu whose child the agent is (the first process of a PID namespace), and that was not told to detach, waits for
/// all its children before its last hook: then the agent leaves when the restored tasks have ended.
fn wait(criu: &Task, server: &Server, progress: &Progress<'_>) -> Event {
    let mut fds =
        vec![PollFd::new(server.as_fd(), PollFlags::POLLIN), PollFd::new(criu.pidfd(), PollFlags::POLLIN)];
    if let Progress::Done(tasks) = progress
        && getppid().as_raw() == criu.pid
    {
        let Some(running) = tasks.iter().find(|task| !task.gone()) else { return Event::TasksGone };
        fds.push(PollFd::new(running.pidfd(), PollFlags::POLLIN));
    }
    if let Progress::Building(building) | Progress::Failed(building) = progress {
        fds.extend(building.locks.holder.fds().map(|log| PollFd::new(log, PollFlags::POLLIN)));
    }
    let timeout = if progress.can_work_ahead() { PollTimeout::ZERO } else { PollTimeout::NONE };
    match poll(&mut fds, timeout) {
        Ok(0) => return Event::Idle,
        Err(_) => return Event::Look,
        Ok(_) => {}
    }
    if fds[0].any() == Some(true) {
        match server.next() {
            Ok(Some(asked)) => return Event::Asked(asked),
            Ok(None) => return Event::CriuGone,
            Err(_) => {}
        }
    }
    if fds[1].any() == Some(true) { Event::CriuGone } else { Event::Look }
}

impl<'a> Progress<'a> {
    fn serve(self, criu: &'a Task, asked: Asked) -> Self {
        let Asked { request, answer, .. } = asked;
        let mut next = None;
        answering(answer, || {
            let (progress, result) = self.work(criu, request);
            next = Some(progress);
            result
        });
        next.expect("answering does the work")
    }

    fn work(self, criu: &'a Task, request: Request) -> (Self, Result<(), AgentError>) {
        match (request, self) {
            (Request::Prepare, Self::Idle(images)) => match prepare(&images, criu) {
                Ok(building) => (Self::Building(building), Ok(())),
                Err(error) => (Self::Idle(images), Err(error)),
            },
            (Request::Forked, Self::Building(mut building)) => {
                let result = building.forked();
                (Self::Building(building), result)
            }
            (Request::Resume(pid), Self::Building(mut building)) => match building.bring_back(pid) {
                Ok(()) if building.awaits_tasks() => (Self::Building(building), Ok(())),
                Ok(()) => Self::wake(building),
                Err(error) => (Self::Failed(building), Err(error)),
            },
            (Request::Resume(_), failed @ Self::Failed(_)) => (failed, Err(AgentError::FailedBefore)),
            (Request::RestoreEnd(ret), progress) => {
                let (progress, result) = match (fault::point("restore.end"), progress) {
                    (Err(error), progress) => (progress, Err(error.into())),
                    (Ok(()), Self::Building(building)) if ret == 0 => end(building),
                    (Ok(()), Self::Building(building)) => {
                        building.locks.name_missing_addresses();
                        (Self::Building(building), Ok(()))
                    }
                    (Ok(()), other) => (other, Ok(())),
                };
                progress.give_up();
                (Self::Done(Vec::new()), result)
            }
            (Request::Forked | Request::Resume(_), other) => (other, Ok(())),
            (_, other) => (other, Err(AgentError::Protocol("this is the agent of a restore"))),
        }
    }

    fn can_work_ahead(&self) -> bool {
        matches!(self, Self::Building(it) if it.preloaded.wants_more() || it.locks.is_behind())
    }

    fn work_ahead(&mut self) {
        match self {
            Self::Building(Building { locks, .. }) if locks.is_behind() => locks.establish_some(),
            Self::Building(Building { preloaded, plan, .. }) => preloaded.read_some(&plan.images),
            _ => {}
        }
    }

    /// All is built.
    fn wake(building: Building<'a>) -> (Self, Result<(), AgentError>) {
        match waking::wake(building) {
            Ok(tasks) => (Self::Done(tasks), Ok(())),
            Err(waking::Failed { building, error }) => (Self::Failed(building), Err(error)),
        }
    }

    /// What was not completed by now can be tried again.
    fn give_up(self) {
        if let Self::Building(building) | Self::Failed(building) = self {
            building.give_up();
        }
    }

    /// criu was killed. The kernel lets the tasks run then, which are not complete: their connections are shut down, or in
    /// repair mode. They are ended before they can do much, and the restore can be tried again.
    fn criu_gone(self) {
        if let Self::Building(building) | Self::Failed(building) = &self {
            building.kill_tasks();
        }
        self.give_up();
    }
}

fn prepare<'a>(images: &ImageDir, criu: &'a Task) -> Result<Building<'a>, AgentError> {
    fault::point("restore.init")?;
    // It closes them soon.
    let inherited = criu.open_namespaces().unwrap_or_else(|error| {
        ::log::warn!("a namespace that criu was given is locked late: cannot list its descriptors: {error}");
        Vec::new()
    });
    // As soon as CRIU goes on, it listens itself, and nobody could tell its listeners from others'.
    let criu_ns = NetNs::of_task(criu.pid.cast_unsigned())?;
    let namespaces = inherited.iter().cloned().chain([criu_ns]);
    let taken = namespaces.map(|ns| (ns.clone(), listeners::taken_ports(&ns))).collect();
    let rules = Rules::read()?;
    let mut profile = Profile::start("restore");
    let external_ids = ExternalImage::ids(images)?;
    if ahead::is_safe(images, &external_ids, &rules) {
        log::proceed();
    }
    let plan = Plan::read(images, &external_ids, rules)?;
    profile.lap("load");
    let locks = Locks::new(&plan, criu, taken)?;
    fault::point("restore.prepared")?;
    let mut building = Building::begin(plan, locks, criu);
    profile.lap("record");
    building.refuse_living(&inherited)?;
    building.lock_beside_criu()?;
    building.lock_inherited(inherited)?;
    profile.lap("lock");
    fault::point("restore.locked")?;
    Ok(building)
}

/// exit() of a restore that succeeded, without a task whose hook could come.
fn end(mut building: Building<'_>) -> (Progress<'_>, Result<(), AgentError>) {
    match building.adopt_without_tasks() {
        Ok(()) => Progress::wake(building),
        Err(error) => (Progress::Failed(building), Err(error)),
    }
}
