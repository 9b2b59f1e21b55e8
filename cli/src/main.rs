//! The soccr command: what is frozen on this host, what an image holds, what the kernel can do.

#![deny(unsafe_code)]

mod archive;
mod check;
mod clean;
mod config;
mod enable;
mod failure;
mod host;
mod list;
mod plugins;
mod runtime;
mod scope;
mod show;
mod sockets;
mod status;
mod table;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use failure::Capability;

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
    /// Show the connections in a folder or an archive of CRIU's images.
    Show(show::Arguments),
    /// List the TCP sockets of running tasks: states, queues, options, descriptors.
    List(list::Arguments),
    /// Check what this kernel offers, which criu each runtime starts, and what of a task cannot be carried.
    Check(check::Arguments),
    /// Have the criu that a runtime starts load the plugin: adds lines to its configuration file.
    Enable(enable::EnableArguments),
    /// Take back what `soccr enable` did.
    Disable(enable::DisableArguments),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    match run(&command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Who reads our output has seen enough.
        Err(error) if failure::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let missing = failure::missing_capability(&error, capability(&command));
            warn(&format!(
                "{error:#}{}",
                missing.map(|name| format!("; {name} is missing: run it as root")).unwrap_or_default()
            ));
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> anyhow::Result<bool> {
    match command {
        Command::Status(arguments) => status::run(arguments),
        Command::Clean(arguments) => clean::run(arguments),
        Command::Show(arguments) => show::run(arguments),
        Command::List(arguments) => list::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Enable(arguments) => enable::enable(arguments),
        Command::Disable(arguments) => enable::disable(arguments),
    }
}

/// What the command needs beyond an ordinary user's rights.
fn capability(command: &Command) -> Capability {
    match command {
        Command::Status(_) | Command::Clean(_) => Capability::NetAdmin,
        Command::List(_) | Command::Check(_) => Capability::SysPtrace,
        Command::Show(_) | Command::Enable(_) | Command::Disable(_) => Capability::DacOverride,
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
