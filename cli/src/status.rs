//! `soccr status`.

use std::collections::HashSet;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use soccr::criu::record::{self, Listed, NsId, Record, State, Store};
use soccr::criu::stock;
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName};

use crate::table::Table;
use crate::{print_json, warn};

/// The locks and rules that no record tells of are those of stock CRIU, or of a soccr whose record is gone.
const NOT_OURS: &str = "Not ours, in this network namespace:";

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Status {
    records: Vec<Entry>,
    unreadable: Vec<Unreadable>,
    /// Locks in the current network namespace that no record tells of.
    tables: Vec<Stray>,
    /// Rules of stock CRIU in iptables, in the current network namespace.
    stock_rules: usize,
}

#[derive(Debug, Serialize)]
struct Entry {
    state: String,
    age_seconds: u64,
    images_there: bool,
    criu_lives: bool,
    agent_lives: bool,
    #[serde(flatten)]
    record: Record,
}

#[derive(Debug, Serialize)]
struct Unreadable {
    id: String,
    why: String,
}

#[derive(Debug, Serialize)]
struct Stray {
    name: LockName,
    method: lock::Method,
    entries: usize,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let status = collect()?;
    if arguments.json {
        print_json(&status)?;
    } else {
        print(&status).context("cannot print")?;
    }
    Ok(true)
}

fn collect() -> Result<Status> {
    let store = Store::open()?;
    let listed = store.as_ref().map_or_else(|| Ok(Vec::new()), Store::list)?;
    let (mut records, mut unreadable) = (Vec::new(), Vec::new());
    for Listed { id, record } in listed {
        match record {
            Ok(record) if record::is_undone(&record) => forget(store.as_ref(), &record),
            Ok(record) => records.push(entry(record)),
            Err(error) => unreadable
                .push(Unreadable { id: id.to_string(), why: format!("{:#}", anyhow::Error::new(error)) }),
        }
    }
    let (tables, stock_rules) = strays(&records).unwrap_or_else(|error| {
        warn(&format!("{error:#}"));
        (Vec::new(), 0)
    });
    Ok(Status { records, unreadable, tables, stock_rules })
}

/// A record that tells of nothing any more, since stock CRIU has restored the dump: it may go.
fn forget(store: Option<&Store>, record: &Record) {
    if let Some(Err(error)) = store.map(|store| store.remove(&record.id)) {
        warn(&format!("{:#}", anyhow::Error::new(error)));
    }
}

fn entry(record: Record) -> Entry {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Entry {
        state: record.state().to_string(),
        age_seconds: now.saturating_sub(record.created),
        images_there: record.images.is_there(),
        criu_lives: record.criu.lives(),
        agent_lives: record.agent.lives(),
        record,
    }
}

fn strays(records: &[Entry]) -> Result<(Vec<Stray>, usize)> {
    let here = NetNs::current()?;
    let id = NsId::from(&here);
    let locks = records.iter().flat_map(|entry| &entry.record.locks).filter(|lock| lock.ns == id);
    // Of an iptables lock only the id is known.
    let known: HashSet<&str> = locks.map(|lock| lock.name.id()).collect();
    let found = lock::list(&here)?.into_iter().filter(|lock| !known.contains(lock.name.id()));
    let strays = found.map(|lock| Stray { name: lock.name, method: lock.method, entries: lock.entries });
    Ok((strays.collect(), stock::find_rules(&here)?.len()))
}

fn print(status: &Status) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if !status.records.is_empty() {
        let head = ["ID", "STATE", "AGE", "CONNECTIONS", "NAMESPACES", "IMAGES", "PIDS"];
        let mut table = Table::new(&head);
        status.records.iter().for_each(|entry| table.push(row(entry)));
        table.print(&mut out)?;
    }
    for Unreadable { id, why } in &status.unreadable {
        writeln!(out, "{id}: unreadable: {why}")?;
    }
    if !status.tables.is_empty() || status.stock_rules > 0 {
        writeln!(out, "{NOT_OURS}")?;
    }
    for Stray { name, method, entries } in &status.tables {
        let entries = entries.to_string();
        writeln!(out, "  {name} ({method:?}, {entries} entries); `soccr clean --table {name}` removes it")?;
    }
    if status.stock_rules > 0 {
        let count = status.stock_rules;
        writeln!(out, "  {count} iptables rules of stock CRIU; `soccr clean --stock-rules` removes them")?;
    }
    Ok(())
}

fn row(entry: &Entry) -> [String; 7] {
    let record = &entry.record;
    let namespaces: HashSet<String> = record.locks.iter().map(|lock| lock.ns.to_string()).collect();
    let mut namespaces: Vec<String> = namespaces.into_iter().collect();
    namespaces.sort();
    let gone = if entry.images_there { "" } else { " (gone)" };
    [
        record.id.to_string(),
        entry.state.clone(),
        age(entry.age_seconds),
        record.connections.to_string(),
        or_dash(namespaces.join(",")),
        format!("{}{gone}", record.images.path),
        or_dash(pids(entry)),
    ]
}

/// Who is at work while somebody is, then whose the connections are.
fn pids(entry: &Entry) -> String {
    const SHOWN: usize = 4;
    let record = &entry.record;
    let mut words = Vec::new();
    if record.state() != State::Dumped {
        words.extend(entry.criu_lives.then(|| format!("criu {}", record.criu)));
        words.extend(entry.agent_lives.then(|| format!("agent {}", record.agent)));
    }
    words.extend(record.tasks.iter().take(SHOWN).map(ToString::to_string));
    if record.tasks.len() > SHOWN {
        words.push(format!("and {} more", record.tasks.len() - SHOWN));
    }
    words.join(", ")
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let shown: Vec<String> = [0, 59, 60, 3599, 3600, 86399, 90000].into_iter().map(age).collect();
        assert_eq!(shown, ["0s", "59s", "1m0s", "59m59s", "1h0m", "23h59m", "1d1h"]);
    }
}
