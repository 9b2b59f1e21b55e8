//! Connections on their way from one program to another, without CRIU: what `soccr save` and `soccr restore` share.

pub mod folder;

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use soccr::criu::record::{ConnectionRecord, LockRecord, NsId, Phase, Recorder};
use soccr::criu::tasks::Task;
use soccr::kernel::netns::NetNs;
use soccr::kernel::sockopt;
use soccr::lock::LockName;
use soccr::repair::four_tuple;
use soccr::{Cause, Frozen, LockOptions, Method, chain};

use crate::{progress, warn};
use folder::Folder;

/// A socket, and the number that it had in its program.
pub struct Numbered<F> {
    pub fd: u32,
    pub socket: F,
    pub owner: Option<i32>,
}

/// Locks the connections of these sockets, which nobody uses meanwhile, reads them, and writes them into the folder;
/// all or none. The record is written first, and is to be removed by the caller where this fails.
pub fn write<F: AsFd>(
    folder: &Folder,
    name: &LockName,
    recorder: &mut Recorder,
    sockets: Vec<Numbered<F>>,
) -> Result<Frozen<F>> {
    let options = LockOptions::from_env()?;
    let ns = namespace(&sockets)?;
    if options.method != Method::Skip {
        recorder.add_lock(LockRecord { ns: NsId::from(&ns), name: name.clone(), method: options.method });
    }
    for socket in &sockets {
        recorder.add_connections([record(socket)?]);
    }
    recorder.save(Phase::Saving)?;
    let mut files = HashMap::new();
    for Numbered { fd, socket, .. } in &sockets {
        files.insert(four_tuple(socket.as_fd())?, *fd);
    }
    let bar = progress::bar("saving", sockets.len());
    let mut unwritten = None;
    let sockets = sockets.into_iter().map(|numbered| numbered.socket);
    let (frozen, refused) = soccr::freeze_each(name, sockets, &options, &mut |connection| {
        bar.inc(1);
        let written = match (&unwritten, files.get(&connection.four_tuple())) {
            (None, Some(fd)) => folder.write(*fd, connection),
            _ => return Err(Cause::from(Box::from("nothing is written any more"))),
        };
        connection.drop_queues();
        written.map_err(|error| {
            let cause = Cause::from(Box::from(format!("{error:#}")));
            unwritten = Some(error);
            cause
        })
    });
    bar.finish_and_clear();
    if refused.is_empty() {
        return Ok(frozen);
    }
    resume(frozen);
    folder.remove_files().unwrap_or_else(|error| warn(&format!("{error:#}")));
    if let Some(error) = unwritten {
        return Err(error);
    }
    refused.iter().for_each(|refused| warn(&chain(&refused.error)));
    bail!("{} of {} cannot be saved, so none is", refused.len(), files.len())
}

/// Lets connections go on where they are.
pub fn resume<F: AsFd>(frozen: Frozen<F>) {
    frozen.resume().1.iter().for_each(|error| warn(&chain(error)));
}

/// That of all sockets: they are made anew in one.
fn namespace<F: AsFd>(sockets: &[Numbered<F>]) -> Result<NetNs> {
    let mut namespaces = Vec::new();
    let mut seen = HashSet::new();
    for Numbered { fd, socket, .. } in sockets {
        let ns = NetNs::of_socket(socket.as_fd()).with_context(|| format!("fd {fd}"))?;
        if seen.insert(ns.clone()) {
            namespaces.push((fd, ns));
        }
    }
    match &namespaces[..] {
        [(_, ns)] => Ok(ns.clone()),
        [(one, first), (two, second), ..] => bail!(
            "fd {one} is a socket of {first}, and fd {two} one of {second}: a restore makes all in one network \
             namespace, so choose those of one with --fd"
        ),
        [] => bail!("there is no connection to save"),
    }
}

fn record<F: AsFd>(numbered: &Numbered<F>) -> Result<ConnectionRecord> {
    let socket = numbered.socket.as_fd();
    let tuple = four_tuple(socket)?;
    Ok(ConnectionRecord {
        cookie: sockopt::cookie(socket)?,
        pid: numbered.owner,
        fd: Some(numbered.fd),
        ..ConnectionRecord::of_external(tuple, sockopt::reuse_addr(socket)? == 1)
    })
}

/// What would end this program waits until all is done or undone; for as long as this value lives.
pub struct Uninterrupted(SigSet);

impl Uninterrupted {
    pub fn begin() -> Result<Self> {
        let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP];
        Ok(Self(SigSet::from_iter(signals).thread_swap_mask(SigmaskHow::SIG_BLOCK)?))
    }
}

impl Drop for Uninterrupted {
    fn drop(&mut self) {
        let _ = self.0.thread_set_mask(); // it was there before
    }
}

/// As many open files as may be, for as long as this value lives: each connection takes some.
pub struct ManyFiles(Option<(u64, u64)>);

impl ManyFiles {
    pub fn allow() -> Self {
        let before = getrlimit(Resource::RLIMIT_NOFILE).ok();
        if let Some((_, hard)) = before {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard); // EMFILE is told where it comes
        }
        Self(before)
    }
}

impl Drop for ManyFiles {
    fn drop(&mut self) {
        if let Some((soft, hard)) = self.0 {
            let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard); // as above
        }
    }
}

/// A task by its number, for people.
pub fn open_task(pid: i32) -> Result<Task> {
    Task::open(pid).with_context(|| format!("pid {pid}"))
}
