//! `make soak`: a server with busy clients behind a bad network is dumped, killed and restored,
//! again and again, and every byte is checked.
//!
//! The server is in one network namespace, the clients are in another; between them a relay loses
//! 1 % of the packets, lets others overtake 1 %, and delays all by 1 to 20 ms. Connections are of
//! IPv4, of IPv6 and IPv4-mapped; some read slowly, some are half closed, some end and others begin.
//!
//! Exits with 1 when a connection died, stalled or carried a wrong byte, when any reset was sent,
//! or when CRIU failed or something was left behind.

mod conn;
mod fleet;
mod report;
mod stage;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use soccr_testkit::criu::timed;
use soccr_testkit::relay::Weather;
use soccr_testkit::{Criu, Lock, Side, Stage, task};

use crate::{Programs, target};
use report::Report;
use stage::{Setting, Soak};

/// Dumps and restores a server with busy clients behind a bad network, again and again
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    programs: Programs,
    /// For report.json, logs and the last images
    #[arg(long, value_name = "DIR", default_value_os_t = target("soak"))]
    out: PathBuf,
    /// For the first 128 bytes of every packet, for tcpdump
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// How long; the last cycle and the end of all streams come on top
    #[arg(long, value_name = "N", default_value_t = 600)]
    seconds: u64,
    /// How many connections
    #[arg(long, value_name = "N", default_value = "48")]
    connections: NonZeroUsize,
    /// Of the network, the moments and the connections
    #[arg(long, value_name = "N", default_value_t = fastrand::u64(..1_000_000), hide_default_value = true)]
    seed: u64,
    /// A rule of the kernel's loses 1 % of what comes to the server, too
    #[arg(long)]
    nft_drop: bool,
    /// The kernel's netem makes the bad network, where the kernel has that
    #[arg(long)]
    netem: bool,
    /// CRIU alone carries the connections, to compare, with --network-lock nftables
    #[arg(long)]
    stock: bool,
    /// The same with --network-lock iptables, which is CRIU's default
    #[arg(long, conflicts_with = "stock")]
    stock_iptables: bool,
}

impl Options {
    fn side(&self) -> Side {
        match (self.stock, self.stock_iptables) {
            (true, _) => Side::Stock(Lock::Nftables),
            (_, true) => Side::Stock(Lock::Iptables),
            _ => Side::Plugin(Lock::Nftables),
        }
    }
}

pub fn run(options: &Options) -> Result<()> {
    let (side, seed) = (options.side(), options.seed);
    let criu = options.programs.find(matches!(side, Side::Plugin(_)))?;
    let out = stage::fresh_folder(&options.out)?;
    println!("soccr soak: {side:?}, {} connections, seed {seed}", options.connections);

    let start = Instant::now();
    let mut report = Report::new(side, seed);
    if let Err(error) = cycles(&criu, options, &out, &mut report) {
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

fn cycles(criu: &Criu, options: &Options, out: &Path, report: &mut Report) -> Result<()> {
    let bad = (0.01, (Duration::from_millis(1), Duration::from_millis(20)));
    let (share, delay) = if options.netem { (0.0, (Duration::ZERO, Duration::ZERO)) } else { bad };
    let weather = Weather { loss: share, reorder: share, delay, seed: options.seed };
    let setting = Setting {
        side: options.side(),
        connections: options.connections.get(),
        weather,
        nft_drop: options.nft_drop,
        netem: options.netem,
        pcap: options.pcap.clone(),
    };
    let stage = Stage::unwired(criu, out)?;
    let mut soak = Soak::new(&setting, &stage)?;
    let end = Instant::now() + Duration::from_secs(options.seconds);
    while Instant::now() < end {
        let cycle = soak.cycle();
        report.totals = soak.totals();
        report.cycles.push(cycle?);
        tell(report);
        report.churns.push(timed(|| soak.churn())?.1);
    }
    let (totals, passed) = soak.finish()?;
    report.totals = totals;
    report.passed = Some(passed);
    Ok(())
}

/// A sign of life now and then.
fn tell(report: &Report) {
    if report.cycles.len().is_multiple_of(10) {
        let bytes = report.totals.received + report.totals.confirmed;
        println!("  {} cycles, {} MB checked", report.cycles.len(), bytes / 1_000_000);
    }
}
