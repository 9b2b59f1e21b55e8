//! The agent of a dump.
//!
//! 1. [`Saving`]: at the first hook all tasks are frozen already, so the whole tree is looked at, and all its connections
//!    are locked by one transaction per network namespace, before the first is read. Then each is read and written to
//!    its image, and left as it was: only the lock keeps it still, since a socket in repair mode shows a changed
//!    SO_REUSEADDR to criu, which looks at the sockets after us.
//! 2. exit() says how the dump ended. After a success the images are made stock's ([`Arrangement`]).
//! 3. [`Watching`]: the tasks die or run on, and nobody tells which. Our duplicates of the sockets stay open until then.
//! 4. What the dump [held](held::Held) on this host is given up one way or the other. That is the end.

mod arrangement;
pub mod beside;
mod extras;
mod held;
mod queues;
mod saving;
mod watching;
mod writer;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::getppid;
use soccr::chain;
use soccr::criu::image::ImageDir;
use soccr::criu::keeper::Keeper;
use soccr::criu::tasks::Task;

use std::os::fd::AsFd;

use crate::agent::error::AgentError;
use crate::agent::log::{answering, refuse_all};
use crate::agent::server::{Answer, Asked, Server};
use crate::fault;
use crate::protocol::Request;
use arrangement::Arrangement;
use held::Held;
use saving::{Saved, Saving};
use watching::{Looked, Watching};

/// Serves the hooks of one `criu dump` until its outcome is carried out.
pub fn serve(images: ImageDir, criu: i32, tasks_stay_alive: bool, server: &Server) {
    let Ok(criu) = Task::open(criu) else { return };
    fault::actors(Some(criu.pid), None);
    match Saving::begin(images, &criu) {
        Ok(saving) => Dump::new(server, &criu, tasks_stay_alive).run(Progress::Saving(saving)),
        Err(error) => refuse_all(server, error),
    }
}

/// Takes over a dump of which all is saved, from an agent that died: the tasks are still frozen, and the record tells
/// which they are and what is locked.
pub fn take_over(images: ImageDir, criu: i32, tasks_stay_alive: bool, server: &Server) {
    fault::disarm();
    let Ok(criu) = Task::open(criu) else { return };
    match Saved::take_over(images, &criu) {
        Ok(saved) => Dump::new(server, &criu, tasks_stay_alive).run(Progress::TakenOver(saved)),
        Err(error) => refuse_all(server, error),
    }
}

/// How far a dump has come.
#[allow(clippy::large_enum_variant)] // there is one
enum Progress<'a> {
    /// Hooks are still to come.
    Saving(Saving<'a>),
    /// The same, and an agent that died has done all but the last.
    TakenOver(Saved),
    /// exit() was called after a success: the tasks will die or run on.
    Watching(Watching),
    /// All is done. These were the tasks; and what peers send to the dead ones is held.
    Over(Vec<Task>, Option<Keeper>),
}

impl Progress<'_> {
    fn held(&self) -> Option<&Held> {
        match self {
            Self::Saving(saving) => Some(&saving.held),
            Self::TakenOver(saved) => Some(&saved.held),
            Self::Watching(watching) => Some(&watching.held),
            Self::Over(..) => None,
        }
    }

    /// Takes the packets that were held meanwhile; the kernel does not keep many.
    fn read_held(&mut self) {
        match self {
            Self::Saving(saving) => saving.held.holder.read(),
            Self::TakenOver(saved) => saved.held.holder.read(),
            Self::Watching(watching) => watching.held.holder.read(),
            Self::Over(..) => {}
        }
    }
}

/// One dump, as criu's hooks and the tasks' fate drive it.
struct Dump<'a> {
    server: &'a Server,
    criu: &'a Task,
    criu_lives: bool,
    tasks_stay_alive: bool,
    /// Who waits until the connections are where they belong.
    waiting: Vec<Answer>,
}

enum Event {
    Asked(Asked),
    CriuGone,
    Look,
}

impl<'a> Dump<'a> {
    fn new(server: &'a Server, criu: &'a Task, tasks_stay_alive: bool) -> Self {
        Self { server, criu, criu_lives: true, tasks_stay_alive, waiting: Vec::new() }
    }

    fn run(mut self, mut progress: Progress<'_>) {
        while !self.may_leave(&progress) {
            let event = self.wait(&progress);
            progress.read_held();
            progress = match event {
                Event::Asked(asked) => self.serve(progress, asked),
                Event::CriuGone => self.criu_gone(progress),
                Event::Look => progress,
            };
            progress = self.look(progress);
        }
        for answer in self.waiting {
            answer.finish(true);
        }
        // Who is criu's child must not stay: it is waited for.
        if let Progress::Over(_, Some(keeper)) = progress
            && getppid().as_raw() != self.criu.pid
        {
            keeper.serve();
        }
    }

    /// The agent stays as long as criu may ask: one that is gone before is one that was killed. But a criu whose child
    /// it is (the first process of a PID namespace) waits for all its children before it asks.
    fn may_leave(&self, progress: &Progress<'_>) -> bool {
        let Progress::Over(tasks, _) = progress else { return false };
        let awaited = || tasks.iter().all(Task::gone) && getppid().as_raw() == self.criu.pid;
        !self.criu_lives || !self.waiting.is_empty() || awaited()
    }

    /// The next thing to look at. While the outcome is open the tasks are looked at again and again, since no event
    /// tells that a task is traced no more.
    fn wait(&self, progress: &Progress<'_>) -> Event {
        let mut timeout = PollTimeout::NONE;
        let mut fds = vec![];
        if self.criu_lives {
            fds.push(PollFd::new(self.criu.pidfd(), PollFlags::POLLIN));
            fds.push(PollFd::new(self.server.as_fd(), PollFlags::POLLIN));
        }
        if matches!(progress, Progress::Saving(saving) if saving.is_behind()) {
            timeout = PollTimeout::ZERO;
        }
        if let Progress::Watching(watching) = progress {
            timeout = PollTimeout::from(watching.patience_ms());
            let alive = watching.tasks().iter().find(|task| !task.gone());
            fds.extend(alive.map(|task| PollFd::new(task.pidfd(), PollFlags::POLLIN)));
        }
        let logs = progress.held().into_iter().flat_map(|held| held.holder.fds());
        fds.extend(logs.map(|log| PollFd::new(log, PollFlags::POLLIN)));
        if poll(&mut fds, timeout).is_err() {
            return Event::Look;
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any() == Some(true));
        if self.criu_lives && ready(1) {
            match self.server.next() {
                Ok(Some(asked)) => return Event::Asked(asked),
                Ok(None) => return Event::CriuGone,
                Err(_) => {}
            }
        }
        if self.criu_lives && ready(0) { Event::CriuGone } else { Event::Look }
    }

    fn serve<'d>(&mut self, mut progress: Progress<'d>, asked: Asked) -> Progress<'d> {
        let Asked { request, file, answer } = asked;
        match (request, &mut progress) {
            (Request::Checkpoint(pid), Progress::Saving(saving)) => {
                answering(answer, || saving.checkpoint(pid));
            }
            (Request::DumpFile(id), Progress::Saving(saving)) => {
                answering(answer, || saving.external(id, file));
            }
            (Request::DumpEnd(ret), _) => {
                let mut ended = None;
                answering(answer, || {
                    let (progress, result) = self.end(progress, ret);
                    ended = Some(progress);
                    result
                });
                return ended.expect("answering does the work");
            }
            (Request::Settle, _) => self.waiting.push(answer),
            _ => {
                let why = "this is the agent of a dump, and not in the middle of it";
                answering(answer, || Err(AgentError::Protocol(why)));
            }
        }
        progress
    }

    /// criu was killed, or has ended. The kernel lets the tasks run on that were still frozen.
    fn criu_gone<'d>(&mut self, progress: Progress<'d>) -> Progress<'d> {
        self.criu_lives = false;
        match progress {
            Progress::Saving(saving) => Progress::Over(saving.into_held().let_live(), None),
            Progress::TakenOver(saved) => Progress::Over(saved.held.let_live(), None),
            other => other,
        }
    }

    /// exit(): the images are whole, or the dump has failed.
    fn end<'d>(&self, progress: Progress<'d>, ret: i32) -> (Progress<'d>, Result<(), AgentError>) {
        let (mut saved, taken_over) = match progress {
            Progress::Saving(saving) => (saving.into_saved(), false),
            Progress::TakenOver(saved) => {
                log::warn!("took over from an agent that died: {} connections", saved.held.sockets.len());
                (saved, true)
            }
            other => return (other, Ok(())),
        };
        if ret != 0 {
            return (Progress::Over(saved.held.let_live(), None), Ok(()));
        }
        let arranged = fault::point("dump.end").map_err(AgentError::from).and_then(|()| {
            let (images, lock, tree) = (&saved.images, &saved.lock_name, saved.held.tree());
            if taken_over {
                Arrangement::of_dead_agent(images, lock, &tree, self.criu).map(Some)
            } else {
                Arrangement::make(images, lock, &tree, self.criu)
            }
        });
        let (arrangement, arranged) = match arranged {
            Ok(Some(arrangement)) => (arrangement, Ok(())),
            // A runtime's request says so, which nobody sees before.
            Ok(None) => {
                if let Err(error) = beside::write(&saved.images, std::mem::take(&mut saved.sockets)) {
                    log::warn!("what CRIU does not carry is lost: {}", chain(&error));
                }
                return (Progress::Over(saved.held.stand_aside(), None), Ok(()));
            }
            // CRIU kills the tasks all the same: the images are as they are, and the locks are needed.
            Err(error) => (Arrangement::as_it_is(), Err(error)),
        };
        // The listeners of tasks that run on get these by themselves, as soon as nothing is locked.
        if !self.tasks_stay_alive {
            saved.complete_requests();
        }
        let result = arranged.and(saved.write_side_image());
        let watching = Watching::begin(saved.held, arrangement, self.tasks_stay_alive);
        (Progress::Watching(watching), result.and(fault::point("dump.arranged").map_err(AgentError::from)))
    }

    fn look<'d>(&mut self, mut progress: Progress<'d>) -> Progress<'d> {
        if let Progress::Saving(saving) = &mut progress
            && saving.is_behind()
        {
            saving.read_ahead();
        }
        let Progress::Watching(watching) = progress else { return progress };
        match watching.look() {
            Looked::Open(watching) => Progress::Watching(watching),
            // Left stopped: that may last, and criu need not wait for it.
            Looked::Stopped(watching) => {
                for answer in self.waiting.drain(..) {
                    answer.finish(true);
                }
                Progress::Watching(watching)
            }
            Looked::Settled(tasks, keeper) => Progress::Over(tasks, keeper),
        }
    }
}
