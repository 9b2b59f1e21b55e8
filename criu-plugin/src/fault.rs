//! Named points at which a test can have somebody die. Only in builds with the feature `fault-injection`
//! (`target/plugins-fault`); in all others a point is nothing.
//!
//! `SOCCR_FAULT=POINT:ACTION[:N]` does ACTION when POINT is passed for the N-th time (1 unless told); several are
//! separated by commas.
//!
//! Before that it writes `POINT:ACTION` into the file that `SOCCR_FAULT_TOLD` names.
//!
//! | action | what happens |
//! |---|---|
//! | `kill-criu`, `stop-criu` | SIGKILL or SIGSTOP to criu |
//! | `kill-agent`, `stop-agent` | the same to the agent itself |
//! | `kill-task` | SIGKILL to the task that is being worked on, or the root task |
//! | `error` | the step fails |
//! | `panic` | the step panics |

/// A fault of the kind `error`.
#[derive(Debug, thiserror::Error)]
#[error("a fault was injected at {0}")]
pub struct Injected(pub &'static str);

#[cfg(not(feature = "fault-injection"))]
mod points {
    use super::Injected;

    /// Passes a point.
    ///
    /// # Errors
    /// Never.
    #[inline]
    #[allow(clippy::unnecessary_wraps)]
    pub fn point(_name: &'static str) -> Result<(), Injected> {
        Ok(())
    }

    /// Tells who can be made to die.
    #[inline]
    pub fn actors(_criu: Option<i32>, _task: Option<i32>) {}

    /// Makes all points nothing: one fault is enough.
    #[inline]
    pub fn disarm() {}
}

#[cfg(feature = "fault-injection")]
mod points {
    use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

    use nix::sys::signal::{Signal, kill, raise};
    use nix::unistd::Pid;

    use super::Injected;

    static CRIU: AtomicI32 = AtomicI32::new(0);
    static TASK: AtomicI32 = AtomicI32::new(0);
    /// How often the point of each fault was passed.
    static PASSED: [AtomicU32; 4] = [const { AtomicU32::new(0) }; 4];
    static DISARMED: AtomicBool = AtomicBool::new(false);

    /// Makes all points nothing: one fault is enough.
    pub fn disarm() {
        DISARMED.store(true, Ordering::Relaxed);
    }

    /// Tells who can be made to die.
    pub fn actors(criu: Option<i32>, task: Option<i32>) {
        for (actor, pid) in [(&CRIU, criu), (&TASK, task)] {
            if let Some(pid) = pid {
                actor.store(pid, Ordering::Relaxed);
            }
        }
    }

    /// Passes a point, and does what `SOCCR_FAULT` says of it.
    ///
    /// # Errors
    /// [`Injected`], for the action `error`.
    pub fn point(name: &'static str) -> Result<(), Injected> {
        let faults = std::env::var("SOCCR_FAULT").unwrap_or_default();
        faults.split(',').zip(&PASSED).try_for_each(|(fault, passed)| pass(fault, name, passed))
    }

    fn pass(fault: &str, name: &'static str, passed: &AtomicU32) -> Result<(), Injected> {
        let mut words = fault.split(':');
        if words.next() != Some(name) || DISARMED.load(Ordering::Relaxed) {
            return Ok(());
        }
        let action = words.next().unwrap_or_default();
        let nth = words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
        if passed.fetch_add(1, Ordering::Relaxed) + 1 != nth {
            return Ok(());
        }
        if let Some(file) = std::env::var_os("SOCCR_FAULT_TOLD") {
            let _ = std::fs::write(file, format!("{name}:{action}"));
        }
        let to = |actor: &AtomicI32, signal| {
            let pid = actor.load(Ordering::Relaxed);
            if pid > 0 {
                let _ = kill(Pid::from_raw(pid), signal);
            }
        };
        match action {
            "kill-criu" => to(&CRIU, Signal::SIGKILL),
            "stop-criu" => to(&CRIU, Signal::SIGSTOP),
            "kill-task" => to(&TASK, Signal::SIGKILL),
            "kill-agent" => drop(raise(Signal::SIGKILL)),
            "stop-agent" => drop(raise(Signal::SIGSTOP)),
            "error" => return Err(Injected(name)),
            "panic" => panic!("a fault was injected at {name}"),
            other => log::error!("SOCCR_FAULT: no action is called {other:?}"),
        }
        Ok(())
    }
}

pub use points::{actors, disarm, point};
