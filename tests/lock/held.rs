//! What a lock drops is held, and brought to its socket afterwards.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use soccr::connection::FourTuple;
use soccr::kernel::netns::NetNs;
use soccr::kernel::tcp;
use soccr::lock::NetworkLock;
use soccr::lock::held::Holder;

use super::net::{OtherNs, Pair, expect, is_silent, sh, tuple_of};
use super::{NFTABLES, here, in_own_network, name};

fn holder() -> Holder {
    Holder::new(Duration::from_secs(60))
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(30), "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn unacked(socket: &TcpStream) -> u32 {
    tcp::info(socket.as_fd()).unwrap().unacked
}

/// The timer has doubled its time twice by then: the next retransmission is 0.8 s away.
fn wait_for_backoff(client: &TcpStream) {
    until("the client has sent again", || tcp::info(client.as_fd()).unwrap().retransmits >= 2);
}

/// Locks the server's end, has the client send into the lock, and unlocks. The client's next retransmission is far away
/// then; what was held has come before.
#[test]
fn what_was_held_comes_at_once() {
    in_own_network(|| {
        let other = OtherNs::joined();
        for to in ["10.9.0.2", "fd09::2"] {
            check_held(&other.ns, other.connect(to));
        }
        check_held(&other.ns, mapped_in(&other));
    });
}

fn check_held(ns: &NetNs, mut pair: Pair) {
    pair.flows();
    let (tuple, mut holder) = (tuple_of(&pair.server), holder());
    let options = holder.options(ns, &NFTABLES);
    holder.expect([tuple]);
    let lock = NetworkLock::lock(ns, &name("held"), &[tuple], &options).unwrap();
    for part in ["first, ", "second, ", "third"] {
        pair.client.write_all(part.as_bytes()).unwrap();
    }
    wait_for_backoff(&pair.client);
    assert!(is_silent(&pair.server), "{tuple} is not locked");
    let held = holder.finish();
    assert_eq!(held.len(), 3, "each segment is held once: {held:?}");
    assert!(lock.unlock().unwrap());
    let start = Instant::now();
    assert_eq!(held.release([(pair.server.as_fd(), tuple)]), 3);
    expect(&mut pair.server, b"first, second, third");
    until("all is acknowledged", || unacked(&pair.client) == 0);
    assert!(start.elapsed() < Duration::from_millis(200), "{tuple}: {:?}", start.elapsed());
    pair.flows();
}

/// An IPv4 connection whose server's socket is one of IPv6.
fn mapped_in(other: &OtherNs) -> Pair {
    let listener = other.ns.run(|| TcpListener::bind("[::]:0")).unwrap().unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect(("10.9.0.2", port)).unwrap();
    Pair::of(client, listener.accept().unwrap().0)
}

/// A client on the same host is told that its packets were dropped, and does not count them as sent. It must not get
/// acknowledgements of them: it would ignore them, and all else that the server sends.
#[test]
fn what_is_dropped_on_its_way_out_is_not_held() {
    in_own_network(|| {
        for to in ["127.0.0.1:0", "[::1]:0"] {
            let mut pair = Pair::over(to);
            pair.flows();
            let (tuple, mut holder) = (tuple_of(&pair.server), holder());
            let options = holder.options(&here(), &NFTABLES);
            holder.expect([tuple]);
            let lock = NetworkLock::lock(&here(), &name("held"), &[tuple], &options).unwrap();
            pair.client.write_all(b"to the server").unwrap();
            assert!(is_silent(&pair.server));
            assert!(holder.finish().is_empty());
            assert!(lock.unlock().unwrap());
            expect(&mut pair.server, b"to the server");
            pair.flows();
        }
    });
}

/// More than an Ethernet frame, as a veth passes them on.
#[test]
fn large_segments_come_whole() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let mut pair = other.connect("10.9.0.2");
        pair.flows();
        let (tuple, mut holder) = (tuple_of(&pair.server), holder());
        holder.expect([tuple]);
        let options = holder.options(&other.ns, &NFTABLES);
        let lock = NetworkLock::lock(&other.ns, &name("held"), &[tuple], &options).unwrap();
        let bytes: Vec<u8> = (0..200_001_u32).map(|n| n.to_le_bytes()[0]).collect();
        pair.client.set_nonblocking(true).unwrap();
        let sent = pair.client.write(&bytes).unwrap();
        pair.client.set_nonblocking(false).unwrap();
        wait_for_backoff(&pair.client);
        let held = holder.finish();
        let largest = held.iter().map(|(_, segment)| segment.len()).max();
        assert!(largest > Some(5_000), "{largest:?}");
        assert!(lock.unlock().unwrap());
        held.release([(pair.server.as_fd(), tuple)]);
        until("something is acknowledged", || tcp::info(pair.client.as_fd()).unwrap().retransmits == 0);
        expect(&mut pair.server, &bytes[..sent]);
        pair.client.write_all(b"on").unwrap();
        expect(&mut pair.server, b"on");
    });
}

/// Without a holder the lock is what it was: the client's timer brings what was dropped.
#[test]
fn a_dead_holder_changes_nothing() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let mut pair = other.connect("10.9.0.2");
        pair.flows();
        let (tuple, mut holder) = (tuple_of(&pair.server), holder());
        let options = holder.options(&other.ns, &NFTABLES);
        let lock = NetworkLock::lock(&other.ns, &name("held"), &[tuple], &options).unwrap();
        assert!(other.ns.run(|| sh("nft list ruleset").contains("log group")).unwrap());
        drop(holder);
        pair.client.write_all(b"to the server").unwrap();
        wait_for_backoff(&pair.client);
        assert!(is_silent(&pair.server));
        assert!(lock.unlock().unwrap());
        assert!(is_silent(&pair.server), "what nobody held came at once");
        expect(&mut pair.server, b"to the server");
    });
}

/// What is not for the sockets that are expected, such as what they send themselves, is not held.
#[test]
fn only_what_is_for_the_socket_is_held() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let (mut pair, another) = (other.connect("10.9.0.2"), other.connect("10.9.0.2"));
        pair.flows();
        let (tuple, mut holder) = (tuple_of(&pair.server), holder());
        let options = holder.options(&other.ns, &NFTABLES);
        holder.expect([tuple_of(&another.server)]);
        let lock = NetworkLock::lock(&other.ns, &name("held"), &[tuple], &options).unwrap();
        pair.client.write_all(b"to the server").unwrap();
        pair.server.write_all(b"to the client").unwrap();
        assert!(holder.finish().is_empty());
        assert!(lock.unlock().unwrap());
        expect(&mut pair.server, b"to the server");
        expect(&mut pair.client, b"to the client");
    });
}

/// Two holders in one namespace take two groups, and one that is gone leaves its own to others.
#[test]
fn each_holder_has_its_own_group() {
    in_own_network(|| {
        let group = |holder: &mut Holder| holder.options(&here(), &NFTABLES).log.unwrap();
        let (mut one, mut two) = (holder(), holder());
        let (first, second) = (group(&mut one), group(&mut two));
        assert_ne!(first, second);
        assert_eq!(group(&mut one), first);
        drop(one);
        assert_eq!(group(&mut holder()), first);
    });
}

/// What is beyond the bound is dropped, and its sender sends it again.
#[test]
fn beyond_the_bound_nothing_is_lost() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let mut pair = other.connect("10.9.0.2");
        widen(&mut pair);
        let (tuple, mut holder) = (tuple_of(&pair.server), holder());
        holder.expect([tuple]);
        let options = holder.options(&other.ns, &NFTABLES);
        let lock = NetworkLock::lock(&other.ns, &name("held"), &[tuple], &options).unwrap();
        let bytes: Vec<u8> = (0..400_u16).map(|n| n.to_le_bytes()[0]).collect();
        bytes.iter().for_each(|byte| pair.client.write_all(&[*byte]).unwrap());
        wait_for_backoff(&pair.client);
        let held = holder.finish();
        assert_eq!(held.len(), 256);
        assert!(lock.unlock().unwrap());
        assert_eq!(held.release([(pair.server.as_fd(), tuple)]), 256);
        expect(&mut pair.server, &bytes);
        pair.flows();
    });
}

/// Sends until the congestion window is wide.
fn widen(pair: &mut Pair) {
    let bytes = vec![0; 8 << 20];
    thread::scope(|scope| {
        scope.spawn(|| pair.client.write_all(&bytes).unwrap());
        expect(&mut pair.server, &bytes);
    });
}

/// Of what was sent before somebody held, the first to be sent again closes the gap.
#[test]
fn what_is_held_may_have_gaps() {
    in_own_network(|| {
        let tuple = tuple_of(&Pair::over("127.0.0.1:0").server);
        let mut held = holder().finish();
        let segment = |seq: u32, len: usize| {
            let mut segment = vec![0; 20 + len];
            segment[4..8].copy_from_slice(&seq.to_be_bytes());
            segment[12] = 5 << 4;
            segment
        };
        let cases = [
            (30, 10, 1),
            (50, 10, 2),
            (10, 10, 3),
            (35, 5, 3),
            (30, 30, 4),
            (40, 20, 4),
            (10, 25, 5),
            (10, 50, 5),
        ];
        for (seq, len, count) in cases {
            held.add(tuple, &segment(seq, len));
            assert_eq!(held.len(), count, "{seq}, {len}");
        }
        held.add(tuple, &segment(u32::MAX - 4, 10));
        held.add(tuple, &segment(u32::MAX - 2, 8));
        assert_eq!(held.len(), 6, "sequence numbers wrap around");
    });
}

/// A peer that never stops sending gets no more of our memory than it may have.
#[test]
fn a_connection_has_a_bound() {
    in_own_network(|| {
        let pair = Pair::over("127.0.0.1:0");
        let tuple: FourTuple = tuple_of(&pair.server);
        let mut held = holder().finish();
        let mut segment = vec![0; 20];
        segment[12] = 5 << 4;
        for n in 0..1000_u32 {
            segment[4..8].copy_from_slice(&n.to_be_bytes());
            held.add(tuple, &segment);
            held.add(tuple, &segment);
        }
        assert_eq!(held.len(), 256);
        let large = vec![0x50; 60_000];
        let mut held = holder().finish();
        for n in 0..1000_u32 {
            let mut large = large.clone();
            large[4..8].copy_from_slice(&n.to_be_bytes());
            held.add(tuple, &large);
        }
        assert_eq!(held.len(), (1 << 20) / 60_000);
    });
}

/// A socket that has deleted a table is closed by a thread: the kernel frees its port, and takes a while to end what is that
/// port's.
#[test]
fn what_is_closed_meanwhile_takes_no_group_along() {
    in_own_network(|| {
        let before = threads();
        for _ in 0..10 {
            let lock = NetworkLock::lock(&here(), &name("gone"), &[], &NFTABLES).unwrap();
            assert!(lock.unlock().unwrap());
            let mut holders = Vec::new();
            while threads() > before && holders.len() < 50 {
                let mut holder = holder();
                assert!(holder.options(&here(), &NFTABLES).log.is_some());
                holders.push(holder);
            }
            until("all is closed", || threads() == before);
            assert_eq!(groups(), holders.len(), "groups that are left");
        }
    });
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

/// How many groups of the netfilter log somebody has.
fn groups() -> usize {
    fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_log").unwrap().lines().count()
}
