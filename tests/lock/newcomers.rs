//! Who connects while nobody listens waits, and is let in afterwards.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use soccr::connection::FourTuple;
use soccr::kernel::diag;
use soccr::lock::held::{HeldPackets, Holder};
use soccr::lock::{Listener, NetworkLock};

use super::net::{OtherNs, sh, transfer};
use super::{NFTABLES, here, in_own_network, name};

const LONG: Duration = Duration::from_secs(30);

fn listen(other: &OtherNs, address: &str) -> TcpListener {
    other.ns.run(|| TcpListener::bind(address)).unwrap().unwrap()
}

/// As the socket monitor tells.
fn listeners(other: &OtherNs) -> Vec<Listener> {
    let listeners = other.ns.run(diag::listeners).unwrap().unwrap();
    listeners.into_iter().map(|diag::Listener { local, v6only, .. }| Listener { local, v6only }).collect()
}

/// Stops who would connect to all that listens there.
fn stop(other: &OtherNs, time: Duration) -> (NetworkLock, Holder) {
    let mut holder = Holder::new(LONG);
    let options = holder.options(&other.ns, &NFTABLES);
    let lock = NetworkLock::lock(&other.ns, &name("new"), &[], &options).unwrap();
    let listeners = listeners(other);
    lock.stop_newcomers(&listeners, time, true).unwrap();
    holder.expect_newcomers(&listeners);
    (lock, holder)
}

/// The listener is gone when the client asks, and back when it is let in: well before it would ask again, after a second.
#[test]
fn who_connects_meanwhile_is_let_in() {
    in_own_network(|| {
        let other = OtherNs::joined();
        for (listens, to) in [
            ("10.9.0.2:7000", "10.9.0.2:7000"),
            ("0.0.0.0:7000", "10.9.0.2:7000"),
            ("[fd09::2]:7000", "[fd09::2]:7000"),
            ("[::]:7000", "[fd09::2]:7000"),
            ("[::]:7000", "10.9.0.2:7000"),
        ] {
            let gone = listen(&other, listens);
            let (lock, mut holder) = stop(&other, LONG);
            drop(gone);
            let to: SocketAddr = to.parse().unwrap();
            let start = Instant::now();
            let client = thread::spawn(move || TcpStream::connect(to));
            while holder.held().newcomers().next().is_none() {
                assert!(!client.is_finished(), "{listens}: {:?}", client.join());
                assert!(start.elapsed() < LONG, "{listens}: no SYN was held");
                thread::sleep(Duration::from_millis(1));
            }
            let back = listen(&other, listens);
            let mut held = holder.finish();
            assert!(lock.unlock().unwrap());
            assert_eq!(held.let_in(&other.ns), 1);
            let mut client = client.join().unwrap().unwrap();
            assert!(start.elapsed() < Duration::from_millis(900), "{listens}: {:?}", start.elapsed());
            transfer(&mut client, &mut back.accept().unwrap().0, b"hello");
        }
    });
}

/// Somebody else's port, and connections that there are, are as before.
#[test]
fn nobody_else_is_stopped() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let mut pair = other.connect("10.9.0.2");
        let stopped = listen(&other, "10.9.0.2:7000");
        let (lock, holder) = stop(&other, LONG);
        let free = listen(&other, "10.9.0.2:7001");
        let mut client = TcpStream::connect(free.local_addr().unwrap()).unwrap();
        transfer(&mut client, &mut free.accept().unwrap().0, b"hello");
        pair.flows();
        let to = stopped.local_addr().unwrap();
        let refused = TcpStream::connect_timeout(&to, Duration::from_millis(300)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
        assert_eq!(holder.finish().newcomers().count(), 1);
        assert!(lock.unlock().unwrap());
    });
}

/// The end comes by itself: the next SYN is answered, by RST where nobody listens.
#[test]
fn nobody_waits_for_ever() {
    in_own_network(|| {
        let other = OtherNs::joined();
        let gone = listen(&other, "[::]:7000");
        let (lock, _holder) = stop(&other, Duration::from_millis(500));
        drop(gone);
        let start = Instant::now();
        let refused = TcpStream::connect("10.9.0.2:7000").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        assert!(start.elapsed() > Duration::from_millis(500), "{:?}", start.elapsed());
        assert!(lock.unlock().unwrap());
    });
}

#[test]
fn nft_reads_it() {
    in_own_network(|| {
        let options = NFTABLES;
        let lock = NetworkLock::lock(&here(), &name("new"), &[], &options).unwrap();
        let listener = |local: &str, v6only| Listener { local: local.parse().unwrap(), v6only };
        let all = [
            listener("10.9.0.2:80", false),
            listener("[fd09::2]:81", false),
            listener("0.0.0.0:82", false),
            listener("[::]:83", true),
            listener("[::]:84", false),
        ];
        lock.stop_newcomers(&all, LONG, false).unwrap();
        let listed = sh("nft list table inet CRIU-new");
        for part in [
            "elements = { 10.9.0.2 . 80",
            "elements = { fd09::2 . 81",
            "ip daddr . tcp dport @listeners4 drop",
            "ip6 daddr . tcp dport @listeners6 drop",
            "tcp dport @ports4 drop",
            "tcp dport @ports6 drop",
        ] {
            assert!(listed.contains(part), "no {part:?} in {listed}");
        }
        for (set, ports) in [("ports4", ["82", "84"]), ("ports6", ["83", "84"])] {
            let set = sh(&format!("nft list set inet CRIU-new {set}"));
            assert!(ports.iter().all(|port| set.contains(port)), "{set}");
        }
        assert!(lock.unlock().unwrap());
    });
}

/// A TCP header with these flags.
fn header(flags: u8) -> Vec<u8> {
    let mut header = vec![0; 20];
    header[12] = 5 << 4;
    header[13] = flags;
    header
}

fn from(port: u16, to: &str) -> FourTuple {
    FourTuple { local: to.parse().unwrap(), remote: SocketAddr::from(([10, 9, 0, 3], port)) }
}

#[test]
fn a_flood_takes_nothing_from_connections() {
    let (syn, mut held) = (header(0x02), HeldPackets::default());
    assert!((0..10_000).all(|port| held.add_newcomer(from(port, "10.9.0.2:7000"), &syn)));
    let newcomers = held.newcomers().count();
    assert!((1000..10_000).contains(&newcomers), "{newcomers}");
    let data = [header(0x10), vec![1; 100]].concat();
    (0..10_000).for_each(|port| held.add(from(port, "10.9.0.2:7001"), &data));
    assert_eq!(held.len(), newcomers + 10_000);
}

/// Who would connect to another listener, by the word of an image, is forgotten.
#[test]
fn nobody_is_let_in_but_to_the_listeners_of_the_tree() {
    let mut held = HeldPackets::default();
    for to in ["10.9.0.2:7000", "10.9.0.2:22", "10.9.0.9:7000"] {
        assert!(held.add_newcomer(from(4000, to), &header(0x02)));
    }
    held.keep_newcomers_of(&[Listener { local: "10.9.0.2:7000".parse().unwrap(), v6only: false }]);
    let left: Vec<_> = held.newcomers().map(|(tuple, _)| tuple.local.to_string()).collect();
    assert_eq!((left, held.len()), (vec!["10.9.0.2:7000".to_owned()], 1));
}
