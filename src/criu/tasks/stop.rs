//! Tasks that stand still without anybody who holds them: SIGSTOP outlives its sender, as ptrace does not.

use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use procfs::process::{ProcState, Process};
use procfs::{ProcError, ProcResult};

use super::Task;
use crate::kernel::{SysError, process};

impl Task {
    /// Stops it, and waits until none of its threads runs any more.
    ///
    /// # Errors
    /// What the signal met; ETIMEDOUT for a task that does not stop, which is continued then.
    pub fn stop(&self) -> Result<(), SysError> {
        /// A thread in the middle of a system call that cannot be interrupted stops after it.
        const PATIENCE: Duration = Duration::from_secs(5);
        const LOOK: Duration = Duration::from_millis(1);
        process::send_signal(self.pidfd(), Signal::SIGSTOP)?;
        let deadline = Instant::now() + PATIENCE;
        // Only its parent hears of it.
        while !is_stopped(self.pid).unwrap_or(false) {
            if Instant::now() > deadline || self.gone() {
                let errno = if self.gone() { Errno::ESRCH } else { Errno::ETIMEDOUT };
                let _ = self.carry_on(); // the first error is the one to tell
                return Err(SysError { call: "stop a task", errno });
            }
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Continues it.
    ///
    /// # Errors
    /// ESRCH when it is gone.
    pub fn carry_on(&self) -> Result<(), SysError> {
        process::send_signal(self.pidfd(), Signal::SIGCONT)
    }
}

fn is_stopped(pid: i32) -> ProcResult<bool> {
    for thread in Process::new(pid)?.tasks()? {
        match thread.and_then(|thread| thread.stat()?.state()) {
            Ok(ProcState::Stopped | ProcState::Zombie | ProcState::Dead) | Err(ProcError::NotFound(_)) => {}
            other => return other.map(|_| false),
        }
    }
    Ok(true)
}
