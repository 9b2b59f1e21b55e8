//! A container's network: gone with the dump, made anew before criu restores anything, and behind addresses that the host
//! translates.

use std::net::SocketAddr;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use soccr_testkit::netns::{End, veth};
use soccr_testkit::{Client, Fleet, NetNs, Place, Server, Stage, leftovers};

use crate::world::{BUSY, PATIENCE, PLUGIN, STOCK, stage};

const CLIENTS: usize = 10;

/// The host's address on the wire to the clients, and the port that it publishes.
const PUBLISHED: &str = "10.9.5.1:7100";
/// The same from the host itself.
const LOOPBACK: &str = "127.0.0.1:7100";
/// The server's own.
const INSIDE: &str = "10.88.0.2:7000";

/// What a container engine makes on a host when a container starts.
struct Network {
    container: NetNs,
}

impl Network {
    fn up(host: &NetNs) -> Result<Self> {
        let container = NetNs::new()?;
        let inside = End { ns: &container, name: "eth0", addresses: &["10.88.0.2/24"] };
        veth(inside, End { ns: host, name: "cont0", addresses: &["10.88.0.1/24"] })?;
        container.ip("link set lo up")?;
        container.ip("route add default via 10.88.0.1")?;
        nft(
            host,
            "table ip nat {
                chain pre { type nat hook prerouting priority -100; tcp dport 7100 dnat to 10.88.0.2:7000; }
                chain out { type nat hook output priority -100; tcp dport 7100 dnat to 10.88.0.2:7000; }
                chain post { type nat hook postrouting priority 100; ip saddr 127.0.0.0/8 masquerade; }
            }",
        )?;
        Ok(Self { container })
    }

    fn down(self, host: &NetNs) -> Result<()> {
        nft(host, "delete table ip nat")?;
        host.ip("link del cont0")
    }
}

fn nft(ns: &NetNs, rules: &str) -> Result<()> {
    let status = ns.command("nft").arg(rules).stdin(Stdio::null()).status().context("cannot run nft")?;
    ensure!(status.success(), "nft refuses {rules}");
    Ok(())
}

/// The stage's outer namespace is the host, on a wire to the clients'.
fn wire(stage: &Stage) -> Result<&NetNs> {
    let host = stage.outside();
    veth(
        End { ns: host, name: "lan0", addresses: &["10.9.5.1/24"] },
        End { ns: &stage.peer, name: "lan0", addresses: &["10.9.5.2/24"] },
    )?;
    let settings = ["net.ipv4.ip_forward=1", "net.ipv4.conf.all.route_localnet=1"];
    let status = host.command("sysctl").arg("-qw").args(settings).status().context("cannot run sysctl")?;
    ensure!(status.success(), "sysctl refuses {settings:?}");
    stage.peer.ip("route add 10.88.0.0/24 via 10.9.5.1")?;
    Ok(host)
}

fn clients(from: &NetNs, server: &str) -> Result<Vec<Client>> {
    let server: SocketAddr = server.parse()?;
    from.run(|| (0..CLIENTS).map(|_| Client::connect(server)).collect())
}

/// Clients from another host and from this one, by the container's address, by a published port, and by that port of the
/// loopback address, whose connections masquerading forgets when the network goes down. None is reset.
#[test]
fn its_peers_notice_nothing_when_its_network_is_made_anew() -> Result<()> {
    let Some(stage) = stage(Place::External, &[PLUGIN])? else { return Ok(()) };
    let host = wire(&stage)?;
    let network = Network::up(host)?;
    let server = Server::start(&network.container, INSIDE.parse()?, stage.dir(), ["--mode", "echo"])?;
    let mut all = Vec::new();
    for (from, to) in [(&stage.peer, INSIDE), (host, INSIDE), (&stage.peer, PUBLISHED), (host, LOOPBACK)] {
        all.extend(clients(from, to)?);
    }
    all.iter_mut().try_for_each(|client| client.ping(1000))?;
    let busy = Fleet::echoes(all, BUSY)?;

    let images = stage.images()?;
    let address = server.address;
    let external = format!("net[{}]:inner", network.container.inode());
    let call = stage.criu.dump(PLUGIN, server.pid(), &images).inside(host).args(["--external", &external]);
    call.dump_and_wait(server.task)?;
    network.down(host)?;
    let network = Network::up(host)?;
    let call = stage.criu.restore(PLUGIN, &images).inside(host).inherit(&network.container, "inner")?;
    let server = Server::restored(address, call.restore()?.0, stage.dir());

    for mut client in busy.stop(PATIENCE).whole()? {
        client.ping(1000)?;
    }
    leftovers::no_rules(&network.container)?;
    network.down(host)?;
    stage.wait_until_clean(Some(&server))
}

/// Who connects while its network is down waits, by the container's address and by a published port that some connection uses.
#[test]
fn who_connects_meanwhile_waits() -> Result<()> {
    let Some(stage) = stage(Place::External, &[PLUGIN])? else { return Ok(()) };
    let host = wire(&stage)?;
    let network = Network::up(host)?;
    let server = Server::start(&network.container, INSIDE.parse()?, stage.dir(), ["--mode", "echo"])?;
    let mut known = clients(&stage.peer, PUBLISHED)?;
    known.iter_mut().try_for_each(|client| client.ping(1000))?;

    let (images, address) = (stage.images()?, server.address);
    let external = format!("net[{}]:inner", network.container.inode());
    let call = stage.criu.dump(PLUGIN, server.pid(), &images).inside(host).args(["--external", &external]);
    call.dump_and_wait(server.task)?;
    network.down(host)?;
    let connect = |to: &str| -> Result<Client> {
        let to = to.parse()?;
        stage.peer.run(|| Client::connect(to))
    };
    let (network, server, new) = thread::scope(|scope| -> Result<_> {
        let new = [INSIDE, PUBLISHED].map(|to| scope.spawn(move || connect(to)));
        // Who is refused is so at once.
        thread::sleep(Duration::from_millis(500));
        ensure!(new.iter().all(|new| !new.is_finished()), "somebody does not wait");
        let network = Network::up(host)?;
        let call = stage.criu.restore(PLUGIN, &images).inside(host).inherit(&network.container, "inner")?;
        let server = Server::restored(address, call.restore()?.0, stage.dir());
        let new = new.map(|new| new.join().expect("it does not panic"));
        Ok((network, server, new.into_iter().collect::<Result<Vec<_>>>()?))
    })?;
    for mut client in known.into_iter().chain(new) {
        client.ping(1000)?;
    }
    network.down(host)?;
    stage.wait_until_clean(Some(&server))
}

/// When the dump fails or leaves the tasks running, nothing is left on the way either.
#[test]
fn a_container_that_runs_on_is_not_left_behind_a_lock() -> Result<()> {
    let Some(stage) = stage(Place::External, &[PLUGIN])? else { return Ok(()) };
    let host = wire(&stage)?;
    let network = Network::up(host)?;
    let server = Server::start(&network.container, INSIDE.parse()?, stage.dir(), ["--mode", "echo"])?;
    let mut all = clients(&stage.peer, PUBLISHED)?;
    all.extend(clients(host, LOOPBACK)?);
    for extra in [&["--leave-running"][..], &["--action-script", "/bin/false"]] {
        let busy = Fleet::echoes(all, BUSY)?;
        let images = stage.images()?;
        let external = format!("net[{}]:inner", network.container.inode());
        let call =
            stage.criu.dump(PLUGIN, server.pid(), &images).inside(host).args(["--external", &external]);
        let done = call.args(extra.iter().copied()).quiet().run();
        ensure!(done.is_ok() == (extra.len() == 1), "{extra:?}: {done:?}");
        all = busy.stop(PATIENCE).whole()?;
        all.iter_mut().try_for_each(|client| client.ping(1000))?;
    }
    network.down(host)?;
    stage.wait_until_clean(Some(&server))
}

/// Stock CRIU restores the plugin's images. It does not know of the lock on the way, which ends when the server sends.
#[test]
fn stock_criu_restores_it_and_nothing_stays_on_the_way() -> Result<()> {
    let Some(stage) = stage(Place::External, &[PLUGIN, STOCK])? else { return Ok(()) };
    let host = wire(&stage)?;
    let network = Network::up(host)?;
    let server = Server::start(&network.container, INSIDE.parse()?, stage.dir(), ["--mode", "echo"])?;
    let mut clients = clients(&stage.peer, INSIDE)?;
    clients.extend(self::clients(&stage.peer, PUBLISHED)?);
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;

    let (images, address) = (stage.images()?, server.address);
    let external = format!("net[{}]:inner", network.container.inode());
    let call = stage.criu.dump(PLUGIN, server.pid(), &images).inside(host).args(["--external", &external]);
    call.dump_and_wait(server.task)?;
    let call = stage.criu.restore(STOCK, &images).inside(host).inherit(&network.container, "inner")?;
    let server = Server::restored(address, call.restore()?.0, stage.dir());
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    let status = stage.status()?;
    ensure!(status.is_empty(), "{status}");
    leftovers::no_rules(&network.container)?;
    network.down(host)?;
    stage.wait_until_clean(Some(&server))
}
