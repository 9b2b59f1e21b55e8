//! `make demo-migrate`: a server with busy clients moves between two hosts, its addresses with it.
//!
//! Client and hosts are network namespaces on one bridge; each host has images, records and locks of its own. The server
//! is restored at once when its addresses are there, or as where that takes longer (a container's network is set up, the
//! images are fetched): when the clients have sent to them already. Who has nothing locked then answers with RST; else it
//! is a matter of luck.
//!
//! The same move by podman's export and import is `scripts/runtimes`' to make; its rounds are shown with these.

mod podman;
mod report;

use std::fs;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use soccr_testkit::fleet::{Fleet, Pace};
use soccr_testkit::stage::{V4, V6};
use soccr_testkit::task::{self, wait_until};
use soccr_testkit::{Capture, Criu, Lan, Lock, Side, Task, Way, interrupt, leftovers};

use crate::demo::load::Client;
use crate::demo::server;
use crate::{Programs, target};
use report::{Moved, Report, Row};

/// Moves a real server with live clients from one host to another and back, beside stock CRIU
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    programs: Programs,
    /// For report.svg, and the images and logs; what is in there is replaced
    #[arg(long, value_name = "DIR", default_value_os_t = target("migrate"))]
    out: PathBuf,
    /// How many clients, every other one over IPv6
    #[arg(long, value_name = "N", default_value = "200")]
    clients: NonZeroUsize,
    /// How many moves
    #[arg(long, value_name = "N", default_value = "4")]
    moves: NonZeroUsize,
    /// The small server that comes with soccr, also where redis-server is installed
    #[arg(long)]
    builtin: bool,
    /// Only the plugin with soccr hold
    #[arg(long)]
    ours_only: bool,
    /// The report.json of scripts/runtimes, whose moves are shown with these
    #[arg(long, value_name = "FILE")]
    podman: Option<PathBuf>,
}

/// One row of the report.
#[derive(Clone, Copy)]
struct Trial {
    way: Way,
    /// The clients send to the new host before anything is restored there.
    late: bool,
}

const HELD: Way = Way { side: Side::Plugin(Lock::Nftables), hold: true };
const UNHELD: Way = Way { side: Side::Plugin(Lock::Nftables), hold: false };
const STOCK: Way = Way { side: Side::Stock(Lock::Nftables), hold: false };
const OURS: [Trial; 2] = [Trial { way: HELD, late: false }, Trial { way: HELD, late: true }];
const ALL: [Trial; 5] = [
    OURS[0],
    Trial { way: STOCK, late: false },
    OURS[1],
    Trial { way: UNHELD, late: true },
    Trial { way: STOCK, late: true },
];

/// As often as 200 clients can that shall leave something of the machine to CRIU, and lose the capture no packet.
const PACE: Pace = Pace { period: Duration::from_millis(20), parts: 4 };
/// Questions that each client has under way at most: enough that it always sends, however long nobody answers.
const DEPTH: usize = 1000;
/// Answers that each client gets between two moves.
const BETWEEN: u64 = 25;
/// A client without an answer for so long is lost.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(options: &Options) -> Result<()> {
    let criu = options.programs.find(true)?;
    match fs::remove_dir_all(&options.out) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot empty {}", options.out.display()));
        }
        _ => fs::create_dir_all(&options.out)?,
    }
    let out = options.out.canonicalize()?;
    let mut report = Report::default();
    let trials: &[_] = if options.ours_only { &OURS } else { &ALL };
    for (nth, trial) in trials.iter().enumerate() {
        let row =
            measure(&criu, &out.join(nth.to_string()), *trial, options).with_context(|| trial.name())?;
        report.rows.push(row);
        task::no_children(Duration::from_secs(5))?;
    }
    if let Some(file) = &options.podman {
        report.rows.extend(podman::rows(file)?);
    }
    println!("\n{}", report.text());
    let svg = out.join("report.svg");
    fs::write(&svg, report.svg())?;
    println!("drawn in {}", svg.display());
    ensure!(report.is_good(), "a connection was lost, or something was left behind, see above");
    Ok(())
}

/// All moves of a trial, while a client lives. Where stock fails, that is its result.
fn measure(criu: &Criu, dir: &Path, trial: Trial, options: &Options) -> Result<Row> {
    let way = trial.way;
    let mut lan = Lan::new(criu, dir)?;
    let count = options.clients.get();
    let addresses: Vec<IpAddr> = vec![V4.parse()?, V6.parse()?];
    let (name, mut server, listen) = server::start(lan.here(), &addresses, count, options.builtin)?;
    println!("{}: {name}, {count} clients at {V4} and {V6}", trial.name());
    let connect = |i| Client::connect(listen[i % listen.len()], i, DEPTH);
    let clients: Vec<_> = lan.client.run(|| (0..count).map(connect).collect::<Result<_>>())?;
    let load = Fleet::start(clients, PACE);

    let mut row = Row { name: trial.name(), clients: count, held: way.hold, ..Row::default() };
    for nth in 0..options.moves.get() {
        interrupt::check()?;
        everyone_answered(&load, BETWEEN);
        if load.members().iter().all(|member| member.error.is_some()) {
            break;
        }
        match one_move(&mut lan, server, trial, &load)? {
            Ok((moved, restored)) => {
                println!("  {} {}", report::arrow(nth), moved.text(count));
                row.moves.push(moved);
                server = restored;
            }
            Err(error) if matches!(way.side, Side::Plugin(_)) => return Err(error),
            Err(error) => {
                println!("  {} failed: {error:#}", report::arrow(nth));
                row.failure = Some(format!("{error:#}"));
                break;
            }
        }
    }
    load.end(PATIENCE);
    for (i, member) in load.take().iter().enumerate() {
        if let Some(why) = member.error.as_ref().filter(|_| way.hold) {
            println!("  client {i} is lost: {why:#}");
        }
        let Client { lost, duplicated, .. } = member.client;
        row.wrong += lost + duplicated + u64::from(member.waits());
    }
    row.left = left_behind(&lan, way)?;
    Ok(row)
}

/// The inner error is that of the move, the outer one of who measures it.
fn one_move(
    lan: &mut Lan,
    server: Task,
    trial: Trial,
    load: &Fleet<Client>,
) -> Result<Result<(Moved, Task)>> {
    let (capture, at_target) = (Capture::start(&lan.client)?, Capture::start(lan.there().host())?);
    let living = load.members().iter().filter(|member| member.error.is_none()).count();
    let have_sent = || wait_until("the clients send", PATIENCE, || Ok(at_target.segments() >= living));
    load.members().iter_mut().for_each(|member| member.client.silence = Duration::ZERO);
    let start = Instant::now();
    let server = match lan.migrate(server, trial.way, || if trial.late { have_sent() } else { Ok(()) }) {
        Ok(server) => server,
        Err(error) => return Ok(Err(error)),
    };
    let took = start.elapsed();
    let _ = at_target.stop(); // whether it has lost some is of no interest
    everyone_answered(load, 1);
    let mut silences = Vec::new();
    for member in load.members().iter_mut().filter(|member| member.error.is_none()) {
        silences.push(member.client.silence);
    }
    Ok(Ok((Moved::new(took, silences, capture.stop()?.resets.len()), server)))
}

/// Waits until every client that lives has got so many answers more; those that have not in time are lost.
fn everyone_answered(load: &Fleet<Client>, more: u64) {
    let wanted: Vec<_> = load.members().iter().map(|member| member.client.value() + more).collect();
    let behind = |load: &Fleet<Client>| {
        let members = load.members();
        let living = members.iter().zip(&wanted).filter(|(member, _)| member.error.is_none());
        living.filter(|(member, wanted)| member.client.value() < **wanted).count()
    };
    if wait_until("every client has its answers", PATIENCE, || Ok(behind(load) == 0)).is_ok() {
        return;
    }
    for (member, wanted) in load.members().iter_mut().zip(&wanted) {
        if member.error.is_none() && member.client.value() < *wanted {
            member.error = Some(anyhow::anyhow!("no answer for {PATIENCE:?}"));
        }
    }
}

/// What is on the hosts when all is over, which is to be nothing but where stock was at work.
fn left_behind(lan: &Lan, way: Way) -> Result<usize> {
    let hosts = [lan.here(), lan.there()];
    if way.side == STOCK.side {
        return hosts.iter().try_fold(0, |sum, host| Ok(sum + leftovers::rules(host.host())?.len()));
    }
    for host in hosts {
        host.wait_until_clean(None)?;
        let status = host.status()?;
        if !status.is_empty() {
            bail!("{}: {status}", host.dir().display());
        }
    }
    Ok(0)
}

impl Trial {
    fn name(self) -> String {
        let way = match self.way {
            Way { side: Side::Plugin(_), hold: true } => "soccr with hold",
            Way { side: Side::Plugin(_), hold: false } => "soccr without hold",
            Way { side: Side::Stock(_), .. } => "stock CRIU",
        };
        let when = if self.late { "after the clients have sent" } else { "at once" };
        format!("{way}, restored {when}")
    }
}
