//! All clients: one thread that lets each have its turn in every tick.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use fastrand::Rng;
use soccr_testkit::NetNs;
use soccr_testkit::interrupt::pause;

use crate::soak::conn::{Conn, Kind, TICK};

/// The clients at work, in a namespace of their own.
pub struct Fleet<'a> {
    ns: &'a NetNs,
    rng: Rng,
    /// What to open next, so that the mix stays.
    missing: VecDeque<(SocketAddr, Kind)>,
    shared: Arc<Mutex<Shared>>,
    thread: Option<JoinHandle<()>>,
}

/// What became of the connections so far.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Connections opened.
    pub opened: u64,
    /// Connections ended as they should, every byte of both streams right.
    pub ended: u64,
    /// Connections that broke, and how.
    pub dead: Vec<String>,
    /// Connections with a wrong, missing or surplus byte.
    pub wrong: Vec<String>,
    /// Bytes that clients received and checked, stamps included.
    pub received: u64,
    /// Bytes that the server received and checked: as it told the clients, and all of those
    /// connections that ended as they should (else the server complains).
    pub confirmed: u64,
}

/// How long after a restore it took.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// For each connection, until its first byte from the server.
    pub down: Vec<Duration>,
    /// For each connection, until the server acknowledged its first byte.
    pub up: Vec<Duration>,
    /// Until every direction of every connection had moved its bytes.
    pub all: Duration,
}

#[derive(Default)]
struct Shared {
    conns: Vec<Conn>,
    /// Where and how each of `conns` connects.
    places: Vec<(SocketAddr, Kind)>,
    left: Vec<(SocketAddr, Kind)>,
    totals: Totals,
    stop: bool,
}

impl<'a> Fleet<'a> {
    /// Opens `count` connections, in turns to each of `servers` and of each kind.
    pub fn start(ns: &'a NetNs, servers: &[SocketAddr], count: usize, seed: u64) -> Result<Self> {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || work(&shared)
        });
        let places = (0..count).map(|i| {
            // Each kind meets each family: the shift grows with every round of the mix.
            let (turn, kind) = (i % Kind::MIX.len(), i / Kind::MIX.len());
            (servers[(turn + kind) % servers.len()], Kind::MIX[turn])
        });
        let missing = places.collect();
        let rng = Rng::with_seed(seed);
        let mut fleet = Self { ns, rng, missing, shared, thread: Some(thread) };
        fleet.fill_up()?;
        Ok(fleet)
    }

    /// Opens a connection for each that has ended or broken, and waits until the server has taken
    /// all on: CRIU does not dump those that wait in a listener.
    pub fn fill_up(&mut self) -> Result<()> {
        let left = std::mem::take(&mut self.lock().left);
        self.missing.extend(left);
        while let Some((server, kind)) = self.missing.pop_front() {
            let rng = &mut self.rng;
            let conn = self.ns.run(|| Conn::open(server, kind, rng))?;
            let mut shared = self.lock();
            shared.totals.opened += 1;
            shared.conns.push(conn);
            shared.places.push((server, kind));
        }
        self.wait("the server takes new connections on", |shared| shared.conns.iter().all(Conn::is_answered))
    }

    /// Ends a share of the connections, each in the middle of its streams.
    pub fn retire(&mut self, share: f64) {
        let mut rng = self.rng.fork();
        for conn in self.lock().conns.iter_mut().filter(|_| rng.f64() < share) {
            conn.finish();
        }
    }

    /// A restore begins.
    pub fn mark(&self) {
        self.lock().conns.iter_mut().for_each(Conn::mark);
    }

    /// Waits until bytes have gone through every open direction of every connection since the mark.
    /// Those that have not come that far by the deadline are counted as dead and given up.
    pub fn progress(&self, restored: Instant, limit: Duration) -> Result<Progress> {
        let waited = self.wait_for(limit, |shared| shared.conns.iter().all(Conn::is_through))?;
        let mut shared = self.lock();
        if !waited {
            shared.give_up(|conn| !conn.is_through(), &format!("no progress in {limit:?} after a restore"));
        }
        let since = |first: Instant| first.saturating_duration_since(restored);
        let firsts = shared.conns.iter().map(Conn::first_progress);
        let (down, up): (Vec<_>, Vec<_>) = firsts.map(|(down, up)| (down.map(since), up.map(since))).unzip();
        Ok(Progress {
            down: down.into_iter().flatten().collect(),
            up: up.into_iter().flatten().collect(),
            all: restored.elapsed(),
        })
    }

    pub fn totals(&self) -> Totals {
        let shared = self.lock();
        let mut totals = shared.totals.clone();
        for conn in &shared.conns {
            totals.received += conn.received();
            totals.confirmed += conn.confirmed();
        }
        totals
    }

    /// Ends every connection in order, all of both streams checked to the last byte.
    pub fn finish(mut self, limit: Duration) -> Result<Totals> {
        self.lock().conns.iter_mut().for_each(Conn::finish);
        if !self.wait_for(limit, |shared| shared.conns.is_empty())? {
            self.lock().give_up(|_| true, &format!("no orderly end in {limit:?}"));
        }
        self.halt();
        Ok(self.totals())
    }

    fn wait(&self, what: &str, done: impl FnMut(&Shared) -> bool) -> Result<()> {
        const PATIENCE: Duration = Duration::from_secs(30);
        if !self.wait_for(PATIENCE, done)? {
            bail!("waited {PATIENCE:?} in vain until {what}");
        }
        Ok(())
    }

    /// Whether it came true in time.
    fn wait_for(&self, limit: Duration, mut done: impl FnMut(&Shared) -> bool) -> Result<bool> {
        let end = Instant::now() + limit;
        while !done(&self.lock()) {
            if Instant::now() > end {
                return Ok(false);
            }
            pause(TICK)?;
        }
        Ok(true)
    }

    fn halt(&mut self) {
        self.lock().stop = true;
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the clients do not panic");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Fleet<'_> {
    fn drop(&mut self) {
        self.halt();
    }
}

fn work(shared: &Mutex<Shared>) {
    loop {
        let next = Instant::now() + TICK;
        {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            if shared.stop {
                return;
            }
            shared.tick();
        }
        // A client that writes so many bytes in so much time waits for time, not for an event.
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

impl Shared {
    fn tick(&mut self) {
        let mut i = 0;
        while let Some(conn) = self.conns.get_mut(i) {
            match conn.step() {
                Ok(()) if !conn.is_over() => i += 1,
                Ok(()) => {
                    // What it was told last does not count what the server got after its own end.
                    let rest = conn.sent() - conn.confirmed();
                    self.totals.ended += 1;
                    self.totals.confirmed += rest;
                    self.remove(i);
                }
                Err(fault) => {
                    let said = format!("client port {}: {fault} ({})", conn.port(), conn.state());
                    let list = if fault.is_wrong() { &mut self.totals.wrong } else { &mut self.totals.dead };
                    list.push(said);
                    self.remove(i);
                }
            }
        }
    }

    fn remove(&mut self, i: usize) {
        let conn = self.conns.swap_remove(i);
        self.left.push(self.places.swap_remove(i));
        self.totals.received += conn.received();
        self.totals.confirmed += conn.confirmed();
    }

    fn give_up(&mut self, which: impl Fn(&Conn) -> bool, why: &str) {
        while let Some(i) = self.conns.iter().position(&which) {
            let conn = &self.conns[i];
            let said = format!("client port {}: {why} ({})", conn.port(), conn.state());
            self.totals.dead.push(said);
            self.remove(i);
        }
    }
}
