//! The accept queues of the tree's listeners. CRIU refuses to dump a listener whose queue is not empty, so what waits
//! there is taken out, before CRIU looks.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use soccr::accept_queue::{self, Policy};
use soccr::chain;
use soccr::connection::State;
use soccr::criu::image::side::Accepted;
use soccr::criu::record::QueueRecord;
use soccr::criu::tasks::{Place, Unconnected};
use soccr::kernel::netns::NetNs;
use soccr::kernel::{SysError, tcp};
use soccr::repair::{Paused, four_tuple};

use crate::agent::error::AgentError;
use crate::agent::queued::{Queued, Source};
use crate::fault;

/// A listener with connections in its queue that can be put back.
#[derive(Debug)]
pub struct FullListener {
    pub socket: Rc<OwnedFd>,
    pub inode: u32,
    pub ns: NetNs,
    pub place: Place,
    pub queue: QueueRecord,
}

/// Those of these sockets whose queues are to be emptied. Where their connections could not be put back they are left to
/// CRIU, which refuses the dump, or reset, as the policy says.
pub fn of(unconnected: Vec<Unconnected>, policy: Policy) -> Result<Vec<FullListener>, AgentError> {
    let mut full = Vec::new();
    for Unconnected { socket, inode, local, ns, place, .. } in unconnected {
        let failed = |source| AgentError::Listener { local, place, source };
        let waiting = waiting(&socket).map_err(failed)?;
        if waiting == 0 {
            continue;
        }
        let why = match accept_queue::check(&ns) {
            Ok(()) => {
                let queue = QueueRecord { listener: local, waiting };
                full.push(FullListener { socket: Rc::new(socket), inode, ns, place, queue });
                continue;
            }
            Err(why) => why,
        };
        let who =
            format!("{local} ({place}): {waiting} connections that nobody has accepted cannot be carried");
        match policy {
            Policy::Refuse => log::warn!("{who}, and CRIU refuses them: {}", chain(&why)),
            Policy::Reset => {
                let count = accept_queue::reset(socket.as_fd()).map_err(failed)?;
                log::warn!("{who}, and {count} were reset: {}", chain(&why));
            }
        }
    }
    Ok(full)
}

fn waiting(socket: &OwnedFd) -> Result<u32, SysError> {
    if tcp::info(socket.as_fd())?.state == LISTEN { accept_queue::waiting(socket.as_fd()) } else { Ok(0) }
}

const LISTEN: u8 = 10;

/// What an agent that died has saved, whose sockets went with it.
pub fn of_images(accepted: Vec<Accepted>, unconnected: Vec<Unconnected>) -> Vec<Queued> {
    let listeners: HashMap<u32, (Rc<OwnedFd>, NetNs)> = unconnected
        .into_iter()
        .map(|Unconnected { socket, inode, ns, .. }| (inode, (Rc::new(socket), ns)))
        .collect();
    let queued = |accepted: Accepted| {
        let Some((listener, ns)) = listeners.get(&accepted.listener) else {
            log::error!("{}, which nobody had accepted: its listener is gone", accepted.tuple);
            return None;
        };
        Some(Queued { listener: Rc::clone(listener), ns: ns.clone(), accepted, source: Source::Image })
    };
    accepted.into_iter().filter_map(queued).collect()
}

impl FullListener {
    /// Takes out the next connection; `None`: the queue is empty. One that its peer has reset meanwhile is of no use to
    /// anybody.
    pub fn take(&self) -> Result<Option<Queued>, AgentError> {
        let failed = |source| AgentError::Listener { local: self.queue.listener, place: self.place, source };
        while let Some(socket) = accept_queue::take(self.socket.as_fd()).map_err(failed)? {
            fault::point("dump.accepted")?;
            let tuple = four_tuple(socket.as_fd()).map_err(failed)?;
            let state = State::try_from(tcp::info(socket.as_fd()).map_err(failed)?.state);
            let state = state.map_err(|source| AgentError::QueuedState { tuple, source })?;
            if state == State::Close {
                log::info!("{tuple}: its peer has reset it before it was accepted");
                continue;
            }
            let inode = nix::sys::stat::fstat(&socket)
                .map_err(|errno| failed(SysError { call: "stat a socket", errno }))?
                .st_ino;
            let Ok(ino) = u32::try_from(inode) else { return Err(AgentError::Inode(tuple)) };
            let source = Source::Socket(Paused::pause(socket)?.release());
            let accepted = Accepted { listener: self.inode, ino, tuple, state };
            return Ok(Some(Queued {
                listener: Rc::clone(&self.socket),
                ns: self.ns.clone(),
                accepted,
                source,
            }));
        }
        Ok(None)
    }
}
