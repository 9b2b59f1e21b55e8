//! What peers send while their server is away is held, and the server has it as soon as it is back.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use soccr_testkit::{Client, Fleet, Place, Server, task};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

const CLIENTS: usize = 50;

/// A client's first retransmission may come after 0.2 s. On an idle machine all is echoed after half of that.
const SLACK: Duration = Duration::from_millis(300);

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
