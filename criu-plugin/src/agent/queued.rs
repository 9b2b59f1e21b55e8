//! Connections that nobody had accepted, on their way back into the accept queues of their listeners.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use soccr::accept_queue::{self, AcceptQueues};
use soccr::chain;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::side::Accepted;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::rules::Action;
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::repair::{Paused, Probe};

use crate::agent::error::AgentError;
use crate::fault;

/// A connection without a place, and its listener.
#[derive(Debug)]
pub struct Queued {
    pub listener: Rc<OwnedFd>,
    /// The namespace of both.
    pub ns: NetNs,
    pub accepted: Accepted,
    pub source: Source,
    /// Whether it is carried, or how it ends with the tasks.
    pub action: Action,
}

/// A connection that waits to be accepted again, known by its listener.
#[derive(Debug)]
pub struct Waiting {
    listener: Rc<OwnedFd>,
    tuple: FourTuple,
}

impl Waiting {
    /// Where segments for it arrive: it has no descriptor, and its listener is where it is.
    pub fn end(&self) -> (BorrowedFd<'_>, FourTuple) {
        (self.listener.as_fd(), self.tuple)
    }
}

/// Where the connection is.
#[derive(Debug)]
pub enum Source {
    /// In this socket, which is in repair mode: whoever closes it, or dies, its peer hears nothing.
    Socket(OwnedFd),
    /// In its image.
    Image,
}

impl Queued {
    /// Where it is to be locked.
    pub fn end(&self) -> (NetNs, FourTuple) {
        (self.ns.clone(), self.accepted.tuple)
    }

    /// Writes its image, from its socket; refuses what could not be put back.
    pub fn save(&mut self, images: &ImageDir, queues: &mut Queues) -> Result<(), AgentError> {
        let Source::Socket(socket) = &self.source else { return Ok(()) };
        let Accepted { tuple, ino, .. } = self.accepted;
        let paused = Paused::pause(socket.as_fd())?;
        let saved = paused.save(queues);
        paused.release();
        let tcp = saved.map_err(|source| AgentError::Queued { tuple, source })?;
        if let Some(why) = accept_queue::unfit(&tuple, &tcp) {
            return Err(AgentError::Unfit { tuple, why });
        }
        self.accepted.state = tcp.state;
        TcpStreamImage::write(images, ino, &tcp, &queues.recv, &queues.send)
            .map_err(|source| AgentError::QueuedImage { tuple, source })
    }

    /// Its socket out of repair mode, in which its peer would hear of nothing.
    pub fn into_open(self) -> Option<(OwnedFd, FourTuple)> {
        let Source::Socket(socket) = self.source else { return None };
        let tuple = self.accepted.tuple;
        let open = Paused::pause(socket).map_err(AgentError::from);
        let open = open.and_then(|paused| Ok(paused.resume(Probe::None)?));
        let told = |error: &AgentError| log::error!("{tuple}: its peer does not hear: {}", chain(error));
        open.inspect_err(told).ok().map(|socket| (socket, tuple))
    }
}

/// Puts connections back, one after the other, as they stood in their queues.
#[derive(Debug, Default)]
pub struct Putter {
    ways: HashMap<NetNs, AcceptQueues>,
    /// The memory of one connection's queues, used again and again.
    queues: Queues,
}

impl Putter {
    /// Puts one back. Its namespace is locked for it.
    pub fn put(&mut self, queued: Queued, images: &ImageDir, forge: &Forge) -> Result<Waiting, AgentError> {
        let Queued { listener, ns, accepted, source, .. } = queued;
        let tuple = accepted.tuple;
        let failed = |source| AgentError::AcceptQueue { tuple, source };
        if !self.ways.contains_key(&ns) {
            let way =
                AcceptQueues::open(&ns).map_err(|source| AgentError::NoAcceptQueue { tuple, source })?;
            self.ways.insert(ns.clone(), way);
        }
        let tcp = self.take(source, &accepted, images)?;
        fault::point("queue.closed")?;
        self.ways[&ns].put(forge, listener.as_fd(), &tuple, &tcp, &self.queues.recv).map_err(failed)?;
        log::debug!("{tuple}: waits to be accepted again, with {} bytes to read", tcp.recv_len);
        fault::point("queue.put")?;
        Ok(Waiting { listener, tuple })
    }

    /// As [`put`](Self::put), for all, whatever becomes of one; the tasks run on, so that is only told.
    pub fn put_all(queued: Vec<Queued>, images: &ImageDir) -> Vec<Waiting> {
        let (mut putter, forge, count) = (Self::default(), Forge::new(), queued.len());
        let mut waiting = Vec::with_capacity(count);
        for queued in queued {
            let tuple = queued.accepted.tuple;
            match putter.put(queued, images, &forge) {
                Ok(put) => waiting.push(put),
                Err(error) => log::error!("{tuple}, which nobody had accepted, is lost: {}", chain(&error)),
            }
        }
        if let Err(error) = forge.finish() {
            log::error!("{}", chain(&error));
        }
        if count > 0 {
            log::info!("{} of {count} connections wait to be accepted again", waiting.len());
        }
        waiting
    }

    /// The connection, whose addresses nobody has afterwards.
    fn take(
        &mut self,
        source: Source,
        accepted: &Accepted,
        images: &ImageDir,
    ) -> Result<ControlBlock, AgentError> {
        match source {
            Source::Socket(socket) => {
                let paused = Paused::pause(socket)?;
                let tcp = paused.save(&mut self.queues);
                drop(paused.release());
                tcp.map_err(|source| AgentError::Queued { tuple: accepted.tuple, source })
            }
            Source::Image => {
                let Accepted { ino, state, .. } = *accepted;
                Ok(TcpStreamImage::read(images, ino, state, &mut self.queues)?.tcp)
            }
        }
    }
}
