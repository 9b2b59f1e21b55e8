//! What of a connection goes by the clock: timestamps and PAWS (RFC 7323), the user timeout.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};

use soccr::Connection;
use soccr::kernel::tcp::{self, Queue, Repair};
use soccr::kernel::{raw, sockopt};
use support::{FAMILIES, connected, expect_bytes, in_own_network, variants};

/// From one socket to another, as to another host.
fn moved(stream: TcpStream) -> TcpStream {
    let (frozen, refused) = soccr::freeze([stream]);
    assert!(refused.is_empty(), "{refused:?}");
    let bytes = frozen.connections().map(Connection::to_bytes);
    let connections: Vec<_> =
        bytes.map(|bytes| Connection::from_bytes(&bytes).expect("a connection")).collect();
    drop(frozen.release());
    thawed(&connections)
}

fn thawed(connections: &[Connection]) -> TcpStream {
    let mut sockets = soccr::thaw(connections).unwrap_or_else(|error| panic!("{}", soccr::chain(&error)));
    TcpStream::from(sockets.remove(0))
}

fn clock(of: &TcpStream) -> u32 {
    tcp::timestamp(of.as_fd()).expect("TCP_TIMESTAMP")
}

fn set_clock(of: &TcpStream, to: u32) {
    tcp::set_repair(of.as_fd(), Repair::On).expect("TCP_REPAIR");
    tcp::set_timestamp(of.as_fd(), to).expect("TCP_TIMESTAMP");
    tcp::set_repair(of.as_fd(), Repair::OffNoProbe).expect("TCP_REPAIR");
}

/// Every connection's clock has an offset of its own, that of the host's uptime included: it is carried, and goes on.
#[test]
fn the_timestamp_clock_goes_on() {
    in_own_network(|| {
        // As on the same host, and on one with an uptime of another fortnight or month.
        for (address, ahead) in
            variants().flat_map(|address| [0, 1 << 30, 0x7000_0000].map(|ahead| (address, ahead)))
        {
            let (mut ours, mut theirs) = connected(address);
            set_clock(&ours, clock(&ours).wrapping_add(ahead) & !1);
            ours.write_all(b"before").expect("write");
            expect_bytes(&mut theirs, b"before");
            let (before, since) = (clock(&ours), Instant::now());
            let mut ours = moved(ours);
            let passed = clock(&ours).wrapping_sub(before);
            // The time between a save and its restore does not count, and need not: only back it must not go.
            let most = u32::try_from(since.elapsed().as_millis()).expect("a short test") + 1;
            assert!(passed <= most, "{address}: {passed} ms in {most}");
            ours.write_all(b"after").expect("write");
            expect_bytes(&mut theirs, b"after"); // the peer's PAWS takes it
        }
    });
}

/// A clock that ticks in microseconds goes on so, whatever the route says (Linux 6.7).
#[test]
fn a_clock_keeps_its_unit() {
    in_own_network(|| {
        for (address, unit) in FAMILIES.into_iter().flat_map(|address| [(address, 0), (address, 1)]) {
            let (ours, mut theirs) = connected(address);
            if !tcp::timestamp_tells_unit(ours.as_fd()).expect("TCP_INFO") {
                return support::lacks("timestamps in microseconds");
            }
            // Not before what the peer has heard already.
            set_clock(&ours, clock(&ours).wrapping_add(2) & !1 | unit);
            let mut ours = moved(ours);
            // A bit that is always so, while the other 31 go on.
            for _ in 0..100 {
                assert_eq!(clock(&ours) & 1, unit, "{address}");
            }
            ours.write_all(b"on").expect("write");
            expect_bytes(&mut theirs, b"on");
        }
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

/// Who does not hear any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deaf {
    /// The peer, before the freeze and ever after.
    AllAlong,
    /// The same, but for a while after the thaw; then bytes wait to be acknowledged.
    Again,
    /// The same, when there are no bytes: keepalive asks.
    AgainIdle,
}

/// The time that a program gives its peer (TCP_USER_TIMEOUT) does not run during a freeze, however long that takes. After it a
/// peer that is gone is noticed as before, and not after the quarter of an hour that the kernel tries else. For bytes that were
/// sent before, the time begins anew with the first retransmission: until then the round trip time is unknown, so that this
/// comes one probe of a second and a timeout of three later (RFC 6298, 5.7).
#[test]
fn a_user_timeout_begins_anew() {
    const LIMIT: Duration = Duration::from_millis(400);
    const FIRST_RETRANSMISSION: Duration = Duration::from_secs(4);
    let nft =
        |text: &str| assert!(Command::new("nft").arg(text).status().expect("nft").success(), "nft {text}");
    in_own_network(|| {
        let deaf = [Deaf::AllAlong, Deaf::Again, Deaf::AgainIdle];
        for (address, deaf) in FAMILIES[..2].iter().flat_map(|address| deaf.map(|deaf| (address, deaf))) {
            let (mut ours, mut theirs) = connected(address);
            let set = |level, name, value: i32| {
                sockopt::set_bytes(ours.as_fd(), level, name, &value.to_ne_bytes()).expect("an option");
            };
            set(libc::SOL_TCP, libc::TCP_USER_TIMEOUT, i32::try_from(LIMIT.as_millis()).expect("short"));
            if deaf == Deaf::AgainIdle {
                set(libc::SOL_TCP, libc::TCP_KEEPIDLE, 1);
                set(libc::SOL_TCP, libc::TCP_KEEPINTVL, 1);
                set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
            }
            let port = theirs.local_addr().expect("its address").port();
            let drop_all = format!(
                "add table inet path; add chain inet path in {{ type filter hook input priority 0; }}; \
                 add rule inet path in tcp dport {port} drop"
            );
            nft(&drop_all);
            ours.write_all(b"not acknowledged").expect("write");
            let (frozen, _) = soccr::freeze([ours]);
            let connections: Vec<_> = frozen.connections().cloned().collect();
            drop(frozen.release());
            std::thread::sleep(2 * LIMIT); // the time is what this is about
            let mut ours = thawed(&connections);
            if deaf != Deaf::AllAlong {
                nft("delete table inet path");
                expect_bytes(&mut theirs, b"not acknowledged");
                nft(&drop_all);
            }
            if deaf == Deaf::Again {
                ours.write_all(b"nobody hears it").expect("write");
            }
            ours.set_read_timeout(Some(Duration::from_secs(20))).expect("SO_RCVTIMEO");
            let since = Instant::now();
            let ended = ours.read(&mut [0]).expect_err("nobody sends");
            let took = since.elapsed();
            assert_eq!(ended.kind(), ErrorKind::TimedOut, "{address}, {deaf:?}: {ended} after {took:?}");
            assert!(took < FIRST_RETRANSMISSION + 3 * LIMIT, "{address}, {deaf:?}: it took {took:?}");
            nft("delete table inet path");
        }
    });
}
