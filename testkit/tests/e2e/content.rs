//! Whatever is under way when the server is frozen arrives whole, checked by content.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use soccr_testkit::capture::Seen as OnWire;
use soccr_testkit::fleet::Seen;
use soccr_testkit::interrupt::pause;
use soccr_testkit::sockets::{TaskSocket, sockets, state, tcp_sockets};
use soccr_testkit::stage::V4;
use soccr_testkit::task::wait_until;
use soccr_testkit::{Capture, Client, Fleet, Lock, Place, Server, Side};

use crate::world::{BUSY, PATIENCE, PLUGIN, SERVER_V4, stage};

/// Clients that go on sending while the server is frozen and while it is restored.
const CLIENTS: usize = 20;

/// `listen` is the server's address, `reach` the clients' way to it.
fn busy_peers(listen: &str, reach: &str) -> Result<()> {
    let Some((seen, capture, _)) = frozen_for(Duration::ZERO, listen, reach)? else { return Ok(()) };
    let clients = seen.whole()?;
    ensure!(capture.resets.is_empty(), "{} (and {} more)", capture.resets[0], capture.resets.len() - 1);
    ensure!(capture.segments > CLIENTS, "the capture saw only {} segments", capture.segments);
    ensure!(clients.iter().all(|client| client.received() > 0), "a client never got anything");
    Ok(())
}

/// What busy clients, and the wire, saw of a freeze of at least this time, and how long it was.
fn frozen_for(time: Duration, listen: &str, reach: &str) -> Result<Option<(Seen, OnWire, Duration)>> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(None) };
    let server = stage.serve(listen, &["--mode", "echo"])?;
    let mut reach: SocketAddr = reach.parse()?;
    reach.set_port(server.address.port());
    let clients = (0..CLIENTS).map(|_| stage.connect(reach)).collect::<Result<_>>()?;
    let capture = Capture::start(&stage.peer)?;
    let busy = Fleet::echoes(clients, BUSY)?;

    let images = stage.images()?;
    let frozen = Instant::now();
    let address = stage.freeze(server, PLUGIN, &images)?;
    pause(time)?;
    let server = stage.thaw(address, PLUGIN, &images)?;
    let frozen = frozen.elapsed();
    let seen = busy.stop(PATIENCE);
    stage.wait_until_clean(Some(&server))?;
    Ok(Some((seen, capture.stop()?, frozen)))
}

/// A peer retransmits into the lock after 0.2 s, and then each time after twice as long: if the lock goes away just after
/// such a try, the next comes when about as much time again has passed. That is how long stock's peers wait. This much
/// more is for a machine that does other things too, and lets the first try wait for up to a second (RFC 6298).
const SLACK: Duration = Duration::from_secs(2);

#[test]
fn peers_wait_no_longer_than_with_stock() -> Result<()> {
    let freeze = Duration::from_millis(1500);
    let Some((seen, _, frozen)) = frozen_for(freeze, SERVER_V4, "10.9.0.1:0")? else { return Ok(()) };
    let silence = seen.silence;
    seen.whole()?;
    ensure!(silence >= freeze, "the clients were not frozen");
    ensure!(silence <= 2 * frozen + SLACK, "a client got nothing for {silence:?}: frozen for {frozen:?}");
    Ok(())
}

/// What the others are checked for can be seen: without a lock, peers that send to a frozen server are reset.
#[test]
fn peers_without_a_lock_are_reset() -> Result<()> {
    let skip = Side::Plugin(Lock::Skip);
    let Some(mut stage) = stage(Place::Host, &[skip])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| stage.connect(server.address)).collect::<Result<_>>()?;
    clients.iter_mut().try_for_each(|client| client.ping(1000))?;
    let capture = Capture::start(&stage.peer)?;
    let images = stage.images()?;
    stage.freeze(server, skip, &images)?;
    ensure!(clients.iter_mut().all(|client| client.ping(1000).is_err()), "a client was answered");
    let resets = capture.stop()?.resets.len();
    ensure!(resets >= CLIENTS, "{resets} resets for {CLIENTS} clients");
    Ok(())
}

#[test]
fn busy_peers_over_ipv4() -> Result<()> {
    busy_peers(SERVER_V4, "10.9.0.1:0")
}

#[test]
fn busy_peers_over_ipv6() -> Result<()> {
    busy_peers("[fd09::1]:0", "[fd09::1]:0")
}

/// Scope 2 is the veth of either host, its first interface after loopback.
#[test]
fn busy_peers_over_ipv6_link_local() -> Result<()> {
    busy_peers("[fe80::1%2]:0", "[fe80::1%2]:0")
}

/// The server is not bound to a device, but each of its connections is: the kernel does that.
#[test]
fn busy_peers_over_ipv6_link_local_of_a_server_anywhere() -> Result<()> {
    busy_peers("[::]:0", "[fe80::1%2]:0")
}

#[test]
fn busy_peers_over_ipv4_mapped_addresses() -> Result<()> {
    busy_peers("[::]:0", "10.9.0.1:0")
}

#[test]
fn unread_900_kb() -> Result<()> {
    const UNREAD: usize = 900_000;
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let args = ["--mode", "stream", "--conns", "1", "--hold", "--rcvbuf", "4000000"];
    let server = stage.serve(SERVER_V4, &args)?;
    let mut client = stage.connect(server.address)?;
    client.send(UNREAD)?;
    wait_for_socket(&server, "all is there and unread", |socket| Ok(socket.unread()? == UNREAD))?;

    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    client.send(100_000)?;
    server.release()?;
    client.finish()?;
    client.receive_to_end(0)?;
    server.wait_verified()
}

/// Each queue holds 64 MiB, which no buffer of a usual size does: the peer's window is closed, and so is ours.
#[test]
fn queues_of_64_mib_each() -> Result<()> {
    const QUEUE: usize = 64 << 20;
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (send, buffer) = (QUEUE.to_string(), (3 * QUEUE / 2).to_string());
    let args = ["--mode", "stream", "--conns", "1", "--hold", "--send", &send, "--sndbuf", &buffer];
    let server = stage.serve(SERVER_V4, &[&args[..], &["--rcvbuf", &buffer]].concat())?;
    let mut client = stage.peer.run(|| Client::connect_small(server.address, 20_000))?;
    client.send(QUEUE)?;
    wait_for_socket(&server, "both queues are full", |socket| {
        Ok(socket.unread()? == QUEUE && socket.unacked()? > QUEUE - (1 << 20))
    })?;

    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    server.release()?;
    client.finish()?;
    client.receive_to_end(QUEUE as u64)?;
    server.wait_verified()
}

/// Both ends are dumped, each with data that waits to be read, one with more than the other's window
/// takes. (With both so, each end's answers lie beyond the other's window, and Linux from 6.17 on may
/// drop them: CRIU's own test of that hangs now and then.)
fn both_ends(join: &str) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let conns = if join == "self" { "2" } else { "1" };
    let args = ["--mode", "stream", "--conns", conns, "--hold", "--send", "300000", "--sndbuf", "1000000"];
    let client = ["--join", join, "--back", "20000"];
    let server = stage.serve("127.0.0.1:0", &[args.as_slice(), &client].concat())?;
    wait_until("data waits at both ends", PATIENCE, || {
        let mut ends = 0;
        for pid in server.task.tree() {
            for socket in tcp_sockets(pid)? {
                ends += usize::from(socket.state()? == state::ESTABLISHED && socket.unread()? > 0);
            }
        }
        Ok(ends == 2)
    })?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    server.release()?;
    server.wait_verified()
}

#[test]
fn a_process_connected_to_itself() -> Result<()> {
    both_ends("self")
}

#[test]
fn two_processes_of_one_tree() -> Result<()> {
    both_ends("child")
}

/// Sockets that are in no descriptor table: SCM_RIGHTS messages that nobody has received yet.
#[test]
fn sockets_in_flight_in_unix_sockets() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "inflight"])?;
    let mut clients: Vec<_> = (0..3).map(|_| stage.connect(server.address)).collect::<Result<_>>()?;
    clients.iter_mut().try_for_each(|client| client.send(5000))?;
    wait_until("all are in flight", PATIENCE, || {
        // The listener, and both ends of each unix socket.
        let sockets = sockets(server.pid())?.len();
        Ok(tcp_sockets(server.pid())?.len() == 1 && sockets == 1 + 2 * clients.len())
    })?;

    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    server.release()?;
    for client in &mut clients {
        client.receive_echo(5000)?;
        client.ping(3000)?;
    }
    Ok(())
}

/// What stock CRIU does not bring back: the segment size (with nothing unsent it comes back as 524),
/// and SO_REUSEPORT, which it leaves on.
#[test]
fn segment_size_and_reuse_flags_stay() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut client = stage.connect(server.address)?;
    client.ping(20_000)?;
    let before = looks(server.pid())?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    client.ping(20_000)?;
    let after = looks(server.pid())?;
    ensure!(before.len() == 1 && before == after, "{before:?} became {after:?}");
    Ok(())
}

/// Segment size, SO_REUSEADDR and SO_REUSEPORT of each connection.
fn looks(pid: nix::unistd::Pid) -> Result<Vec<(u32, i32, i32)>> {
    let mut found = Vec::new();
    for socket in tcp_sockets(pid)? {
        if socket.state()? != state::LISTEN {
            let flag = |name| socket.option(libc::SOL_SOCKET, name);
            found.push((socket.snd_mss()?, flag(libc::SO_REUSEADDR)?, flag(libc::SO_REUSEPORT)?));
        }
    }
    Ok(found)
}

/// A server in `state` when frozen; `args` and `before` bring it there, `after` ends both streams.
fn half_closed(
    state: u8,
    args: &[&str],
    before: impl FnOnce(&mut Client, &Server) -> Result<()>,
    after: impl FnOnce(&mut Client) -> Result<()>,
) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let args = [&["--mode", "stream", "--conns", "1"], args].concat();
    let server = stage.serve(SERVER_V4, &args)?;
    let mut client = stage.peer.run(|| Client::connect_small(server.address, 20_000))?;
    before(&mut client, &server)?;
    wait_for_socket(&server, "the server is half closed", |socket| Ok(socket.state()? == state))?;

    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    ensure!(any(server.pid(), |socket| Ok(socket.state()? == state))?, "the state is another one now");
    after(&mut client)?;
    server.release()?;
    server.wait_verified()
}

/// More than the client's window takes, less than the server's send buffer.
const STUCK: [&str; 4] = ["--send", "300000", "--sndbuf", "1000000"];

#[test]
fn fin_wait1_with_data_before_the_fin() -> Result<()> {
    let args = [&STUCK[..], &["--shutdown"]].concat();
    half_closed(
        state::FIN_WAIT1,
        &args,
        |_, _| Ok(()),
        |client| {
            client.receive_to_end(300_000)?;
            client.send(5000)?;
            client.finish()
        },
    )
}

#[test]
fn fin_wait2() -> Result<()> {
    half_closed(
        state::FIN_WAIT2,
        &["--send", "1000", "--shutdown"],
        |_, _| Ok(()),
        |client| {
            client.receive_to_end(1000)?;
            client.send(5000)?;
            client.finish()
        },
    )
}

#[test]
fn close_wait_with_a_closed_window() -> Result<()> {
    let args = ["--send", "1000000", "--sndbuf", "20000"];
    half_closed(
        state::CLOSE_WAIT,
        &args,
        |client, _| client.finish(),
        |client| client.receive_to_end(1_000_000),
    )
}

#[test]
fn last_ack_with_data_before_the_fin() -> Result<()> {
    let args = [&STUCK[..], &["--keep"]].concat();
    half_closed(state::LAST_ACK, &args, |client, _| client.finish(), |client| client.receive_to_end(300_000))
}

/// The client's FIN comes when the server's own is stuck behind data.
#[test]
fn closing_with_data_before_the_fin() -> Result<()> {
    let args = [&STUCK[..], &["--shutdown", "--keep"]].concat();
    let before =
        |client: &mut Client, server: &Server| {
            wait_for_socket(server, "the server has shut down", |socket| {
                Ok(socket.state()? == state::FIN_WAIT1)
            })?;
            client.finish()
        };
    half_closed(state::CLOSING, &args, before, |client| client.receive_to_end(300_000))
}

#[test]
fn closed() -> Result<()> {
    let before = |client: &mut Client, _: &Server| {
        client.send(1000)?;
        client.finish()?;
        client.receive_to_end(1000)
    };
    half_closed(state::CLOSE, &["--send", "1000", "--keep"], before, |_| Ok(()))
}

/// It has nothing to take and nothing to give: whatever has become of its address.
#[test]
fn a_closed_connection_needs_no_address() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let args = ["--mode", "stream", "--conns", "1", "--send", "1000", "--keep"];
    let server = stage.serve("0.0.0.0:0", &args)?;
    let mut client = stage.connect(SocketAddr::new(V4.parse()?, server.address.port()))?;
    client.finish()?;
    client.receive_to_end(1000)?;
    wait_for_socket(&server, "the connection is closed", |socket| Ok(socket.state()? == state::CLOSE))?;
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    stage.host().ip(&format!("addr del {V4}/24 dev eth0"))?;
    let server = stage.thaw(address, PLUGIN, &images)?;
    ensure!(any(server.pid(), |socket| Ok(socket.state()? == state::CLOSE))?, "the state is another one now");
    stage.wait_until_clean(Some(&server))?;
    server.release()?;
    server.wait_verified()
}

/// An interface is known by its name: at the target it may have another number.
#[test]
fn a_link_local_address_finds_its_interface() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve("[::]:0", &["--mode", "echo"])?;
    let mut client = stage.connect(format!("[fe80::1%2]:{}", server.address.port()).parse()?)?;
    client.ping(5000)?;
    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    // Its peer's end of the wire has the number as before, to which the peer's socket is bound.
    stage.host().ip("link del eth0")?;
    let peer = stage.peer.path();
    stage.host().ip(&format!("link add eth0 index 77 type veth peer name eth0 index 2 netns {peer}"))?;
    for (ns, address) in [(stage.host(), "fe80::1/64"), (&stage.peer, "fe80::2/64")] {
        ns.ip("link set eth0 addrgenmode none")?;
        ns.ip("link set eth0 up")?;
        ns.ip(&format!("addr add {address} dev eth0 nodad"))?;
    }
    let server = stage.thaw(address, PLUGIN, &images)?;
    client.ping(5000)?;
    stage.wait_until_clean(Some(&server))
}

fn wait_for_socket(server: &Server, what: &str, is: impl Fn(&TaskSocket) -> Result<bool>) -> Result<()> {
    wait_until(what, PATIENCE, || any(server.pid(), &is))
}

/// Whether any connection of the process is so; listeners are not asked.
fn any(pid: nix::unistd::Pid, is: impl Fn(&TaskSocket) -> Result<bool>) -> Result<bool> {
    for socket in tcp_sockets(pid)? {
        if socket.state()? != state::LISTEN && is(&socket)? {
            return Ok(true);
        }
    }
    Ok(false)
}
