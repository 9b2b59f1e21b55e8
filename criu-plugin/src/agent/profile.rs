//! Where the agent's time goes, phase by phase: one line of the log at debug level.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// The phases of a piece of work: how long each took, and what processors it used.
#[derive(Debug)]
pub struct Profile {
    work: &'static str,
    last: (Instant, Duration),
    phases: Vec<(&'static str, Duration, Duration)>,
}

impl Profile {
    /// Begins the first phase.
    pub fn start(work: &'static str) -> Self {
        Self { work, last: now(), phases: Vec::new() }
    }

    /// What was done since the last lap was this phase.
    pub fn lap(&mut self, phase: &'static str) {
        let now = now();
        let before = std::mem::replace(&mut self.last, now);
        self.phases.push((phase, now.0 - before.0, now.1.saturating_sub(before.1)));
    }
}

/// By the clock on the wall, and by that of all threads of this process.
fn now() -> (Instant, Duration) {
    let used = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from);
    (Instant::now(), used)
}

/// However the work has ended, the line is written.
impl Drop for Profile {
    fn drop(&mut self) {
        let phase = |(name, took, used): &(_, Duration, Duration)| {
            let [took, used] = [took, used].map(|time| time.as_secs_f64() * 1e3);
            format!("{work} {name} {took:.3}, {work} {name} cpu {used:.3}", work = self.work)
        };
        log::debug!("profile: {} ms", self.phases.iter().map(phase).collect::<Vec<_>>().join(", "));
    }
}
