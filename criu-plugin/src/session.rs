//! The hooks, in criu's process: each asks the agent and says what it answered.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use nix::unistd::{Pid, getpid};

use crate::abi::ENOTSUP;
use crate::agent;
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
    let images = host::image_dir().ok_or("CRIU has no image folder")?;
    let client = agent::spawn(stage, images).map_err(|error| error.to_string())?;
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
    with(|session| answered(session.client.ask(Request::Checkpoint(pid), None))).unwrap_or(ENOTSUP)
}

/// POST_FORKING.
pub fn post_forking() -> i32 {
    with(|session| answered(session.client.ask(Request::Forked, None))).unwrap_or(ENOTSUP)
}

/// RESUME_DEVICES_LATE. CRIU ignores the answer, so a task whose connections are not whole is killed: that
/// makes the restore fail.
pub fn resume(pid: i32) -> i32 {
    let result = with(|session| session.client.ask(Request::Resume(pid), None)).unwrap_or(Ok(()));
    if result.is_err() {
        host::print(log::Level::Error, &format!("kills task {pid}, whose connections cannot be restored"));
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    answered(result)
}

/// DUMP_EXT_FILE.
pub fn dump_file(fd: i32, id: i32) -> i32 {
    let Some(file) = solo::tcp_socket(fd) else { return ENOTSUP };
    with(|session| match session.client.ask(Request::DumpFile(id), Some(file)) {
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
    let restored = with(|session| {
        let request = match session.stage {
            Stage::Dump => Request::DumpEnd(ret),
            Stage::Restore => Request::RestoreEnd(ret),
        };
        if let Err(error) = session.client.ask(request, None) {
            host::print(log::Level::Error, &error.to_string());
        }
        session.stage == Stage::Restore
    });
    if restored == Some(true)
        && let Ok(mut session) = SESSION.lock()
    {
        *session = None;
    }
}

/// The end of a criu process that dumped: it waits until the connections are closed silently or unlocked, so
/// that whoever waits for criu finds them so.
pub fn settle() {
    let _ = with(|session| session.client.ask(Request::Settle, None));
}
