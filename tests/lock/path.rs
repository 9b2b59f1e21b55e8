//! Locks on the way, as a container's host has them: a server in a namespace behind this one, which translates.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use soccr::connection::FourTuple;
use soccr::lock::conntrack::{self, Translation};
use soccr::lock::{LockName, NetworkLock};

use super::net::{OtherNs, Pair, expect, is_silent, sh, transfer, tuple_of};
use super::support::in_own_network;
use super::{NFTABLES, here, listed, name};

/// The server's port in its namespace, and the one that this host publishes for it.
const INSIDE: u16 = 7000;
const PUBLISHED: u16 = 7100;

/// As a container engine does it: what comes to the published port goes to the server, with this host's address as its
/// sender, from wherever it comes, this host's own loopback included.
fn publish() {
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.route_localnet=1");
    sh(&format!(
        "nft -f - <<'END'
table ip nat {{
    chain prerouting {{ type nat hook prerouting priority dstnat; tcp dport {PUBLISHED} dnat to 10.9.0.2:{INSIDE}; }}
    chain output {{ type nat hook output priority -100; tcp dport {PUBLISHED} dnat to 10.9.0.2:{INSIDE}; }}
    chain postrouting {{ type nat hook postrouting priority srcnat; ip daddr 10.9.0.2 masquerade; }}
}}
END"
    ));
}

fn server(container: &OtherNs) -> TcpListener {
    container.ns.run(|| TcpListener::bind(("10.9.0.2", INSIDE))).unwrap().unwrap()
}

/// The packets of `connection`, wherever on their way they are looked at.
fn packets_of(connection: FourTuple) -> (Vec<FourTuple>, Vec<Translation>) {
    let translations = conntrack::find(&here(), &[connection]).unwrap();
    let translated = translations.iter().flat_map(|t| [t.original.tuple(), t.reply.tuple()]);
    ([connection].into_iter().chain(translated).collect(), translations)
}

fn on_path() -> LockName {
    name("one").on_path()
}

#[test]
fn neither_data_nor_a_reset_passes() {
    in_own_network(|| {
        let container = OtherNs::joined();
        for to in ["10.9.0.2", "fd09::2"] {
            let (mut locked, mut free) = (container.connect(to), container.connect(to));
            let tuple = tuple_of(&locked.server);
            let lock = NetworkLock::lock_on_path(&here(), &on_path(), &[tuple], &NFTABLES).unwrap().unwrap();
            assert_eq!(listed(&here()), [("soccr-path-one".to_owned(), 1)]);
            assert_eq!(listed(&container.ns), []);
            locked.client.write_all(b"to the server").unwrap();
            locked.server.write_all(b"to the client").unwrap();
            free.flows(); // later packets have arrived: so would the earlier ones
            assert!(is_silent(&locked.server) && is_silent(&locked.client));
            assert!(lock.unlock().unwrap());
            expect(&mut locked.server, b"to the server");
            expect(&mut locked.client, b"to the client");

            let lock = NetworkLock::lock_on_path(&here(), &on_path(), &[tuple], &NFTABLES).unwrap().unwrap();
            // What nobody has read makes the end of the socket a reset.
            locked.client.write_all(b"unread").unwrap();
            transfer(&mut free.client, &mut free.server, b"later");
            drop(locked.server);
            free.flows();
            assert!(is_silent(&locked.client), "the reset has passed");
            assert!(lock.unlock().unwrap());
        }
    });
}

#[test]
fn a_published_port_is_locked_by_the_addresses_before_translation() {
    in_own_network(|| {
        let container = OtherNs::joined();
        publish();
        let listener = server(&container);
        let connect = || {
            let client = TcpStream::connect(("127.0.0.1", PUBLISHED)).unwrap();
            Pair::of(client, listener.accept().unwrap().0)
        };
        let (mut locked, mut free) = (connect(), connect());
        locked.flows();
        let (packets, translations) = packets_of(tuple_of(&locked.server));
        let [translation] = translations[..] else { panic!("{translations:?}") };
        assert_eq!(translation.original.tuple(), locked.tuple());
        assert_eq!(translation.reply.tuple(), tuple_of(&locked.server));
        let lock = NetworkLock::lock_on_path(&here(), &on_path(), &packets, &NFTABLES).unwrap().unwrap();
        // The engine takes the container's network down: its rules go, and masquerading forgets the connections.
        sh("nft delete table ip nat && ip link set here down && ip link set here up");
        assert_eq!(packets_of(tuple_of(&locked.server)).1, []);
        locked.client.write_all(b"meanwhile").unwrap();
        locked.server.write_all(b"answer").unwrap();
        // The other one is not locked: what it sends meets no socket here.
        free.client.write_all(b"x").unwrap();
        assert_eq!(free.client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(is_silent(&locked.client));
        publish();
        conntrack::restore(&here(), &translations).unwrap();
        assert!(lock.unlock().unwrap());
        expect(&mut locked.server, b"meanwhile");
        expect(&mut locked.client, b"answer");
        locked.flows();
        assert_eq!(packets_of(tuple_of(&locked.server)).1, translations);
    });
}

/// The entries of connections that are there are left alone.
#[test]
fn what_conntrack_knows_is_left_as_it_is() {
    in_own_network(|| {
        let container = OtherNs::joined();
        publish();
        let listener = server(&container);
        let client = TcpStream::connect(("127.0.0.1", PUBLISHED)).unwrap();
        let mut pair = Pair::of(client, listener.accept().unwrap().0);
        let (_, translations) = packets_of(tuple_of(&pair.server));
        conntrack::restore(&here(), &translations).unwrap();
        pair.flows();
        let untranslated = container.connect("10.9.0.2");
        assert_eq!(packets_of(tuple_of(&untranslated.server)).0.len(), 1);
        let nobody: SocketAddr = "192.0.2.1:1".parse().unwrap();
        assert_eq!(packets_of(FourTuple { local: nobody, remote: nobody }).1, []);
    });
}

/// Accepts what conntrack takes for a connection's, in both directions, and nothing else over the wire.
const STATEFUL: &str = "nft -f - <<'END'
table inet stateful {
    chain input { type filter hook input priority filter; iif here ct state established accept; iif here drop; }
    chain output { type filter hook output priority filter; oif here ct state established accept; oif here drop; }
}
END";

#[test]
fn what_conntrack_has_never_seen_passes_a_stateful_firewall() {
    in_own_network(|| {
        let container = OtherNs::joined();
        for to in ["10.9.0.2", "fd09::2"] {
            sh("nft flush ruleset");
            let mut pair = container.connect(to);
            sh(STATEFUL);
            // Else it would pick up a connection in mid-stream.
            sh("sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0");
            pair.server.write_all(b"dropped").unwrap();
            conntrack::establish(&here(), &[pair.tuple()]).unwrap();
            expect(&mut pair.client, b"dropped");
            pair.flows();
        }
    });
}

#[test]
fn what_went_on_unseen_passes_a_stateful_firewall() {
    in_own_network(|| {
        let container = OtherNs::joined();
        sh("nft -f - <<'END'
table inet seen {
    chain output { type filter hook output priority filter; ct state new; }
}
END");
        let mut pair = container.connect("10.9.0.2");
        pair.flows();
        sh("nft -f - <<'END'
table inet unseen {
    chain prerouting { type filter hook prerouting priority raw; notrack; }
    chain output { type filter hook output priority raw; notrack; }
}
END");
        // More than the windows that conntrack knows of.
        for _ in 0..100 {
            transfer(&mut pair.server, &mut pair.client, &[7; 1 << 16]);
        }
        sh("nft delete table inet unseen");
        sh(STATEFUL);
        pair.server.write_all(b"dropped").unwrap();
        conntrack::establish(&here(), &[pair.tuple()]).unwrap();
        expect(&mut pair.client, b"dropped");
        pair.flows();
    });
}
