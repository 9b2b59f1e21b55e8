//! A server moves to another host with its addresses, while its clients send.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use soccr_testkit::peers::{ABSENCES, Peers};
use soccr_testkit::skip::in_time;
use soccr_testkit::stage::{V4, V6};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Capture, Client, Fleet, Lan, NetNs, Server, Way};
use tempfile::TempDir;

use crate::world::{BUSY, PATIENCE, PLUGIN, criu};

const CLIENTS: usize = 20;
const SLACK: Duration = Duration::from_millis(500);
/// For so much longer than the server is away a connect() may take.
const CALL_SLACK: Duration = Duration::from_millis(300);
/// For so long at least the server is nowhere.
const AWAY: Duration = Duration::from_millis(1000);

struct Scene {
    lan: Lan,
    server: Server,
    busy: Fleet<Client>,
    capture: Capture,
    dir: TempDir,
}

/// A server at this address of the first host, with busy clients; `None` where the test cannot run.
fn scene(address: &str) -> Result<Option<Scene>> {
    let Some(criu) = criu(&[PLUGIN])? else { return Ok(None) };
    let dir = TempDir::with_prefix("soccr-test-")?;
    let lan = Lan::new(&criu, dir.path())?;
    let server = lan.here().serve(address, &["--mode", "echo"])?;
    let capture = Capture::start(&lan.client)?;
    let clients = lan.here().connect_all(&[server.address], CLIENTS, Client::connect)?;
    Ok(Some(Scene { lan, server, busy: Fleet::echoes(clients, BUSY)?, capture, dir }))
}

/// There and back, twice.
fn moves_held(address: &str) -> Result<()> {
    let Some(scene) = scene(address)? else { return Ok(()) };
    to_and_fro(scene, is_clean)
}

/// Both hosts accept of TCP what begins a connection, and what conntrack takes for one's.
fn moves_held_through_firewalls(address: &str) -> Result<()> {
    let Some(scene) = scene(address)? else { return Ok(()) };
    for host in [scene.lan.here(), scene.lan.there()] {
        run(host.host(), &["nft", STATEFUL])?;
        run(host.host(), &["sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=0"])?;
    }
    to_and_fro(scene, |lan| {
        for host in [lan.here(), lan.there()] {
            let status = host.status()?;
            ensure!(status.is_empty(), "{}: {status}", host.dir().display());
        }
        Ok(())
    })
}

const STATEFUL: &str = "table inet stateful {
    chain input {
        type filter hook input priority filter
        ct state established accept
        tcp flags & (fin | syn | rst | ack) == syn accept
        meta l4proto tcp drop
    }
    chain output {
        type filter hook output priority filter
        meta l4proto tcp ct state invalid drop
    }
}";

fn run(host: &NetNs, command: &[&str]) -> Result<()> {
    let status = host.command(command[0]).args(&command[1..]).status()?;
    ensure!(status.success(), "{}: {status}", command.join(" "));
    Ok(())
}

fn to_and_fro(scene: Scene, is_clean: impl Fn(&Lan) -> Result<()>) -> Result<()> {
    let Scene { mut lan, mut server, busy, capture, dir } = scene;
    for _ in 0..4 {
        let at_target = Capture::start(lan.there().host())?;
        let way = Way { side: PLUGIN, hold: true };
        let started = Instant::now();
        let task = lan.migrate(server.task, way, || {
            wait_until("a client sends to the new host", PATIENCE, || {
                Ok(at_target.segments() > 0 && started.elapsed() > AWAY)
            })
        })?;
        server = Server::restored(server.address, task, dir.path());
        catches_up(&busy)?;
        at_target.stop()?;
        is_clean(&lan)?;
        all_flow(&busy)?;
    }
    let clients = busy.stop(PATIENCE).whole()?;
    let seen = capture.stop()?;
    ensure!(seen.resets.is_empty(), "{} resets, the first a {}", seen.resets.len(), seen.resets[0]);
    ensure!(clients.iter().all(|client| client.received() > 0), "a client never got anything");
    Ok(())
}

/// What clients have sent while the server moved is echoed before any of their timers could have brought it: the next
/// retransmission of one that has made two is 0.8 s away.
fn catches_up(busy: &Fleet<Client>) -> Result<()> {
    let took = busy.catch_up(PATIENCE)?;
    println!("all is echoed after {took:?}");
    ensure!(in_time(took, SLACK), "all is echoed after {took:?}");
    Ok(())
}

/// Whoever connects while the server moves, to either host, waits for no longer than it is away: not for the second after
/// which he would ask again. What the first host holds follows the address.
fn newcomers_wait(address: &str) -> Result<()> {
    let Some(criu) = criu(&[PLUGIN])? else { return Ok(()) };
    let dir = TempDir::with_prefix("soccr-test-")?;
    let mut lan = Lan::new(&criu, dir.path())?;
    let server = lan.here().serve(address, &["--mode", "echo"])?;
    let mut peers = Peers::start(&lan.client, server.address, CLIENTS, BUSY)?;
    peers.leave();
    let copies = lan.freeze(server.task, PLUGIN)?;
    peers.call()?;
    wait_until("somebody connects to the first host", PATIENCE, || connects(&lan.client))?;
    lan.carry(&copies, true)?;
    peers.wait(ABSENCES[0]);
    let _task = lan.thaw(&copies, PLUGIN)?;
    let noticed = peers.finish()?;
    lan.release(&copies)?;
    let (absence, made, refused) = (noticed.absence, noticed.calls.len(), noticed.refused());
    let longest = noticed.longest_call().map_or(Duration::ZERO, |call| call.took);
    println!("away for {absence:?}: {refused} of {made} refused, the longest call took {longest:?}");
    ensure!(noticed.lost.is_empty(), "lost: {:?}", noticed.lost);
    ensure!(made > 0 && refused == 0, "{refused} of {made} were refused: {:?}", noticed.calls);
    ensure!(in_time(longest, absence + CALL_SLACK), "away for {absence:?}: a call took {longest:?}");
    is_clean(&lan)
}

/// Whether a connect() waits in this namespace.
fn connects(ns: &NetNs) -> Result<bool> {
    const SYN_SENT: &str = "02";
    let tables =
        ns.run(|| ["tcp", "tcp6"].map(|it| fs::read_to_string(format!("/proc/thread-self/net/{it}"))));
    let tables = tables.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut sockets = tables.iter().flat_map(|table| table.lines().skip(1));
    Ok(sockets.any(|socket| socket.split_whitespace().nth(3) == Some(SYN_SENT)))
}

/// What a hold is for.
fn moves_unheld(address: &str) -> Result<()> {
    let Some(Scene { mut lan, server, busy, capture, dir: _dir }) = scene(address)? else { return Ok(()) };
    let way = Way { side: PLUGIN, hold: false };
    let _task = lan.migrate(server.task, way, || {
        let all_dead = || busy.members().iter().all(|member| member.error.is_some());
        wait_until("all clients are reset", PATIENCE, || Ok(all_dead()))
    })?;
    let seen = capture.stop()?;
    ensure!(seen.resets.len() >= CLIENTS, "{} resets of {CLIENTS} clients", seen.resets.len());
    is_clean(&lan)
}

/// Else the peers' patience would double with each move.
fn all_flow(busy: &Fleet<Client>) -> Result<()> {
    let received = || busy.members().iter().map(|member| member.client.received()).collect::<Vec<_>>();
    let before = received();
    wait_until("every client has an answer", PATIENCE, || {
        Ok(received().iter().zip(&before).all(|(now, before)| now > before))
    })
}

/// Neither host has kept anything.
fn is_clean(lan: &Lan) -> Result<()> {
    for host in [lan.here(), lan.there()] {
        host.wait_until_clean(None)?;
        let status = host.status()?;
        ensure!(status.is_empty(), "{}: {status}", host.dir().display());
    }
    Ok(())
}

#[test]
fn connections_held_at_the_target_live_over_ipv4() -> Result<()> {
    moves_held(&format!("{V4}:0"))
}

#[test]
fn connections_held_at_the_target_live_over_ipv6() -> Result<()> {
    moves_held(&format!("[{V6}]:0"))
}

#[test]
fn newcomers_wait_over_ipv4() -> Result<()> {
    newcomers_wait(&format!("{V4}:0"))
}

#[test]
fn newcomers_wait_over_ipv6() -> Result<()> {
    newcomers_wait(&format!("[{V6}]:0"))
}

#[test]
fn connections_pass_stateful_firewalls_over_ipv4() -> Result<()> {
    moves_held_through_firewalls(&format!("{V4}:0"))
}

#[test]
fn connections_pass_stateful_firewalls_over_ipv6() -> Result<()> {
    moves_held_through_firewalls(&format!("[{V6}]:0"))
}

#[test]
fn connections_not_held_are_reset_over_ipv4() -> Result<()> {
    moves_unheld(&format!("{V4}:0"))
}

#[test]
fn connections_not_held_are_reset_over_ipv6() -> Result<()> {
    moves_unheld(&format!("[{V6}]:0"))
}
