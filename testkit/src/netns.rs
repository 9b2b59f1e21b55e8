//! Network namespaces without names: each lives as long as its descriptor and what runs inside.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{self, Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace, held by a descriptor.
#[derive(Debug)]
pub struct NetNs {
    fd: OwnedFd,
    inode: u64,
}

impl NetNs {
    /// A new namespace whose loopback is up.
    pub fn new() -> Result<Self> {
        let made = thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET).context("unshare(CLONE_NEWNET)")?;
                    Self::current()
                })
                .join()
                .expect("the thread that makes a namespace does not panic")
        })?;
        made.ip("link set lo up")?;
        Ok(made)
    }

    /// A new one where only marked packets pass: for connections whose other end does not exist.
    pub fn locked() -> Result<Self> {
        const RULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../libsoccr/tests/lock.nft");
        let made = Self::new()?;
        let status = made.command("nft").args(["-f", RULES]).status().context("cannot run nft")?;
        ensure!(status.success(), "nft -f {RULES}: {status}");
        Ok(made)
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace of a process.
    pub fn of(pid: nix::unistd::Pid) -> Result<Self> {
        Self::open(&format!("/proc/{pid}/ns/net"))
    }

    fn open(path: &str) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {path}"))?;
        let inode = file.metadata()?.ino();
        Ok(Self { fd: file.into(), inode })
    }

    /// The same namespace once more.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { fd: self.fd.try_clone()?, inode: self.inode })
    }

    /// The inode number, which is how CRIU names a namespace (`net[INODE]`).
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// A path that leads any process of this machine to the namespace while `self` lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", process::id(), self.fd.as_raw_fd())
    }

    /// Runs `work` on a thread inside the namespace; sockets made there stay there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.fd, CloneFlags::CLONE_NEWNET).expect("setns into a namespace of ours");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run inside the namespace. `self` must live until it is spawned.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.enter(&mut command);
        command
    }

    /// Makes `command` run inside the namespace.
    pub fn enter(&self, command: &mut Command) {
        let fd: RawFd = self.fd.as_raw_fd();
        // SAFETY: between fork and exec only setns() is called, which is async-signal-safe; the
        // descriptor is open in the child, which is a copy of a process that holds it.
        unsafe {
            command.pre_exec(move || Ok(setns(BorrowedFd::borrow_raw(fd), CloneFlags::CLONE_NEWNET)?));
        }
    }

    /// Runs `ip ARGS` inside the namespace.
    pub fn ip(&self, args: &str) -> Result<()> {
        let out = self
            .command("ip")
            .args(args.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .context("cannot run ip (package iproute2)")?;
        if !out.status.success() {
            bail!("ip {args}: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(())
    }

    /// The processes inside the namespace.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut inside = Vec::new();
        for entry in fs::read_dir("/proc").context("cannot read /proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process may end while we look.
            if fs::metadata(entry.path().join("ns/net")).is_ok_and(|ns| ns.ino() == self.inode) {
                inside.push(pid);
            }
        }
        Ok(inside)
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One end of a [`veth`] pair or a [`crate::relay::Relay`]: where, the interface's name, its addresses with prefix length.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The namespace.
    pub ns: &'a NetNs,
    /// The interface's name.
    pub name: &'a str,
    /// `ADDRESS/PREFIX`; an IPv6 address is usable at once (`nodad`).
    pub addresses: &'a [&'a str],
}

/// Connects two namespaces by a pair of virtual Ethernet devices. IPv6 link-local addresses are
/// those given, none is made up.
pub fn veth(a: End<'_>, b: End<'_>) -> Result<()> {
    a.ns.ip(&format!("link add {} type veth peer name {} netns {}", a.name, b.name, b.ns.path()))?;
    a.bring_up()?;
    b.bring_up()
}

impl End<'_> {
    pub(crate) fn bring_up(&self) -> Result<()> {
        let name = self.name;
        self.ns.ip(&format!("link set {name} addrgenmode none"))?;
        self.ns.ip(&format!("link set {name} up"))?;
        for address in self.addresses {
            let nodad = if address.contains(':') { "nodad" } else { "" };
            self.ns.ip(&format!("addr add {address} dev {name} {nodad}"))?;
        }
        Ok(())
    }
}
