//! The numbers, as a table, as JSON and as a picture.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use soccr_testkit::{Criu, Lock, Side};

use crate::bench::trial::Times;

/// How many times stock's frozen time ours may be.
const FROZEN_LIMIT: f64 = 2.0;
/// How many times stock's restore ours may be.
const RESTORE_LIMIT: f64 = 1.5;

pub struct Report {
    criu: String,
    kernel: String,
    runs: u16,
    pub rows: Vec<Row>,
}

/// All trials of one side with one number of connections.
pub struct Row {
    pub connections: usize,
    pub side: Side,
    times: Vec<Times>,
    failure: Option<String>,
}

impl Row {
    pub fn new(connections: usize, side: Side) -> Self {
        Self { connections, side, times: Vec::new(), failure: None }
    }

    /// Takes a trial's outcome down; a failure is a result too.
    pub fn add(&mut self, outcome: Result<Times>) {
        match outcome {
            Ok(times) => {
                println!(
                    "{:>6} connections, {}: frozen {} s, dump {} s, restore {} s",
                    self.connections,
                    name(self.side),
                    seconds(times.frozen),
                    seconds(times.dump),
                    seconds(times.restore)
                );
                self.times.push(times);
            }
            Err(error) => {
                let text = format!("{error:#}");
                println!("{:>6} connections, {}: FAILED: {text}", self.connections, name(self.side));
                self.failure = Some(text);
            }
        }
    }

    fn median(&self, of: impl Fn(&Times) -> Duration) -> Option<Duration> {
        // The median of the runs that went well says nothing if one did not.
        if self.failure.is_some() {
            return None;
        }
        let mut all: Vec<_> = self.times.iter().map(of).collect();
        all.sort();
        all.get(all.len() / 2).copied()
    }

    fn frozen(&self) -> Option<Duration> {
        self.median(|times| times.frozen)
    }

    fn dump(&self) -> Option<Duration> {
        self.median(|times| times.dump)
    }

    fn restore(&self) -> Option<Duration> {
        self.median(|times| times.restore)
    }

    fn is_baseline(&self) -> bool {
        self.side == Side::Stock(Lock::Skip)
    }

    fn is_ours(&self) -> bool {
        matches!(self.side, Side::Plugin(_))
    }

    fn json(&self) -> Value {
        let medians = |of: fn(&Self) -> Option<Duration>| of(self).map(|it| it.as_secs_f64());
        let each = |of: fn(&Times) -> Duration| -> Vec<f64> {
            self.times.iter().map(|times| of(times).as_secs_f64()).collect()
        };
        json!({
            "connections": self.connections,
            "side": name(self.side),
            "frozen_s": { "median": medians(Self::frozen), "runs": each(|it| it.frozen) },
            "dump_s": { "median": medians(Self::dump), "runs": each(|it| it.dump) },
            "restore_s": { "median": medians(Self::restore), "runs": each(|it| it.restore) },
            "failure": self.failure,
        })
    }
}

/// Ours against stock without a lock.
struct Ratio {
    connections: usize,
    frozen: f64,
    restore: f64,
}

impl Report {
    pub fn new(criu: &Criu, runs: u16) -> Result<Self> {
        Ok(Self {
            criu: output(Command::new(criu.bin()).arg("--version"))?.replace('\n', " "),
            kernel: output(Command::new("uname").arg("-r"))?,
            runs,
            rows: Vec::new(),
        })
    }

    /// Writes report.json, report.md and report.svg.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(&self.json())? + "\n";
        for (file, text) in [("json", json), ("md", self.markdown()), ("svg", self.svg())] {
            let path = dir.join("report").with_extension(file);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        println!("report.json, report.md and report.svg are in {}", dir.display());
        Ok(())
    }

    pub fn markdown(&self) -> String {
        let mut text = format!(
            "CRIU: {}; kernel {}; medians of {} alternating runs, images on tmpfs\n\n",
            self.criu, self.kernel, self.runs
        );
        text += "| connections | side | frozen s | dump s | restore s |\n|---|---|---|---|---|\n";
        for row in &self.rows {
            let show = |time: Option<Duration>| time.map_or_else(|| "–".to_owned(), seconds);
            let cells = [show(row.frozen()), show(row.dump()), show(row.restore())];
            let side = name(row.side);
            let _ = writeln!(text, "| {} | {side} | {} |", row.connections, cells.join(" | "));
        }
        text.push('\n');
        for row in &self.rows {
            if let Some(line) = row.failure.as_ref().and_then(|failure| failure.lines().next()) {
                let _ = writeln!(text, "{} connections, {}: failed: {line}", row.connections, name(row.side));
            }
        }
        for ratio in self.ratios() {
            for (what, value, limit) in
                [("frozen", ratio.frozen, FROZEN_LIMIT), ("restore", ratio.restore, RESTORE_LIMIT)]
            {
                let verdict = if value <= limit { "within" } else { "OVER" };
                let n = ratio.connections;
                let _ = writeln!(
                    text,
                    "{what} ours/stock = {value:.2} at {n} connections ({verdict} the limit {limit:.1})"
                );
            }
        }
        text
    }

    /// Whether no trial of ours, or of what it is compared with, failed, and no limit was exceeded. Stock's other locks may
    /// fail: some do.
    pub fn is_good(&self) -> bool {
        let compared = |row: &&Row| row.is_baseline() || row.is_ours();
        self.rows.iter().filter(compared).all(|row| row.failure.is_none())
            && self.ratios().iter().all(|it| it.frozen <= FROZEN_LIMIT && it.restore <= RESTORE_LIMIT)
    }

    fn ratios(&self) -> Vec<Ratio> {
        let stocks = self.rows.iter().filter(|row| row.is_baseline());
        let ratio = |stock: &Row| {
            let ours = self.rows.iter().find(|row| row.is_ours() && row.connections == stock.connections)?;
            let quotient = |ours: Duration, stock: Duration| ours.as_secs_f64() / stock.as_secs_f64();
            Some(Ratio {
                connections: stock.connections,
                frozen: quotient(ours.frozen()?, stock.frozen()?),
                restore: quotient(ours.restore()?, stock.restore()?),
            })
        };
        stocks.filter_map(ratio).collect()
    }

    fn json(&self) -> Value {
        let ratios: Vec<_> = self
            .ratios()
            .iter()
            .map(|it| json!({ "connections": it.connections, "frozen": it.frozen, "restore": it.restore }))
            .collect();
        json!({
            "criu": self.criu,
            "kernel": self.kernel,
            "runs": self.runs,
            "limits": { "frozen": FROZEN_LIMIT, "restore": RESTORE_LIMIT },
            "rows": self.rows.iter().map(Row::json).collect::<Vec<_>>(),
            "ours_over_stock": ratios,
        })
    }

    /// Two bars for each row that has medians: frozen and restore.
    fn svg(&self) -> String {
        let rows: Vec<_> =
            self.rows.iter().filter_map(|row| Some((row, row.frozen()?, row.restore()?))).collect();
        let longest = rows.iter().map(|(_, frozen, restore)| *frozen.max(restore)).max().unwrap_or_default();
        let scale = 400.0 / longest.as_secs_f64().max(f64::MIN_POSITIVE);
        let height = 50 + rows.len() * 50;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"860\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"20\" y=\"24\" font-weight=\"bold\">Seconds frozen (dark) and to restore (light)</text>\n"
        );
        for (i, (row, frozen, restore)) in rows.iter().enumerate() {
            let y = 45 + i * 50;
            let label = format!("{} × {}", row.connections, name(row.side));
            let _ = writeln!(svg, "<text x=\"20\" y=\"{}\">{label}</text>", y + 24);
            for (time, y, colour) in [(frozen, y, "#1f4e79"), (restore, y + 19, "#8db8de")] {
                let width = time.as_secs_f64() * scale;
                let _ = writeln!(
                    svg,
                    "<rect x=\"310\" y=\"{y}\" width=\"{width:.1}\" height=\"17\" fill=\"{colour}\"/>\
                     <text x=\"{:.1}\" y=\"{}\">{}</text>",
                    316.0 + width,
                    y + 13,
                    seconds(*time)
                );
            }
        }
        svg + "</svg>\n"
    }
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Stock(Lock::Skip) => "stock CRIU, no lock (skip)",
        Side::Stock(Lock::Nftables) => "stock CRIU, nftables lock",
        Side::Stock(Lock::Iptables) => "stock CRIU, iptables lock",
        Side::Plugin(_) => "soccr plugin, locked",
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}

fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("cannot run {command:?}"))?;
    Ok(String::from_utf8(out.stdout)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(side: Side, frozen: &[u64]) -> Row {
        let times = |&ms| Times {
            frozen: Duration::from_millis(ms),
            dump: Duration::from_millis(ms + 10),
            restore: Duration::from_millis(2 * ms),
        };
        Row { times: frozen.iter().map(times).collect(), ..Row::new(1000, side) }
    }

    fn report(ours: Row) -> Report {
        let rows = vec![row(Side::Stock(Lock::Skip), &[50, 30, 40]), ours];
        Report { criu: "Version: 4.2.1".into(), kernel: "6.18".into(), runs: 3, rows }
    }

    #[test]
    fn ratios_are_of_medians_and_say_when_a_limit_is_broken() {
        let report = report(row(Side::Plugin(Lock::Nftables), &[70, 999, 60]));
        assert!(!report.is_good());
        let text = report.markdown();
        assert!(
            text.contains("frozen ours/stock = 1.75 at 1000 connections (within the limit 2.0)"),
            "{text}"
        );
        assert!(
            text.contains("restore ours/stock = 1.75 at 1000 connections (OVER the limit 1.5)"),
            "{text}"
        );
    }

    #[test]
    fn a_failed_run_has_no_median_and_no_ratio() {
        let mut ours = row(Side::Plugin(Lock::Nftables), &[70, 60]);
        ours.failure = Some("criu dump: signal: 6\nmore".into());
        let report = report(ours);
        assert!(report.ratios().is_empty() && !report.is_good());
        assert!(report.markdown().contains("failed: criu dump: signal: 6\n"));
        assert!(report.json()["rows"][1]["frozen_s"]["median"].is_null());
    }
}
