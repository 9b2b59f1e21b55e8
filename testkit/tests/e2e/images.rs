//! Our images are CRIU's: its own tool reads them, and finds what CRIU itself would have written.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use soccr_testkit::sockets::{state, tcp_sockets};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Criu, Place};

use crate::world::{PATIENCE, PLUGIN, SERVER_V4, STOCK, stage};

/// Two dumps of one process that stands still, by us and by CRIU, differ in the timestamp only.
#[test]
fn crit_shows_what_stock_would_have_written() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN, STOCK])? else { return Ok(()) };
    let args = ["--mode", "stream", "--hold", "--send", "30000", "--sndbuf", "1000000"];
    let server = stage.serve(SERVER_V4, &args)?;
    let mut clients: Vec<_> = (0..3).map(|_| stage.connect(server.address)).collect::<Result<_>>()?;
    clients.iter_mut().try_for_each(|client| client.send(12_345))?;
    wait_until("nothing is under way", PATIENCE, || {
        let mut quiet = 0;
        for socket in tcp_sockets(server.pid())? {
            quiet += usize::from(
                socket.state()? == state::ESTABLISHED && socket.unread()? == 12_345 && socket.unacked()? == 0,
            );
        }
        Ok(quiet == clients.len())
    })?;

    let mut shown = Vec::new();
    for side in [PLUGIN, STOCK] {
        let images = stage.images()?;
        let call = stage.dump(side, server.pid(), &images);
        call.arg("--leave-running").run()?;
        shown.push(show_all(&stage.criu, &images)?);
    }
    ensure!(shown[1].len() == clients.len(), "stock wrote {} images", shown[1].len());
    let files = |at: usize| shown[at].keys().cloned().collect::<Vec<_>>();
    ensure!(files(0) == files(1), "ours: {:?}, stock's: {:?}", files(0), files(1));
    for (file, ours) in &shown[0] {
        let different = differences(ours, &shown[1][file]);
        ensure!(different.is_empty(), "{file}: {}", different.join(", "));
    }
    Ok(())
}

/// The values that are not the same, with their names.
fn differences(ours: &Value, stock: &Value) -> Vec<String> {
    match (ours, stock) {
        (Value::Object(a), Value::Object(b)) => {
            let names: BTreeSet<_> = a.keys().chain(b.keys()).collect();
            names
                .into_iter()
                .flat_map(|name| {
                    differences(&ours[name], &stock[name]).into_iter().map(move |it| format!("{name}.{it}"))
                })
                .collect()
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).flat_map(|(a, b)| differences(a, b)).collect()
        }
        _ if ours == stock => Vec::new(),
        _ => vec![format!(" ours {ours}, stock's {stock}")],
    }
}

/// Each tcp-stream image as crit shows it, less its timestamp, which must be there.
fn show_all(criu: &Criu, images: &Path) -> Result<BTreeMap<String, Value>> {
    let mut shown = BTreeMap::new();
    for entry in fs::read_dir(images)? {
        let name = entry?.file_name().into_string().expect("CRIU's names are ASCII");
        if name.starts_with("tcp-stream-") {
            let mut image = show(criu, &images.join(&name))?;
            let entry = image["entries"][0].as_object_mut().context("an image has an entry")?;
            ensure!(entry.remove("timestamp").is_some(), "{name} has no timestamp");
            shown.insert(name, image);
        }
    }
    Ok(shown)
}

fn show(criu: &Criu, image: &Path) -> Result<Value> {
    let out = criu.crit().arg("show").arg(image).output().context("cannot run crit")?;
    ensure!(out.status.success(), "crit show: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).context("crit's JSON")
}
