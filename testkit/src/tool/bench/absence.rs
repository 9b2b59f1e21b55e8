//! What peers notice of a server that is away for a while: those that send, and those that connect.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use soccr_testkit::peers::{ABSENCES, Noticed, Peers};
use soccr_testkit::stage::V4;
use soccr_testkit::{Criu, Lan, Lock, NetNs, Pace, Place, Server, Stage};
use tempfile::TempDir;

use super::case::{Party, Rounds, Series};
use super::row::{Measured, Row};
use super::trial::TMPFS;

/// A server is dumped, and is back when so much time has gone by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absence {
    pub away: Duration,
    pub route: Route,
}

/// Where it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// On the same host.
    Stay,
    /// On another one, with its addresses; with the plugin `soccr hold` is there before them.
    Move,
}

/// Busy connections, each with bytes under way at any time.
const BUSY: usize = 50;
/// That leaves the server time to be dumped.
const PACE: Pace = Pace { period: Duration::from_millis(10), parts: 1 };

const PARTIES: [Party; 2] = [Party::Stock(Lock::Nftables), Party::Ours];

pub fn all() -> Vec<Series<Absence>> {
    let of = |route| {
        ABSENCES.map(|away| Series {
            case: Absence { away, route },
            parties: PARTIES.to_vec(),
            rounds: Rounds::AsAsked,
        })
    };
    [Route::Stay, Route::Move].into_iter().flat_map(of).collect()
}

pub fn smoke() -> Vec<Series<Absence>> {
    let case = Absence { away: ABSENCES[0], route: Route::Stay };
    vec![Series { case, parties: vec![Party::Ours], rounds: Rounds::Once }]
}

impl Measured for Absence {
    type Trial = Noticed;

    fn run(self, criu: &Criu, party: Party, _: &Path) -> Result<Noticed> {
        let dir = TempDir::with_prefix_in("soccr-bench-", TMPFS)?;
        let noticed = match self.route {
            Route::Stay => self.stay(criu, party, dir.path())?,
            Route::Move => self.go(criu, party, dir.path())?,
        };
        ensure!(!noticed.calls.is_empty(), "nobody has connected meanwhile");
        ensure!(party != Party::Ours || noticed.lost.is_empty(), "lost: {}", noticed.lost.join("; "));
        Ok(noticed)
    }

    fn tell(noticed: &Noticed) -> String {
        let Noticed { caught_up, lost, absence, .. } = noticed;
        let (refused, calls) = (noticed.refused(), noticed.calls.len());
        let longest = noticed.longest_call().map_or_else(String::new, |call| {
            format!(", the longest call took {:.3?}, made after {:.3?}", call.took, call.made - noticed.gone)
        });
        let lost = lost.len();
        format!(
            "away {absence:.3?}, caught up after {caught_up:.3?}, {lost} lost, {refused} of {calls} refused{longest}"
        )
    }
}

impl Absence {
    fn stay(self, criu: &Criu, party: Party, dir: &Path) -> Result<Noticed> {
        let stage = Stage::wired(criu, Place::Host, dir)?;
        let (server, mut peers) = busy_server(&stage, &stage.peer)?;
        let (images, address) = (stage.images()?, server.address);
        peers.leave();
        stage.dump(party.side(), server.pid(), &images).quiet().dump_and_wait(server.task)?;
        peers.call()?;
        peers.wait(self.away);
        let (task, _) = stage.restore(party.side(), &images)?.quiet().restore()?;
        let noticed = peers.finish()?;
        stage.wait_until_clean(Some(&Server::restored(address, task, dir)))?;
        Ok(noticed)
    }

    fn go(self, criu: &Criu, party: Party, dir: &Path) -> Result<Noticed> {
        let mut lan = Lan::new(criu, dir)?;
        let (server, mut peers) = busy_server(lan.here(), &lan.client)?;
        peers.leave();
        let copies = lan.freeze(server.task, party.side())?;
        peers.call()?;
        let ours = party == Party::Ours;
        lan.carry(&copies, ours)?;
        peers.wait(self.away);
        let task = lan.thaw(&copies, party.side())?;
        let noticed = peers.finish()?;
        if ours {
            lan.release(&copies)?;
            lan.there().wait_until_clean(None)?;
            lan.here().wait_until_clean(Some(&Server::restored(server.address, task, dir)))?;
        }
        Ok(noticed)
    }
}

fn busy_server(stage: &Stage, clients: &NetNs) -> Result<(Server, Peers)> {
    let server = stage.serve(&format!("{V4}:0"), &["--mode", "echo"])?;
    let peers = Peers::start(clients, server.address, BUSY, PACE)?;
    Ok((server, peers))
}

impl Row<Absence> {
    /// Seconds from the end of the restore on; nothing where somebody never caught up.
    pub fn caught_up(&self) -> Option<f64> {
        self.median(|it| it.lost.is_empty().then_some(it.caught_up.as_secs_f64()))
    }

    /// Seconds for which a client heard nothing.
    pub fn silence(&self) -> Option<f64> {
        self.median(|it| Some(it.silence.as_secs_f64()))
    }

    /// Connections that were lost in all trials.
    pub fn lost(&self) -> Option<f64> {
        self.max(|it| count(it.lost.len()))
    }

    /// Calls that failed, of all that were made in the trial with most.
    pub fn refused(&self) -> Option<f64> {
        self.max(|it| count(it.refused()))
    }

    pub fn calls(&self) -> Option<f64> {
        self.max(|it| count(it.calls.len()))
    }

    /// Seconds by which the longest call of all lasted longer than the absence.
    pub fn overtime(&self) -> Option<f64> {
        self.max(|it| Some(it.longest_call()?.took.as_secs_f64() - it.absence.as_secs_f64()))
    }
}

fn count(number: usize) -> Option<f64> {
    u32::try_from(number).ok().map(f64::from)
}

/// The words of `--only`.
impl fmt::Display for Absence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hosts = if self.route == Route::Stay { "one-host" } else { "two-hosts" };
        write!(f, "peers {hosts} {}s", self.away.as_secs_f64())
    }
}
