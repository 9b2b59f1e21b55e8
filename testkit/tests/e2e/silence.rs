//! What peers send while their server is away is held, and the server has it as soon as it is back.

use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use soccr_testkit::{Client, Fleet, Place, Server, task};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

const CLIENTS: usize = 50;

/// A client's first retransmission may come after 0.2 s. On an idle machine all is echoed after half of that.
const SLACK: Duration = Duration::from_millis(300);

/// A restore takes so long here at most.
const RESTORE: Duration = Duration::from_millis(500);

/// Freezes a server for so long. From the end of the restore until it has echoed all that its clients have sent meanwhile.
fn catching_up(place: Place, away: Duration, hold: &str) -> Result<Option<Duration>> {
    let Some(stage) = stage(place, &[PLUGIN])? else { return Ok(None) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let clients = stage.connect_all(&[server.address], CLIENTS, Client::connect)?;
    let busy = Fleet::echoes(clients, BUSY)?;
    let images = stage.images()?;
    let (frozen, address) = (Instant::now(), server.address);
    stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_HOLD", hold).dump_and_wait(server.task)?;
    // The time that the server is away is what is tested.
    thread::sleep(away.saturating_sub(frozen.elapsed()));
    let restored = stage.restore(PLUGIN, &images)?.env("SOCCR_HOLD", hold).restore()?;
    let server = Server::restored(address, restored.0, stage.dir());
    let back = Instant::now();
    let sent: Vec<u64> = busy.members().iter().map(|member| member.client.sent()).collect();
    let caught_up =
        || busy.members().iter().zip(&sent).all(|(member, sent)| member.client.received() >= *sent);
    task::wait_until("all is echoed", PATIENCE, || Ok(caught_up()))?;
    let took = back.elapsed();
    busy.stop(PATIENCE).whole()?;
    stage.wait_until_clean(Some(&server))?;
    Ok(Some(took))
}

/// Without holding it is up to luck: a peer's next try comes at once, or after as long as the server was away.
#[test]
fn peers_catch_up_at_once() -> Result<()> {
    let (mut all_held, mut all_dropped) = (Duration::ZERO, Duration::ZERO);
    for away in [300, 1000, 2000, 3000].map(Duration::from_millis) {
        let Some(held) = catching_up(Place::Host, away, "")? else { return Ok(()) };
        let Some(dropped) = catching_up(Place::Host, away, "off")? else { return Ok(()) };
        println!("away for {away:?}: all is echoed after {held:?}, without holding after {dropped:?}");
        ensure!(held <= SLACK, "away for {away:?}: all is echoed after {held:?}");
        all_held += held;
        all_dropped += dropped;
    }
    ensure!(2 * all_held < all_dropped, "holding makes no difference: {all_held:?}, without {all_dropped:?}");
    Ok(())
}

/// Clients that connect one after the other while a server is away for so long, and after its restore: how long each call
/// took, and how many were refused.
fn connecting(away: Duration, hold: &str) -> Result<Option<(Vec<Duration>, usize)>> {
    const EVERY: Duration = Duration::from_millis(20);
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(None) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let (images, address, gone) = (stage.images()?, server.address, Instant::now());
    stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_HOLD_NEW", hold).dump_and_wait(server.task)?;
    let call = || stage.peer.run(|| (Instant::now(), Client::connect(address), Instant::now()));
    let (restored, calls) = thread::scope(|scope| -> Result<_> {
        let mut calls = Vec::new();
        while gone.elapsed() < away {
            calls.push(scope.spawn(call));
            thread::sleep(EVERY);
        }
        let restored = stage.restore(PLUGIN, &images)?.env("SOCCR_HOLD_NEW", hold).restore()?;
        let calls = calls.into_iter().map(|call| call.join().expect("it does not panic"));
        Ok((restored.0, calls.collect::<Vec<_>>()))
    })?;
    let server = Server::restored(address, restored, stage.dir());
    let (mut took, mut refused) = (Vec::new(), 0);
    for (start, client, end) in calls {
        match client {
            Ok(mut client) => {
                client.ping(1000)?;
                took.push(end - start);
            }
            Err(_) => refused += 1,
        }
    }
    stage.wait_until_clean(Some(&server))?;
    Ok(Some((took, refused)))
}

/// None is refused, and none waits longer than the server is away, its restore included, and 0.3 s. Without us all are refused.
#[test]
fn who_connects_meanwhile_waits() -> Result<()> {
    for away in [300, 1000, 2000, 3000].map(Duration::from_millis) {
        let Some((took, refused)) = connecting(away, "")? else { return Ok(()) };
        let longest = took.iter().max().copied().unwrap_or_default();
        println!("away for {away:?}: {} connected, the longest call took {longest:?}", took.len());
        ensure!(refused == 0, "away for {away:?}: {refused} were refused, {} not", took.len());
        ensure!(longest <= away + SLACK + RESTORE, "away for {away:?}: a call took {longest:?}");
    }
    let Some((took, refused)) = connecting(Duration::from_millis(300), "off")? else { return Ok(()) };
    ensure!(refused > 0, "nobody was refused: {took:?}");
    Ok(())
}

/// A dump may stay one for ever: after its time a client is refused again.
#[test]
fn nobody_waits_for_a_dump_for_ever() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let (images, address) = (stage.images()?, server.address);
    stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_HOLD_NEW", "1s").dump_and_wait(server.task)?;
    let start = Instant::now();
    ensure!(stage.connect(address).is_err(), "somebody listens");
    ensure!(start.elapsed() > Duration::from_millis(500), "it was refused after {:?}", start.elapsed());
    let server = Server::restored(address, stage.restore(PLUGIN, &images)?.restore()?.0, stage.dir());
    stage.connect(address)?.ping(1000)?;
    stage.wait_until_clean(Some(&server))
}

/// The keeper holds what nobody else has, but nothing that the peers would not send again.
#[test]
fn without_its_keeper_a_dump_is_what_it_was() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let clients = stage.connect_all(&[server.address], CLIENTS, Client::connect)?;
    let busy = Fleet::echoes(clients, BUSY)?;
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    let keepers = stage.keepers()?;
    ensure!(keepers.len() == 1, "{keepers:?}");
    kill(keepers[0].pid, Signal::SIGKILL)?;
    let server = stage.thaw(address, PLUGIN, &images)?;
    busy.stop(PATIENCE).whole()?;
    stage.wait_until_clean(Some(&server))?;
    let left: Vec<_> = fs::read_dir(stage.records())?.collect::<Result<_, _>>()?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// Nobody restores: what was held goes with the lock.
#[test]
fn a_keeper_goes_with_its_lock() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let _client = stage.connect(server.address)?;
    let images = stage.images()?;
    stage.freeze(server, PLUGIN, &images)?;
    ensure!(stage.keepers()?.len() == 1, "nobody holds");
    let status = stage.status()?;
    let [id] = status.ids()[..] else { return Err(anyhow!("{status}")) };
    stage.soccr(&["clean", id])?;
    stage.wait_until_clean(None)
}
