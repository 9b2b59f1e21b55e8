//! Addresses that the host does not have: IP_FREEBIND and IP_TRANSPARENT.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use soccr::kernel::sockopt;
use soccr_testkit::sockets::tcp_sockets;
use soccr_testkit::task::wait_until;
use soccr_testkit::{Client, Place, Server, Stage};

use crate::world::{PATIENCE, PLUGIN, stage};

const V4: &str = "10.99.0.1";
const V6: &str = "fd99::1";

/// A server at an address that has gone from its host, which takes the packets for it all the same.
struct Away {
    stage: Stage,
    server: Server,
    client: Client,
}

impl Away {
    /// The server listens at `listen`, the client is connected to `address`. The server's sockets have this option.
    fn new(option: i32, listen: &str, address: &str, args: &[&str]) -> Result<Option<Self>> {
        let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(None) };
        for (version, net, via) in [("-4", "10.99.0.0/24", "10.9.0.1"), ("-6", "fd99::/64", "fd09::1")] {
            stage.peer.ip(&format!("{version} route add {net} via {via}"))?;
            stage.host().ip(&format!("{version} rule add iif eth0 lookup 100"))?;
            stage.host().ip(&format!("{version} route add local {net} dev lo table 100"))?;
        }
        let address: IpAddr = address.parse()?;
        let to_lo =
            |what| format!("addr {what} {address}/{} dev lo", if address.is_ipv4() { 32 } else { 128 });
        stage.host().ip(&to_lo("add"))?;
        let server = stage.serve(&SocketAddr::new(listen.parse()?, 0).to_string(), args)?;
        let mut client = stage.connect(SocketAddr::new(address, server.address.port()))?;
        client.send(1000)?;
        let accepted = || Ok(tcp_sockets(server.pid())?.len() == 2);
        wait_until("the server has accepted", PATIENCE, accepted)?;
        for socket in tcp_sockets(server.pid())? {
            sockopt::set_bytes(socket.as_fd(), libc::SOL_IP, option, &1_i32.to_ne_bytes())?;
        }
        stage.host().ip(&to_lo("del"))?;
        Ok(Some(Self { stage, server, client }))
    }
}

fn on_all(server: &Server, option: i32) -> Result<bool> {
    let values = tcp_sockets(server.pid())?.into_iter().map(|socket| socket.option(libc::SOL_IP, option));
    Ok(values.collect::<Result<Vec<_>>>()?.into_iter().all(|value| value == 1))
}

#[test]
fn sockets_at_an_address_that_the_host_does_not_have() -> Result<()> {
    for (option, listen, address) in [
        (libc::IP_TRANSPARENT, V6, V6),
        (libc::IP_FREEBIND, V6, V6),
        (libc::IP_TRANSPARENT, "::", V4),
        (libc::IP_TRANSPARENT, "0.0.0.0", V4),
    ] {
        let away = Away::new(option, listen, address, &["--mode", "echo"])?;
        let Some(Away { mut stage, server, mut client }) = away else { return Ok(()) };
        client.receive_echo(1000)?;
        let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN).context(address)?;
        ensure!(on_all(&server, option)?, "{address}: option {option} is off");
        client.ping(1000)?;
        let mut another = stage.connect(SocketAddr::new(address.parse()?, server.address.port()))?;
        another.ping(1000).context(address)?;
    }
    Ok(())
}

/// The peer's FIN is forged to such an address, to which packets of this host would leave it.
#[test]
fn a_fin_at_an_address_that_the_host_does_not_have() -> Result<()> {
    for (listen, address) in [(V6, V6), ("0.0.0.0", V4)] {
        let away = Away::new(libc::IP_TRANSPARENT, listen, address, &["--mode", "echo", "--hold"])?;
        let Some(Away { mut stage, server, mut client }) = away else { return Ok(()) };
        client.finish()?;
        let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN).context(address)?;
        server.release()?;
        client.receive_echo(1000).context(address)?;
    }
    Ok(())
}

/// With IP_FREEBIND alone nothing is sent from an IPv4 address that is not here, and CRIU binds a listener of IPv4 before it
/// sets the option: such a restore fails, names the address, and can be tried again.
#[test]
fn what_needs_its_address_says_so() -> Result<()> {
    for (listen, named) in
        [("0.0.0.0", "connect from an address that is not here"), (V4, "CRIU cannot listen at 10.99.0.1:")]
    {
        let away = Away::new(libc::IP_FREEBIND, listen, V4, &["--mode", "echo"])?;
        let Some(Away { mut stage, server, mut client }) = away else { return Ok(()) };
        let images = stage.images()?;
        let address = stage.freeze(server, PLUGIN, &images)?;
        let failed = stage.restore(PLUGIN, &images)?.run().err().context("the restore succeeded")?;
        let failed = format!("{failed:#}");
        ensure!(failed.contains(named) && failed.contains(V4), "{failed}");
        stage.wait_until_quiet()?;
        stage.reap(None)?;
        stage.host().ip(&format!("addr add {V4}/32 dev lo"))?;
        let server = stage.thaw(address, PLUGIN, &images)?;
        client.receive_echo(1000)?;
        client.ping(1000)?;
        stage.wait_until_clean(Some(&server))?;
    }
    Ok(())
}
