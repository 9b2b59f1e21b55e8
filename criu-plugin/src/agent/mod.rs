//! The agent: the process that does the plugin's work.
//!
//! It is not criu: descriptors that it holds cannot break criu's select() calls, and it outlives criu, because only
//! after criu's last hook is it decided whether the tasks die or run on. It is not criu's child either, since criu
//! waits for any child and takes an unknown one for an error.

#![allow(unsafe_code)]

mod build;
mod cleaner;
mod dump;
mod error;
mod logger;
mod outcome;
mod parallel;
mod privilege;
mod restore;

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};
use soccr::criu::image::ImageDir;

use crate::channel::{self, Client, Server, Unserved};
use error::AgentError;

/// What an agent is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// A dump.
    Dump,
    /// The end of a dump whose agent died when all was saved.
    TakeOver,
    /// A restore.
    Restore,
    /// To undo what an agent has left that died.
    Clean,
}

/// The agent could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A system call failed.
    #[error("cannot start the agent: {0}")]
    Sys(#[from] Errno),
    /// The process between criu and the agent failed.
    #[error("cannot start the agent: its parent ended with {0:?}")]
    Intermediate(WaitStatus),
    /// The image folder cannot be used.
    #[error("cannot start the agent: {0}")]
    Images(#[from] soccr::criu::image::ImageError),
    /// There is no image folder, which all but [`Job::Clean`] need.
    #[error("cannot start the agent: CRIU has no image folder")]
    NoImages,
}

/// Starts the agent and returns the way to ask it.
///
/// # Errors
/// [`SpawnError`].
pub fn spawn(job: Job, images: Option<BorrowedFd<'_>>) -> Result<Client, SpawnError> {
    let images = images.map(ImageDir::duplicate).transpose()?;
    if images.is_none() && job != Job::Clean {
        return Err(SpawnError::NoImages);
    }
    let criu = nix::unistd::getpid();
    let (client, server) = channel::pair()?;
    // criu's handler of SIGCHLD must not see the process in between.
    let sigchld = SigSet::from(Signal::SIGCHLD);
    // An orphan goes to the next subreaper, which must not be criu.
    let subreaper = prctl::get_child_subreaper()?;
    if subreaper {
        prctl::set_child_subreaper(false)?;
    }
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&sigchld), Some(&mut before))?;
    // SAFETY: criu is single-threaded when it loads plugins, so the child may do anything.
    let result = match unsafe { fork() } {
        Ok(ForkResult::Child) => intermediate(client, job, images, criu, server),
        Ok(ForkResult::Parent { child }) => {
            drop(server); // or the agent's death would not be heard
            reap(child)
        }
        Err(error) => Err(error.into()),
    };
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    if subreaper {
        prctl::set_child_subreaper(true)?;
    }
    result?;
    Ok(client.served()?)
}

/// For a criu that is the first process of a PID namespace, whose child every orphan is, the agent too: once criu has
/// killed the tasks it waits until no child is left, and takes one that has ended for an error. From here on children
/// vanish when they end; tasks that criu traces still report to it.
pub fn reap_itself() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, sigaction};
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::SA_NOCLDWAIT, SigSet::empty());
    // SAFETY: the default action needs no handler.
    let _ = unsafe { sigaction(Signal::SIGCHLD, &action) };
}

fn reap(child: Pid) -> Result<(), SpawnError> {
    loop {
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
            Ok(status) => return Err(SpawnError::Intermediate(status)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn intermediate(client: Unserved, job: Job, images: Option<ImageDir>, criu: Pid, server: Server) -> ! {
    drop(client);
    // SAFETY: as in `spawn`.
    let code = match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let ended = catch_unwind(AssertUnwindSafe(|| run(job, images, criu, server)));
            i32::from(ended.is_err())
        }
        Ok(ForkResult::Parent { child }) => {
            server.introduce(child);
            0
        }
        Err(_) => 1,
    };
    // SAFETY: ends the process without criu's exit handlers.
    unsafe { libc::_exit(code) }
}

fn run(job: Job, images: Option<ImageDir>, criu: Pid, server: Server) {
    let _ = setsid();
    let _ = prctl::set_name(c"soccr-agent");
    let _ = nix::unistd::chdir("/");
    let folder = images.iter().map(|images| images.as_fd().as_raw_fd());
    keep_only(folder.chain([server.as_fd().as_raw_fd()]));
    default_signals();
    logger::install();
    if job == Job::Dump {
        privilege::be_prompt(true);
    }
    if let Err(error) = privilege::drop_others() {
        log::warn!("the agent keeps all of criu's capabilities: {error}");
    }
    match (job, images) {
        (Job::Dump, Some(images)) => dump::serve(images, criu.as_raw(), &server),
        (Job::TakeOver, Some(images)) => dump::take_over(images, criu.as_raw(), &server),
        (Job::Restore, Some(images)) => restore::serve(images, criu.as_raw(), &server),
        (Job::Clean, _) | (_, None) => cleaner::serve(criu.as_raw(), &server),
    }
}

/// Closes all of criu's descriptors but these, and opens /dev/null as the standard ones.
fn keep_only(keep: impl Iterator<Item = RawFd>) {
    let mut keep: Vec<u32> = keep.filter_map(|fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 0;
    for fd in keep.iter().copied().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: no memory; the descriptors belong to code that never runs in this process again.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let null: OwnedFd = null.into();
        for standard in 0..=2 {
            if !keep.contains(&standard) && null.as_raw_fd().unsigned_abs() != standard {
                // SAFETY: 0 to 2 are free or were opened here.
                unsafe { libc::dup2(null.as_raw_fd(), standard.cast_signed()) };
            }
        }
        if null.as_raw_fd() <= 2 {
            std::mem::forget(null);
        }
    }
}

/// criu's handlers and mask are not ours.
fn default_signals() {
    for signal in Signal::iterator() {
        // SAFETY: the default action needs no handler. (SIGKILL and SIGSTOP answer EINVAL.)
        let _ = unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) };
    }
    // SAFETY: as above.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigIgn) };
    let _ = SigSet::empty().thread_set_mask();
}

/// An id that no other dump has: 12 hexadecimal digits.
fn random_id() -> Result<String, AgentError> {
    let mut bytes = [0; 6];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(AgentError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
