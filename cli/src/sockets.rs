//! The TCP sockets of running tasks, by duplicates of their descriptors. Nothing is stopped, and nothing is changed:
//! what is said of a socket may have changed by the time that it is read.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use serde::Serialize;
use soccr::connection::{FourTuple, State, UnsupportedState};
use soccr::criu::tasks::{self, Task, in_flight};
use soccr::kernel::netns::NetNs;
use soccr::kernel::process::RemoteFd;
use soccr::kernel::tcp::Info;
use soccr::kernel::{SysResult, addr, sockopt, tcp};

/// The tasks below one, and their sockets.
pub struct Tree {
    pub tasks: Vec<i32>,
    pub sockets: Vec<Socket>,
    /// Unix sockets with descriptors in their queues, which cannot be looked at while somebody may read from them.
    pub in_flight: Vec<InFlight>,
}

pub struct Socket {
    fd: OwnedFd,
    pub inode: u64,
    /// Not TCP but MPTCP, which looks the same to a program.
    pub multipath: bool,
    pub owners: Vec<Owner>,
}

/// A descriptor that leads to a socket.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Owner {
    pub pid: i32,
    pub fd: u32,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct InFlight {
    #[serde(flatten)]
    pub socket: Owner,
    pub descriptors: u32,
}

impl Tree {
    /// The task with this pid alone.
    pub fn of_task(pid: i32) -> Result<Self> {
        Self::of(pid, vec![pid])
    }

    /// The task with this pid and its descendants.
    pub fn below(root: i32) -> Result<Self> {
        Self::of(root, tasks::tree(root))
    }

    fn of(root: i32, tasks: Vec<i32>) -> Result<Self> {
        Task::open(root).with_context(|| format!("pid {root}"))?;
        let mut tree = Self { tasks, sockets: Vec::new(), in_flight: Vec::new() };
        // Who asks for its own shell has this program, with all its duplicates, in the tree.
        tree.tasks.retain(|pid| *pid != std::process::id().cast_signed());
        let mut known = HashMap::new();
        for pid in tree.tasks.clone() {
            tree.add(pid, &mut known).with_context(|| format!("pid {pid}"))?;
        }
        Ok(tree)
    }

    /// `known` tells which socket has an inode; `None` for one that is not TCP's.
    fn add(&mut self, pid: i32, known: &mut HashMap<u64, Option<usize>>) -> Result<()> {
        // A descendant that has ended meanwhile has no sockets.
        let Ok(task) = Task::open(pid) else { return Ok(()) };
        let found = match task.sockets() {
            Err(_) if task.gone() => return Ok(()),
            found => found.context("cannot list its descriptors")?,
        };
        for (number, inode) in found {
            let owner = Owner { pid, fd: number.0 };
            match known.get(&inode) {
                Some(Some(at)) => self.sockets[*at].owners.push(owner),
                Some(None) => {}
                None => {
                    known.insert(inode, self.add_socket(&task, number, inode)?);
                }
            }
        }
        Ok(())
    }

    fn add_socket(&mut self, task: &Task, number: RemoteFd, inode: u64) -> Result<Option<usize>> {
        let owner = Owner { pid: task.pid, fd: number.0 };
        let fd = match task.copy(number) {
            // Closed meanwhile.
            Err(error) if error.errno == nix::errno::Errno::EBADF || task.gone() => return Ok(None),
            fd => fd?,
        };
        if in_flight::is_unix(fd.as_fd()) {
            let descriptors = queued_descriptors(owner);
            if descriptors > 0 {
                self.in_flight.push(InFlight { socket: owner, descriptors });
            }
            return Ok(None);
        }
        let multipath = sockopt::protocol(fd.as_fd()) == Ok(libc::IPPROTO_MPTCP);
        if !multipath && !sockopt::is_tcp(fd.as_fd()) {
            return Ok(None);
        }
        self.sockets.push(Socket { fd, inode, multipath, owners: vec![owner] });
        Ok(Some(self.sockets.len() - 1))
    }
}

/// How many descriptors wait in a unix socket's queue; 0 also before Linux 5.10, which does not tell.
fn queued_descriptors(Owner { pid, fd }: Owner) -> u32 {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let count = info.lines().find_map(|line| line.strip_prefix("scm_fds:"));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// The states of sockets that are connections or wait for them.
pub const LISTEN: u8 = 10;
pub const CLOSE: u8 = 7;

impl Socket {
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    pub fn info(&self) -> SysResult<Info> {
        tcp::info(self.fd())
    }

    pub fn local(&self) -> SysResult<SocketAddr> {
        addr::local(self.fd())
    }

    /// Both ends, if there are two.
    pub fn tuple(&self) -> Option<FourTuple> {
        soccr::repair::four_tuple(self.fd()).ok().filter(|tuple| tuple.remote.port() != 0)
    }

    pub fn ns(&self) -> Result<NetNs> {
        Ok(NetNs::of_socket(self.fd())?)
    }

    /// By what a message calls it.
    pub fn name(&self) -> String {
        match (self.tuple(), self.local()) {
            (Some(tuple), _) => tuple.to_string(),
            (None, Ok(local)) => local.to_string(),
            (None, Err(_)) => format!("socket:[{}]", self.inode),
        }
    }
}

/// RFC 9293's name of a state.
pub fn state_name(state: u8) -> String {
    match State::try_from(state) {
        Ok(state) => state.to_string(),
        Err(UnsupportedState(LISTEN)) => "LISTEN".into(),
        Err(UnsupportedState(3 | 12)) => "SYN_RECEIVED".into(),
        Err(UnsupportedState(6)) => "TIME_WAIT".into(),
        Err(UnsupportedState(other)) => format!("state {other}"),
    }
}

/// The descriptors that lead to a socket, for people.
pub fn owners(owners: &[Owner]) -> String {
    let words: Vec<String> =
        owners.iter().map(|owner| format!("pid {} fd {}", owner.pid, owner.fd)).collect();
    words.join(", ")
}
