//! A bad network: two tun devices and a thread between them that delays, loses and reorders.
//!
//! For kernels without netem. Every packet passes through here, so the relay also counts resets.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use crate::capture::{Seen, tcp_header};
use crate::netns::End;

/// What the network does to packets, in both directions.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Share of packets that vanish.
    pub loss: f64,
    /// Share of packets that later ones overtake.
    pub reorder: f64,
    /// The shortest and the longest way through; it wanders between them.
    pub delay: (Duration, Duration),
    /// Same seed, same chances.
    pub seed: u64,
}

/// What became of the packets.
#[derive(Clone, Debug, Default)]
pub struct Passed {
    /// Segments and resets that came in, also those lost afterwards. Not among these resets: the
    /// late ones.
    pub seen: Seen,
    /// Resets after both streams had ended. They do no harm: a duplicate that comes when its
    /// connection is gone is answered so.
    pub late_resets: u64,
    /// Packets that the weather lost.
    pub lost: u64,
    /// Packets that came too late on purpose.
    pub reordered: u64,
    /// Packets lost because too many were under way: none unless the machine is overloaded.
    pub overflowed: u64,
}

/// A running relay.
#[derive(Debug)]
pub struct Relay {
    stop: UnixStream,
    thread: JoinHandle<Result<Passed>>,
}

/// Packets under way at most.
const ROOM: usize = 20_000;

/// The largest packet a tun device gives out (its MTU is 1500).
const MTU: usize = 2048;

/// An overtaken packet is late by up to this much.
const LATENESS: Duration = Duration::from_millis(10);

impl Relay {
    /// Connects the two ends, each by a new tun device with that name and these addresses. The
    /// packets of both go to the file `pcap`, if there is one, as they come in.
    pub fn start(a: End<'_>, b: End<'_>, weather: Weather, pcap: Option<&Path>) -> Result<Self> {
        let devices = [device(a)?, device(b)?];
        let pcap = pcap.map(Pcap::create).transpose()?;
        let (stop, stopped) = UnixStream::pair()?;
        let thread = std::thread::spawn(move || {
            let mut work = Work::new(devices, weather, pcap);
            work.run(&stopped)
        });
        Ok(Self { stop, thread })
    }

    /// Ends it; the devices vanish.
    pub fn stop(mut self) -> Result<Passed> {
        // It is not listening any more only if it has failed, which join() tells.
        let _ = self.stop.write_all(&[0]);
        self.thread.join().expect("the relay does not panic")
    }
}

fn device(end: End<'_>) -> Result<File> {
    let device = end.ns.run(|| tun(end.name))?;
    end.bring_up()?;
    Ok(device)
}

/// A new tun device in the calling thread's namespace; it lives as long as the descriptor.
fn tun(name: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    // SAFETY: all zeroes are a value of this C struct of integers and arrays.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    anyhow::ensure!(name.len() < libc::IFNAMSIZ, "{name} is too long for a device");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq at the address given.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(done).with_context(|| format!("TUNSETIFF {name}"))?;
    Ok(file)
}

/// A packet under way; the earliest first, then in the order of arrival.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    due: Instant,
    number: u64,
    to: usize,
    bytes: Vec<u8>,
}

struct Work {
    devices: [File; 2],
    ways: [Way; 2],
    weather: Weather,
    rng: Rng,
    under_way: BinaryHeap<Reverse<Packet>>,
    number: u64,
    pcap: Option<Pcap>,
    ends: Ends,
    passed: Passed,
}

/// One direction.
struct Way {
    delay: Duration,
    last_due: Instant,
}

impl Work {
    fn new(devices: [File; 2], weather: Weather, pcap: Option<Pcap>) -> Self {
        let way = || Way { delay: weather.delay.0, last_due: Instant::now() };
        Self {
            devices,
            ways: [way(), way()],
            weather,
            rng: Rng::with_seed(weather.seed),
            under_way: BinaryHeap::new(),
            number: 0,
            pcap,
            ends: Ends::default(),
            passed: Passed::default(),
        }
    }

    fn run(&mut self, stopped: &UnixStream) -> Result<Passed> {
        while !self.wait(stopped)? {
            for from in 0..2 {
                self.take_in(from)?;
            }
            self.give_out()?;
        }
        Ok(std::mem::take(&mut self.passed))
    }

    /// Until there is something to do; true when that is to stop.
    fn wait(&self, stopped: &UnixStream) -> Result<bool> {
        let left =
            self.under_way.peek().map(|Reverse(next)| next.due.saturating_duration_since(Instant::now()));
        let [a, b] = &self.devices;
        let mut fds = [a.as_fd(), b.as_fd(), stopped.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match ppoll(&mut fds, left.map(TimeSpec::from), None) {
            Ok(_) => Ok(fds[2].any() == Some(true)),
            Err(Errno::EINTR) => Ok(false),
            Err(error) => Err(error).context("ppoll"),
        }
    }

    fn take_in(&mut self, from: usize) -> Result<()> {
        let mut packet = [0; MTU];
        loop {
            match self.devices[from].read(&mut packet) {
                Ok(len) => self.arrive(&packet[..len], 1 - from)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error).context("cannot read from a tun device"),
            }
        }
    }

    fn arrive(&mut self, bytes: &[u8], to: usize) -> Result<()> {
        if !self.ends.is_late_reset(bytes) {
            self.passed.seen.note(bytes);
        } else {
            self.passed.late_resets += 1;
        }
        if let Some(pcap) = &mut self.pcap {
            pcap.write(bytes)?;
        }
        if self.rng.f64() < self.weather.loss {
            self.passed.lost += 1;
        } else if self.under_way.len() >= ROOM {
            self.passed.overflowed += 1;
        } else {
            let due = self.due(to);
            self.number += 1;
            self.under_way.push(Reverse(Packet { due, number: self.number, to, bytes: bytes.to_vec() }));
        }
        Ok(())
    }

    /// When a packet that arrives now leaves: no earlier than the one before, unless that is late.
    fn due(&mut self, to: usize) -> Instant {
        let (shortest, longest) = self.weather.delay;
        let way = &mut self.ways[to];
        let step = (longest - shortest).mul_f64(self.rng.f64() / 20.0);
        way.delay = if self.rng.bool() {
            (way.delay + step).min(longest)
        } else {
            way.delay.saturating_sub(step).max(shortest)
        };
        let due = (Instant::now() + way.delay).max(way.last_due);
        if self.rng.f64() < self.weather.reorder {
            self.passed.reordered += 1;
            return due + LATENESS.mul_f64(self.rng.f64());
        }
        way.last_due = due;
        due
    }

    fn give_out(&mut self) -> Result<()> {
        let now = Instant::now();
        while self.under_way.peek().is_some_and(|Reverse(next)| next.due <= now) {
            let Some(Reverse(packet)) = self.under_way.pop() else { break };
            self.devices[packet.to].write_all(&packet.bytes).context("cannot write to a tun device")?;
        }
        Ok(())
    }
}

/// The streams that have ended, by the ports they came from and went to.
#[derive(Default)]
struct Ends {
    streams: HashSet<(u16, u16)>,
}

impl Ends {
    /// Takes a segment into account; whether it resets what has ended in both directions.
    fn is_late_reset(&mut self, packet: &[u8]) -> bool {
        const FIN: u8 = 1;
        const SYN: u8 = 2;
        const RST: u8 = 4;
        let Some(tcp) = tcp_header(packet) else { return false };
        let port = |at| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let (from, to) = (port(0), port(2));
        let flags = tcp[13];
        if flags & SYN != 0 {
            self.streams.remove(&(from, to));
        }
        if flags & FIN != 0 {
            self.streams.insert((from, to));
        }
        flags & RST != 0 && self.streams.contains(&(from, to)) && self.streams.contains(&(to, from))
    }
}

/// A capture file for tcpdump and wireshark: what led to a reset, for instance.
struct Pcap {
    file: std::io::BufWriter<File>,
}

impl Pcap {
    const RAW_IP: u32 = 101;
    const SNAP: usize = 128;

    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        let mut file = std::io::BufWriter::new(file);
        file.write_all(&0xa1b2_c3d4_u32.to_ne_bytes())?;
        file.write_all(&[2_u16, 4].map(u16::to_ne_bytes).concat())?;
        let snap = u32::try_from(Self::SNAP)?;
        file.write_all(&[0, 0, snap, Self::RAW_IP].map(u32::to_ne_bytes).concat())?;
        Ok(Self { file })
    }

    fn write(&mut self, packet: &[u8]) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let part = &packet[..packet.len().min(Self::SNAP)];
        let header = [
            u32::try_from(now.as_secs())?,
            now.subsec_micros(),
            u32::try_from(part.len())?,
            u32::try_from(packet.len())?,
        ];
        self.file.write_all(&header.map(u32::to_ne_bytes).concat())?;
        Ok(self.file.write_all(part)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(weather: Weather) -> Work {
        let null = || File::open("/dev/null").unwrap();
        Work::new([null(), null()], weather, None)
    }

    fn weather(loss: f64, reorder: f64) -> Weather {
        let delay = (Duration::from_millis(1), Duration::from_millis(20));
        Weather { loss, reorder, delay, seed: 7 }
    }

    #[test]
    fn a_calm_network_keeps_order_and_loses_nothing() {
        let mut work = work(weather(0.0, 0.0));
        for number in 0..1000_u32 {
            work.arrive(&number.to_be_bytes(), 1).unwrap();
        }
        for number in 0..1000_u32 {
            let Reverse(packet) = work.under_way.pop().unwrap();
            assert_eq!(packet.bytes, number.to_be_bytes());
        }
        assert_eq!(work.passed.lost + work.passed.reordered, 0);
    }

    #[test]
    fn bad_weather_loses_and_reorders_its_share() {
        let mut work = work(weather(0.01, 0.01));
        for _ in 0..10_000 {
            work.arrive(&[0], 0).unwrap();
        }
        assert!((50..200).contains(&work.passed.lost), "{}", work.passed.lost);
        assert!((50..200).contains(&work.passed.reordered), "{}", work.passed.reordered);
        let mut arrived = Vec::new();
        while let Some(Reverse(packet)) = work.under_way.pop() {
            arrived.push(packet.number);
        }
        assert!(!arrived.is_sorted());
    }

    #[test]
    fn a_reset_is_late_after_both_ends_only() {
        let segment = |from: u16, to: u16, flags| {
            let mut packet = [0; 40];
            (packet[0], packet[9], packet[33]) = (0x45, 6, flags);
            packet[20..22].copy_from_slice(&from.to_be_bytes());
            packet[22..24].copy_from_slice(&to.to_be_bytes());
            packet
        };
        let mut work = work(weather(0.0, 0.0));
        for (from, flags) in [(1, 0x11), (1, 0x04), (2, 0x11), (2, 0x04), (1, 0x14), (1, 0x02), (1, 0x04)] {
            work.arrive(&segment(from, 3 - from, flags), 0).unwrap();
        }
        assert_eq!(work.passed.late_resets, 2, "those between the second FIN and the new SYN");
        assert_eq!(work.passed.seen.resets.len(), 2);
    }

    #[test]
    fn the_delay_stays_within_its_bounds() {
        let mut work = work(weather(0.0, 0.0));
        for _ in 0..10_000 {
            work.due(0);
            assert!(work.ways[0].delay >= work.weather.delay.0);
            assert!(work.ways[0].delay <= work.weather.delay.1);
        }
    }
}
