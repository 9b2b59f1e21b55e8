//! `soccr-test`: everything that is dumped, restored, measured and broken here, and what it talks to.

mod announce;
mod bench;
mod demo;
mod faults;
mod migrate;
mod pluginhost;
mod server;
mod soak;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use soccr_testkit::{Criu, interrupt, task};

/// Dumps and restores real servers with CRIU while their clients go on, and looks at every byte.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Options),
    Migrate(migrate::Options),
    Bench(bench::Options),
    Soak(soak::Options),
    Faults(faults::Options),
    Server(server::Options),
    Announce(announce::Options),
    PluginHost(pluginhost::Options),
    #[command(hide = true)]
    Crowd(bench::crowd::Options),
}

/// CRIU and the plugin, where `make criu` and `make` put them unless told.
#[derive(Args)]
struct Programs {
    /// The criu program
    #[arg(long, value_name = "FILE")]
    criu: Option<PathBuf>,
    /// The folder of soccr_plugin.so
    #[arg(long, value_name = "DIR")]
    plugins: Option<PathBuf>,
}

impl Programs {
    fn find(&self, with_plugin: bool) -> Result<Criu> {
        let default = Criu::from_env();
        let bin = self.criu.clone().unwrap_or_else(|| default.bin().to_owned());
        let plugins = self.plugins.clone().unwrap_or_else(|| default.plugin().with_file_name(""));
        let criu = Criu::new(bin.canonicalize().unwrap_or(bin), plugins.canonicalize().unwrap_or(plugins));
        criu.check(with_plugin)?;
        if with_plugin {
            criu.check_fresh()?;
        }
        Ok(criu)
    }
}

/// A folder of `target/`.
fn target(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(name)
}

fn main() -> ExitCode {
    let (name, done) = match Cli::parse().command {
        Command::Demo(options) => ("demo", with_root(|| demo::run(&options))),
        Command::Migrate(options) => ("migrate", with_root(|| migrate::run(&options))),
        Command::Bench(options) => ("bench", with_root(|| bench::run(&options))),
        Command::Soak(options) => ("soak", with_root(|| soak::run(&options))),
        Command::Faults(options) => ("faults", with_root(|| faults::run(&options))),
        Command::Announce(options) => ("announce", announce::run(&options)),
        Command::Server(options) => ("server", server::run(options)),
        Command::Crowd(options) => ("crowd", bench::crowd::run(&options)),
        Command::PluginHost(options) => ("plugin-host", pluginhost::run(&options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("soccr-test {name}: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What drives CRIU: as root, with every child its own to reap, and time to clean up after a Ctrl-C.
fn with_root(work: impl FnOnce() -> Result<()>) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "CRIU needs root: run it with sudo");
    interrupt::notice()?;
    task::become_subreaper()?;
    work()
}
