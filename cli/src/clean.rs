//! `soccr clean`.

use std::io::Write;

use anyhow::{Context, Result, bail};
use soccr::criu::record::{self, CleanOptions, Listed, LockRecord, Record, RecordId, Report, State, Store};
use soccr::criu::stock;
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName};

use crate::warn;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub struct Arguments {
    /// The dumps or restores to end, by their id in `soccr status`.
    #[arg(group = "what", value_name = "ID")]
    ids: Vec<RecordId>,
    /// End all that nobody is working on, also dumps that wait for their restore: their connections will be reset.
    #[arg(long, group = "what", conflicts_with_all = ["ids", "orphans"])]
    all: bool,
    /// End those whose criu and agent were killed.
    #[arg(long, group = "what", conflicts_with = "ids")]
    orphans: bool,
    /// Remove a lock of this name, whoever made it, from the current network namespace.
    #[arg(long, group = "what", value_name = "NAME")]
    table: Vec<LockName>,
    /// Remove all iptables rules that stock CRIU left in the current network namespace.
    #[arg(long, group = "what")]
    stock_rules: bool,
    /// Only say what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Also end what somebody is working on, and remove records that cannot be read.
    #[arg(long)]
    force: bool,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut done = true;
    if arguments.all || arguments.orphans || !arguments.ids.is_empty() {
        done &= records(arguments)?;
    }
    for name in &arguments.table {
        done &= table(name, arguments)?;
    }
    if arguments.stock_rules {
        stock_rules(arguments)?;
    }
    Ok(done)
}

fn records(arguments: &Arguments) -> Result<bool> {
    let Some(store) = Store::open()? else { return missing(&arguments.ids) };
    let listed = store.list()?;
    let (chosen, unknown) = choose(listed, arguments);
    let mut done = missing(&unknown)?;
    for Listed { id, record } in chosen {
        done &= match record {
            Ok(record) => one(&store, &record, arguments)?,
            Err(error) => unreadable(&store, &id, error, arguments)?,
        };
    }
    if !arguments.dry_run {
        store.sweep()?;
    }
    Ok(done)
}

fn missing(ids: &[RecordId]) -> Result<bool> {
    for id in ids {
        warn(&format!("{id}: there is no such record"));
    }
    Ok(ids.is_empty())
}

/// The records to clean, and the ids that are none.
fn choose(listed: Vec<Listed>, arguments: &Arguments) -> (Vec<Listed>, Vec<RecordId>) {
    let known = |id: &&RecordId| listed.iter().any(|listed| listed.id == **id);
    let unknown = arguments.ids.iter().filter(|id| !known(id)).cloned().collect();
    let wanted = |listed: &Listed| {
        let orphan = listed.record.as_ref().is_ok_and(|record| record.state() == State::Orphaned);
        arguments.all || arguments.ids.contains(&listed.id) || (arguments.orphans && orphan)
    };
    (listed.into_iter().filter(wanted).collect(), unknown)
}

fn one(store: &Store, record: &Record, arguments: &Arguments) -> Result<bool> {
    let state = record.state();
    if state.at_work() && !arguments.force {
        let (id, criu, agent) = (&record.id, record.criu, record.agent);
        let who = match state {
            State::Elsewhere => "it was recorded in another PID namespace".to_owned(),
            _ => format!("it is {state}: criu (pid {criu}) or its agent (pid {agent}) is at work"),
        };
        warn(&format!("{id}: left alone, {who}; --force ends it all the same"));
        return Ok(false);
    }
    let report = record::clean(store, record, CleanOptions { dry_run: arguments.dry_run });
    tell(record, state, &report, arguments.dry_run).context("cannot print")?;
    for problem in &report.problems {
        warn(&format!("{}: {problem}", record.id));
    }
    Ok(report.problems.is_empty())
}

fn tell(record: &Record, state: State, report: &Report, dry_run: bool) -> std::io::Result<()> {
    let would = if dry_run { "would be " } else { "" };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} ({state}):", record.id)?;
    for connection in &report.revived {
        writeln!(out, "  {connection}: {would}brought back from repair mode")?;
    }
    for LockRecord { ns, name, method } in &report.unlocked {
        writeln!(out, "  {ns}: lock {name} ({method:?}) {would}removed")?;
    }
    for LockRecord { ns, name, .. } in &report.absent {
        writeln!(out, "  {ns}: lock {name} was not there any more")?;
    }
    for ns in &report.gone {
        writeln!(out, "  {ns} is not in use any more; its lock went with it")?;
    }
    if report.passages > 0 {
        writeln!(out, "  {} rules for forged segments removed", report.passages)?;
    }
    if report.problems.is_empty() {
        writeln!(out, "  record {would}removed")?;
    }
    Ok(())
}

fn unreadable(
    store: &Store,
    id: &RecordId,
    error: record::RecordError,
    arguments: &Arguments,
) -> Result<bool> {
    let error = anyhow::Error::new(error);
    if !arguments.force {
        warn(&format!("{id}: left alone, {error:#}; --force removes the record unread"));
        return Ok(false);
    }
    if !arguments.dry_run {
        store.remove(id)?;
    }
    let would = if arguments.dry_run { "would be " } else { "" };
    writeln!(std::io::stdout(), "{id}: record {would}removed unread")?;
    Ok(true)
}

fn table(name: &LockName, arguments: &Arguments) -> Result<bool> {
    let here = NetNs::current()?;
    let found = lock::list(&here)?.into_iter().find(|lock| lock.name == *name);
    let Some(found) = found else {
        warn(&format!("{here}: there is no lock {name}"));
        return Ok(false);
    };
    if let Some(owner) = owner(&here, name)?.filter(|_| !arguments.force) {
        bail!("the lock {name} belongs to {owner}: `soccr clean {owner}` removes it with all else");
    }
    if !arguments.dry_run {
        lock::remove(&here, found.method, name)?;
    }
    let would = if arguments.dry_run { "would be " } else { "" };
    writeln!(std::io::stdout(), "{here}: lock {name} ({:?}) {would}removed", found.method)?;
    Ok(true)
}

/// The record that tells of this lock.
fn owner(here: &NetNs, name: &LockName) -> Result<Option<RecordId>> {
    let listed = Store::open()?.map_or_else(|| Ok(Vec::new()), |store| store.list())?;
    let mut records = listed.into_iter().filter_map(|listed| listed.record.ok());
    let of_ours = |lock: &LockRecord| lock.ns == here.into() && lock.name.id() == name.id();
    Ok(records.find(|record| record.locks.iter().any(of_ours)).map(|record| record.id))
}

fn stock_rules(arguments: &Arguments) -> Result<()> {
    let here = NetNs::current()?;
    let rules = stock::find_rules(&here)?;
    let tuples: Vec<_> = rules.iter().map(stock::StockRule::tuple).collect();
    let (count, verb) = match arguments.dry_run {
        true => (rules.len(), "would be removed"),
        false => (stock::remove_rules(&here, &tuples)?, "removed"),
    };
    writeln!(std::io::stdout(), "{here}: {count} iptables rules of stock CRIU {verb}")?;
    Ok(())
}
