//! The demo's clients: each always waiting for answers to INCRs of its own key, so that every answer must be the last one
//! plus one.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use soccr_testkit::client::dial;
use soccr_testkit::fleet::Talk;

/// What became of one client.
pub struct Client {
    stream: TcpStream,
    key: String,
    /// The last value that came back.
    value: u64,
    line: Vec<u8>,
    unsent: Vec<u8>,
    /// Questions without an answer, now and at most.
    asked: usize,
    depth: usize,
    heard: Instant,
    /// Answers that never came.
    pub lost: u64,
    /// Answers that came twice.
    pub duplicated: u64,
    /// The longest time between two answers.
    pub silence: Duration,
}

impl Talk for Client {
    fn turn(&mut self, more: bool) -> Result<()> {
        self.hear()?;
        if more && self.asked < self.depth {
            self.unsent.extend(format!("INCR {}\r\n", self.key).as_bytes());
            self.asked += 1;
        }
        self.send()
    }

    fn waits(&self) -> bool {
        self.asked > 0
    }
}

impl Client {
    /// Number `i`, which has up to `depth` questions under way.
    pub fn connect(server: SocketAddr, i: usize, depth: usize) -> Result<Self> {
        let stream = dial(server, None)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            key: format!("key:{i}"),
            value: 0,
            line: Vec::new(),
            unsent: Vec::new(),
            asked: 0,
            depth,
            heard: Instant::now(),
            lost: 0,
            duplicated: 0,
            silence: Duration::ZERO,
        })
    }

    /// Answers in all.
    pub fn value(&self) -> u64 {
        self.value
    }

    fn send(&mut self) -> Result<()> {
        match self.stream.write(&self.unsent) {
            Ok(len) => drop(self.unsent.drain(..len)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("cannot send"),
        }
        Ok(())
    }

    fn hear(&mut self) -> Result<()> {
        let mut buf = [0; 512];
        loop {
            match self.stream.read(&mut buf) {
                Ok(0) => bail!("closed by the server"),
                Ok(len) => self.line.extend(&buf[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot receive"),
            }
            while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                self.judge(std::str::from_utf8(&line)?.trim())?;
                self.asked = self.asked.checked_sub(1).context("an answer to no question")?;
            }
        }
    }

    fn judge(&mut self, line: &str) -> Result<()> {
        let value: u64 = line
            .strip_prefix(':')
            .and_then(|it| it.parse().ok())
            .with_context(|| format!("the answer to INCR {} is {line:?}", self.key))?;
        if value <= self.value {
            self.duplicated += 1;
        } else {
            self.lost += value - self.value - 1;
            self.value = value;
        }
        self.silence = self.silence.max(self.heard.elapsed());
        self.heard = Instant::now();
        Ok(())
    }
}
