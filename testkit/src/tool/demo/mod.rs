//! `make demo`.

pub mod load;
pub mod server;

use std::fs;
use std::net::Ipv4Addr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use soccr_testkit::criu::timed;
use soccr_testkit::fleet::{Fleet, Member, Pace};
use soccr_testkit::interrupt::pause;
use soccr_testkit::{Lock, Side, Stage, leftovers, task};

use crate::{Programs, target};
use load::Client;

const BEFORE: Duration = Duration::from_secs(2);
/// Each client asks again as soon as it has its answer, or nearly.
const PACE: Pace = Pace { period: Duration::from_millis(1), parts: 1 };
const AFTER: Duration = Duration::from_secs(3);

/// Freezes, kills and brings back a real server with live clients, none of whom notices
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    programs: Programs,
    /// For the images and logs; what is in there is replaced
    #[arg(long, value_name = "DIR", default_value_os_t = target("demo"))]
    out: PathBuf,
    /// How many clients
    #[arg(long, value_name = "N", default_value = "200")]
    clients: NonZeroUsize,
    /// The small server that comes with soccr, also where redis-server is installed
    #[arg(long)]
    builtin: bool,
    /// CRIU alone carries the connections, to compare
    #[arg(long)]
    stock: bool,
}

/// For the last answers.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(options: &Options) -> Result<()> {
    let criu = options.programs.find(!options.stock)?;
    let out = fresh_folder(&options.out)?;
    let stage = Stage::alone(&criu, &out)?;

    let shown = freeze_and_thaw(&stage, options)?;
    stage.wait_until_clean(None)?;
    task::no_children(Duration::from_secs(5))?;
    println!("left behind          no process, no firewall rule");
    ensure!(shown, "not every client is well, see above");
    Ok(())
}

/// The show itself; whether every client got every answer.
fn freeze_and_thaw(stage: &Stage, options: &Options) -> Result<bool> {
    let images = stage.images()?;
    let count = options.clients.get();
    let side = if options.stock { Side::Stock(Lock::Nftables) } else { Side::Plugin(Lock::Nftables) };
    let loopback = [Ipv4Addr::LOCALHOST.into()];
    let (name, task, addresses) = server::start(stage, &loopback, count, options.builtin)?;
    let (pid, address) = (task.pid(), addresses[0]);
    println!("soccr demo: {name}, {count} clients, {}\n", with(side));

    let clients: Vec<_> =
        stage.peer.run(|| (0..count).map(|i| Client::connect(address, i, 1)).collect::<Result<_>>())?;
    let load = Fleet::start(clients, PACE);
    let answers = || load.members().iter().map(|member| member.client.value()).collect::<Vec<_>>();
    pause(BEFORE)?;
    let before = answers();
    let total = before.iter().sum::<u64>();
    println!(
        "1. {name} is process {pid} at {address}; its clients INCR all the time: {total} answers so far"
    );

    let start = Instant::now();
    let (_, dump) = timed(|| stage.dump(side, pid, &images).dump_and_wait(task))?;
    println!("2. criu has dumped it: {} s", seconds(dump));
    show_gone(pid)?;
    let at_thaw = answers();

    let ((task, _), restore) = timed(|| stage.restore(side, &images)?.restore())?;
    let frozen = start.elapsed();
    ensure!(task.pid() == pid, "it came back as process {}", task.pid());
    println!("4. criu has restored it: {} s; process {pid} runs again", seconds(restore));

    pause(AFTER)?;
    leftovers::no_repair(pid)?;
    let after = answers();
    let on = after.iter().zip(&at_thaw).filter(|(after, then)| after > then).count();
    let more = after.iter().sum::<u64>() - at_thaw.iter().sum::<u64>();
    println!("5. {on} of {} clients go on over the same connections: {more} answers more\n", after.len());
    load.end(PATIENCE);
    let clients = load.take();
    drop(task);
    let times = format!("{} s (dump {} s, restore {} s)", seconds(frozen), seconds(dump), seconds(restore));
    let well = summary(&clients, &times);
    println!("images               {} ({})", images.display(), contents(&images)?);
    Ok(well && on == clients.len())
}

fn show_gone(pid: Pid) -> Result<()> {
    match kill(pid, None) {
        Err(Errno::ESRCH) => println!("3. process {pid} is gone (kill: {})", Errno::ESRCH.desc()),
        other => bail!("process {pid} should be gone, but kill says {other:?}"),
    }
    Ok(())
}

/// Prints what became of the clients; whether all is well.
fn summary(clients: &[Member<Client>], times: &str) -> bool {
    for (i, member) in clients.iter().enumerate() {
        match &member.error {
            Some(why) => println!("client {i} is dead: {why:#}"),
            None if member.waits() => println!("client {i} is dead: no answer for {PATIENCE:?}"),
            None => {}
        }
    }
    let alive = clients.iter().filter(|member| member.error.is_none() && !member.waits()).count();
    let sum = |of: fn(&Client) -> u64| clients.iter().map(|member| of(&member.client)).sum::<u64>();
    let unanswered =
        u64::try_from(clients.iter().filter(|member| member.waits()).count()).unwrap_or(u64::MAX);
    let (answers, duplicated) = (sum(Client::value), sum(|client| client.duplicated));
    let lost = sum(|client| client.lost) + unanswered;
    let silence = clients.iter().map(|member| member.client.silence).max().unwrap_or_default();
    println!("connections alive    {alive} of {}", clients.len());
    println!("answers              {answers}: {lost} lost, {duplicated} duplicated");
    println!("time frozen          {times}");
    println!("longest silence      {} s at any client", seconds(silence));
    alive == clients.len() && lost == 0 && duplicated == 0
}

fn with(side: Side) -> &'static str {
    match side {
        Side::Plugin(_) => "stock CRIU with soccr_plugin.so",
        Side::Stock(_) => "stock CRIU alone",
    }
}

fn contents(dir: &Path) -> Result<String> {
    let (mut files, mut bytes) = (0, 0);
    for entry in fs::read_dir(dir)? {
        files += 1;
        bytes += entry?.metadata()?.len();
    }
    Ok(format!("{files} files, {} kB", bytes / 1000))
}

fn fresh_folder(out: &Path) -> Result<PathBuf> {
    for name in ["run", "server"] {
        match fs::remove_dir_all(out.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot empty {}", out.display()));
            }
            _ => fs::create_dir_all(out.join(name))?,
        }
    }
    Ok(out.canonicalize()?)
}

fn seconds(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64())
}
