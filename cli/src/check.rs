//! `soccr check`.

mod kernel;
mod runtimes;
mod tree;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::host::Host;
use crate::print_json;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Say what of this task and its descendants cannot be carried; nothing is frozen or changed.
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: Host,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: Vec<kernel::Feature>,
    runtimes: Vec<runtimes::Assessed>,
}

/// Whether all is well.
pub fn run(arguments: &Arguments) -> Result<bool> {
    if let Some(pid) = arguments.pid {
        return tree::run(pid, arguments.json);
    }
    // First, since the kernel's turn ends in another network namespace.
    let runtimes = runtimes::assess(&arguments.host.criu_dir());
    let report = Report { kernel: kernel::features()?, runtimes };
    if arguments.json {
        print_json(&report)?;
    } else {
        kernel::print(&report.kernel)
            .and_then(|()| runtimes::print(&report.runtimes))
            .context("cannot print")?;
    }
    Ok(kernel::enough(&report.kernel) && report.runtimes.iter().all(runtimes::Assessed::is_consistent))
}
