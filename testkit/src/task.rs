//! Processes: waiting with a deadline, and guards that leave none behind.

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::interrupt;

/// Makes this process the parent of orphans among its descendants: what CRIU restores and leaves
/// then belongs to us, and a dumped process is reaped when we wait for it, not when PID 1 does.
pub fn become_subreaper() -> Result<()> {
    nix::sys::prctl::set_child_subreaper(true).context("PR_SET_CHILD_SUBREAPER")
}

/// A child that has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// How long it ran.
    pub took: Duration,
    /// What it used.
    pub usage: Usage,
}

/// What a process, and those that it has waited for, used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Time of processors, for itself and in the kernel.
    pub cpu: Duration,
    /// Bytes of memory at its peak (`VmHWM`).
    pub peak: u64,
}

/// Runs a command to its end, or kills it at the deadline.
pub fn run(command: &mut Command, limit: Duration) -> Result<Ended> {
    let name = command.get_program().to_string_lossy().into_owned();
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    let ended = pidfd_open(pid_of(&child)).and_then(|pidfd| wait_readable(&pidfd, limit));
    let took = start.elapsed();
    if !matches!(ended, Ok(true)) {
        child.kill().with_context(|| format!("cannot kill {name}"))?;
        child.wait()?;
        ended?;
        bail!("{name} was killed after {limit:?}");
    }
    let (status, usage) = reap(pid_of(&child))?;
    Ok(Ended { status, took, usage })
}

/// Waits for a child that has ended or will, and says what it used.
pub fn reap(pid: Pid) -> Result<(ExitStatus, Usage)> {
    let (mut status, mut usage) = (0, MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: the kernel writes an int and a struct rusage to where these two point.
    let reaped = unsafe { libc::wait4(pid.as_raw(), &raw mut status, 0, usage.as_mut_ptr()) };
    Errno::result(reaped).with_context(|| format!("wait4({pid})"))?;
    // SAFETY: zeroed before, and integers have no invalid values.
    let usage = unsafe { usage.assume_init() };
    let time = |it: libc::timeval| {
        let (seconds, micros) = (u64::try_from(it.tv_sec), u64::try_from(it.tv_usec));
        Duration::from_secs(seconds.unwrap_or(0)) + Duration::from_micros(micros.unwrap_or(0))
    };
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    let peak = u64::try_from(usage.ru_maxrss).unwrap_or(0) << 10;
    Ok((ExitStatus::from_raw(status), Usage { cpu, peak }))
}

/// A child's process id.
pub fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("the kernel's process ids are positive ints"))
}

/// The children of this process, orphans that came to it included.
pub fn children() -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for thread in fs::read_dir("/proc/self/task")? {
        let children = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        found.extend(children.split_whitespace().filter_map(|word| word.parse().ok()).map(Pid::from_raw));
    }
    Ok(found)
}

/// A descriptor that refers to the process, readable once it has ended.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = Errno::result(fd).with_context(|| format!("pidfd_open({pid})"))?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}

/// From `/proc/PID/stat`; `None` when the process is gone.
pub fn name_and_state(pid: Pid) -> Option<(String, char)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (start, rest) = stat.rsplit_once(')')?;
    let name = start.split_once('(')?.1.to_owned();
    Some((name, rest.trim_start().chars().next()?))
}

/// Waits until `fd` is readable; false at the deadline.
pub fn wait_readable(fd: &impl AsFd, limit: Duration) -> Result<bool> {
    let end = Instant::now() + limit;
    loop {
        interrupt::check()?;
        let left = end.saturating_duration_since(Instant::now());
        // A signal that comes just before poll() does not end it.
        let timeout = PollTimeout::try_from(left.min(Duration::from_millis(100)))?;
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).context("poll"),
        }
    }
}

/// Asks again and again, every few milliseconds, until `done` says so: for states that the kernel
/// shows but does not announce.
pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    while !done().with_context(|| format!("while waiting until {what}"))? {
        interrupt::check()?;
        if Instant::now() > end {
            bail!("waited {limit:?} in vain until {what}");
        }
        thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

/// A process tree of ours (a child, or a descendant's orphan that came to us as its subreaper),
/// killed and reaped when dropped.
#[derive(Debug)]
pub struct Task {
    pid: Pid,
    tree: Vec<Pid>,
}

impl Task {
    /// Takes charge of the process and of its present descendants.
    pub fn adopt(pid: Pid) -> Self {
        Self { pid, tree: tree(pid) }
    }

    /// The root's process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The root and its descendants as they are now.
    pub fn tree(&self) -> Vec<Pid> {
        tree(self.pid)
    }

    /// Whether the root has not ended.
    pub fn is_alive(&self) -> Result<bool> {
        Ok(!wait_readable(&pidfd_open(self.pid)?, Duration::ZERO)?)
    }

    /// Whether a debugger, or CRIU, has hold of the root.
    pub fn is_traced(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
    }

    /// The signal that ended the root, a child of ours that has not been waited for; `None` while it
    /// runs or where it exited.
    pub fn end(&self) -> Result<Option<Signal>> {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        Ok(match waitid(Id::Pid(self.pid), flags).with_context(|| format!("waitid({})", self.pid))? {
            WaitStatus::Signaled(_, signal, _) => Some(signal),
            _ => None,
        })
    }

    /// Sends a signal to each process of the tree.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        for pid in self.tree() {
            kill(pid, signal).with_context(|| format!("kill({pid}, {signal})"))?;
        }
        Ok(())
    }

    /// Waits until the whole tree has ended by itself, and reaps it. Only a killed or exited tree
    /// gives its process ids back to the kernel, so wait before restoring it.
    pub fn wait(mut self, limit: Duration) -> Result<WaitStatus> {
        self.note_tree();
        let mut root = None;
        for pid in std::mem::take(&mut self.tree) {
            match wait_for(pid, limit) {
                Ok(status) if pid == self.pid => root = Some(status),
                Ok(_) => {}
                Err(error) => {
                    self.tree = self.tree();
                    return Err(error);
                }
            }
        }
        root.context("the root is part of its tree")
    }

    /// Takes charge of descendants that are new since.
    pub fn note_tree(&mut self) {
        for pid in tree(self.pid) {
            if !self.tree.contains(&pid) {
                self.tree.push(pid);
            }
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.tree.is_empty() {
            return;
        }
        self.note_tree();
        for pid in &self.tree {
            // Gone already is as good.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        for pid in std::mem::take(&mut self.tree) {
            let _ = wait_for(pid, Duration::from_secs(5));
        }
    }
}

/// The process and all its descendants, parents first.
fn tree(root: Pid) -> Vec<Pid> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|word| word.parse().ok()).map(Pid::from_raw));
        }
    }
    found
}

/// Waits until a child of ours has ended and reaps it. An orphan becomes ours only when its parent
/// has died, so ECHILD may pass.
fn wait_for(pid: Pid, limit: Duration) -> Result<WaitStatus> {
    let end = Instant::now() + limit;
    match pidfd_open(pid) {
        Ok(fd) => {
            if !wait_readable(&fd, limit)? {
                bail!("process {pid} still runs after {limit:?}");
            }
        }
        Err(_) => return Ok(WaitStatus::StillAlive), // nobody has this number: reaped elsewhere
    }
    loop {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) if kill(pid, None).is_ok() => {}
            Ok(status) => return Ok(status),
            Err(Errno::ECHILD) => return Ok(WaitStatus::StillAlive),
            Err(error) => return Err(error).with_context(|| format!("waitpid({pid})")),
        }
        if Instant::now() > end {
            bail!("process {pid} has ended, but its parent does not reap it");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Makes `command` start a session of its own: CRIU dumps whole sessions.
pub fn in_own_session(command: &mut Command) {
    // SAFETY: between fork and exec only setsid() is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            Ok(())
        });
    }
}

/// Waits until this process has no child any more, be it an orphan that came to its subreaper, and
/// reaps each. Only for a program that waits for nothing else meanwhile.
pub fn no_children(limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    loop {
        match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return Ok(()),
            Err(error) => return Err(error).context("waitpid"),
            Ok(WaitStatus::StillAlive) if Instant::now() > end => {
                bail!("still running: {:?}", &tree(Pid::this())[1..]);
            }
            Ok(WaitStatus::StillAlive) => thread::sleep(Duration::from_millis(3)),
            Ok(_) => {}
        }
    }
}
