//! All clients: what has become of them, and who follows those that have ended.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use fastrand::Rng;
use soccr_testkit::fleet::{Fleet, Member, Pace, is_dead};
use soccr_testkit::task::wait_until;
use soccr_testkit::{NetNs, interrupt};

use crate::soak::conn::{Conn, Kind};

/// After a restore every connection must go on within this time.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The clients at work, in a namespace of their own.
pub struct Clients<'a> {
    ns: &'a NetNs,
    rng: Rng,
    fleet: Fleet<Conn>,
    /// What to open next, so that the mix stays.
    missing: VecDeque<(SocketAddr, Kind)>,
    totals: Totals,
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

impl Totals {
    fn add(&mut self, member: &Member<Conn>) {
        let conn = &member.client;
        self.received += conn.received();
        self.confirmed += conn.confirmed();
        match &member.error {
            None if conn.is_over() => {
                // What it was told last does not count what the server got after its own end.
                self.ended += 1;
                self.confirmed += conn.sent() - conn.confirmed();
            }
            None => {}
            Some(error) => {
                let said = format!("client port {}: {error:#} ({})", conn.port(), conn.state());
                (if is_dead(error) { &mut self.dead } else { &mut self.wrong }).push(said);
            }
        }
    }
}

impl<'a> Clients<'a> {
    /// Opens `count` connections, in turns to each of `servers` and of each kind.
    pub fn start(ns: &'a NetNs, servers: &[SocketAddr], count: usize, seed: u64) -> Result<Self> {
        let places = (0..count).map(|i| {
            // Each kind meets each family: the shift grows with every round of the mix.
            let (turn, kind) = (i % Kind::MIX.len(), i / Kind::MIX.len());
            (servers[(turn + kind) % servers.len()], Kind::MIX[turn])
        });
        let missing = places.collect();
        let fleet = Fleet::start([], Pace::FAST);
        let mut clients = Self { ns, rng: Rng::with_seed(seed), fleet, missing, totals: Totals::default() };
        clients.fill_up()?;
        Ok(clients)
    }

    /// Opens a connection for each that has ended or broken, and waits until the server has taken
    /// all on: CRIU does not dump those that wait in a listener.
    pub fn fill_up(&mut self) -> Result<()> {
        let over = self.fleet.members().extract_if(.., |member| !member.waits()).collect::<Vec<_>>();
        for member in &over {
            self.totals.add(member);
            self.missing.push_back(member.client.place());
        }
        while let Some((server, kind)) = self.missing.pop_front() {
            let client = self.ns.run(|| Conn::open(server, kind, &mut self.rng))?;
            self.totals.opened += 1;
            self.fleet.members().push(Member { client, error: None });
        }
        wait_until("the server takes new connections on", PATIENCE, || {
            Ok(self.fleet.members().iter().all(|it| it.error.is_some() || it.client.is_answered()))
        })
    }

    /// Ends a share of the connections, each in the middle of its streams.
    pub fn retire(&mut self, share: f64) {
        for member in self.fleet.members().iter_mut().filter(|_| self.rng.f64() < share) {
            member.client.finish();
        }
    }

    /// A restore begins.
    pub fn mark(&self) {
        self.fleet.members().iter_mut().for_each(|member| member.client.mark());
    }

    /// Waits until bytes have gone through every open direction of every connection since the mark.
    /// Those that have not come that far by the deadline are counted as dead and given up.
    pub fn progress(&self, restored: Instant) -> Result<Progress> {
        let why = "no progress after a restore";
        self.wait_for(PATIENCE, why, |member| member.error.is_some() || member.client.is_through())?;
        let since = |first: Instant| first.saturating_duration_since(restored);
        let firsts = self.fleet.members().iter().map(|it| it.client.first_progress()).collect::<Vec<_>>();
        Ok(Progress {
            down: firsts.iter().filter_map(|(down, _)| down.map(since)).collect(),
            up: firsts.iter().filter_map(|(_, up)| up.map(since)).collect(),
            all: restored.elapsed(),
        })
    }

    pub fn totals(&self) -> Totals {
        let mut totals = self.totals.clone();
        self.fleet.members().iter().for_each(|member| totals.add(member));
        totals
    }

    /// Ends every connection in order, all of both streams checked to the last byte.
    pub fn finish(self) -> Result<Totals> {
        self.fleet.members().iter_mut().for_each(|member| member.client.finish());
        self.wait_for(PATIENCE * 2, "no orderly end", |member| !member.waits())?;
        let totals = self.totals();
        drop(self.fleet.take());
        Ok(totals)
    }

    /// Waits until all are so, and gives up those that are not in time.
    fn wait_for(&self, limit: Duration, why: &str, is: impl Fn(&Member<Conn>) -> bool) -> Result<()> {
        let waited = wait_until(why, limit, || Ok(self.fleet.members().iter().all(&is)));
        interrupt::check()?;
        if waited.is_err() {
            for member in self.fleet.members().iter_mut().filter(|member| !is(member)) {
                let error = anyhow!(std::io::Error::from(std::io::ErrorKind::TimedOut));
                member.error = Some(error.context(format!("{why} in {limit:?}")));
            }
        }
        Ok(())
    }
}
