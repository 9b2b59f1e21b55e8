//! What the host's owner says of connections: which are carried, under which addresses, and how long their addresses are
//! waited for.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use soccr_testkit::criu::Call;
use soccr_testkit::sockets::{state, tcp_sockets};
use soccr_testkit::stage::{V4, V6};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Capture, Client, Place, Server, Stage};

use crate::world::{PATIENCE, PLUGIN, stage};

/// Both ends of a connection are in the tree, and the listener.
fn moves_to(old: &str, new: &str, rules: &str) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let stream = ["--mode", "stream", "--conns", "2", "--hold", "--send", "300000", "--sndbuf", "1000000"];
    let args = [stream.as_slice(), &["--join", "self", "--back", "20000"]].concat();
    let server = stage.serve(old, &args)?;
    wait_until("data waits at both ends", PATIENCE, || {
        let sockets = tcp_sockets(server.pid())?;
        let waiting = |socket: &&_| is_connection(socket).unwrap_or(false);
        Ok(sockets.iter().filter(waiting).filter(|it| it.unread().is_ok_and(|len| len > 0)).count() == 2)
    })?;
    let images = stage.images()?;
    let mut address = stage.freeze(server, PLUGIN, &images)?;
    // A first try that fails has changed the addresses already.
    let refused =
        stage.restore(PLUGIN, &images)?.env("SOCCR_REMAP", rules).env("SOCCR_POLICY", "refuse").restore();
    ensure!(said(refused).contains("SOCCR_POLICY"), "that was not refused");
    stage.reap(None)?;
    let restore = stage.restore(PLUGIN, &images)?.env("SOCCR_REMAP", rules);
    let (task, _) = restore.restore()?;
    let port = address.port();
    address = new.parse()?;
    if address.port() == 0 {
        address.set_port(port);
    }
    let server = Server::restored(address, task, stage.dir());
    stage.wait_until_clean(Some(&server))?;
    let mut connections = 0;
    for socket in tcp_sockets(server.pid())? {
        let local = socket.local().context("each has an address")?;
        ensure!(local.ip() == address.ip(), "{local} is not an address at {new}");
        connections += usize::from(is_connection(&socket)?);
        ensure!(is_connection(&socket)? || local == address, "the listener is at {local}");
    }
    ensure!(connections == 2, "{connections} connections");
    server.release()?;
    server.wait_verified()
}

fn is_connection(socket: &soccr_testkit::sockets::TaskSocket) -> Result<bool> {
    Ok(socket.state()? != state::LISTEN)
}

#[test]
fn connections_and_listeners_move_to_other_addresses() -> Result<()> {
    moves_to("127.0.0.1:0", "127.9.0.7:0", "127.0.0.1=127.9.0.7")
}

#[test]
fn connections_and_listeners_move_to_other_addresses_and_ports() -> Result<()> {
    moves_to("[fd09::1]:7801", "[::1]:7902", "[fd09::1]:7801=[::1]:7902,fd09::1=::1")
}

#[test]
fn rules_that_make_no_sense_are_named() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve("10.9.0.1:0", &["--mode", "echo"])?;
    let file = stage.dir().join("soccr.conf");
    fs::write(&file, "policy keep\npolicy drop local :80\n")?;
    let images = stage.images()?;
    let dump = || stage.dump(PLUGIN, server.pid(), &images);
    let wrong = said(dump().env("SOCCR_CONF", &file).run());
    ensure!(wrong.contains(&format!("{}:2: ", file.display())), "{wrong}");
    let wrong = said(dump().env("SOCCR_POLICY", "close near").run());
    ensure!(wrong.contains("SOCCR_POLICY: \"close near\""), "{wrong}");
    stage.wait_until_clean(Some(&server))
}

/// A server with one client over IPv4 and one over IPv6.
fn two_clients(stage: &Stage) -> Result<(Server, Client, Client)> {
    let server = stage.serve("[::]:0", &["--mode", "echo"])?;
    let at = |address: &str| Ok::<_, anyhow::Error>(SocketAddr::new(address.parse()?, server.address.port()));
    let (mut v4, mut v6) = (stage.connect(at(V4)?)?, stage.connect(at(V6)?)?);
    v4.ping(5000)?;
    v6.ping(5000)?;
    Ok((server, v4, v6))
}

fn said<T>(result: Result<T>) -> String {
    result.map_or_else(|error| format!("{error:#}"), |_| String::new())
}

#[test]
fn a_policy_refuses_by_name() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, mut v4, mut v6) = two_clients(&stage)?;
    let images = stage.images()?;
    let dump = stage.dump(PLUGIN, server.pid(), &images);
    let refused = said(dump.env("SOCCR_POLICY", "refuse remote fd09::/64").run());
    let named = format!("[fd09::2]:{} is not to be carried, says SOCCR_POLICY", v6.port());
    ensure!(refused.contains(&named), "{refused}");
    stage.wait_until_clean(Some(&server))?;
    v4.ping(5000)?;
    v6.ping(5000)
}

/// What is not carried ends with the task, and not before: and whether its peer hears of it is as the policy says.
fn one_ends(place: Place, policy: &str, hears: bool) -> Result<()> {
    let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
    let (server, mut v4, mut v6) = two_clients(&stage)?;
    let images = stage.images()?;
    let dump = stage.dump(PLUGIN, server.pid(), &images);
    dump.arg("--leave-running").env("SOCCR_POLICY", policy).run()?;
    v6.ping(5000)?;

    let images = stage.images()?;
    let capture = Capture::start(&stage.peer)?;
    let address = server.address;
    let dump = stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_POLICY", policy);
    dump.dump_and_wait(server.task)?;
    let resets = capture.stop()?.resets;
    let of_v6 = resets.iter().filter(|reset| reset.to == v6.port()).count();
    ensure!(of_v6 == usize::from(hears) && resets.len() == of_v6, "{resets:?}");

    let server = stage.thaw(address, PLUGIN, &images)?;
    v4.ping(5000)?;
    ensure!(v6.ping(5000).is_err(), "a connection that was not to be carried lives");
    stage.wait_until_clean(Some(&server))
}

#[test]
fn a_policy_resets() -> Result<()> {
    one_ends(Place::Host, "reset remote fd09::/64", true)
}

#[test]
fn a_policy_resets_in_a_namespace_that_criu_locks() -> Result<()> {
    one_ends(Place::External, "reset remote fd09::/64", true)
}

#[test]
fn a_policy_closes_without_a_word() -> Result<()> {
    one_ends(Place::Host, "keep remote 10.0.0.0/8; close", false)
}

/// The same at the restore of what was dumped whole.
#[test]
fn a_restore_leaves_out_what_the_policy_says() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, mut v4, mut v6) = two_clients(&stage)?;
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    let policy = stage.dir().join("soccr.conf");
    fs::write(&policy, "policy close remote fd09::2\n")?;
    let (task, _) = stage.restore(PLUGIN, &images)?.env("SOCCR_CONF", &policy).restore()?;
    let server = Server::restored(address, task, stage.dir());
    v4.ping(5000)?;
    ensure!(v6.ping(5000).is_err(), "a connection that was not to be carried lives");
    stage.wait_until_clean(Some(&server))
}

/// The server's address goes with its host's, and comes when criu restores already.
#[test]
fn an_address_that_comes_late_is_waited_for() -> Result<()> {
    comes_late(Place::Host, "10.9.0.1:0")
}

/// A listener's is not: CRIU binds it at once.
#[test]
fn an_address_of_a_connection_elsewhere_is_waited_for() -> Result<()> {
    comes_late(Place::External, "0.0.0.0:0")
}

fn comes_late(place: Place, listen: &str) -> Result<()> {
    let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(listen, &["--mode", "echo"])?;
    let mut client = stage.connect(SocketAddr::new(V4.parse()?, server.address.port()))?;
    client.ping(5000)?;
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    stage.host().ip("addr del 10.9.0.1/24 dev eth0")?;

    let refused = said(restore(&stage, &images, "1s")?.restore());
    ensure!(refused.contains("10.9.0.1 is no address here after 1 s"), "{refused}");
    stage.reap(None)?;

    let _ = fs::remove_file(images.join("restored.pid")); // of the first try
    let (mut criu, log) = restore(&stage, &images, "20s")?.spawn()?;
    let waits =
        || Ok(fs::read_to_string(&log).unwrap_or_default().contains("10.9.0.1 is no address here yet"));
    let waited = wait_until("it waits", PATIENCE, waits);
    stage.host().ip("addr add 10.9.0.1/24 dev eth0")?;
    let status = criu.wait()?;
    let said = soccr_testkit::criu::last_errors(&log);
    waited.with_context(|| said.clone())?;
    ensure!(status.success(), "{said}");
    let pid = fs::read_to_string(images.join("restored.pid"))?;
    let task = soccr_testkit::Task::adopt(nix::unistd::Pid::from_raw(pid.trim().parse()?));
    let server = Server::restored(address, task, stage.dir());
    client.ping(5000)?;
    stage.wait_until_clean(Some(&server))
}

fn restore<'a>(stage: &'a Stage, images: &'a Path, wait: &str) -> Result<Call<'a>> {
    Ok(stage.restore(PLUGIN, images)?.env("SOCCR_WAIT_ADDRESS", wait))
}
