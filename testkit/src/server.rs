//! Starts `soccr-test server`, the program that the tests dump.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::netns::NetNs;
use crate::task::{Task, pid_of, wait_readable};

/// How long a server may take for anything but a restore.
const PATIENCE: Duration = Duration::from_secs(15);

/// A running `soccr-test server`.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its process tree.
    pub task: Task,
    report: PathBuf,
}

impl Server {
    /// Starts a server in `ns` that listens on `address` (port 0: any) and does what `args` say,
    /// see `soccr-test server --help`. Its complaints go to a file in `dir`.
    pub fn start<S: AsRef<OsStr>>(
        ns: &NetNs,
        address: SocketAddr,
        dir: &Path,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let mut command = ns.command(sibling_binary("soccr-test")?);
        command.args(["server", "--listen"]).arg(address.to_string()).args(args);
        Self::spawn(&mut command, dir)
    }

    /// Starts one by a command that begins with it, or with somebody who starts it.
    pub fn spawn(command: &mut Command, dir: &Path) -> Result<Self> {
        let report = dir.join("server.err");
        let (address, task) = spawn(command, &report)?;
        Ok(Self { address, task, report })
    }

    /// The same server after a restore.
    pub fn restored(address: SocketAddr, task: Task, dir: &Path) -> Self {
        Self { address, task, report: dir.join("server.err") }
    }

    /// The root's process id.
    pub fn pid(&self) -> Pid {
        self.task.pid()
    }

    /// Tells a server that was started with `--hold` to read.
    pub fn release(&self) -> Result<()> {
        self.task.signal(Signal::SIGUSR1)
    }

    /// Waits until a server with `--conns` has seen all its streams to the end and exits.
    pub fn wait_verified(self) -> Result<()> {
        let status = self.task.wait(PATIENCE)?;
        let said = fs::read_to_string(&self.report).unwrap_or_default();
        match status {
            WaitStatus::Exited(_, 0) => Ok(()),
            other => bail!("the server ended with {other:?}:\n{said}"),
        }
    }
}

/// For servers: says on standard output that they are up, and closes that, because a dump cannot
/// take its other end along.
pub fn say_ready(address: SocketAddr) -> Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "ready {address}")?;
    stdout.flush()?;
    let null = File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

/// Starts the program in a session of its own, with nothing on its standard streams that a dump
/// could stumble over once it is up, and reads the one line it says then.
fn spawn(command: &mut Command, report: &Path) -> Result<(SocketAddr, Task)> {
    let errors = File::options().create(true).append(true).open(report)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
    let mut child = command.spawn().context("cannot start soccr-test server")?;
    let mut task = Task::adopt(pid_of(&child));
    let line = first_line(&mut child)
        .with_context(|| format!("the server said: {}", fs::read_to_string(report).unwrap_or_default()))?;
    task.note_tree(); // a server may have a child by now
    let address = line.strip_prefix("ready ").with_context(|| format!("{line:?} is not an address"))?;
    Ok((address.parse()?, task))
}

/// Everything up to the end of standard output: the server closes it when it is up.
fn first_line(child: &mut Child) -> Result<String> {
    let mut stdout = child.stdout.take().context("stdout is a pipe")?;
    ensure!(wait_readable(&stdout.as_fd(), PATIENCE)?, "the server does not come up");
    let mut line = String::new();
    stdout.read_to_string(&mut line)?;
    Ok(line.trim().to_owned())
}

/// Whether a server started with `--reuse-half` leaves SO_REUSEADDR on in its connection with `peer`. Linux gives clients
/// even ports first, so the last bit tells nothing.
pub fn reuses(peer: SocketAddr) -> bool {
    peer.port() & 2 == 0
}

/// A program of this crate: next to the running one, or one folder up from a test.
pub fn sibling_binary(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe().context("the path of this program")?;
    let found = me.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.exists());
    found.with_context(|| format!("no {name} near {} (cargo build -p soccr-testkit)", me.display()))
}
