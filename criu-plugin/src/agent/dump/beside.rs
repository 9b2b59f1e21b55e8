//! A dump in which CRIU carries the connections itself (`--tcp-established`): what its images have no field for is added.
//!
//! Nothing is locked, recorded or held, and what fails here does not fail the dump: the images are what stock's would be.

use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use soccr::chain;
use soccr::criu::image::ImageDir;
use soccr::criu::image::inventory::Inventory;
use soccr::criu::image::side::{SideImage, Sockets};
use soccr::criu::tasks::{self, Duplicates, FindError, Finder, Found, FoundConnection, OwnerMap, Task};

use super::extras::Extras;
use crate::agent::error::AgentError;
use crate::agent::log::answering;
use crate::agent::server::{Asked, Server};
use crate::fault;
use crate::protocol::Request;

/// Serves the hooks of one such dump.
pub fn serve(images: &ImageDir, criu: i32, server: &Server) {
    let Ok(criu) = Task::open(criu) else { return };
    fault::actors(Some(criu.pid), None);
    let mut beside = Beside { images, criu: &criu, looked_at: Vec::new(), extras: Extras::default() };
    while let Some(Asked { request, answer, .. }) = next(&criu, server) {
        answering(answer, || {
            let result = match request {
                Request::Checkpoint(pid) => beside.read(pid),
                Request::DumpEnd(0) => beside.write(),
                _ => Ok(()),
            };
            if let Err(error) = result {
                log::warn!("what CRIU does not carry is lost: {}", chain(&error));
            }
            Ok(())
        });
        if matches!(request, Request::DumpEnd(_)) {
            return; // nobody waits for an outcome
        }
    }
}

/// The next request; `None` when criu is gone.
fn next(criu: &Task, server: &Server) -> Option<Asked> {
    loop {
        let mut fds =
            [PollFd::new(server.as_fd(), PollFlags::POLLIN), PollFd::new(criu.pidfd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, PollTimeout::NONE);
        if fds[0].any() == Some(true) {
            return server.next().ok().flatten();
        }
        if polled.is_ok() && fds[1].any() == Some(true) {
            return None;
        }
    }
}

struct Beside<'a> {
    images: &'a ImageDir,
    criu: &'a Task,
    /// Tasks.
    looked_at: Vec<i32>,
    extras: Extras,
}

impl Beside<'_> {
    /// CHECKPOINT_DEVICES: reads what the sockets of this task and its descendants have, before CRIU puts them into repair
    /// mode.
    fn read(&mut self, pid: i32) -> Result<(), AgentError> {
        if self.looked_at.contains(&pid) {
            return Ok(()); // came with the tree
        }
        fault::point("beside.asked")?;
        let pids = tasks::frozen_tree(pid, self.criu.pid).map_err(AgentError::Tree)?;
        let open = |pid: &i32| Task::open(*pid).map_err(|source| AgentError::Task { pid: *pid, source });
        let opened: Vec<Task> = pids.iter().map(open).collect::<Result<_, _>>()?;
        self.looked_at.extend(pids);
        self.extras.set_owners(OwnerMap::of(pid).map_err(|error| FindError::Proc(pid, error))?);
        let mut held = Duplicates::default();
        let Found { connections, unconnected } = Finder::default().of_tasks(&opened, &mut held)?;
        self.extras.add_unconnected(unconnected);
        for FoundConnection { socket, inode, tuple, ns, .. } in connections {
            self.extras.add_connection(inode, ns, (socket, tuple), None);
        }
        self.extras.read_all(&held);
        Ok(())
    }

    /// exit(): the images are whole.
    fn write(&mut self) -> Result<(), AgentError> {
        fault::point("beside.end")?;
        write(self.images, std::mem::take(&mut self.extras).into_sockets(log::Level::Warn))
    }
}

/// Writes what the sockets have and CRIU's images lack.
pub fn write(images: &ImageDir, sockets: Sockets) -> Result<(), AgentError> {
    let run_id = Inventory::read(images)?.dump_run_id;
    // Nothing on this host has the dump's name: there is neither a lock nor a record.
    SideImage { run_id, sockets, ..SideImage::default() }.write(images)?;
    log::info!(
        "CRIU carries the connections itself (--tcp-established without --tcp-close); soccr.img has what CRIU's images \
         lack. With tcp-close in its configuration (soccr enable) the plugin carries them, and locks them without a gap"
    );
    Ok(())
}
