//! Where everything happens: a server in one network namespace, its clients in another, criu in either or in a third;
//! images and records of their own.

use std::cell::Cell;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::Client;
use crate::criu::{Call, Criu, RUN_DIR, Side};
use crate::leftovers;
use crate::netns::{End, NetNs, veth};
use crate::server::{Server, sibling_binary};
use crate::task::{Task, children, name_and_state, wait_until};

/// How long a connection may be silent, and anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The server's address in its namespace.
pub const V4: &str = "10.9.0.1";
/// The other one.
pub const V6: &str = "fd09::1";

/// What the server's network is to CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// CRIU runs in the server's namespace: the host's, as CRIU sees it.
    Host,
    /// CRIU runs elsewhere and is told that the server's namespace is external (as runc does).
    External,
    /// CRIU runs elsewhere, dumps the server's namespace and makes it anew.
    Dumped,
}

/// Two hosts, and who freezes the first.
#[derive(Debug)]
pub struct Stage {
    /// Keeps its records here.
    pub criu: Criu,
    /// Where the clients run.
    pub peer: NetNs,
    /// Where the server runs; nowhere while CRIU has dumped that namespace.
    host: Option<NetNs>,
    /// Where CRIU runs, if in neither.
    outer: Option<NetNs>,
    place: Place,
    dir: PathBuf,
    images: Cell<u32>,
    _temporary: Option<TempDir>,
}

impl Stage {
    /// Two hosts on one wire: the server's with 10.9.0.1, fd09::1 and fe80::1, the clients' with 10.9.0.2, fd09::2 and
    /// fe80::2.
    pub fn new(criu: &Criu, place: Place) -> Result<Self> {
        let dir = TempDir::with_prefix("soccr-test-")?;
        let mut stage = Self::wired(criu, place, dir.path())?;
        stage._temporary = Some(dir);
        Ok(stage)
    }

    /// The same with this folder, which stays.
    pub fn wired(criu: &Criu, place: Place, dir: &Path) -> Result<Self> {
        let mut stage = Self::unwired(criu, dir)?;
        stage.place = place;
        stage.wire()?;
        if place == Place::External {
            stage.outer = Some(NetNs::new()?);
        }
        Ok(stage)
    }

    /// Two hosts without a wire, and this folder, which stays.
    pub fn unwired(criu: &Criu, dir: &Path) -> Result<Self> {
        Ok(Self {
            criu: criu.with_records(&dir.join("run")),
            peer: NetNs::new()?,
            host: Some(NetNs::new()?),
            outer: None,
            place: Place::Host,
            dir: dir.to_owned(),
            images: Cell::new(0),
            _temporary: None,
        })
    }

    /// One host, where the clients run too, and this folder, which stays.
    pub fn alone(criu: &Criu, dir: &Path) -> Result<Self> {
        let mut stage = Self::unwired(criu, dir)?;
        stage.peer = stage.host().try_clone()?;
        Ok(stage)
    }

    fn wire(&self) -> Result<()> {
        let (v4, v6) = (format!("{V4}/24"), format!("{V6}/64"));
        let server = [v4.as_str(), &v6, "fe80::1/64"];
        let client = ["10.9.0.2/24", "fd09::2/64", "fe80::2/64"];
        let host = End { ns: self.host(), name: "eth0", addresses: &server };
        let peer = End { ns: &self.peer, name: "eth0", addresses: &client };
        if self.place != Place::Dumped {
            return veth(host, peer);
        }
        // CRIU makes the wire anew and puts its outer end back on a bridge.
        self.peer.ip("link add br0 type bridge")?;
        veth(host, End { name: "wire", addresses: &[], ..peer })?;
        self.peer.ip("link set wire master br0")?;
        End { name: "br0", ..peer }.bring_up()
    }

    /// The server's namespace.
    ///
    /// # Panics
    /// While CRIU has dumped it.
    pub fn host(&self) -> &NetNs {
        self.host.as_ref().expect("the server's namespace is there")
    }

    /// Where CRIU runs.
    pub fn outside(&self) -> &NetNs {
        match self.place {
            Place::Host => self.host(),
            Place::External => self.outer.as_ref().expect("made for this place"),
            Place::Dumped => &self.peer,
        }
    }

    /// The folder for everything.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the plugin keeps its records of dumps.
    pub fn records(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Puts the folder into memory, so that a disk's moods are not measured.
    pub fn keep_in_memory(&self) -> Result<()> {
        let options = Some("mode=0700,size=1g");
        mount(Some("none"), &self.dir, Some("tmpfs"), MsFlags::empty(), options).context("tmpfs")
    }

    /// A fresh folder for images; those of the time before are removed.
    pub fn images(&self) -> Result<PathBuf> {
        let folder = |nth| self.dir.join(format!("images-{nth}"));
        let nth = self.images.get() + 1;
        self.images.set(nth);
        for stale in [folder(nth - 1), folder(nth)] {
            let _ = fs::remove_dir_all(stale);
        }
        let images = folder(nth);
        fs::create_dir_all(&images).with_context(|| format!("cannot make {}", images.display()))?;
        Ok(images)
    }

    /// A server at an address of the host, see [`Server::start`].
    pub fn serve(&self, address: &str, args: &[&str]) -> Result<Server> {
        Server::start(self.host(), address.parse()?, &self.dir, args)
    }

    /// A client on the other host.
    pub fn connect(&self, server: SocketAddr) -> Result<Client> {
        self.peer.run(|| Client::connect(server))
    }

    /// So many clients, of each address of the server in turn.
    pub fn connect_all(
        &self,
        servers: &[SocketAddr],
        count: usize,
        connect: impl Fn(SocketAddr) -> Result<Client> + Sync,
    ) -> Result<Vec<Client>> {
        self.peer.run(|| (0..count).map(|nth| connect(servers[nth % servers.len()])).collect())
    }

    /// Any other call of criu, where criu runs.
    pub fn criu_command(&self) -> Command {
        let mut command = self.outside().command(self.criu.bin());
        self.criu.set_up(&mut command);
        command
    }

    /// A dump of the tree that starts at `pid`.
    pub fn dump<'a>(&'a self, side: Side, pid: Pid, images: &'a Path) -> Call<'a> {
        let call = self.criu.dump(side, pid, images).inside(self.outside());
        match self.place {
            Place::Host => call,
            Place::External => call.args(["--external", &format!("net[{}]:inner", self.host().inode())]),
            Place::Dumped => call.args(["--external", VETH]),
        }
    }

    /// A restore of what [`Self::dump`] has dumped.
    pub fn restore<'a>(&'a self, side: Side, images: &'a Path) -> Result<Call<'a>> {
        self.place_restore(self.criu.restore(side, images))
    }

    /// The same by a criu that stays until its tasks have ended.
    pub fn restore_in_front<'a>(&'a self, side: Side, images: &'a Path) -> Result<Call<'a>> {
        self.place_restore(self.criu.call("restore", side, images))
    }

    fn place_restore<'a>(&'a self, call: Call<'a>) -> Result<Call<'a>> {
        let call = call.inside(self.outside());
        Ok(match self.place {
            Place::Host => call,
            Place::External => call.inherit(self.host(), "inner")?,
            Place::Dumped => call.args(["--external", VETH]),
        })
    }

    /// Dumps the server and sees its processes go; its address.
    pub fn freeze(&mut self, server: Server, side: Side, images: &Path) -> Result<SocketAddr> {
        self.dump(side, server.pid(), images).dump_and_wait(server.task)?;
        if self.place == Place::Dumped {
            // With its last process the namespace goes, and its end of the wire, at some time; the name must
            // be free before the restore. Where nothing is there to delete, that has happened.
            self.host = None;
            let _ = self.peer.ip("link del wire");
        }
        Ok(server.address)
    }

    /// Restores the server.
    pub fn thaw(&mut self, address: SocketAddr, side: Side, images: &Path) -> Result<Server> {
        let (task, _) = self.restore(side, images)?.restore()?;
        if self.place == Place::Dumped {
            self.host = Some(NetNs::of(task.pid())?);
        }
        Ok(Server::restored(address, task, &self.dir))
    }

    /// Both, and a look at what is left behind.
    pub fn freeze_and_thaw(&mut self, server: Server, dump: Side, restore: Side) -> Result<Server> {
        let images = self.images()?;
        let address = self.freeze(server, dump, &images)?;
        let server = self.thaw(address, restore, &images)?;
        if self.place == Place::External && matches!((dump, restore), (Side::Plugin(_), Side::Stock(_))) {
            self.clean_path()?;
        }
        self.wait_until_clean(Some(&server))?;
        Ok(server)
    }

    /// Stock CRIU does not know the plugin's lock on the way to other namespaces. Here nothing passes there, from which the
    /// keeper would learn that the connections live again.
    fn clean_path(&self) -> Result<()> {
        let status = self.status()?;
        let [id] = status.ids()[..] else { bail!("the lock on the way has no record of its own: {status}") };
        self.soccr(&["clean", id]).map(drop)
    }
}

/// The name of who holds packets between a dump and its restore.
pub const KEEPER: &str = "soccr-keeper";

/// What `--external` says of the wire whose inner end is in a dumped namespace.
const VETH: &str = "veth[eth0]:wire@br0";

/// What is left behind, and the end of it.
impl Stage {
    /// Waits until nothing is left in either namespace, of criu, and in the server.
    pub fn wait_until_clean(&self, server: Option<&Server>) -> Result<()> {
        self.wait_until_quiet()?;
        let mut last = Ok(());
        let waited = wait_until("nothing is left behind", PATIENCE, || {
            last = self.check_clean(server);
            Ok(last.is_ok())
        });
        last.and(waited)
    }

    /// No rule, no process of criu's, no socket in repair mode.
    pub fn check_clean(&self, server: Option<&Server>) -> Result<()> {
        self.namespaces().try_for_each(leftovers::no_rules)?;
        server.map_or(Ok(()), |server| server.task.tree().into_iter().try_for_each(leftovers::no_repair))?;
        let left = self.processes()?;
        ensure!(left.is_empty(), "processes are left: {left:?}");
        Ok(())
    }

    /// Every namespace that is there.
    pub fn namespaces(&self) -> impl Iterator<Item = &NetNs> {
        [self.host.as_ref(), Some(&self.peer), self.outer.as_ref()].into_iter().flatten()
    }

    /// What criu or one of its plugins has started and what runs still.
    pub fn processes(&self) -> Result<Vec<Process>> {
        let mark = format!("{RUN_DIR}={}", self.records().display()).into_bytes();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // A process may end while we look.
            let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
            let pid = Pid::from_raw(pid);
            if environ.split(|byte| *byte == 0).any(|word| word == mark)
                && let Some((name, state)) = name_and_state(pid)
            {
                found.push(Process { pid, name, state });
            }
        }
        Ok(found)
    }

    /// The processes of the plugin.
    pub fn agents(&self) -> Result<Vec<Process>> {
        let mut found = self.processes()?;
        let works = |name: &str| name.starts_with("soccr-") && name != KEEPER;
        found.retain(|process| works(&process.name) && process.state != 'Z');
        Ok(found)
    }

    /// Who holds packets between a dump and its restore.
    pub fn keepers(&self) -> Result<Vec<Process>> {
        let mut found = self.processes()?;
        found.retain(|process| process.name == KEEPER && process.state != 'Z');
        Ok(found)
    }

    /// Waits until nobody works on the server any more. An agent that somebody has stopped is continued. A criu that was
    /// killed leaves helpers of its own, which it started to learn about the kernel, and tasks that it had just begun
    /// to restore: they are ended.
    pub fn wait_until_quiet(&self) -> Result<()> {
        let mut agents = Vec::new();
        let waited = wait_until("nobody is at work", PATIENCE, || {
            agents = self.agents()?;
            for agent in agents.iter().filter(|agent| agent.state == 'T') {
                let _ = kill(agent.pid, Signal::SIGCONT);
            }
            Ok(agents.is_empty())
        });
        if let Err(error) = waited {
            bail!("{error:#}; {agents:?} still at work");
        }
        for process in self.processes()? {
            if process.name == "criu" {
                drop(Task::adopt(process.pid));
            }
        }
        Ok(())
    }

    /// Reaps what criu has left to us, but not `keep`.
    pub fn reap(&self, keep: Option<Pid>) -> Result<()> {
        for pid in children()? {
            if Some(pid) != keep && name_and_state(pid).is_some_and(|(_, state)| state == 'Z') {
                let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            }
        }
        Ok(())
    }

    /// After a failure the next begins anew.
    pub fn sweep(&self) -> Result<()> {
        for process in self.processes()? {
            let _ = kill(process.pid, Signal::SIGKILL);
        }
        self.reap(None)?;
        let _ = fs::remove_dir_all(self.records());
        for ns in self.namespaces() {
            ns.command("nft").args(["flush", "ruleset"]).status().context("cannot run nft")?;
        }
        Ok(())
    }

    /// Runs `soccr ARGS` where criu runs, as a user would.
    pub fn soccr(&self, args: &[&str]) -> Result<String> {
        let mut command: Command = self.outside().command(sibling_binary("soccr")?);
        let out = command.args(args).env(RUN_DIR, self.records()).output()?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(out.status.success(), "soccr {}: {}\n{said}{complaint}", args.join(" "), out.status);
        Ok(said)
    }

    /// What `soccr status` says of this stage: it finds the locks of others, too.
    pub fn status(&self) -> Result<Status> {
        let mut status: Value = serde_json::from_str(&self.soccr(&["status", "--json"])?)?;
        let ours: Vec<_> = self.namespaces().map(NetNs::inode).collect();
        let strays = status["strays"].as_array_mut().context("soccr status tells of strays")?;
        strays.retain(|it| it["ino"].as_u64().is_none_or(|ino| ours.contains(&ino)));
        Ok(Status(status))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for process in self.processes().unwrap_or_default() {
            drop(Task::adopt(process.pid));
        }
        // Fails where nothing is mounted.
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

/// A process that criu or one of its plugins has made.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its id.
    pub pid: Pid,
    /// What `/proc` calls it.
    pub name: String,
    /// As `/proc` shows it: `T` is stopped.
    pub state: char,
}

/// What `soccr status` says.
#[derive(Debug)]
pub struct Status(Value);

impl Status {
    /// The states of the records.
    pub fn states(&self) -> Vec<String> {
        let records = self.0["records"].as_array();
        records.into_iter().flatten().map(|it| it["state"].as_str().unwrap_or("?").to_owned()).collect()
    }

    /// The ids of the records.
    pub fn ids(&self) -> Vec<&str> {
        let records = self.0["records"].as_array();
        records.into_iter().flatten().filter_map(|it| it["id"].as_str()).collect()
    }

    /// Whether a record is in this state.
    pub fn has(&self, state: &str) -> bool {
        self.states().iter().any(|it| it == state)
    }

    /// Whether there are locks that no record tells of.
    pub fn has_strays(&self) -> bool {
        self.0["strays"].as_array().is_none_or(|strays| !strays.is_empty())
    }

    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        let none = |key: &str| self.0[key].as_array().is_some_and(Vec::is_empty);
        none("records") && none("unreadable") && !self.has_strays()
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
