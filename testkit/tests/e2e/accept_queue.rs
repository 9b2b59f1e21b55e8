//! Connections that the server has not accepted when it is frozen.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, send, sendto, socket};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use soccr::kernel::sockopt;
use soccr_testkit::skip::lacks;
use soccr_testkit::sockets::{TaskSocket, state, tcp_sockets};
use soccr_testkit::task::wait_until;
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
        ensure!(error == Some(ErrorKind::ConnectionReset), "a client sees {error:?}");
    }
    let server = stage.thaw(address, PLUGIN, &images)?;
    stage.wait_until_clean(Some(&server))
}

/// Dumps a server whose clients' last ACKs of their handshakes, with a few bytes, come when it is frozen: no earlier, since a
/// rule on the clients' host drops them until criu calls its script.
fn dump_meanwhile(
    stage: &Stage,
    server: Server,
    clients: &mut [TcpStream],
    images: &Path,
    leave_running: bool,
) -> Result<Option<Server>> {
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
    let peer = &stage.peer;
    std::thread::scope(|scope| {
        let ends = scope.spawn(|| -> Result<()> {
            fs::read(&go)?;
            let_acks_pass(peer)?;
            clients.iter_mut().try_for_each(|client| client.write_all(b"early"))?;
            Ok(fs::write(&done, "\n")?)
        });
        let call = stage.dump(PLUGIN, server.pid(), images).arg("--action-script").arg(&script);
        let left = if leave_running {
            call.arg("--leave-running").run()?;
            Some(server)
        } else {
            call.dump_and_wait(server.task)?;
            None
        };
        ends.join().expect("no panic")?;
        Ok(left)
    })
}

fn handshakes_end_meanwhile(count: u8, args: &[&str], leave_running: bool) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(server) = late_server(&stage, SERVER_V4, args)? else { return Ok(()) };
    hold_back_acks(&stage, &server)?;
    let mut clients = (0..count).map(|_| connect(&stage, server.address)).collect::<Result<Vec<_>>>()?;
    all_wait(&server, 0)?;
    let (address, images) = (server.address, stage.images()?);
    let server = match dump_meanwhile(&stage, server, &mut clients, &images, leave_running)? {
        Some(server) => server,
        None => stage.thaw(address, PLUGIN, &images)?,
    };
    all_are_served_somehow(&stage, &server, &mut clients)
}

fn hold_back_acks(stage: &Stage, server: &Server) -> Result<()> {
    let rule = format!(
        "table inet late {{ chain out {{ type filter hook output priority 0; \
         tcp dport {} tcp flags & (syn | ack) == ack drop; }}; }}",
        server.address.port()
    );
    ensure!(stage.peer.command("nft").arg(rule).status()?.success(), "no rule");
    Ok(())
}

fn let_acks_pass(peer: &NetNs) -> Result<()> {
    ensure!(peer.command("nft").args(["delete", "table", "inet", "late"]).status()?.success());
    Ok(())
}

#[test]
fn a_handshake_that_ends_during_the_dump() -> Result<()> {
    handshakes_end_meanwhile(1, &[], false)
}

#[test]
fn a_handshake_that_ends_during_a_dump_that_leaves_the_server_running() -> Result<()> {
    handshakes_end_meanwhile(1, &[], true)
}

#[test]
fn handshakes_with_a_group_of_listeners_that_end_during_the_dump() -> Result<()> {
    handshakes_end_meanwhile(16, &["--group", "2"], false)
}

/// It is too late to refuse the dump. Of what does not fit the peer hears; where the server runs on, nothing has to fit.
#[test]
fn a_late_one_that_cannot_be_carried_is_reset() -> Result<()> {
    for leave_running in [false, true] {
        let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
        let Some(server) = late_server(&stage, SERVER_V4, &[])? else { return Ok(()) };
        hold_back_acks(&stage, &server)?;
        let mut clients = vec![connect(&stage, server.address)?];
        for small in ["add", "del"] {
            stage.peer.ip(&format!("route {small} {} dev eth0 advmss 500", server.address.ip()))?;
            clients.push(connect(&stage, server.address)?);
        }
        let (address, images) = (server.address, stage.images()?);
        if let Some(server) = dump_meanwhile(&stage, server, &mut clients, &images, leave_running)? {
            all_are_served_somehow(&stage, &server, &mut clients)?;
            continue;
        }
        let log = fs::read_to_string(images.join("dump.log"))?;
        let name = format!("{}, which nobody has accepted: ", clients[1].local_addr()?);
        ensure!(log.lines().any(|line| line.contains(&name) && line.ends_with("it is reset")), "{log}");
        let server = stage.thaw(address, PLUGIN, &images)?;
        let error = clients.remove(1).read(&mut [0]).err().map(|error| error.kind());
        ensure!(error == Some(ErrorKind::ConnectionReset), "the client sees {error:?}");
        all_are_served_somehow(&stage, &server, &mut clients)?;
    }
    Ok(())
}

/// A client on the other host that waits, after a few bytes.
fn waits(stage: &Stage, to: SocketAddr) -> Result<TcpStream> {
    let mut client = connect(stage, to)?;
    client.write_all(b"early")?;
    Ok(client)
}

fn connect(stage: &Stage, to: SocketAddr) -> Result<TcpStream> {
    let client = stage.peer.run(|| TcpStream::connect(to))?;
    client.set_read_timeout(Some(PATIENCE))?;
    Ok(client)
}

/// The server accepts it at this place, and it goes on.
fn is_served(client: &mut TcpStream, place: u8) -> Result<()> {
    expect(client, &[&[place], &b"early"[..]].concat())?;
    client.write_all(b"later")?;
    expect(client, b"later")
}

fn expect(client: &mut TcpStream, wanted: &[u8]) -> Result<()> {
    let mut said = vec![0xff; wanted.len()];
    client.read_exact(&mut said)?;
    ensure!(said == wanted, "{said:?} and not {wanted:?}");
    Ok(())
}

/// Sets an option of the listener.
fn set_option(server: &Server, level: i32, name: i32, value: &[u8]) -> Result<()> {
    for socket in tcp_sockets(server.pid())? {
        if socket.state()? == state::LISTEN {
            sockopt::set_bytes(socket.as_fd(), level, name, value)?;
        }
    }
    Ok(())
}

/// A dump that names the connection which it does not carry, and why.
fn refused(stage: &Stage, server: &Server, who: &TcpStream, why: &str) -> Result<()> {
    let images = stage.images()?;
    ensure!(stage.dump(PLUGIN, server.pid(), &images).run().is_err(), "the queue was dumped");
    let log = fs::read_to_string(images.join("dump.log"))?;
    let name = format!("{}, which nobody has accepted", who.local_addr()?);
    let named = log.lines().any(|line| line.contains(&name) && line.contains(why));
    ensure!(named, "the log does not name {name}:\n{log}");
    Ok(())
}

/// All are where they were, and are served in their order.
fn all_are_served(stage: &Stage, server: &Server, clients: &mut [TcpStream]) -> Result<()> {
    stage.wait_until_clean(Some(server))?;
    all_wait(server, u8::try_from(clients.len())?)?;
    server.release()?;
    (0..).zip(clients).try_for_each(|(place, client)| is_served(client, place))
}

/// All are where they were, and are served in any order.
fn all_are_served_somehow(stage: &Stage, server: &Server, clients: &mut [TcpStream]) -> Result<()> {
    stage.wait_until_clean(Some(server))?;
    all_wait(server, u8::try_from(clients.len())?)?;
    server.release()?;
    for client in clients {
        client.read_exact(&mut [0])?;
        expect(client, b"early")?;
    }
    Ok(())
}

/// The one that cannot be carried waits between two that can.
fn one_is_refused(address: &str, to: [&str; 3], why: &str) -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(server) = late_server(&stage, address, &[])? else { return Ok(()) };
    let port = server.address.port();
    let mut clients = Vec::new();
    for to in to {
        clients.push(waits(&stage, format!("{to}:{port}").parse()?)?);
    }
    refused(&stage, &server, &clients[1], why)?;
    all_are_served(&stage, &server, &mut clients)
}

#[test]
fn a_link_local_address_is_refused_and_nothing_lost() -> Result<()> {
    one_is_refused("[::]:0", ["[fd09::1]", "[fe80::1%2]", "[fd09::1]"], "link-local")
}

#[test]
fn a_small_segment_size_is_refused_and_nothing_lost() -> Result<()> {
    for (address, size) in [("[fd09::1]:0", 1000), (SERVER_V4, 500)] {
        let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
        let Some(server) = late_server(&stage, address, &[])? else { return Ok(()) };
        let mut clients = vec![waits(&stage, server.address)?];
        stage.peer.ip(&format!("route add {} dev eth0 advmss {size}", server.address.ip()))?;
        clients.push(waits(&stage, server.address)?);
        refused(&stage, &server, &clients[1], "segment size")?;
        all_are_served(&stage, &server, &mut clients)?;
    }
    Ok(())
}

/// Those that cannot be carried; the others come back.
#[test]
fn where_they_cannot_be_carried_they_are_reset_if_so_wished() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(server) = late_server(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let mut clients: Vec<_> = (0..2).map(|_| waits(&stage, server.address)).collect::<Result<_>>()?;
    send(clients[1].as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
    stage.peer.ip(&format!("route add {} dev eth0 advmss 500", server.address.ip()))?;
    clients.push(waits(&stage, server.address)?);
    for client in &clients {
        wait_until("all has arrived", PATIENCE, || Ok(TaskSocket::of(client)?.unacked()? == 0))?;
    }
    all_wait(&server, 3)?;
    let (address, images) = (server.address, stage.images()?);
    let dump = stage.dump(PLUGIN, server.pid(), &images).env("SOCCR_ACCEPT_QUEUE", "reset");
    dump.dump_and_wait(server.task)?;
    let server = stage.thaw(address, PLUGIN, &images)?;
    for mut client in clients.drain(1..) {
        let error = client.read(&mut [0]).err().map(|error| error.kind());
        ensure!(error == Some(ErrorKind::ConnectionReset), "a client sees {error:?}");
    }
    all_are_served(&stage, &server, &mut clients)
}

/// TCP Fast Open puts a connection into the queue whose handshake is not over.
#[test]
fn a_fast_opened_handshake_is_refused_and_nothing_lost() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    // Without a cookie: the client, and all listeners of the server.
    for (ns, value) in [(&stage.peer, "5"), (stage.host(), "1539")] {
        ns.run(|| fs::write("/proc/sys/net/ipv4/tcp_fastopen", value))?;
    }
    let Some(mut server) = late_server(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let before = waits(&stage, server.address)?;
    all_wait(&server, 1)?;
    hold_back_acks(&stage, &server)?;
    let mut client = stage.peer.run(|| fast_open(server.address))?;
    client.set_read_timeout(Some(PATIENCE))?;
    all_wait(&server, 2)?;
    refused(&stage, &server, &client, "Fast Open")?;
    let_acks_pass(&stage.peer)?;
    client.write_all(b"y")?;
    wait_until("the handshake is over", PATIENCE, || Ok(TaskSocket::of(&client)?.unacked()? == 0))?;
    // It is as any other then.
    stage.wait_until_clean(Some(&server))?;
    server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    all_are_served(&stage, &server, &mut [before, client])
}

/// A client whose SYN has the first bytes.
fn fast_open(to: SocketAddr) -> Result<TcpStream> {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let address = SockaddrStorage::from(to);
    sendto(socket.as_raw_fd(), b"earl", &address, MsgFlags::from_bits_retain(libc::MSG_FASTOPEN))?;
    Ok(socket.into())
}

/// With TCP_DEFER_ACCEPT a listener wants bytes to come before it makes a connection of a handshake.
#[test]
fn a_listener_that_waits_for_bytes() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(mut server) = late_server(&stage, SERVER_V4, &[])? else { return Ok(()) };
    set_option(&server, libc::SOL_TCP, libc::TCP_DEFER_ACCEPT, &30_i32.to_ne_bytes())?;
    let client = waits(&stage, server.address)?;
    all_wait(&server, 1)?;
    server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    all_wait(&server, 1)?;
    // One that has sent nothing is not in the queue; a server that runs on hears it later.
    let mut silent = connect(&stage, server.address)?;
    let images = stage.images()?;
    stage.dump(PLUGIN, server.pid(), &images).arg("--leave-running").run()?;
    stage.wait_until_clean(Some(&server))?;
    all_wait(&server, 1)?;
    silent.write_all(b"early")?;
    all_are_served(&stage, &server, &mut [client, silent])
}

/// Only whose socket it is learns of urgent data, so it is taken out of its queue to find out.
#[test]
fn urgent_data_is_refused_and_nothing_lost() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(server) = late_server(&stage, SERVER_V4, &[])? else { return Ok(()) };
    let mut clients = Vec::new();
    for place in 0..3 {
        let client = waits(&stage, server.address)?;
        if place == 1 {
            send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
            (&client).write_all(b"more")?;
        }
        wait_until("all has arrived", PATIENCE, || Ok(TaskSocket::of(&client)?.unacked()? == 0))?;
        clients.push(client);
    }
    all_wait(&server, 3)?;
    refused(&stage, &server, &clients[1], "urgent")?;
    stage.wait_until_clean(Some(&server))?;
    all_wait(&server, 3)?;
    server.release()?;
    is_served(&mut clients[0], 0)?;
    // As ever, the urgent byte is not read with the others.
    expect(&mut clients[1], b"\x01earlymore")?;
    is_served(&mut clients[2], 2)
}

/// Whichever of a group's listeners the kernel chooses.
#[test]
fn of_a_group_of_listeners() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(mut server) = late_server(&stage, SERVER_V4, &["--group", "2"])? else { return Ok(()) };
    let mut clients = (0..16).map(|_| waits(&stage, server.address)).collect::<Result<Vec<_>>>()?;
    all_wait(&server, 16)?;
    server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    all_are_served_somehow(&stage, &server, &mut clients)
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
        ensure!(error == Some(ErrorKind::ConnectionReset), "a client sees {error:?}");
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
