//! The hooks, in criu's process: each asks the agent and says what it answered.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::client::{AskError, Client};
use super::host::{ENOTSUP, Stage};
use super::mode::Mode;
use super::{host, solo, start, tracees};
use crate::agent::Job;
use crate::fault;
use crate::protocol::Request;

struct Session {
    stage: Stage,
    mode: Mode,
    criu: Pid,
    client: Client,
}

static SESSION: Mutex<Option<Session>> = Mutex::new(None);

/// Does this with the session, if there is one in this very process: criu's children inherit the memory, but they have no
/// business with the agent. After a panic nobody knows how far the session is: that is a failure.
fn with(work: impl FnOnce(&Session) -> Result<(), AskError>) -> Result<(), HookError> {
    let session = SESSION.lock().map_err(|_| HookError::Poisoned)?;
    match session.as_ref().filter(|session| session.criu == getpid()) {
        Some(session) => Ok(session.forgiving(work(session))?),
        None => Ok(()),
    }
}

impl Session {
    /// Beside CRIU's own TCP nothing fails for our sake, and an agent that died has left nothing to undo.
    fn forgiving(&self, result: Result<(), AskError>) -> Result<(), AskError> {
        match result {
            Err(error) if self.mode == Mode::Beside => {
                host::print(log::Level::Warn, &format!("what CRIU does not carry is lost: {error}"));
                Ok(())
            }
            other => other,
        }
    }

    /// As [`Client::ask`]; a fresh agent undoes what a dead one has left, while the tasks are still frozen.
    fn ask_or_undo(&self, request: Request, file: Option<BorrowedFd<'_>>) -> Result<(), AskError> {
        let result = self.client.ask(request, file);
        if matches!(result, Err(AskError::Gone { .. })) && self.mode != Mode::Beside {
            clean_up();
        }
        result
    }
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
enum HookError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("the plugin panicked before")]
    Poisoned,
}

/// CRIU stops at the first plugin that answers, so success is "not mine" too, for the others' sake.
fn answered(result: Result<(), HookError>) -> i32 {
    match result {
        Ok(()) => ENOTSUP,
        Err(error) => {
            host::print(log::Level::Error, &error.to_string());
            -1
        }
    }
}

/// init(): starts the agent, unless the user wants CRIU alone to deal with TCP. `has_post_forking` is whether CRIU calls that
/// hook, `at_exit` is for the end of criu's process.
pub fn begin(stage: Stage, has_post_forking: bool, at_exit: extern "C" fn()) -> i32 {
    let mode = Mode::of(stage);
    if mode == Mode::Aside {
        host::print(log::Level::Info, "stands aside: SOCCR_TCP=close");
        return 0;
    }
    match started(stage, mode, has_post_forking, at_exit) {
        Ok(()) => 0,
        Err(error) if mode == Mode::Beside => {
            host::print(log::Level::Warn, &error);
            0
        }
        Err(error) => {
            host::print(log::Level::Error, &error);
            -1
        }
    }
}

fn started(stage: Stage, mode: Mode, has_post_forking: bool, at_exit: extern "C" fn()) -> Result<(), String> {
    let job = match (stage, mode) {
        (Stage::Dump, Mode::Beside) => Job::Beside,
        (Stage::Dump, _) => Job::Dump,
        (Stage::Restore, _) => Job::Restore,
    };
    let client = start::with_images(job).map_err(|error| error.to_string())?;
    if stage == Stage::Dump {
        host::pin(at_exit)?;
    } else {
        // CRIU may go on meanwhile, where the agent says so: POST_FORKING waits for the result.
        let prepared = if has_post_forking {
            client.begin(Request::Prepare)
        } else {
            client.ask(Request::Prepare, None)
        };
        prepared.map_err(|error| error.to_string())?;
    }
    let mut session = SESSION.lock().map_err(|_| HookError::Poisoned.to_string())?;
    *session = Some(Session { stage, mode, criu: getpid(), client });
    Ok(())
}

/// CHECKPOINT_DEVICES.
pub fn checkpoint(pid: i32) -> i32 {
    answered(with(|session| session.ask_or_undo(Request::Checkpoint(pid), None)))
}

fn clean_up() {
    let asked = start::to_clean().map_err(|error| error.to_string());
    report(asked.and_then(|client| client.ask(Request::Clean, None).map_err(|error| error.to_string())));
}

fn report(undone: Result<(), String>) {
    if let Err(error) = undone {
        let text = format!("the agent has died, and its work is not undone ({error}): see soccr status");
        host::print(log::Level::Error, &text);
    }
}

/// POST_FORKING.
pub fn post_forking() -> i32 {
    answered(with(|session| session.client.ask(Request::Forked, None)))
}

/// RESUME_DEVICES_LATE. CRIU ignores the answer, so a task whose connections are not whole is killed: that
/// makes the restore fail.
pub fn resume(pid: i32) -> i32 {
    let result = with(|session| {
        let _ = fault::point("hook.resume");
        match session.client.ask(Request::Resume(pid), None) {
            Err(AskError::Gone { committed }) if completed() || committed => {
                host::print(log::Level::Warn, "the agent has died while it woke the connections");
                Ok(())
            }
            other => other,
        }
    });
    if result.is_err() {
        fail_task(pid);
    }
    answered(result)
}

/// Kills a task whose connections are not whole, and with it all that criu restores.
pub fn fail_task(pid: i32) {
    host::print(
        log::Level::Error,
        &format!("kills task {pid}, whose connections cannot be restored, and all with it"),
    );
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    tracees::end();
}

/// Whether all connections were whole when the agent of a restore died. From there on peers' packets may have passed, even
/// if it could not tell us: a task that is killed then would lose its connections. A new agent reads that in the record,
/// and does what is left to do: to unlock and to wake them.
fn completed() -> bool {
    start::to_clean().is_ok_and(|client| client.ask(Request::Complete, None).is_ok())
}

/// DUMP_EXT_FILE.
pub fn dump_file(fd: i32, id: i32) -> i32 {
    let Some(file) = solo::tcp_socket(fd) else { return ENOTSUP };
    let mut mine = false;
    let result = with(|session| match session.mode {
        Mode::Beside | Mode::Aside => Ok(()),
        Mode::Carry => {
            mine = true;
            session.ask_or_undo(Request::DumpFile(id), Some(file))
        }
    });
    if result.is_ok() && mine { 0 } else { answered(result) }
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
    let Ok(mut guard) = SESSION.lock() else {
        host::print(log::Level::Error, &HookError::Poisoned.to_string());
        return;
    };
    let Some(session) = guard.as_mut().filter(|session| session.criu == getpid()) else { return };
    if let Err(error) = session.client.finish_earlier() {
        host::print(log::Level::Error, &error.to_string());
    }
    let request = match session.stage {
        Stage::Dump => Request::DumpEnd(ret),
        Stage::Restore => Request::RestoreEnd(ret),
    };
    let result = session.client.ask(request, None);
    match (session.forgiving(result), session.stage) {
        (Ok(()), _) => {}
        // The tasks are still frozen, but nobody watches what becomes of them.
        (Err(AskError::Gone { .. }), Stage::Dump) if ret == 0 => {
            let started = start::with_images(Job::TakeOver).map_err(|error| error.to_string());
            let asked = started.and_then(|client| {
                client.ask(request, None).map_err(|error| error.to_string())?;
                session.client = client;
                Ok(())
            });
            report(asked);
        }
        (Err(AskError::Gone { .. }), _) => clean_up(),
        (Err(error), _) => host::print(log::Level::Error, &error.to_string()),
    }
    if session.stage == Stage::Dump && getpid() == Pid::from_raw(1) {
        start::let_children_vanish();
    }
    if session.stage == Stage::Restore {
        *guard = None;
    }
}

/// The end of a criu process that dumped: it waits until the connections are closed silently or unlocked, so
/// that whoever waits for criu finds them so.
pub fn settle() {
    let _ = with(|session| match session.mode {
        Mode::Carry => session.ask_or_undo(Request::Settle, None),
        Mode::Beside | Mode::Aside => Ok(()),
    });
}
