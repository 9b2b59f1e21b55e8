//! The stage of a test.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use soccr_testkit::skip::skip;
use soccr_testkit::{Criu, Lock, Pace, Place, Side, Stage, task};

pub use soccr_testkit::stage::PATIENCE;

pub const STOCK: Side = Side::Stock(Lock::Nftables);
pub const STOCK_IPTABLES: Side = Side::Stock(Lock::Iptables);
pub const PLUGIN: Side = Side::Plugin(Lock::Nftables);
pub const PLUGIN_IPTABLES: Side = Side::Plugin(Lock::Iptables);

pub const SERVER_V4: &str = "10.9.0.1:0";

/// Clients that leave the server time to be dumped.
pub const BUSY: Pace = Pace { period: Duration::from_millis(10), parts: 1 };

/// `None`, after saying so, where the test cannot run.
pub fn stage(place: Place, sides: &[Side]) -> Result<Option<Stage>> {
    criu(sides)?.map(|criu| Stage::new(&criu, place)).transpose()
}

/// The same without a stage.
pub fn criu(sides: &[Side]) -> Result<Option<Criu>> {
    let criu = Criu::from_env();
    let with_plugin = sides.iter().any(|side| matches!(side, Side::Plugin(_)));
    if let Err(why) = needs(&criu, with_plugin) {
        return skip(&format!("{why:#}")).map(|()| None);
    }
    if with_plugin {
        criu.check_fresh()?;
    }
    task::become_subreaper()?;
    Ok(Some(criu))
}

fn needs(criu: &Criu, with_plugin: bool) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "this test needs root");
    criu.check(with_plugin).context("this test needs CRIU")
}
