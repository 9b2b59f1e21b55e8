//! `soccr-test announce`: where an address is from now on.

use std::net::IpAddr;

use anyhow::Result;
use soccr_testkit::lan;

/// Tells all neighbours that addresses are here, by gratuitous ARP or neighbour advertisement
#[derive(clap::Args)]
pub struct Options {
    /// The device that leads to the neighbours
    device: String,
    /// What has come here
    #[arg(required = true)]
    addresses: Vec<IpAddr>,
}

pub fn run(options: &Options) -> Result<()> {
    options.addresses.iter().try_for_each(|address| lan::announce(&options.device, *address))
}
