//! The stage of a soak: server, bad network, clients; and one cycle of freeze and thaw.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use soccr_testkit::interrupt::pause;
use soccr_testkit::netns::End;
use soccr_testkit::relay::{Passed, Relay, Weather};
use soccr_testkit::sockets::Queues;
use soccr_testkit::task::{Task, wait_until};
use soccr_testkit::{NetNs, Side, Stage, leftovers};

use crate::soak::fleet::{Clients, PATIENCE, Progress, Totals};

const SERVER_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1);

/// Where IPv4 sockets are.
const PORT: u16 = 7001;
/// Where IPv6 sockets are, which also take IPv4-mapped connections.
const PORT_V6: u16 = 7002;

/// The longest freeze between dump and restore, and the longest run between restore and dump.
const FREEZE: Duration = Duration::from_secs(2);
const RUN: Duration = Duration::from_millis(1500);

/// The share of connections that is ended, and replaced, after each cycle, and the share that is
/// ended just before a dump, which then finds FINs and last bytes under way.
const CHURN: f64 = 0.1;
const ENDING: f64 = 0.05;

/// The table of [`nft_drop`].
const DROP_TABLE: &str = "soak_weather";

/// Each host's end of the wire.
const WIRE: &str = "soak";

/// What is to be soaked, and how.
pub struct Setting {
    pub side: Side,
    pub connections: usize,
    pub weather: Weather,
    /// A rule of the kernel's loses packets, too.
    pub nft_drop: bool,
    /// The kernel loses, delays and reorders what leaves either host.
    pub netem: bool,
    pub pcap: Option<PathBuf>,
}

pub struct Soak<'a> {
    side: Side,
    stage: &'a Stage,
    rng: Rng,
    // Ended in this order: the clients, their server, the network.
    clients: Clients<'a>,
    task: Option<Task>,
    relay: Relay,
}

/// What one cycle showed.
pub struct Cycle {
    /// Connections that were dumped and restored.
    pub carried: usize,
    /// Those of them with bytes to read, and with bytes to send or not acknowledged.
    pub unread: usize,
    pub unacked: usize,
    /// How long criu took.
    pub dump: Duration,
    pub restore: Duration,
    /// How soon the connections went on.
    pub progress: Progress,
}

impl<'a> Soak<'a> {
    /// The stage has two hosts without a wire.
    pub fn new(setting: &Setting, stage: &'a Stage) -> Result<Self> {
        let relay = network(setting, stage)?;
        if setting.nft_drop {
            nft_drop(stage.host())?;
        }
        if setting.netem {
            netem(stage.host())?;
            netem(&stage.peer)?;
        }
        let also = format!("[::]:{PORT_V6}");
        let args = ["--also", &also, "--mode", "ordered", "--processes", "2"];
        let server = stage.serve(&format!("0.0.0.0:{PORT}"), &args)?;
        let v6 = SocketAddr::from((SERVER_V6, PORT_V6));
        let mapped = SocketAddr::from((SERVER_V4, PORT_V6)); // IPv4 to a listener of IPv6
        let addresses = [SocketAddr::from((SERVER_V4, PORT)), v6, mapped];
        let seed = setting.weather.seed;
        let clients = Clients::start(&stage.peer, &addresses, setting.connections, seed)?;
        let rng = Rng::with_seed(seed ^ 1);
        Ok(Self { side: setting.side, stage, rng, clients, task: Some(server.task), relay })
    }

    /// Dump at a random moment, a random pause, restore, and a look at every connection.
    pub fn cycle(&mut self) -> Result<Cycle> {
        pause(RUN.mul_f64(self.rng.f64()))?;
        let task = self.task.take().context("the server runs")?;
        let pid = task.pid();
        let queues = Queues::of(&task.tree())?;
        self.clients.retire(ENDING);
        let (stage, images) = (self.stage, self.stage.images()?);

        let dump = stage.dump(self.side, pid, &images).dump_and_wait(task)?;
        pause(FREEZE.mul_f64(self.rng.f64()))?;
        ensure!(!self.rules()?.is_empty(), "the lock of the dump is gone before the restore");
        self.clients.mark();
        let (task, restore) = stage.restore(self.side, &images)?.restore()?;
        let restored = Instant::now();
        self.task = Some(task);

        let progress = self.clients.progress(restored)?;
        for process in self.task.iter().flat_map(Task::tree) {
            leftovers::no_repair(process)?;
        }
        let rules = self.rules()?;
        ensure!(rules.is_empty(), "firewall rules were left behind:\n{}", rules.join("\n"));
        Ok(Cycle {
            carried: queues.connections,
            unread: queues.unread,
            unacked: queues.unacked,
            dump: dump.took,
            restore: restore.took,
            progress,
        })
    }

    /// Some connections end, others begin.
    pub fn churn(&mut self) -> Result<()> {
        self.clients.retire(CHURN);
        self.clients.fill_up()
    }

    pub fn totals(&self) -> Totals {
        self.clients.totals()
    }

    /// Ends all connections in order, then the server and the network.
    pub fn finish(self) -> Result<(Totals, Passed)> {
        let totals = self.clients.finish()?;
        let task = self.task.context("the server runs")?;
        // It complains, if at all, when a connection ends.
        wait_until("the server has seen every end", PATIENCE, || {
            Ok(Queues::of(&task.tree())?.connections == 0)
        })?;
        drop(task);
        Ok((totals, self.relay.stop()?))
    }

    /// The rules of both namespaces, but for that of [`nft_drop`].
    fn rules(&self) -> Result<Vec<String>> {
        let mut rules = Vec::new();
        for ns in self.stage.namespaces() {
            rules.append(&mut leftovers::rules(ns)?);
        }
        rules.retain(|rule| !rule.contains(DROP_TABLE));
        Ok(rules)
    }
}

fn network(setting: &Setting, stage: &Stage) -> Result<Relay> {
    let (a4, a6) = (format!("{SERVER_V4}/24"), format!("{SERVER_V6}/64"));
    let a = End { ns: stage.host(), name: WIRE, addresses: &[&a4, &a6] };
    let b = End { ns: &stage.peer, name: WIRE, addresses: &["10.99.0.2/24", "fd99::2/64"] };
    Relay::start(a, b, setting.weather, setting.pcap.as_deref())
}

/// The kernel loses a packet in a hundred as it comes in, before anything else sees it.
fn nft_drop(ns: &NetNs) -> Result<()> {
    let rules = format!(
        "add table inet {DROP_TABLE}\n\
         add chain inet {DROP_TABLE} in {{ type filter hook prerouting priority -400; }}\n\
         add rule inet {DROP_TABLE} in numgen random mod 100 < 1 drop\n"
    );
    let mut nft =
        ns.command("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().context("cannot run nft")?;
    nft.stdin.take().context("stdin is a pipe")?.write_all(rules.as_bytes())?;
    ensure!(nft.wait()?.success(), "nft refuses a rule with numgen");
    Ok(())
}

fn netem(ns: &NetNs) -> Result<()> {
    let mut tc = ns.command("tc");
    tc.args(["qdisc", "add", "dev", WIRE, "root", "netem"]);
    tc.args(["loss", "1%", "delay", "10ms", "reorder", "1%", "limit", "10000"]);
    ensure!(tc.status().context("cannot run tc")?.success(), "tc refuses netem");
    Ok(())
}

/// # Errors
/// When the folder cannot be emptied.
pub fn fresh_folder(path: &Path) -> Result<PathBuf> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot empty {}", path.display()));
        }
        _ => fs::create_dir_all(path)?,
    }
    Ok(path.canonicalize()?)
}
