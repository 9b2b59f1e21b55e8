//! The agent: the process that does the plugin's work.
//!
//! It is not criu: descriptors that it holds cannot break criu's select() calls, and it outlives criu, because only
//! after criu's last hook is it decided whether the tasks die or run on.
//!
//! * `dump`, `restore`: the work; `path`: the lock where packets pass on their way; `queued`: what goes back
//!   into accept queues; `clean`: what is left to do when an agent was killed.
//! * `server`, `log`, `profile`: how the hooks ask, and what they are told.
//! * `process`, `privilege`: what this process is and what it may do.

mod clean;
mod dump;
mod error;
mod listeners;
mod log;
mod path;
mod privilege;
mod process;
mod profile;
mod queued;
mod restore;
mod server;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use ::log::LevelFilter;
use soccr::criu::image::ImageDir;

use server::Server;

/// What an agent is started for.
#[derive(Debug)]
pub enum Job {
    /// A dump into this folder.
    Dump(ImageDir),
    /// A dump into this folder, of which CRIU does the larger part.
    Beside(ImageDir),
    /// The end of a dump whose agent died when all was saved.
    TakeOver(ImageDir),
    /// A restore from this folder.
    Restore(ImageDir),
    /// To do what an agent has left undone that died.
    Clean,
}

/// What an agent is told when it begins.
#[derive(Debug)]
pub struct Assignment {
    /// The work.
    pub job: Job,
    /// The criu process.
    pub criu: i32,
    /// What CRIU's log takes.
    pub log_level: LevelFilter,
    /// Whether CRIU seems to mean to let the tasks run on after a dump.
    pub tasks_stay_alive: bool,
}

/// The agent's life, in a process of its own: `control` is where requests come in.
pub fn run(assignment: Assignment, control: OwnedFd) {
    let Assignment { job, criu, log_level, tasks_stay_alive } = assignment;
    let folder = match &job {
        Job::Dump(images) | Job::Beside(images) | Job::TakeOver(images) | Job::Restore(images) => {
            Some(images.as_fd().as_raw_fd())
        }
        Job::Clean => None,
    };
    process::detach(folder.into_iter().chain([control.as_raw_fd()]));
    log::install(log_level);
    if matches!(job, Job::Dump(_)) {
        privilege::be_prompt();
    }
    if let Err(error) = privilege::drop_others() {
        ::log::warn!("the agent keeps all of criu's capabilities: {error}");
    }
    let server = Server::new(control);
    match job {
        Job::Dump(images) => dump::serve(images, criu, tasks_stay_alive, &server),
        Job::Beside(images) => dump::beside::serve(&images, criu, &server),
        Job::TakeOver(images) => dump::take_over(images, criu, tasks_stay_alive, &server),
        Job::Restore(images) => restore::serve(images, criu, &server),
        Job::Clean => clean::serve(criu, &server),
    }
}
