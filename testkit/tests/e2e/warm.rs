//! A connection goes on with the congestion window that it had, or as the host's owner says.

use std::fs;

use anyhow::{Context, Result, ensure};
use soccr_testkit::skip::{is_before, lacks};
use soccr_testkit::sockets::tcp_sockets;
use soccr_testkit::{Client, Place, Server};

use crate::world::{PLUGIN, SERVER_V4, stage};

/// Of a new connection.
const FRESH: u32 = 10;

fn comes_back(warm: &str, expected: impl Fn(u32) -> u32) -> Result<()> {
    let Some(mut stage) = stage(Place::Host, &[PLUGIN])? else { return Ok(()) };
    if is_before("5.15") {
        return lacks("BPF iterators set no option of a connection before Linux 5.15");
    }
    let decay = "/proc/sys/net/ipv4/tcp_slow_start_after_idle";
    stage.host().run(|| fs::write(decay, "0")).context(decay)?;
    let server = stage.serve(SERVER_V4, &["--mode", "echo"])?;
    let mut plain = stage.connect(server.address)?;
    plain.ping(100)?;
    let mut client = stage.connect(server.address)?;
    let before = grown(&server, &mut client)?;

    let images = stage.images()?;
    let address = stage.freeze(server, PLUGIN, &images)?;
    let (task, _) = stage.restore(PLUGIN, &images)?.env("SOCCR_WARM", warm).restore()?;
    let server = Server::restored(address, task, stage.dir());
    let after = window(&server, &client)?;
    ensure!(after == expected(before), "{before} segments became {after}");
    ensure!(window(&server, &plain)? == FRESH, "the plain one has {}", window(&server, &plain)?);
    client.ping(30_000)?;
    plain.ping(100)?;
    stage.wait_until_clean(Some(&server))
}

/// Twice as large as a fresh one, and no larger than the client's window.
fn grown(server: &Server, client: &mut Client) -> Result<u32> {
    for _ in 0..200 {
        client.ping(30_000)?;
        let segments = window(server, client)?;
        if segments > 2 * FRESH + 1 {
            return Ok(segments);
        }
    }
    anyhow::bail!("the window has {} segments", window(server, client)?)
}

/// The server's, towards this client, when all is acknowledged.
fn window(server: &Server, client: &Client) -> Result<u32> {
    let sockets = tcp_sockets(server.pid())?;
    let socket = sockets.iter().find(|socket| socket.peer().is_some_and(|peer| peer.port() == client.port()));
    let socket = socket.context("the server has no such connection")?;
    while socket.unacked()? > 0 {
        std::thread::yield_now();
    }
    socket.snd_cwnd()
}

#[test]
fn a_window_is_as_it_was() -> Result<()> {
    comes_back("", |before| before)
}

#[test]
fn half_a_window_is_left() -> Result<()> {
    comes_back("half", |before| before / 2)
}

#[test]
fn a_window_is_fresh() -> Result<()> {
    comes_back("fresh", |_| FRESH)
}
