//! Builds connections in the sockets that CRIU made for them.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use soccr::chain;
use soccr::connection::{ControlBlock, FourTuple, Queues, State};
use soccr::criu::image::index::InetConnection;
use soccr::criu::image::side::SocketExtra;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::tasks::{Owner, OwnerMap, Slot, Task};
use soccr::criu::warm::Warmth;
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::options::{self, When};
use soccr::kernel::tcp::Direction;
use soccr::kernel::warm::{Chosen, SetWindow};
use soccr::kernel::{SysError, addr, interface, sockopt, tcp};
use soccr::repair::{Paused, Probe};
use soccr::restore::{Opened, Opening, RestoreError};

use super::plan::Plan;
use super::preloaded::Preloaded;
use crate::agent::error::AgentError;
use crate::fault;

/// What CRIU has made a socket for.
#[derive(Clone, Copy, Debug)]
pub enum Made {
    /// A connection that is to be built in it, by its file id.
    Connection(u32),
    /// A listener, or a socket never connected, by its inode at the dump.
    Unconnected(u32),
}

/// A socket of a restored task, and what it is for.
pub type Wanted = (Made, OwnedFd);

/// A connection that is built, still in repair mode. Dropping it closes the agent's descriptor without a word to the peer.
#[derive(Debug)]
pub struct Built {
    /// Until [`Built::into_paused`] or the drop takes it.
    paused: Option<Paused<OwnedFd>>,
    pub tuple: FourTuple,
    pub reuse_port: Option<bool>,
    /// Whether its peer is to hear of it.
    pub probe: Probe,
}

impl Built {
    pub fn new(paused: Paused<OwnedFd>, tuple: FourTuple, reuse_port: Option<bool>, probe: Probe) -> Self {
        Self { paused: Some(paused), tuple, reuse_port, probe }
    }

    pub fn into_paused(mut self) -> Paused<OwnedFd> {
        self.paused.take().expect("nobody else takes it")
    }

    fn paused(&self) -> &Paused<OwnedFd> {
        self.paused.as_ref().expect("nobody takes it before")
    }
}

/// A connection that is built and waits for the others, in repair mode until all are there.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    pub slot: Slot,
    pub tuple: FourTuple,
    pub reuse_addr: bool,
    pub reuse_port: Option<bool>,
    pub probe: Probe,
}

impl Drop for Built {
    fn drop(&mut self) {
        drop(self.paused.take().map(Paused::release));
    }
}

/// What all connections of one task are built from. Many threads may use it.
#[derive(Debug)]
pub struct Builder<'a> {
    pub plan: &'a Plan,
    pub preloaded: &'a Preloaded,
    pub forge: &'a Forge,
    pub windows: &'a Windows,
    pub criu: &'a Task,
    pub pid: i32,
    pub owners: OwnerMap,
}

/// Gives connections the congestion windows that they had. Most have none to give, and then nothing is loaded.
#[derive(Debug)]
pub struct Windows {
    warmth: Warmth,
    set: OnceLock<Option<SetWindow>>,
}

impl Windows {
    pub fn new(warmth: Warmth) -> Self {
        Self { warmth, set: OnceLock::new() }
    }

    /// Until the answer is dropped the connection is to be made.
    fn choose<'r>(&'r self, ready: &'r Ready<'_>) -> Option<Chosen<'r>> {
        let Ready { image, extra, built, .. } = ready;
        let segments = extra.cwnd?.now(self.warmth, &image.tcp)?;
        let attach = || SetWindow::attach().map_err(Self::not_allowed).ok();
        let chosen = self.set.get_or_init(attach).as_ref()?.choose(built.paused().socket(), segments);
        chosen
            .inspect_err(|error| log::trace!("{}: the window of a new connection: {error}", built.tuple))
            .ok()
    }

    fn not_allowed(error: SysError) {
        log::info!("the congestion windows are those of new connections: {error}");
    }
}

/// A connection whose task's socket is ready for it.
#[derive(Debug)]
pub enum Begun<'a> {
    Built(Built),
    /// Has ECN, and its SYN is under way: [`Builder::build_opened`] does the rest.
    Opened(Box<Ready<'a>>, Opening),
}

/// A connection, and its socket in repair mode.
#[derive(Debug)]
pub struct Ready<'a> {
    connection: &'a InetConnection,
    image: TcpStreamImage,
    extra: SocketExtra,
    built: Built,
}

impl<'a> Builder<'a> {
    /// Builds one connection, or opens it; `None` where CRIU has restored it itself, and for a socket without a peer, which
    /// gets what CRIU has not given it. The queues' memory is used again and again.
    pub fn build(
        &self,
        (made, socket): Wanted,
        queues: &mut Queues,
    ) -> Result<Option<Begun<'a>>, AgentError> {
        match made {
            Made::Connection(file_id) => self
                .plan
                .index
                .connections
                .get(&file_id)
                .map_or(Ok(None), |connection| self.build_connection(connection, socket, queues)),
            Made::Unconnected(inode) => self.complete(inode, &socket).map(|()| None),
        }
    }

    fn complete(&self, inode: u32, socket: &OwnedFd) -> Result<(), AgentError> {
        let Some(extra) = self.plan.sockets.get(inode)? else { return Ok(()) };
        let failed = |source| AgentError::Task { pid: self.pid, source };
        let who =
            || addr::local(socket.as_fd()).map_or_else(|_| "a socket".into(), |local| local.to_string());
        self.write_all(socket.as_fd(), &extra, &who).map_err(failed)
    }

    /// Gives a socket that is as it shall be otherwise all its extras.
    fn write_all(
        &self,
        socket: BorrowedFd<'_>,
        extra: &SocketExtra,
        who: &dyn Fn() -> String,
    ) -> Result<(), SysError> {
        [When::Early, When::Late].into_iter().try_for_each(|when| self.write(socket, extra, when, who))
    }

    /// Gives a socket those extras that it gets at this time.
    fn write(
        &self,
        socket: BorrowedFd<'_>,
        extra: &SocketExtra,
        when: When,
        who: &dyn Fn() -> String,
    ) -> Result<(), SysError> {
        let lost = |error| log::warn!("{} (pid {}): {error}: it goes on with the default", who(), self.pid);
        options::write(socket, &extra.options, when, lost)?;
        if let Some(owner) = self.owners.outside(extra.owner).filter(|_| when == When::Early) {
            let changed = if extra.owner == Owner::default() { Ok(()) } else { give(socket, owner) };
            changed.unwrap_or_else(lost);
        }
        Ok(())
    }

    /// What CRIU makes of a connection is not all that was there: it does not know of the extras, computes the segment size
    /// before it knows the peer's, and leaves SO_REUSEPORT on.
    fn put_right(
        &self,
        connection: &InetConnection,
        socket: &OwnedFd,
        tuple: FourTuple,
    ) -> Result<(), AgentError> {
        let (socket, pid) = (socket.as_fd(), self.pid);
        let failed = |source| AgentError::Socket { tuple, pid, source };
        sockopt::set_reuse_port(socket, connection.reuseport.unwrap_or(false)).map_err(failed)?;
        tcp::sync_segment_size(socket).map_err(failed)?;
        let extra = self.plan.sockets.get(connection.ino)?.unwrap_or_default();
        self.write_all(socket, &extra, &|| tuple.to_string()).map_err(failed)
    }

    fn build_connection(
        &self,
        connection: &'a InetConnection,
        socket: OwnedFd,
        queues: &mut Queues,
    ) -> Result<Option<Begun<'a>>, AgentError> {
        let pid = self.pid;
        let tuple = scoped(connection, &socket, pid)?;
        let failed = |source| AgentError::Socket { tuple, pid, source };
        if !sockopt::is_tcp(socket.as_fd()) {
            return Ok(None);
        }
        if !untouched(&socket).map_err(failed)? {
            log::trace!("{tuple}: restored by CRIU itself");
            if let Err(error) = self.put_right(connection, &socket, tuple) {
                log::warn!("what CRIU does not carry is lost: {}", chain(&error));
            }
            return Ok(None);
        }
        let (image, queues) = self.load(connection, queues)?;
        let extra = self.plan.sockets.get(connection.ino)?.unwrap_or_default();
        // CRIU has shut the socket down, which this forgets.
        fault::point("restore.copied")?;
        must_live(self.criu)?;
        tcp::disconnect(socket.as_fd()).map_err(failed)?;
        fault::point("restore.disconnected")?;
        self.write(socket.as_fd(), &extra, When::Early, &|| tuple.to_string()).map_err(failed)?;
        let mut paused = Paused::pause_only(socket)?;
        paused.set_reuse_addr(connection.reuseaddr);
        let built = {
            let reuse_port = connection.reuseport.or(Some(false));
            Built::new(paused, tuple, reuse_port, probe_for(&image.tcp))
        };
        let ready = Ready { connection, image, extra, built };
        let rtt = ready.extra.rtt.unwrap_or_default();
        let opening = ready.built.paused().open(&tuple, &ready.image.tcp, rtt, self.forge);
        if let Some(opening) = opening.map_err(|source| in_image(connection, source))? {
            fault::point("restore.syn-sent")?;
            return Ok(Some(Begun::Opened(Box::new(ready), opening)));
        }
        self.finish(ready, None, queues).map(|built| Some(Begun::Built(built)))
    }

    /// Builds one that is open.
    pub fn build_opened(
        &self,
        ready: Ready<'_>,
        opening: Opening,
        queues: &mut Queues,
    ) -> Result<Built, AgentError> {
        let (_, queues) = self.load(ready.connection, queues)?;
        let opened = {
            let _window = self.windows.choose(&ready);
            let Ready { image, built, .. } = &ready;
            built.paused().answer(opening, &built.tuple, &image.tcp, self.forge)
        };
        fault::point("restore.syn-acked")?;
        self.finish(ready, Some(opened), queues)
    }

    /// The connection's image and queues.
    fn load<'q>(
        &'q self,
        connection: &InetConnection,
        queues: &'q mut Queues,
    ) -> Result<(TcpStreamImage, &'q Queues), AgentError> {
        let &InetConnection { file_id, ino, state, .. } = connection;
        if let Some((image, queues)) = self.preloaded.get(file_id) {
            return Ok((*image, queues));
        }
        let image = TcpStreamImage::read(&self.plan.images, ino, state, queues)?;
        Ok((image, queues))
    }

    fn finish(&self, ready: Ready<'_>, opened: Option<Opened>, queues: &Queues) -> Result<Built, AgentError> {
        let (tuple, pid) = (ready.built.tuple, self.pid);
        let failed = |source| AgentError::Socket { tuple, pid, source };
        let restored = {
            let _window = self.windows.choose(&ready);
            let (paused, tcp, Queues { recv, send }) = (ready.built.paused(), &ready.image.tcp, queues);
            match opened {
                None => paused.restore(&tuple, tcp, recv, send, self.forge),
                Some(opened) => paused.restore_opened(opened, &tuple, tcp, recv, send, self.forge),
            }
        };
        let Ready { connection, image, extra, built } = ready;
        let paused = built.paused();
        let socket = paused.socket();
        match restored {
            // It has nothing to give or to take, and needs no address that is another's now, or nobody's.
            Err(error) if image.tcp.state == State::Close && image.tcp.recv_len == 0 => {
                log::info!("{tuple} stays closed, without its addresses: {}", chain(&error));
                return shut_down(built).map_err(failed);
            }
            other => other.map_err(|source| in_image(connection, source))?,
        }
        if extra.usec_ts {
            paused.trust_clock(&image.tcp).map_err(failed)?;
        }
        self.write(socket, &extra, When::Late, &|| tuple.to_string()).map_err(failed)?;
        if connection.shutdown_read && !image.tcp.state.fin_received() {
            tcp::shutdown(socket, Direction::Receive).map_err(failed)?;
        }
        if image.nodelay == Some(true) {
            sockopt::set_no_delay(socket, true).map_err(failed)?;
        }
        if image.cork == Some(true) {
            sockopt::set_cork(socket, true).map_err(failed)?;
        }
        log::trace!("{tuple} (pid {pid}): {} again", image.tcp.state);
        fault::point("restore.built")?;
        Ok(built)
    }
}

/// A window probe, and the peer's answer to it, moves what waits for a window. Nothing does where both queues are empty and
/// the peer may send a whole segment; in other states than ESTABLISHED the kernel sends none.
fn probe_for(tcp: &ControlBlock) -> Probe {
    let open = tcp.window.is_some_and(|window| window.rcv_wnd >= tcp.negotiated.mss_clamp);
    let idle = tcp.recv_len == 0 && tcp.send_len == 0 && open;
    if idle || tcp.state != State::Established { Probe::None } else { Probe::Send }
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

/// Makes a socket somebody's.
fn give(socket: BorrowedFd<'_>, Owner { uid, gid }: Owner) -> Result<(), SysError> {
    nix::unistd::fchown(socket, Some(uid.into()), Some(gid.into()))
        .map_err(|errno| SysError { call: "give a socket to its owner", errno })
}

/// The kernel lets the tasks run as soon as criu is dead, whole or not.
pub fn must_live(criu: &Task) -> Result<(), AgentError> {
    if criu.gone() { Err(AgentError::Protocol("criu is gone")) } else { Ok(()) }
}

/// Whether it is a TCP socket as CRIU makes it with `--tcp-close`: closed and never bound. (A connection that CRIU itself
/// restored in the state CLOSE has an address.)
fn untouched(socket: &OwnedFd) -> Result<bool, SysError> {
    let closed = tcp::info(socket.as_fd()).is_ok_and(|info| info.state == State::Close as u8);
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
            .run(|| interface::index(name))?
            .map_err(|source| AgentError::Socket { tuple: connection.tuple, pid, source })?;
        local.set_scope_id(index);
        remote.set_scope_id(index);
    }
    Ok(tuple)
}
