//! What is held for an address that goes to another host goes with it.

use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use soccr::kernel::netns::NetNs;
use soccr::lock::forward::Forwarder;
use soccr::lock::held::Holder;
use soccr::lock::{Listener, NetworkLock};
use soccr_testkit::lan::announce;
use soccr_testkit::netns::{self, End, veth};
use soccr_testkit::skip::in_time;

use super::net::{sh, transfer, tuple_of};
use super::{NFTABLES, in_own_network, name};

const LONG: Duration = Duration::from_secs(30);
/// Whoever gets no answer to a SYN asks again after a second.
const AT_ONCE: Duration = Duration::from_millis(900);
/// A neighbour that does not answer is given up after three.
const GIVEN_UP: Duration = Duration::from_secs(4);
const DEVICE: &str = "eth0";

/// A host on this namespace's bridge.
struct Host {
    link: netns::NetNs,
    ns: NetNs,
}

impl Host {
    fn plugged(number: u8) -> Self {
        let (bridge, link) = (netns::NetNs::current().unwrap(), netns::NetNs::new().unwrap());
        let (wire, v4, v6) =
            (format!("wire{number}"), format!("10.9.0.{number}/24"), format!("fd09::{number}/64"));
        // Neighbours are asked from a link-local address.
        let addresses = [v4.as_str(), &v6, &format!("fe80::{number}/64")];
        veth(
            End { ns: &link, name: DEVICE, addresses: &addresses },
            End { ns: &bridge, name: &wire, addresses: &[] },
        )
        .unwrap();
        sh(&format!("ip link set {wire} master br0"));
        Self { ns: NetNs::open(Path::new(&link.path())).unwrap(), link }
    }

    fn take(&self, address: IpAddr) {
        self.link.ip(&format!("addr add {address} dev {DEVICE} {}", nodad(address))).unwrap();
    }

    fn give_up(&self, address: IpAddr) {
        self.link.ip(&format!("addr del {address} dev {DEVICE}")).unwrap();
    }

    fn announce(&self, address: IpAddr) {
        self.link.run(|| announce(DEVICE, address)).unwrap();
    }

    fn listen(&self, address: IpAddr) -> TcpListener {
        self.ns.run(|| TcpListener::bind((address, 7000))).unwrap().unwrap()
    }

    /// Holds the SYNs for a listener at this address, which is gone.
    fn hold_newcomers(&self, address: IpAddr) -> (NetworkLock, Holder) {
        let mut holder = Holder::new(LONG);
        let options = holder.options(&self.ns, &NFTABLES);
        let lock = NetworkLock::lock(&self.ns, &name("new"), &[], &options).unwrap();
        let gone = [Listener { local: SocketAddr::new(address, 7000), v6only: true }];
        lock.stop_newcomers(&gone, LONG, true).unwrap();
        holder.expect_newcomers(&gone);
        (lock, holder)
    }

    /// From now on this namespace sends to `address` at this host, whatever it hears.
    fn is_believed_to_have(&self, address: IpAddr) {
        let links = self.ns.run(getifaddrs).unwrap().unwrap().filter(|it| it.interface_name == DEVICE);
        let mac = links.filter_map(|it| it.address?.as_link_addr().copied()).next().unwrap();
        sh(&format!("ip neigh replace {address} lladdr {mac} dev br0 nud permanent"));
    }
}

fn nodad(address: IpAddr) -> &'static str {
    if address.is_ipv6() { "nodad" } else { "" }
}

/// This namespace is the client, at 10.9.0.1 and fd09::1.
fn two_hosts() -> (Host, Host) {
    sh("ip link add br0 type bridge mcast_snooping 0 && ip link set br0 up");
    sh("ip addr add 10.9.0.1/24 dev br0; ip addr add fd09::1/64 dev br0 nodad");
    (Host::plugged(11), Host::plugged(12))
}

fn addresses() -> [IpAddr; 2] {
    ["10.9.0.100", "fd09::100"].map(|address| address.parse().unwrap())
}

/// Forwards until that is true.
fn forward_until(forwarder: &mut Forwarder, holder: &mut Holder, mut done: impl FnMut(&mut Holder) -> bool) {
    let start = Instant::now();
    while !done(holder) {
        assert!(start.elapsed() < LONG, "it does not come to that");
        let mut fds: Vec<_> =
            forwarder.fds().chain(holder.fds()).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        poll(&mut fds, PollTimeout::from(20_u8)).unwrap();
        forwarder.forward(holder);
    }
}

/// The client's SYN came to the old owner, and the new one answers it before the client would have asked again.
#[test]
fn a_syn_follows_its_address() {
    in_own_network(|| {
        let (old, new) = two_hosts();
        for address in addresses() {
            old.take(address);
            let (lock, mut holder) = old.hold_newcomers(address);
            let mut forwarder = Forwarder::new(&old.ns).unwrap();
            let start = Instant::now();
            let client = thread::spawn(move || TcpStream::connect((address, 7000)));
            forward_until(&mut forwarder, &mut holder, |holder| !holder.held().is_empty());
            let heard = forwarder.fds().count();
            old.give_up(address);
            while forwarder.fds().count() == heard {
                forwarder.forward(&mut holder);
            }
            // It is nobody's for a moment, in which others still send to the old owner.
            let later = thread::spawn(move || TcpStream::connect((address, 7000)));
            forward_until(&mut forwarder, &mut holder, |holder| holder.held().len() == 2);
            new.take(address);
            let listener = new.listen(address);
            new.announce(address);
            forward_until(&mut forwarder, &mut holder, |_| client.is_finished() && later.is_finished());
            let mut client = client.join().unwrap().unwrap();
            let _later = later.join().unwrap().unwrap();
            assert!(in_time(start.elapsed(), AT_ONCE), "{address}: {:?}", start.elapsed());
            assert!(holder.held().is_empty());
            let mut accepted = listener.incoming().map(Result::unwrap);
            let from = client.local_addr().unwrap();
            let mut server = accepted.find(|server| server.peer_addr().unwrap() == from).unwrap();
            transfer(&mut client, &mut server, b"hello");
            assert!(lock.unlock().unwrap());
        }
    });
}

/// Nobody announces anything, and the peer sends to the old owner for good.
#[test]
fn data_follow_their_address() {
    in_own_network(|| {
        let (old, new) = two_hosts();
        for address in addresses() {
            old.take(address);
            let listener = old.listen(address);
            let mut client = TcpStream::connect((address, 7000)).unwrap();
            let server = listener.accept().unwrap().0;
            let [mut at_old, mut at_new] = [Holder::new(LONG), Holder::new(LONG)];
            let locks = [(&old, &mut at_old), (&new, &mut at_new)].map(|(host, holder)| {
                let options = holder.options(&host.ns, &NFTABLES);
                holder.expect([tuple_of(&server)]);
                NetworkLock::lock(&host.ns, &name("one"), &[tuple_of(&server)], &options).unwrap()
            });
            let mut forwarder = Forwarder::new(&old.ns).unwrap();
            old.is_believed_to_have(address);
            client.write_all(b"hello").unwrap();
            forward_until(&mut forwarder, &mut at_old, |holder| !holder.held().is_empty());
            old.give_up(address);
            new.take(address);
            forward_until(&mut forwarder, &mut at_old, |_| {
                at_new.held().iter().any(|(_, segment)| segment.ends_with(b"hello"))
            });
            for lock in locks {
                assert!(lock.unlock().unwrap());
            }
        }
    });
}

/// An address that comes back, or that nobody takes: all stays here, and nobody is told that there is no way.
#[test]
fn what_has_no_new_owner_stays() {
    in_own_network(|| {
        let (old, _new) = two_hosts();
        for address in addresses() {
            old.take(address);
            let (lock, mut holder) = old.hold_newcomers(address);
            let mut forwarder = Forwarder::new(&old.ns).unwrap();
            old.is_believed_to_have(address);
            let to = SocketAddr::new(address, 7000);
            let client = thread::spawn(move || TcpStream::connect_timeout(&to, GIVEN_UP));
            forward_until(&mut forwarder, &mut holder, |holder| !holder.held().is_empty());
            old.give_up(address);
            forward_until(&mut forwarder, &mut holder, |_| client.is_finished());
            assert_eq!(client.join().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
            assert!(forwarder.patience().is_some());
            old.take(address);
            forwarder.forward(&mut holder);
            assert_eq!((forwarder.patience(), holder.held().len()), (None, 1));
            assert!(lock.unlock().unwrap());
        }
    });
}
