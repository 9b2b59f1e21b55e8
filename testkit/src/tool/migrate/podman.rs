//! A container's moves by podman's export and import, as `scripts/runtimes` has reported them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::report::{Moved, Row};

#[derive(Deserialize)]
struct Report {
    /// How many clients each round had.
    streams: usize,
    rounds: Vec<Round>,
}

#[derive(Deserialize)]
struct Round {
    case: String,
    who: Who,
    #[serde(default)]
    moves: Vec<Move>,
    /// How many streams ended, by the way they did.
    #[serde(default)]
    ends: HashMap<String, u64>,
    /// What is left on the hosts, a line each.
    #[serde(default)]
    left: Vec<String>,
    error: Option<String>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Who {
    Ours,
    Stock,
}

#[derive(Deserialize)]
struct Move {
    seconds: f64,
    resets: usize,
    /// Of each stream that lives.
    silences: Vec<f64>,
}

/// A row for each round.
pub fn rows(file: &Path) -> Result<Vec<Row>> {
    let text = fs::read(file).with_context(|| file.display().to_string())?;
    let report: Report = serde_json::from_slice(&text).with_context(|| file.display().to_string())?;
    Ok(report.rounds.into_iter().map(|round| round.row(report.streams)).collect())
}

impl Round {
    fn row(self, clients: usize) -> Row {
        let held = self.who == Who::Ours;
        let who = if held { "soccr with hold" } else { "stock CRIU" };
        let moved = |it: Move| {
            let silences = it.silences.into_iter().map(Duration::from_secs_f64).collect();
            Moved::new(Duration::from_secs_f64(it.seconds), silences, it.resets)
        };
        Row {
            name: format!("{who}, podman's export and import ({})", self.case),
            clients,
            held,
            moves: self.moves.into_iter().map(moved).collect(),
            wrong: self.ends.get("wrong content").copied().unwrap_or_default(),
            left: self.left.len(),
            failure: self.error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_a_row() -> Result<()> {
        let text = r#"{"streams": 3, "rounds": [
            {"case": "two hosts, bridge", "who": "stock", "ends": {"ECONNRESET": 1, "wrong content": 2}, "left": ["a", "b"],
             "moves": [{"seconds": 1.5, "resets": 3, "silences": []}], "error": null},
            {"case": "two hosts, bridge", "who": "ours", "error": "a host has ended"}
        ]}"#;
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), text)?;
        let rows = rows(file.path())?;
        let [stock, ours] = rows.as_slice() else { panic!("{} rows", rows.len()) };
        assert_eq!(stock.name, "stock CRIU, podman's export and import (two hosts, bridge)");
        assert_eq!(
            (stock.clients, stock.held, stock.moves.len(), stock.wrong, stock.left),
            (3, false, 1, 2, 2)
        );
        assert_eq!((ours.held, ours.failure.as_deref()), (true, Some("a host has ended")));
        Ok(())
    }
}
