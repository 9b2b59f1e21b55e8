//! `make demo`.

mod load;
mod server;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use soccr_testkit::criu::timed;
use soccr_testkit::interrupt::pause;
use soccr_testkit::{Criu, Lock, NetNs, Side, leftovers, task};

use crate::{Programs, target};
use load::{Client, Load};

const BEFORE: Duration = Duration::from_secs(2);
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

pub fn run(options: &Options) -> Result<()> {
    let criu = options.programs.find(!options.stock)?;
    let out = fresh_folder(&options.out)?;
    let here = NetNs::current()?;
    let rules = leftovers::rules(&here)?;

    let shown = freeze_and_thaw(&criu, options, &out)?;
    let left = leftovers::rules(&here)?;
    ensure!(left == rules, "the firewall is not what it was before:\n{}", left.join("\n"));
    task::no_children(Duration::from_secs(5))?;
    println!("left behind          no process, no firewall rule");
    ensure!(shown, "not every client is well, see above");
    Ok(())
}

/// The show itself; whether every client got every answer.
fn freeze_and_thaw(criu: &Criu, options: &Options, out: &Path) -> Result<bool> {
    let images = out.join("images");
    let clients = options.clients.get();
    let side = if options.stock { Side::Stock(Lock::Nftables) } else { Side::Plugin(Lock::Nftables) };
    let (name, task, address) = server::start(out, clients, options.builtin)?;
    let pid = task.pid();
    println!("soccr demo: {name}, {clients} clients, {}\n", with(side));

    let load = Load::start(address, clients)?;
    pause(BEFORE)?;
    let before = load.answers();
    let total = before.iter().sum::<u64>();
    println!(
        "1. {name} is process {pid} at {address}; its clients INCR all the time: {total} answers so far"
    );

    let start = Instant::now();
    let (_, dump) = timed(|| criu.dump(side, pid, &images).dump_and_wait(task))?;
    println!("2. criu has dumped it: {} s", seconds(dump));
    show_gone(pid)?;
    let at_thaw = load.answers();

    let ((task, _), restore) = timed(|| criu.restore(side, &images).restore())?;
    let frozen = start.elapsed();
    ensure!(task.pid() == pid, "it came back as process {}", task.pid());
    println!("4. criu has restored it: {} s; process {pid} runs again", seconds(restore));

    pause(AFTER)?;
    leftovers::no_repair(pid)?;
    let after = load.answers();
    let on = after.iter().zip(&at_thaw).filter(|(after, then)| after > then).count();
    let more = after.iter().sum::<u64>() - at_thaw.iter().sum::<u64>();
    println!("5. {on} of {} clients go on over the same connections: {more} answers more\n", after.len());
    let clients = load.stop()?;
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
fn summary(clients: &[Client], times: &str) -> bool {
    for (i, client) in clients.iter().enumerate() {
        if let Some(why) = &client.dead {
            println!("client {i} is dead: {why}");
        }
    }
    let alive = clients.iter().filter(|client| client.dead.is_none()).count();
    let answers: u64 = clients.iter().map(Client::value).sum();
    let lost: u64 = clients.iter().map(|client| client.lost).sum();
    let duplicated: u64 = clients.iter().map(|client| client.duplicated).sum();
    let silence = clients.iter().map(|client| client.silence).max().unwrap_or_default();
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
    for name in ["images", "server"] {
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
