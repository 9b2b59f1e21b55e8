//! Every socket option comes back, on connections and on listeners, and so does who owns the socket.

#[path = "../../../tests/support/options.rs"]
mod every;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::fstat;
use nix::unistd::fchown;
use soccr::kernel::options::{Care, Known, On, TABLE};
use soccr_testkit::sockets::{TaskSocket, state, tcp_sockets};
use soccr_testkit::{Client, Place, Server, Stage};

use crate::world::{PLUGIN, SERVER_V4, stage};

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

fn come_back(listen: &str, reach: &str, place: Place) -> Result<()> {
    let Some(mut stage) = stage(place, &[PLUGIN])? else { return Ok(()) };
    let (server, mut client) = served(&stage, listen, reach)?;
    change(&server)?;
    client.ping(1000).context("with other options than the defaults")?;
    let before = shown(&server)?;
    let server = stage.freeze_and_thaw(server, PLUGIN, PLUGIN)?;
    let after = shown(&server)?;
    let names = ["listener", "connection"];
    for ((before, after), name) in before.iter().zip(&after).zip(names) {
        let lost = before.differences(after);
        ensure!(lost.is_empty(), "{place:?}, {name}: {}", lost.join("\n"));
    }
    client.ping(1000)
}

#[test]
fn come_back_ipv4() -> Result<()> {
    come_back(SERVER_V4, "10.9.0.1", Place::Host)
}

#[test]
fn come_back_ipv6() -> Result<()> {
    come_back("[fd09::1]:0", "fd09::1", Place::Host)
}

#[test]
fn come_back_on_both_families_at_once() -> Result<()> {
    come_back("[::]:0", "10.9.0.1", Place::External)
}
