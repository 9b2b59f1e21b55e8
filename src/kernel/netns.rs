//! Network namespaces: which one a socket or a task lives in, and work done inside it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::{SysError, check};

/// The calling thread's namespace. Not `/proc/self`, which is the main thread's.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// A network namespace, held open: it exists at least as long as this value or a clone of it.
///
/// Two values are equal when they are the same namespace, however they were found.
#[derive(Clone, Debug)]
pub struct NetNs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    dev: u64,
    ino: u64,
}

/// A namespace could not be found, entered or left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetNsError {
    /// A namespace file could not be opened or examined.
    #[error("cannot open the network namespace {}", path.display())]
    Open {
        /// The namespace's file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// SIOCGSKNS failed: EPERM without CAP_NET_ADMIN over the socket's namespace.
    #[error("cannot find the socket's network namespace")]
    OfSocket(#[source] SysError),
    /// The namespace could not be entered: EPERM without CAP_SYS_ADMIN over it.
    #[error("cannot enter the network namespace {ns}")]
    Enter {
        /// The namespace.
        ns: NetNs,
        /// The kernel's answer.
        source: Errno,
    },
    /// The thread could not go back: it now lives in the wrong namespace and must not go on with
    /// anything that touches the network. End the process.
    #[error("cannot return from the network namespace {inside} to {home}: this thread is stranded")]
    Stranded {
        /// Where the thread is.
        inside: NetNs,
        /// Where it should be.
        home: NetNs,
        /// The kernel's answer.
        source: Errno,
    },
}

impl NetNs {
    /// The calling thread's namespace.
    ///
    /// # Errors
    /// [`NetNsError::Open`], for one when `/proc` is not mounted.
    pub fn current() -> Result<Self, NetNsError> {
        Self::open(Path::new(CURRENT))
    }

    /// The namespace of a task, by its process or thread id in our PID namespace.
    ///
    /// # Errors
    /// [`NetNsError::Open`]: the task is gone, or we may not look at it.
    pub fn of_task(pid: u32) -> Result<Self, NetNsError> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The namespace that a file names, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    ///
    /// The path may lead through what somebody else changes meanwhile, such as `/proc/PID/fd/N`. So nothing but a
    /// namespace is ever opened: not a pipe, which would wait for ever, nor a device, to which that may mean something.
    ///
    /// # Errors
    /// [`NetNsError::Open`].
    pub fn open(path: &Path) -> Result<Self, NetNsError> {
        let failed = |source: io::Error| NetNsError::Open { path: path.to_owned(), source };
        let place =
            open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(|e| failed(e.into()))?;
        Self::from_place(place).map_err(failed)
    }

    /// As [`open`](Self::open), the path taken as it is for a process whose root folder `root` is: no link on the way,
    /// which that process may have made, leads out of there.
    ///
    /// # Errors
    /// [`NetNsError::Open`].
    pub fn open_within(root: &Path, path: &Path) -> Result<Self, NetNsError> {
        let failed = |source: io::Error| NetNsError::Open { path: root.join(path), source };
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let place = || {
            let root = open(root, flags | OFlag::O_DIRECTORY, Mode::empty())?;
            let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
            openat2(root, path, OpenHow::new().flags(flags).resolve(resolve))
        };
        Self::from_place(place().map_err(|e| failed(e.into()))?).map_err(failed)
    }

    /// The namespace file that an `O_PATH` descriptor stands for.
    fn from_place(place: OwnedFd) -> io::Result<Self> {
        if fstatfs(&place)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no namespace"));
        }
        Self::from_fd(File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))?.into())
    }

    /// The namespace that a socket was made in, wherever its owner lives now (`SIOCGSKNS`, Linux 4.10).
    ///
    /// # Errors
    /// [`NetNsError::OfSocket`].
    pub fn of_socket(socket: BorrowedFd<'_>) -> Result<Self, NetNsError> {
        const CALL: &str = "find a socket's network namespace (SIOCGSKNS)";
        // SAFETY: SIOCGSKNS takes no argument; on success it returns a new descriptor.
        let ret = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGSKNS) };
        let fd = check(CALL, ret).map_err(NetNsError::OfSocket)?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Self::from_fd(fd).map_err(|e| {
            let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            NetNsError::OfSocket(SysError { call: CALL, errno })
        })
    }

    fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let file = File::from(fd);
        let meta = file.metadata()?;
        Ok(Self(Arc::new(Inner { dev: meta.dev(), ino: meta.ino(), fd: file.into() })))
    }

    /// The device of the kernel's namespace files.
    #[must_use]
    pub fn device(&self) -> u64 {
        self.0.dev
    }

    /// The inode number, as in `net:[4026531840]`.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.0.ino
    }

    /// Runs `work` in this namespace: sockets that it makes and processes that it starts belong there.
    ///
    /// Nothing is switched when the thread is in the namespace already. Otherwise the calling
    /// thread, and only it, enters the namespace and returns, also when `work` panics.
    ///
    /// # Errors
    /// [`NetNsError::Enter`]: `work` did not run. [`NetNsError::Stranded`]: it ran, and the thread
    /// could not return; a process that goes on after this error works in the wrong namespace.
    ///
    /// # Panics
    /// When `work` does. Should the thread be stranded by then, the process is aborted.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetNsError> {
        let home = Self::current()?;
        if *self == home {
            return Ok(work());
        }
        setns(self.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|source| NetNsError::Enter { ns: self.clone(), source })?;
        let way_back = WayBack { home: &home };
        let result = work();
        std::mem::forget(way_back);
        match setns(home.as_fd(), CloneFlags::CLONE_NEWNET) {
            Ok(()) => Ok(result),
            Err(source) => Err(NetNsError::Stranded { inside: self.clone(), home, source }),
        }
    }
}

/// Returns to the home namespace while a panic unwinds.
struct WayBack<'a> {
    home: &'a NetNs,
}

impl Drop for WayBack<'_> {
    fn drop(&mut self) {
        if setns(self.home.as_fd(), CloneFlags::CLONE_NEWNET).is_err() {
            std::process::abort();
        }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl PartialEq for NetNs {
    fn eq(&self, other: &Self) -> bool {
        (self.0.dev, self.0.ino) == (other.0.dev, other.0.ino)
    }
}

impl Eq for NetNs {}

impl std::hash::Hash for NetNs {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.0.dev, self.0.ino).hash(state);
    }
}

impl fmt::Display for NetNs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.0.ino)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_current_namespace_is_shown_as_the_kernel_shows_it() {
        let link = std::fs::read_link(CURRENT).unwrap();
        assert_eq!(NetNs::current().unwrap().to_string(), link.to_str().unwrap());
    }

    #[test]
    fn a_task_and_its_thread_share_the_namespace() {
        assert_eq!(NetNs::of_task(std::process::id()).unwrap(), NetNs::current().unwrap());
    }

    #[test]
    fn running_at_home_switches_nothing() {
        assert_eq!(NetNs::current().unwrap().run(|| 7).unwrap(), 7);
    }

    #[test]
    fn a_missing_task_is_named() {
        let error = NetNs::of_task(u32::MAX).unwrap_err();
        assert!(error.to_string().contains("/proc/4294967295/ns/net"), "{error}");
    }
}
