//! `make soak`: a server with busy clients behind a bad network is dumped, killed and restored,
//! again and again, and every byte is checked.
//!
//! The server is in one network namespace, the clients are in another; between them a relay loses
//! 1 % of the packets, lets others overtake 1 %, and delays all by 1 to 20 ms. Connections are of
//! IPv4, of IPv6 and IPv4-mapped; some read slowly, some are half closed, some end and others begin.
//!
//! ```text
//! soccr-soak [--seconds N] [--connections N] [--seed N] [--nft-drop] [--stock|--stock-iptables]
//!            [--criu FILE] [--plugins DIR] [--out DIR] [--pcap FILE]
//!
//! --seconds N       600 unless told; the last cycle and the end of all streams come on top
//! --connections N   48 unless told
//! --seed N          of the network, the moments and the connections; printed if not given
//! --nft-drop        a rule of the kernel's loses 1 % of what comes to the server, too
//! --stock           CRIU alone carries the connections, to compare, with --network-lock nftables
//! --stock-iptables  the same with --network-lock iptables, which is CRIU's default
//! --out DIR         for report.json, logs and the last images; target/soak unless told
//! --pcap FILE       the first 128 bytes of every packet, for tcpdump
//! ```
//!
//! Exits with 1 when a connection died, stalled or carried a wrong byte, when any reset was sent,
//! or when CRIU failed or something was left behind.

mod conn;
mod fault;
mod fleet;
mod order;
mod report;
mod server;
mod stage;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use soccr_testkit::criu::timed;
use soccr_testkit::relay::Weather;
use soccr_testkit::{Criu, Lock, Side, interrupt, task};

use report::Report;
use stage::{Places, Setting, Stage};

struct Options {
    criu: Criu,
    out: PathBuf,
    pcap: Option<PathBuf>,
    time: Duration,
    connections: usize,
    seed: u64,
    nft_drop: bool,
    side: Side,
}

fn main() -> ExitCode {
    let done = if std::env::args().nth(1).as_deref() == Some("--serve") {
        server::serve()
    } else {
        options().and_then(|options| soak(&options))
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soccr soak: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    use lexopt::prelude::*;
    let default = Criu::from_env();
    let (mut bin, mut plugins) = (default.bin().to_owned(), default.plugin().with_file_name(""));
    let mut out = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/soak");
    let (mut pcap, mut seconds, mut connections, mut seed) = (None, 600, 48, fastrand::u64(..1_000_000));
    let (mut nft_drop, mut side) = (false, Side::Plugin(Lock::Nftables));
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("criu") => bin = parser.value()?.into(),
            Long("plugins") => plugins = parser.value()?.into(),
            Long("out") => out = parser.value()?.into(),
            Long("pcap") => pcap = Some(parser.value()?.into()),
            Long("seconds") => seconds = parser.value()?.parse()?,
            Long("connections") => connections = parser.value()?.parse()?,
            Long("seed") => seed = parser.value()?.parse()?,
            Long("nft-drop") => nft_drop = true,
            Long("stock") => side = Side::Stock(Lock::Nftables),
            Long("stock-iptables") => side = Side::Stock(Lock::Iptables),
            _ => return Err(arg.unexpected().into()),
        }
    }
    let criu = Criu::new(bin.canonicalize().unwrap_or(bin), plugins.canonicalize().unwrap_or(plugins));
    let time = Duration::from_secs(seconds);
    Ok(Options { criu, out, pcap, time, connections, seed, nft_drop, side })
}

fn soak(options: &Options) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "CRIU needs root: sudo make soak");
    ensure!(options.connections > 0, "no connections, no soak");
    options.criu.check(matches!(options.side, Side::Plugin(_)))?;
    interrupt::notice()?;
    task::become_subreaper()?;
    let out = stage::fresh_folder(&options.out)?;
    let (side, seed) = (options.side, options.seed);
    println!("soccr soak: {side:?}, {} connections, seed {seed}", options.connections);

    let start = Instant::now();
    let mut report = Report::new(side, seed);
    if let Err(error) = run(options, &out, &mut report) {
        report.failure = Some(format!("{error:#}"));
    }
    report.took = start.elapsed();
    report.complaints = std::fs::read_to_string(out.join("server.err")).unwrap_or_default();
    report.print();
    report.write(&out.join("report.json"))?;

    task::no_children(Duration::from_secs(5))?;
    println!("left behind            no process, and no firewall rule after any cycle");
    ensure!(report.is_good(), "see above and {}", out.display());
    Ok(())
}

fn run(options: &Options, out: &Path, report: &mut Report) -> Result<()> {
    let weather = Weather {
        loss: 0.01,
        reorder: 0.01,
        delay: (Duration::from_millis(1), Duration::from_millis(20)),
        seed: options.seed,
    };
    let setting = Setting {
        criu: &options.criu,
        side: options.side,
        out,
        connections: options.connections,
        weather,
        nft_drop: options.nft_drop,
        pcap: options.pcap.clone(),
    };
    let places = Places::new()?;
    let mut stage = Stage::new(&setting, &places)?;
    let end = Instant::now() + options.time;
    while Instant::now() < end {
        let cycle = stage.cycle();
        report.totals = stage.totals();
        report.add(cycle?);
        tell(report);
        report.add_churn(timed(|| stage.churn())?.1);
    }
    let (totals, passed) = stage.finish()?;
    report.totals = totals;
    report.passed = Some(passed);
    Ok(())
}

/// A sign of life now and then.
fn tell(report: &Report) {
    if report.cycles().is_multiple_of(10) {
        let bytes = report.totals.received + report.totals.confirmed;
        println!("  {} cycles, {} MB checked", report.cycles(), bytes / 1_000_000);
    }
}
