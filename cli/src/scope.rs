//! Which network namespaces a command looks into.

use std::path::{Path, PathBuf};

use anyhow::Result;
use soccr::criu::record;
use soccr::kernel::netns::NetNs;

/// All namespaces that can be found, or one.
#[derive(Debug, clap::Args)]
pub struct Scope {
    /// Look for locks and rules in this network namespace only, such as /run/netns/NAME.
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// Look for locks and rules in the network namespace of this process only.
    #[arg(long)]
    pid: Option<u32>,
}

/// A namespace to look into.
#[derive(Debug)]
pub struct Place {
    pub ns: NetNs,
    /// A file that leads there; `None` for the current one.
    pub path: Option<PathBuf>,
}

impl Scope {
    /// The namespaces, the current one first.
    pub fn places(&self) -> Result<Vec<Place>> {
        let here = NetNs::current()?;
        let place = |ns: NetNs, path: &Path| Place { path: (ns != here).then(|| path.to_owned()), ns };
        if let Some(path) = self.netns.clone().or(self.pid.map(|pid| format!("/proc/{pid}/ns/net").into())) {
            return Ok(vec![place(NetNs::open(&path)?, &path)]);
        }
        let mut places: Vec<_> =
            record::all_namespaces().iter().map(|(ns, path)| place(ns.clone(), path)).collect();
        places.sort_by_key(|place| (place.path.is_some(), place.ns.inode()));
        Ok(places)
    }
}
