//! The stage: server, bad network, clients; and one cycle of freeze and thaw.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use nix::unistd::Pid;
use soccr_testkit::interrupt::pause;
use soccr_testkit::netns::End;
use soccr_testkit::relay::{Passed, Relay, Weather};
use soccr_testkit::sockets::{state, tcp_sockets};
use soccr_testkit::task::{Task, wait_until};
use soccr_testkit::{Criu, NetNs, Server, Side, leftovers};

use crate::soak::fleet::{Fleet, Progress, Totals};
use crate::soak::server::{PORT, PORT_V6};

const SERVER_V4: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1);

/// After a restore every connection must go on within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// The longest freeze between dump and restore, and the longest run between restore and dump.
const FREEZE: Duration = Duration::from_secs(2);
const RUN: Duration = Duration::from_millis(1500);

/// The share of connections that is ended, and replaced, after each cycle, and the share that is
/// ended just before a dump, which then finds FINs and last bytes under way.
const CHURN: f64 = 0.1;
const ENDING: f64 = 0.05;

/// Where the plugin keeps its records of dumps.
const RUN_DIR: &str = "SOCCR_RUN_DIR";

/// The table of [`nft_drop`].
const DROP_TABLE: &str = "soak_weather";

/// What is to be soaked, and how.
pub struct Setting<'a> {
    pub criu: &'a Criu,
    pub side: Side,
    pub out: &'a Path,
    pub connections: usize,
    pub weather: Weather,
    /// A rule of the kernel's loses packets, too.
    pub nft_drop: bool,
    pub pcap: Option<PathBuf>,
}

/// The two namespaces: the server's and the clients'.
pub struct Places {
    pub server: NetNs,
    pub clients: NetNs,
}

impl Places {
    pub fn new() -> Result<Self> {
        Ok(Self { server: NetNs::new()?, clients: NetNs::new()? })
    }
}

pub struct Stage<'a> {
    setting: &'a Setting<'a>,
    places: &'a Places,
    rng: Rng,
    // Ended in this order: the clients, their server, the network.
    fleet: Fleet<'a>,
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

impl<'a> Stage<'a> {
    pub fn new(setting: &'a Setting<'a>, places: &'a Places) -> Result<Self> {
        let relay = network(setting, places)?;
        if setting.nft_drop {
            nft_drop(&places.server)?;
        }
        let mut command = places.server.command(std::env::current_exe()?);
        command.args(["soak", "--serve"]);
        let server = Server::spawn(&mut command, setting.out)?;
        let v6 = SocketAddr::from((SERVER_V6, PORT_V6));
        let mapped = SocketAddr::from((SERVER_V4, PORT_V6)); // IPv4 to a listener of IPv6
        let addresses = [SocketAddr::from((SERVER_V4, PORT)), v6, mapped];
        let seed = setting.weather.seed;
        let fleet = Fleet::start(&places.clients, &addresses, setting.connections, seed)?;
        Ok(Self { setting, places, rng: Rng::with_seed(seed ^ 1), fleet, task: Some(server.task), relay })
    }

    /// Dump at a random moment, a random pause, restore, and a look at every connection.
    pub fn cycle(&mut self) -> Result<Cycle> {
        pause(RUN.mul_f64(self.rng.f64()))?;
        let task = self.task.take().context("the server runs")?;
        let pid = task.pid();
        let queues = Queues::of(&task)?;
        self.fleet.retire(ENDING);
        let images = fresh_folder(&self.setting.out.join("images"))?;

        let (criu, side, ns) = (self.setting.criu, self.setting.side, &self.places.server);
        // Records of our own: whoever cleans up those of this host shall not end these connections.
        let records = self.setting.out.join("records");
        let dump = criu.dump(side, pid, &images).env(RUN_DIR, &records).inside(ns).dump_and_wait(task)?;
        pause(FREEZE.mul_f64(self.rng.f64()))?;
        ensure!(!self.rules()?.is_empty(), "the lock of the dump is gone before the restore");
        self.fleet.mark();
        let (task, restore) = criu.restore(side, &images).env(RUN_DIR, &records).inside(ns).restore()?;
        let restored = Instant::now();
        self.task = Some(task);

        let progress = self.fleet.progress(restored, PATIENCE)?;
        for process in self.task.iter().flat_map(Task::tree) {
            leftovers::no_repair(process)?;
        }
        self.no_rules()?;
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
        self.fleet.retire(CHURN);
        self.fleet.fill_up()
    }

    pub fn totals(&self) -> Totals {
        self.fleet.totals()
    }

    /// Ends all connections in order, then the server and the network.
    pub fn finish(self) -> Result<(Totals, Passed)> {
        let totals = self.fleet.finish(PATIENCE * 2)?;
        let task = self.task.context("the server runs")?;
        // It complains, if at all, when a connection ends.
        wait_until("the server has seen every end", PATIENCE, || Ok(Queues::of(&task)?.connections == 0))?;
        drop(task);
        Ok((totals, self.relay.stop()?))
    }

    fn no_rules(&self) -> Result<()> {
        let rules = self.rules()?;
        ensure!(rules.is_empty(), "firewall rules were left behind:\n{}", rules.join("\n"));
        Ok(())
    }

    /// The rules of both namespaces, but for that of [`nft_drop`].
    fn rules(&self) -> Result<Vec<String>> {
        let mut rules = leftovers::rules(&self.places.server)?;
        rules.append(&mut leftovers::rules(&self.places.clients)?);
        rules.retain(|rule| !rule.contains(DROP_TABLE));
        Ok(rules)
    }
}

fn network(setting: &Setting<'_>, places: &Places) -> Result<Relay> {
    let (a4, a6) = (format!("{SERVER_V4}/24"), format!("{SERVER_V6}/64"));
    let a = End { ns: &places.server, name: "soak", addresses: &[&a4, &a6] };
    let b = End { ns: &places.clients, name: "soak", addresses: &["10.99.0.2/24", "fd99::2/64"] };
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

/// The connections of a process tree, and how many have something queued.
struct Queues {
    connections: usize,
    unread: usize,
    unacked: usize,
}

impl Queues {
    fn of(task: &Task) -> Result<Self> {
        let mut queues = Self { connections: 0, unread: 0, unacked: 0 };
        for process in task.tree() {
            queues.add(process)?;
        }
        Ok(queues)
    }

    fn add(&mut self, process: Pid) -> Result<()> {
        for socket in tcp_sockets(process)? {
            if socket.state()? != state::LISTEN {
                self.connections += 1;
                self.unread += usize::from(socket.unread()? > 0);
                self.unacked += usize::from(socket.unacked()? > 0);
            }
        }
        Ok(())
    }
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
