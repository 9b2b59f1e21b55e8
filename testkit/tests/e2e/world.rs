//! The stage of a test: namespaces, a folder for images, CRIU, and the way through a freeze.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;
use soccr_testkit::netns::{End, veth};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Client, Criu, Lock, NetNs, Server, Side, Task, leftovers, task};
use tempfile::TempDir;

pub const STOCK: Side = Side::Stock(Lock::Nftables);
pub const STOCK_IPTABLES: Side = Side::Stock(Lock::Iptables);
pub const PLUGIN: Side = Side::Plugin(Lock::Nftables);
pub const PLUGIN_IPTABLES: Side = Side::Plugin(Lock::Iptables);

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

/// Two hosts on one wire: `host` with 10.9.0.1, fd09::1 and fe80::1, `peer` with 10.9.0.2,
/// fd09::2 and fe80::2.
pub struct World {
    pub criu: Criu,
    /// Where the server runs, except where CRIU dumps that namespace too.
    pub host: Option<NetNs>,
    /// Where the clients run.
    pub peer: NetNs,
    /// Where CRIU runs.
    outer: Option<NetNs>,
    place: Place,
    dir: TempDir,
    dumps: u32,
}

pub const SERVER_V4: &str = "10.9.0.1:0";

impl World {
    /// `None`, after saying so, where the test cannot run.
    pub fn new(place: Place, sides: &[Side]) -> Result<Option<Self>> {
        let criu = Criu::from_env();
        let with_plugin = sides.iter().any(|side| matches!(side, Side::Plugin(_)));
        if let Err(why) = needs(&criu, with_plugin) {
            ensure!(std::env::var_os("SOCCR_TEST_REQUIRE").is_none_or(|it| it != "1"), "{why:#}");
            // Not by a macro, whose output the test runner would hide.
            writeln!(std::io::stderr(), "SKIPPED: {why:#}")?;
            return Ok(None);
        }
        task::become_subreaper()?;
        let (host, peer) = (NetNs::new()?, NetNs::new()?);
        wire(place, &host, &peer)?;
        let outer = if place == Place::External { Some(NetNs::new()?) } else { None };
        let dir = TempDir::with_prefix("soccr-e2e-")?;
        Ok(Some(Self { criu, host: Some(host), peer, outer, place, dir, dumps: 0 }))
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn host(&self) -> &NetNs {
        self.host.as_ref().expect("the server's namespace is still the one we made")
    }

    /// A server at an address of the host, see [`Server::start`].
    pub fn serve(&self, address: &str, args: &[&str]) -> Result<Server> {
        let address: SocketAddr = address.parse()?;
        Server::start(self.host(), address, self.dir(), args)
    }

    /// A client on the other host.
    pub fn connect(&self, server: SocketAddr) -> Result<Client> {
        self.peer.run(|| Client::connect(server))
    }

    /// A fresh folder for images.
    pub fn images(&mut self) -> Result<PathBuf> {
        self.dumps += 1;
        let images = self.dir().join(format!("images-{}", self.dumps));
        std::fs::create_dir(&images)?;
        Ok(images)
    }

    /// Dumps the server, sees its processes go, restores it, and looks for anything left behind.
    pub fn freeze_and_thaw(&mut self, server: Server, dump: Side, restore: Side) -> Result<Server> {
        let images = self.images()?;
        let address = server.address;
        self.dump(server, dump, &images)?;
        let server = self.restore(address, restore, &images)?;
        self.wait_until_clean(&server)?;
        Ok(server)
    }

    pub fn dump(&mut self, server: Server, side: Side, images: &Path) -> Result<()> {
        let pid = server.pid();
        let mut call = self.criu.dump(side, pid, images);
        match self.place {
            Place::Host => call = call.inside(self.host()),
            Place::External => {
                let inode = self.host().inode();
                call = call.inside(self.outer()).args(["--external", &format!("net[{inode}]:inner")]);
            }
            Place::Dumped => call = call.inside(&self.peer).args(["--external", VETH]),
        }
        call.dump_and_wait(server.task)?;
        if self.place == Place::Dumped {
            // With its last process the namespace goes, and its end of the wire, at some time; the name must
            // be free before the restore. Where nothing is there to delete, that has happened.
            self.host = None;
            let _ = self.peer.ip("link del wire");
        }
        Ok(())
    }

    pub fn restore(&mut self, address: SocketAddr, side: Side, images: &Path) -> Result<Server> {
        let call = self.criu.restore(side, images);
        let call = match self.place {
            Place::Host => call.inside(self.host()),
            Place::External => call.inside(self.outer()).inherit(self.host(), "inner")?,
            Place::Dumped => call.inside(&self.peer).args(["--external", VETH]),
        };
        let (task, _) = call.restore()?;
        if self.place == Place::Dumped {
            self.host = Some(NetNs::of(task.pid())?);
        }
        Ok(Server::restored(address, task, self.dir()))
    }

    /// Nothing is left on either host and in the server. The plugin's agent may outlive criu by a
    /// moment.
    pub fn wait_until_clean(&self, server: &Server) -> Result<()> {
        let pids = server.task.tree();
        self.wait_until_clean_but(|| pids.iter().copied().try_for_each(leftovers::no_repair))
    }

    /// Nothing is left on either host.
    pub fn wait_until_hosts_clean(&self) -> Result<()> {
        self.wait_until_clean_but(|| Ok(()))
    }

    fn wait_until_clean_but(&self, also: impl Fn() -> Result<()>) -> Result<()> {
        let mut last = Ok(());
        let waited = wait_until("nothing is left behind", PATIENCE, || {
            last = self.check_hosts().and_then(|()| also());
            Ok(last.is_ok())
        });
        last.and(waited)
    }

    /// No rule, no agent.
    fn check_hosts(&self) -> Result<()> {
        for ns in [Some(self.host()), Some(&self.peer), self.outer.as_ref()].into_iter().flatten() {
            leftovers::no_rules(ns)?;
        }
        let agents = self.processes("soccr-agent")?;
        ensure!(agents.is_empty(), "the plugin's agent still runs: {agents:?}");
        Ok(())
    }

    /// The processes of criu calls of this test that have this name.
    fn processes(&self, name: &str) -> Result<Vec<Pid>> {
        let dir = self.dir().as_os_str().as_bytes();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            // A process may end while we look.
            let text = |file| std::fs::read(path.join(file)).unwrap_or_default();
            let is_of_test = || text("cmdline").windows(dir.len()).any(|part| part == dir);
            if text("comm").trim_ascii() == name.as_bytes()
                && is_of_test()
                && let Some(pid) = path.file_name().and_then(|it| it.to_str()).and_then(|it| it.parse().ok())
            {
                found.push(Pid::from_raw(pid));
            }
        }
        Ok(found)
    }

    fn outer(&self) -> &NetNs {
        self.outer.as_ref().expect("made for this place")
    }
}

/// A criu that is killed leaves helpers of its own, which it started to learn about the kernel.
impl Drop for World {
    fn drop(&mut self) {
        for pid in self.processes("criu").unwrap_or_default() {
            drop(Task::adopt(pid));
        }
    }
}

/// What `--external` says of the wire whose inner end is in a dumped namespace.
const VETH: &str = "veth[eth0]:wire@br0";

fn wire(place: Place, host: &NetNs, peer: &NetNs) -> Result<()> {
    let server = ["10.9.0.1/24", "fd09::1/64", "fe80::1/64"];
    let client = ["10.9.0.2/24", "fd09::2/64", "fe80::2/64"];
    if place != Place::Dumped {
        let a = End { ns: host, name: "eth0", addresses: &server };
        return veth(a, End { ns: peer, name: "eth0", addresses: &client });
    }
    // CRIU makes the wire anew and puts its outer end back on a bridge.
    peer.ip("link add br0 type bridge")?;
    peer.ip("link set br0 up addrgenmode none")?;
    for address in client {
        peer.ip(&format!("addr add {address} dev br0 {}", if address.contains(':') { "nodad" } else { "" }))?;
    }
    let a = End { ns: host, name: "eth0", addresses: &server };
    veth(a, End { ns: peer, name: "wire", addresses: &[] })?;
    peer.ip("link set wire master br0")
}

fn needs(criu: &Criu, with_plugin: bool) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "this test needs root");
    criu.check(with_plugin).context("this test needs CRIU")
}

/// The time that a stuck test may take.
pub const PATIENCE: Duration = Duration::from_secs(15);
