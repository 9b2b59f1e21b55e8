//! Connections that the server has not accepted when it is frozen.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use soccr_testkit::skip::lacks;
use soccr_testkit::waiting::{Waiting, all_wait};
use soccr_testkit::{NetNs, Place, Server, Side, Stage};

use crate::elsewhere::enter_vrf;
use crate::world::{PATIENCE, PLUGIN, PLUGIN_IPTABLES, SERVER_V4, stage};

const LATE: [&str; 3] = ["--mode", "echo", "--late"];
const CLIENTS: u8 = 20;

/// A server that accepts nothing yet, and clients that wait. `None`: this kernel cannot carry them.
fn server_with_queue(stage: &Stage, address: &str, args: &[&str]) -> Result<Option<(Server, Vec<Waiting>)>> {
    let Some(server) = late_server(stage, address, args)? else { return Ok(None) };
    let clients = Waiting::connect_all(stage, &server, server.address, CLIENTS)?;
    Ok(Some((server, clients)))
}

fn late_server(stage: &Stage, address: &str, args: &[&str]) -> Result<Option<Server>> {
    let btf = fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
    let function = b"bpf_sk_assign_tcp_reqsk\0";
    if !btf.windows(function.len()).any(|name| name == function) {
        return lacks("bpf_sk_assign_tcp_reqsk").map(|()| None);
    }
    stage.serve(address, &[&LATE[..], args].concat()).map(Some)
}

fn wait_for_queue(server: &Server) -> Result<()> {
    all_wait(server, CLIENTS)
}

fn all_go_on(server: &Server, clients: &mut [Waiting]) -> Result<()> {
    server.release()?;
    (0..).zip(clients).try_for_each(|(place, client)| client.goes_on(place))
}

fn frozen_and_thawed(place: Place, address: &str, side: Side) -> Result<()> {
    let Some(mut stage) = stage(place, &[side])? else { return Ok(()) };
    let Some((server, mut clients)) = server_with_queue(&stage, address, &[])? else { return Ok(()) };
    let mut server = stage.freeze_and_thaw(server, side, side)?;
    wait_for_queue(&server)?;
    // Once more: what was put back is as good as what came by itself.
    server = stage.freeze_and_thaw(server, side, side)?;
    wait_for_queue(&server)?;
    all_go_on(&server, &mut clients)
}

#[test]
fn over_ipv4() -> Result<()> {
    frozen_and_thawed(Place::Host, SERVER_V4, PLUGIN)
}

#[test]
fn over_ipv4_with_iptables() -> Result<()> {
    frozen_and_thawed(Place::Host, SERVER_V4, PLUGIN_IPTABLES)
}

#[test]
fn over_ipv6() -> Result<()> {
    frozen_and_thawed(Place::Host, "[fd09::1]:0", PLUGIN)
}

#[test]
fn in_another_namespace() -> Result<()> {
    frozen_and_thawed(Place::External, SERVER_V4, PLUGIN)
}

#[test]
fn in_a_namespace_that_is_made_anew() -> Result<()> {
    frozen_and_thawed(Place::Dumped, SERVER_V4, PLUGIN)
}

/// Of a listener that is bound to this interface, as its connections are then.
fn by(device: &str, listen: &str, enter: impl Fn(&NetNs) -> Result<()>) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    enter(stage.host())?;
    let Some(server) = late_server(&stage, listen, &["--device", device])? else { return Ok(()) };
    let reach = SERVER_V4.replace(":0", &format!(":{}", server.address.port())).parse()?;
    let mut clients = Waiting::connect_all(&stage, &server, reach, CLIENTS)?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    wait_for_queue(&server)?;
    all_go_on(&server, &mut clients)
}

#[test]
fn at_a_listener_of_one_interface() -> Result<()> {
    by("eth0", SERVER_V4, |_| Ok(()))
}

#[test]
#[ignore = "needs a kernel with VRF: make kernels"]
fn in_a_vrf() -> Result<()> {
    by("red", "0.0.0.0:0", enter_vrf)
}

/// The queue is as before, and nothing is left.
fn lives_on(stage: &Stage, server: &Server, clients: &mut [Waiting]) -> Result<()> {
    stage.wait_until_clean(Some(server))?;
    wait_for_queue(server)?;
    all_go_on(server, clients)
}

#[test]
fn leave_running() -> Result<()> {
    for place in [Place::Host, Place::External] {
        let Some(stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
        let Some((server, mut clients)) = server_with_queue(&stage, SERVER_V4, &[])? else { return Ok(()) };
        let images = stage.images()?;
        stage.dump(PLUGIN, server.pid(), &images).arg("--leave-running").run()?;
        lives_on(&stage, &server, &mut clients)?;
    }
    Ok(())
}

/// A unix socket whose other end stays outside makes CRIU refuse, after the plugin's work is done.
#[test]
fn a_dump_that_fails() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let path = stage.dir().join("outside.sock");
    let _listener = UnixListener::bind(&path)?;
    let unix = ["--unix", path.to_str().context("a plain path")?];
    let Some((server, mut clients)) = server_with_queue(&stage, SERVER_V4, &unix)? else { return Ok(()) };
    let images = stage.images()?;
    ensure!(stage.dump(PLUGIN, server.pid(), &images).run().is_err(), "criu dumps external unix sockets now");
    ensure!(Path::new(&images).join("soccr.img").exists(), "the dump failed before the queue was saved");
    lives_on(&stage, &server, &mut clients)
}

/// Without SYN cookies the kernel makes no connection from an ACK. The queue is left to CRIU, which refuses, and nobody is
/// harmed; or its connections are reset, as the policy says.
#[test]
fn where_it_cannot_be_carried() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some((server, mut clients)) = server_with_queue(&stage, SERVER_V4, &[])? else { return Ok(()) };
    stage.host().run(|| fs::write("/proc/sys/net/ipv4/tcp_syncookies", "0"))?;
    let images = stage.images()?;
    ensure!(stage.dump(PLUGIN, server.pid(), &images).run().is_err(), "the queue was dumped");
    let log = fs::read_to_string(images.join("dump.log"))?;
    let said = format!("{}", server.address);
    let named = log.lines().any(|line| line.contains(&said) && line.contains("net.ipv4.tcp_syncookies is 0"));
    ensure!(named, "the log does not say why:\n{log}");
    stage.wait_until_clean(Some(&server))?;
    wait_for_queue(&server)?;

    let images = stage.images()?;
    let address = server.address;
    let call = stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_ACCEPT_QUEUE", "reset");
    call.dump_and_wait(server.task)?;
    for client in &mut clients {
        let error = client.read().err().map(|error| error.kind());
        ensure!(error == Some(std::io::ErrorKind::ConnectionReset), "a client sees {error:?}");
    }
    let server = stage.thaw(address, PLUGIN, &images)?;
    stage.wait_until_clean(Some(&server))
}

/// The client's last ACK of its handshake comes when the server is frozen, with a few bytes: no earlier, since a rule on the
/// client's host drops it until criu calls its script.
fn handshake_ends_meanwhile(leave_running: bool) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(server) = late_server(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let rule = format!(
        "table inet late {{ chain out {{ type filter hook output priority 0; \
         tcp dport {} tcp flags & (syn | ack) == ack drop; }}; }}",
        server.address.port()
    );
    ensure!(stage.peer.command("nft").arg(rule).status()?.success(), "no rule");
    let mut client = stage.peer.run(|| TcpStream::connect(server.address))?;
    client.set_read_timeout(Some(PATIENCE))?;
    all_wait(&server, 0)?;

    let [go, done] = ["go", "done"].map(|name| stage.dir().join(name));
    let script = stage.dir().join("script");
    let (first, then) = (go.display(), done.display());
    let text = format!(
        "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ] || {{ echo >{first}; read _ <{then}; }}\n"
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    for fifo in [&go, &done] {
        mkfifo(fifo, Mode::S_IRWXU)?;
    }
    let images = stage.images()?;
    let address = server.address;
    let server = std::thread::scope(|scope| -> Result<Option<Server>> {
        let ends = scope.spawn(|| -> Result<()> {
            fs::read(&go)?;
            ensure!(stage.peer.command("nft").args(["delete", "table", "inet", "late"]).status()?.success());
            client.write_all(b"early")?;
            Ok(fs::write(&done, "\n")?)
        });
        let call = stage.dump(PLUGIN, server.pid(), &images).arg("--action-script").arg(&script);
        let left = if leave_running {
            call.arg("--leave-running").run()?;
            Some(server)
        } else {
            call.dump_and_wait(server.task)?;
            None
        };
        ends.join().expect("no panic")?;
        Ok(left)
    })?;
    let server = match server {
        Some(server) => server,
        None => stage.thaw(address, PLUGIN, &images)?,
    };
    stage.wait_until_clean(Some(&server))?;
    all_wait(&server, 1)?;
    server.release()?;
    let mut said = [1; 6];
    client.read_exact(&mut said)?;
    ensure!(&said == b"\0early", "{said:?}");
    Ok(())
}

#[test]
fn a_handshake_that_ends_during_the_dump() -> Result<()> {
    handshake_ends_meanwhile(false)
}

#[test]
fn a_handshake_that_ends_during_a_dump_that_leaves_the_server_running() -> Result<()> {
    handshake_ends_meanwhile(true)
}

/// A policy means them, too: by name, and whether the client hears of it.
#[test]
fn a_policy_holds_for_them() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some((server, mut clients)) = server_with_queue(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let images = stage.images()?;
    let dump = stage.dump(PLUGIN, server.pid(), &images);
    ensure!(dump.env("SOCCR_POLICY", "refuse remote 10.9.0.2").run().is_err(), "the queue was dumped");
    let log = fs::read_to_string(images.join("dump.log"))?;
    ensure!(log.contains("is not to be carried, says SOCCR_POLICY (nobody has accepted it)"), "{log}");
    stage.wait_until_clean(Some(&server))?;
    wait_for_queue(&server)?;

    let (policy, images) = ("reset remote 10.9.0.2", stage.images()?);
    let dump = stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_POLICY", policy);
    dump.arg("--leave-running").run()?;
    stage.wait_until_clean(Some(&server))?;
    wait_for_queue(&server)?;

    let (address, images) = (server.address, stage.images()?);
    stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_POLICY", policy).dump_and_wait(server.task)?;
    for client in &mut clients {
        let error = client.read().err().map(|error| error.kind());
        ensure!(error == Some(std::io::ErrorKind::ConnectionReset), "a client sees {error:?}");
    }
    let server = stage.thaw(address, PLUGIN, &images)?;
    stage.wait_until_clean(Some(&server))?;
    all_wait(&server, 0)
}

/// The restore leaves them out of what was dumped whole.
#[test]
fn a_restore_leaves_them_out() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some((server, _clients)) = server_with_queue(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    let (task, _) = stage.restore(PLUGIN, &images)?.env("SOCCR_POLICY", "close").restore()?;
    let server = Server::restored(address, task, stage.dir());
    stage.wait_until_clean(Some(&server))?;
    all_wait(&server, 0)
}

/// They have the address that their listener has now.
#[test]
fn they_move_with_their_listener() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some((server, _clients)) = server_with_queue(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let images = stage.images()?;
    let mut address = stage.freeze(server, PLUGIN, &images)?;
    stage.host().ip("addr add 10.9.0.9/24 dev eth0")?;
    // The peers do not move with it, and would reset what they do not know.
    stage.peer.ip("route add blackhole 10.9.0.9/32")?;
    let (task, _) = stage.restore(PLUGIN, &images)?.env("SOCCR_REMAP", "10.9.0.1=10.9.0.9").restore()?;
    address.set_ip("10.9.0.9".parse()?);
    let server = Server::restored(address, task, stage.dir());
    stage.wait_until_clean(Some(&server))?;
    wait_for_queue(&server)?;
    // As the kernel shows them: 10.9.0.9, and any state but LISTEN.
    let table = stage.host().run(|| fs::read_to_string("/proc/thread-self/net/tcp"))?;
    let local = format!(" 0900090A:{:04X} ", address.port());
    let moved = table.lines().filter(|line| line.contains(&local) && !line.contains(" 0A ")).count();
    ensure!(moved == usize::from(CLIENTS), "{moved} are at {address}:\n{table}");
    Ok(())
}
