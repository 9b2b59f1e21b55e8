//! Where a fault happens: a server in one network namespace, its clients in another, records and images of their own.

use std::cell::Cell;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use soccr_testkit::criu::Call;
use soccr_testkit::netns::{End, veth};
use soccr_testkit::server::reuses;
use soccr_testkit::sockets::{state, tcp_sockets};
use soccr_testkit::task::{Task, wait_until};
use soccr_testkit::{Client, Criu, Lock, NetNs, Server, Side, leftovers};
use tempfile::TempDir;

use crate::faults::fleet::Fleet;
use crate::faults::tools::{Marked, RUN_DIR, Status, Tools, marked, name_and_state};

/// How long a connection may be silent, and anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Who carries the connections.
pub const PLUGIN: Side = Side::Plugin(Lock::Nftables);
/// The buffers of connections whose queues are to be full soon.
const SMALL: usize = 16 << 10;

pub const V4: &str = "10.9.0.1";
pub const V6: &str = "fd09::1";

pub struct Stage<'a> {
    pub tools: &'a Tools,
    pub host: NetNs,
    pub peer: NetNs,
    dir: TempDir,
    made: u32,
    /// Of the next server.
    port: Cell<u16>,
}

impl<'a> Stage<'a> {
    pub fn new(tools: &'a Tools) -> Result<Self> {
        let (host, peer) = (NetNs::new()?, NetNs::new()?);
        let (v4, v6) = (format!("{V4}/24"), format!("{V6}/64"));
        veth(
            End { ns: &host, name: "eth0", addresses: &[&v4, &v6] },
            End { ns: &peer, name: "eth0", addresses: &["10.9.0.2/24", "fd09::2/64"] },
        )?;
        let dir = TempDir::with_prefix("soccr-faults-")?;
        Ok(Self { tools, host, peer, dir, made: 0, port: Cell::new(7000) })
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn records(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// An echo server with small buffers on both addresses.
    pub fn serve(&self) -> Result<Server> {
        let small = SMALL.to_string();
        self.serve_with(&["--rcvbuf", &small, "--sndbuf", &small])
    }

    /// The same with buffers of the usual size.
    pub fn serve_plain(&self) -> Result<Server> {
        self.serve_with(&[])
    }

    /// Each server has a port of its own: connections without SO_REUSEADDR hold theirs for a while after its death.
    fn serve_with(&self, args: &[&str]) -> Result<Server> {
        let port = self.port.replace(self.port.get() + 1);
        let also = SocketAddr::new(V6.parse()?, port).to_string();
        let args = [&["--reuse-half", "--also", &also], args].concat();
        Server::start(&self.host, SocketAddr::new(V4.parse()?, port), self.dir(), args)
    }

    /// Connections with buffers of the usual size to both addresses of the server in turn.
    pub fn connect_plain(&self, server: &Server, count: usize) -> Result<Vec<Client>> {
        let v4 = server.address;
        let v6 = SocketAddr::new(V6.parse()?, v4.port());
        self.peer.run(|| (0..count).map(|nth| Client::connect([v4, v6][nth % 2])).collect::<Result<_>>())
    }

    /// Puts the folder of the images into memory, so that a disk's moods are not measured.
    pub fn keep_in_memory(&self) -> Result<()> {
        let options = Some("mode=0700,size=1g");
        mount(Some("none"), self.dir(), Some("tmpfs"), MsFlags::empty(), options).context("tmpfs")
    }

    /// Connections to both addresses of the server in turn.
    pub fn connect(&self, server: &Server, count: usize) -> Result<Vec<Client>> {
        let v4 = server.address;
        let v6 = SocketAddr::new(V6.parse()?, v4.port());
        self.peer.run(|| {
            (0..count).map(|nth| Client::connect_small([v4, v6][nth % 2], SMALL)).collect::<Result<_>>()
        })
    }

    /// Makes clients busy, and waits until the queues of the first `full` are full on both sides.
    pub fn busy(
        &self,
        server: &Server,
        clients: Vec<Client>,
        full: usize,
        period: Duration,
    ) -> Result<Fleet> {
        let fleet = Fleet::start(clients, full, period)?;
        wait_until("the queues are full", PATIENCE, || {
            let mut filled = 0;
            for socket in tcp_sockets(server.pid())? {
                let connected = socket.state()? != state::LISTEN;
                filled += usize::from(connected && socket.unread()? > 0 && socket.unacked()? > 0);
            }
            Ok(filled >= full)
        })?;
        Ok(fleet)
    }

    /// A fresh folder for images; those of the time before are removed.
    pub fn images(&mut self) -> Result<PathBuf> {
        let folder = |nth| self.dir.path().join(format!("images-{nth}"));
        if self.made > 0 {
            let _ = fs::remove_dir_all(folder(self.made));
        }
        self.made += 1;
        let images = folder(self.made);
        fs::create_dir(&images)?;
        Ok(images)
    }

    pub fn dump<'c>(&'c self, criu: &'c Criu, pid: Pid, images: &'c Path) -> Call<'c> {
        criu.dump(PLUGIN, pid, images).inside(&self.host).env(RUN_DIR, self.records())
    }

    pub fn restore<'c>(&'c self, criu: &'c Criu, images: &'c Path) -> Call<'c> {
        criu.restore(PLUGIN, images).inside(&self.host).env(RUN_DIR, self.records())
    }

    /// Restores with the plugin as it is shipped.
    pub fn restore_all(&self, images: &Path, address: SocketAddr) -> Result<Server> {
        let (task, _) = self.restore(&self.tools.criu, images).restore()?;
        Ok(Server::restored(address, task, self.dir()))
    }

    pub fn status(&self) -> Result<Status> {
        self.tools.status(&self.host, &self.records())
    }

    /// Waits until nobody works on the server any more. An agent that the case has stopped is continued.
    pub fn wait_until_quiet(&self) -> Result<()> {
        let waited = wait_until("nobody is at work", PATIENCE, || {
            let mut agents = self.agents()?;
            for agent in agents.iter().filter(|agent| agent.state == 'T') {
                let _ = kill(agent.pid, Signal::SIGCONT);
            }
            agents.retain(|agent| agent.state != 'Z');
            Ok(agents.is_empty())
        });
        if let Err(error) = waited {
            bail!("{error:#}; {:?} still at work, status {}", marked(&self.records())?, self.status()?);
        }
        self.end_helpers()?;
        Ok(())
    }

    /// The processes of the plugin.
    pub fn agents(&self) -> Result<Vec<Marked>> {
        let mut found = marked(&self.records())?;
        found.retain(|process| process.name.starts_with("soccr-"));
        Ok(found)
    }

    /// A criu that is killed leaves helpers of its own, which it started to learn about the kernel, and tasks that it
    /// had just begun to restore.
    fn end_helpers(&self) -> Result<()> {
        for process in marked(&self.records())? {
            if process.name == "criu" {
                drop(Task::adopt(process.pid));
            }
        }
        Ok(())
    }

    /// Reaps what criu has left to us, but not `keep`.
    pub fn reap(&self, keep: Option<Pid>) -> Result<()> {
        for thread in fs::read_dir("/proc/self/task")? {
            let children = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
            for pid in children.split_whitespace().filter_map(|word| word.parse().ok()).map(Pid::from_raw) {
                if Some(pid) != keep && name_and_state(pid).is_some_and(|(_, state)| state == 'Z') {
                    let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
                }
            }
        }
        Ok(())
    }

    /// What a user does who finds something orphaned. Whether that was so.
    pub fn clean_orphans(&self) -> Result<bool> {
        let status = self.status()?;
        let found = status.has("orphaned");
        if found {
            let said = self.tools.soccr(&self.host, &self.records(), &["clean", "--orphans"])?;
            let left = self.status()?;
            ensure!(!left.has("orphaned"), "soccr clean --orphans said {said} and left {left}");
        }
        Ok(found)
    }

    /// Nothing is left of a case whose server lives or is gone for good.
    pub fn check_spotless(&self, server: Option<&Server>) -> Result<()> {
        let status = self.status()?;
        ensure!(status.is_empty(), "soccr status is not empty: {status}");
        leftovers::no_rules(&self.host)?;
        leftovers::no_rules(&self.peer)?;
        if let Some(server) = server {
            server.task.tree().into_iter().try_for_each(leftovers::no_repair)?;
            for socket in tcp_sockets(server.pid())? {
                if let Some(peer) = socket.peer() {
                    let has = socket.option(libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
                    let had = i32::from(reuses(peer));
                    ensure!(has == had, "SO_REUSEADDR of the connection with {peer} is {has}, it was {had}");
                }
            }
        }
        let left = marked(&self.records())?;
        ensure!(left.is_empty(), "processes are left: {left:?}");
        Ok(())
    }

    /// After a failed case the next one begins anew.
    pub fn sweep(&self) -> Result<()> {
        for process in marked(&self.records())? {
            let _ = kill(process.pid, Signal::SIGKILL);
        }
        self.reap(None)?;
        let _ = fs::remove_dir_all(self.records());
        for ns in [&self.host, &self.peer] {
            ns.command("nft").args(["flush", "ruleset"]).status().context("cannot run nft")?;
        }
        Ok(())
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        let _ = self.sweep();
        // Fails where nothing is mounted.
        let _ = umount2(self.dir(), MntFlags::MNT_DETACH);
    }
}
