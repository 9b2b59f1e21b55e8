//! Explicit congestion notification (RFC 3168), which only SYN segments agree on, is there after a restore as before.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soccr_testkit::netns::End;
use soccr_testkit::relay::{Relay, Weather};
use soccr_testkit::skip::in_time;
use soccr_testkit::sockets::tcp_sockets;
use soccr_testkit::task::wait_until;
use soccr_testkit::{Capture, Client, Place, Server, Side, Stage};

use crate::world::{PATIENCE, PLUGIN, PLUGIN_IPTABLES, SERVER_V4, STOCK, stage};

const SERVER_V6: &str = "[fd09::1]:0";

/// A path so congested that it marks all that the clients send.
const CONGESTED: &str = "add table inet path; \
    add chain inet path out { type filter hook output priority 0; }; \
    add rule inet path out ip ecn ect0 ip ecn set ce; \
    add rule inet path out ip6 ecn ect0 ip6 ecn set ce";

/// `reach` is the clients' way to the server at `listen`.
fn comes_back(place: Place, dump: Side, restore: Side, listen: &str, reach: &str) -> Result<()> {
    let Some(mut stage) = stage(place, &[dump, restore])? else { return Ok(()) };
    let server = stage.serve(listen, &["--mode", "echo"])?;
    let mut reach: SocketAddr = reach.parse()?;
    reach.set_port(server.address.port());
    let mut plain = stage.connect(reach)?;
    set_ecn(&stage, "1")?;
    let mut client = stage.connect(reach)?;
    for client in [&mut plain, &mut client] {
        client.ping(20_000)?;
    }
    let before = with_ecn(&server)?;
    ensure!(before == [client.port()], "with ECN: {before:?}");

    let server = stage.freeze_and_thaw(server, dump, restore)?;
    ensure!(with_ecn(&server)? == before, "with ECN now: {:?}", with_ecn(&server)?);
    let marks = stage.peer.command("nft").arg(CONGESTED).status().context("nft")?;
    ensure!(marks.success(), "nft: {marks}");
    for (client, echoes) in [(&mut plain, false), (&mut client, true)] {
        let capture = Capture::start(&stage.peer)?;
        client.ping(20_000)?;
        let seen = capture.stop()?;
        ensure!(seen.echoes.contains(&reach.port()) == echoes, "echoes of {:?}", seen.echoes);
    }
    Ok(())
}

fn set_ecn(stage: &Stage, value: &str) -> Result<()> {
    stage.peer.run(|| fs::write("/proc/sys/net/ipv4/tcp_ecn", value)).context("net.ipv4.tcp_ecn")
}

/// The ports of the clients whose connections have ECN.
fn with_ecn(server: &Server) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for socket in tcp_sockets(server.pid())? {
        if socket.has_ecn()? {
            ports.extend(socket.peer().map(|peer| peer.port()));
        }
    }
    Ok(ports)
}

/// By the client's port.
fn round_trip_times(server: &Server) -> Result<BTreeMap<u16, Duration>> {
    let mut times = BTreeMap::new();
    for socket in tcp_sockets(server.pid())? {
        if let Some(peer) = socket.peer() {
            times.insert(peer.port(), socket.rtt()?);
        }
    }
    Ok(times)
}

macro_rules! comes_back {
    ($($name:ident: $place:ident, $dump:ident => $restore:ident, $listen:expr, $reach:expr;)*) => {$(
        #[test]
        fn $name() -> Result<()> {
            comes_back(Place::$place, $dump, $restore, $listen, $reach)
        }
    )*};
}

comes_back! {
    over_ipv4: Host, PLUGIN => PLUGIN, SERVER_V4, SERVER_V4;
    over_ipv6: Host, PLUGIN => PLUGIN, SERVER_V6, SERVER_V6;
    over_ipv4_mapped_addresses: Host, PLUGIN => PLUGIN, "[::]:0", SERVER_V4;
    behind_iptables: Host, PLUGIN_IPTABLES => PLUGIN_IPTABLES, SERVER_V4, SERVER_V4;
    in_an_external_namespace: External, PLUGIN => PLUGIN, SERVER_V4, SERVER_V4;
    in_a_dumped_namespace: Dumped, PLUGIN => PLUGIN, SERVER_V6, SERVER_V6;
    from_an_image_of_stock: Host, STOCK => PLUGIN, SERVER_V4, SERVER_V4;
}

/// Each answer comes as late as the peer's would, and all that are under way are waited for together.
#[test]
fn the_round_trip_time_comes_back() -> Result<()> {
    const CLIENTS: usize = 40;
    const WAY: Duration = Duration::from_millis(30);
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    stage.host().ip("link del eth0")?;
    let end = |ns, addresses| End { ns, name: "eth0", addresses };
    let weather = Weather { loss: 0.0, reorder: 0.0, delay: (WAY, WAY), seed: 1 };
    let host = end(stage.host(), &["10.9.0.1/24"]);
    let relay = Relay::start(host, end(&stage.peer, &["10.9.0.2/24"]), weather, None)?;
    set_ecn(&stage, "1")?;
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut clients = stage.connect_all(&[server.address], CLIENTS, Client::connect)?;
    clients.iter_mut().try_for_each(|client| client.send(1000))?;
    clients.iter_mut().try_for_each(|client| client.receive_echo(1000))?;
    // What is acknowledged after the restore is measured without the time between.
    wait_until("all is acknowledged", PATIENCE, || {
        let mut sockets = tcp_sockets(server.pid())?;
        sockets.retain(|socket| socket.peer().is_some());
        sockets.iter().try_fold(true, |all, socket| Ok(all && socket.unacked()? == 0))
    })?;
    let before = round_trip_times(&server)?;
    ensure!(before.values().all(|rtt| *rtt > WAY), "the round trip times are {before:?}");
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    let begun = Instant::now();
    let server = stage.thaw(address, PLUGIN, &images)?;
    let took = begun.elapsed();
    ensure!(with_ecn(&server)?.len() == CLIENTS, "not all have ECN");
    let after = round_trip_times(&server)?;
    for (port, before) in before {
        let rtt = after[&port];
        ensure!((before..20 * WAY).contains(&rtt), "the round trip time was {before:?} and is {rtt:?}");
    }
    ensure!(in_time(took, 2 * WAY * u32::try_from(CLIENTS)?), "the restore took {took:?}");
    clients.iter_mut().try_for_each(|client| client.send(1000))?;
    clients.iter_mut().try_for_each(|client| client.receive_echo(1000))?;
    stage.wait_until_clean(Some(&server))?;
    drop((clients, server));
    relay.stop().map(drop)
}

/// Images tell stock CRIU nothing that it did not know before.
#[test]
fn stock_restores_an_image_of_ours_without() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN, STOCK])? else { return Ok(()) };
    set_ecn(&stage, "1")?;
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = stage.connect(server.address)?;
    client.ping(20_000)?;
    ensure!(with_ecn(&server)? == [client.port()], "there is no ECN");
    let server = stage.freeze_and_thaw(server, PLUGIN, STOCK)?;
    client.ping(20_000)?;
    ensure!(with_ecn(&server)?.is_empty(), "stock brings ECN back");
    Ok(())
}
