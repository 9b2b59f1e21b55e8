//! What a soak showed, for people and for machines.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use soccr_testkit::Side;
use soccr_testkit::relay::Passed;

use crate::server::WRONG;
use crate::soak::conn::PROGRESS;
use crate::soak::fleet::Totals;
use crate::soak::stage::Cycle;

/// The sums over all cycles.
pub struct Report {
    side: Side,
    seed: u64,
    cycles: usize,
    carried: usize,
    unread: usize,
    unacked: usize,
    dumps: Vec<Duration>,
    restores: Vec<Duration>,
    down: Vec<Duration>,
    up: Vec<Duration>,
    all: Vec<Duration>,
    churns: Vec<Duration>,
    /// What became of the connections.
    pub totals: Totals,
    /// What became of the packets; missing if the soak did not come to its end.
    pub passed: Option<Passed>,
    /// What the server wrote to standard error.
    pub complaints: String,
    /// Why the soak did not come to its end.
    pub failure: Option<String>,
    /// How long it took in all.
    pub took: Duration,
}

impl Report {
    pub fn new(side: Side, seed: u64) -> Self {
        Self {
            side,
            seed,
            cycles: 0,
            carried: 0,
            unread: 0,
            unacked: 0,
            dumps: Vec::new(),
            restores: Vec::new(),
            down: Vec::new(),
            up: Vec::new(),
            all: Vec::new(),
            churns: Vec::new(),
            totals: Totals::default(),
            passed: None,
            complaints: String::new(),
            failure: None,
            took: Duration::ZERO,
        }
    }

    pub fn add(&mut self, mut cycle: Cycle) {
        self.cycles += 1;
        self.carried += cycle.carried;
        self.unread += cycle.unread;
        self.unacked += cycle.unacked;
        self.dumps.push(cycle.dump);
        self.restores.push(cycle.restore);
        self.down.append(&mut cycle.progress.down);
        self.up.append(&mut cycle.progress.up);
        self.all.push(cycle.progress.all);
    }

    /// How long it took to connect what was missing after a cycle.
    pub fn add_churn(&mut self, took: Duration) {
        self.churns.push(took);
    }

    pub fn cycles(&self) -> usize {
        self.cycles
    }

    /// Whether every connection lived and every byte was right.
    pub fn is_good(&self) -> bool {
        self.failure.is_none()
            && self.cycles > 0
            && self.totals.dead.len() + self.wrong() == 0
            && self.complaints.is_empty()
            && self.passed.as_ref().is_some_and(|passed| passed.seen.resets.is_empty())
    }

    /// Also those bytes that only the server saw to be wrong.
    fn wrong(&self) -> usize {
        let complaints = self.complaints.lines().filter(|line| line.starts_with(WRONG));
        self.totals.wrong.len() + complaints.count()
    }

    pub fn print(&self) {
        let totals = &self.totals;
        for said in totals.dead.iter().chain(&totals.wrong) {
            println!("{said}");
        }
        print!("{}", self.complaints);
        println!("cycles                 {} in {:.0} s", self.cycles, self.took.as_secs_f64());
        println!(
            "connections carried    {} ({} with bytes to read, {} with bytes not acknowledged)",
            self.carried, self.unread, self.unacked
        );
        println!("connections opened     {}, ended in order {}", totals.opened, totals.ended);
        println!(
            "bytes checked          {} (clients {}, server {})",
            totals.received + totals.confirmed,
            totals.received,
            totals.confirmed
        );
        println!("byte errors            {}", self.wrong());
        println!("dead connections       {}", totals.dead.len());
        if let Some(passed) = &self.passed {
            println!(
                "resets                 {} (and {} after the end of both streams)",
                passed.seen.resets.len(),
                passed.late_resets
            );
            println!(
                "network                {} segments, {} lost, {} reordered, {} overflowed",
                passed.seen.segments, passed.lost, passed.reordered, passed.overflowed
            );
        }
        println!("criu dump              {} (p50, p99, longest)", spread(&self.dumps));
        println!("criu restore           {}", spread(&self.restores));
        println!("new connections up     {}", spread(&self.churns));
        println!("after each restore     (p50, p99, longest)");
        println!("  first byte down      {}", spread(&self.down));
        println!("  first byte up        {}", spread(&self.up));
        println!("  {} kB each way, all  {}", PROGRESS / 1024, spread(&self.all));
        if let Some(failure) = &self.failure {
            println!("FAILED: {failure}");
        }
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let totals = &self.totals;
        let passed = self.passed.as_ref().map(|passed| {
            json!({
                "segments": passed.seen.segments,
                "resets": passed.seen.resets.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "resets_after_both_ends": passed.late_resets,
                "lost": passed.lost,
                "reordered": passed.reordered,
                "overflowed": passed.overflowed,
            })
        });
        let report = json!({
            "side": format!("{:?}", self.side),
            "seed": self.seed,
            "seconds": self.took.as_secs_f64(),
            "cycles": self.cycles,
            "connections": {
                "carried": self.carried,
                "carried_with_bytes_to_read": self.unread,
                "carried_with_bytes_not_acknowledged": self.unacked,
                "opened": totals.opened,
                "ended_in_order": totals.ended,
                "dead": totals.dead,
                "wrong": totals.wrong,
            },
            "bytes_checked": { "by_clients": totals.received, "by_the_server": totals.confirmed },
            "byte_errors": self.wrong(),
            "network": passed,
            "criu_ms": { "dump": spread_json(&self.dumps), "restore": spread_json(&self.restores) },
            "new_connections_ms": spread_json(&self.churns),
            "after_restore_ms": {
                "first_byte_down": spread_json(&self.down),
                "first_byte_up": spread_json(&self.up),
                "all_moved": spread_json(&self.all),
            },
            "server_complaints": self.complaints,
            "failure": self.failure,
            "good": self.is_good(),
        });
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The smallest of `times` that `percent` of them do not exceed.
fn percentile(times: &[Duration], percent: usize) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

fn millis(time: Option<Duration>) -> Option<f64> {
    time.map(|time| time.as_secs_f64() * 1000.0)
}

fn ms(times: &[Duration], percent: usize) -> String {
    millis(percentile(times, percent)).map_or("-".into(), |ms| format!("{ms:.0} ms"))
}

fn spread(times: &[Duration]) -> String {
    [50, 99, 100].map(|percent| ms(times, percent)).join(", ")
}

fn spread_json(times: &[Duration]) -> serde_json::Value {
    let at = |percent| millis(percentile(times, percent));
    json!({ "p50": at(50), "p99": at(99), "longest": at(100) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_members() {
        let times: Vec<_> = (1..=200).rev().map(Duration::from_millis).collect();
        let at = |percent| percentile(&times, percent).unwrap().as_millis();
        assert_eq!((at(50), at(99), at(100)), (100, 198, 200));
        assert_eq!(percentile(&times[..1], 1), Some(times[0]));
        assert_eq!(percentile(&[], 50), None);
    }
}
