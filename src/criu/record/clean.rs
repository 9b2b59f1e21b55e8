//! Undoing what a record tells.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::namespaces::{Namespaces, all_namespaces, find};
use super::stopped::{carry_on, finish};
use super::{
    ConnectionRecord, LockRecord, NsId, Phase, QueueRecord, Record, RecordId, State, Store, current_boot,
};
use crate::chain;
use crate::connection::FourTuple;
use crate::criu::stock::{self, NamespaceLock};
use crate::criu::tasks::{Fate, ProcessId, Task, Walker};
use crate::kernel::netns::NetNs;
use crate::kernel::{diag, sockopt, tcp};
use crate::lock::{self, conntrack};
use crate::repair::{Paused, Probe, Who, four_tuple};

/// How to clean.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Only find out what would be done.
    pub dry_run: bool,
}

/// What [`clean`] has done, or would do.
#[derive(Debug, Default)]
pub struct Report {
    /// Connections that were found in repair mode in running tasks and brought back.
    pub revived: Vec<String>,
    /// Locks that were removed, with their namespaces.
    pub unlocked: Vec<LockRecord>,
    /// CRIU's locks of whole namespaces that were removed.
    pub criu_unlocked: Vec<(NsId, NamespaceLock)>,
    /// Locks that were not there any more.
    pub absent: Vec<LockRecord>,
    /// Namespaces that are in use by nobody here; their locks went with them.
    pub gone: Vec<NsId>,
    /// The accept queues whose connections are lost: they were closed with whoever held them.
    pub lost: Vec<QueueRecord>,
    /// Tasks that were left stopped, and continued.
    pub continued: Vec<ProcessId>,
    /// Rules for forged segments that were removed.
    pub passages: usize,
    /// What could not be done. The record is still there then.
    pub problems: Vec<String>,
}

/// Undoes what `record` tells, and removes it when that was possible: removes its locks and, if its criu is dead,
/// those of CRIU itself, brings back connections that were left in repair mode, and removes rules for forged segments.
///
/// Each connection goes on as soon as it is unlocked: what was lost meanwhile is sent again, and a window probe makes
/// the peer speak.
///
/// That the record is not [at work](State::at_work) is for the caller to check. Of a dump that waits for its restore
/// this ends the connections, as soon as their peers send.
#[must_use]
pub fn clean(store: &Store, record: &Record, options: Options) -> Report {
    let mut report = Report::default();
    if record.boot == current_boot() {
        report.lost = record.lost_queues().to_vec();
        report.continued = record.stopped.iter().copied().filter(ProcessId::lives).collect();
        if record.phase == Phase::Dumped && !options.dry_run {
            report.problems.extend(finish(store, record));
        }
        let reusing = Reusing::of(store, record);
        let sockets = broken(record, &reusing, &mut report);
        unlock(store, record, options, &mut report);
        unlock_namespaces(store, record, options, &mut report);
        for socket in sockets {
            let reuse = reusing.has(socket.as_fd());
            if tcp::in_repair(socket.as_fd()).unwrap_or(false) {
                revive(socket, reuse, options, &mut report);
            } else if !options.dry_run {
                let _ = sockopt::set_reuse_addr(socket.as_fd(), true);
            }
        }
        if !options.dry_run {
            report.problems.extend(carry_on(record));
        }
    }
    if report.problems.is_empty()
        && !options.dry_run
        && let Err(error) = store.remove(&record.id).and_then(|()| store.sweep())
    {
        report.problems.push(chain(&error));
    }
    report
}

/// Removes the locks that `record` tells of, where their namespaces can be found; says what could not be removed.
#[must_use]
pub fn remove_locks(record: &Record) -> Vec<String> {
    if record.locks.is_empty() {
        return Vec::new(); // looking for namespaces takes long
    }
    let namespaces = namespaces_of(record);
    let present = record.locks.iter().filter_map(|lock| Some((lock, namespaces.get(lock.ns)?)));
    let removed = present.map(|(lock, ns)| lock::remove(ns, lock.method, &lock.name));
    removed.filter_map(|result| result.err().map(|error| chain(&error))).collect()
}

/// Whether nothing is left of what `record` tells, although nobody has removed it: stock CRIU restored the dump and
/// removed the lock. Only a record that waits for a restore can be so, and only who sees all processes can tell.
///
/// A lock that somebody else has removed, as `nft flush ruleset` does, leaves images that nobody has restored.
#[must_use]
pub fn is_undone(store: &Store, record: &Record) -> bool {
    waits(record) && {
        let namespaces = namespaces_of(record);
        let gone = |id: NsId, is_unlocked: &dyn Fn(&NetNs) -> bool| {
            namespaces.get(id).map_or_else(|| namespaces.is_gone(id), is_unlocked)
        };
        record.locks.iter().all(|lock| gone(lock.ns, &|ns| is_absent(ns, lock)))
            && record.criu_locks.iter().all(|id| gone(*id, &is_unlocked_by_criu))
            && (record.locks.iter().all(|lock| namespaces.is_gone(lock.ns))
                || !record.images.is_there()
                || store.read(&record.id).is_ok_and(|read| read.is_some_and(|(_, all)| is_restored(&all))))
    }
}

/// Ends a dump that waits for its restore, if a process on this host has one of its connections: stock CRIU has restored
/// it, which does not know of all that a dump leaves. Gives whether that was so.
pub fn end_restored(store: &Store, id: &RecordId) -> bool {
    let Ok(Some((record, connections))) = store.read(id) else { return false };
    if !waits(&record) || !is_restored(&connections) {
        return false;
    }
    let tuples: Vec<FourTuple> = connections.iter().map(ConnectionRecord::tuple).collect();
    for (ns, _) in namespaces_of(&record).iter() {
        // A stateful firewall has seen neither what was locked nor the restore.
        let known = conntrack::restore(ns, &record.translations);
        if let Err(error) = known.and(conntrack::establish(ns, &tuples)) {
            log::warn!("{ns}: connections may be reset on their way: {}", chain(&error));
        }
    }
    clean(store, &record, Options::default()).problems.iter().for_each(|problem| log::error!("{problem}"));
    true
}

/// Whether the locks that the record tells of are a dump's that is complete, and of which all else is up to a restore.
fn waits(record: &Record) -> bool {
    record.boot == current_boot() && record.phase == Phase::Dumped && record.stopped.is_empty()
}

/// Whether a process on this host has one of these connections.
fn is_restored(connections: &[ConnectionRecord]) -> bool {
    let tuples: Vec<FourTuple> = connections.iter().map(ConnectionRecord::tuple).collect();
    let lives = |ns: &NetNs| matches!(ns.run(|| diag::find_owned(&tuples)), Ok(Ok(Some(_))));
    all_namespaces().iter().any(|(ns, _)| lives(ns))
}

/// A lock that was to wait for a restore, and that keeps nothing away any more: a lease has ended it, or somebody has
/// removed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct EndedLock(LockRecord);

impl fmt::Display for EndedLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LockRecord { ns, name, .. } = &self.0;
        write!(f, "{ns}: the lock {name} is gone: connections whose peers have sent meanwhile were reset")
    }
}

/// Those in `ns` that the record tells of.
#[must_use]
pub fn ended_locks(record: &Record, ns: &NetNs) -> Vec<EndedLock> {
    let Ok(mut found) = lock::list(ns) else { return Vec::new() }; // whoever needs a lock then is told why
    found.retain(|lock| lock.entries > 0);
    let is_lock = |lock: &&LockRecord| lock.ns == NsId::from(ns) && lock.method != lock::Method::Skip;
    let recorded = record.locks.iter().filter(is_lock);
    recorded.filter(|lock| !found.iter().any(|found| is_same(found, lock))).cloned().map(EndedLock).collect()
}

/// Those of a record that waits for its restore, in all namespaces.
#[must_use]
pub fn all_ended_locks(record: &Record) -> Vec<EndedLock> {
    if record.boot != current_boot() || record.phase != Phase::Dumped {
        return Vec::new(); // its locks are about to be made, or to be removed
    }
    namespaces_of(record).iter().flat_map(|(ns, _)| ended_locks(record, ns)).collect()
}

fn is_unlocked_by_criu(ns: &NetNs) -> bool {
    stock::find_namespace_locks(ns).is_ok_and(|locks| locks.is_empty())
}

/// The namespaces that CRIU may have locked as a whole for this dump or restore: those that the record names, and
/// those of its tasks that live. None while its criu lives, which unlocks them itself.
#[must_use]
pub fn locked_by_criu(record: &Record) -> Vec<NetNs> {
    if record.boot != current_boot() || works_on(record.criu) {
        return Vec::new();
    }
    let named = find(&record.criu_locks);
    let mut namespaces: Vec<NetNs> = named.iter().map(|(ns, _)| ns.clone()).collect();
    for task in &record.tasks {
        // Of the task that was recorded only if that lives after the file was opened.
        if let Ok(ns) = NetNs::of_task(task.pid.cast_unsigned())
            && task.lives()
            && !namespaces.contains(&ns)
        {
            namespaces.push(ns);
        }
    }
    namespaces
}

/// Whether the process lives and will go on: the end of one that is being killed is waited for.
fn works_on(process: ProcessId) -> bool {
    /// In milliseconds.
    const PATIENCE: u16 = 1000;
    if let Ok(task) = Task::open(process.pid)
        && process.lives()
        && task.fate() == Fate::Ending
    {
        let _ = poll(&mut [PollFd::new(task.pidfd(), PollFlags::POLLIN)], PollTimeout::from(PATIENCE));
    }
    process.lives()
}

fn is_absent(ns: &NetNs, wanted: &LockRecord) -> bool {
    lock::list(ns).is_ok_and(|locks| !locks.iter().any(|lock| is_same(lock, wanted)))
}

/// An iptables lock is known by its id only.
fn is_same(found: &lock::LockInfo, wanted: &LockRecord) -> bool {
    found.method == wanted.method
        && match wanted.method {
            lock::Method::Iptables => found.name.id() == wanted.name.id(),
            _ => found.name == wanted.name,
        }
}

fn namespaces_of(record: &Record) -> Namespaces {
    let locked = record.locks.iter().map(|lock| lock.ns);
    let wanted: Vec<NsId> = locked.chain(record.criu_locks.iter().copied()).collect();
    find(&wanted)
}

/// Sockets of the tasks that live which are in repair mode, or which just left it: the kernel turns SO_REUSEADDR off then,
/// and who died could not turn it on again. In the phases before the tasks run again their sockets are not theirs yet.
fn broken(record: &Record, reusing: &Reusing, report: &mut Report) -> Vec<OwnedFd> {
    let forgot = |socket: BorrowedFd<'_>| sockopt::reuse_addr(socket) == Ok(0) && reusing.has(socket);
    let mut found = Vec::new();
    if matches!(record.phase, Phase::Dumped | Phase::Restoring) {
        return found;
    }
    let mut walker = Walker::default();
    for id in record.tasks.iter().filter(|task| task.lives()) {
        let task = match Task::open(id.pid) {
            Ok(task) => task,
            Err(_) if !id.lives() => continue,
            Err(error) => {
                report.problems.push(format!("pid {id}: {error}"));
                continue;
            }
        };
        // The pidfd is of the task that was recorded only if that lives after it was opened.
        if !id.lives() {
            continue;
        }
        let walked = walker.walk(&task, |socket, _| {
            let fd = socket.as_fd();
            if sockopt::is_tcp(fd) && (tcp::in_repair(fd).unwrap_or(false) || forgot(fd)) {
                found.push(socket);
                return Ok(None);
            }
            Ok(Some(socket))
        });
        if let Err(error) = walked
            && id.lives()
        {
            report.problems.push(error.to_string());
        }
    }
    found
}

/// The connections that had SO_REUSEADDR on. After a restore their sockets are new ones, of which only the addresses are
/// the same.
#[derive(Default)]
struct Reusing {
    cookies: HashSet<u64>,
    ends: HashSet<[(IpAddr, u16); 2]>,
}

impl Reusing {
    fn of(store: &Store, record: &Record) -> Self {
        let connections = store.read(&record.id).ok().flatten().map(|(_, connections)| connections);
        let mut reusing = Self::default();
        for connection in connections.into_iter().flatten().filter(|connection| connection.reuse_addr) {
            reusing.cookies.extend((connection.cookie != 0).then_some(connection.cookie));
            reusing.ends.insert(ends(connection.local, connection.remote));
        }
        reusing
    }

    fn has(&self, socket: BorrowedFd<'_>) -> bool {
        sockopt::cookie(socket).is_ok_and(|cookie| self.cookies.contains(&cookie))
            || four_tuple(socket).is_ok_and(|tuple| self.ends.contains(&ends(tuple.local, tuple.remote)))
    }
}

fn ends(local: SocketAddr, remote: SocketAddr) -> [(IpAddr, u16); 2] {
    [local, remote].map(|end| (end.ip().to_canonical(), end.port()))
}

fn revive(socket: OwnedFd, reuse_addr: bool, options: Options, report: &mut Report) {
    let who = Who::of(socket.as_fd());
    let resumed = || {
        let mut paused = Paused::pause(socket)?;
        paused.set_reuse_addr(reuse_addr);
        paused.resume(Probe::Send).map(drop)
    };
    match if options.dry_run { Ok(()) } else { resumed() } {
        Ok(()) => report.revived.push(who.to_string()),
        Err(error) => report.problems.push(chain(&error)),
    }
}

fn unlock(store: &Store, record: &Record, options: Options, report: &mut Report) {
    let namespaces = namespaces_of(record);
    for lock in &record.locks {
        let Some(ns) = namespaces.get(lock.ns) else {
            if !namespaces.is_gone(lock.ns) {
                let why = "cannot be found by this user, so its lock may still be there";
                report.problems.push(format!("{} {why}", lock.ns));
            } else if !report.gone.contains(&lock.ns) {
                report.gone.push(lock.ns);
            }
            continue;
        };
        if lock.name.is_on_path()
            && !options.dry_run
            && let Err(error) = conntrack::restore(ns, &record.translations)
        {
            report.problems.push(chain(&error));
        }
        match remove(ns, lock, options) {
            Ok(true) => report.unlocked.push(lock.clone()),
            Ok(false) => report.absent.push(lock.clone()),
            Err(error) => report.problems.push(chain(&error)),
        }
    }
    // Only a restore opens a way for forged segments.
    if matches!(record.phase, Phase::Restoring | Phase::Waking) && !options.dry_run {
        for (ns, _) in namespaces.iter() {
            if another_restores(store, record, ns.into()) {
                continue;
            }
            match lock::passage::sweep(ns) {
                Ok(count) => report.passages += count,
                Err(error) => report.problems.push(chain(&error)),
            }
        }
    }
}

fn remove(ns: &NetNs, wanted: &LockRecord, options: Options) -> Result<bool, lock::LockError> {
    if options.dry_run {
        return Ok(lock::list(ns)?.iter().any(|lock| is_same(lock, wanted)));
    }
    lock::remove(ns, wanted.method, &wanted.name)
}

fn unlock_namespaces(store: &Store, record: &Record, options: Options, report: &mut Report) {
    for ns in locked_by_criu(record) {
        let id = NsId::from(&ns);
        if another_relies_on_criu(store, &record.id, id) {
            continue;
        }
        let locks = match options.dry_run {
            true => stock::find_namespace_locks(&ns),
            false => stock::remove_namespace_locks(&ns),
        };
        match locks {
            Ok(locks) => report.criu_unlocked.extend(locks.into_iter().map(|lock| (id, lock))),
            Err(error) => report.problems.push(chain(&error)),
        }
    }
}

/// Removes CRIU's locks of the namespaces that `record` names, where the locks of the record stand in their place; says what
/// could not be removed.
#[must_use]
pub fn remove_criu_locks(store: &Store, record: &Record) -> Vec<String> {
    let named = find(&record.criu_locks);
    let free = named.iter().filter(|(ns, _)| !another_relies_on_criu(store, &record.id, (*ns).into()));
    let removed = free.map(|(ns, _)| stock::remove_namespace_locks(ns));
    removed.filter_map(|result| result.err().map(|error| chain(&error))).collect()
}

/// Containers can share a namespace: whether another dump or restore needs CRIU's lock of it.
#[must_use]
pub fn another_relies_on_criu(store: &Store, id: &RecordId, ns: NsId) -> bool {
    others(store, id).any(|other| other.relies_on_criu(ns))
}

fn another_restores(store: &Store, record: &Record, ns: NsId) -> bool {
    others(store, &record.id)
        .any(|other| other.state() == State::Restoring && other.locks.iter().any(|lock| lock.ns == ns))
}

fn others(store: &Store, id: &RecordId) -> impl Iterator<Item = Record> {
    let all = store.list().unwrap_or_default().into_iter().filter_map(|listed| listed.record.ok());
    all.filter(move |other| other.id != *id)
}
