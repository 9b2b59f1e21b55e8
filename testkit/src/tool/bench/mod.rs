//! `make bench`: what a dump and a restore cost with the plugin, beside stock CRIU and CRIU's own work in the same run.
//!
//! A server with idle connections, its clients in other processes. Who is compared takes turns, and medians count. After
//! each restore every connection carries bytes there and back, checked one by one. Stock's lock is off where it is compared
//! with (`skip`), which is as fast as stock gets, and loses connections whose peers send; the plugin's is on.

mod absence;
mod case;
mod chart;
pub mod crowd;
mod engine;
mod library;
mod limits;
mod pair;
mod report;
mod row;
mod trial;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use soccr_testkit::{Criu, interrupt};

use crate::{Programs, target};
use absence::Absence;
use case::{Case, Rounds, Series};
use library::{Length, Libraries};
use report::Report;
use row::{Measured, Row};

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
    /// Connections of the largest case; unless told what four processes may have descriptors for, 60000 at most
    #[arg(long, value_name = "N")]
    largest: Option<usize>,
    /// How many rounds; 5 unless told, 3 with --smoke
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    rounds: Option<u16>,
    /// Names the cases and ends
    #[arg(long)]
    list: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let chosen = Chosen::of(options, descriptors()?)?;
    if options.list {
        chosen.lines().iter().for_each(|line| println!("{line}"));
        return Ok(());
    }
    let criu = options.programs.find(true)?;
    std::fs::create_dir_all(&options.out)?;

    let rounds = options.rounds.unwrap_or(if options.smoke { 3 } else { 5 });
    let mut report = Report::new(&criu, rounds, options.smoke)?;
    let progress = Progress::new(chosen.trials(rounds));
    measure_all(&criu, options, &chosen.cases, rounds, &mut report.rows, &progress)?;
    measure_all(&criu, options, &chosen.absences, rounds, &mut report.absences, &progress)?;
    if let Err(error) = compare_libraries(&criu, &chosen.lengths, &mut report, &progress) {
        report.failures.push(format!("library: FAILED: {error:#}"));
    }
    if chosen.engine {
        interrupt::check()?;
        progress.begin(engine::NAME);
        match engine::measure() {
            Ok(pairs) => {
                progress.end(&pairs.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
                report.pairs.extend(pairs);
            }
            Err(error) => report.failures.push(format!("engine: FAILED: {error:#}")),
        }
    }
    progress.bar.finish_and_clear();
    println!("\n{}", report.markdown());
    report.write(&options.out)?;
    ensure!(report.is_good(), "a trial failed or a limit was exceeded, see above");
    Ok(())
}

/// As many as the largest case wants, where this process may have so many.
fn descriptors() -> Result<usize> {
    const WANTED: u64 = 64_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let more = hard.max(WANTED);
    let have = if setrlimit(Resource::RLIMIT_NOFILE, more, more).is_ok() { more } else { hard };
    setrlimit(Resource::RLIMIT_NOFILE, have, have)?;
    Ok(usize::try_from(have)?)
}

/// What is measured in this run.
struct Chosen {
    cases: Vec<Series<Case>>,
    absences: Vec<Series<Absence>>,
    lengths: Vec<Length>,
    engine: bool,
}

impl Chosen {
    fn of(options: &Options, descriptors: usize) -> Result<Self> {
        let most = options.largest.unwrap_or((case::PARTS * descriptors.saturating_sub(1000)).min(60_000));
        let (cases, absences, lengths) = if options.smoke {
            (case::smoke(), absence::smoke(), library::SMOKE.to_vec())
        } else {
            (case::all(most), absence::all(), library::ALL.to_vec())
        };
        // Both beside who is no party.
        let wants = |name: &str| options.party.is_empty() && options.wants(name);
        let chosen = Self {
            cases: options.choose(cases),
            absences: options.choose(absences),
            lengths: lengths.into_iter().filter(|length| wants(&length.name())).collect(),
            engine: !options.smoke && wants(engine::NAME),
        };
        ensure!(!chosen.lines().is_empty(), "no case has all of these words; see --list");
        Ok(chosen)
    }

    fn lines(&self) -> Vec<String> {
        let cases = self.cases.iter().map(ToString::to_string);
        let absences = self.absences.iter().map(ToString::to_string);
        let lengths = self.lengths.iter().map(|length| length.name());
        let engine = self.engine.then(|| engine::NAME.to_owned());
        cases.chain(absences).chain(lengths).chain(engine).collect()
    }

    fn trials(&self, rounds: u16) -> u64 {
        let cases = self.cases.iter().map(|series| series.trials(rounds));
        let absences = self.absences.iter().map(|series| series.trials(rounds));
        cases.chain(absences).sum::<u64>() + self.lengths.len() as u64 + u64::from(self.engine)
    }
}

impl Options {
    fn choose<C: Measured>(&self, mut all: Vec<Series<C>>) -> Vec<Series<C>> {
        for series in &mut all {
            series.parties.retain(|party| self.party.is_empty() || self.party.contains(&party.to_string()));
        }
        all.retain(|series| self.wants(&series.case.to_string()) && !series.parties.is_empty());
        all
    }

    fn wants(&self, case: &str) -> bool {
        self.only.iter().all(|word| case.split(' ').any(|it| it == word))
    }
}

impl<C: Measured> Series<C> {
    fn rounds(&self, asked: u16) -> u16 {
        if self.rounds == Rounds::Once { 1 } else { asked }
    }

    fn trials(&self, rounds: u16) -> u64 {
        u64::from(self.rounds(rounds)) * self.parties.len() as u64
    }
}

impl<C: Measured> fmt::Display for Series<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parties = self.parties.iter().map(ToString::to_string).collect::<Vec<_>>();
        write!(f, "{}: {}", self.case, parties.join(", "))
    }
}

/// All parties in turns.
fn measure_all<C: Measured>(
    criu: &Criu,
    options: &Options,
    all: &[Series<C>],
    rounds: u16,
    into: &mut Vec<Row<C>>,
    progress: &Progress,
) -> Result<()> {
    for series in all {
        let mut rows: Vec<_> = series.parties.iter().map(|party| Row::new(series.case, *party)).collect();
        for _ in 0..series.rounds(rounds) {
            for row in &mut rows {
                interrupt::check()?;
                progress.begin(&row.name());
                let line = row.add(series.case.run(criu, row.party, &options.out));
                progress.end(&line);
            }
        }
        row::merge(into, rows);
    }
    Ok(())
}

fn compare_libraries(
    criu: &Criu,
    lengths: &[Length],
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    if lengths.is_empty() {
        return Ok(());
    }
    let libraries = Libraries::build(criu.bin())?;
    for length in lengths {
        interrupt::check()?;
        progress.begin(&length.name());
        let pairs = libraries.measure(*length)?;
        progress.end(&pairs.each_ref().map(ToString::to_string).join("\n"));
        report.pairs.extend(pairs);
    }
    Ok(())
}

/// A bar on a terminal; lines anywhere.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(trials: u64) -> Self {
        let bar = ProgressBar::new(trials);
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
