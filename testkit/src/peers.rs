//! What the peers of an echo server notice while it is away: those that send, and those that connect.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::client::Client;
use crate::fleet::{Fleet, Pace};
use crate::netns::NetNs;
use crate::stage::PATIENCE;

/// For how long a server is away where what its peers notice is measured.
pub const ABSENCES: [Duration; 4] =
    [Duration::from_millis(300), Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(3)];

/// Busy clients of a server, and how others reach it.
#[derive(Debug)]
pub struct Peers {
    ns: NetNs,
    server: SocketAddr,
    busy: Fleet<Client>,
    gone: Instant,
    calls: Option<Calls>,
}

/// What they noticed.
#[derive(Debug)]
pub struct Noticed {
    /// From this moment on the server was to be dumped.
    pub gone: Instant,
    /// From then to the end of its restore.
    pub absence: Duration,
    /// From then on until all that was sent before was echoed.
    pub caught_up: Duration,
    /// The longest time for which a client waited for an echo that was due.
    pub silence: Duration,
    /// What became of clients that did not get every echo.
    pub lost: Vec<String>,
    /// Every connect() that was made while no server was there.
    pub calls: Vec<Result<Call>>,
}

/// A connect() that did not fail, of a connection that carries bytes.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// When it was made.
    pub made: Instant,
    /// How long it took.
    pub took: Duration,
}

impl Peers {
    /// So many clients in this namespace begin to send.
    pub fn start(ns: &NetNs, server: SocketAddr, count: usize, pace: Pace) -> Result<Self> {
        let clients = ns.run(|| (0..count).map(|_| Client::connect(server)).collect::<Result<_>>())?;
        let busy = Fleet::echoes(clients, pace)?;
        Ok(Self { ns: ns.try_clone()?, server, busy, gone: Instant::now(), calls: None })
    }

    /// The absence begins now.
    pub fn leave(&mut self) {
        self.gone = Instant::now();
    }

    /// No server is there: from now on, until it is back, others connect. Who had come before, and was not accepted, is the dump's.
    pub fn call(&mut self) -> Result<()> {
        self.calls = Some(Calls::start(self.ns.try_clone()?, self.server));
        Ok(())
    }

    /// Waits until so much time has gone by since the absence began: that is what is measured.
    pub fn wait(&self, away: Duration) {
        thread::sleep(away.saturating_sub(self.gone.elapsed()));
    }

    /// The server is back.
    pub fn finish(self) -> Result<Noticed> {
        let absence = self.gone.elapsed();
        let caught_up = self.busy.catch_up(PATIENCE)?;
        let calls = self.calls.map(Calls::stop).unwrap_or_default();
        let seen = self.busy.stop(PATIENCE);
        Ok(Noticed { gone: self.gone, absence, caught_up, silence: seen.silence, lost: seen.lost, calls })
    }
}

impl Noticed {
    /// How many calls failed.
    pub fn refused(&self) -> usize {
        self.calls.iter().filter(|call| call.is_err()).count()
    }

    /// The call that took longest of those that did not fail.
    pub fn longest_call(&self) -> Option<Call> {
        self.calls.iter().flatten().max_by_key(|call| call.took).copied()
    }
}

/// Clients that connect at a steady pace, each on a thread of its own.
#[derive(Debug)]
struct Calls {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Result<Call>>>>,
}

impl Calls {
    fn start(ns: NetNs, server: SocketAddr) -> Self {
        const EVERY: Duration = Duration::from_millis(20);
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        // Threads begin in the namespace of who starts them.
        let calling = move || {
            thread::scope(|scope| {
                let mut calls = Vec::new();
                while !ended.load(Ordering::Relaxed) {
                    calls.push(scope.spawn(|| call(server)));
                    thread::sleep(EVERY);
                }
                calls.into_iter().map(|call| call.join().expect("a call does not panic")).collect()
            })
        };
        Self { over, thread: Some(thread::spawn(move || ns.run(calling))) }
    }

    fn stop(mut self) -> Vec<Result<Call>> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().map_or_else(Vec::new, |thread| thread.join().expect("calls do not panic"))
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn call(server: SocketAddr) -> Result<Call> {
    let made = Instant::now();
    let mut client = Client::connect(server)?;
    let took = made.elapsed();
    client.ping(1000)?;
    Ok(Call { made, took })
}
