//! The engine beside the bare system calls, as its criterion bench (`testkit/benches`) tells.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::case::Bytes;
use super::pair::{Pair, median};

/// The word of `--only`.
pub const NAME: &str = "engine";

/// What the engine may cost beside them.
const MOST: f64 = 1.15;

/// Criterion measures one after the other: short rounds, so that both meet what else the machine does.
const ROUNDS: usize = 3;
const SHORT: [&str; 8] =
    ["--warm-up-time", "0.2", "--measurement-time", "0.5", "--sample-size", "50", "--nresamples", "1001"];

pub fn measure() -> Result<Vec<Pair>> {
    let rounds = (0..ROUNDS).map(|_| round()).collect::<Result<Vec<_>>>()?;
    let (first, _) = rounds.split_first().context("there is a round")?;
    let pair = |(nth, cell): (usize, &Cell)| {
        let all = |of: fn(&Cell) -> f64| median(rounds.iter().map(|cells| of(&cells[nth])).collect());
        let (ours_us, other_us) = (all(|cell| cell.ours_us)?, all(|cell| cell.raw_us)?);
        let ratio = all(|cell| cell.ours_us / cell.raw_us)?;
        Some(Pair { what: cell.what.clone(), other: "raw calls in C", other_us, ours_us, ratio, most: MOST })
    };
    first.iter().enumerate().map(pair).collect::<Option<_>>().context("there is a round")
}

/// Medians of one round, in microseconds.
struct Cell {
    what: String,
    ours_us: f64,
    raw_us: f64,
}

fn round() -> Result<Vec<Cell>> {
    let home = TempDir::with_prefix("soccr-bench-")?;
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--quiet", "--locked", "--offline", "--bench", "engine", "--"]).args(SHORT);
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).env("CRITERION_HOME", home.path());
    let out = cargo.output().context("cannot run cargo")?;
    ensure!(out.status.success(), "cargo bench: {}: {}", out.status, String::from_utf8_lossy(&out.stderr));
    let mut cells = Vec::new();
    for what in ["save", "restore"] {
        for bytes in lengths(&home.path().join(what).join("engine"))? {
            let of = |whose: &str| {
                estimated(&home.path().join(format!("{what}/{whose}/{bytes}/new/estimates.json")))
            };
            let what = format!("{NAME} {} {what}", Bytes(bytes));
            cells.push(Cell { what, ours_us: of("engine")?, raw_us: of("raw")? });
        }
    }
    ensure!(!cells.is_empty(), "cargo bench has measured nothing");
    Ok(cells)
}

/// Criterion has a folder for each.
fn lengths(dir: &Path) -> Result<Vec<usize>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
    let names = names.collect::<Result<Vec<_>>>()?;
    // Its own is called "report".
    let mut lengths: Vec<_> = names.into_iter().flatten().filter_map(|name| name.parse().ok()).collect();
    lengths.sort_unstable();
    Ok(lengths)
}

/// Criterion's median, in microseconds.
fn estimated(estimates: &Path) -> Result<f64> {
    let text = fs::read(estimates).with_context(|| format!("cannot read {}", estimates.display()))?;
    let estimates: Value = serde_json::from_slice(&text)?;
    let ns = estimates["median"]["point_estimate"].as_f64().context("criterion's estimates have a median")?;
    Ok(ns / 1e3)
}
