//! The hooks, in criu's process: each asks the agent and says what it answered.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use nix::unistd::{Pid, getpid};
use soccr::criu::record::{Phase, Store};
use soccr::criu::tasks::ProcessId;

use crate::abi::ENOTSUP;
use crate::agent::{self, Job};
use crate::channel::{AskError, Client, Request};
use crate::{host, mode, solo};

/// What criu does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `criu dump`.
    Dump,
    /// `criu restore`.
    Restore,
}

impl Stage {
    /// CRIU's number; `None` for stages in which connections are left alone (pre-dump).
    #[must_use]
    pub fn from_criu(stage: i32) -> Option<Self> {
        match stage {
            0 => Some(Self::Dump),
            2 => Some(Self::Restore),
            _ => None,
        }
    }
}

struct Session {
    stage: Stage,
    criu: Pid,
    client: Client,
}

static SESSION: Mutex<Option<Session>> = Mutex::new(None);

/// Calls `f` with the session, if there is one in this very process: criu's children inherit the memory, but they
/// have no business with the agent.
fn with<R>(f: impl FnOnce(&Session) -> R) -> Option<R> {
    let session = SESSION.lock().ok()?;
    session.as_ref().filter(|session| session.criu == getpid()).map(f)
}

/// CRIU stops at the first plugin that answers, so success is "not mine" too, for the others' sake.
fn answered(result: Result<(), AskError>) -> i32 {
    match result {
        Ok(()) => ENOTSUP,
        Err(error) => {
            host::print(log::Level::Error, &error.to_string());
            -1
        }
    }
}

/// init(): starts the agent, unless the user wants CRIU alone to deal with TCP.
pub fn begin(stage: Stage) -> i32 {
    if let Some(reason) = mode::stand_aside(stage) {
        host::print(log::Level::Info, &format!("stands aside: {reason}"));
        return 0;
    }
    let result = start(stage);
    if let Err(error) = &result {
        host::print(log::Level::Error, error);
    }
    if result.is_ok() { 0 } else { -1 }
}

fn start(stage: Stage) -> Result<(), String> {
    let job = if stage == Stage::Dump { Job::Dump } else { Job::Restore };
    let client = agent::spawn(job, host::image_dir()).map_err(|error| error.to_string())?;
    if stage == Stage::Dump {
        host::pin()?;
    } else {
        client.ask(Request::Prepare, None).map_err(|error| error.to_string())?;
    }
    if let Ok(mut session) = SESSION.lock() {
        *session = Some(Session { stage, criu: getpid(), client });
    }
    Ok(())
}

/// CHECKPOINT_DEVICES.
pub fn checkpoint(pid: i32) -> i32 {
    with(|session| answered(cleaned(session.client.ask(Request::Checkpoint(pid), None)))).unwrap_or(ENOTSUP)
}

/// Has a fresh agent undo what a dead one has left, while the tasks are still frozen.
fn cleaned(result: Result<(), AskError>) -> Result<(), AskError> {
    if let Err(AskError::Gone { .. }) = result {
        successor(Job::Clean, Request::Clean);
    }
    result
}

/// Starts an agent after the first one's death and asks it this; `None` when that is not done.
fn successor(job: Job, request: Request) -> Option<Client> {
    // CRIU has closed the folder when it comes to its end.
    let images = host::image_dir().filter(|_| job != Job::Clean);
    let asked = match agent::spawn(job, images) {
        Ok(client) => client.ask(request, None).map(|()| client).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let report = |error: &String| {
        let text = format!("the agent has died, and its work is not undone ({error}): see soccr status");
        host::print(log::Level::Error, &text);
    };
    asked.inspect_err(report).ok()
}

/// POST_FORKING.
pub fn post_forking() -> i32 {
    with(|session| answered(session.client.ask(Request::Forked, None))).unwrap_or(ENOTSUP)
}

/// RESUME_DEVICES_LATE. CRIU ignores the answer, so a task whose connections are not whole is killed: that
/// makes the restore fail.
pub fn resume(pid: i32) -> i32 {
    let result = with(|session| session.client.ask(Request::Resume(pid), None)).unwrap_or(Ok(()));
    if let Err(AskError::Gone { committed }) = result
        && (committed || is_waking())
    {
        // All connections were whole: what is left to do is to unlock and to wake them.
        host::print(log::Level::Warn, "the agent has died while it woke the connections");
        successor(Job::Clean, Request::Clean);
        return ENOTSUP;
    }
    if result.is_err() {
        host::print(log::Level::Error, &format!("kills task {pid}, whose connections cannot be restored"));
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    answered(result)
}

/// Whether the record says that all connections of this restore were whole. From there on peers' packets may have
/// passed, even if the agent died before it could tell us: a task that is killed then would lose its connections.
fn is_waking() -> bool {
    let Ok(criu) = ProcessId::this() else { return false };
    let listed = Store::open().ok().flatten().and_then(|store| store.list().ok()).unwrap_or_default();
    let mut records = listed.into_iter().filter_map(|listed| listed.record.ok());
    records.any(|record| record.criu == criu && record.phase == Phase::Waking)
}

/// DUMP_EXT_FILE.
pub fn dump_file(fd: i32, id: i32) -> i32 {
    let Some(file) = solo::tcp_socket(fd) else { return ENOTSUP };
    with(|session| match cleaned(session.client.ask(Request::DumpFile(id), Some(file))) {
        Ok(()) => 0,
        failed => answered(failed),
    })
    .unwrap_or(ENOTSUP)
}

/// RESTORE_EXT_FILE, which CRIU calls in the process that is being restored, where the agent is out of reach.
pub fn restore_file(id: i32) -> i32 {
    match host::image_dir().map(|images: BorrowedFd<'_>| solo::restore(images, id)) {
        None | Some(Ok(None)) => ENOTSUP,
        Some(Ok(Some(fd))) => fd,
        Some(Err(error)) => {
            host::print(log::Level::Error, &error);
            -1
        }
    }
}

/// exit().
pub fn end(ret: i32) {
    let Ok(mut guard) = SESSION.lock() else { return };
    let Some(session) = guard.as_mut().filter(|session| session.criu == getpid()) else { return };
    let request = match session.stage {
        Stage::Dump => Request::DumpEnd(ret),
        Stage::Restore => Request::RestoreEnd(ret),
    };
    match (session.client.ask(request, None), session.stage) {
        (Ok(()), _) => {}
        // The tasks are still frozen, but nobody watches what becomes of them.
        (Err(AskError::Gone { .. }), Stage::Dump) if ret == 0 => {
            if let Some(client) = successor(Job::TakeOver, request) {
                session.client = client;
            }
        }
        (Err(AskError::Gone { .. }), _) => drop(successor(Job::Clean, Request::Clean)),
        (Err(error), _) => host::print(log::Level::Error, &error.to_string()),
    }
    if session.stage == Stage::Dump && getpid() == Pid::from_raw(1) {
        agent::reap_itself();
    }
    if session.stage == Stage::Restore {
        *guard = None;
    }
}

/// The end of a criu process that dumped: it waits until the connections are closed silently or unlocked, so
/// that whoever waits for criu finds them so.
pub fn settle() {
    let _ = with(|session| cleaned(session.client.ask(Request::Settle, None)));
}
