//! The hooks' end of the way to the agent.

use std::cell::RefCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use std::io::IoSlice;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use soccr::criu::tasks::{self, Fate};

use super::host;
use crate::protocol::{LONGEST_REPLY, Reply, Request, socket_pair};

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

/// How long an agent may be stopped, which is looked at so often.
const PATIENCE: Duration = Duration::from_secs(1);
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// The way to ask the agent.
#[derive(Debug)]
pub struct Client {
    control: OwnedFd,
    agent: Pid,
    /// The answer to a request that nobody has waited for yet.
    earlier: RefCell<Option<OwnedFd>>,
}

/// What a caller may go on after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    Done,
    Proceed,
}

impl Client {
    /// Waits until the agent's parent tells the agent's pid: the agent itself may die or be stopped at once.
    ///
    /// # Errors
    /// ECONNRESET when nobody can tell it any more.
    pub fn connect(control: OwnedFd) -> Result<Self, Errno> {
        let mut pid = [0; 4];
        loop {
            return match nix::unistd::read(&control, &mut pid) {
                Ok(4) => {
                    let agent = Pid::from_raw(i32::from_ne_bytes(pid));
                    Ok(Self { control, agent, earlier: RefCell::default() })
                }
                Ok(_) => Err(Errno::ECONNRESET),
                Err(Errno::EINTR) => continue,
                Err(error) => Err(error),
            };
        }
    }

    /// Asks, prints the agent's log lines to CRIU's log, and waits for the result.
    ///
    /// # Errors
    /// [`AskError`], also of a request that was [begun](Self::begin) before.
    pub fn ask(&self, request: Request, file: Option<BorrowedFd<'_>>) -> Result<(), AskError> {
        self.finish_earlier()?;
        let replies = self.send(request, file)?;
        self.finish(&replies)
    }

    /// Asks, and waits until the agent has done it or says that nobody need wait: then the next call does.
    ///
    /// # Errors
    /// [`AskError`].
    pub fn begin(&self, request: Request) -> Result<(), AskError> {
        let replies = self.send(request, None)?;
        if self.read(&replies)? == Heard::Proceed {
            self.earlier.replace(Some(replies));
        }
        Ok(())
    }

    /// Waits for the result of what was [begun](Self::begin).
    ///
    /// # Errors
    /// [`AskError`].
    pub fn finish_earlier(&self) -> Result<(), AskError> {
        self.earlier.take().map_or(Ok(()), |replies| self.finish(&replies))
    }

    fn send(&self, request: Request, file: Option<BorrowedFd<'_>>) -> Result<OwnedFd, AskError> {
        let (replies, theirs) = socket_pair()?;
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
        Ok(replies)
    }

    fn finish(&self, replies: &OwnedFd) -> Result<(), AskError> {
        while self.read(replies)? != Heard::Done {}
        Ok(())
    }

    fn read(&self, replies: &OwnedFd) -> Result<Heard, AskError> {
        let mut buffer = [0; LONGEST_REPLY];
        let mut committed = false;
        loop {
            self.wait_for(replies)?;
            let len = match nix::unistd::read(replies, &mut buffer) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            match Reply::decode(buffer.get(..len).unwrap_or_default()) {
                Some(Reply::Log(level, text)) => host::print(level, &String::from_utf8_lossy(text)),
                Some(Reply::Committed) => committed = true,
                Some(Reply::Proceed) => return Ok(Heard::Proceed),
                Some(Reply::Done) => return Ok(Heard::Done),
                Some(Reply::Refused) => return Err(AskError::Refused),
                None => return Err(AskError::Gone { committed }),
            }
        }
    }

    /// Waits for the next reply. An agent that somebody has stopped would hold up criu, and with it the frozen tasks, for
    /// ever: it is killed after a while, which ends the replies.
    fn wait_for(&self, replies: &OwnedFd) -> Result<(), Errno> {
        let mut stopped = Duration::ZERO;
        loop {
            let mut ready = [PollFd::new(replies.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(BETWEEN_LOOKS).expect("it is short");
            match poll(&mut ready, timeout) {
                Ok(0) => {}
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error),
            }
            let is_stopped = tasks::look(self.agent.as_raw()) == Fate::Stopped;
            stopped = if is_stopped { stopped + BETWEEN_LOOKS } else { Duration::ZERO };
            if stopped >= PATIENCE {
                host::print(log::Level::Error, "the agent is stopped, and killed therefore");
                let _ = kill(self.agent, Signal::SIGKILL);
            }
        }
    }
}
