//! Other plugins of CRIU in the same folder.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use soccr_testkit::{Client, Place, Stage};

use crate::world::{PLUGIN, SERVER_V4, stage};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/company.c");

/// A folder in which another plugin stands before ours, and one behind it, as CRIU reads folders.
fn folder(stage: &Stage) -> Result<std::path::PathBuf> {
    let built = stage.dir().join("company.so");
    let status = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
        .arg(&built)
        .arg(SOURCE)
        .status();
    ensure!(status.context("cc")?.success(), "cc failed");
    let folder = stage.dir().join("company");
    fs::create_dir(&folder)?;
    let company = |number: u8| fs::copy(&built, folder.join(format!("company{number}.so")));
    company(0)?;
    fs::copy(stage.criu.plugin(), folder.join("soccr_plugin.so"))?;
    for number in 1..100 {
        company(number)?;
        if matches!(place_of_ours(&folder)?, (before, behind) if before > 0 && behind > 0) {
            return Ok(folder);
        }
    }
    anyhow::bail!("ours is always the first here, or the last")
}

/// How many stand before it, and behind it.
fn place_of_ours(folder: &Path) -> Result<(usize, usize)> {
    let names: Vec<_> = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    let ours = names.iter().position(|name| name == "soccr_plugin.so").context("ours is there")?;
    Ok((ours, names.len() - ours - 1))
}

/// None of them keeps a task from ours: their answer would be taken for the last, and the dump for whole.
#[test]
fn a_plugin_that_answers_for_every_task() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    stage.criu = stage.criu.with_plugins(folder(&stage)?);
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut clients = stage.connect_all(&[server.address], 3, Client::connect)?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    stage.wait_until_clean(Some(&server))
}
