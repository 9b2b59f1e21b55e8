//! `soccr clean`.

use std::io::Write;

use anyhow::{Context, Result, bail};
use soccr::criu::record::{self, CleanOptions, Listed, LockRecord, Record, RecordId, Report, State, Store};
use soccr::criu::{stock, tasks};
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName};

use crate::scope::{Place, Scope};
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
    /// Remove the lock of this name, whoever made it.
    #[arg(long, group = "what", value_name = "NAME")]
    table: Vec<LockName>,
    /// Remove what stock CRIU left: its iptables rules for connections, and its locks of whole network namespaces.
    #[arg(long, group = "what")]
    stock_rules: bool,
    #[command(flatten)]
    scope: Scope,
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
        done &= stock_rules(arguments)?;
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
            Ok(record) => one(&store, &record, arguments.dry_run, arguments.force)?,
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

/// Ends one dump or restore, unless somebody works on it, and says what was undone.
pub fn one(store: &Store, record: &Record, dry_run: bool, force: bool) -> Result<bool> {
    let state = record.state();
    if state.at_work() && !force {
        let (id, criu, agent) = (&record.id, record.criu, record.agent);
        let who = match state {
            State::Elsewhere => "it was recorded in another PID namespace".to_owned(),
            _ => format!("it is {state}: criu (pid {criu}) or its agent (pid {agent}) is at work"),
        };
        warn(&format!("{id}: left alone, {who}; --force ends it all the same"));
        return Ok(false);
    }
    let report = record::clean(store, record, CleanOptions { dry_run });
    tell(record, state, &report, dry_run).context("cannot print")?;
    for problem in &report.problems {
        warn(&format!("{}: {problem}", record.id));
    }
    Ok(report.problems.is_empty())
}

fn tell(record: &Record, state: State, report: &Report, dry_run: bool) -> std::io::Result<()> {
    let would = if dry_run { "would be " } else { "" };
    let mut out = crate::out();
    writeln!(out, "{} ({state}):", record.id)?;
    for connection in &report.revived {
        writeln!(out, "  {connection}: {would}brought back from repair mode")?;
    }
    for queue in &report.lost {
        writeln!(out, "  {queue} are lost")?;
    }
    for LockRecord { ns, name, method } in &report.unlocked {
        writeln!(out, "  {ns}: lock {name} ({method:?}) {would}removed")?;
    }
    for (ns, lock) in &report.criu_unlocked {
        writeln!(out, "  {ns}: CRIU's lock of the whole namespace ({lock}) {would}removed")?;
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
    writeln!(crate::out(), "{id}: record {would}removed unread")?;
    Ok(true)
}

fn table(name: &LockName, arguments: &Arguments) -> Result<bool> {
    let would = if arguments.dry_run { "would be " } else { "" };
    let mut found = false;
    for ns in arguments.scope.places()?.into_iter().map(|place| place.ns) {
        let Some(lock) = lock::list(&ns)?.into_iter().find(|lock| lock.name == *name) else { continue };
        found = true;
        let of_lock = |lock: &LockRecord| lock.ns == (&ns).into() && lock.name.id() == name.id();
        let owner = owner(|record| record.locks.iter().any(of_lock))?;
        if let Some(owner) = owner.filter(|_| !arguments.force) {
            let owner = owner.id;
            bail!("the lock {name} belongs to {owner}: `soccr clean {owner}` removes it with all else");
        }
        if !arguments.dry_run {
            lock::remove(&ns, lock.method, name)?;
        }
        writeln!(crate::out(), "{ns}: lock {name} ({:?}) {would}removed", lock.method)?;
    }
    if !found {
        warn(&format!("there is no lock {name}"));
    }
    Ok(found)
}

/// The record that tells of something.
fn owner(tells: impl Fn(&Record) -> bool) -> Result<Option<Record>> {
    let listed = Store::open()?.map_or_else(|| Ok(Vec::new()), |store| store.list())?;
    let mut records = listed.into_iter().filter_map(|listed| listed.record.ok());
    Ok(records.find(tells))
}

fn stock_rules(arguments: &Arguments) -> Result<bool> {
    let (mut done, mut found) = (true, 0);
    for Place { ns, .. } in arguments.scope.places()? {
        let here = rules(&ns, arguments).and_then(|rules| Ok(rules + namespace_locks(&ns, arguments)?));
        match here {
            Ok(count) => found += count,
            Err(error) => {
                warn(&format!("{error:#}"));
                done = false;
            }
        }
    }
    if done && found == 0 {
        writeln!(crate::out(), "there is nothing of stock CRIU")?;
    }
    Ok(done)
}

fn rules(ns: &NetNs, arguments: &Arguments) -> Result<usize> {
    let rules = stock::find_rules(ns)?;
    if rules.is_empty() {
        return Ok(0);
    }
    let tuples: Vec<_> = rules.iter().map(stock::StockRule::tuple).collect();
    let (count, verb) = match arguments.dry_run {
        true => (rules.len(), "would be removed"),
        false => (stock::remove_rules(ns, &tuples)?, "removed"),
    };
    writeln!(crate::out(), "{ns}: {count} iptables rules of stock CRIU {verb}")?;
    Ok(count)
}

fn namespace_locks(ns: &NetNs, arguments: &Arguments) -> Result<usize> {
    let mut locks = stock::find_namespace_locks(ns)?;
    if locks.is_empty() {
        return Ok(0);
    }
    if let Some(who) = who_needs_lock_of(ns)?.filter(|_| !arguments.force) {
        bail!(
            "{ns}: CRIU's lock of the whole namespace is left alone, {who}; --force removes it all the same"
        );
    }
    if !arguments.dry_run {
        locks = stock::remove_namespace_locks(ns)?;
    }
    let would = if arguments.dry_run { "would be " } else { "" };
    for lock in &locks {
        writeln!(crate::out(), "{ns}: CRIU's lock of the whole namespace ({lock}) {would}removed")?;
    }
    Ok(locks.len())
}

/// Why CRIU's lock of this namespace may be needed.
fn who_needs_lock_of(ns: &NetNs) -> Result<Option<String>> {
    if let Some(record) = owner(|record| record.criu_locks.contains(&ns.into()))? {
        let id = record.id;
        return Ok(Some(format!("it belongs to {id}: `soccr clean {id}` removes it with all else")));
    }
    let traced = tasks::traced_in(ns)?;
    Ok(traced
        .map(|(pid, tracer)| format!("pid {pid} there is traced by pid {tracer}: a criu may be at work")))
}
