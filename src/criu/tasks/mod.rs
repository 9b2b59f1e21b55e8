//! Tasks of this host as `/proc` shows them, and the TCP connections that they hold.

mod duplicates;
mod found;
mod identity;
pub mod in_flight;
mod keys;
mod monitored;
mod owner;
mod sockets;
mod stop;

use std::collections::VecDeque;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlinkat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use procfs::process::{ProcState, Process};
use procfs::{ProcError, ProcResult};

use crate::kernel::SysError;
use crate::kernel::netns::NetNs;
use crate::kernel::process::{self, RemoteFd};

pub use duplicates::{Duplicates, Opened, Slot};
pub use found::{FindError, Found, FoundConnection, Place, Unconnected};
pub use identity::ProcessId;
pub use owner::{Owner, OwnerMap};
pub use sockets::{Finder, SocketNamespaces, Walker};

/// A task of the dump or the restore.
#[derive(Debug)]
pub struct Task {
    /// Its pid in our PID namespace.
    pub pid: i32,
    pidfd: OwnedFd,
}

/// What has become of a task that criu held still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// criu still holds it.
    Traced,
    /// It runs.
    Running,
    /// It is stopped by a signal, and nobody traces it.
    Stopped,
    /// It is being killed.
    Ending,
    /// It is dead.
    Gone,
}

impl Task {
    /// Opens a task.
    ///
    /// # Errors
    /// ESRCH when it is gone.
    pub fn open(pid: i32) -> Result<Self, SysError> {
        Ok(Self { pid, pidfd: process::pidfd_open(pid)? })
    }

    /// A duplicate of one of its descriptors.
    ///
    /// # Errors
    /// EBADF when it has none of that number.
    pub fn copy(&self, fd: RemoteFd) -> Result<OwnedFd, SysError> {
        process::pidfd_getfd(self.pidfd.as_fd(), fd)
    }

    /// The numbers of its sockets, with their inodes.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn sockets(&self) -> std::io::Result<Vec<(RemoteFd, u64)>> {
        self.descriptors(|fd, target| Some((RemoteFd(fd), socket_inode(target)?)))
    }

    /// The network namespaces that it keeps open.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn open_namespaces(&self) -> std::io::Result<Vec<NetNs>> {
        self.descriptors(|fd, target| {
            target.starts_with("net:[").then_some(())?;
            NetNs::open(Path::new(&format!("/proc/{}/fd/{fd}", self.pid))).ok()
        })
    }

    /// What `wanted` makes of its descriptors, by their numbers and links.
    fn descriptors<T>(&self, wanted: impl Fn(u32, &str) -> Option<T>) -> std::io::Result<Vec<T>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let table = format!("/proc/{}/fd", self.pid);
        let mut found = Vec::new();
        // Another descriptor than the one that is listed: links are looked up from there, not from the root.
        let links = open(table.as_str(), flags, Mode::empty())?;
        for entry in Dir::open(table.as_str(), flags, Mode::empty())?.iter() {
            let entry = entry?;
            let name = entry.file_name();
            let Some(fd) = name.to_str().ok().and_then(|name| name.parse().ok()) else { continue };
            // A descriptor of a frozen task does not go away; one of a thread group that ends may.
            let target = match readlinkat(&links, name) {
                Err(errno) if errno == Errno::ENOENT || self.gone() => continue,
                target => target?,
            };
            found.extend(target.to_str().and_then(|target| wanted(fd, target)));
        }
        Ok(found)
    }

    /// Readable when the task is gone.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether the task has ended.
    pub fn gone(&self) -> bool {
        let mut ready = [PollFd::new(self.pidfd(), PollFlags::POLLIN)];
        matches!(poll(&mut ready, PollTimeout::ZERO), Ok(1..))
    }

    /// What has become of it, as far as one look can tell.
    pub fn fate(&self) -> Fate {
        if self.gone() {
            return Fate::Gone;
        }
        look(self.pid)
    }
}

/// What has become of the task with this pid, as far as one look can tell.
#[must_use]
pub fn look(pid: i32) -> Fate {
    try_look(pid).unwrap_or(Fate::Gone)
}

fn try_look(pid: i32) -> ProcResult<Fate> {
    const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);
    const PF_EXITING: u32 = 0x4;
    let process = Process::new(pid)?;
    let (stat, status) = (process.stat()?, process.status()?);
    // A task that was killed is untraced before it is dead.
    let ending = stat.flags & PF_EXITING != 0 || (status.sigpnd | status.shdpnd) & SIGKILL_BIT != 0;
    Ok(match stat.state()? {
        ProcState::Zombie | ProcState::Dead => Fate::Gone,
        _ if ending => Fate::Ending,
        _ if status.tracerpid != 0 => Fate::Traced,
        ProcState::Stopped => Fate::Stopped,
        _ => Fate::Running,
    })
}

fn socket_inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The tasks that have this socket in their descriptor tables.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn holders(inode: u64) -> ProcResult<Vec<i32>> {
    holders_of(|found| found == inode)
}

/// The tasks that have any of these sockets in their descriptor tables.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn holders_of(wanted: impl Fn(u64) -> bool) -> ProcResult<Vec<i32>> {
    let mut holders = Vec::new();
    for process in procfs::process::all_processes()? {
        let Ok(task) = process.map_err(drop).and_then(|process| Task::open(process.pid).map_err(drop)) else {
            continue; // gone meanwhile
        };
        let sockets = task.sockets().unwrap_or_default();
        if sockets.iter().any(|(_, inode)| wanted(*inode)) {
            holders.push(task.pid);
        }
    }
    Ok(holders)
}

/// A task that lives in this network namespace and is traced, and who traces it.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn traced_in(ns: &NetNs) -> ProcResult<Option<(i32, i32)>> {
    for process in procfs::process::all_processes()? {
        // One that is gone meanwhile, or that we may not look at, is none of ours.
        let Ok(status) = process.and_then(|process| process.status()) else { continue };
        if status.tracerpid != 0 && NetNs::of_task(status.pid.cast_unsigned()).is_ok_and(|found| found == *ns)
        {
            return Ok(Some((status.pid, status.tracerpid)));
        }
    }
    Ok(None)
}

/// The task `root` and all its descendants, whoever traces them.
#[must_use]
pub fn tree(root: i32) -> Vec<i32> {
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next).copied() {
        next += 1;
        tree.extend(Process::new(pid).and_then(|process| children(&process)).unwrap_or_default());
    }
    tree
}

/// The task `root` and all its descendants that `tracer` holds still; zombies are left out.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn frozen_tree(root: i32, tracer: i32) -> ProcResult<Vec<i32>> {
    let mut tree = Vec::new();
    let mut queue = VecDeque::from([root]);
    while let Some(pid) = queue.pop_front() {
        let process = match Process::new(pid) {
            Err(ProcError::NotFound(_)) => continue,
            other => other?,
        };
        let status = process.status()?;
        if status.tracerpid == tracer {
            tree.push(pid);
        } else if process.stat()?.state()? != ProcState::Zombie {
            continue;
        }
        queue.extend(children(&process)?);
    }
    Ok(tree)
}

/// The pid that the task has in its own, innermost PID namespace.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn inner_pid(pid: i32) -> ProcResult<u32> {
    let status = Process::new(pid)?.status()?;
    let inner = status.nspid.as_ref().and_then(|pids| pids.last()).copied().unwrap_or(pid);
    u32::try_from(inner).map_err(|_| ProcError::Other(format!("NSpid of {pid} is {inner}")))
}

/// The child of `parent` (or of `parent`'s parent, where criu restores a sibling) that is `inner` to itself.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn restored_child(parent: i32, inner: u32) -> ProcResult<Option<i32>> {
    let parent = Process::new(parent)?;
    let mut candidates = children(&parent)?;
    // It may be beyond our PID namespace, or another user's.
    let grandparent = Process::new(parent.status()?.ppid).and_then(|process| children(&process));
    candidates.extend(grandparent.unwrap_or_default());
    Ok(candidates.into_iter().find(|child| inner_pid(*child).is_ok_and(|pid| pid == inner)))
}

/// The children of all threads. A thread that ends meanwhile leaves its own to another.
fn children(process: &Process) -> ProcResult<Vec<i32>> {
    let mut children = Vec::new();
    for thread in process.tasks()? {
        match thread.and_then(|thread| thread.children()) {
            Err(ProcError::NotFound(_)) => {}
            found => children.extend(found?.into_iter().map(u32::cast_signed)),
        }
    }
    Ok(children)
}

/// The user and group, as we see them, that are root in the task's user namespace; `None` in our own.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn foreign_root(pid: i32) -> std::io::Result<Option<(u32, u32)>> {
    if fs::read_link(format!("/proc/{pid}/ns/user"))? == fs::read_link("/proc/self/ns/user")? {
        return Ok(None);
    }
    let root = OwnerMap::of(pid)?.outside(Owner::default());
    Ok(root.map(|Owner { uid, gid }| (uid, gid)))
}
