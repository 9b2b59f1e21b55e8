//! What a dump or a restore must not leave: firewall rules and sockets in repair mode.

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Pid;
use serde_json::Value;

use crate::netns::NetNs;
use crate::sockets::for_each;

/// Everything in the firewall of a namespace that can stop a packet or names CRIU or soccr: rules,
/// sets with their elements, and tables named so. iptables here is iptables-nft, whose rules show
/// too; the empty chains that it leaves behind do not count.
pub fn rules(ns: &NetNs) -> Result<Vec<String>> {
    let out = ns.command("nft").args(["-j", "list", "ruleset"]).output().context("cannot run nft")?;
    if !out.status.success() {
        bail!("nft list ruleset: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    let listed: Value = serde_json::from_slice(&out.stdout).context("nft's JSON")?;
    let objects = listed["nftables"].as_array().context("nft's JSON has a list")?;
    Ok(objects.iter().filter(|object| matters(object)).map(ToString::to_string).collect())
}

fn matters(object: &Value) -> bool {
    if let Some(table) = object.get("table") {
        let name = table["name"].as_str().unwrap_or_default().to_lowercase();
        return name.contains("criu") || name.contains("soccr");
    }
    ["rule", "set", "map", "element"].iter().any(|kind| object.get(kind).is_some())
}

/// Fails when the namespace has any of [`rules`].
pub fn no_rules(ns: &NetNs) -> Result<()> {
    let left = rules(ns)?;
    if !left.is_empty() {
        bail!("firewall rules were left behind:\n{}", left.join("\n"));
    }
    Ok(())
}

/// Fails when a TCP socket of the process is in repair mode.
pub fn no_repair(pid: Pid) -> Result<()> {
    for_each(pid, |socket| {
        ensure!(
            !(socket.is_tcp() && socket.in_repair()?),
            "descriptor {} of process {pid} is in repair mode",
            socket.number
        );
        Ok(())
    })
}
