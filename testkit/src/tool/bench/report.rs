//! The numbers, as a table, as JSON and as a picture.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use soccr_testkit::Criu;
use soccr_testkit::task::Usage;

use super::case::{Case, Party};
use super::chart;
use super::limits::{self, Limit};
use super::trial::Times;

pub struct Report {
    criu: String,
    kernel: String,
    rounds: u16,
    pub smoke: bool,
    pub rows: Vec<Row>,
}

/// All trials of one party in one case.
pub struct Row {
    pub case: Case,
    pub party: Party,
    times: Vec<Times>,
    failure: Option<String>,
}

impl Row {
    pub fn new(case: Case, party: Party) -> Self {
        Self { case, party, times: Vec::new(), failure: None }
    }

    pub fn name(&self) -> String {
        format!("{}, {}", self.case, self.party)
    }

    /// Takes a trial's outcome down, a failure too, and tells it.
    pub fn add(&mut self, outcome: Result<Times>) -> String {
        match outcome {
            Ok(times) => {
                let [frozen, restore] = [times.frozen, times.restore].map(|it| it.as_secs_f64());
                self.times.push(times);
                format!("{}: frozen {frozen:.3} s, restore {restore:.3} s", self.name())
            }
            Err(error) => {
                let text = format!("{error:#}");
                let line = format!("{}: FAILED: {text}", self.name());
                self.failure = Some(text);
                line
            }
        }
    }

    /// Of the trials; nothing where one has failed, and where one does not tell.
    fn median(&self, of: impl Fn(&Times) -> Option<f64>) -> Option<f64> {
        if self.failure.is_some() {
            return None;
        }
        let mut all = self.times.iter().map(of).collect::<Option<Vec<_>>>()?;
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied()
    }

    pub fn connections(&self) -> f64 {
        u32::try_from(self.case.connections).map_or(f64::INFINITY, f64::from)
    }

    pub fn frozen(&self) -> Option<f64> {
        self.median(|times| Some(times.frozen.as_secs_f64()))
    }

    pub fn restore(&self) -> Option<f64> {
        self.median(|times| Some(times.restore.as_secs_f64()))
    }

    pub fn moved(&self) -> Option<f64> {
        self.median(|times| times.moved.map(|it| it.as_secs_f64()))
    }

    pub fn raw_copy(&self) -> Option<f64> {
        self.median(|times| times.raw_copy.map(|it| it.as_secs_f64()))
    }

    /// MiB, the larger of the two agents'.
    pub fn agent_peak(&self) -> Option<f64> {
        self.median(|times| times.agents.as_ref().map(peak))
    }

    /// Microseconds of processor time for each connection, of one of the two agents.
    fn agent_cpu(&self, nth: usize) -> Option<f64> {
        self.median(|times| {
            times.agents.map(|agents| agents[nth].cpu.as_secs_f64() * 1e6 / self.connections())
        })
    }

    /// Processor time of criu and agent: other programs on the machine change it less than what a clock on the wall shows.
    pub fn dump_cpu(&self) -> Option<f64> {
        self.median(|times| {
            let agent = times.agents.map_or(Duration::ZERO, |agents| agents[0].cpu);
            Some((times.criu[0].cpu + agent).as_secs_f64())
        })
    }

    fn profile(&self) -> BTreeMap<&str, f64> {
        let names = self.times.iter().flat_map(|times| times.profile.keys());
        let median = |name: &String| self.median(|times| times.profile.get(name).copied());
        names.filter_map(|name| Some((name.as_str(), median(name)?))).collect()
    }

    /// Every column but the first two, with the digits that are worth showing.
    fn columns(&self) -> [(&'static str, Option<f64>, usize); 9] {
        [
            ("frozen s", self.frozen(), 3),
            ("dump s", self.median(|times| Some(times.dump.as_secs_f64())), 3),
            ("restore s", self.restore(), 3),
            ("moved after s", self.moved(), 3),
            ("criu MiB", self.median(|times| Some(peak(&times.criu))), 0),
            ("agent MiB", self.agent_peak(), 0),
            ("dump CPU s", self.dump_cpu(), 3),
            ("agent, dump, µs", self.agent_cpu(0), 1),
            ("agent, restore, µs", self.agent_cpu(1), 1),
        ]
    }

    fn json(&self) -> Value {
        let medians: serde_json::Map<_, _> =
            self.columns().into_iter().map(|(name, value, _)| (name.to_owned(), json!(value))).collect();
        let each = |of: fn(&Times) -> Duration| -> Vec<f64> {
            self.times.iter().map(|times| of(times).as_secs_f64()).collect()
        };
        json!({
            "case": self.case.to_string(),
            "connections": self.case.connections,
            "queued": self.case.queued,
            "party": self.party.to_string(),
            "medians": medians,
            "frozen_s": each(|times| times.frozen),
            "dump_s": each(|times| times.dump),
            "restore_s": each(|times| times.restore),
            "profile_ms": self.profile(),
            "failure": self.failure,
        })
    }
}

impl Report {
    pub fn new(criu: &Criu, rounds: u16, smoke: bool) -> Result<Self> {
        Ok(Self {
            criu: output(Command::new(criu.bin()).arg("--version"))?.replace('\n', " "),
            kernel: output(Command::new("uname").arg("-r"))?,
            rounds,
            smoke,
            rows: Vec::new(),
        })
    }

    /// Who was measured in the same case before is one of them.
    pub fn add(&mut self, rows: Vec<Row>) {
        for row in rows {
            match self.rows.iter_mut().find(|known| (known.case, known.party) == (row.case, row.party)) {
                Some(known) => {
                    known.times.extend(row.times);
                    known.failure = known.failure.take().or(row.failure);
                }
                None => self.rows.push(row),
            }
        }
    }

    /// Writes report.json, report.md and report.svg.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(&self.json())? + "\n";
        for (file, text) in [("json", json), ("md", self.markdown()), ("svg", chart::of(&self.rows)?)] {
            let path = dir.join("report").with_extension(file);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        println!("report.json, report.md and report.svg are in {}", dir.display());
        Ok(())
    }

    pub fn markdown(&self) -> String {
        let mut text = format!(
            "CRIU: {}; kernel {}; medians of {} alternating rounds. `dump CPU` is processor time of criu and agent; the agents' is for each connection.\n",
            self.criu, self.kernel, self.rounds
        );
        let mut case = None;
        for row in &self.rows {
            if case != Some(row.case) {
                case = Some(row.case);
                let names = row.columns().map(|(name, ..)| name).join(" | ");
                let _ = writeln!(text, "\n| {} | {names} |\n|{}", row.case, "---|".repeat(10));
            }
            let show = |(_, value, digits): (_, Option<f64>, usize)| {
                value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
            };
            let _ = writeln!(text, "| {} | {} |", row.party, row.columns().map(show).join(" | "));
        }
        self.profiles(&mut text);
        self.verdicts(&mut text);
        text
    }

    fn profiles(&self, text: &mut String) {
        for row in &self.rows {
            let phases: Vec<_> =
                row.profile().into_iter().map(|(name, time)| format!("{name} {time:.1}")).collect();
            if !phases.is_empty() {
                let _ = writeln!(text, "\nMilliseconds by phase, {}: {}", row.name(), phases.join(", "));
            }
        }
    }

    fn verdicts(&self, text: &mut String) {
        text.push('\n');
        for limit in self.limits() {
            let Limit { what, value, most } = &limit;
            let verdict = if limit.holds() { "within" } else { "OVER" };
            if most.is_finite() {
                let _ = writeln!(text, "- {what}: {value:.4} ({verdict} {most:.4})");
            }
        }
        for row in &self.rows {
            if let Some(line) = row.failure.as_ref().and_then(|failure| failure.lines().next()) {
                let _ = writeln!(text, "- {}: FAILED: {line}", row.name());
            }
        }
    }

    fn limits(&self) -> Vec<Limit> {
        limits::of(self)
    }

    /// Whether no trial failed, and no limit was exceeded.
    pub fn is_good(&self) -> bool {
        self.rows.iter().all(|row| row.failure.is_none()) && self.limits().iter().all(Limit::holds)
    }

    fn json(&self) -> Value {
        let limit =
            |it: &Limit| json!({ "what": it.what, "value": it.value, "most": it.most, "holds": it.holds() });
        json!({
            "criu": self.criu,
            "kernel": self.kernel,
            "rounds": self.rounds,
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "limits": self.limits().iter().filter(|it| it.most.is_finite()).map(limit).collect::<Vec<_>>(),
        })
    }
}

/// MiB, the larger of dump's and restore's.
#[allow(clippy::cast_precision_loss)] // for people
fn peak(used: &[Usage; 2]) -> f64 {
    used[0].peak.max(used[1].peak) as f64 / f64::from(1 << 20)
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("cannot run {command:?}"))?;
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use soccr_testkit::Place;

    use super::*;
    use crate::bench::case::{SKIP, Storage};

    fn row(party: Party, frozen: &[u64]) -> Row {
        let times = |&ms| Times {
            frozen: Duration::from_millis(ms),
            restore: Duration::from_millis(2 * ms),
            ..Times::default()
        };
        let (place, storage) = (Place::Host, Storage::Tmpfs);
        let case = Case { connections: 1000, queued: 0, processes: 1, place, storage, verbose: false };
        Row { times: frozen.iter().map(times).collect(), ..Row::new(case, party) }
    }

    fn report(ours: Row) -> Report {
        let rows = vec![row(Party::Floor, &[20]), row(SKIP, &[50, 30, 40]), ours];
        Report { criu: "4.2.1".into(), kernel: "6.18".into(), rounds: 3, smoke: false, rows }
    }

    #[test]
    fn ratios_are_of_medians_and_say_when_a_limit_is_broken() {
        let report = report(row(Party::Ours, &[44, 999, 43]));
        let text = report.markdown();
        let name = "ours / stock skip, 1000 host tmpfs empty v2";
        assert!(text.contains(&format!("frozen, {name}: 1.1000 (within 1.1000)")), "{text}");
        assert!(text.contains(&format!("restore, {name}: 1.1000 (OVER 1.0000)")), "{text}");
        assert!(!report.is_good());
        assert!(chart::of(&report.rows).unwrap().contains("</svg>"));
    }

    #[test]
    fn a_failed_run_has_no_median_and_no_ratio() {
        let mut ours = row(Party::Ours, &[20, 20]);
        ours.failure = Some("criu dump: signal: 6\nmore".into());
        let report = report(ours);
        assert!(report.limits().is_empty() && !report.is_good());
        assert!(report.markdown().contains("FAILED: criu dump: signal: 6\n"));
        assert!(report.json()["rows"][2]["medians"]["frozen s"].is_null());
    }

    #[test]
    fn who_is_within_all_limits_is_good() {
        assert!(report(row(Party::Ours, &[35])).is_good());
    }
}
