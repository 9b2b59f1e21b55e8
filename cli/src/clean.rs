//! `soccr clean`.

use std::io::Write;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::criu::record::{
    self, CleanOptions, Listed, LockRecord, NsId, QueueRecord, Record, RecordId, Report, State, Store,
};
use soccr::criu::tasks::ProcessId;
use soccr::criu::{stock, tasks};
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockName};

use crate::failure::Capability;
use crate::scope::{Place, Scope};
use crate::{print_json, warn, warn_of};

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
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What was ended and removed, or would be.
#[derive(Debug, Default, Serialize)]
pub struct Told {
    dry_run: bool,
    records: Vec<Ended>,
    /// Records that were removed unread.
    unread: Vec<RecordId>,
    locks: Vec<LockRecord>,
    stock: Vec<OfStock>,
}

/// A dump or restore that was ended.
#[derive(Debug, Serialize)]
struct Ended {
    id: RecordId,
    state: String,
    /// Connections in running tasks.
    revived: Vec<String>,
    /// Connections that nobody had accepted, which went with whoever held them.
    lost: Vec<QueueRecord>,
    /// Tasks that a save had stopped.
    continued: Vec<ProcessId>,
    unlocked: Vec<LockRecord>,
    criu_unlocked: Vec<CriuLock>,
    /// Locks that were not there any more.
    absent: Vec<LockRecord>,
    /// Namespaces that are in use no more.
    gone: Vec<NsId>,
    /// Rules for forged segments.
    passages: usize,
    problems: Vec<String>,
}

/// A lock of a whole namespace.
#[derive(Debug, Serialize)]
struct CriuLock {
    ns: NsId,
    lock: String,
}

/// What stock CRIU had left in a namespace.
#[derive(Debug, Serialize)]
struct OfStock {
    ns: NsId,
    /// In iptables, for single connections.
    rules: usize,
    /// Of the whole namespace.
    locks: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut told = Told { dry_run: arguments.dry_run, ..Told::default() };
    let done = work(arguments, &mut told);
    told.print(arguments.json)?;
    if arguments.stock_rules && !arguments.json && matches!(done, Ok(true)) && told.stock.is_empty() {
        writeln!(crate::out(), "there is nothing of stock CRIU")?;
    }
    done
}

fn work(arguments: &Arguments, told: &mut Told) -> Result<bool> {
    let mut done = true;
    if arguments.all || arguments.orphans || !arguments.ids.is_empty() {
        done &= records(arguments, told)?;
    }
    for name in &arguments.table {
        done &= table(name, arguments, told)?;
    }
    if arguments.stock_rules {
        done &= stock_rules(arguments, told)?;
    }
    Ok(done)
}

fn records(arguments: &Arguments, told: &mut Told) -> Result<bool> {
    let Some(store) = Store::open()? else { return Ok(missing(&arguments.ids)) };
    let listed = store.list()?;
    let (chosen, unknown) = choose(listed, arguments);
    let mut done = missing(&unknown);
    for Listed { id, record } in chosen {
        done &= match record {
            Ok(record) => told.end(&store, &record, arguments.force),
            Err(error) => unreadable(&store, id, error, arguments, told)?,
        };
    }
    if !arguments.dry_run {
        store.sweep()?;
    }
    Ok(done)
}

fn missing(ids: &[RecordId]) -> bool {
    for id in ids {
        warn(&format!("{id}: there is no such record"));
    }
    ids.is_empty()
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

/// Ends one dump or restore, and tells of it.
pub fn one(store: &Store, record: &Record, dry_run: bool, json: bool) -> Result<bool> {
    let mut told = Told { dry_run, ..Told::default() };
    let done = told.end(store, record, false);
    told.print(json)?;
    Ok(done)
}

impl Told {
    /// Ends one dump or restore, unless somebody works on it.
    fn end(&mut self, store: &Store, record: &Record, force: bool) -> bool {
        let (id, state) = (&record.id, record.state());
        if state.at_work() && !force {
            let (criu, agent) = (record.criu, record.agent);
            let who = match state {
                State::Elsewhere => "it was recorded in another PID namespace".to_owned(),
                _ if criu == agent => format!("it is {state}: soccr (pid {agent}) is at work"),
                _ => format!("it is {state}: criu (pid {criu}) or its agent (pid {agent}) is at work"),
            };
            warn(&format!("{id}: left alone, {who}; --force ends it all the same"));
            return false;
        }
        let report = record::clean(store, record, CleanOptions { dry_run: self.dry_run });
        report.problems.iter().for_each(|problem| warn(&format!("{id}: {problem}")));
        let Report { revived, unlocked, absent, gone, lost, continued, passages, problems, criu_unlocked } =
            report;
        let criu_unlocked =
            criu_unlocked.into_iter().map(|(ns, lock)| CriuLock { ns, lock: lock.to_string() });
        let done = problems.is_empty();
        self.records.push(Ended {
            id: id.clone(),
            state: state.to_string(),
            criu_unlocked: criu_unlocked.collect(),
            revived,
            lost,
            continued,
            unlocked,
            absent,
            gone,
            passages,
            problems,
        });
        done
    }

    fn print(&self, json: bool) -> Result<()> {
        if json { print_json(self) } else { self.print_text().context("cannot print") }
    }

    fn print_text(&self) -> std::io::Result<()> {
        let would = if self.dry_run { "would be " } else { "" };
        let mut out = crate::out();
        self.records.iter().try_for_each(|ended| ended.print(would, &mut out))?;
        for id in &self.unread {
            writeln!(out, "{id}: record {would}removed unread")?;
        }
        for LockRecord { ns, name, method } in &self.locks {
            writeln!(out, "{ns}: lock {name} ({method:?}) {would}removed")?;
        }
        for OfStock { ns, rules, locks } in &self.stock {
            if *rules > 0 {
                writeln!(out, "{ns}: {rules} iptables rules of stock CRIU {would}removed")?;
            }
            for lock in locks {
                writeln!(out, "{ns}: CRIU's lock of the whole namespace ({lock}) {would}removed")?;
            }
        }
        Ok(())
    }
}

impl Ended {
    fn print(&self, would: &str, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "{} ({}):", self.id, self.state)?;
        for connection in &self.revived {
            writeln!(out, "  {connection}: {would}brought back from repair mode")?;
        }
        for queue in &self.lost {
            writeln!(out, "  {queue} are lost")?;
        }
        for LockRecord { ns, name, method } in &self.unlocked {
            writeln!(out, "  {ns}: lock {name} ({method:?}) {would}removed")?;
        }
        for CriuLock { ns, lock } in &self.criu_unlocked {
            writeln!(out, "  {ns}: CRIU's lock of the whole namespace ({lock}) {would}removed")?;
        }
        for LockRecord { ns, name, .. } in &self.absent {
            writeln!(out, "  {ns}: lock {name} was not there any more")?;
        }
        for ns in &self.gone {
            writeln!(out, "  {ns} is not in use any more; its lock went with it")?;
        }
        for pid in &self.continued {
            writeln!(out, "  pid {pid}: {would}continued")?;
        }
        if self.passages > 0 {
            writeln!(out, "  {} rules for forged segments removed", self.passages)?;
        }
        if self.problems.is_empty() {
            writeln!(out, "  record {would}removed")?;
        }
        Ok(())
    }
}

fn unreadable(
    store: &Store,
    id: RecordId,
    error: record::RecordError,
    arguments: &Arguments,
    told: &mut Told,
) -> Result<bool> {
    let error = anyhow::Error::new(error);
    if !arguments.force {
        warn(&format!("{id}: left alone, {error:#}; --force removes the record unread"));
        return Ok(false);
    }
    if !arguments.dry_run {
        store.remove(&id)?;
    }
    told.unread.push(id);
    Ok(true)
}

fn table(name: &LockName, arguments: &Arguments, told: &mut Told) -> Result<bool> {
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
        told.locks.push(LockRecord { ns: NsId::from(&ns), name: lock.name, method: lock.method });
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

fn stock_rules(arguments: &Arguments, told: &mut Told) -> Result<bool> {
    let mut done = true;
    for Place { ns, .. } in arguments.scope.places()? {
        let mut here = OfStock { ns: NsId::from(&ns), rules: 0, locks: Vec::new() };
        let removed =
            rules(&ns, arguments, &mut here).and_then(|()| namespace_locks(&ns, arguments, &mut here));
        if let Err(error) = removed {
            warn_of(&error, Capability::NetAdmin);
            done = false;
        }
        if here.rules > 0 || !here.locks.is_empty() {
            told.stock.push(here);
        }
    }
    Ok(done)
}

fn rules(ns: &NetNs, arguments: &Arguments, here: &mut OfStock) -> Result<()> {
    let rules = stock::find_rules(ns)?;
    if !rules.is_empty() {
        let tuples: Vec<_> = rules.iter().map(stock::StockRule::tuple).collect();
        here.rules = if arguments.dry_run { rules.len() } else { stock::remove_rules(ns, &tuples)? };
    }
    Ok(())
}

fn namespace_locks(ns: &NetNs, arguments: &Arguments, here: &mut OfStock) -> Result<()> {
    let mut locks = stock::find_namespace_locks(ns)?;
    if locks.is_empty() {
        return Ok(());
    }
    if let Some(who) = who_needs_lock_of(ns)?.filter(|_| !arguments.force) {
        bail!(
            "{ns}: CRIU's lock of the whole namespace is left alone, {who}; --force removes it all the same"
        );
    }
    if !arguments.dry_run {
        locks = stock::remove_namespace_locks(ns)?;
    }
    here.locks = locks.iter().map(ToString::to_string).collect();
    Ok(())
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
