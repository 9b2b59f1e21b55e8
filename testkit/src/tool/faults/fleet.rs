//! Clients that keep both directions of their connections busy, whatever happens to the server.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Error, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use soccr_testkit::Client;

/// Bytes that an active client has under way at most.
const IN_FLIGHT: u64 = 16 << 10;
/// Rounds of the clients are cut into this many parts, with a pause after each.
const PARTS: usize = 10;

/// Clients of an echo server, on a thread of their own.
pub struct Fleet {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Member>>,
    size: usize,
}

struct Member {
    client: Client,
    /// Writes as much as it can and reads nothing until the end: all queues fill up.
    glutton: bool,
    error: Option<Error>,
}

/// What has become of the clients.
pub struct Seen {
    /// Those whose every byte came back, the last ones sent after the fault.
    pub alive: Vec<Client>,
    /// Why the others are lost.
    pub lost: Vec<String>,
}

impl Fleet {
    /// Starts them; the first `gluttons` fill all queues. Each other one sends and reads once in `period`.
    pub fn start(clients: Vec<Client>, gluttons: usize, period: Duration) -> Result<Self> {
        let mut members = Vec::with_capacity(clients.len());
        for (nth, client) in clients.into_iter().enumerate() {
            client.set_nonblocking(true)?;
            members.push(Member { client, glutton: nth < gluttons, error: None });
        }
        let size = members.len();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || talk(members, period / u32::try_from(PARTS).unwrap_or(1), &told));
        Ok(Self { stop, thread, size })
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Lets every echo come in, exchanges some more bytes with all, and says who got them within `limit`.
    pub fn stop(self, limit: Duration) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        let mut members = self.thread.join().expect("a fleet does not panic");
        let end = Instant::now() + limit;
        drain(&mut members, end);
        for member in &mut members {
            member.attempt(Client::write_some);
        }
        drain(&mut members, end);
        let mut seen = Seen { alive: Vec::new(), lost: Vec::new() };
        for Member { client, error, .. } in members {
            match error {
                None if client.received() == client.sent() => seen.alive.push(client),
                None => seen.lost.push(format!(
                    "client {}: silent for {limit:?}, {} of {} bytes came back",
                    client.port(),
                    client.received(),
                    client.sent()
                )),
                Some(error) => seen.lost.push(format!("{error:#}")),
            }
        }
        seen
    }
}

fn talk(mut members: Vec<Member>, pause: Duration, stop: &AtomicBool) -> Vec<Member> {
    let part = members.len().div_ceil(PARTS).max(1);
    while !stop.load(Ordering::Relaxed) {
        for members in members.chunks_mut(part) {
            members.iter_mut().for_each(Member::talk);
            thread::sleep(pause); // the pace at which they talk
        }
    }
    members
}

/// Reads until all that was sent has come back, or until `end`.
fn drain(members: &mut [Member], end: Instant) {
    loop {
        let waits =
            |member: &&mut Member| member.error.is_none() && member.client.received() < member.client.sent();
        let mut waiting: Vec<_> = members.iter_mut().filter(waits).collect();
        let left = end.saturating_duration_since(Instant::now());
        if waiting.is_empty() || left.is_zero() {
            return;
        }
        let mut fds: Vec<_> =
            waiting.iter().map(|member| PollFd::new(member.client.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut fds, timeout);
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        for (member, _) in waiting.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            member.read_all();
        }
    }
}

impl Member {
    fn talk(&mut self) {
        if self.glutton {
            let mut before = u64::MAX;
            while self.error.is_none() && self.client.sent() != before {
                before = self.client.sent();
                self.attempt(Client::write_some);
            }
        } else {
            self.read_all();
            if self.client.sent() - self.client.received() < IN_FLIGHT {
                self.attempt(Client::write_some);
            }
        }
    }

    fn read_all(&mut self) {
        let mut more = true;
        while more && self.error.is_none() {
            match self.client.read_some() {
                Ok(read) => more = read,
                Err(error) => self.error = Some(error),
            }
        }
    }

    fn attempt(&mut self, work: impl FnOnce(&mut Client) -> Result<()>) {
        if self.error.is_none() {
            self.error = work(&mut self.client).err();
        }
    }
}
