//! The soccr command: what is frozen on this host, what an image holds, what the kernel can do.

#![deny(unsafe_code)]

mod check;
mod clean;
mod scope;
mod show;
mod status;
mod table;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Looks after TCP connections that soccr has frozen, dumped or restored on this host.
#[derive(Debug, Parser)]
#[command(name = "soccr", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the dumps and restores that have changed something on this host, and what has become of them.
    Status(status::Arguments),
    /// End dumps and restores: remove their locks, bring back connections left in repair mode.
    Clean(clean::Arguments),
    /// Show the connections in a folder of CRIU's images.
    Show(show::Arguments),
    /// Check what this kernel offers, in a network namespace of its own.
    Check(check::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Status(arguments) => status::run(&arguments),
        Command::Clean(arguments) => clean::run(&arguments),
        Command::Show(arguments) => show::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            warn(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Says something beside the output.
fn warn(text: &str) {
    // When stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "soccr: {text}");
}

/// Prints a value as JSON.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    writeln!(out)?;
    Ok(())
}
