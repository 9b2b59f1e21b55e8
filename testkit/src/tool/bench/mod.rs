//! `make bench`: what a dump and a restore cost with the plugin, beside stock CRIU in the same run.
//!
//! One server process with N idle connections, clients in another process (this one), images on
//! tmpfs. The plugin's network lock is on; stock's is off (`--network-lock skip`), which is as fast
//! as stock gets and unsafe with busy peers. Runs alternate, medians count. After each restore every
//! connection carries a message there and back, checked byte by byte.

mod report;
mod trial;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use soccr_testkit::{Criu, Lock, Side, interrupt};

use crate::{Programs, target};
use report::{Report, Row};

/// Measures what a dump and a restore cost with the plugin, beside stock CRIU in the same run
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    programs: Programs,
    /// For report.json, report.md and report.svg
    #[arg(long, value_name = "DIR", default_value_os_t = target("bench"))]
    out: PathBuf,
    /// How many connections
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1000")]
    connections: Vec<usize>,
    /// How many runs of each side
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Without the plugin
    #[arg(long)]
    stock_only: bool,
    /// Stock with its default lock too, once (a minute at 1000 connections)
    #[arg(long)]
    iptables: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let criu = options.programs.find(!options.stock_only)?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;

    let mut report = Report::new(&criu, options.runs)?;
    for &connections in &options.connections {
        measure(&criu, options, connections, &mut report)?;
    }
    println!("\n{}", report.markdown());
    std::fs::create_dir_all(&options.out)?;
    report.write(&options.out)?;
    ensure!(report.is_good(), "a trial failed or a limit was exceeded, see above");
    Ok(())
}

/// All sides with this many connections: first what is compared, in turns, then stock's other locks.
fn measure(criu: &Criu, options: &Options, connections: usize, report: &mut Report) -> Result<()> {
    let mut turns = vec![Row::new(connections, Side::Stock(Lock::Skip))];
    if !options.stock_only {
        turns.push(Row::new(connections, Side::Plugin(Lock::Nftables)));
    }
    for _ in 0..options.runs {
        for row in &mut turns {
            interrupt::check()?;
            row.add(trial::run(criu, connections, row.side));
        }
    }
    let mut others = vec![Lock::Nftables];
    if options.iptables {
        others.push(Lock::Iptables);
    }
    for lock in others {
        let mut row = Row::new(connections, Side::Stock(lock));
        row.add(trial::run(criu, connections, row.side));
        turns.push(row);
    }
    report.rows.append(&mut turns);
    Ok(())
}
