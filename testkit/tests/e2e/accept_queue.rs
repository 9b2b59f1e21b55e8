//! Connections that the server has not accepted when it is frozen.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use soccr_testkit::skip::lacks;
use soccr_testkit::sockets::{TaskSocket, state, tcp_sockets};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Place, Server, Side, Stage};

use crate::world::{PATIENCE, PLUGIN, PLUGIN_IPTABLES, SERVER_V4, stage};

const LATE: [&str; 3] = ["--mode", "echo", "--late"];
const CLIENTS: u8 = 20;

/// A client, with what it has sent before it was accepted; every fourth has sent a FIN as well.
struct Waiting {
    stream: TcpStream,
    sent: Vec<u8>,
    finished: bool,
}

impl Waiting {
    fn connect(stage: &Stage, server: SocketAddr, nth: u8) -> Result<Self> {
        let mut stream = stage.peer.run(|| TcpStream::connect(server))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let bytes = (nth..=u8::MAX).cycle();
        let sent: Vec<u8> = bytes.take([0, 1, 3001][usize::from(nth % 3)]).collect();
        stream.write_all(&sent)?;
        let finished = nth.is_multiple_of(4);
        if finished {
            stream.shutdown(Shutdown::Write)?;
        }
        wait_until("the server's kernel has all", PATIENCE, || {
            let socket = TaskSocket::of(&stream)?;
            Ok(socket.unacked()? == 0 && (!finished || socket.state()? == state::FIN_WAIT2))
        })?;
        Ok(Self { stream, sent, finished })
    }

    /// It is the `nth` to be accepted, what it has sent is echoed, and it goes on both ways.
    fn goes_on(&mut self, nth: u8) -> Result<()> {
        let mut place = [0];
        self.stream.read_exact(&mut place).context("the server says nothing")?;
        ensure!(place[0] == nth, "it came {nth}th and was accepted {}th", place[0]);
        let mut echo = vec![0; self.sent.len()];
        self.stream.read_exact(&mut echo).context("what was sent before")?;
        ensure!(echo == self.sent, "another echo than what was sent");
        if self.finished {
            ensure!(self.stream.read(&mut place)? == 0, "more than was sent");
            return Ok(());
        }
        let more = vec![nth; 20_000];
        self.stream.write_all(&more)?;
        let mut echo = vec![0; more.len()];
        self.stream.read_exact(&mut echo).context("what was sent afterwards")?;
        ensure!(echo == more, "another echo than what was sent");
        Ok(())
    }
}

/// A server that accepts nothing yet, and clients that wait. `None`: this kernel cannot carry them.
fn server_with_queue(stage: &Stage, address: &str, args: &[&str]) -> Result<Option<(Server, Vec<Waiting>)>> {
    let btf = fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
    let function = b"bpf_sk_assign_tcp_reqsk\0";
    if !btf.windows(function.len()).any(|name| name == function) {
        return lacks("bpf_sk_assign_tcp_reqsk").map(|()| None);
    }
    let server = stage.serve(address, &[&LATE[..], args].concat())?;
    let clients =
        (0..CLIENTS).map(|nth| Waiting::connect(stage, server.address, nth)).collect::<Result<_>>()?;
    wait_for_queue(&server)?;
    Ok(Some((server, clients)))
}

/// Waits until all stand in the queue.
fn wait_for_queue(server: &Server) -> Result<()> {
    wait_until("all are in the accept queue", PATIENCE, || {
        let mut waiting = 0;
        for socket in tcp_sockets(server.pid())? {
            waiting += if socket.state()? == state::LISTEN { socket.waiting()? } else { 0 };
        }
        Ok(waiting == u32::from(CLIENTS))
    })
}

fn all_go_on(server: &Server, clients: &mut [Waiting]) -> Result<()> {
    server.release()?;
    for (nth, client) in (0..).zip(clients) {
        client.goes_on(nth).with_context(|| format!("client {nth}"))?;
    }
    Ok(())
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
        client.stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let error = client.stream.read(&mut [0]).err().map(|error| error.kind());
        ensure!(error == Some(std::io::ErrorKind::ConnectionReset), "a client sees {error:?}");
    }
    let server = stage.thaw(address, PLUGIN, &images)?;
    stage.wait_until_clean(Some(&server))
}
