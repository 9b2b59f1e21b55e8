//! What a record means now.

use std::fmt;

use super::{Phase, Record, current_boot, own_pid_ns};
use crate::criu::tasks::ProcessId;

/// What has become of a dump or restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// A dump is at work: the tasks are frozen.
    Frozen,
    /// The dump is complete, and its tasks are stopped.
    LeftStopped,
    /// The dump is complete; its locks wait for a restore. Also after a restore that was killed.
    Dumped,
    /// A restore is at work.
    Restoring,
    /// Who worked on it is dead, or the host was started anew since: what is left is to be removed.
    Orphaned,
    /// It was recorded in another PID namespace, so from here nobody can tell.
    Elsewhere,
}

impl State {
    /// Whether somebody works on it, or may do so: not to be disturbed.
    #[must_use]
    pub fn at_work(self) -> bool {
        matches!(self, Self::Frozen | Self::Restoring | Self::Elsewhere)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Frozen => "frozen",
            Self::LeftStopped => "left stopped",
            Self::Dumped => "dumped",
            Self::Restoring => "restoring",
            Self::Orphaned => "orphaned",
            Self::Elsewhere => "elsewhere",
        })
    }
}

impl Record {
    /// What has become of it.
    #[must_use]
    pub fn state(&self) -> State {
        if self.boot != current_boot() {
            return State::Orphaned;
        }
        if self.pid_ns != own_pid_ns() {
            // Who waits for a restore is nobody; everything else depends on who lives.
            return if self.phase == Phase::Dumped { State::Dumped } else { State::Elsewhere };
        }
        if self.phase == Phase::Dumped && !self.stopped.is_empty() && self.agent.lives() {
            return State::Frozen;
        }
        let tasks_live = self.tasks.iter().any(ProcessId::lives);
        match judge(self.phase, self.criu.lives(), self.agent.lives()) {
            // The images are whole, the tasks dead, and the locks as they should be: only nobody has noted it.
            State::Orphaned if self.phase != Phase::Saving && self.phase != Phase::Waking && !tasks_live => {
                if self.kept_after_death || !self.criu_locks.is_empty() {
                    State::Dumped
                } else {
                    State::Orphaned
                }
            }
            state => state,
        }
    }
}

fn judge(phase: Phase, criu_lives: bool, agent_lives: bool) -> State {
    let at_work = criu_lives || agent_lives;
    match phase {
        Phase::Dumped => State::Dumped,
        Phase::Saving | Phase::Deciding if at_work => State::Frozen,
        // Without the agent nobody would unlock when the tasks are continued.
        Phase::LeftStopped if agent_lives => State::LeftStopped,
        Phase::Restoring | Phase::Waking if at_work => State::Restoring,
        Phase::Restoring => State::Dumped,
        Phase::Saving | Phase::Deciding | Phase::LeftStopped | Phase::Waking => State::Orphaned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_phase_means_depends_on_who_lives() {
        for (phase, both, agent, neither) in [
            (Phase::Saving, State::Frozen, State::Frozen, State::Orphaned),
            (Phase::Deciding, State::Frozen, State::Frozen, State::Orphaned),
            (Phase::LeftStopped, State::LeftStopped, State::LeftStopped, State::Orphaned),
            (Phase::Dumped, State::Dumped, State::Dumped, State::Dumped),
            (Phase::Restoring, State::Restoring, State::Restoring, State::Dumped),
            (Phase::Waking, State::Restoring, State::Restoring, State::Orphaned),
        ] {
            assert_eq!(judge(phase, true, true), both, "{phase:?}");
            assert_eq!(judge(phase, false, true), agent, "{phase:?}");
            assert_eq!(judge(phase, false, false), neither, "{phase:?}");
        }
        assert_eq!(judge(Phase::Saving, true, false), State::Frozen);
        assert_eq!(judge(Phase::LeftStopped, true, false), State::Orphaned);
    }
}
