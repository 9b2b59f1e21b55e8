//! Clients that nobody has accepted yet.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::sockets::{TaskSocket, state, tcp_sockets};
use crate::stage::PATIENCE;
use crate::task::wait_until;
use crate::{Server, Stage};

/// A client of `soccr-test server --late`, with what it has sent before it was accepted; every fourth has sent a FIN as well.
#[derive(Debug)]
pub struct Waiting {
    stream: TcpStream,
    place: u8,
    sent: Vec<u8>,
    finished: bool,
}

impl Waiting {
    /// So many clients of a server that accepts nobody, one after the other, until all wait.
    pub fn connect_all(stage: &Stage, server: &Server, address: SocketAddr, count: u8) -> Result<Vec<Self>> {
        let clients = (0..count).map(|place| Self::connect(stage, address, place)).collect::<Result<_>>()?;
        all_wait(server, count)?;
        Ok(clients)
    }

    fn connect(stage: &Stage, address: SocketAddr, place: u8) -> Result<Self> {
        let mut stream = stage.peer.run(|| TcpStream::connect(address))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let bytes = (place..=u8::MAX).cycle();
        let sent: Vec<u8> = bytes.take([0, 1, 3001][usize::from(place % 3)]).collect();
        stream.write_all(&sent)?;
        let finished = place.is_multiple_of(4);
        if finished {
            stream.shutdown(Shutdown::Write)?;
        }
        wait_until("the server's kernel has all", PATIENCE, || {
            let socket = TaskSocket::of(&stream)?;
            Ok(socket.unacked()? == 0 && (!finished || socket.state()? == state::FIN_WAIT2))
        })?;
        Ok(Self { stream, place, sent, finished })
    }

    /// For how long it waits for the server.
    pub fn set_patience(&self, patience: Duration) -> Result<()> {
        Ok(self.stream.set_read_timeout(Some(patience))?)
    }

    /// The server accepts: this one at its place, what it has sent is echoed, and it goes on both ways.
    pub fn goes_on(&mut self, place: u8) -> Result<()> {
        self.echoed(place).with_context(|| format!("the {}th that waited", self.place))
    }

    fn echoed(&mut self, expected: u8) -> Result<()> {
        let mut place = [0];
        self.stream.read_exact(&mut place).context("the server says nothing")?;
        ensure!(place[0] == expected, "it was accepted {}th and not {expected}th", place[0]);
        self.reads("what was sent before", &self.sent.clone())?;
        if self.finished {
            ensure!(self.stream.read(&mut place)? == 0, "more than was sent");
            return Ok(());
        }
        let more = vec![self.place; 20_000];
        self.stream.write_all(&more)?;
        self.reads("what was sent afterwards", &more)
    }

    fn reads(&mut self, what: &'static str, expected: &[u8]) -> Result<()> {
        let mut echo = vec![0; expected.len()];
        self.stream.read_exact(&mut echo).context(what)?;
        ensure!(echo == expected, "another echo than {what}");
        Ok(())
    }

    /// What it sees when it reads.
    pub fn read(&mut self) -> std::io::Result<usize> {
        self.stream.read(&mut [0])
    }
}

/// Waits until so many stand in the queues of a server.
pub fn all_wait(server: &Server, count: u8) -> Result<()> {
    wait_until("all are in the accept queue", PATIENCE, || {
        let mut waiting = 0;
        for socket in tcp_sockets(server.pid())? {
            waiting += if socket.state()? == state::LISTEN { socket.waiting()? } else { 0 };
        }
        Ok(waiting == u32::from(count))
    })
}
