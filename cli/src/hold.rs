//! `soccr hold` and `soccr release`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::criu::hold::{self, Hold};
use soccr::criu::image::inventory;
use soccr::criu::record::{RecordId, Store};
use soccr::kernel::netns::NetNs;
use soccr::lock::LockOptions;

use crate::archive::Images;
use crate::{clean, print_json, warn};

#[derive(Debug, clap::Args)]
pub struct HoldArguments {
    /// A folder of images, or an archive of podman, CRI-O or containerd.
    images: PathBuf,
    /// Hold them in this network namespace, such as /run/netns/NAME, in place of the current one.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// The kernel ends the hold by itself after this time, such as 90s, 10m or 1h.
    #[arg(long, value_name = "TIME", value_parser = lease)]
    lease: Option<Duration>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub struct ReleaseArguments {
    /// The id in `soccr status`, or the folder or archive of the images.
    what: PathBuf,
    /// Only say what would be released.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Told {
    id: String,
    connections: usize,
    netns: String,
}

fn lease(text: &str) -> Result<Duration, String> {
    let takes = |what| format!("it takes {what}");
    let lease = LockOptions::lease_of(text).map_err(|error| takes(error.expected))?;
    lease.ok_or_else(|| takes("a time"))
}

pub fn hold(arguments: &HoldArguments) -> Result<bool> {
    let images = Images::open(&arguments.images)?;
    let ns = match &arguments.netns {
        Some(path) => NetNs::open(path)?,
        None => NetNs::current()?,
    };
    let mut options = LockOptions::from_env()?;
    options.lease = arguments.lease.or(options.lease);
    let held = hold::hold(&images.dir, &ns, &options);
    let Hold { id, connections, keeper } = held.with_context(|| arguments.images.display().to_string())?;
    let told = Told { id: id.to_string(), connections, netns: ns.to_string() };
    if arguments.json {
        print_json(&told)?;
    } else {
        let Told { id, connections, netns } = told;
        writeln!(crate::out(), "{id}: {connections} connections held in {netns} until their restore")?;
    }
    if let Some(keeper) = keeper {
        crate::out().flush()?;
        // This process ends here, and another one goes on.
        nix::unistd::daemon(false, false).context("nobody holds what their peers send")?;
        keeper.serve();
    }
    Ok(true)
}

pub fn release(arguments: &ReleaseArguments) -> Result<bool> {
    let (id, is_empty) = id_of(&arguments.what)?;
    let store = Store::open()?;
    let known = match (&store, &id) {
        (Some(store), Some(id)) => store.read(id)?.map(|(record, _)| (store, record)),
        _ => None,
    };
    match known {
        Some((store, record)) => clean::one(store, &record, arguments.dry_run, arguments.json),
        None if is_empty => {
            let what = arguments.what.display();
            warn(&format!("{what}: there is no TCP connection in these images, and nothing to release"));
            Ok(true)
        }
        None => bail!("{}: there is no such record", id.map_or_else(String::new, String::from)),
    }
}

/// The record that is meant, and whether images without a connection are. What is a path is one; anything else names a
/// record.
fn id_of(what: &Path) -> Result<(Option<RecordId>, bool)> {
    if what.exists() {
        let images = Images::open(what)?;
        let meant = hold::id_of(&images.dir).with_context(|| what.display().to_string())?;
        if meant.0.is_none() && !images.dir.contains(inventory::NAME) {
            bail!("{}: there are no images of CRIU or soccr", what.display());
        }
        return Ok(meant);
    }
    let text = what.to_string_lossy();
    let id = text.parse().with_context(|| format!("{text}: there is no such file"))?;
    Ok((Some(id), false))
}
