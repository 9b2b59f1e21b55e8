//! A packet capture that answers two questions: was a connection reset, and were marks of congestion echoed?

use std::collections::BTreeSet;
use std::fmt;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::netns::NetNs;
use crate::sockets::get;

/// What a capture saw of TCP.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// TCP segments in all.
    pub segments: usize,
    /// Those with the RST flag.
    pub resets: Vec<Reset>,
    /// Ports that have echoed a mark of congestion (ECE, RFC 3168).
    pub echoes: BTreeSet<u16>,
}

/// A segment with RST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// Port that sent it.
    pub from: u16,
    /// Port that it went to.
    pub to: u16,
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RST from port {} to port {}", self.from, self.to)
    }
}

/// A running capture of all interfaces of a namespace.
#[derive(Debug)]
pub struct Capture {
    segments: Arc<AtomicUsize>,
    stop: UnixStream,
    thread: JoinHandle<Result<Seen>>,
}

impl Capture {
    /// Starts it.
    pub fn start(ns: &NetNs) -> Result<Self> {
        let socket = ns.run(|| packet_socket(libc::ETH_P_ALL))?;
        // A busy peer must not make the capture lose what it looks for.
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).context("SO_RCVBUFFORCE")?;
        let (stop, stopped) = UnixStream::pair()?;
        let segments = Arc::default();
        let count = Arc::clone(&segments);
        let thread = std::thread::spawn(move || watch(&socket, &stopped, &count));
        Ok(Self { segments, stop, thread })
    }

    /// How many TCP segments it has seen so far.
    pub fn segments(&self) -> usize {
        self.segments.load(Ordering::Relaxed)
    }

    /// Ends it.
    pub fn stop(mut self) -> Result<Seen> {
        self.stop.write_all(&[0])?;
        self.thread.join().expect("the capture does not panic")
    }
}

/// Packets of one protocol, or of all, from the network header on.
pub(crate) fn packet_socket(protocol: libc::c_int) -> Result<OwnedFd> {
    let protocol = i32::from(u16::try_from(protocol)?.to_be());
    // SAFETY: socket() takes three integers and touches no memory of ours.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
    let fd = Errno::result(fd).context("socket(AF_PACKET)")?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn watch(socket: &OwnedFd, mut stopped: &UnixStream, segments: &AtomicUsize) -> Result<Seen> {
    let mut seen = Seen::default();
    loop {
        let mut fds =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stopped.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE)?;
        let stop = fds[1].any() == Some(true);
        drain(socket, &mut seen)?;
        segments.store(seen.segments, Ordering::Relaxed);
        if stop {
            stopped.read_exact(&mut [0])?;
            // `struct tpacket_stats`: those seen, those lost, any of which may have been a reset.
            let [_, lost] = get::<[u32; 2]>(socket, libc::SOL_PACKET, libc::PACKET_STATISTICS)?;
            ensure!(lost == 0, "the capture has lost {lost} packets");
            return Ok(seen);
        }
    }
}

fn drain(socket: &OwnedFd, seen: &mut Seen) -> Result<()> {
    let mut packet = [0; 128]; // the headers are enough
    loop {
        match recv(std::os::fd::AsRawFd::as_raw_fd(socket), &mut packet, MsgFlags::MSG_DONTWAIT) {
            Ok(len) => seen.note(&packet[..len]),
            Err(Errno::EAGAIN) => return Ok(()),
            Err(Errno::ENETDOWN) => {} // an interface went away
            Err(error) => return Err(error).context("recv(AF_PACKET)"),
        }
    }
}

impl Seen {
    /// Takes a packet into account, from the network header on.
    pub(crate) fn note(&mut self, packet: &[u8]) {
        let Some(tcp) = tcp_header(packet) else { return };
        self.segments += 1;
        const SYN: u8 = 0x02;
        const RST: u8 = 0x04;
        const ECE: u8 = 0x40;
        let port = |at| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        if tcp[13] & RST != 0 {
            self.resets.push(Reset { from: port(0), to: port(2) });
        }
        // In a SYN segment the flag asks for ECN.
        if tcp[13] & (ECE | SYN) == ECE {
            self.echoes.insert(port(0));
        }
    }
}

/// The TCP header of an IPv4 packet, or of an IPv6 packet without extension headers.
pub(crate) fn tcp_header(packet: &[u8]) -> Option<&[u8; 20]> {
    let at = match packet.first()? >> 4 {
        4 if *packet.get(9)? == 6 => usize::from(packet[0] & 15) * 4,
        6 if *packet.get(6)? == 6 => 40,
        _ => return None,
    };
    packet.get(at..)?.first_chunk()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(ip: &[u8], flags: u8) -> Vec<u8> {
        let mut packet = ip.to_vec();
        packet.extend([0x12, 0x34, 0x00, 0x50, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        packet
    }

    #[test]
    fn a_reset_is_seen_in_both_families() {
        let mut v4 = [0; 24];
        (v4[0], v4[9]) = (0x46, 6); // with four bytes of IP options
        let mut v6 = [0; 40];
        (v6[0], v6[6]) = (0x60, 6);
        let mut seen = Seen::default();
        for ip in [&v4[..], &v6[..]] {
            seen.note(&segment(ip, 0x10));
            seen.note(&segment(ip, 0x14));
        }
        assert_eq!(seen.segments, 4);
        assert_eq!(seen.resets, [Reset { from: 0x1234, to: 80 }; 2]);
    }

    #[test]
    fn an_echo_is_seen() {
        let mut v4 = [0; 20];
        (v4[0], v4[9]) = (0x45, 6);
        let mut seen = Seen::default();
        seen.note(&segment(&v4, 0x52)); // a SYN-ACK
        assert!(seen.echoes.is_empty());
        seen.note(&segment(&v4, 0x50));
        assert_eq!(seen.echoes, [0x1234].into());
    }

    #[test]
    fn other_packets_are_left_alone() {
        let mut udp = [0; 48];
        (udp[0], udp[9]) = (0x45, 17);
        let mut seen = Seen::default();
        seen.note(&udp);
        seen.note(&[]);
        seen.note(&[0x45, 0]);
        assert_eq!(seen.segments, 0);
    }
}
