//! One trial: a fresh server with fresh clients, dumped, restored, and asked whether it is well.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::Pid;
use soccr_testkit::criu::{Call, Done, frozen_time};
use soccr_testkit::stage::{KEEPER, V4};
use soccr_testkit::task::{self, Usage, name_and_state, wait_until};
use soccr_testkit::{Criu, Place, Stage, leftovers, sockets};
use tempfile::TempDir;

use super::case::{Case, GIB, Party, Storage};
use super::crowd::Crowd;
use super::row::{Measured, Row};

/// Where images are quick to write, and memory limits them.
pub const TMPFS: &str = "/dev/shm";
/// For one call of criu; stock's iptables take a minute for 1000 connections.
const LIMIT: Duration = Duration::from_secs(300);

/// What one trial took.
#[derive(Clone, Debug, Default)]
pub struct Times {
    /// The tasks stood still (CRIU's own measure).
    pub frozen: Duration,
    /// `criu dump` ran.
    pub dump: Duration,
    /// `criu restore` ran.
    pub restore: Duration,
    /// From then on until every connection had moved bytes in both directions; where the queues were empty.
    pub moved: Option<Duration>,
    /// From the call of `criu dump` until then: a peer that spoke meanwhile waited for so long at most.
    pub silence: Option<Duration>,
    /// What criu used, to dump and to restore; not what the restored tasks did themselves.
    pub criu: [Usage; 2],
    /// What the agents used.
    pub agents: Option<[Usage; 2]>,
    /// Milliseconds by phase, from the log of `-v4`.
    pub profile: BTreeMap<String, f64>,
    /// Reading every byte of the queues into one buffer and writing it to tmpfs, by nobody but this program.
    pub raw_copy: Option<Duration>,
}

impl Measured for Case {
    type Trial = Times;

    fn run(self, criu: &Criu, party: Party, disk: &Path) -> Result<Times> {
        Trial::prepare(criu, self, party, disk)?.run()
    }

    fn tell(times: &Times) -> String {
        let [frozen, restore] = [times.frozen, times.restore].map(|it| it.as_secs_f64());
        format!("frozen {frozen:.3} s, restore {restore:.3} s")
    }
}

struct Trial {
    case: Case,
    party: Party,
    stage: Stage,
    /// For `--lib`, where no plugin shall be.
    empty: PathBuf,
    _dir: TempDir,
}

impl Trial {
    fn prepare(criu: &Criu, case: Case, party: Party, disk: &Path) -> Result<Self> {
        let folder = if case.storage == Storage::Tmpfs { Path::new(TMPFS) } else { disk };
        if case.storage == Storage::Tmpfs {
            let kind = statfs(folder).with_context(|| format!("no {}", folder.display()))?.filesystem_type();
            ensure!(kind == TMPFS_MAGIC, "{} is no tmpfs", folder.display());
        }
        let dir = TempDir::with_prefix_in("soccr-bench-", folder)?;
        let stage = match case.place {
            Place::Host => Stage::alone(criu, dir.path())?,
            place => Stage::wired(criu, place, dir.path())?,
        };
        let empty = dir.path().join("no-plugins");
        fs::create_dir(&empty)?;
        stage.peer.run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535"))?;
        Ok(Self { case, party, stage, empty, _dir: dir })
    }

    fn run(&self) -> Result<Times> {
        let Case { connections, queued, processes, .. } = self.case;
        let host = if self.case.place == Place::Host { "127.0.0.1" } else { V4 };
        let args = self.server_args();
        let server =
            self.stage.serve(&format!("{host}:0"), &args.iter().map(String::as_str).collect::<Vec<_>>())?;
        let mut crowd = Crowd::connect(&self.stage.peer, server.address, connections, processes)?;
        accepted(&server.task.tree(), connections)?;
        let mut times = Times::default();
        if queued > 0 {
            crowd.fill(queued)?;
        } else {
            crowd.echo().context("before the dump")?;
        }
        if connections * queued == GIB {
            times.raw_copy = Some(raw_copy(server.pid(), queued)?);
        }

        let images = self.stage.images()?;
        let gone = Instant::now();
        let dump = self
            .call(self.stage.dump(self.party.side(), server.pid(), &images))
            .dump_and_wait(server.task)?;
        times.frozen = frozen_time(&images)?;
        let dumpers = self.agents()?;
        let (task, restore) = self.call(self.stage.restore(self.party.side(), &images)?).restore()?;
        if self.party.carries() {
            if queued > 0 {
                task.signal(Signal::SIGUSR1)?;
                crowd.drain(queued).context("after the restore")?;
            } else {
                let restored = Instant::now();
                crowd.echo().context("after the restore")?;
                times.moved = Some(restored.elapsed());
                times.silence = Some(gone.elapsed());
            }
            task.tree().into_iter().try_for_each(leftovers::no_repair)?;
        }
        let mut restorers = self.agents()?;
        restorers.retain(|pid| !dumpers.contains(pid));
        if self.party == Party::Ours {
            times.agents = Some([used(&dumpers)?, used(&restorers)?]);
        }
        self.stage.wait_until_clean(None)?;
        self.note(&mut times, &dump, &restore)?;
        Ok(times)
    }

    fn server_args(&self) -> Vec<String> {
        let mut args = vec!["--mode".into(), "echo".into()];
        if self.case.processes > 1 {
            args.extend(["--apart".into(), "--processes".into(), self.case.processes.to_string()]);
        }
        if self.case.queued > 0 {
            // Room for the bytes and for what the kernel puts around them.
            let room = 2 * self.case.queued + (64 << 10);
            args.extend(["--hold".into(), "--rcvbuf".into(), room.to_string()]);
        }
        args
    }

    fn call<'a>(&self, call: Call<'a>) -> Call<'a> {
        let call = if self.case.verbose { call } else { call.quiet() };
        let call = if self.party == Party::Floor { call.plugins(&self.empty) } else { call };
        call.limit(LIMIT)
    }

    /// The agents that have ended and wait for us, and those that hold packets until the restore.
    fn agents(&self) -> Result<Vec<Pid>> {
        self.stage.wait_until_quiet()?;
        let is_agent = |pid: &Pid| {
            name_and_state(*pid).is_some_and(|(name, state)| match name.as_str() {
                "soccr-agent" => state == 'Z',
                name => name == KEEPER,
            })
        };
        Ok(task::children()?.into_iter().filter(is_agent).collect())
    }

    fn note(&self, times: &mut Times, dump: &Done, restore: &Done) -> Result<()> {
        (times.dump, times.restore) = (dump.took, restore.took);
        times.criu = [dump.usage, restore.usage];
        if self.party == Party::Ours && self.case.verbose {
            for done in [dump, restore] {
                let log = fs::read(&done.log)?;
                ensure!(
                    profile(&String::from_utf8_lossy(&log), &mut times.profile) > 0,
                    "no profile in {}",
                    done.log.display()
                );
            }
        }
        Ok(())
    }
}

/// What they have used, once they have ended.
fn used(agents: &[Pid]) -> Result<Usage> {
    let used: Vec<Usage> = agents.iter().map(|pid| Ok(task::reap(*pid)?.1)).collect::<Result<_>>()?;
    used.into_iter()
        .reduce(|all, one| Usage { cpu: all.cpu + one.cpu, peak: all.peak.max(one.peak) })
        .context("the plugin had no agent")
}

/// Connections that wait in the listener's queue make CRIU refuse the dump.
fn accepted(servers: &[Pid], connections: usize) -> Result<()> {
    wait_until("all connections are accepted", LIMIT, || {
        let open = servers.iter().map(|pid| Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count()));
        Ok(open.sum::<Result<usize>>()? > connections)
    })
}

fn raw_copy(pid: Pid, queued: usize) -> Result<Duration> {
    let mut file = tempfile::tempfile_in(TMPFS)?;
    let (mut buffer, mut copied, started) = (vec![0; queued], 0, Instant::now());
    sockets::for_each(pid, |socket| {
        if socket.is_tcp() && socket.peer().is_some() {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let got = recv(socket.as_raw_fd(), &mut buffer, flags)?;
            file.write_all(&buffer[..got])?;
            copied += got;
        }
        Ok(())
    })?;
    ensure!(copied == GIB, "{copied} of {GIB} bytes are in the queues");
    Ok(started.elapsed())
}

/// Adds up lines such as `… profile: dump find 1.2, dump lock 0.3 ms`; how many phases they tell of.
fn profile(log: &str, into: &mut BTreeMap<String, f64>) -> usize {
    let lines = log.lines().filter_map(|line| line.split_once("profile: ")?.1.strip_suffix(" ms"));
    let phases = lines.flat_map(|line| line.split(", ")).filter_map(|phase| phase.rsplit_once(' '));
    let phases = phases.filter_map(|(name, time)| Some((name, time.parse::<f64>().ok()?)));
    phases.map(|(name, time)| *into.entry(name.to_owned()).or_default() += time).count()
}

impl Row<Case> {
    pub fn connections(&self) -> f64 {
        u32::try_from(self.case.connections).map_or(f64::INFINITY, f64::from)
    }

    pub fn frozen(&self) -> Option<f64> {
        self.median(|times| Some(times.frozen.as_secs_f64()))
    }

    pub fn restore(&self) -> Option<f64> {
        self.median(|times| Some(times.restore.as_secs_f64()))
    }

    pub fn moved(&self) -> Option<f64> {
        self.median(|times| times.moved.map(|it| it.as_secs_f64()))
    }

    pub fn raw_copy(&self) -> Option<f64> {
        self.median(|times| times.raw_copy.map(|it| it.as_secs_f64()))
    }

    /// MiB, the larger of the two agents'.
    pub fn agent_peak(&self) -> Option<f64> {
        self.median(|times| times.agents.as_ref().map(peak))
    }

    /// MiB, the larger of dump's and restore's.
    pub fn criu_peak(&self) -> Option<f64> {
        self.median(|times| Some(peak(&times.criu)))
    }

    /// Microseconds of processor time for each connection, of one of the two agents.
    pub fn agent_cpu(&self, nth: usize) -> Option<f64> {
        self.median(|times| {
            times.agents.map(|agents| agents[nth].cpu.as_secs_f64() * 1e6 / self.connections())
        })
    }

    /// Processor time of criu and agent: other programs on the machine change it less than what a clock on the wall shows.
    pub fn dump_cpu(&self) -> Option<f64> {
        self.median(|times| {
            let agent = times.agents.map_or(Duration::ZERO, |agents| agents[0].cpu);
            Some((times.criu[0].cpu + agent).as_secs_f64())
        })
    }

    pub fn profile(&self) -> BTreeMap<&str, f64> {
        let names = self.trials.iter().flat_map(|times| times.profile.keys());
        let median = |name: &String| self.median(|times| times.profile.get(name).copied());
        names.filter_map(|name| Some((name.as_str(), median(name)?))).collect()
    }

    /// Milliseconds by the clock that the plugin worked on a dump, or a restore.
    pub fn hooks(&self, work: &str) -> Option<f64> {
        self.median(|times| {
            let phases =
                times.profile.iter().filter(|(name, _)| name.starts_with(work) && !name.ends_with(" cpu"));
            phases.map(|(_, time)| *time).reduce(|sum, time| sum + time)
        })
    }
}

/// MiB, the larger of dump's and restore's.
#[allow(clippy::cast_precision_loss)] // for people
fn peak(used: &[Usage; 2]) -> f64 {
    used[0].peak.max(used[1].peak) as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_in_a_log() {
        let log =
            "(00.1) soccr: profile: find 1.2, leave repair 30.4 ms\n(00.2) other: 1 ms\nprofile: find 7 ms\n";
        let mut found = BTreeMap::new();
        assert_eq!(profile(log, &mut found), 3);
        assert_eq!(
            found,
            [("find", 8.2), ("leave repair", 30.4)].map(|(name, time)| (name.to_owned(), time)).into()
        );
    }
}
