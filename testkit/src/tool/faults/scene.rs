//! A stage with an echo server on it, whose clients never rest.

use std::cell::Cell;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use soccr_testkit::server::reuses;
use soccr_testkit::sockets::{Queues, tcp_sockets};
use soccr_testkit::stage::{PATIENCE, V4, V6};
use soccr_testkit::task::wait_until;
use soccr_testkit::waiting::Waiting;
use soccr_testkit::{Client, Criu, Fleet, Lock, Pace, Place, Server, Side, Stage};

/// Who carries the connections.
pub const PLUGIN: Side = Side::Plugin(Lock::Nftables);
/// The buffers of connections whose queues are to be full soon.
const SMALL: usize = 16 << 10;

/// The programs under test.
pub struct Tools {
    pub criu: Criu,
    /// The plugin in which faults can be injected.
    pub faulty: PathBuf,
}

impl Tools {
    pub fn find(criu: Criu) -> Result<Self> {
        let faulty = crate::target("plugins-fault");
        let faulty = std::env::var_os("SOCCR_FAULT_PLUGIN_DIR").map_or(faulty, PathBuf::from);
        criu.with_plugins(&faulty).check(true).context("scripts/build --with-faults makes it")?;
        Ok(Self { criu, faulty: faulty.canonicalize()? })
    }
}

pub struct Scene<'a> {
    pub tools: &'a Tools,
    stage: Stage,
    /// Of the next server.
    port: Cell<u16>,
}

impl Deref for Scene<'_> {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        &self.stage
    }
}

impl<'a> Scene<'a> {
    /// Connections over IPv6 have ECN, the others do not.
    pub fn new(tools: &'a Tools, place: Place) -> Result<Self> {
        let stage = Stage::new(&tools.criu, place)?;
        let device = if place == Place::Dumped { "br0" } else { "eth0" };
        stage.peer.ip(&format!("route add {V6}/128 dev {device} features ecn"))?;
        Ok(Self { tools, stage, port: Cell::new(7000) })
    }

    /// An echo server with small buffers on both addresses, and so many clients of it.
    pub fn small(&self, count: usize) -> Result<(Server, Vec<Client>)> {
        let small = SMALL.to_string();
        self.start(&["--rcvbuf", &small, "--sndbuf", &small], count, |server| {
            Client::connect_small(server, SMALL)
        })
    }

    /// The same with buffers of the usual size.
    pub fn plain(&self, count: usize) -> Result<(Server, Vec<Client>)> {
        self.start(&[], count, Client::connect)
    }

    /// Each server has a port of its own: connections without SO_REUSEADDR hold theirs for a while after its death.
    fn start(
        &self,
        args: &[&str],
        count: usize,
        connect: fn(SocketAddr) -> Result<Client>,
    ) -> Result<(Server, Vec<Client>)> {
        let port = self.port.replace(self.port.get() + 1);
        let [v4, v6] = [V4, V6].map(|address| SocketAddr::new(address.parse().expect("an address"), port));
        let (also, late) = (v6.to_string(), late(v4).to_string());
        let args = [&["--reuse-half", "--also", &also, "--also", &late, "--late"], args].concat();
        let server = self.serve(&v4.to_string(), &args)?;
        let clients = self.connect_all(&[v4, v6], count, connect)?;
        Ok((server, clients))
    }

    /// Clients that the server does not accept yet.
    pub fn connect_waiting(&self, server: &Server, count: u8) -> Result<Vec<Waiting>> {
        Waiting::connect_all(self, server, late(server.address), count)
    }

    /// Makes clients busy, and waits until the queues of the first `full` are full on both sides. Each other one sends
    /// and reads once in `period`.
    pub fn busy(
        &self,
        server: &Server,
        clients: Vec<Client>,
        full: usize,
        period: Duration,
    ) -> Result<Fleet<Client>> {
        let clients = clients.into_iter().enumerate().map(|(nth, client)| client.greedy(nth < full));
        let fleet = Fleet::echoes(clients.collect(), Pace { period, parts: 10 })?;
        wait_until("the queues are full", PATIENCE, || Ok(Queues::of(&[server.pid()])?.full >= full))?;
        Ok(fleet)
    }

    /// Restores with the plugin as it is shipped.
    pub fn restore_all(&self, images: &Path, address: SocketAddr) -> Result<Server> {
        let (task, _) = self.restore(PLUGIN, images)?.restore()?;
        Ok(Server::restored(address, task, self.dir()))
    }

    /// What a user does who finds something orphaned. Whether that was so.
    pub fn clean_orphans(&self) -> Result<bool> {
        let found = self.status()?.has("orphaned");
        if found {
            let said = self.soccr(&["clean", "--orphans"])?;
            let left = self.status()?;
            ensure!(!left.has("orphaned"), "soccr clean --orphans said {said} and left {left}");
        }
        Ok(found)
    }

    /// What he does who finds a lock of CRIU's, while nothing is to be restored. Whether that was so.
    pub fn clean_locks(&self) -> Result<bool> {
        let found = self.status()?.has_strays();
        if found {
            let said = self.soccr(&["clean", "--stock-rules", "--netns", &self.host().path()])?;
            let left = self.status()?;
            ensure!(!left.has_strays(), "soccr clean --stock-rules said {said} and left {left}");
        }
        Ok(found)
    }

    /// Nothing is left of a case whose server lives or is gone for good.
    pub fn check_spotless(&self, server: Option<&Server>) -> Result<()> {
        let status = self.status()?;
        ensure!(status.is_empty(), "soccr status is not empty: {status}");
        // A keeper looks for its lock once a second.
        wait_until("no keeper is left", PATIENCE, || Ok(self.keepers()?.is_empty()))?;
        self.check_clean(server)?;
        let sockets = server.map_or(Ok(Vec::new()), |server| tcp_sockets(server.pid()))?;
        for (socket, peer) in sockets.iter().filter_map(|socket| Some((socket, socket.peer()?))) {
            let has = socket.option(libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
            let had = i32::from(reuses(peer));
            ensure!(has == had, "SO_REUSEADDR of the connection with {peer} is {has}, it was {had}");
        }
        Ok(())
    }
}

/// Where a server accepts nobody before it is told to.
fn late(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip(), address.port() + 1000)
}
