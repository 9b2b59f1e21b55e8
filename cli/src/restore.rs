//! `soccr restore`.

mod receiver;

use std::borrow::Cow;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use soccr::criu::record::{self, ConnectionRecord, LockRecord, NsId, Phase, Record, Recorder, Store};
use soccr::criu::rules::Remap;
use soccr::kernel::netns::NetNs;
use soccr::kernel::sockopt;
use soccr::lock::{LockName, LockOptions};
use soccr::repair;
use soccr::{Cause, Connection};

use crate::handover::folder::Folder;
use crate::handover::{self, ManyFiles, Numbered, Uninterrupted};
use crate::{print_json, progress, warn};
use receiver::Receiver;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("receiver").required(true))]
pub struct Arguments {
    /// The folder of the save.
    #[arg(short = 'D', long, value_name = "DIR")]
    images_dir: PathBuf,
    /// Make the sockets in this network namespace, such as /run/netns/NAME, in place of the current one.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Send the sockets over the unix socket at this path (SCM_RIGHTS).
    #[arg(long, value_name = "PATH", group = "receiver")]
    unix: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, requires = "unix")]
    json: bool,
    /// The program that gets them, as descriptors 3, 4 and so on; it takes the place of this one.
    #[arg(last = true, value_name = "COMMAND", group = "receiver")]
    command: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Told {
    /// How many connections.
    sent: usize,
}

pub fn run(arguments: &Arguments) -> Result<bool> {
    let files = ManyFiles::allow();
    let connections = Folder::open(&arguments.images_dir)?.read()?;
    // First, while this program has no descriptors of its own at these numbers.
    let receiver = match &arguments.unix {
        Some(path) => Receiver::at(path)?,
        None => Receiver::program(&arguments.command, connections.len())?,
    };
    let folder = Folder::open(&arguments.images_dir)?;
    let ns = arguments.netns.as_deref().map_or_else(NetNs::current, NetNs::open)?;
    let uninterrupted = Uninterrupted::begin()?;
    let sockets = restore(arguments, &folder, &ns, connections)?;
    drop((uninterrupted, files));
    let sent = sockets.len();
    match receiver.give(sockets) {
        // Only a receiver at a unix socket leaves us here.
        Ok(()) if arguments.json => print_json(&Told { sent }).map(|()| true),
        Ok(()) => {
            writeln!(crate::out(), "{sent} connections were sent").context("cannot print")?;
            Ok(true)
        }
        Err((sockets, error)) => match put_back(&folder, sockets) {
            Ok(()) => {
                let again = format!("the connections are in {} again", arguments.images_dir.display());
                Err(error.context(again))
            }
            Err(lost) => {
                warn(&format!("{error:#}"));
                Err(lost.context("the connections cannot be saved again, and end"))
            }
        },
    }
}

/// Makes the sockets; the folder has no connections any more then. Where that fails, it can be tried again.
fn restore(
    arguments: &Arguments,
    folder: &Folder,
    ns: &NetNs,
    connections: Vec<(u32, Connection)>,
) -> Result<Vec<Numbered<OwnedFd>>> {
    let options = LockOptions::from_env()?;
    let (numbers, connections): (Vec<u32>, Vec<Connection>) = connections.into_iter().unzip();
    let mut recorder = match lock_of(&connections)? {
        Some(name) => Some(take_over(arguments, folder, &name, &connections, ns, &options)?),
        None => None,
    };
    let bar = progress::bar("restoring", numbers.len());
    let mut load = |at: usize| {
        bar.inc(1);
        folder.load(numbers[at]).map(Cow::Owned).map_err(|error| Cause::from(Box::from(format!("{error:#}"))))
    };
    let thawed = ns.run(|| soccr::thaw_each(&connections, &options, &mut load));
    bar.finish_and_clear();
    let sockets = match thawed.map_err(anyhow::Error::from).and_then(|thawed| Ok(thawed?)) {
        Ok(sockets) => sockets,
        Err(error) => {
            // Locked as before, for another try.
            recorder.as_mut().map_or(Ok(()), |recorder| recorder.save(Phase::Dumped))?;
            return Err(error);
        }
    };
    folder.remove_files().unwrap_or_else(|error| warn(&format!("{error:#}")));
    if let Some(recorder) = recorder {
        forget(recorder, &sockets);
    }
    let numbered = |(fd, socket)| Numbered { fd, socket, owner: None };
    Ok(numbers.into_iter().zip(sockets).map(numbered).collect())
}

/// What the record tells of besides the lock that is gone already: a hold, or the lock of the namespace where they were.
fn forget(mut recorder: Recorder, sockets: &[OwnedFd]) {
    let left = record::remove_locks(recorder.record());
    left.iter().for_each(|problem| warn(problem));
    if left.is_empty() {
        recorder.remove().unwrap_or_else(|error| warn(&soccr::chain(&error)));
    }
    if recorder.record().locks.len() > 1 {
        // The first probe met a lock.
        for socket in sockets.iter().map(AsFd::as_fd) {
            let probed = repair::probe(socket, sockopt::reuse_addr(socket) == Ok(1));
            probed.unwrap_or_else(|error| warn(&soccr::chain(&error)));
        }
    }
}

/// The lock that all were saved behind; none where the save was told to do without.
fn lock_of(connections: &[Connection]) -> Result<Option<LockName>> {
    let mut locks = connections.iter().map(Connection::lock);
    let first = locks.next().flatten();
    if locks.any(|lock| lock != first) {
        bail!("these connections are of more than one save");
    }
    match first {
        Some((_, together)) if connections.len() != together as usize => {
            bail!("{} of the {together} connections that were saved together are there", connections.len())
        }
        lock => Ok(lock.map(|(name, _)| name)),
    }
}

/// The record of the save, or, on another host, a new one.
fn take_over(
    arguments: &Arguments,
    folder: &Folder,
    name: &LockName,
    connections: &[Connection],
    ns: &NetNs,
    options: &LockOptions,
) -> Result<Recorder> {
    let id = name.id().parse()?;
    let own = std::process::id().cast_signed();
    let store = Store::open()?;
    let known = store.as_ref().map_or(Ok(None), |store| store.read(&id))?.map(|(record, _)| record);
    let listed = store.as_ref().map_or_else(|| Ok(Vec::new()), Store::list)?;
    let others = listed.into_iter().filter_map(|listed| listed.record.ok()).filter(|record| record.id != id);
    // The files can come from anybody.
    if let Some(other) = others.into_iter().find(|other| other.locks.iter().any(|lock| lock.name == *name)) {
        bail!("these connections name the lock {name} as theirs, which is that of {}", other.id);
    }
    if let (Some(store), Some(record)) = (&store, &known) {
        check(arguments, record, name, ns)?;
        if let [problem, ..] = &record::finish(store, record)[..] {
            bail!("{id}: what the save has left cannot be completed: {problem}");
        }
    }
    let tuples = connections.iter().map(Connection::four_tuple);
    let mut recorder = match Recorder::take_over_for(&id, own, tuples, &Remap::default())? {
        Some(recorder) => recorder,
        None => {
            let mut recorder = Recorder::new(name.id(), Phase::Restoring, folder.as_fd(), own)?;
            let tuples = connections.iter().map(Connection::four_tuple);
            recorder.add_connections(tuples.map(|tuple| ConnectionRecord::of_external(tuple, false)));
            recorder
        }
    };
    recorder.forget_tasks();
    recorder.add_lock(LockRecord { ns: NsId::from(ns), name: name.clone(), method: options.method });
    recorder.save(Phase::Restoring)?;
    Ok(recorder)
}

fn check(arguments: &Arguments, record: &Record, name: &LockName, ns: &NetNs) -> Result<()> {
    let id = &record.id;
    if record.state().at_work() {
        bail!("{id}: it is {}: pid {} is at work", record.state(), record.agent);
    }
    let here = NsId::from(ns);
    let Some(lock) = record.locks.iter().find(|lock| lock.name == *name) else { return Ok(()) };
    if lock.ns != here {
        if arguments.netns.is_none() {
            bail!(
                "{id}: these connections were saved in {}, and this is {here}: choose with --netns",
                lock.ns
            );
        }
        return Ok(());
    }
    record::ended_locks(record, ns).iter().for_each(|ended| warn(&ended.to_string()));
    Ok(())
}

/// As a save does it: nobody has the sockets but this program.
fn put_back(folder: &Folder, sockets: Vec<Numbered<OwnedFd>>) -> Result<()> {
    let _uninterrupted = Uninterrupted::begin()?;
    let name = soccr::lock_name();
    let own = std::process::id().cast_signed();
    let mut recorder = Recorder::new(name.id(), Phase::Saving, folder.as_fd(), own)?;
    match handover::write(folder, &name, &mut recorder, sockets) {
        Ok(frozen) => {
            recorder.save(Phase::Dumped)?;
            drop(frozen.release());
            Ok(())
        }
        Err(error) => {
            recorder.remove()?;
            Err(error)
        }
    }
}
