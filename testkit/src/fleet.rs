//! Clients at work, on a thread of their own, whatever happens to their server.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, ensure};

use crate::client::Client;
pub use crate::client::Talk;
use crate::task::wait_until;

/// Whether a connection broke; else a byte was wrong, missing or too many.
pub fn is_dead(error: &Error) -> bool {
    error.chain().any(|cause| cause.is::<std::io::Error>() || cause.is::<nix::errno::Errno>())
}

/// How often each client has its turn.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Once in this time.
    pub period: Duration,
    /// Not all at the same moment, but in so many parts.
    pub parts: usize,
}

impl Pace {
    /// As often as clients can that shall leave something of the machine to CRIU.
    pub const FAST: Self = Self { period: Duration::from_millis(5), parts: 1 };
}

/// A client, and why it gave up, if it did.
#[derive(Debug)]
pub struct Member<T> {
    /// The client.
    pub client: T,
    /// Its end.
    pub error: Option<Error>,
}

impl<T: Talk> Member<T> {
    fn turn(&mut self, more: bool) {
        if self.error.is_none() {
            self.error = self.client.turn(more).err();
        }
    }

    /// Whether it lives, and anything is due to it.
    pub fn waits(&self) -> bool {
        self.error.is_none() && self.client.waits()
    }
}

/// Clients at work.
#[derive(Debug)]
pub struct Fleet<T> {
    shared: Arc<Shared<T>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared<T> {
    members: Mutex<Vec<Member<T>>>,
    phase: AtomicU8,
}

/// The clients send and receive; they receive what is due; they rest.
const BUSY: u8 = 0;
const ENDING: u8 = 1;
const OVER: u8 = 2;

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Vec<Member<T>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Talk> Fleet<T> {
    /// Starts them.
    pub fn start(clients: impl IntoIterator<Item = T>, pace: Pace) -> Self {
        let members = clients.into_iter().map(|client| Member { client, error: None }).collect();
        let shared = Arc::new(Shared { members: Mutex::new(members), phase: AtomicU8::new(BUSY) });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || talk(&shared, pace)
        });
        Self { shared, thread: Some(thread) }
    }

    /// The clients as they are now, between two turns.
    pub fn members(&self) -> MutexGuard<'_, Vec<Member<T>>> {
        self.shared.lock()
    }

    /// Has them send no more, and waits until all that is due has come, or for `limit`.
    pub fn end(&self, limit: Duration) {
        self.shared.phase.store(ENDING, Ordering::Relaxed);
        // Who waits in vain is told from the others by what is due to him.
        let _ = wait_until("nothing is due", limit, || Ok(!self.members().iter().any(Member::waits)));
    }

    /// Ends their thread.
    pub fn take(mut self) -> Vec<Member<T>> {
        self.halt();
        std::mem::take(&mut self.members())
    }

    fn halt(&mut self) {
        self.shared.phase.store(OVER, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("clients do not panic");
        }
    }
}

impl<T> Drop for Fleet<T> {
    fn drop(&mut self) {
        self.shared.phase.store(OVER, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn talk<T: Talk>(shared: &Shared<T>, pace: Pace) {
    let mut part = 0;
    loop {
        let started = Instant::now();
        // What is due shall come soon.
        let (busy, Pace { period, parts }) = match shared.phase.load(Ordering::Relaxed) {
            BUSY => (true, pace),
            ENDING => (false, Pace { period: Duration::from_millis(1), parts: 1 }),
            _ => return,
        };
        part = (part + 1) % parts;
        let mut members = shared.lock();
        let size = members.len().div_ceil(parts).max(1);
        if let Some(members) = members.chunks_mut(size).nth(part) {
            members.iter_mut().for_each(|member| member.turn(busy));
        }
        drop(members);
        // A client that sends so many bytes in so much time waits for time, not for an event.
        let pause = period / u32::try_from(parts).unwrap_or(u32::MAX);
        thread::sleep(pause.saturating_sub(started.elapsed()));
    }
}

/// What has become of the clients of an echo server.
#[derive(Debug)]
pub struct Seen {
    /// Those whose every byte came back, the last ones sent after the fault.
    pub alive: Vec<Client>,
    /// Why the others are lost.
    pub lost: Vec<String>,
    /// The longest time for which one of them waited for an echo that was due.
    pub silence: Duration,
}

impl Seen {
    /// All clients.
    pub fn whole(self) -> Result<Vec<Client>> {
        ensure!(self.lost.is_empty(), "{} lost:\n  {}", self.lost.len(), self.lost.join("\n  "));
        Ok(self.alive)
    }
}

impl Fleet<Client> {
    /// Clients of an echo server, which has accepted them all: CRIU does not dump those that wait in a listener.
    pub fn echoes(mut clients: Vec<Client>, pace: Pace) -> Result<Self> {
        for client in &mut clients {
            client.ping(1)?;
            client.set_nonblocking(true)?;
        }
        Ok(Self::start(clients, pace))
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.members().len()
    }

    /// Waits until all that the living have sent by now is echoed; how long that took.
    pub fn catch_up(&self, limit: Duration) -> Result<Duration> {
        let started = Instant::now();
        let sent: Vec<u64> = self.members().iter().map(|member| member.client.sent()).collect();
        let has_all = |(member, sent): (&Member<Client>, &u64)| {
            member.error.is_some() || member.client.received() >= *sent
        };
        wait_until("all is echoed", limit, || Ok(self.members().iter().zip(&sent).all(has_all)))?;
        Ok(started.elapsed())
    }

    /// Lets every echo come in, exchanges some more bytes with all, and says who got them, each within `limit`.
    pub fn stop(self, limit: Duration) -> Seen {
        self.end(limit);
        for Member { client, error } in self.members().iter_mut().filter(|member| member.error.is_none()) {
            let silent = client.waits().then(|| anyhow!(client.at(&format!("silent for {limit:?}"))));
            *error = silent.or_else(|| client.write_some().err());
        }
        self.end(limit);
        let mut seen = Seen { alive: Vec::new(), lost: Vec::new(), silence: Duration::ZERO };
        for Member { client, error } in self.take() {
            seen.silence = seen.silence.max(client.silence());
            match error.or_else(|| client.set_nonblocking(false).err()) {
                None if !client.waits() => seen.alive.push(client),
                None => seen.lost.push(client.at(&format!("silent for {limit:?}"))),
                Some(error) => seen.lost.push(format!("{error:#}")),
            }
        }
        seen
    }
}
