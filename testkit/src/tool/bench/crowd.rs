//! The clients: in as many processes as their descriptors take.
//!
//! Each process is told what to do by a line, and answers with one.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use soccr_testkit::client::dial;
use soccr_testkit::fleet::Talk;
use soccr_testkit::server::sibling_binary;
use soccr_testkit::sockets::queued;
use soccr_testkit::task::{pid_of, wait_readable, wait_until};
use soccr_testkit::{Client, NetNs};

/// For anything that clients are told to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connects to a server that is measured, and does what its standard input says
#[derive(clap::Args)]
pub struct Options {
    server: SocketAddr,
    count: usize,
}

/// All clients.
pub struct Crowd {
    processes: Vec<Process>,
}

struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Crowd {
    /// So many connections from this namespace, from a process of ours to each of the server's `parts`, which listen at
    /// 127.0.0.1 and on.
    pub fn connect(ns: &NetNs, server: SocketAddr, count: usize, parts: usize) -> Result<Self> {
        let mut processes = Vec::new();
        let mut left = count;
        while left > 0 {
            let share = left.min(count.div_ceil(parts));
            let mut command = ns.command(sibling_binary("soccr-test")?);
            let mut server = server;
            if parts > 1 {
                let nth = u8::try_from(processes.len() + 1).context("too many processes")?;
                server.set_ip(Ipv4Addr::new(127, 0, 0, nth).into());
            }
            command.args(["crowd", &server.to_string(), &share.to_string()]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().context("cannot start the clients")?;
            let answers = BufReader::new(child.stdout.take().context("a pipe")?);
            let mut process = Process { orders: child.stdin.take(), answers, child };
            // One after the other: a listener's queue is short.
            process.answer()?;
            processes.push(process);
            left -= share;
        }
        Ok(Self { processes })
    }

    /// Has each send so many bytes, and waits until its peer has them.
    pub fn fill(&mut self, bytes: usize) -> Result<()> {
        self.all(&format!("fill {bytes}")).map(drop)
    }

    /// Has each receive what was filled in, and compare every byte.
    pub fn drain(&mut self, bytes: usize) -> Result<()> {
        self.all(&format!("drain {bytes}")).map(drop)
    }

    /// Has all exchange some bytes; how long that took.
    pub fn echo(&mut self) -> Result<Duration> {
        self.all("echo")
    }

    /// The longest time that one of them took.
    fn all(&mut self, order: &str) -> Result<Duration> {
        for process in &mut self.processes {
            let orders = process.orders.as_mut().context("open until the drop")?;
            writeln!(orders, "{order}").with_context(|| format!("cannot tell clients to {order}"))?;
        }
        let answers = self.processes.iter_mut().map(Process::answer);
        let all: Vec<Duration> =
            answers.collect::<Result<_>>().with_context(|| format!("clients: {order}"))?;
        all.into_iter().max().context("there is a client")
    }
}

impl Process {
    fn answer(&mut self) -> Result<Duration> {
        ensure!(wait_readable(&self.answers.get_ref().as_fd(), PATIENCE)?, "no answer in {PATIENCE:?}");
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        match line.trim().split_once(' ') {
            Some(("done", micros)) => Ok(Duration::from_micros(micros.parse()?)),
            Some(("failed", why)) => bail!("{why}"),
            _ => bail!("clients ended ({line:?})"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.orders.take()); // at the end of its orders it ends
        let gone = soccr_testkit::task::pidfd_open(pid_of(&self.child))
            .and_then(|pidfd| wait_readable(&pidfd, Duration::from_secs(5)));
        if !gone.is_ok_and(|gone| gone) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// One of the processes.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let connected = connect_all(options).map(|clients| (clients, started.elapsed()));
    let (mut clients, took) = match connected {
        Ok(connected) => connected,
        Err(error) => return say(&Err(error)),
    };
    say(&Ok(took))?;
    for order in std::io::stdin().lines() {
        let started = Instant::now();
        let done = obey(&mut clients, &order?);
        say(&done.map(|()| started.elapsed()))?;
    }
    Ok(())
}

fn say(done: &Result<Duration>) -> Result<()> {
    let mut stdout = std::io::stdout();
    match done {
        Ok(took) => writeln!(stdout, "done {}", took.as_micros())?,
        Err(error) => writeln!(stdout, "failed {}", format!("{error:#}").replace('\n', " "))?,
    }
    Ok(stdout.flush()?)
}

fn connect_all(options: &Options) -> Result<Vec<Client>> {
    (0..options.count).map(|_| Client::over(dial(options.server, None)?)).collect()
}

fn obey(clients: &mut [Client], order: &str) -> Result<()> {
    match order.split_once(' ') {
        Some(("fill", bytes)) => fill(clients, bytes.parse()?),
        Some(("drain", bytes)) => {
            let bytes = bytes.parse()?;
            clients.iter_mut().try_for_each(|client| client.receive_echo(bytes))
        }
        None if order == "echo" => echo(clients),
        _ => bail!("no such order: {order}"),
    }
}

fn fill(clients: &mut [Client], bytes: usize) -> Result<()> {
    clients.iter_mut().try_for_each(|client| client.send(bytes))?;
    clients.iter().try_for_each(|client| {
        wait_until("the server has all bytes", PATIENCE, || Ok(queued(&client.as_fd(), libc::TIOCOUTQ)? == 0))
    })
}

/// Each sends something, and all of it comes back.
fn echo(clients: &mut [Client]) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (nth, client) in clients.iter_mut().enumerate() {
        client.set_nonblocking(true)?;
        client.write_some()?;
        epoll.add(&*client, EpollEvent::new(EpollFlags::EPOLLIN, u64::try_from(nth)?))?;
    }
    let (mut waiting, end) = (clients.len(), Instant::now() + PATIENCE);
    let mut events = [EpollEvent::empty(); 256];
    while waiting > 0 {
        let ready = epoll.wait(&mut events, 1000_u16)?;
        for event in &events[..ready] {
            let client = &mut clients[usize::try_from(event.data())?];
            client.read_some()?;
            if !client.waits() {
                epoll.delete(&*client)?;
                waiting -= 1;
            }
        }
        ensure!(Instant::now() < end, "{waiting} of {} are silent for {PATIENCE:?}", clients.len());
    }
    clients.iter().try_for_each(|client| client.set_nonblocking(false))
}
