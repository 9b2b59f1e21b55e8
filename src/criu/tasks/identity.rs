//! Which process a pid means: pids are used again, but not with the same start time.

use std::fmt;

use procfs::ProcResult;
use procfs::process::{ProcState, Process};
use serde::{Deserialize, Serialize};

/// A process, told from later ones with its pid by the time at which it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid in our PID namespace.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start: u64,
}

impl ProcessId {
    /// The process that has this pid now.
    ///
    /// # Errors
    /// When there is none, or `/proc` cannot be read.
    pub fn of(pid: i32) -> ProcResult<Self> {
        Ok(Self { pid, start: Process::new(pid)?.stat()?.starttime })
    }

    /// This process.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn this() -> ProcResult<Self> {
        Self::of(std::process::id().cast_signed())
    }

    /// Whether it runs (or is stopped); a zombie does not.
    #[must_use]
    pub fn lives(&self) -> bool {
        let stat = Process::new(self.pid).and_then(|process| process.stat());
        stat.is_ok_and(|stat| {
            let dead = matches!(stat.state(), Ok(ProcState::Zombie | ProcState::Dead));
            stat.starttime == self.start && !dead
        })
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.pid.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_lives_until_it_is_a_zombie() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        assert!(id.lives());
        assert!(!ProcessId { start: id.start + 1, ..id }.lives());
        let pidfd = crate::kernel::process::pidfd_open(id.pid).unwrap();
        drop(child.stdin.take());
        let mut ended =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&pidfd), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut ended, nix::poll::PollTimeout::NONE).unwrap();
        assert!(!id.lives(), "a zombie");
        child.wait().unwrap();
        assert!(!id.lives());
    }
}
