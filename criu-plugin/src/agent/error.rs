//! What can go wrong in the agent; each error names the connection, the task or the file, and has its cause behind it
//! (`soccr::chain` tells all).

use std::net::SocketAddr;

use procfs::ProcError;
use soccr::accept_queue::{PutError, Unavailable};
use soccr::checkpoint::SaveError;
use soccr::connection::{FourTuple, UnsupportedState};
use soccr::criu::image::ImageError;
use soccr::criu::record::RecordError;
use soccr::criu::rules::RulesError;
use soccr::criu::tasks::{FindError, Place};
use soccr::kernel::SysError;
use soccr::kernel::netns::NetNsError;
use soccr::lock::{BadLockName, BadOption, LockError};
use soccr::repair::PauseError;
use soccr::restore::RestoreError;

/// The agent cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("cannot walk the tree of tasks")]
    Tree(#[source] ProcError),
    #[error("pid {pid}")]
    Task { pid: i32, source: SysError },
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    LockName(#[from] BadLockName),
    #[error(transparent)]
    Option(#[from] BadOption),
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error("{tuple} is not to be carried, says {rule}")]
    Refused { tuple: FourTuple, rule: String },
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{place}")]
    Save { place: Place, source: SaveError },
    #[error("{tuple} ({place})")]
    Image { tuple: FourTuple, place: Place, source: ImageError },
    #[error(transparent)]
    Images(#[from] ImageError),
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    #[error("{tuple} (pid {pid})")]
    Socket { tuple: FourTuple, pid: i32, source: SysError },
    #[error("{tuple} (pid {pid})")]
    SocketNs { tuple: FourTuple, pid: i32, source: NetNsError },
    #[error("the agent's duplicates of sockets")]
    Duplicates(#[source] SysError),
    #[error("listener {local} ({place})")]
    Listener { local: SocketAddr, place: Place, source: SysError },
    #[error("{0}: its inode number does not fit CRIU's images")]
    Inode(FourTuple),
    #[error("{tuple}, which nobody has accepted")]
    QueuedState { tuple: FourTuple, source: UnsupportedState },
    #[error("{tuple}, which nobody has accepted: {why}")]
    Unfit { tuple: FourTuple, why: &'static str },
    #[error("{tuple}, which nobody has accepted")]
    Queued { tuple: FourTuple, source: SaveError },
    #[error("{tuple}, which nobody has accepted")]
    QueuedImage { tuple: FourTuple, source: ImageError },
    #[error("{tuple} cannot be put back for its listener")]
    NoAcceptQueue { tuple: FourTuple, source: Unavailable },
    #[error("{tuple} cannot be put back for its listener")]
    AcceptQueue { tuple: FourTuple, source: PutError },
    #[error(transparent)]
    Unreadable(SysError),
    #[error("{socket}: what was set on it is not saved")]
    Extras { socket: String, source: Box<Self> },
    #[error("image {file}")]
    Restore { file: String, source: RestoreError },
    #[error("{0} is alive in this network namespace: were these images restored already?")]
    Alive(FourTuple),
    #[error("these connections of the images are in no restored task: {0}")]
    NotFound(String),
    #[error("a connection of this restore failed before")]
    FailedBefore,
    #[error("cannot stat the image folder")]
    Folder(#[source] std::io::Error),
    #[error("no random id")]
    Random(#[source] std::io::Error),
    #[error(transparent)]
    Injected(#[from] crate::fault::Injected),
    #[error("pid {0} was killed before its connections were whole")]
    Killed(i32),
    #[error("{0}")]
    Protocol(&'static str),
}
