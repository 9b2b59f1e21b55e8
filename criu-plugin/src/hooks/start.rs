//! Starts the agent.
//!
//! It is not criu's child, since criu waits for any child and takes an unknown one for an error: it is forked twice.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use soccr::criu::image::ImageDir;

use super::client::Client;
use super::host;
use crate::agent::{self, Assignment, Job};
use crate::protocol::socket_pair;

/// The agent could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A system call failed.
    #[error("cannot start the agent: {0}")]
    Sys(#[from] Errno),
    /// The process between criu and the agent failed.
    #[error("cannot start the agent: its parent ended with {0:?}")]
    Intermediate(WaitStatus),
    /// The image folder cannot be used.
    #[error("cannot start the agent: {0}")]
    Images(#[from] soccr::criu::image::ImageError),
    /// There is no image folder.
    #[error("cannot start the agent: CRIU has no image folder")]
    NoImages,
}

/// Starts an agent that works with the images.
///
/// # Errors
/// [`StartError`].
pub fn with_images(job: impl FnOnce(ImageDir) -> Job) -> Result<Client, StartError> {
    let images: BorrowedFd<'_> = host::image_dir().ok_or(StartError::NoImages)?;
    start(job(ImageDir::duplicate(images)?))
}

/// Starts an agent that cleans up after one that died. CRIU may have closed the image folder by then.
///
/// # Errors
/// [`StartError`].
pub fn to_clean() -> Result<Client, StartError> {
    start(Job::Clean)
}

fn start(job: Job) -> Result<Client, StartError> {
    let assignment = Assignment {
        job,
        criu: nix::unistd::getpid().as_raw(),
        log_level: host::log_level(),
        tasks_stay_alive: host::tasks_stay_alive(),
    };
    let (ours, theirs) = socket_pair()?;
    // criu's handler of SIGCHLD must not see the process in between.
    let sigchld = SigSet::from(Signal::SIGCHLD);
    // An orphan goes to the next subreaper, which must not be criu.
    let subreaper = prctl::get_child_subreaper()?;
    if subreaper {
        prctl::set_child_subreaper(false)?;
    }
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&sigchld), Some(&mut before))?;
    let result = fork_twice(assignment, &ours, theirs);
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    if subreaper {
        prctl::set_child_subreaper(true)?;
    }
    result?;
    Ok(Client::connect(ours)?)
}

/// `theirs` is closed here when this returns, or the agent's death would not be heard.
#[allow(unsafe_code)]
fn fork_twice(assignment: Assignment, ours: &OwnedFd, theirs: OwnedFd) -> Result<(), StartError> {
    // SAFETY: criu is single-threaded when it calls plugins, so the child may do anything.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => reap(child),
        ForkResult::Child => {
            // SAFETY: `ours` is never used again in this process, which ends below; it must not keep the socket open.
            unsafe { libc::close(ours.as_raw_fd()) };
            // SAFETY: as above.
            let code = match unsafe { fork() } {
                Ok(ForkResult::Child) => {
                    let ended = catch_unwind(AssertUnwindSafe(|| agent::run(assignment, theirs)));
                    i32::from(ended.is_err())
                }
                Ok(ForkResult::Parent { child }) => {
                    let pid = child.as_raw().to_ne_bytes();
                    let _ = send(theirs.as_raw_fd(), &pid, MsgFlags::MSG_NOSIGNAL);
                    0
                }
                Err(_) => 1,
            };
            // SAFETY: ends the process without criu's exit handlers.
            unsafe { libc::_exit(code) }
        }
    }
}

fn reap(child: Pid) -> Result<(), StartError> {
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(status) => return Err(StartError::Intermediate(status)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// For a criu that is the first process of a PID namespace, whose child every orphan is, the agent too: once criu has
/// killed the tasks it waits until no child is left, and takes one that has ended for an error. From here on children
/// vanish when they end; tasks that criu traces still report to it.
#[allow(unsafe_code)]
pub fn let_children_vanish() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, sigaction};
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDWAIT, SigSet::empty());
    // SAFETY: the default action needs no handler.
    let _ = unsafe { sigaction(Signal::SIGCHLD, &action) };
}
