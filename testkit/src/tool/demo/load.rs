//! The demo's clients: many connections, one thread, each always waiting for the answer to an INCR
//! of its own key, so that every answer must be the last one plus one.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

/// The clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<Vec<AtomicU64>>,
    thread: JoinHandle<Result<Vec<Client>>>,
}

/// What became of one client.
pub struct Client {
    stream: TcpStream,
    key: String,
    /// The last value that came back.
    value: u64,
    line: Vec<u8>,
    asked: bool,
    heard: Instant,
    /// Answers that never came.
    pub lost: u64,
    /// Answers that came twice.
    pub duplicated: u64,
    /// Why the connection is dead, if it is.
    pub dead: Option<String>,
    /// The longest time between two answers.
    pub silence: Duration,
}

impl Load {
    /// Connects `count` clients and lets them go.
    pub fn start(server: SocketAddr, count: usize) -> Result<Self> {
        let clients: Vec<_> = (0..count).map(|i| Client::connect(server, i)).collect::<Result<_>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        let answers: Arc<Vec<_>> = Arc::new((0..count).map(|_| AtomicU64::new(0)).collect());
        let thread = std::thread::spawn({
            let (stop, answers) = (stop.clone(), answers.clone());
            move || run(clients, &stop, &answers)
        });
        Ok(Self { stop, answers, thread })
    }

    /// How many answers each client has had.
    pub fn answers(&self) -> Vec<u64> {
        self.answers.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// Waits for the answers that are still due (ten seconds at most) and ends.
    pub fn stop(self) -> Result<Vec<Client>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the clients do not panic")
    }
}

fn run(mut clients: Vec<Client>, stop: &AtomicBool, answers: &[AtomicU64]) -> Result<Vec<Client>> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (i, client) in clients.iter_mut().enumerate() {
        epoll.add(&client.stream, EpollEvent::new(EpollFlags::EPOLLIN, i as u64))?;
        client.attempt(Client::ask);
    }
    let mut events = [EpollEvent::empty(); 256];
    let mut end = None;
    while clients.iter().any(Client::waits) {
        let ready = epoll.wait(&mut events, 20_u8)?;
        if end.is_none() && stop.load(Ordering::Relaxed) {
            end = Some(Instant::now() + Duration::from_secs(10));
        }
        if end.is_some_and(|end| Instant::now() > end) {
            break;
        }
        for event in &events[..ready] {
            let i = usize::try_from(event.data())?;
            clients[i].attempt(|client| client.hear(end.is_none()));
            answers[i].store(clients[i].value, Ordering::Relaxed);
            if clients[i].dead.is_some() {
                epoll.delete(&clients[i].stream)?;
            }
        }
    }
    for client in clients.iter_mut().filter(|client| client.waits()) {
        client.lost += 1;
        client.dead = Some("no answer for ten seconds".into());
    }
    Ok(clients)
}

impl Client {
    fn connect(server: SocketAddr, i: usize) -> Result<Self> {
        let stream = TcpStream::connect(server).with_context(|| format!("cannot connect to {server}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            key: format!("key:{i}"),
            value: 0,
            line: Vec::new(),
            asked: false,
            heard: Instant::now(),
            lost: 0,
            duplicated: 0,
            dead: None,
            silence: Duration::ZERO,
        })
    }

    /// Answers in all.
    pub fn value(&self) -> u64 {
        self.value
    }

    fn waits(&self) -> bool {
        self.asked && self.dead.is_none()
    }

    /// An error is this connection's end, and nobody else's.
    fn attempt(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = work(self) {
            self.dead = Some(format!("{error:#}"));
        }
    }

    fn ask(&mut self) -> Result<()> {
        // A few bytes always fit: the answer to the last ones has come.
        let command = format!("INCR {}\r\n", self.key);
        self.stream.write_all(command.as_bytes()).context("cannot send")?;
        self.asked = true;
        Ok(())
    }

    fn hear(&mut self, go_on: bool) -> Result<()> {
        let mut buf = [0; 512];
        loop {
            match self.stream.read(&mut buf) {
                Ok(0) => bail!("closed by the server"),
                Ok(len) => self.line.extend(&buf[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot receive"),
            }
            while let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.line.drain(..=end).collect();
                self.judge(std::str::from_utf8(&line)?.trim())?;
                self.asked = false;
                if go_on {
                    self.ask()?;
                }
            }
        }
    }

    fn judge(&mut self, line: &str) -> Result<()> {
        let value: u64 = line
            .strip_prefix(':')
            .and_then(|it| it.parse().ok())
            .with_context(|| format!("the answer to INCR {} is {line:?}", self.key))?;
        if value <= self.value {
            self.duplicated += 1;
        } else {
            self.lost += value - self.value - 1;
            self.value = value;
        }
        self.silence = self.silence.max(self.heard.elapsed());
        self.heard = Instant::now();
        Ok(())
    }
}
