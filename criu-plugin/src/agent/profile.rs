//! Where the agent's time goes, phase by phase: one line of the log at debug level.

use std::time::{Duration, Instant};

/// The phases of a piece of work, each as long as all its parts.
#[derive(Debug)]
pub struct Profile {
    work: &'static str,
    last: Instant,
    phases: Vec<(&'static str, Duration)>,
}

impl Profile {
    /// Begins the first phase.
    pub fn start(work: &'static str) -> Self {
        Self { work, last: Instant::now(), phases: Vec::new() }
    }

    /// What was done since the last lap was of this phase.
    pub fn lap(&mut self, phase: &'static str) {
        let now = Instant::now();
        let took = now - std::mem::replace(&mut self.last, now);
        match self.phases.iter_mut().find(|(known, _)| *known == phase) {
            Some((_, sum)) => *sum += took,
            None => self.phases.push((phase, took)),
        }
    }
}

/// However the work has ended, the line is written.
impl Drop for Profile {
    fn drop(&mut self) {
        let millis = |time: &Duration| time.as_secs_f64() * 1e3;
        let phase = |(name, time): &(_, Duration)| format!("{} {name} {:.3}", self.work, millis(time));
        log::debug!("profile: {} ms", self.phases.iter().map(phase).collect::<Vec<_>>().join(", "));
    }
}
