//! Connections that nobody had accepted, on their way back into the accept queues of their listeners.

use std::collections::HashMap;
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use soccr::accept_queue::{self, AcceptQueues};
use soccr::chain;
use soccr::checkpoint::SaveError;
use soccr::connection::{ControlBlock, FourTuple, Queues};
use soccr::criu::image::ImageDir;
use soccr::criu::image::side::Accepted;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::rules::Action;
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::{SysError, sockopt, tcp};
use soccr::lock::MARK;
use soccr::repair::{Paused, Probe, Who};

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
    /// On its way back.
    Closed,
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

    /// As [`save`](Self::save); what cannot be carried is to be reset when the tasks are dead.
    pub fn save_or_reset(&mut self, images: &ImageDir, queues: &mut Queues) {
        if let Err(error) = self.save(images, queues) {
            log::error!("{}: it is reset", chain(&error));
            self.action = Action::Reset;
        }
    }

    /// Its peer hears that it is over: out of repair mode, in which it would not.
    pub fn reset(self) {
        let (Source::Socket(socket), tuple) = (self.source, self.accepted.tuple) else { return };
        match Paused::pause(socket).and_then(|paused| paused.resume(Probe::None)) {
            Ok(socket) => reset(socket.as_fd(), tuple),
            Err(error) => log::error!("{tuple}: its peer does not hear that it is closed: {}", chain(&error)),
        }
    }
}

/// What would be a FIN, or nothing, at the end of a socket is a RST.
pub fn reset(socket: BorrowedFd<'_>, tuple: FourTuple) {
    // The mark brings it past CRIU's lock of a whole namespace, too.
    let reset = sockopt::set_mark(socket, MARK).and_then(|()| tcp::disconnect(socket));
    if let Err(error) = reset {
        log::error!("{tuple}: its peer does not hear that it is closed: {error}");
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
    /// Puts one back. Its namespace is locked for it. What does not fit stays in its socket.
    pub fn put(
        &mut self,
        queued: &mut Queued,
        images: &ImageDir,
        forge: &Forge,
    ) -> Result<Waiting, AgentError> {
        let tuple = queued.accepted.tuple;
        let failed = |source| AgentError::AcceptQueue { tuple, source };
        if !self.ways.contains_key(&queued.ns) {
            let way = AcceptQueues::open(&queued.ns)
                .map_err(|source| AgentError::NoAcceptQueue { tuple, source })?;
            self.ways.insert(queued.ns.clone(), way);
        }
        let (tcp, urgent) = self.read(queued, images)?;
        if let Some(why) = accept_queue::unfit(&tuple, &tcp) {
            return Err(AgentError::Unfit { tuple, why });
        }
        queued.source = Source::Closed; // nobody else may have its addresses
        fault::point("queue.closed")?;
        let listener = Rc::clone(&queued.listener);
        self.ways[&queued.ns]
            .put(forge, listener.as_fd(), &tuple, &tcp, &self.queues.recv, urgent)
            .map_err(failed)?;
        log::debug!("{tuple}: waits to be accepted again, with {} bytes to read", tcp.recv_len);
        fault::point("queue.put")?;
        Ok(Waiting { listener, tuple })
    }

    /// As [`put`](Self::put), for all, whatever becomes of one; the tasks run on, so that is only told. Also gives what stayed
    /// in its socket.
    pub fn put_all(queued: Vec<Queued>, images: &ImageDir) -> (Vec<Waiting>, Vec<Queued>) {
        let (mut putter, forge, count) = (Self::default(), Forge::new(), queued.len());
        let (mut waiting, mut unfit) = (Vec::with_capacity(count), Vec::new());
        for mut queued in queued {
            match putter.put(&mut queued, images, &forge) {
                Ok(put) => waiting.push(put),
                Err(error) => {
                    let tuple = queued.accepted.tuple;
                    log::error!("{tuple}, which nobody had accepted, is lost: {}", chain(&error));
                    unfit.push(queued);
                }
            }
        }
        if let Err(error) = forge.finish() {
            log::error!("{}", chain(&error));
        }
        if count > 0 {
            log::info!("{} of {count} connections wait to be accepted again", waiting.len());
        }
        (waiting, unfit)
    }

    /// The connection, and which of its bytes is urgent.
    fn read(
        &mut self,
        queued: &Queued,
        images: &ImageDir,
    ) -> Result<(ControlBlock, Option<usize>), AgentError> {
        let Accepted { tuple, ino, state, .. } = queued.accepted;
        let failed = |source| AgentError::Queued { tuple, source };
        let tcp = match &queued.source {
            Source::Socket(socket) => {
                let paused = Paused::pause(socket.as_fd())?;
                match paused.save(&mut self.queues) {
                    Err(SaveError::Urgent { .. }) => {
                        let (tcp, urgent) = self.read_out(paused).map_err(failed)?;
                        return Ok((tcp, Some(urgent)));
                    }
                    saved => {
                        paused.release();
                        saved.map_err(failed)?
                    }
                }
            }
            Source::Image => TcpStreamImage::read(images, ino, state, &mut self.queues)?.tcp,
            Source::Closed => return Err(AgentError::Protocol("a connection goes back into its queue once")),
        };
        Ok((tcp, None))
    }

    /// A peek ends at urgent data. But nobody else will read from this socket: its bytes are taken out of it.
    fn read_out(&mut self, paused: Paused<BorrowedFd<'_>>) -> Result<(ControlBlock, usize), SaveError> {
        let who = Who::of(paused.socket());
        let failed = |source: SysError| SaveError::ReceiveQueue { who, source: source.into() };
        let socket = paused.resume(Probe::None).map_err(|error| failed(error.source))?;
        sockopt::set_oob_inline(socket, false).map_err(failed)?;
        let urgent = tcp::receive_queue_len(socket).map_err(failed)?; // as far as there
        sockopt::set_oob_inline(socket, true).map_err(failed)?;
        let mut bytes = Vec::new();
        let read = socket.try_clone_to_owned().map(TcpStream::from).and_then(|mut stream| {
            stream.set_nonblocking(true)?;
            stream.read_to_end(&mut bytes)
        });
        if let Err(error) = read
            && error.kind() != ErrorKind::WouldBlock
        {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
            return Err(failed(SysError { call: "read", errno }));
        }
        let paused = Paused::pause(socket).map_err(|error| failed(error.source))?;
        let tcp = paused.save(&mut self.queues);
        paused.release();
        let recv_len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.queues.recv = bytes;
        Ok((ControlBlock { recv_len, ..tcp? }, urgent as usize))
    }
}
