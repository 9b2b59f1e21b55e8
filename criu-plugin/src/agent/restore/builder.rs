//! Builds connections in the sockets that CRIU made for them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use soccr::chain;
use soccr::connection::{FourTuple, Queues, State};
use soccr::criu::image::ImageDir;
use soccr::criu::image::index::{Index, InetConnection};
use soccr::criu::image::side::Kept;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::tasks::Task;
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::tcp::Direction;
use soccr::kernel::{SysError, addr, sockopt, tcp};
use soccr::repair::Paused;
use soccr::restore::{Opening, RestoreError, RoomForQueues};

use crate::agent::error::AgentError;
use crate::fault;

/// The file id of a connection, and the socket of a restored task in which it is to be built.
pub type Wanted = (u32, OwnedFd);

/// A connection that is built, still in repair mode, and waits for the others. Dropping it closes the agent's
/// descriptor without a word to the peer.
#[derive(Debug)]
pub struct Built {
    /// Until [`Built::into_paused`] or the drop takes it.
    paused: Option<Paused<OwnedFd>>,
    pub tuple: FourTuple,
    pub reuse_port: Option<bool>,
}

impl Built {
    pub fn new(paused: Paused<OwnedFd>, tuple: FourTuple, reuse_port: Option<bool>) -> Self {
        Self { paused: Some(paused), tuple, reuse_port }
    }

    pub fn into_paused(mut self) -> Paused<OwnedFd> {
        self.paused.take().expect("nobody else takes it")
    }

    fn paused(&self) -> &Paused<OwnedFd> {
        self.paused.as_ref().expect("nobody takes it before")
    }
}

impl Drop for Built {
    fn drop(&mut self) {
        drop(self.paused.take().map(Paused::release));
    }
}

/// What all connections of one task are built from. Many threads may use it.
#[derive(Debug)]
pub struct Builder<'a> {
    pub images: &'a ImageDir,
    pub index: &'a Index,
    pub forge: &'a Forge,
    /// What else is known of some connections, by the inode numbers of their images.
    pub kept: &'a HashMap<u32, Kept>,
    pub criu: &'a Task,
    pub pid: i32,
}

/// A connection in a socket that is its alone by now, in repair mode; or with its SYN under way.
#[derive(Debug)]
pub struct Begun<'a> {
    connection: &'a InetConnection,
    image: TcpStreamImage,
    built: Built,
    opening: Option<Opening>,
}

impl<'a> Builder<'a> {
    /// Whether the connection has to be opened ahead of the others, since the answer to its SYN is to come late.
    pub fn is_far(&self, file_id: u32) -> bool {
        self.round_trip(file_id).is_some()
    }

    fn round_trip(&self, file_id: u32) -> Option<Duration> {
        // Most restores have none, and look no connection up twice.
        if self.kept.is_empty() {
            return None;
        }
        self.kept.get(&self.index.connections.get(&file_id)?.ino)?.rtt
    }

    /// Builds one connection; `None` where CRIU has restored it itself. The queues' memory is used again and again.
    pub fn build(&self, wanted: Wanted, queues: &mut Queues) -> Result<Option<Built>, AgentError> {
        let Some(begun) = self.begin(wanted, queues)? else { return Ok(None) };
        self.finish(begun, queues).map(Some)
    }

    /// Opens one that is far, and does not wait for the answer.
    pub fn open(&self, wanted: Wanted, queues: &mut Queues) -> Result<Option<Begun<'a>>, AgentError> {
        let rtt = self.round_trip(wanted.0).unwrap_or_default();
        let Some(mut begun) = self.begin(wanted, queues)? else { return Ok(None) };
        let Begun { connection, image, built, .. } = &begun;
        let opening = built.paused().open(&built.tuple, &image.tcp, rtt, self.forge);
        begun.opening = opening.map_err(|source| in_image(connection, source))?;
        Ok(Some(begun))
    }

    /// Builds one that is open.
    pub fn build_opened(&self, begun: Begun<'_>, queues: &mut Queues) -> Result<Built, AgentError> {
        TcpStreamImage::read(self.images, begun.connection.ino, begun.connection.state, queues)?;
        self.finish(begun, queues)
    }

    fn begin(&self, (file_id, socket): Wanted, queues: &mut Queues) -> Result<Option<Begun<'a>>, AgentError> {
        let Some(connection) = self.index.connections.get(&file_id) else { return Ok(None) };
        let pid = self.pid;
        let tuple = scoped(connection, &socket, pid)?;
        let failed = |source| AgentError::Socket { tuple, pid, source };
        if !sockopt::is_tcp(socket.as_fd()) || !untouched(&socket).map_err(failed)? {
            log::debug!("{tuple}: restored by CRIU itself");
            return Ok(None);
        }
        let image = TcpStreamImage::read(self.images, connection.ino, connection.state, queues)?;
        // CRIU has shut the socket down, which this forgets.
        fault::point("restore.copied")?;
        must_live(self.criu)?;
        tcp::disconnect(socket.as_fd()).map_err(failed)?;
        fault::point("restore.disconnected")?;
        let mut paused = Paused::pause(socket)?;
        paused.set_reuse_addr(connection.reuseaddr);
        let built = Built::new(paused, tuple, connection.reuseport.or(Some(false)));
        Ok(Some(Begun { connection, image, built, opening: None }))
    }

    fn finish(&self, begun: Begun<'_>, queues: &Queues) -> Result<Built, AgentError> {
        let Begun { connection, image, built, opening } = begun;
        let (tuple, pid) = (built.tuple, self.pid);
        let failed = |source| AgentError::Socket { tuple, pid, source };
        let socket = built.paused().socket();
        let room = RoomForQueues::make(socket, &image.tcp).map_err(failed)?;
        let Queues { recv, send } = queues;
        let restored = match opening {
            None => built.paused().restore(&tuple, &image.tcp, recv, send, self.forge),
            Some(it) => built.paused().restore_opened(it, &tuple, &image.tcp, recv, send, self.forge),
        };
        match restored {
            // It has nothing to give or to take, and needs no address that is another's now, or nobody's.
            Err(error) if image.tcp.state == State::Close && image.tcp.recv_len == 0 => {
                log::info!("{tuple} stays closed, without its addresses: {}", chain(&error));
                return shut_down(built).map_err(failed);
            }
            other => other.map_err(|source| in_image(connection, source))?,
        }
        if let Some(room) = room {
            room.give_back().map_err(failed)?;
        }
        if self.kept.get(&connection.ino).is_some_and(|kept| kept.usec_ts) {
            built.paused().trust_clock(&image.tcp).map_err(failed)?;
        }
        if connection.shutdown_read && !image.tcp.state.fin_received() {
            tcp::shutdown(socket, Direction::Receive).map_err(failed)?;
        }
        if image.nodelay == Some(true) {
            sockopt::set_no_delay(socket, true).map_err(failed)?;
        }
        if image.cork == Some(true) {
            sockopt::set_cork(socket, true).map_err(failed)?;
        }
        log::debug!("{tuple} (pid {pid}): {} again", image.tcp.state);
        fault::point("restore.built")?;
        Ok(built)
    }
}

fn in_image(connection: &InetConnection, source: RestoreError) -> AgentError {
    AgentError::Restore { file: TcpStreamImage::name(connection.ino), source }
}

/// As CRIU makes a closed one.
fn shut_down(built: Built) -> Result<Built, SysError> {
    let socket = built.paused().socket();
    sockopt::clear_error(socket)?;
    for direction in [Direction::Send, Direction::Receive] {
        match tcp::shutdown(socket, direction) {
            // Where nothing is connected it says so, and notes it all the same.
            Ok(()) | Err(SysError { errno: Errno::ENOTCONN, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(built)
}

/// The kernel lets the tasks run as soon as criu is dead, whole or not.
pub fn must_live(criu: &Task) -> Result<(), AgentError> {
    if criu.gone() { Err(AgentError::Protocol("criu is gone")) } else { Ok(()) }
}

/// Whether the socket is as CRIU makes it with `--tcp-close`: closed and never bound. (A connection that CRIU itself
/// restored in the state CLOSE has an address.)
fn untouched(socket: &OwnedFd) -> Result<bool, SysError> {
    let closed = tcp::info(socket.as_fd())?.state == State::Close as u8;
    Ok(closed && addr::local(socket.as_fd())?.port() == 0)
}

/// The connection's addresses; a link-local one gets the index that its interface has here.
fn scoped(connection: &InetConnection, socket: &OwnedFd, pid: i32) -> Result<FourTuple, AgentError> {
    let mut tuple = connection.tuple;
    let device = connection.ifname.as_ref().or(connection.bound_device.as_ref());
    if let (Some(name), SocketAddr::V6(local), SocketAddr::V6(remote)) =
        (device, &mut tuple.local, &mut tuple.remote)
        && local.ip().is_unicast_link_local()
    {
        let index = NetNs::of_socket(socket.as_fd())?
            .run(|| addr::interface_index(name))?
            .map_err(|source| AgentError::Socket { tuple: connection.tuple, pid, source })?;
        local.set_scope_id(index);
        remote.set_scope_id(index);
    }
    Ok(tuple)
}
