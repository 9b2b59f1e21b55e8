//! `make faults`: whatever dies, whenever, every connection lives on in the running server or in a complete image.
//!
//! ```text
//! soccr-faults [--points] [--instants N] [--seed N] [--matrix] [--stock] [--only TEXT]
//!
//! --points      SIGKILL and SIGSTOP of criu, of the agent and of the server, and errors, at every named point
//! --instants N  SIGKILL of criu and of the agent at N random instants of a dump of 1000 busy connections
//! --matrix      everything else: full and read-only disks, kernels without nf_tables, reboots, …
//! --stock       20 random instants for stock CRIU with 100 connections, to compare
//! --seed N      of the random instants; printed
//! --only TEXT   of points and matrix, only those whose name has TEXT in it
//! ```
//!
//! Without options: points, matrix and 200 instants. Exits with 1 when a connection was lost or anything was left.

mod fleet;
mod instants;
mod kernel;
mod matrix;
mod outcome;
mod points;
mod report;
mod stage;
mod stock;
mod tools;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use soccr_testkit::task;

use report::Report;
use tools::Tools;

#[derive(Default)]
struct Options {
    points: bool,
    matrix: bool,
    stock: bool,
    instants: usize,
    seed: u64,
    only: Option<String>,
}

fn main() -> ExitCode {
    match options().and_then(|options| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soccr faults: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    use lexopt::prelude::*;
    let mut options = Options { seed: fastrand::u64(..1_000_000), ..Options::default() };
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("points") => options.points = true,
            Long("instants") => options.instants = parser.value()?.parse()?,
            Long("matrix") => options.matrix = true,
            Long("stock") => options.stock = true,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("only") => options.only = Some(parser.value()?.string()?),
            _ => return Err(arg.unexpected().into()),
        }
    }
    if !(options.points || options.instants > 0 || options.matrix || options.stock) {
        (options.points, options.matrix, options.instants) = (true, true, 200);
    }
    Ok(options)
}

fn run(options: &Options) -> Result<bool> {
    ensure!(nix::unistd::geteuid().is_root(), "CRIU needs root: sudo make faults");
    let tools = Tools::find()?;
    prepare()?;
    let start = Instant::now();
    let mut report = Report::default();
    let only = options.only.as_deref();
    if options.points {
        println!("=== at every named point, 8 busy connections each");
        points::run(&tools, &mut report, only)?;
    }
    if options.instants > 0 {
        println!(
            "=== at {} random instants of a dump of 1000 busy connections, seed {}",
            options.instants, options.seed
        );
        instants::run(&tools, &mut report, options.instants, options.seed)?;
    }
    if options.matrix {
        println!("=== the rest of the matrix");
        matrix::run(&tools, &mut report, only)?;
    }
    if options.stock {
        println!("=== stock CRIU, seed {}", options.seed);
        return stock::run(&tools, options.seed).map(|()| true);
    }
    report.print();
    println!("took {:.0} s", start.elapsed().as_secs_f64());
    task::no_children(Duration::from_secs(5))?;
    Ok(report.is_good())
}

/// A mount namespace of our own, so that no mount outlives us; images in memory, where the disk costs no time.
fn prepare() -> Result<()> {
    task::become_subreaper()?;
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
