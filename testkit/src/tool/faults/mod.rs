//! `make faults`: whatever dies, whenever, every connection lives on in the running server or in a complete image.

mod instants;
mod kernel;
mod matrix;
mod outcome;
mod points;
mod report;
mod scene;
mod stock;

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use soccr_testkit::{Place, task};

use crate::Programs;

use report::Report;
use scene::Tools;

/// Kills, stops and starves everybody at every moment of dump and restore: no connection may be lost
///
/// All is gone through twice: with criu in the server's network namespace, and outside of it.
/// Without options: points, matrix and 200 instants. Fails when a connection was lost or anything was left.
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    programs: Programs,
    /// SIGKILL and SIGSTOP of criu, of the agent and of the server, and errors, at every named point
    #[arg(long)]
    points: bool,
    /// Only each Nth of these: less time for the same points, each action in its turn
    #[arg(long, value_name = "N", default_value = "1", hide_default_value = true)]
    every: NonZeroUsize,
    /// SIGKILL of criu and of the agent at N random instants of a dump of many busy connections
    #[arg(long, value_name = "N")]
    instants: Option<usize>,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 1000)]
    connections: usize,
    /// Everything else: full and read-only disks, kernels without nf_tables, reboots, …
    #[arg(long)]
    matrix: bool,
    /// 20 random instants for stock CRIU with 100 connections, to compare
    #[arg(long)]
    stock: bool,
    /// Of the random instants
    #[arg(long, value_name = "N", default_value_t = fastrand::u64(..1_000_000), hide_default_value = true)]
    seed: u64,
    /// Of points and matrix, only those whose name has TEXT in it
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

pub fn run(options: &Options) -> Result<()> {
    let all = !(options.points || options.matrix || options.stock || options.instants.is_some());
    let instants = options.instants.unwrap_or(if all { 200 } else { 0 });
    let tools = Tools::find(options.programs.find(true)?)?;
    prepare()?;
    let start = Instant::now();
    let mut report = Report::default();
    let only = options.only.as_deref();
    for place in [Place::Host, Place::External] {
        let prefix = prefix(place);
        if options.points || all {
            println!("=== {prefix}at every named point, 8 busy connections each");
            points::run(&tools, place, &mut report, only, options.every)?;
        }
        if instants > 0 {
            let (connections, seed) = (options.connections, options.seed);
            println!(
                "=== {prefix}at {instants} random instants of a dump of {connections} busy connections, seed {seed}"
            );
            instants::run(&tools, place, &mut report, instants, connections, seed)?;
        }
        if options.matrix || all {
            println!("=== {prefix}the rest of the matrix");
            matrix::run(&tools, place, &mut report, only)?;
        }
    }
    if options.stock {
        println!("=== stock CRIU, seed {}", options.seed);
        return stock::run(&tools, options.seed);
    }
    report.print();
    println!("took {:.0} s", start.elapsed().as_secs_f64());
    task::no_children(Duration::from_secs(5))?;
    ensure!(report.is_good(), "see above");
    Ok(())
}

/// How the cases of a place are called.
fn prefix(place: Place) -> &'static str {
    if place == Place::Host { "" } else { "outside " }
}

/// A mount namespace of our own, so that no mount outlives us; images in memory, where the disk costs no time.
fn prepare() -> Result<()> {
    keep_descriptors_here();
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    // CRIU remembers in /run what the kernel can do, if that is in memory, and does not ask again.
    mount(Some("none"), "/run", Some("tmpfs"), MsFlags::empty(), Some("size=16m"))?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}

/// Descriptors that somebody left open belong to another mount namespace, where CRIU does not find a server's files.
fn keep_descriptors_here() {
    // SAFETY: no memory; only a flag of descriptors is changed.
    unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}
