//! What the hooks in criu's process and the agent say to each other.
//!
//! One packet socket carries the requests. Each brings a socket of its own for the replies: log lines as they come,
//! then the result. So several processes can ask at once, and an agent that dies shows as the end of the replies.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

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
    /// The agent of a restore died: complete its work if all connections were whole by then, refuse if not.
    Complete,
}

/// How long a request is.
pub const REQUEST: usize = 5;

impl Request {
    /// The packet.
    #[must_use]
    pub fn encode(self) -> [u8; REQUEST] {
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
            Self::Complete => (10, 0),
        };
        let [a, b, c, d] = argument.to_le_bytes();
        [kind, a, b, c, d]
    }

    /// What a packet says.
    #[must_use]
    pub fn decode(packet: [u8; REQUEST]) -> Option<Self> {
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
            10 => Self::Complete,
            _ => return None,
        })
    }
}

/// A part of the agent's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// A line for CRIU's log.
    Log(log::Level, &'a [u8]),
    /// From here on there is no way back: whatever happens to the agent, the tasks must live.
    Committed,
    /// What is still to be done need not be waited for.
    Proceed,
    /// All was done. The last part.
    Done,
    /// It was not; the log lines say why. The last part.
    Refused,
}

/// No reply is longer; log lines are cut.
pub const LONGEST_REPLY: usize = 4096;

const LOG: u8 = 1;
const DONE: u8 = 2;
const REFUSED: u8 = 3;
const COMMITTED: u8 = 4;
const PROCEED: u8 = 5;

impl<'a> Reply<'a> {
    /// The packet.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        match self {
            Self::Log(level, text) => {
                #[allow(clippy::cast_possible_truncation)] // 1 to 5
                let mut packet = vec![LOG, level as u8];
                packet.extend(text.iter().take(LONGEST_REPLY - 2));
                packet
            }
            Self::Committed => vec![COMMITTED],
            Self::Proceed => vec![PROCEED],
            Self::Done => vec![DONE],
            Self::Refused => vec![REFUSED],
        }
    }

    /// What a packet says; `None` for the end of the replies.
    #[must_use]
    pub fn decode(packet: &'a [u8]) -> Option<Self> {
        Some(match packet {
            [LOG, level, text @ ..] => Self::Log(level_from(*level), text),
            [COMMITTED] => Self::Committed,
            [PROCEED] => Self::Proceed,
            [DONE] => Self::Done,
            [REFUSED] => Self::Refused,
            _ => return None,
        })
    }
}

fn level_from(number: u8) -> log::Level {
    log::Level::iter().find(|level| *level as usize == usize::from(number)).unwrap_or(log::Level::Error)
}

/// Two connected sockets that keep packets apart.
///
/// # Errors
/// EMFILE.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
}
