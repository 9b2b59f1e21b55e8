//! Stock CRIU under the same random instants, to compare: connections lost, and what stays on the host.

use std::time::Duration;

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use soccr_testkit::criu::Call;
use soccr_testkit::sockets::tcp_sockets;
use soccr_testkit::stage::PATIENCE;
use soccr_testkit::task::{Task, wait_until};
use soccr_testkit::{Client, Fleet, Lock, Place, Server, Side, leftovers};

use crate::faults::instants::kill_at;
use crate::faults::scene::{Scene, Tools};

const CONNECTIONS: usize = 100;
const INSTANTS: usize = 20;
const PERIOD: Duration = Duration::from_millis(100);
/// After this a connection of a server that runs is called lost.
const SILENCE: Duration = Duration::from_secs(5);

#[derive(Default)]
struct Totals {
    lived_whole: usize,
    lived_crippled: usize,
    restored: usize,
    breakpoint: usize,
    unrestorable: usize,
    lost: usize,
    rules: usize,
    in_repair: usize,
}

pub fn run(tools: &Tools, seed: u64) -> Result<()> {
    for lock in [Lock::Iptables, Lock::Nftables] {
        let mut rng = Rng::with_seed(seed);
        let whole = duration(tools, lock)?;
        let mut totals = Totals::default();
        for _ in 0..INSTANTS {
            once(tools, lock, whole.mul_f64(rng.f64()), &mut totals)?;
        }
        totals.print(lock, whole);
    }
    Ok(())
}

impl Totals {
    fn print(&self, lock: Lock, whole: Duration) {
        let name = lock.name();
        println!("stock criu dump --tcp-established --network-lock {name}, a whole dump takes {whole:?}:");
        println!("  criu killed {INSTANTS} times, {CONNECTIONS} connections each; the server");
        println!("    lived on with all connections   {}", self.lived_whole);
        println!("    lived on with dead connections  {}", self.lived_crippled);
        println!("    was dead and restored           {}", self.restored);
        println!("    was dead and not restorable     {}", self.unrestorable);
        println!("    died of CRIU's own breakpoint   {}", self.breakpoint);
        println!("  connections lost (without the breakpoint's) {}", self.lost);
        println!("  rules and tables left on the host           {}", self.rules);
        println!("  sockets left in repair mode                 {}", self.in_repair);
    }
}

fn dump<'a>(scene: &'a Scene, lock: Lock, pid: Pid, images: &'a std::path::Path) -> Call<'a> {
    scene.dump(Side::Stock(lock), pid, images).quiet()
}

fn start(scene: &Scene) -> Result<(Server, Fleet<Client>)> {
    let (server, clients) = scene.plain(CONNECTIONS)?;
    let fleet = scene.busy(&server, clients, 0, PERIOD)?;
    Ok((server, fleet))
}

fn duration(tools: &Tools, lock: Lock) -> Result<Duration> {
    let scene = Scene::new(tools, Place::Host)?;
    scene.keep_in_memory()?;
    let images = scene.images()?;
    let (server, fleet) = start(&scene)?;
    let took = dump(&scene, lock, server.pid(), &images).dump_and_wait(server.task)?.took;
    drop(fleet);
    Ok(took)
}

fn once(tools: &Tools, lock: Lock, instant: Duration, totals: &mut Totals) -> Result<()> {
    let scene = Scene::new(tools, Place::Host)?;
    scene.keep_in_memory()?;
    let images = scene.images()?;
    let (server, fleet) = start(&scene)?;
    let (mut criu, _) = dump(&scene, lock, server.pid(), &images).spawn()?;
    kill_at(&mut criu, instant)?;
    scene.wait_until_quiet()?;
    wait_until("the server is traced no more", PATIENCE, || Ok(!server.task.is_traced()))?;
    settle(&scene, lock, server, fleet, &images, totals).context("after stock criu was killed")?;
    totals.rules += leftovers::rules(scene.host())?.len();
    scene.reap(None)
}

fn settle(
    scene: &Scene,
    lock: Lock,
    server: Server,
    fleet: Fleet<Client>,
    images: &std::path::Path,
    totals: &mut Totals,
) -> Result<()> {
    if server.task.is_alive()? {
        // A server that is about to die has no table of descriptors any more.
        let sockets = tcp_sockets(server.pid()).unwrap_or_default();
        let lost = fleet.stop(SILENCE).lost.len();
        if server.task.is_alive()? {
            for socket in sockets {
                totals.in_repair += usize::from(socket.in_repair()?);
            }
            totals.lost += lost;
            *(if lost == 0 { &mut totals.lived_whole } else { &mut totals.lived_crippled }) += 1;
        } else {
            totals.breakpoint += 1;
        }
        return Ok(());
    }
    if server.task.end()? == Some(Signal::SIGTRAP) {
        totals.breakpoint += 1;
        drop(fleet);
        return Ok(());
    }
    server.task.wait(PATIENCE)?;
    match scene.restore(Side::Stock(lock), images)?.restore() {
        Ok((task, _)) => {
            totals.lost += fleet.stop(SILENCE).lost.len();
            totals.restored += 1;
            drop::<Task>(task);
        }
        Err(_) => {
            drop(fleet);
            totals.lost += CONNECTIONS;
            totals.unrestorable += 1;
        }
    }
    Ok(())
}
