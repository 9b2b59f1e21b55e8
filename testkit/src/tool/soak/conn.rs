//! One client's connection: what it orders, what it checks, how far it has come since a restore.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use soccr_testkit::Pattern;
use soccr_testkit::client::dial;
use soccr_testkit::fleet::Talk;
use soccr_testkit::sockets::queued;

use crate::server::order::{BLOCK, Download, OPEN, Order};

/// How a connection behaves. The rates are low enough for dozens on two busy processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each side writes as much as fits, the other reads 400 kB/s: all four queues are full.
    Greedy,
    /// 100 kB/s both ways.
    Paced,
    /// The client reads little from a small buffer: the server's send queue is full, its peer's
    /// window mostly closed.
    SlowClient,
    /// The server reads little: its receive queue is full, its window mostly closed.
    SlowServer,
    /// The client ends its stream at once, the server's goes on for seconds.
    HalfClient,
    /// The server ends its stream at once, the client's goes on for seconds.
    HalfServer,
}

impl Kind {
    /// A fleet has them in these shares.
    pub const MIX: [Self; 8] = [
        Self::Greedy,
        Self::Paced,
        Self::SlowClient,
        Self::HalfClient,
        Self::Greedy,
        Self::SlowServer,
        Self::Paced,
        Self::HalfServer,
    ];
}

/// Bytes that the client may read and write in each of its ticks.
#[derive(Clone, Copy, Debug)]
struct Pace {
    read: usize,
    write: usize,
}

const UNLIMITED: usize = 64 << 10;

/// After a restore this many bytes have to go through each open direction.
pub const PROGRESS: u64 = 8 << 10;

/// A connection from the client's side.
#[derive(Debug)]
pub struct Conn {
    stream: TcpStream,
    server: SocketAddr,
    port: u16,
    kind: Kind,
    head: Vec<u8>,
    pace: Pace,
    /// Bytes of pattern to send before the end; [`OPEN`] until told otherwise.
    upload: u64,
    open_upload: bool,
    sent: u64,
    shut: bool,
    download: Download,
    eof: bool,
    mark: Option<Mark>,
}

impl Talk for Conn {
    fn turn(&mut self, _: bool) -> Result<()> {
        self.write()?;
        self.read()?;
        self.note_progress();
        Ok(())
    }

    fn waits(&self) -> bool {
        !self.is_over()
    }
}

/// How far it was when a restore began, and what happened since.
#[derive(Debug)]
struct Mark {
    received: u64,
    acked: u64,
    first_down: Option<Instant>,
    first_up: Option<Instant>,
    through: bool,
}

impl Conn {
    /// Connects from the calling thread's namespace.
    pub fn open(server: SocketAddr, kind: Kind, rng: &mut Rng) -> Result<Self> {
        let stream = dial(server, (kind == Kind::SlowClient).then_some(8 << 10))?;
        stream.set_nonblocking(true)?;
        let port = stream.local_addr()?.port();
        let (order, upload, pace) = plan(kind, rng);
        Ok(Self {
            stream,
            server,
            port,
            kind,
            head: order.encode(),
            pace,
            upload,
            open_upload: order.upload == OPEN,
            sent: 0,
            shut: false,
            download: Download::new(Pattern::to_client(port)),
            eof: false,
            mark: None,
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Bytes of the server's stream, each of them right.
    pub fn received(&self) -> u64 {
        self.download.received()
    }

    /// Bytes of ours that the server's program has found right, as it said last.
    pub fn confirmed(&self) -> u64 {
        self.download.stamp()
    }

    /// Whether the server's program has taken it on.
    pub fn is_answered(&self) -> bool {
        self.download.received() > 0
    }

    /// Whether both streams have ended, and the peer has all of ours.
    pub fn is_over(&self) -> bool {
        self.eof && self.shut && self.unacked() == 0
    }

    /// Ends it soon: no more is sent, the rest is read fast.
    pub fn finish(&mut self) {
        if self.open_upload {
            self.upload = self.upload.min(self.sent);
        }
        // Until our end gets there the server goes on, some as fast as we read.
        self.pace = Pace { read: 8 << 10, write: UNLIMITED };
    }

    /// Where and how it connects.
    pub fn place(&self) -> (SocketAddr, Kind) {
        (self.server, self.kind)
    }

    fn write(&mut self) -> Result<()> {
        while !self.head.is_empty() {
            let Some(len) = blocked(self.stream.write(&self.head), "write")? else { return Ok(()) };
            self.head.drain(..len);
        }
        let mut allowed = (self.pace.write as u64).min(self.upload - self.sent);
        while allowed > 0 {
            let part = usize::try_from(allowed)?;
            let bytes = Pattern::to_server(self.port).bytes(self.sent, part);
            let Some(len) = blocked(self.stream.write(&bytes), "write")? else { break };
            self.sent += len as u64;
            allowed -= len as u64;
        }
        if self.sent == self.upload && !self.shut {
            self.stream.shutdown(Shutdown::Write).context("shutdown")?;
            self.shut = true;
        }
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        let mut allowed = self.pace.read;
        let mut buf = [0; 16 << 10];
        while allowed > 0 && !self.eof {
            let room = buf.len().min(allowed);
            let Some(len) = blocked(self.stream.read(&mut buf[..room]), "read")? else { break };
            if len == 0 {
                self.eof = true;
                self.check_end()?;
            }
            self.download.take(&buf[..len], self.sent)?;
            allowed -= len;
        }
        Ok(())
    }

    fn check_end(&self) -> Result<()> {
        let (stamp, sent) = (self.download.stamp(), self.sent);
        ensure!(self.download.complete(), "the server's stream ends after {} bytes", self.received());
        ensure!(!self.open_upload || stamp == sent, "the server got {stamp} of {sent} bytes");
        Ok(())
    }

    /// A restore begins now: forget what was before. What the kernel holds for us was before, too.
    pub fn mark(&mut self) {
        let received = self.received() + self.outstanding(libc::FIONREAD);
        self.mark =
            Some(Mark { received, acked: self.acked(), first_down: None, first_up: None, through: false });
    }

    fn note_progress(&mut self) {
        let (received, acked) = (self.received(), self.acked());
        let up = if self.eof { acked } else { self.confirmed() };
        let (eof, shut) = (self.eof, self.shut);
        let Some(mark) = &mut self.mark else { return };
        if received > mark.received {
            mark.first_down.get_or_insert_with(Instant::now);
        }
        if acked > mark.acked {
            mark.first_up.get_or_insert_with(Instant::now);
        }
        let down_through = eof || received >= mark.received + PROGRESS;
        let up_through = shut || up >= mark.acked + PROGRESS;
        mark.through |= down_through && up_through;
    }

    /// When, after the mark, the first byte came, and the first was acknowledged.
    pub fn first_progress(&self) -> (Option<Instant>, Option<Instant>) {
        self.mark.as_ref().map_or((None, None), |mark| (mark.first_down, mark.first_up))
    }

    /// Whether [`PROGRESS`] has gone through each direction since the mark; yes without one.
    pub fn is_through(&self) -> bool {
        self.mark.as_ref().is_none_or(|mark| mark.through)
    }

    /// For a message: the counts.
    pub fn state(&self) -> String {
        let mark = self.mark.as_ref().map(|mark| (mark.received, mark.acked));
        format!(
            "{:?}, {} sent, {} acknowledged, {} confirmed, {} received, (received, acknowledged) at the restore \
             {mark:?}, ended: ours {}, theirs {}",
            self.kind,
            self.sent,
            self.acked(),
            self.confirmed(),
            self.received(),
            self.shut,
            self.eof
        )
    }

    /// Bytes of pattern that the server's kernel has acknowledged. (The order before them and the
    /// FIN after them shift this by at most their length while they are on their way.)
    fn acked(&self) -> u64 {
        self.sent.saturating_sub(self.unacked())
    }

    fn unacked(&self) -> u64 {
        self.outstanding(libc::TIOCOUTQ)
    }

    /// A dead socket has nothing under way; reading it says what is wrong.
    fn outstanding(&self, request: libc::Ioctl) -> u64 {
        queued(&self.stream, request).map_or(0, |bytes| bytes as u64)
    }
}

/// None if the call would have blocked.
fn blocked(done: std::io::Result<usize>, call: &'static str) -> Result<Option<usize>> {
    match done {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        done => done.map(Some).context(call),
    }
}

/// What to order, how much to send, and how fast. The server's ticks are 10 ms, ours are as [`FAST`](soccr_testkit::Pace::FAST).
fn plan(kind: Kind, rng: &mut Rng) -> (Order, u64, Pace) {
    let open = Order { upload: OPEN, blocks: OPEN, read: 0, write: 1024, buffers: 0 };
    let pace = Pace { read: UNLIMITED, write: 512 };
    let seconds = rng.u64(2..8);
    match kind {
        Kind::Greedy => {
            // Restored with a full queue, a receive buffer that the kernel tunes grows to megabytes:
            // to the kernel the queue looks like the traffic of one round trip.
            let order = Order { read: 4 << 10, write: 0, buffers: 64 << 10, ..open };
            (order, OPEN, Pace { read: 2 << 10, write: 16 << 10 })
        }
        // The server reads at its ticks, not as bytes come, but catches up after a freeze.
        Kind::Paced => (Order { read: 2048, ..open }, OPEN, pace),
        Kind::SlowClient => {
            let order = Order { write: 0, buffers: 32 << 10, ..open };
            (order, OPEN, Pace { read: 512, ..pace })
        }
        Kind::SlowServer => {
            let order = Order { read: 1024, buffers: 32 << 10, ..open };
            (order, OPEN, Pace { write: 8 << 10, ..pace })
        }
        Kind::HalfClient => {
            let blocks = seconds * 100 * 1024 / BLOCK as u64;
            (Order { blocks, ..open }, 32 << 10, Pace { write: UNLIMITED, ..pace })
        }
        Kind::HalfServer => {
            let upload = seconds * 200 * 512;
            (Order { upload, blocks: 8, write: 0, ..open }, upload, pace)
        }
    }
}
