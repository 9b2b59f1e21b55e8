//! Every socket option comes back, on connections and on listeners, and so does who owns the socket.

#[path = "../../../tests/support/options.rs"]
mod every;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::stat::fstat;
use nix::unistd::fchown;
use soccr::kernel::options::{Care, Known, On, TABLE};
use soccr::kernel::sockopt;
use soccr_testkit::capture::Capture;
use soccr_testkit::rpc::Rpc;
use soccr_testkit::skip::lacks;
use soccr_testkit::sockets::{TaskSocket, ebpf_filter, state, tcp_sockets};
use soccr_testkit::task::wait_until;
use soccr_testkit::{Client, Pattern, Place, Server, Stage, Task};

use crate::promises::faulty;
use crate::world::{PATIENCE, PLUGIN, SERVER_V4, STOCK, stage};

/// What a socket was, and is to be again.
#[derive(Debug, PartialEq)]
struct Shown {
    options: BTreeMap<&'static str, Vec<u8>>,
    owner: (u32, u32),
}

impl Shown {
    fn of(socket: &TaskSocket) -> Result<Self> {
        let stat = fstat(socket)?;
        let mut options = every::all(socket.as_fd());
        if socket.state()? != state::LISTEN {
            options.retain(|name, _| !of_no_effect_on_a_connection(name));
        }
        Ok(Self { options, owner: (stat.st_uid, stat.st_gid) })
    }

    /// What is another thing now.
    fn differences(&self, now: &Self) -> Vec<String> {
        let differs = |(name, value): (&&'static str, &Vec<u8>)| {
            let now = now.options.get(name);
            (now != Some(value)).then(|| format!("{name}: {value:?}, now {now:?}"))
        };
        let options = self.options.iter().filter_map(differs);
        let owner =
            (self.owner != now.owner).then(|| format!("owner: {:?}, now {:?}", self.owner, now.owner));
        options.chain(owner).collect()
    }
}

fn of_no_effect_on_a_connection(name: &str) -> bool {
    let only = |known: &&Known| matches!(known.care, Care::Carried(_, On::Unconnected));
    TABLE.iter().filter(only).any(|known| known.text == name)
}

/// The server's listener and its connection with the client.
fn sockets(server: &Server) -> Result<(TaskSocket, TaskSocket)> {
    let mut sockets = tcp_sockets(server.pid())?;
    let listener = sockets.iter().position(|socket| socket.state().is_ok_and(|it| it == state::LISTEN));
    let listener = sockets.remove(listener.context("no listener")?);
    let connection = sockets.pop().context("no connection")?;
    ensure!(sockets.is_empty(), "more than one connection");
    Ok((listener, connection))
}

/// A server that listens there, and a client that comes that way.
fn served(stage: &Stage, listen: &str, reach: &str) -> Result<(Server, Client)> {
    let server = stage.serve(listen, &["--mode", "echo"])?;
    let mut client = stage.connect(SocketAddr::new(reach.parse()?, server.address.port()))?;
    client.ping(1000)?;
    Ok((server, client))
}

/// Changes all of both sockets, and gives them to somebody.
fn change(server: &Server) -> Result<()> {
    // Bound sockets keep the first two. Reserved memory needs a cgroup that accounts for it, a routing header a kernel with
    // segment routing; and without such a header no packet goes out whose options shall stand before it.
    let fixed = ["IPV6_V6ONLY", "TCP_FASTOPEN_CONNECT", "SO_RESERVE_MEM", "IPV6_RTHDR"];
    let ipv4 = server.address.is_ipv4();
    let (listener, connection) = sockets(server)?;
    for (socket, but) in [(&listener, &[][..]), (&connection, &["IPV6_RTHDRDSTOPTS"][..])] {
        let is_connection = socket.state()? != state::LISTEN;
        let mut unchanged = every::change(socket.as_fd(), "eth0", &[&fixed, but].concat());
        unchanged.retain(|name| !(is_connection && of_no_effect_on_a_connection(name)));
        unchanged.retain(|name| !(ipv4 && name.starts_with("IPV6_")));
        ensure!(unchanged.is_empty(), "not changed: {unchanged:?}");
        fchown(socket, Some(1234.into()), Some(567.into()))?;
    }
    Ok(())
}

fn shown(server: &Server) -> Result<[Shown; 2]> {
    let (listener, connection) = sockets(server)?;
    Ok([Shown::of(&listener)?, Shown::of(&connection)?])
}

/// The server through a dump and a restore, with all options changed; and how it comes through them.
fn come_back(
    listen: &str,
    reach: &str,
    place: Place,
    through: impl FnOnce(&mut Stage, Server) -> Result<Server>,
) -> Result<()> {
    let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
    let (server, mut client) = served(&stage, listen, reach)?;
    change(&server)?;
    client.ping(1000).context("with other options than the defaults")?;
    let before = shown(&server)?;
    let server = through(&mut stage, server)?;
    let after = shown(&server)?;
    for ((before, after), name) in before.iter().zip(&after).zip(["listener", "connection"]) {
        let lost = before.differences(after);
        ensure!(lost.is_empty(), "{place:?}, {name}: {}", lost.join("\n"));
    }
    client.ping(1000)
}

/// Nothing is another thing where nobody has changed anything.
#[test]
fn defaults_come_back() -> Result<()> {
    for (listen, reach) in [(SERVER_V4, "10.9.0.1"), ("[fd09::1]:0", "fd09::1"), ("[::]:0", "10.9.0.1")] {
        let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
        let (server, mut client) = served(&stage, listen, reach)?;
        let before = shown(&server)?;
        let server = plugin(&mut stage, server)?;
        for (before, after) in before.iter().zip(&shown(&server)?) {
            let lost = before.differences(after);
            ensure!(lost.is_empty(), "{listen}: {}", lost.join("\n"));
        }
        client.ping(1000)?;
    }
    Ok(())
}

fn plugin(stage: &mut Stage, server: Server) -> Result<Server> {
    stage.freeze_and_thaw(server, PLUGIN, PLUGIN)
}

#[test]
fn come_back_ipv4() -> Result<()> {
    come_back(SERVER_V4, "10.9.0.1", Place::Host, plugin)
}

#[test]
fn come_back_ipv6() -> Result<()> {
    come_back("[fd09::1]:0", "fd09::1", Place::Host, plugin)
}

#[test]
fn come_back_on_both_families_at_once() -> Result<()> {
    come_back("[::]:0", "10.9.0.1", Place::External, plugin)
}

/// With `--tcp-established` and the plugin loaded CRIU carries the connections, and the plugin what CRIU does not.
fn beside_criu(stage: &mut Stage, server: Server) -> Result<Server> {
    let (images, address, pid) = (stage.images()?, server.address, server.pid());
    let plugins = stage.criu.plugin().with_file_name("");
    let (_, connection) = sockets(&server)?;
    let segment = connection.snd_mss()?;
    drop(connection);
    let dumped = stage.dump(STOCK, pid, &images).arg("--lib").arg(&plugins).dump_and_wait(server.task)?;
    let log = fs::read_to_string(dumped.log)?;
    ensure!(
        log.contains("soccr: CRIU carries the connections itself"),
        "the log does not say how to get the rest"
    );
    let (task, _) = stage.restore(STOCK, &images)?.arg("--lib").arg(&plugins).restore()?;
    let server = Server::restored(address, task, stage.dir());
    let (_, connection) = sockets(&server)?;
    let now = connection.snd_mss()?;
    ensure!(now == segment, "segments had {segment} bytes, and now {now}");
    stage.wait_until_clean(Some(&server))?;
    Ok(server)
}

#[test]
fn come_back_beside_tcp_established() -> Result<()> {
    come_back(SERVER_V4, "10.9.0.1", Place::Host, beside_criu)
}

/// As runtimes call CRIU by default.
#[test]
fn come_back_beside_tcp_established_that_a_request_asks_for() -> Result<()> {
    come_back(SERVER_V4, "10.9.0.1", Place::Host, |stage, server| {
        let (images, address) = (stage.images()?, server.address);
        let config = stage.dir().join("criu.conf");
        let plugins = stage.criu.plugin().with_file_name("");
        fs::write(&config, format!("libdir {}\nnetwork-lock nftables\n", plugins.display()))?;
        let criu = Rpc::Swrk(stage);
        criu.dump(server.pid(), &images, &config)?;
        server.task.wait(PATIENCE)?;
        let log = fs::read_to_string(images.join("dump.log"))?;
        ensure!(log.contains("soccr: CRIU carries the connections itself"), "{log}");
        let task = Task::adopt(criu.restore(&images, &config)?);
        let server = Server::restored(address, task, stage.dir());
        stage.wait_until_clean(Some(&server))?;
        Ok(server)
    })
}

/// Beside CRIU's own TCP an agent that dies, or a step that fails, costs what CRIU does not carry, and no more.
#[test]
fn what_fails_beside_criu_fails_nothing() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let Some(faulty) = faulty(&stage)? else { return Ok(()) };
    for fault in
        ["beside.asked:kill-agent", "beside.asked:error", "beside.end:kill-agent", "beside.end:error"]
    {
        let (server, mut client) = served(&stage, SERVER_V4, "10.9.0.1")?;
        let (images, address) = (stage.images()?, server.address);
        let plugins = faulty.plugin().with_file_name("");
        let call =
            stage.dump(STOCK, server.pid(), &images).arg("--lib").arg(plugins).env("SOCCR_FAULT", fault);
        let dumped = call.dump_and_wait(server.task).context(fault)?;
        let log = fs::read_to_string(dumped.log)?;
        ensure!(log.contains("what CRIU does not carry is lost"), "{fault}: the log does not say so");
        let (task, _) = stage.restore(STOCK, &images)?.restore().context(fault)?;
        client.ping(1000).context(fault)?;
        stage.wait_until_clean(Some(&Server::restored(address, task, stage.dir())))?;
    }
    Ok(())
}

/// What is checked for can be seen: stock CRIU alone loses most.
#[test]
fn stock_loses_some() -> Result<()> {
    let stock = |stage: &mut Stage, server| stage.freeze_and_thaw(server, STOCK, STOCK);
    if stage(Place::Host, &[PLUGIN])?.is_none() {
        return Ok(());
    }
    let lost = come_back(SERVER_V4, "10.9.0.1", Place::Host, stock).err().context("stock lost nothing")?;
    let lost = format!("{lost:#}");
    ensure!(lost.contains("TCP_USER_TIMEOUT") && lost.contains("owner"), "{lost}");
    Ok(())
}

/// SO_SNDBUF, SO_RCVBUF, SO_BUF_LOCK (which Linux before 5.14 does not show) and TCP_WINDOW_CLAMP of the server's connection.
fn buffers(server: &Server) -> Result<[i32; 4]> {
    const SO_BUF_LOCK: i32 = 72;
    let (_, connection) = sockets(server)?;
    let one = |name| connection.option(libc::SOL_SOCKET, name);
    let clamp = connection.option(libc::SOL_TCP, libc::TCP_WINDOW_CLAMP)?;
    // setsockopt() doubles what it is given, so that an odd byte is lost.
    Ok([one(libc::SO_SNDBUF)? / 2, one(libc::SO_RCVBUF)? / 2, one(SO_BUF_LOCK).unwrap_or(0), clamp])
}

/// Buffers that the kernel has tuned are as large as they were, and are tuned further; those that the program has fixed stay.
#[test]
fn buffers_come_back() -> Result<()> {
    for fixed in [false, true] {
        let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
        let (server, mut client) = served(&stage, SERVER_V4, "10.9.0.1")?;
        let (_, connection) = sockets(&server)?;
        for name in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
            let size = 50_000_i32.to_ne_bytes();
            ensure!(!fixed || sockopt::set_bytes(connection.as_fd(), libc::SOL_SOCKET, name, &size).is_ok());
        }
        drop(connection);
        let fresh = buffers(&server)?;
        let mut busy = || (0..50).try_for_each(|_| client.ping(128 << 10));
        busy()?;
        let tuned = buffers(&server)?;
        ensure!((tuned[..2] == fresh[..2]) == fixed, "buffers {fresh:?}, and after use {tuned:?}");
        let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
        let now = buffers(&server)?;
        ensure!(now == tuned, "buffers {tuned:?}, and now {now:?}");
        busy()?;
        let later = buffers(&server)?;
        ensure!(!fixed || later[..3] == tuned[..3], "fixed buffers {tuned:?}, and later {later:?}");
    }
    Ok(())
}

/// A full receive queue takes more than its buffer while it is built, and leaves the buffer as it was.
#[test]
fn a_full_buffer_comes_back() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo", "--hold"])?;
    let mut client = stage.connect(server.address)?;
    let sent = usize::try_from(client.fill()?)?;
    let before = buffers(&server)?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    let now = buffers(&server)?;
    ensure!(now == before, "buffers {before:?}, and now {now:?}");
    server.release()?;
    client.receive_echo(sent)
}

/// Where a program peeks next (SO_PEEK_OFF) is the same byte of the same queue.
#[test]
fn a_peek_offset_comes_back_with_its_queue() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let server = stage.serve(SERVER_V4, &["--mode", "echo", "--hold"])?;
    let mut client = stage.connect(server.address)?;
    client.send(10_000)?;
    let queued = || Ok(sockets(&server).is_ok_and(|(_, it)| it.unread().is_ok_and(|bytes| bytes == 10_000)));
    wait_until("all is queued", PATIENCE, queued)?;
    let (_, connection) = sockets(&server)?;
    if sockopt::set_peek_offset(connection.as_fd(), 4321).is_err() {
        return lacks("TCP has no SO_PEEK_OFF before Linux 6.9");
    }
    let next = |socket: &TaskSocket| -> Result<[u8; 64]> {
        let mut bytes = [0; 64];
        let got = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)?;
        ensure!(got == 64, "{got} bytes");
        Ok(bytes)
    };
    let first = next(&connection)?;
    let expected = Pattern::to_server(client.port()).bytes(4321, 128);
    ensure!(first[..] == expected[..64], "peeked elsewhere");
    drop(connection);
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    let (_, connection) = sockets(&server)?;
    ensure!(next(&connection)?[..] == expected[64..], "it peeks elsewhere now");
    server.release()?;
    client.receive_echo(10_000)
}

/// A restored connection that is silent is probed after its TCP_KEEPIDLE; without SO_KEEPALIVE nobody hears a thing.
#[test]
fn keepalive_goes_on() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(1);
    for on in [1_i32, 0] {
        let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
        let (server, mut client) = served(&stage, SERVER_V4, "10.9.0.1")?;
        let (_, connection) = sockets(&server)?;
        for (level, name, value) in [
            (libc::SOL_TCP, libc::TCP_KEEPIDLE, 1),
            (libc::SOL_TCP, libc::TCP_KEEPINTVL, 1),
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, on),
        ] {
            sockopt::set_bytes(connection.as_fd(), level, name, &value.to_ne_bytes())?;
        }
        drop(connection);
        let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
        // What wakes the flow is over when a ping has come back and is acknowledged.
        client.ping(1000)?;
        let (_, connection) = sockets(&server)?;
        wait_until("all is acknowledged", PATIENCE, || Ok(connection.unacked()? == 0))?;
        let capture = Capture::start(&stage.peer)?;
        let probed = wait_until("a probe", 2 * IDLE, || Ok(capture.segments() >= 2));
        ensure!(probed.is_ok() == (on == 1), "keepalive is {on}, and {} segments came", capture.segments());
        ensure!(capture.stop()?.resets.is_empty(), "the connection was reset");
        client.ping(1000)?;
    }
    Ok(())
}

/// A program's eBPF filter cannot be read back: the dump is refused, on a connection and on a listener, and names it.
#[test]
fn refused_by_name() -> Result<()> {
    let Some(stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, mut client) = served(&stage, SERVER_V4, "10.9.0.1")?;
    let (listener, connection) = sockets(&server)?;
    let (images, filter) = (stage.images()?, ebpf_filter()?);
    for (socket, named) in [(listener, server.address.to_string()), (connection, "10.9.0.2".into())] {
        let filter = filter.as_raw_fd().to_ne_bytes();
        sockopt::set_bytes(socket.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &filter)?;
        let refused = stage.dump(PLUGIN, server.pid(), &images).run().err().context("the dump succeeded")?;
        let refused = format!("{refused:#}");
        ensure!(refused.contains("SO_ATTACH_BPF") && refused.contains(&named), "{refused}");
        client.ping(1000)?;
        sockopt::set_bytes(socket.as_fd(), libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &[0; 4])?;
    }
    stage.wait_until_clean(Some(&server))
}

/// The port of a listener and its connections is still their owner's to share, and nobody else's (SO_REUSEPORT).
#[test]
fn owners_share_their_port_again() -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    let (server, mut client) = served(&stage, SERVER_V4, "10.9.0.1")?;
    for socket in tcp_sockets(server.pid())? {
        sockopt::set_reuse_port(socket.as_fd(), true)?;
        fchown(&socket, Some(1234.into()), None)?;
    }
    let shares = |stage: &Stage, server: &Server, uid: u32| {
        let address = server.address;
        stage.host().run(move || -> Result<bool> {
            let socket = sockopt::tcp_socket(false)?;
            sockopt::set_reuse_port(socket.as_fd(), true)?;
            fchown(&socket, Some(uid.into()), None)?;
            Ok(soccr::kernel::tcp::bind(socket.as_fd(), address).is_ok())
        })
    };
    let expected = |stage: &Stage, server: &Server| -> Result<()> {
        ensure!(shares(stage, server, 1234)?, "its owner cannot share the port");
        ensure!(!shares(stage, server, 4321)?, "somebody else can share the port");
        Ok(())
    };
    expected(&stage, &server)?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    expected(&stage, &server)?;
    client.ping(1000)
}
