//! `make bench`: what a dump and a restore cost with the plugin, beside stock CRIU in the same run.
//!
//! One server process with N idle connections, clients in another process (this one), images on
//! tmpfs. The plugin's network lock is on; stock's is off (`--network-lock skip`), which is as fast
//! as stock gets and unsafe with busy peers. Runs alternate, medians count. After each restore every
//! connection carries a message there and back, checked byte by byte.
//!
//! ```text
//! soccr-bench [--connections N[,N…]] [--runs N] [--criu FILE] [--plugins DIR] [--out DIR]
//!             [--stock-only] [--iptables]
//!
//! --connections N   1000 unless told
//! --runs N          of each side, 5 unless told
//! --out DIR         for report.json, report.md and report.svg; target/bench unless told
//! --stock-only      without the plugin
//! --iptables        stock with its default lock too, once (a minute at 1000 connections)
//! ```

mod report;
mod trial;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use soccr_testkit::task;
use soccr_testkit::{Criu, Lock, Side};

use report::{Report, Row};
use trial::Stage;

struct Options {
    criu: Criu,
    out: PathBuf,
    connections: Vec<usize>,
    runs: usize,
    stock_only: bool,
    iptables: bool,
}

fn main() -> ExitCode {
    match options().and_then(|options| bench(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soccr bench: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    use lexopt::prelude::*;
    let default = Criu::from_env();
    let (mut bin, mut plugins) = (default.bin().to_owned(), default.plugin().with_file_name(""));
    let mut out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    let (mut connections, mut runs, mut stock_only, mut iptables) = (vec![1000], 5, false, false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("criu") => bin = parser.value()?.into(),
            Long("plugins") => plugins = parser.value()?.into(),
            Long("out") => out = parser.value()?.into(),
            Long("connections") => connections = counts(&parser.value()?.string()?)?,
            Long("runs") => runs = parser.value()?.parse()?,
            Long("stock-only") => stock_only = true,
            Long("iptables") => iptables = true,
            _ => return Err(arg.unexpected().into()),
        }
    }
    let criu = Criu::new(bin.canonicalize().unwrap_or(bin), plugins.canonicalize().unwrap_or(plugins));
    Ok(Options { criu, out, connections, runs, stock_only, iptables })
}

fn counts(list: &str) -> Result<Vec<usize>> {
    list.split(',').map(|word| word.parse().with_context(|| format!("{word:?} is no number"))).collect()
}

fn bench(options: &Options) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "CRIU needs root: sudo make bench");
    ensure!(options.runs > 0, "no runs, no medians");
    options.criu.check(!options.stock_only)?;
    task::become_subreaper()?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;

    let mut report = Report::new(&options.criu, options.runs)?;
    for &connections in &options.connections {
        measure(options, connections, &mut report)?;
    }
    println!("\n{}", report.markdown());
    std::fs::create_dir_all(&options.out)?;
    report.write(&options.out)
}

/// All sides with this many connections: first what is compared, in turns, then stock's other locks.
fn measure(options: &Options, connections: usize, report: &mut Report) -> Result<()> {
    let stage = Stage::new(&options.criu, connections)?;
    let mut turns = vec![Row::new(connections, Side::Stock(Lock::Skip))];
    if !options.stock_only {
        turns.push(Row::new(connections, Side::Plugin(Lock::Nftables)));
    }
    for _ in 0..options.runs {
        for row in &mut turns {
            row.add(stage.run(row.side));
        }
    }
    let mut others = vec![Lock::Nftables];
    if options.iptables {
        others.push(Lock::Iptables);
    }
    for lock in others {
        let mut row = Row::new(connections, Side::Stock(lock));
        row.add(stage.run(row.side));
        turns.push(row);
    }
    report.rows.append(&mut turns);
    Ok(())
}
