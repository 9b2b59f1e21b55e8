//! The accept queues of the tree's listeners. CRIU refuses to dump a listener whose queue is not empty, so what waits
//! there is taken out, before CRIU looks.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::poll::{PollFd, PollFlags, poll};
use soccr::accept_queue::{self, Fallback};
use soccr::chain;
use soccr::connection::{FourTuple, State};
use soccr::criu::image::side::Accepted;
use soccr::criu::record::QueueRecord;
use soccr::criu::rules::{Action, Policy};
use soccr::criu::tasks::{Place, Unconnected};
use soccr::kernel::diag::Unaccepted;
use soccr::kernel::netns::NetNs;
use soccr::kernel::{SysError, diag, sockopt, tcp};
use soccr::repair::{Paused, four_tuple};

use crate::agent::error::AgentError;
use crate::agent::queued::{self, Queued, Source};

/// A listener of the tree.
#[derive(Clone, Debug)]
pub struct Listener {
    socket: Rc<OwnedFd>,
    inode: u32,
    local: SocketAddr,
    ns: NetNs,
    place: Place,
}

/// The listeners among these sockets.
pub fn listeners(unconnected: &[Unconnected]) -> Result<Vec<Listener>, AgentError> {
    const LISTEN: u8 = 10;
    let mut listeners = Vec::new();
    for Unconnected { socket, inode, local, ns, place, .. } in unconnected {
        let failed = |source| AgentError::Listener { local: *local, place: *place, source };
        if tcp::info(socket.as_fd()).map_err(failed)?.state == LISTEN {
            let (socket, ns) = (Rc::clone(socket), ns.clone());
            listeners.push(Listener { socket, inode: *inode, local: *local, ns, place: *place });
        }
    }
    Ok(listeners)
}

/// A handshake that waits for its last ACK. The socket monitor does not show what was agreed on in it; but what its client
/// sends is held, and the old listener makes a connection of it as long as it is there.
#[derive(Debug)]
pub struct Request {
    /// Those that hear its client, at least one: which of them the kernel has chosen (the one with the closest address, any of
    /// a group with SO_REUSEPORT) nobody tells.
    pub listeners: Vec<Listener>,
    pub tuple: FourTuple,
}

impl Request {
    /// Where it is to be locked.
    pub fn end(&self) -> (NetNs, FourTuple) {
        (self.listeners[0].ns.clone(), self.tuple)
    }

    /// Where segments for it arrive.
    pub fn target(&self) -> (BorrowedFd<'_>, FourTuple) {
        (self.listeners[0].socket.as_fd(), self.tuple)
    }
}

/// The handshakes at these listeners that are not over, as far as their connections could be put back.
pub fn requests(listeners: &[Listener]) -> Vec<Request> {
    let mut requests = Vec::new();
    let mut seen: Vec<&NetNs> = Vec::new();
    for Listener { ns, .. } in listeners {
        if seen.contains(&ns) {
            continue;
        }
        seen.push(ns);
        let found = match ns.run(diag::requests) {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => unknown(ns, &error),
            Err(error) => unknown(ns, &error),
        };
        if found.is_empty() || accept_queue::check(ns).is_err() {
            continue;
        }
        for tuple in found {
            let hears = |it: &&Listener| it.ns == *ns && accept_queue::hears(it.local, tuple.local);
            let listeners: Vec<Listener> = listeners.iter().filter(hears).cloned().collect();
            if !listeners.is_empty() {
                requests.push(Request { listeners, tuple });
            }
        }
    }
    requests
}

fn unknown(ns: &NetNs, error: &dyn std::error::Error) -> Vec<FourTuple> {
    log::warn!("{ns}: handshakes that are not over are lost: {}", chain(error));
    Vec::new()
}

/// What an agent that died has saved, whose sockets went with it.
pub fn of_images(accepted: Vec<Accepted>, listeners: Vec<Listener>) -> Vec<Queued> {
    let listeners = listeners.into_iter().map(|Listener { socket, inode, ns, .. }| (inode, (socket, ns)));
    let listeners: HashMap<u32, (Rc<OwnedFd>, NetNs)> = listeners.collect();
    let queued = |accepted: Accepted| {
        let Some((listener, ns)) = listeners.get(&accepted.listener) else {
            log::error!("{}, which nobody had accepted: its listener is gone", accepted.tuple);
            return None;
        };
        let (listener, ns) = (Rc::clone(listener), ns.clone());
        Some(Queued { listener, ns, accepted, source: Source::Image, action: Action::Keep })
    };
    accepted.into_iter().filter_map(queued).collect()
}

impl Listener {
    pub fn inode(&self) -> u32 {
        self.inode
    }

    /// What is in its queue and to be taken out; `None`: nothing. What could not be put back is left to CRIU, which refuses
    /// the dump, or reset, as the fallback says.
    pub fn queue(&self, fallback: Fallback) -> Result<Option<QueueRecord>, AgentError> {
        let waiting = accept_queue::waiting(self.socket.as_fd()).map_err(|source| self.failed(source))?;
        if waiting == 0 {
            return Ok(None);
        }
        let Err(why) = accept_queue::check(&self.ns) else {
            return Ok(Some(QueueRecord { listener: self.local, waiting }));
        };
        let Self { local, place, .. } = self;
        let who =
            format!("{local} ({place}): {waiting} connections that nobody has accepted cannot be carried");
        match fallback {
            Fallback::Refuse => log::warn!("{who}, and CRIU refuses them: {}", chain(&why)),
            Fallback::Reset => {
                let count = accept_queue::reset(self.socket.as_fd()).map_err(|source| self.failed(source))?;
                log::warn!("{who}, and {count} were reset: {}", chain(&why));
            }
        }
        Ok(None)
    }

    /// The interface that it is bound to, or 0.
    pub fn device(&self) -> Result<u32, AgentError> {
        sockopt::bound_index(self.socket.as_fd()).map_err(|source| self.failed(source))
    }

    /// What is in its queue and in those of others at the same addresses, as long as it is there.
    pub fn look(&self) -> Result<Vec<Unaccepted>, AgentError> {
        self.ns.run(|| accept_queue::look(self.local))?.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: SysError) -> AgentError {
        AgentError::Listener { local: self.local, place: self.place, source }
    }

    /// Takes out all that is in its queue, as far as can be: what goes back into it comes behind what is there.
    pub fn take_all(&self, policy: &Policy, mut each: impl FnMut(Result<Queued, AgentError>)) {
        loop {
            match accept_queue::take(self.socket.as_fd()) {
                Ok(Some(socket)) => self.queued(socket, policy).transpose().into_iter().for_each(&mut each),
                Ok(None) => return,
                Err(source) => return each(Err(self.failed(source))),
            }
        }
    }

    /// A connection that was in its queue; `None`: its peer has reset it meanwhile, and it is of no use to anybody.
    fn queued(&self, socket: OwnedFd, policy: &Policy) -> Result<Option<Queued>, AgentError> {
        let failed = |source| self.failed(source);
        let tuple = four_tuple(socket.as_fd()).map_err(failed)?;
        let state = match State::try_from(tcp::info(socket.as_fd()).map_err(failed)?.state) {
            Ok(State::Close) => {
                log::info!("{tuple}: its peer has reset it before it was accepted");
                return Ok(None);
            }
            Ok(state) => state,
            Err(source) => {
                queued::reset(socket.as_fd(), tuple); // nobody could put it back
                return Err(AgentError::QueuedState { tuple, source });
            }
        };
        let inode = nix::sys::stat::fstat(&socket)
            .map_err(|errno| failed(SysError { call: "stat a socket", errno }))?
            .st_ino;
        let Ok(ino) = u32::try_from(inode) else { return Err(AgentError::Inode(tuple)) };
        let source = Source::Socket(Paused::pause(socket)?.release());
        let accepted = Accepted { listener: self.inode, ino, tuple, state };
        let (listener, ns) = (Rc::clone(&self.socket), self.ns.clone());
        let action = policy.of(&tuple).0;
        Ok(Some(Queued { listener, ns, accepted, source, action }))
    }
}

/// Waits a moment for a connection in one of their queues.
pub fn wait(listeners: &[Listener]) {
    const PATIENCE_MS: u16 = 20;
    let mut fds: Vec<_> =
        listeners.iter().map(|it| PollFd::new(it.socket.as_fd(), PollFlags::POLLIN)).collect();
    let _ = poll(&mut fds, PATIENCE_MS);
}
