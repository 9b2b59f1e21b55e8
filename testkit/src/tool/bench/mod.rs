//! `make bench`: what a dump and a restore cost with the plugin, beside stock CRIU and CRIU's own work in the same run.
//!
//! A server with idle connections, its clients in other processes. Who is compared takes turns, and medians count. After
//! each restore every connection carries bytes there and back, checked one by one. Stock's lock is off where it is compared
//! with (`skip`), which is as fast as stock gets, and loses connections whose peers send; the plugin's is on.

mod case;
mod chart;
pub mod crowd;
mod limits;
mod report;
mod trial;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use soccr_testkit::{Criu, interrupt};

use crate::{Programs, target};
use case::{Rounds, Series};
use report::{Report, Row};

/// Measures what a dump and a restore cost with the plugin, beside stock CRIU in the same run
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    programs: Programs,
    /// For report.json, report.md and report.svg; images that are not in memory
    #[arg(long, value_name = "DIR", default_value_os_t = target("bench"))]
    out: PathBuf,
    /// Only cases whose line (--list) has all of these words
    #[arg(long, value_name = "WORD")]
    only: Vec<String>,
    /// Only these parties: floor, ours, "stock skip" and so on
    #[arg(long, value_name = "NAME")]
    party: Vec<String>,
    /// A small choice of cases with limits that hold on a busy machine
    #[arg(long)]
    smoke: bool,
    /// How many rounds; 5 unless told, 3 with --smoke
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Names the cases and ends
    #[arg(long)]
    list: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let mut chosen = if options.smoke { case::smoke() } else { case::all(usize::try_from(hard)?) };
    for series in &mut chosen {
        series.parties.retain(|party| options.party.is_empty() || options.party.contains(&party.to_string()));
    }
    chosen.retain(|series| options.wants(&series.case.to_string()) && !series.parties.is_empty());
    ensure!(!chosen.is_empty(), "no case has all of these words; see --list");
    if options.list {
        chosen.iter().for_each(|series| println!("{}: {}", series.case, names(series)));
        return Ok(());
    }
    let criu = options.programs.find(true)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    std::fs::create_dir_all(&options.out)?;

    let rounds = options.rounds.unwrap_or(if options.smoke { 3 } else { 5 });
    let mut report = Report::new(&criu, rounds, options.smoke)?;
    let progress = Progress::new(&chosen, rounds);
    for series in &chosen {
        measure(&criu, options, series, rounds, &mut report, &progress)?;
    }
    progress.bar.finish_and_clear();
    println!("\n{}", report.markdown());
    report.write(&options.out)?;
    ensure!(report.is_good(), "a trial failed or a limit was exceeded, see above");
    Ok(())
}

impl Options {
    fn wants(&self, case: &str) -> bool {
        self.only.iter().all(|word| case.split(' ').any(|it| it == word))
    }
}

fn names(series: &Series) -> String {
    series.parties.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// All parties in turns.
fn measure(
    criu: &Criu,
    options: &Options,
    series: &Series,
    rounds: u16,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let mut rows: Vec<Row> = series.parties.iter().map(|party| Row::new(series.case, *party)).collect();
    for _ in 0..series.rounds.count(rounds) {
        for row in &mut rows {
            interrupt::check()?;
            progress.begin(&row.name());
            let line = row.add(trial::run(criu, series.case, row.party, &options.out));
            progress.end(&line);
        }
    }
    report.add(rows);
    Ok(())
}

impl Rounds {
    fn count(self, asked: u16) -> u16 {
        if self == Self::Once { 1 } else { asked }
    }
}

/// A bar on a terminal; lines anywhere.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(chosen: &[Series], rounds: u16) -> Self {
        let trials =
            chosen.iter().map(|series| u64::from(series.rounds.count(rounds)) * series.parties.len() as u64);
        let bar = ProgressBar::new(trials.sum());
        let style = "{bar:30} {pos} of {len} trials, {eta} left: {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
        bar.enable_steady_tick(Duration::from_millis(500));
        Self { bar }
    }

    fn begin(&self, name: &str) {
        self.bar.set_message(name.to_owned());
    }

    fn end(&self, line: &str) {
        self.bar.suspend(|| println!("{line}"));
        self.bar.inc(1);
    }
}
