//! How the hooks in criu's process talk to the agent.
//!
//! One packet socket carries the requests. Each brings a socket of its own for the answer: log lines as they come,
//! then the result. So several processes can ask at once, and an agent that dies shows as the end of the answer.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::unistd::Pid;
use soccr::criu::tasks::Fate;

use soccr::kernel::process::received_fds;

use crate::host;

/// What a hook asks of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// CHECKPOINT_DEVICES: save the connections of this frozen task, and of the whole tree when it is the first.
    Checkpoint(i32),
    /// DUMP_EXT_FILE: save the connection behind the descriptor that comes along, under this id.
    DumpFile(i32),
    /// exit() of a dump, with CRIU's result so far.
    DumpEnd(i32),
    /// The criu process ends: answer when the connections are where they belong.
    Settle,
    /// init() of a restore: lock what the images hold.
    Prepare,
    /// POST_FORKING: the namespaces are there, lock in them too.
    Forked,
    /// RESUME_DEVICES_LATE: bring back the connections of this task.
    Resume(i32),
    /// exit() of a restore, with CRIU's result.
    RestoreEnd(i32),
    /// An agent died: undo what it has left.
    Clean,
}

const PACKET: usize = 5;

impl Request {
    fn encode(self) -> [u8; PACKET] {
        let (kind, argument) = match self {
            Self::Checkpoint(pid) => (1, pid),
            Self::DumpFile(id) => (2, id),
            Self::DumpEnd(ret) => (3, ret),
            Self::Settle => (4, 0),
            Self::Prepare => (5, 0),
            Self::Forked => (6, 0),
            Self::Resume(pid) => (7, pid),
            Self::RestoreEnd(ret) => (8, ret),
            Self::Clean => (9, 0),
        };
        let [a, b, c, d] = argument.to_le_bytes();
        [kind, a, b, c, d]
    }

    fn decode(packet: [u8; PACKET]) -> Option<Self> {
        let [kind, a, b, c, d] = packet;
        let argument = i32::from_le_bytes([a, b, c, d]);
        Some(match kind {
            1 => Self::Checkpoint(argument),
            2 => Self::DumpFile(argument),
            3 => Self::DumpEnd(argument),
            4 => Self::Settle,
            5 => Self::Prepare,
            6 => Self::Forked,
            7 => Self::Resume(argument),
            8 => Self::RestoreEnd(argument),
            9 => Self::Clean,
            _ => return None,
        })
    }
}

/// The agent did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It said why, in its log lines.
    #[error("the agent refused")]
    Refused,
    /// It is not there any more.
    #[error("the agent is gone")]
    Gone {
        /// Whether it had said before that there is no way back.
        committed: bool,
    },
    /// It could not be asked.
    #[error("cannot talk to the agent: {0}")]
    Io(#[from] Errno),
}

/// How long an agent may be stopped. Tests are in a hurry.
const PATIENCE: Duration = Duration::from_secs(if cfg!(feature = "fault-injection") { 1 } else { 3 });

/// The hooks' end.
#[derive(Debug)]
pub struct Client {
    control: OwnedFd,
    agent: Pid,
}

/// The agent's end.
#[derive(Debug)]
pub struct Server(OwnedFd);

/// The hooks' end of a channel whose other end nobody serves yet.
#[derive(Debug)]
pub struct Unserved(OwnedFd);

/// A connected client and server.
///
/// # Errors
/// The kernel's answer.
pub fn pair() -> Result<(Unserved, Server), Errno> {
    let (ours, theirs) = socket_pair()?;
    Ok((Unserved(ours), Server(theirs)))
}

impl Unserved {
    /// Waits for the agent's pid.
    ///
    /// # Errors
    /// ECONNRESET when nobody can tell it any more.
    pub fn served(self) -> Result<Client, Errno> {
        let mut pid = [0; 4];
        loop {
            return match nix::unistd::read(&self.0, &mut pid) {
                Ok(4) => Ok(Client { control: self.0, agent: Pid::from_raw(i32::from_ne_bytes(pid)) }),
                Ok(_) => Err(Errno::ECONNRESET),
                Err(Errno::EINTR) => continue,
                Err(error) => Err(error),
            };
        }
    }
}

fn socket_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}

const LOG: u8 = 1;
const DONE: u8 = 2;
const REFUSED: u8 = 3;
const COMMITTED: u8 = 4;
/// Longer log lines are cut.
const LONGEST: usize = 4096;

impl Client {
    /// Asks, prints the agent's log lines to CRIU's log, and waits for the result.
    ///
    /// # Errors
    /// [`AskError`].
    pub fn ask(&self, request: Request, file: Option<BorrowedFd<'_>>) -> Result<(), AskError> {
        let (answer, theirs) = socket_pair()?;
        let mut passed: Vec<RawFd> = vec![theirs.as_raw_fd()];
        passed.extend(file.map(|file| file.as_raw_fd()));
        let packet = request.encode();
        let sent = sendmsg::<()>(
            self.control.as_raw_fd(),
            &[IoSlice::new(&packet)],
            &[ControlMessage::ScmRights(&passed)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        match sent {
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(AskError::Gone { committed: false }),
            other => other?,
        };
        drop(theirs);
        self.read_answer(&answer)
    }

    fn read_answer(&self, answer: &OwnedFd) -> Result<(), AskError> {
        let mut buffer = [0; LONGEST];
        let mut committed = false;
        loop {
            self.wait_for(answer)?;
            let len = match nix::unistd::read(answer, &mut buffer) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            match buffer.get(..len).unwrap_or_default() {
                [LOG, level, text @ ..] => host::print(level_from(*level), &String::from_utf8_lossy(text)),
                [COMMITTED] => committed = true,
                [DONE] => return Ok(()),
                [REFUSED] => return Err(AskError::Refused),
                _ => return Err(AskError::Gone { committed }),
            }
        }
    }

    /// Waits for the next part of the answer. An agent that somebody has stopped would hold up criu, and with it the
    /// frozen tasks, for ever: it is killed after a while, which ends the answer.
    fn wait_for(&self, answer: &OwnedFd) -> Result<(), Errno> {
        let mut stopped = Duration::ZERO;
        loop {
            let mut ready = [PollFd::new(answer.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, PollTimeout::from(1000_u16)) {
                Ok(0) => {}
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error),
            }
            let is_stopped = soccr::criu::tasks::look(self.agent.as_raw()) == Fate::Stopped;
            stopped = if is_stopped { stopped + Duration::from_secs(1) } else { Duration::ZERO };
            if stopped >= PATIENCE {
                host::print(log::Level::Error, "the agent is stopped, and killed therefore");
                let _ = nix::sys::signal::kill(self.agent, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

fn level_from(number: u8) -> log::Level {
    log::Level::iter().find(|level| *level as usize == usize::from(number)).unwrap_or(log::Level::Error)
}

/// A request with the way to answer it.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// The descriptor that came along.
    pub file: Option<OwnedFd>,
    /// Where the answer goes.
    pub answer: Answer,
}

impl Server {
    /// Tells the hooks who serves them. Its parent does so, since it may die or be stopped at once.
    pub fn introduce(&self, agent: Pid) {
        let pid = agent.as_raw().to_ne_bytes();
        let _ = nix::sys::socket::send(self.0.as_raw_fd(), &pid, MsgFlags::MSG_NOSIGNAL);
    }

    /// The next request; `None` when every client is gone.
    ///
    /// # Errors
    /// A broken packet, or the kernel's answer.
    pub fn next(&self) -> io::Result<Option<Asked>> {
        let mut packet = [0; PACKET];
        let mut control = cmsg_space!([RawFd; 2]);
        let mut parts = [IoSliceMut::new(&mut packet)];
        let received =
            recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut files = received_fds(received.cmsgs()?).into_iter();
        if received.bytes == 0 {
            return Ok(None);
        }
        let answer = files.next().ok_or(io::ErrorKind::InvalidData)?;
        let file = files.next();
        drop(files);
        let request = Request::decode(packet).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some(Asked { request, file, answer: Answer(answer) }))
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where the answer to one request goes.
#[derive(Debug)]
pub struct Answer(OwnedFd);

impl Answer {
    /// Sends a line for CRIU's log. A client that is gone does not mind.
    pub fn log(&self, level: log::Level, text: &str) {
        #[allow(clippy::cast_possible_truncation)] // 1 to 5
        let mut packet = vec![LOG, level as u8];
        packet.extend(text.bytes().take(LONGEST - 2));
        self.send(&packet);
    }

    /// Says that from here on there is no way back: whatever happens to the agent, the tasks must live.
    pub fn commit(&self) {
        self.send(&[COMMITTED]);
    }

    /// Sends the result, which ends the answer.
    pub fn finish(self, done: bool) {
        self.send(&[if done { DONE } else { REFUSED }]);
    }

    fn send(&self, packet: &[u8]) {
        let _ = nix::sys::socket::send(self.0.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL);
    }

    /// Another handle on the same answer, for the log.
    ///
    /// # Errors
    /// EMFILE.
    pub fn duplicate(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}
