//! Repair mode (`TCP_REPAIR`, Linux 3.5), as a guard.
//!
//! In repair mode the kernel shows and takes what a program never sees: both sequences, the windows, and the bytes
//! of both queues; and it sends nothing.
//!
//! Entering it makes the kernel set SO_REUSEADDR to 2 and leaving it clears the option, so [`Paused`] puts the
//! program's value back. Repair mode belongs to the socket, not to the descriptor or the process that set it: a
//! program that runs on with its socket in repair mode gets EPERM and EINVAL from its calls. So [`Paused`] is a guard,
//! and what the last guard leaves is decided by [`Paused::resume`] (the program goes on) or [`Paused::release`] (the
//! socket is about to be closed, which in repair mode sends neither FIN nor RST).

use std::cell::Cell;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};

use crate::four_tuple::FourTuple;
use crate::kernel::tcp::Repair;
use crate::kernel::{SysError, addr, sockopt, tcp};

/// A socket in repair mode, borrowed or owned. Dropping it leaves repair mode as [`Paused::resume`] would, without
/// a probe and without a report.
#[derive(Debug)]
pub struct Paused<F: AsFd> {
    /// Present until `resume` or `release` take it.
    fd: Option<F>,
    reuse_addr: bool,
    /// Bytes by which a save has moved the program's SO_PEEK_OFF, if it has one.
    peeked: Cell<usize>,
}

const OWN: &str = "the socket is taken only together with the guard";

/// Whether the end of repair mode tells the peer that we are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Send a window probe (in ESTABLISHED): the peer answers with its window, and a flow that waits goes on.
    Send,
    /// Send nothing.
    None,
}

impl<F: AsFd> Paused<F> {
    /// Puts a socket into repair mode.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN in the user namespace of the socket's network namespace, or for a
    /// listening socket; ENOPROTOOPT or EOPNOTSUPP for what is not a TCP socket.
    pub fn pause(fd: F) -> Result<Self, PauseError> {
        Self::try_pause(fd).map_err(|(_, error)| error)
    }

    /// As [`Paused::pause`]; a failure gives the socket back.
    pub(crate) fn try_pause(fd: F) -> Result<Self, (F, PauseError)> {
        let socket = fd.as_fd();
        // SO_REUSEADDR reads 2 when somebody left the socket in repair mode: the program's own value is
        // lost then, and 0 is what the kernel would make of it.
        let paused = sockopt::reuse_addr(socket)
            .and_then(|reuse_addr| tcp::set_repair(socket, Repair::On).map(|()| reuse_addr == 1))
            .map_err(|source| PauseError { who: Who::of(socket), source });
        match paused {
            Ok(reuse_addr) => Ok(Self { fd: Some(fd), reuse_addr, peeked: Cell::new(0) }),
            Err(error) => Err((fd, error)),
        }
    }

    /// As [`Paused::pause`], for a caller who sees to SO_REUSEADDR itself: it is off after [`Paused::resume`].
    ///
    /// # Errors
    /// As [`Paused::pause`].
    pub fn pause_only(fd: F) -> Result<Self, PauseError> {
        let socket = fd.as_fd();
        tcp::set_repair(socket, Repair::On).map_err(|source| PauseError { who: Who::of(socket), source })?;
        Ok(Self { fd: Some(fd), reuse_addr: false, peeked: Cell::new(0) })
    }

    /// Both ends' addresses.
    ///
    /// # Errors
    /// ENOTCONN for a socket that never was connected.
    pub fn four_tuple(&self) -> Result<FourTuple, SysError> {
        four_tuple(self.socket())
    }

    /// What SO_REUSEADDR will be after [`Paused::resume`].
    #[must_use]
    pub fn reuse_addr(&self) -> bool {
        self.reuse_addr
    }

    /// What SO_REUSEADDR will be after [`Paused::resume`]; a restored socket gets the saved value here.
    pub fn set_reuse_addr(&mut self, on: bool) {
        self.reuse_addr = on;
    }

    /// Leaves repair mode; the program can use its socket again. Returns the socket.
    ///
    /// # Errors
    /// The kernel's answer; the guard has no further effect then.
    pub fn resume(self, probe: Probe) -> Result<F, PauseError> {
        let (socket, result) = self.give_back(probe);
        result.map(|()| socket)
    }

    /// As [`Paused::resume`]; a failure gives the socket back, too.
    pub(crate) fn give_back(mut self, probe: Probe) -> (F, Result<(), PauseError>) {
        let mode = match probe {
            Probe::Send => Repair::Off,
            Probe::None => Repair::OffNoProbe,
        };
        let result = self.leave(mode).map_err(|source| PauseError { who: Who::of(self.socket()), source });
        (self.take(), result)
    }

    /// Forgets the guard and leaves the socket in repair mode, to be closed silently.
    pub fn release(mut self) -> F {
        self.take()
    }

    /// The socket.
    #[must_use]
    #[allow(clippy::missing_panics_doc)] // only the calls that consume the guard take the socket out of it
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.fd.as_ref().expect(OWN).as_fd()
    }

    /// Where a save leaves by how much it has moved the program's SO_PEEK_OFF.
    pub(crate) fn peeked(&self) -> &Cell<usize> {
        &self.peeked
    }

    fn take(&mut self) -> F {
        self.fd.take().expect(OWN)
    }

    fn leave(&self, mode: Repair) -> Result<(), SysError> {
        let socket = self.socket();
        let peek_offset = peek_back(socket, self.peeked.take());
        leave(socket, mode, self.reuse_addr)?;
        peek_offset
    }
}

/// Sends the window probe that the end of repair mode can send, from a socket that left it silently before: the call
/// that ends repair mode sends one whether or not the mode is on. It clears SO_REUSEADDR too, so that is put back.
///
/// # Errors
/// EPERM without CAP_NET_ADMIN in the user namespace of the socket's network namespace.
pub fn probe(socket: BorrowedFd<'_>, reuse_addr: bool) -> Result<(), PauseError> {
    leave(socket, Repair::Off, reuse_addr).map_err(|source| PauseError { who: Who::of(socket), source })
}

/// Ends the connection of a socket in repair mode, and repair mode, without a word to the peer. The program, which may go
/// on, finds the end of its stream there.
///
/// # Errors
/// The kernel's answer.
pub fn end(socket: BorrowedFd<'_>) -> Result<(), PauseError> {
    let who = Who::of(socket);
    let ended = tcp::disconnect(socket).and_then(|()| tcp::set_repair(socket, Repair::OffNoProbe));
    ended.map_err(|source| PauseError { who, source })?;
    // The disconnect left ECONNABORTED for the program. Reading it takes it away.
    let _ = sockopt::get_into(socket, libc::SOL_SOCKET, libc::SO_ERROR, &mut [0; 4]);
    // Says ENOTCONN, and yet marks both directions as shut.
    for direction in [tcp::Direction::Receive, tcp::Direction::Send] {
        let _ = tcp::shutdown(socket, direction);
    }
    Ok(())
}

/// Ends silently the repair mode of a socket whose guard was [released](Paused::release).
///
/// # Errors
/// The kernel's answer.
pub fn resume(socket: BorrowedFd<'_>, reuse_addr: bool) -> Result<(), PauseError> {
    let who = |source| PauseError { who: Who::of(socket), source };
    leave(socket, Repair::OffNoProbe, reuse_addr).map_err(who)
}

fn leave(socket: BorrowedFd<'_>, mode: Repair, reuse_addr: bool) -> Result<(), SysError> {
    tcp::set_repair(socket, mode)?;
    if reuse_addr { sockopt::set_reuse_addr(socket, true) } else { Ok(()) }
}

/// Takes back by how much a peek of ours has moved the program's SO_PEEK_OFF.
fn peek_back(socket: BorrowedFd<'_>, bytes: usize) -> Result<(), SysError> {
    if bytes == 0 {
        return Ok(());
    }
    let moved = i32::try_from(bytes).unwrap_or(i32::MAX);
    match peek_offset(socket) {
        Some(offset) => sockopt::set_peek_offset(socket, offset.saturating_sub(moved).max(0)),
        None => Ok(()),
    }
}

/// The program's own SO_PEEK_OFF, if it has one; TCP knows it since Linux 6.9.
pub(crate) fn peek_offset(socket: BorrowedFd<'_>) -> Option<i32> {
    sockopt::peek_offset(socket).ok().filter(|offset| *offset >= 0)
}

impl<F: AsFd> Drop for Paused<F> {
    fn drop(&mut self) {
        if self.fd.is_none() {
            return;
        }
        if let Err(error) = self.leave(Repair::OffNoProbe) {
            log::error!("{}: {}", Who::of(self.socket()), crate::chain(&error));
        }
    }
}

/// Both ends' addresses of any connected (or once connected) socket.
///
/// # Errors
/// ENOTCONN for a socket that never was connected.
pub fn four_tuple(fd: BorrowedFd<'_>) -> Result<FourTuple, SysError> {
    Ok(FourTuple { remote: addr::remote(fd)?, local: addr::local(fd)? })
}

/// The connection that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A connection.
    Connection(FourTuple),
    /// A socket without a peer.
    Unconnected,
}

impl Who {
    /// What the socket is connected to, if anything.
    #[must_use]
    pub fn of(fd: BorrowedFd<'_>) -> Self {
        four_tuple(fd).map_or(Self::Unconnected, Self::Connection)
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connection(tuple) => tuple.fmt(f),
            Self::Unconnected => f.write_str("socket without a peer"),
        }
    }
}

/// Repair mode could not be entered or left.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("cannot enter or leave repair mode on {who}")]
pub struct PauseError {
    /// The connection.
    pub who: Who,
    /// The call that failed.
    pub source: SysError,
}
