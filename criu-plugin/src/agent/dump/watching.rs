//! The outcome of a dump: do the tasks die or run on?
//!
//! criu's last hook comes before it kills or resumes the tasks, and does not say which: after a success they may
//! still run on (`--leave-running`, a post-dump script that fails). So the agent watches the tasks themselves.

use soccr::criu::keeper::Keeper;
use soccr::criu::record::Phase;
use soccr::criu::tasks::{Fate, Task};

use super::arrangement::Arrangement;
use super::held::Held;

/// All is saved, and the outcome is open.
#[derive(Debug)]
pub struct Watching {
    /// What is held until the outcome.
    pub held: Held,
    arrangement: Arrangement,
    /// So many looks in a row must find a task running.
    convincing: u32,
    /// So many did.
    running: u32,
    stopped: bool,
}

/// What one look at the tasks says.
#[derive(Debug)]
pub enum Looked {
    /// Nothing yet.
    Open(Watching),
    /// They are left stopped: dead or alive later on.
    Stopped(Watching),
    /// They are dead or run on, and what that means is carried out.
    Settled(Vec<Task>, Option<Keeper>),
}

impl Watching {
    /// Begins to watch. A task that was killed runs for a moment towards its end and cannot always be told from one
    /// that lives, so "alive" must be seen several times in a row, unless CRIU's options say the same.
    pub fn begin(mut held: Held, arrangement: Arrangement, tasks_stay_alive: bool) -> Self {
        let by_criu = arrangement.locked_by_criu().is_some();
        if arrangement.replaces_criu() {
            held.recorder.replace_criu_locks();
        } else if !by_criu {
            held.recorder.forget_criu_locks();
        }
        let ours = held.locks.keys().any(|ns| arrangement.ours_stays(ns)) || held.path.is_locked();
        held.recorder.keep_after_death(by_criu || ours);
        held.note(Phase::Deciding);
        let convincing = if tasks_stay_alive { 1 } else { 5 };
        Self { held, arrangement, convincing, running: 0, stopped: false }
    }

    /// The tasks.
    pub fn tasks(&self) -> &[Task] {
        &self.held.tasks
    }

    /// How long to wait for an event until the next look.
    pub fn patience_ms(&self) -> u16 {
        if self.stopped { 50 } else { 1 }
    }

    /// Looks at all tasks, and carries out what became of them.
    pub fn look(mut self) -> Looked {
        let fates: Vec<Fate> = self.held.tasks.iter().map(Task::fate).collect();
        self.running = if fates.contains(&Fate::Running) { self.running + 1 } else { 0 };
        let settled = |fate: &Fate| matches!(fate, Fate::Stopped | Fate::Gone);
        self.stopped = false;
        if fates.iter().all(|fate| *fate == Fate::Gone) {
            let (tasks, keeper) = self.held.leave(self.arrangement);
            Looked::Settled(tasks, keeper)
        } else if self.running >= self.convincing {
            Looked::Settled(self.held.let_live(), None)
        } else if fates.iter().all(settled) {
            self.stopped = true;
            self.held.note(Phase::LeftStopped);
            Looked::Stopped(self)
        } else {
            Looked::Open(self)
        }
    }
}
