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

/// All that a soak showed.
pub struct Report {
    pub side: Side,
    pub seed: u64,
    pub cycles: Vec<Cycle>,
    /// How long it took to connect what was missing after each cycle.
    pub churns: Vec<Duration>,
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
        let (totals, complaints, took) = (Totals::default(), String::new(), Duration::ZERO);
        let (cycles, churns) = (Vec::new(), Vec::new());
        Self { side, seed, cycles, churns, totals, passed: None, complaints, failure: None, took }
    }

    /// Whether every connection lived and every byte was right.
    pub fn is_good(&self) -> bool {
        self.failure.is_none()
            && !self.cycles.is_empty()
            && self.totals.dead.len() + self.wrong() == 0
            && self.complaints.is_empty()
            && self.passed.as_ref().is_some_and(|passed| passed.seen.resets.is_empty())
    }

    /// Also those bytes that only the server saw to be wrong.
    fn wrong(&self) -> usize {
        let complaints = self.complaints.lines().filter(|line| line.starts_with(WRONG));
        self.totals.wrong.len() + complaints.count()
    }

    fn sum(&self, of: fn(&Cycle) -> usize) -> usize {
        self.cycles.iter().map(of).sum()
    }

    /// What took how long, by name.
    fn times(&self) -> [(&'static str, Vec<Duration>); 6] {
        let each = |of: fn(&Cycle) -> Duration| self.cycles.iter().map(of).collect();
        let all = |of: fn(&Cycle) -> &Vec<Duration>| self.cycles.iter().flat_map(of).copied().collect();
        [
            ("criu dump", each(|cycle| cycle.dump)),
            ("criu restore", each(|cycle| cycle.restore)),
            ("new connections up", self.churns.clone()),
            ("first byte down", all(|cycle| &cycle.progress.down)),
            ("first byte up", all(|cycle| &cycle.progress.up)),
            ("all moved", each(|cycle| cycle.progress.all)),
        ]
    }

    pub fn print(&self) {
        let totals = &self.totals;
        for said in totals.dead.iter().chain(&totals.wrong) {
            println!("{said}");
        }
        print!("{}", self.complaints);
        println!("cycles                 {} in {:.0} s", self.cycles.len(), self.took.as_secs_f64());
        println!(
            "connections carried    {} ({} with bytes to read, {} with bytes not acknowledged)",
            self.sum(|cycle| cycle.carried),
            self.sum(|cycle| cycle.unread),
            self.sum(|cycle| cycle.unacked)
        );
        println!("connections opened     {}, ended in order {}", totals.opened, totals.ended);
        let (clients, server) = (totals.received, totals.confirmed);
        println!("bytes checked          {} (clients {clients}, server {server})", clients + server);
        println!("byte errors            {}", self.wrong());
        println!("dead connections       {}", totals.dead.len());
        if let Some(Passed { seen, late_resets, lost, reordered, overflowed }) = &self.passed {
            let resets = seen.resets.len();
            println!("resets                 {resets} (and {late_resets} after the end of both streams)");
            let segments = seen.segments;
            println!(
                "network                {segments} segments, {lost} lost, {reordered} reordered, {overflowed} overflowed"
            );
        }
        println!(
            "after each restore: first byte down, up, and {} kB each way; p50, p99, longest",
            PROGRESS / 1024
        );
        for (what, times) in self.times() {
            let ms = SPREAD.map(|at| millis(&times, at).map_or("-".into(), |ms| format!("{ms:.0} ms")));
            println!("  {what:20} {}", ms.join(", "));
        }
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
        let times = self.times().map(|(what, times)| {
            let [p50, p99, longest] = SPREAD.map(|at| millis(&times, at));
            (what.replace(' ', "_"), json!({ "p50": p50, "p99": p99, "longest": longest }))
        });
        let report = json!({
            "side": format!("{:?}", self.side),
            "seed": self.seed,
            "seconds": self.took.as_secs_f64(),
            "cycles": self.cycles.len(),
            "connections": {
                "carried": self.sum(|cycle| cycle.carried),
                "carried_with_bytes_to_read": self.sum(|cycle| cycle.unread),
                "carried_with_bytes_not_acknowledged": self.sum(|cycle| cycle.unacked),
                "opened": totals.opened,
                "ended_in_order": totals.ended,
                "dead": totals.dead,
                "wrong": totals.wrong,
            },
            "bytes_checked": { "by_clients": totals.received, "by_the_server": totals.confirmed },
            "byte_errors": self.wrong(),
            "network": passed,
            "ms": serde_json::Map::from_iter(times),
            "server_complaints": self.complaints,
            "failure": self.failure,
            "good": self.is_good(),
        });
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Percentiles that are shown.
const SPREAD: [usize; 3] = [50, 99, 100];

/// The smallest of `times` that `percent` of them do not exceed.
fn percentile(times: &[Duration], percent: usize) -> Option<Duration> {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

fn millis(times: &[Duration], percent: usize) -> Option<f64> {
    percentile(times, percent).map(|time| time.as_secs_f64() * 1000.0)
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
