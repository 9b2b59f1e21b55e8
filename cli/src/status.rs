//! `soccr status`.

use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;
use soccr::criu::record::{self, EndedLock, Listed, NsId, Record, State, Store};
use soccr::criu::stock::{self, NamespaceLock};
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName};

use crate::failure::Capability;
use crate::scope::{Place, Scope};
use crate::table::Table;
use crate::{print_json, warn, warn_of};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    scope: Scope,
}

#[derive(Debug, Serialize)]
struct Status {
    records: Vec<Entry>,
    unreadable: Vec<Unreadable>,
    /// What no record tells of: by stock CRIU, or by a soccr whose record is gone.
    strays: Vec<Strays>,
}

#[derive(Debug, Serialize)]
struct Entry {
    state: String,
    age_seconds: u64,
    images_there: bool,
    criu_lives: bool,
    agent_lives: bool,
    /// The namespaces that CRIU has locked as a whole.
    locked_by_criu: Vec<NsId>,
    /// Locks that were to wait for the restore and are gone.
    ended_locks: Vec<EndedLock>,
    #[serde(flatten)]
    record: Record,
}

#[derive(Debug, Serialize)]
struct Unreadable {
    id: String,
    why: String,
}

/// What one network namespace has that no record tells of.
#[derive(Debug, Serialize)]
struct Strays {
    #[serde(flatten)]
    ns: NsId,
    /// A file that leads there; none for the current namespace.
    path: Option<PathBuf>,
    tables: Vec<Stray>,
    /// Stock CRIU's rules in iptables for single connections.
    rules: usize,
    /// CRIU's locks of all of the namespace.
    namespace_locks: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Stray {
    name: LockName,
    method: lock::Method,
    entries: usize,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let status = collect(&arguments.scope)?;
    if arguments.json {
        print_json(&status)?;
    } else {
        print(&status).context("cannot print")?;
    }
    Ok(true)
}

fn collect(scope: &Scope) -> Result<Status> {
    let store = Store::open()?;
    let listed = store.as_ref().map_or_else(|| Ok(Vec::new()), Store::list)?;
    let is_undone = |record: &_| store.as_ref().is_some_and(|store| record::is_undone(store, record));
    let (mut records, mut unreadable) = (Vec::new(), Vec::new());
    for Listed { id, record } in listed {
        match record {
            Ok(record) if is_undone(&record) => forget(store.as_ref(), &record),
            Ok(record) => records.push(entry(record)),
            Err(error) => unreadable
                .push(Unreadable { id: id.to_string(), why: format!("{:#}", anyhow::Error::new(error)) }),
        }
    }
    let mut strays = Vec::new();
    for place in scope.places()? {
        match strays_in(&place, &records) {
            Ok(found) => strays.extend(found),
            Err(error) => warn_of(&error, Capability::NetAdmin),
        }
    }
    Ok(Status { records, unreadable, strays })
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
        locked_by_criu: locked_by_criu(&record),
        ended_locks: record::all_ended_locks(&record),
        record,
    }
}

/// Those that are locked, and those that the record names: while criu lives they are about to be.
fn locked_by_criu(record: &Record) -> Vec<NsId> {
    let locked = |ns: &NetNs| stock::find_namespace_locks(ns).is_ok_and(|locks| !locks.is_empty());
    let found = record::locked_by_criu(record).into_iter().filter(locked).map(|ns| NsId::from(&ns));
    let all: BTreeSet<_> = found.chain(record.criu_locks.iter().copied()).collect();
    all.into_iter().collect()
}

/// `None`: there are none.
fn strays_in(place: &Place, records: &[Entry]) -> Result<Option<Strays>> {
    let ns = NsId::from(&place.ns);
    let locks = records.iter().flat_map(|entry| &entry.record.locks).filter(|lock| lock.ns == ns);
    // Of an iptables lock only the id is known.
    let known: HashSet<&str> = locks.map(|lock| lock.name.id()).collect();
    let whole = stock::find_namespace_locks(&place.ns)?;
    let is_stray = |lock: &lock::LockInfo| {
        !known.contains(lock.name.id()) && !whole.contains(&NamespaceLock::Table(lock.name.clone()))
    };
    let found = lock::list(&place.ns)?.into_iter().filter(is_stray);
    let tables = found.map(|lock| Stray { name: lock.name, method: lock.method, entries: lock.entries });
    let tables: Vec<_> = tables.collect();
    let rules = stock::find_rules(&place.ns)?.len();
    let is_known = records.iter().any(|entry| entry.locked_by_criu.contains(&ns));
    let namespace_locks: Vec<_> = whole.iter().filter(|_| !is_known).map(ToString::to_string).collect();
    let nothing = tables.is_empty() && rules == 0 && namespace_locks.is_empty();
    let strays = || Strays { ns, path: place.path.clone(), tables, rules, namespace_locks };
    Ok((!nothing).then(strays))
}

fn print(status: &Status) -> std::io::Result<()> {
    let mut out = crate::out();
    if !status.records.is_empty() {
        let head = ["ID", "STATE", "AGE", "CONNECTIONS", "NAMESPACES", "IMAGES", "PIDS"];
        let mut table = Table::new(&head);
        status.records.iter().for_each(|entry| table.push(row(entry)));
        table.print(&mut out)?;
    }
    for entry in &status.records {
        entry.ended_locks.iter().try_for_each(|ended| writeln!(out, "{}: {ended}", entry.record.id))?;
    }
    for Unreadable { id, why } in &status.unreadable {
        writeln!(out, "{id}: unreadable: {why}")?;
    }
    status.strays.iter().try_for_each(|strays| print_strays(strays, &mut out))
}

fn print_strays(strays: &Strays, out: &mut impl Write) -> std::io::Result<()> {
    let there = strays.path.as_ref().map(|path| path.display().to_string());
    let option = there.as_ref().map_or_else(String::new, |path| format!(" --netns {path}"));
    match there {
        None => writeln!(out, "Not ours, in this network namespace:")?,
        Some(path) => writeln!(out, "Not ours, in {} ({path}):", strays.ns)?,
    }
    for lock in &strays.namespace_locks {
        let remedy = format!("`soccr clean --stock-rules{option}` removes it");
        writeln!(out, "  CRIU's lock of the whole namespace ({lock}); {remedy}")?;
    }
    for Stray { name, method, entries } in &strays.tables {
        let remedy = format!("`soccr clean --table {name}{option}` removes it");
        writeln!(out, "  {name} ({method:?}, {entries} entries); {remedy}")?;
    }
    if strays.rules > 0 {
        let remedy = format!("`soccr clean --stock-rules{option}` removes them");
        writeln!(out, "  {} iptables rules of stock CRIU; {remedy}", strays.rules)?;
    }
    Ok(())
}

fn row(entry: &Entry) -> [String; 7] {
    let record = &entry.record;
    let locked = record.locks.iter().map(|lock| lock.ns.to_string());
    let whole = entry.locked_by_criu.iter().map(|ns| format!("{ns} (whole)"));
    let namespaces: BTreeSet<String> = locked.chain(whole).collect();
    let namespaces: Vec<String> = namespaces.into_iter().collect();
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
