//! What peers send while their server is away is held, and the server has it as soon as it is back.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use nix::sys::signal::{Signal, kill};
use soccr_testkit::peers::{ABSENCES, Noticed, Peers};
use soccr_testkit::{Client, Fleet, Place, Server};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

const CLIENTS: usize = 50;

/// A client's first retransmission may come after 0.2 s. On an idle machine all is echoed after half of that.
const SLACK: Duration = Duration::from_millis(300);

/// Freezes a server for so long, with this variable in the environment of dump and restore. `None` where that cannot be.
fn absence(away: Duration, (name, value): (&'static str, &str)) -> Result<Option<Noticed>> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(None) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let (images, address) = (stage.images()?, server.address);
    let mut peers = Peers::start(&stage.peer, address, CLIENTS, BUSY)?;
    peers.leave();
    stage.dump(PLUGIN, server.pid(), &images).env(name, value).dump_and_wait(server.task)?;
    peers.call()?;
    peers.wait(away);
    let (task, _) = stage.restore(PLUGIN, &images)?.env(name, value).restore()?;
    let noticed = peers.finish()?;
    ensure!(noticed.lost.is_empty(), "lost: {:?}", noticed.lost);
    stage.wait_until_clean(Some(&Server::restored(address, task, stage.dir())))?;
    Ok(Some(noticed))
}

/// Without holding it is up to luck: a peer's next try comes at once, or after as long as the server was away. Who connects
/// meanwhile waits for no longer than the server is away, and is not refused.
#[test]
fn peers_catch_up_at_once_and_nobody_is_refused() -> Result<()> {
    let (mut all_held, mut all_dropped) = (Duration::ZERO, Duration::ZERO);
    for away in ABSENCES {
        let Some(noticed) = absence(away, ("SOCCR_HOLD", ""))? else { return Ok(()) };
        let Some(Noticed { caught_up: dropped, .. }) = absence(away, ("SOCCR_HOLD", "off"))? else {
            return Ok(());
        };
        let held = noticed.caught_up;
        println!("away for {away:?}: all is echoed after {held:?}, without holding after {dropped:?}");
        ensure!(held <= SLACK, "away for {away:?}: all is echoed after {held:?}");
        all_held += held;
        all_dropped += dropped;
        nobody_is_refused(&noticed)?;
    }
    ensure!(2 * all_held < all_dropped, "holding makes no difference: {all_held:?}, without {all_dropped:?}");
    Ok(())
}

fn nobody_is_refused(noticed: &Noticed) -> Result<()> {
    let (absence, made) = (noticed.absence, noticed.calls.len());
    let longest = noticed.longest_call().map_or(Duration::ZERO, |call| call.took);
    println!("away for {absence:?}: {made} connected, the longest call took {longest:?}");
    ensure!(made > 0, "nobody called");
    ensure!(noticed.refused() == 0, "{} of {made} were refused: {:?}", noticed.refused(), noticed.calls);
    ensure!(longest <= absence + SLACK, "away for {absence:?}: a call took {longest:?}");
    Ok(())
}

/// Without us all are.
#[test]
fn unheld_callers_are_refused() -> Result<()> {
    let Some(noticed) = absence(ABSENCES[0], ("SOCCR_HOLD_NEW", "off"))? else { return Ok(()) };
    ensure!(noticed.refused() > 0, "nobody was refused: {:?}", noticed.calls);
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
