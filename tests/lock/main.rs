//! The network lock, in namespaces of its own; needs nft, iptables and ip to look at the results.

mod forward;
mod held;
mod net;
mod newcomers;
mod passage;
mod path;
mod stock;
#[path = "../support/mod.rs"]
#[allow(dead_code)] // this test program uses its part
mod support;

use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use net::{OtherNs, Pair, expect, is_silent, sh, transfer, tuple_of};
use soccr::connection::FourTuple;
use soccr::kernel::netns::NetNs;
use soccr::lock::{self, LockError, LockName, LockOptions, MARK, Method, NetworkLock, NftError};
use support::in_own_network;

const NFTABLES: LockOptions = LockOptions { method: Method::Nftables, lease: None, log: None };
const IPTABLES: LockOptions = LockOptions { method: Method::Iptables, lease: None, log: None };

fn here() -> NetNs {
    NetNs::current().unwrap()
}

fn name(id: &str) -> LockName {
    LockName::criu(id).unwrap()
}

/// What a list shows for a connection: an element of a set, or a rule for each direction.
fn entries(options: &LockOptions) -> usize {
    if options.method == Method::Nftables { 1 } else { 2 }
}

fn listed(ns: &NetNs) -> Vec<(String, usize)> {
    let mut all: Vec<_> =
        lock::list(ns).unwrap().into_iter().map(|l| (l.name.to_string(), l.entries)).collect();
    all.sort();
    all
}

/// An IPv4 connection on a socket of family IPv6.
fn mapped() -> Pair {
    let listener = TcpListener::bind("[::]:0").unwrap();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), listener.local_addr().unwrap().port()));
    let client = TcpStream::connect(to).unwrap();
    Pair::of(client, listener.accept().unwrap().0)
}

/// Locks one of two connections and checks that it, and only it, stands still, keeps what is
/// written meanwhile, and goes on after the lock.
fn check_lock(ns: &NetNs, mut locked: Pair, mut free: Pair, tuple: FourTuple, options: &LockOptions) {
    locked.flows();
    let lock = NetworkLock::lock(ns, &name("one"), &[tuple], options).unwrap();
    locked.client.write_all(b"to the server").unwrap();
    locked.server.write_all(b"to the client").unwrap();
    free.flows(); // later packets have arrived: so would the earlier ones
    assert!(is_silent(&locked.server) && is_silent(&locked.client), "{tuple} is not locked");
    assert!(lock.unlock().unwrap());
    expect(&mut locked.server, b"to the server");
    expect(&mut locked.client, b"to the client");
    locked.flows();
    assert_eq!(listed(ns), []);
}

fn check_on_loopback(options: &LockOptions) {
    for pair in [|| Pair::over("127.0.0.1:0"), || Pair::over("[::1]:0"), mapped] {
        let locked = pair();
        let tuple = locked.tuple();
        check_lock(&here(), locked, pair(), tuple, options);
        let locked = pair();
        let tuple = tuple_of(&locked.server);
        check_lock(&here(), locked, pair(), tuple, options);
    }
}

/// Only the server's namespace is locked, and only the client's: both chains do their part.
fn check_between_namespaces(options: &LockOptions) {
    let other = OtherNs::joined();
    for to in ["10.9.0.2", "fd09::2"] {
        let (locked, free) = (other.connect(to), other.connect(to));
        assert_eq!(NetNs::of_socket(locked.server.as_fd()).unwrap(), other.ns);
        let tuple = tuple_of(&locked.server);
        check_lock(&other.ns, locked, free, tuple, options);
        let (locked, free) = (other.connect(to), other.connect(to));
        let tuple = locked.tuple();
        check_lock(&here(), locked, free, tuple, options);
    }
}

#[test]
fn nftables_on_loopback() {
    in_own_network(|| check_on_loopback(&NFTABLES));
}

#[test]
fn nftables_between_namespaces() {
    in_own_network(|| check_between_namespaces(&NFTABLES));
}

#[test]
fn iptables_on_loopback() {
    in_own_network(|| check_on_loopback(&IPTABLES));
}

#[test]
fn iptables_between_namespaces() {
    in_own_network(|| check_between_namespaces(&IPTABLES));
}

#[test]
fn skip_does_nothing() {
    in_own_network(|| {
        let mut pair = Pair::over("127.0.0.1:0");
        let options = LockOptions { method: Method::Skip, lease: None, log: None };
        let lock = NetworkLock::lock(&here(), &name("skip"), &[pair.tuple()], &options).unwrap();
        pair.flows();
        assert!(lock.unlock().unwrap());
        assert_eq!(sh("nft list ruleset"), "");
    });
}

#[test]
fn marked_packets_pass() {
    in_own_network(|| {
        for options in [NFTABLES, IPTABLES] {
            let mut pair = Pair::over("127.0.0.1:0");
            let lock = NetworkLock::lock(&here(), &name("mark"), &[pair.tuple()], &options).unwrap();
            soccr::kernel::sockopt::set_mark(pair.client.as_fd(), MARK).unwrap();
            transfer(&mut pair.client, &mut pair.server, b"marked");
            assert!(lock.unlock().unwrap());
        }
    });
}

#[test]
fn adding_locks_more() {
    in_own_network(|| {
        for options in [NFTABLES, IPTABLES] {
            let (mut four, mut six) = (Pair::over("127.0.0.1:0"), Pair::over("[::1]:0"));
            let mut free = Pair::over("127.0.0.1:0");
            let mut lock = NetworkLock::lock(&here(), &name("add"), &[four.tuple()], &options).unwrap();
            lock.add(&[six.tuple(), four.tuple()]).unwrap();
            assert!(matches!(listed(&here())[..], [(_, n)] if n >= 2 * entries(&options)));
            for pair in [&mut four, &mut six] {
                pair.client.write_all(b"x").unwrap();
                free.flows();
                assert!(is_silent(&pair.server));
            }
            assert!(lock.unlock().unwrap());
            expect(&mut four.server, b"x");
            expect(&mut six.server, b"x");
        }
    });
}

#[test]
fn a_lock_of_the_same_name_is_replaced() {
    in_own_network(|| {
        for options in [NFTABLES, IPTABLES] {
            let (mut stays, mut goes) = (Pair::over("127.0.0.1:0"), Pair::over("[::1]:0"));
            let both = [stays.tuple(), goes.tuple()];
            NetworkLock::lock(&here(), &name("again"), &both, &options).unwrap().keep();
            let lock = NetworkLock::lock(&here(), &name("again"), &both[..1], &options).unwrap();
            assert_eq!(listed(&here()), [("CRIU-again".into(), entries(&options))]);
            stays.client.write_all(b"x").unwrap();
            goes.flows();
            assert!(is_silent(&stays.server));
            assert!(lock.unlock().unwrap());
        }
    });
}

#[test]
fn nothing_slips_through_a_replacement() {
    in_own_network(|| {
        let mut pairs: Vec<_> = (0..300).map(|_| Pair::over("127.0.0.1:0")).collect();
        let tuples: Vec<_> = pairs.iter().map(Pair::tuple).collect();
        let lock = NetworkLock::lock(&here(), &name("busy"), &tuples, &NFTABLES).unwrap();
        let (done, replaced) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    NetworkLock::lock(&here(), &name("busy"), &tuples, &NFTABLES).unwrap().keep();
                    replaced.fetch_add(1, Ordering::Relaxed);
                }
            });
            for (at, pair) in pairs.iter_mut().enumerate() {
                while replaced.load(Ordering::Relaxed) < at / 10 {
                    std::thread::yield_now();
                }
                pair.client.write_all(b"x").unwrap();
            }
            Pair::over("[::1]:0").flows();
            done.store(true, Ordering::Relaxed);
        });
        assert!(pairs.iter().all(|pair| is_silent(&pair.server)), "a byte slipped through");
        assert!(lock.unlock().unwrap());
    });
}

#[test]
fn a_failing_transaction_changes_nothing() {
    in_own_network(|| {
        let pair = Pair::over("127.0.0.1:0");
        // The last step, deleting the missing table, fails after all others went well.
        let error =
            lock::rename(&here(), &name("none"), &name("new"), &[pair.tuple()], &NFTABLES).unwrap_err();
        let LockError::Nftables { action, source: NftError::Refused { step, errno, .. }, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(action, "rename the network lock CRIU-none");
        assert_eq!((*step, *errno), ("delete the lock's table", nix::errno::Errno::ENOENT));
        assert_eq!(sh("nft list ruleset"), "");
        let mut gone = NetworkLock::adopt(&here(), &name("none"), &NFTABLES);
        assert!(gone.add(&[pair.tuple()]).is_err());
        assert!(!gone.unlock().unwrap());
    });
}

#[test]
fn renaming_keeps_the_lock() {
    in_own_network(|| {
        for options in [NFTABLES, IPTABLES] {
            let (mut pair, mut free) = (Pair::over("127.0.0.1:0"), Pair::over("127.0.0.1:0"));
            let tuples = [pair.tuple()];
            NetworkLock::lock(&here(), &LockName::soccr("a").unwrap(), &tuples, &options).unwrap().keep();
            let from = LockName::soccr("a").unwrap();
            let lock = lock::rename(&here(), &from, &name("b"), &tuples, &options).unwrap();
            assert_eq!(listed(&here()), [("CRIU-b".into(), entries(&options))]);
            pair.client.write_all(b"x").unwrap();
            free.flows();
            assert!(is_silent(&pair.server));
            assert!(lock.unlock().unwrap());
            expect(&mut pair.server, b"x");
        }
    });
}

#[test]
fn dropping_unlocks_and_keeping_does_not() {
    in_own_network(|| {
        for options in [NFTABLES, IPTABLES] {
            let pair = Pair::over("127.0.0.1:0");
            drop(NetworkLock::lock(&here(), &name("d"), &[pair.tuple()], &options).unwrap());
            assert_eq!(listed(&here()), []);
            NetworkLock::lock(&here(), &name("k"), &[pair.tuple()], &options).unwrap().keep();
            assert_eq!(listed(&here()), [("CRIU-k".into(), entries(&options))]);
            assert!(lock::remove(&here(), options.method, &name("k")).unwrap());
            assert!(!lock::remove(&here(), options.method, &name("k")).unwrap());
        }
    });
}

#[test]
fn only_locks_are_listed() {
    in_own_network(|| {
        sh("nft 'add table inet other; add table ip CRIU-v4only; add table inet CRIU-stock;
            add set inet CRIU-stock conns4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; };
            add element inet CRIU-stock conns4 { 1.2.3.4 . 5 . 6.7.8.9 . 10 }'");
        assert_eq!(listed(&here()), [("CRIU-stock".into(), 1)]);
        assert!(lock::remove(&here(), Method::Nftables, &name("stock")).unwrap());
        assert_eq!(listed(&here()), []);
    });
}

#[test]
fn ends_of_different_families_are_refused() {
    in_own_network(|| {
        let tuple = FourTuple { local: "1.2.3.4:5".parse().unwrap(), remote: "[::1]:6".parse().unwrap() };
        for options in [NFTABLES, IPTABLES] {
            let error = NetworkLock::lock(&here(), &name("m"), &[tuple], &options).unwrap_err();
            assert!(matches!(error, LockError::MixedFamilies(t) if t == tuple));
        }
    });
}

#[test]
fn a_lease_ends_by_itself() {
    in_own_network(|| {
        let (mut pair, mut free) = (Pair::over("127.0.0.1:0"), Pair::over("127.0.0.1:0"));
        let options = LockOptions { lease: Some(Duration::from_secs(2)), ..NFTABLES };
        NetworkLock::lock(&here(), &name("lease"), &[pair.tuple()], &options).unwrap().keep();
        let start = Instant::now();
        pair.client.write_all(b"x").unwrap();
        free.flows();
        assert!(is_silent(&pair.server));
        expect(&mut pair.server, b"x");
        assert!(start.elapsed() >= Duration::from_secs(2));
        let error = NetworkLock::lock(
            &here(),
            &name("lease"),
            &[pair.tuple()],
            &LockOptions { method: Method::Iptables, ..options },
        );
        assert!(matches!(error, Err(LockError::LeaseNeedsNftables)));
    });
}

/// CRIU dumps a namespace's rules as `nft list ruleset` prints them and restores that text.
#[test]
fn nft_prints_it_and_reads_it_back() {
    in_own_network(|| {
        let (mut four, mut six) = (Pair::over("127.0.0.1:0"), Pair::over("[::1]:0"));
        let mut free = Pair::over("127.0.0.1:0");
        let tuples = [four.tuple(), six.tuple()];
        let lock = NetworkLock::lock(&here(), &name("text"), &tuples, &NFTABLES).unwrap();
        let text = sh("nft list ruleset");
        for rule in [
            "type ipv4_addr . inet_service . ipv4_addr . inet_service",
            "type ipv6_addr . inet_service . ipv6_addr . inet_service",
            "meta mark 0x0000c114 accept",
            "ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop",
            "ip daddr . tcp dport . ip saddr . tcp sport @conns4 drop",
            "ip6 saddr . tcp sport . ip6 daddr . tcp dport @conns6 drop",
            "ip6 daddr . tcp dport . ip6 saddr . tcp sport @conns6 drop",
            &format!("127.0.0.1 . {} . 127.0.0.1 . {}", tuples[0].local.port(), tuples[0].remote.port()),
            &format!("::1 . {} . ::1 . {}", tuples[1].local.port(), tuples[1].remote.port()),
        ] {
            assert!(text.contains(rule), "no \"{rule}\" in:\n{text}");
        }
        sh(&format!("nft delete table inet CRIU-text && nft -f - <<'EOF'\n{text}\nEOF"));
        assert_eq!(sh("nft list ruleset"), text);
        for pair in [&mut four, &mut six] {
            pair.client.write_all(b"x").unwrap();
            free.flows();
            assert!(is_silent(&pair.server));
        }
        assert!(lock.unlock().unwrap());
        expect(&mut four.server, b"x");
        expect(&mut six.server, b"x");
    });
}

fn many(n: u32) -> Vec<FourTuple> {
    let tuple = |i: u32| {
        let [_, a, b, c] = i.to_be_bytes();
        if i.is_multiple_of(2) {
            let local = SocketAddr::from((Ipv4Addr::new(10, 255, 0, 1), 1000));
            FourTuple { local, remote: SocketAddr::from((Ipv4Addr::new(10, a, b, c), 2000)) }
        } else {
            let local = SocketAddr::from((Ipv6Addr::LOCALHOST, 1000));
            FourTuple { local, remote: SocketAddr::from((Ipv6Addr::from(0xfd << 120 | u128::from(i)), 2000)) }
        }
    };
    (0..n).map(tuple).collect()
}

#[test]
fn ten_thousand_connections_are_one_transaction() {
    in_own_network(|| {
        for n in [1_000, 10_000] {
            let tuples = many(n);
            let start = Instant::now();
            let lock = NetworkLock::lock(&here(), &name("many"), &tuples, &NFTABLES).unwrap();
            let locked = start.elapsed();
            assert_eq!(listed(&here()), [("CRIU-many".into(), tuples.len())]);
            let start = Instant::now();
            assert!(lock.unlock().unwrap());
            println!("{n} connections: locked in {locked:?}, unlocked in {:?}", start.elapsed());
            assert!(locked < Duration::from_secs(5), "one by one, this would take minutes");
        }
    });
}

#[test]
fn a_transaction_beyond_the_send_buffer_says_what_to_do() {
    in_own_network(|| {
        let limit: u32 =
            sh("cat /proc/sys/net/core/wmem_max 2>/dev/null || echo 4194304").trim().parse().unwrap();
        // A connection takes at least 28 bytes, and the buffer is twice the limit.
        let error = NetworkLock::lock(&here(), &name("big"), &many(limit / 14 + 1), &NFTABLES).unwrap_err();
        let LockError::Nftables { source: NftError::TooLarge { bytes }, .. } = error else {
            panic!("{error:?}")
        };
        assert!(bytes > usize::try_from(limit).unwrap() * 2);
        assert_eq!(sh("nft list ruleset"), "");
    });
}
