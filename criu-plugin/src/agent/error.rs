//! What can go wrong in the agent; each error names the connection, the task or the file.

use procfs::ProcError;
pub(super) use soccr::chain;
use soccr::checkpoint::SaveError;
use soccr::connection::FourTuple;
use soccr::criu::image::ImageError;
use soccr::criu::record::RecordError;
use soccr::criu::tasks::{FindError, Place};
use soccr::kernel::SysError;
use soccr::kernel::netns::NetNsError;
use soccr::lock::{BadLockName, BadOption, LockError};
use soccr::repair::PauseError;
use soccr::restore::RestoreError;

/// The agent cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    #[error("cannot walk the tree of tasks: {0}")]
    Tree(ProcError),
    #[error("pid {pid}: {source}")]
    Task { pid: i32, source: SysError },
    #[error(transparent)]
    Find(#[from] FindError),
    #[error("{}", chain(.0))]
    Lock(#[from] LockError),
    #[error(transparent)]
    LockName(#[from] BadLockName),
    #[error(transparent)]
    Option(#[from] BadOption),
    #[error(transparent)]
    Pause(#[from] PauseError),
    #[error("{}", chain(.0))]
    Record(#[from] RecordError),
    #[error("{} ({place})", chain(.source))]
    Save { place: Place, source: SaveError },
    #[error("{tuple} ({place}): {}", chain(.source))]
    Image { tuple: FourTuple, place: Place, source: ImageError },
    #[error("{}", chain(.0))]
    Images(#[from] ImageError),
    #[error("{}", chain(.0))]
    NetNs(#[from] NetNsError),
    #[error("{tuple} (pid {pid}): {source}")]
    Socket { tuple: FourTuple, pid: i32, source: SysError },
    #[error("image {file}: {}", chain(.source))]
    Restore { file: String, source: RestoreError },
    #[error("{0} is alive in this network namespace: were these images restored already?")]
    Alive(FourTuple),
    #[error("these connections of the images are in no restored task: {0}")]
    NotFound(String),
    #[error("a connection of this restore failed before")]
    FailedBefore,
    #[error("no random id: {0}")]
    Random(std::io::Error),
    #[error(transparent)]
    Injected(#[from] crate::fault::Injected),
    #[error("pid {0} was killed before its connections were whole")]
    Killed(i32),
    #[error("{0}")]
    Protocol(&'static str),
}
