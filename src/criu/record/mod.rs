//! The record of what a dump or a restore has changed on this host.
//!
//! Whoever is killed cannot undo what it did. So before a dump changes anything it writes down, in a file under
//! `/run/soccr`, what it is about to change: which connections it locks in which network namespace and whose they are.
//! The file follows the dump through its [`Phase`]s and goes away when all is undone. What a crash leaves is then
//! [found](Store::list), [judged](Record::state) and [removed](clean()).
//!
//! A record is text: its first line is a JSON object, the [`Record`] itself; then each connection has a line of its
//! own. They are written once, however many they are: a change of the phase copies them as bytes.
//!
//! Nothing in a record is a secret, but who can write one can have locks of others removed: the folder has mode
//! 0700 and must belong to the user, and a file is read only within limits, never through a symbolic link.

mod clean;
mod error;
mod file;
mod namespaces;
mod recorder;
mod state;
mod stopped;
mod store;

use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::connection::FourTuple;
use crate::criu::image::index::InetConnection;
use crate::criu::tasks::{FoundConnection, Place, ProcessId};
use crate::kernel::netns::NetNs;
use crate::kernel::process::RemoteFd;
use crate::lock::conntrack::Translation;
use crate::lock::{LockName, Method};

pub use clean::{
    EndedLock, Options as CleanOptions, Report, all_ended_locks, another_relies_on_criu, clean, end_restored,
    ended_locks, is_undone, locked_by_criu, remove_criu_locks, remove_locks,
};
pub use error::RecordError;
pub use namespaces::{Namespaces, all_namespaces};
pub use recorder::{RECORD_VARIABLE, Recorder};
pub use state::State;
pub use stopped::finish;
pub use store::{DEFAULT_FOLDER, FOLDER_VARIABLE, Listed, Store};

/// What a dump or a restore has changed on this host, except the list of its connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names the dump: also the id in its lock's name and in its images.
    pub id: RecordId,
    /// The boot that this happened in (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// The PID namespace that all pids in here belong to.
    pub pid_ns: u64,
    /// When it began, in seconds since 1970.
    pub created: u64,
    /// How far it has come.
    pub phase: Phase,
    /// Where the images are.
    pub images: Folder,
    /// The criu process.
    pub criu: ProcessId,
    /// The process that does the plugin's work and keeps this record.
    pub agent: ProcessId,
    /// The locks, those that are about to be made included.
    pub locks: Vec<LockRecord>,
    /// The namespaces that CRIU itself locks as a whole: that of a tree which does not share criu's.
    #[serde(default)]
    pub criu_locks: Vec<NsId>,
    /// What the tasks' death will make of those: `true`, they go, and ours stay in their place.
    #[serde(default)]
    pub criu_replaced: bool,
    /// The connections that are translated where they are locked on their way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub translations: Vec<Translation>,
    /// The accept queues whose connections the dump has taken out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accept_queues: Vec<QueueRecord>,
    /// The tasks that the connections belong to. While a dump waits for its restore: those that were dumped.
    pub tasks: Vec<ProcessId>,
    /// Those of the tasks that soccr has stopped (SIGSTOP), to be continued when all is done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stopped: Vec<ProcessId>,
    /// What the tasks' death will make of the locks: `true`, they stay for the restore.
    #[serde(default = "yes")]
    pub kept_after_death: bool,
    /// How many connections there are.
    pub connections: usize,
}

fn yes() -> bool {
    true
}

impl Record {
    /// The accept queues whose connections are lost now that this dump is undone: they were closed with whoever held them.
    pub fn lost_queues(&self) -> &[QueueRecord] {
        let undone = matches!(self.phase, Phase::Saving | Phase::Deciding | Phase::LeftStopped);
        if undone { &self.accept_queues } else { &[] }
    }

    /// Whether it tells of a lock, by us or by CRIU.
    #[must_use]
    pub fn has_locks(&self) -> bool {
        !self.locks.is_empty() || !self.criu_locks.is_empty()
    }

    /// Whether it needs CRIU's own lock of this namespace.
    #[must_use]
    pub fn relies_on_criu(&self, ns: NsId) -> bool {
        !self.criu_replaced && self.criu_locks.contains(&ns) && self.state() != State::Orphaned
    }
}

/// How far a dump or a restore has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The tasks are frozen; their connections are locked, and read one after the other.
    Saving,
    /// The images are whole, and it is open whether the tasks die or run on.
    Deciding,
    /// The images are whole, and the tasks were left stopped.
    LeftStopped,
    /// The tasks are dead, and the locks wait for the restore.
    Dumped,
    /// The connections are being built, locked. Until this ends the restore can be tried again.
    Restoring,
    /// All connections are built; they are unlocked and leave repair mode.
    Waking,
}

/// A folder, with what tells it from another one of that name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folder {
    /// Its path when it was recorded.
    pub path: String,
    /// Its file system.
    pub dev: u64,
    /// Its inode.
    pub ino: u64,
}

impl Folder {
    /// Whether the folder is still there.
    #[must_use]
    pub fn is_there(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == (self.dev, self.ino))
    }
}

/// A lock in one network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRecord {
    /// The namespace.
    pub ns: NsId,
    /// Its name.
    pub name: LockName,
    /// How it was made.
    pub method: Method,
}

/// An accept queue that was emptied. Its connections are in no task's table: should the dump be killed, and its tasks live,
/// they are lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRecord {
    /// The listener's end.
    pub listener: SocketAddr,
    /// How many connections waited.
    pub waiting: u32,
}

impl std::fmt::Display for QueueRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} connections that nobody had accepted at {}", self.waiting, self.listener)
    }
}

/// A network namespace as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NsId {
    /// The device of the kernel's namespace files.
    pub dev: u64,
    /// The inode: the number in `net:[4026531840]`.
    pub ino: u64,
}

impl From<&NetNs> for NsId {
    fn from(ns: &NetNs) -> Self {
        Self { dev: ns.device(), ino: ns.inode() }
    }
}

impl std::fmt::Display for NsId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

/// A connection and where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionRecord {
    /// The end on this host.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
    /// The socket's inode.
    pub ino: u32,
    /// The socket's cookie.
    pub cookie: u64,
    /// The task, and its descriptor or that of the unix socket in which the connection is in flight.
    pub pid: Option<i32>,
    /// See `pid`.
    pub fd: Option<u32>,
    /// SO_REUSEADDR, which the kernel forgets when repair mode ends.
    #[serde(default)]
    pub reuse_addr: bool,
}

impl ConnectionRecord {
    /// Both ends.
    #[must_use]
    pub fn tuple(&self) -> FourTuple {
        FourTuple { local: self.local, remote: self.remote }
    }
}

impl From<&InetConnection> for ConnectionRecord {
    fn from(connection: &InetConnection) -> Self {
        let ino = connection.ino;
        Self { ino, ..Self::of_external(connection.tuple, connection.reuseaddr) }
    }
}

impl ConnectionRecord {
    /// A connection that only an image of its own tells of.
    #[must_use]
    pub fn of_external(tuple: FourTuple, reuse_addr: bool) -> Self {
        Self { local: tuple.local, remote: tuple.remote, ino: 0, cookie: 0, pid: None, fd: None, reuse_addr }
    }
}

impl From<&FoundConnection> for ConnectionRecord {
    fn from(found: &FoundConnection) -> Self {
        let owner = match found.place {
            Place::Table(pid, fd) | Place::InFlight(pid, fd) => Some((pid, fd)),
            Place::Given => None,
        };
        Self {
            local: found.tuple.local,
            remote: found.tuple.remote,
            ino: found.inode,
            cookie: found.cookie,
            pid: owner.map(|(pid, _)| pid),
            fd: owner.map(|(_, RemoteFd(fd))| fd),
            reuse_addr: found.reuse_addr,
        }
    }
}

/// The id of a record, which is also its file's name: 1 to 64 letters, digits, `-`, `_` and `.`, no `.` in front.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RecordId(String);

/// Text that is no [`RecordId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no id of a record: it takes 1 to 64 letters, digits, '-', '_' and '.', no '.' in front")]
pub struct BadRecordId(String);

impl RecordId {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RecordId {
    type Err = BadRecordId;

    fn from_str(text: &str) -> Result<Self, BadRecordId> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = (1..=64).contains(&text.len()) && !text.starts_with('.') && text.chars().all(plain);
        if good { Ok(Self(text.to_owned())) } else { Err(BadRecordId(text.to_owned())) }
    }
}

impl TryFrom<String> for RecordId {
    type Error = BadRecordId;

    fn try_from(text: String) -> Result<Self, BadRecordId> {
        text.parse()
    }
}

impl From<RecordId> for String {
    fn from(id: RecordId) -> Self {
        id.0
    }
}

impl std::fmt::Display for RecordId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// The PID namespace of this process; 0 where `/proc` does not tell.
fn own_pid_ns() -> u64 {
    std::fs::metadata("/proc/self/ns/pid").map_or(0, |meta| meta.ino())
}

/// The current boot's id; empty where `/proc` does not tell.
fn current_boot() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}
