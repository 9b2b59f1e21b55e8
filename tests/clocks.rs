//! What of a connection goes by the clock: timestamps and PAWS (RFC 7323), the user timeout.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use soccr::kernel::tcp::{self, Queue, Repair};
use soccr::kernel::{raw, sockopt};
use support::{connected, expect_bytes, in_own_network};

/// From one socket to another, as to another host.
fn moved(stream: TcpStream) -> TcpStream {
    let (frozen, refused) = soccr::freeze([stream]);
    assert!(refused.is_empty(), "{refused:?}");
    let connections: Vec<_> = frozen.connections().cloned().collect();
    drop(frozen.release());
    let mut sockets = soccr::thaw(&connections).unwrap_or_else(|error| panic!("{}", soccr::chain(&error)));
    TcpStream::from(sockets.remove(0))
}

/// Every connection's clock has an offset of its own, that of the host's uptime included: it is carried, and goes on.
#[test]
fn the_timestamp_clock_goes_on() {
    in_own_network(|| {
        let (mut ours, mut theirs) = connected("127.0.0.1:0");
        // As on a host with an uptime of another month.
        let shifted = tcp::timestamp(ours.as_fd()).expect("TCP_TIMESTAMP").wrapping_add(0x7000_0000) & !1;
        tcp::set_repair(ours.as_fd(), Repair::On).expect("TCP_REPAIR");
        tcp::set_timestamp(ours.as_fd(), shifted).expect("TCP_TIMESTAMP");
        tcp::set_repair(ours.as_fd(), Repair::OffNoProbe).expect("TCP_REPAIR");
        ours.write_all(b"before").expect("write");
        expect_bytes(&mut theirs, b"before");
        let (before, since) = (tcp::timestamp(ours.as_fd()).expect("TCP_TIMESTAMP"), Instant::now());
        let mut ours = moved(ours);
        let passed = tcp::timestamp(ours.as_fd()).expect("TCP_TIMESTAMP").wrapping_sub(before);
        // The time between a save and its restore does not count, and need not: only back it must not go.
        let most = u32::try_from(since.elapsed().as_millis()).expect("a short test") + 1;
        assert!(passed <= most, "{passed} ms in {most}");
        ours.write_all(b"after").expect("write");
        expect_bytes(&mut theirs, b"after"); // the peer's PAWS takes it
    });
}

/// The first segment after a restore tells the peer's clock anew; from then on an old duplicate is refused.
#[test]
fn old_duplicates_are_refused_after_a_restore() {
    in_own_network(|| {
        let (ours, mut theirs) = connected("127.0.0.1:0");
        let mut ours = moved(ours);
        theirs.write_all(b"first").expect("write");
        expect_bytes(&mut ours, b"first");
        let clock = tcp::timestamp(theirs.as_fd()).expect("TCP_TIMESTAMP");
        let unread = || tcp::receive_queue_len(ours.as_fd()).expect("SIOCINQ");
        forge(&ours, &theirs, clock.wrapping_sub(100_000), b"old");
        assert_eq!(unread(), 0, "PAWS took an old duplicate");
        forge(&ours, &theirs, clock, b"new");
        assert_eq!(unread(), 3, "the same with a new timestamp is refused");
    });
}

/// A segment with these bytes from `from`'s address to `to`, by loopback: it is there when this returns.
fn forge(to: &TcpStream, from: &TcpStream, tsval: u32, bytes: &[u8]) {
    let (rcv_nxt, write_seq) = sequences(to);
    let [SocketAddr::V4(source), SocketAddr::V4(destination)] =
        [from.local_addr(), to.local_addr()].map(|address| address.expect("an address"))
    else {
        panic!("IPv4 only");
    };
    let tsecr = tcp::timestamp(to.as_fd()).expect("TCP_TIMESTAMP");
    const ACK_PSH: u8 = 0x18;
    let mut segment = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    segment.extend([rcv_nxt.to_be_bytes(), write_seq.to_be_bytes()].concat());
    segment.extend([8 << 4, ACK_PSH, 0x10, 0, 0, 0, 0, 0, 1, 1, 8, 10]); // two of padding, then the timestamps
    segment.extend([tsval.to_be_bytes(), tsecr.to_be_bytes()].concat());
    segment.extend(bytes);
    let sum = checksum(&source, &destination, &segment).to_be_bytes();
    segment[16..18].copy_from_slice(&sum);
    let header = [0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0];
    let packet = [&header[..], &source.ip().octets(), &destination.ip().octets(), &segment].concat();
    let socket = raw::open(false).expect("a raw socket");
    raw::send(socket.as_fd(), &packet, destination.into()).expect("sent");
}

fn checksum(source: &SocketAddrV4, destination: &SocketAddrV4, segment: &[u8]) -> u16 {
    let length = u16::try_from(segment.len()).expect("short").to_be_bytes();
    let pseudo = [&source.ip().octets()[..], &destination.ip().octets(), &[0, 6], &length, segment].concat();
    let words = pseudo.chunks(2).map(|word| u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    let mut sum: u32 = words.map(u32::from).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

fn sequences(stream: &TcpStream) -> (u32, u32) {
    let fd = stream.as_fd();
    tcp::set_repair(fd, Repair::On).expect("TCP_REPAIR");
    let [rcv_nxt, write_seq] = [Queue::Receive, Queue::Send].map(|queue| {
        tcp::select_queue(fd, queue).expect("TCP_REPAIR_QUEUE");
        tcp::queue_seq(fd).expect("TCP_QUEUE_SEQ")
    });
    tcp::set_repair(fd, Repair::OffNoProbe).expect("TCP_REPAIR");
    (rcv_nxt, write_seq)
}

/// Bytes that the peer does not acknowledge end a connection after its TCP_USER_TIMEOUT, and not after the quarter of an hour
/// that the kernel tries else. The time begins anew with the first retransmission after the restore: until then the round
/// trip time is unknown, so that this comes one probe of a second and a timeout of three later (RFC 6298, 5.7).
#[test]
fn a_user_timeout_ends_after_a_restore() {
    const TIMEOUT: Duration = Duration::from_millis(1500);
    const FIRST_RETRANSMISSION: Duration = Duration::from_secs(4);
    in_own_network(|| {
        let (mut ours, theirs) = connected("127.0.0.1:0");
        let milliseconds = 1500_i32.to_ne_bytes();
        sockopt::set_bytes(ours.as_fd(), libc::SOL_TCP, libc::TCP_USER_TIMEOUT, &milliseconds)
            .expect("TCP_USER_TIMEOUT");
        let port = theirs.local_addr().expect("address").port();
        let rule = format!(
            "add table inet deaf; add chain inet deaf in {{ type filter hook input priority 0; }}; \
             add rule inet deaf in tcp dport {port} drop"
        );
        assert!(Command::new("nft").arg(rule).status().expect("nft runs").success());
        ours.write_all(b"unheard").expect("write");
        ours.set_read_timeout(Some(TIMEOUT / 2)).expect("timeout");
        assert_eq!(ours.read(&mut [0]).expect_err("half of it").kind(), ErrorKind::WouldBlock);
        let mut ours = moved(ours);
        ours.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        let restored = Instant::now();
        let error = ours.read(&mut [0]).expect_err("the peer hears nothing");
        let took = restored.elapsed();
        assert_eq!(error.raw_os_error(), Some(Errno::ETIMEDOUT as i32), "{error} after {took:?}");
        assert!(took >= TIMEOUT / 2 && took < FIRST_RETRANSMISSION + TIMEOUT * 2, "it took {took:?}");
    });
}
