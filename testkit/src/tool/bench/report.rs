//! The numbers, as a table, as JSON and as a picture.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use soccr_testkit::Criu;

use super::absence::Absence;
use super::case::Case;
use super::chart;
use super::limits::{self, Limit};
use super::pair::Pair;
use super::row::{Measured, Row};
use super::trial::Times;

pub struct Report {
    criu: String,
    kernel: String,
    rounds: u16,
    smoke: bool,
    pub rows: Vec<Row<Case>>,
    pub absences: Vec<Row<Absence>>,
    pub pairs: Vec<Pair>,
    /// What could not be measured beside these.
    pub failures: Vec<String>,
}

type Column = (&'static str, Option<f64>, usize);

impl Row<Case> {
    /// Every column but the first, with the digits that are worth showing.
    fn columns(&self) -> Vec<Column> {
        let median = |of: fn(&Times) -> Option<f64>| self.median(of);
        vec![
            ("frozen s", self.frozen(), 3),
            ("dump s", median(|times| Some(times.dump.as_secs_f64())), 3),
            ("restore s", self.restore(), 3),
            ("moved after s", self.moved(), 3),
            ("silent s", median(|times| times.silence.map(|it| it.as_secs_f64())), 3),
            ("plugin, dump, ms", self.hooks("dump "), 1),
            ("plugin, restore, ms", self.hooks("restore "), 1),
            ("criu MiB", self.criu_peak(), 0),
            ("agent MiB", self.agent_peak(), 0),
            ("dump CPU s", self.dump_cpu(), 3),
            ("agent, dump, µs", self.agent_cpu(0), 1),
            ("agent, restore, µs", self.agent_cpu(1), 1),
        ]
    }

    fn json(&self) -> Value {
        let each = |of: fn(&Times) -> Duration| -> Vec<f64> {
            self.trials.iter().map(|times| of(times).as_secs_f64()).collect()
        };
        json!({
            "case": self.case.to_string(),
            "connections": self.case.connections,
            "queued": self.case.queued,
            "party": self.party.to_string(),
            "medians": medians(&self.columns()),
            "frozen_s": each(|times| times.frozen),
            "dump_s": each(|times| times.dump),
            "restore_s": each(|times| times.restore),
            "profile_ms": self.profile(),
            "failure": self.failure,
        })
    }
}

impl Row<Absence> {
    fn columns(&self) -> Vec<Column> {
        vec![
            ("caught up after s", self.caught_up(), 3),
            ("longest silence s", self.silence(), 3),
            ("lost", self.lost(), 0),
            ("calls", self.calls(), 0),
            ("refused", self.refused(), 0),
            ("longest call, s beyond the absence", self.overtime(), 3),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "case": self.case.to_string(),
            "party": self.party.to_string(),
            "medians": medians(&self.columns()),
            "caught_up_s": self.trials.iter().map(|it| it.caught_up.as_secs_f64()).collect::<Vec<_>>(),
            "failure": self.failure,
        })
    }
}

fn medians(columns: &[Column]) -> Value {
    columns
        .iter()
        .map(|(name, value, _)| ((*name).to_owned(), json!(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

impl Report {
    pub fn new(criu: &Criu, rounds: u16, smoke: bool) -> Result<Self> {
        Ok(Self {
            criu: output(Command::new(criu.bin()).arg("--version"))?.replace('\n', " "),
            kernel: output(Command::new("uname").arg("-r"))?,
            rounds,
            smoke,
            rows: Vec::new(),
            absences: Vec::new(),
            pairs: Vec::new(),
            failures: Vec::new(),
        })
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
            "CRIU: {}; kernel {}; medians of {} alternating rounds. `silent` is from the call of criu dump until every connection had \
             moved a byte; `plugin` is what its hooks took (told at -v4); `dump CPU` is processor time of criu and agent; the agents' is \
             for each connection.\n",
            self.criu, self.kernel, self.rounds
        );
        table(&mut text, &self.rows, Row::<Case>::columns);
        if !self.absences.is_empty() {
            text.push_str("\n50 busy connections, and a connect() every 20 ms while no server is there; `lost`, `refused` and the longest call of all rounds.\n");
            table(&mut text, &self.absences, Row::<Absence>::columns);
        }
        if !self.pairs.is_empty() {
            text.push_str("\n| a call | the other | its µs | ours µs | ratio |\n|---|---|---|---|---|\n");
        }
        for Pair { what, other, other_us, ours_us, ratio, .. } in &self.pairs {
            let _ = writeln!(text, "| {what} | {other} | {other_us:.2} | {ours_us:.2} | {ratio:.2} |");
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
        for failure in self.failures() {
            let _ = writeln!(text, "- {}", failure.lines().next().unwrap_or_default());
        }
    }

    /// Each begins with what failed.
    fn failures(&self) -> Vec<String> {
        let mut failures = self.failures.clone();
        failures.extend(self.rows.iter().filter_map(Row::failed));
        failures.extend(self.absences.iter().filter_map(Row::failed));
        failures
    }

    fn limits(&self) -> Vec<Limit> {
        limits::of(self.smoke, &self.rows, &self.absences, &self.pairs)
    }

    /// Whether no trial failed, and no limit was exceeded.
    pub fn is_good(&self) -> bool {
        self.failures().is_empty() && self.limits().iter().all(Limit::holds)
    }

    fn json(&self) -> Value {
        let limit =
            |it: &Limit| json!({ "what": it.what, "value": it.value, "most": it.most, "holds": it.holds() });
        json!({
            "criu": self.criu,
            "kernel": self.kernel,
            "rounds": self.rounds,
            "rows": self.rows.iter().map(Row::<Case>::json).collect::<Vec<_>>(),
            "absences": self.absences.iter().map(Row::<Absence>::json).collect::<Vec<_>>(),
            "calls": self.pairs.iter().map(Pair::json).collect::<Vec<_>>(),
            "failures": self.failures(),
            "limits": self.limits().iter().filter(|it| it.most.is_finite()).map(limit).collect::<Vec<_>>(),
        })
    }
}

/// A table for each case.
fn table<C: Measured>(text: &mut String, rows: &[Row<C>], columns: impl Fn(&Row<C>) -> Vec<Column>) {
    let mut case = None;
    for row in rows {
        let columns = columns(row);
        if case != Some(row.case) {
            case = Some(row.case);
            let names = columns.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(" | ");
            let _ = writeln!(text, "\n| {} | {names} |\n|{}", row.case, "---|".repeat(columns.len() + 1));
        }
        let show = |(_, value, digits): &Column| {
            value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
        };
        let _ = writeln!(
            text,
            "| {} | {} |",
            row.party,
            columns.iter().map(show).collect::<Vec<_>>().join(" | ")
        );
    }
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("cannot run {command:?}"))?;
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use soccr_testkit::Place;

    use super::*;
    use crate::bench::case::{Party, SKIP, Storage};

    fn row(party: Party, frozen: &[u64]) -> Row<Case> {
        let times = |&ms| Times {
            frozen: Duration::from_millis(ms),
            restore: Duration::from_millis(2 * ms),
            ..Times::default()
        };
        let (place, storage) = (Place::Host, Storage::Tmpfs);
        let case = Case { connections: 1000, queued: 0, processes: 1, place, storage, verbose: false };
        Row { trials: frozen.iter().map(times).collect(), ..Row::new(case, party) }
    }

    fn report(ours: Row<Case>) -> Report {
        let rows = vec![row(Party::Floor, &[20]), row(SKIP, &[50, 30, 40]), ours];
        let (absences, pairs, failures) = (Vec::new(), Vec::new(), Vec::new());
        Report {
            criu: "4.2.1".into(),
            kernel: "6.18".into(),
            rounds: 3,
            smoke: false,
            rows,
            absences,
            pairs,
            failures,
        }
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
