//! The crate as others use it: freeze, bytes, thaw.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use soccr::connection::State;
use soccr::kernel::netns::NetNs;
use soccr::kernel::{sockopt, tcp};
use soccr::{Connection, FreezeError, Frozen, Refused, ThawError, lock};
use support::{FAMILIES, connected, expect_bytes, in_own_network, pattern};

/// Locks in this namespace, and the elements in each.
fn locks() -> Vec<usize> {
    let locks = lock::list(&NetNs::current().expect("namespace")).expect("list");
    locks.into_iter().map(|lock| lock.entries).collect()
}

fn frozen<F: AsFd>((frozen, refused): (Frozen<F>, Vec<Refused<F>>)) -> Frozen<F> {
    let errors: Vec<String> = refused.iter().map(|refused| soccr::chain(&refused.error)).collect();
    assert!(errors.is_empty(), "{errors:?}");
    frozen
}

fn bytes<F: AsFd>(frozen: &Frozen<F>) -> Vec<Vec<u8>> {
    frozen.connections().map(Connection::to_bytes).collect()
}

fn connections(bytes: &[Vec<u8>]) -> Vec<Connection> {
    bytes.iter().map(|bytes| Connection::from_bytes(bytes).expect("a connection")).collect()
}

fn thawed(bytes: &[Vec<u8>]) -> Vec<TcpStream> {
    let sockets = soccr::thaw(&connections(bytes)).unwrap_or_else(|error| panic!("{}", soccr::chain(&error)));
    sockets.into_iter().map(TcpStream::from).collect()
}

#[test]
fn a_connection_goes_through_bytes() {
    in_own_network(|| {
        for address in FAMILIES {
            let (mut ours, mut theirs) = connected(address);
            ours.set_nodelay(true).expect("TCP_NODELAY");
            let (unread, unacked) = (pattern(1, 50_000), pattern(2, 10_000));
            theirs.write_all(&unread).expect("write");
            ours.write_all(&unacked).expect("write");
            let frozen = frozen(soccr::freeze([ours]));
            assert_eq!(locks(), [1], "locked while it is frozen");
            theirs.write_all(b"meanwhile").expect("write"); // dies in the lock, and is sent again
            let bytes = bytes(&frozen);
            drop(frozen.release());
            assert_eq!(locks(), [1], "locked while it is nowhere");
            let ours = &mut thawed(&bytes)[0];
            assert!(locks().is_empty());
            assert!(ours.nodelay().expect("TCP_NODELAY"));
            expect_bytes(ours, &[&unread[..], b"meanwhile"].concat());
            expect_bytes(&mut theirs, &unacked);
            ours.write_all(b"on").expect("write");
            expect_bytes(&mut theirs, b"on");
        }
    });
}

#[test]
fn what_is_frozen_can_go_on_where_it_was() {
    in_own_network(|| {
        for explicitly in [true, false] {
            let (mut ours, mut theirs) = connected("127.0.0.1:0");
            sockopt::set_reuse_addr(ours.as_fd(), true).expect("SO_REUSEADDR");
            let frozen = frozen(soccr::freeze([&ours]));
            assert!(tcp::in_repair(ours.as_fd()).expect("TCP_REPAIR"));
            if explicitly {
                assert!(frozen.resume().1.is_empty());
            } else {
                drop(frozen);
            }
            assert!(locks().is_empty());
            assert!(!tcp::in_repair(ours.as_fd()).expect("TCP_REPAIR"));
            assert_eq!(sockopt::reuse_addr(ours.as_fd()), Ok(1));
            theirs.write_all(b"alive").expect("write");
            expect_bytes(&mut ours, b"alive");
        }
    });
}

/// Errors by connection: the others are frozen, and those refused are as they were.
#[test]
fn who_cannot_be_frozen_lives_on() {
    in_own_network(|| {
        let (urgent, mut urgents_peer) = connected("127.0.0.1:0");
        nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&urgents_peer),
            b"!",
            nix::sys::socket::MsgFlags::MSG_OOB,
        )
        .expect("urgent data");
        let (good, mut peer) = connected("[::1]:0");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let pipe: OwnedFd = std::io::pipe().expect("pipe").0.into();
        let all = [urgent.as_fd(), good.as_fd(), listener.as_fd(), pipe.as_fd()];
        let (frozen, refused) = soccr::freeze(all);
        assert_eq!(frozen.connections().len(), 1);
        let errors: Vec<_> = refused.iter().map(|refused| &refused.error).collect();
        assert!(matches!(
            errors[..],
            [FreezeError::NotConnected(_), FreezeError::NotConnected(_), FreezeError::Read { .. }]
        ));
        let told = soccr::chain(errors[2]);
        assert!(told.contains("urgent") && told.contains(&urgent.local_addr().expect("address").to_string()));
        assert_eq!(locks(), [1], "only the frozen one stays locked");
        urgents_peer.write_all(b"on").expect("write");
        let mut two = [0; 2];
        (&urgent).read_exact(&mut two).expect("it is not locked");
        let bytes = bytes(&frozen);
        frozen.release();
        drop(good);
        let mut good = thawed(&bytes);
        good[0].write_all(b"moved").expect("write");
        expect_bytes(&mut peer, b"moved");
    });
}

/// Keys are nobody's to read, so a connection that is signed with them cannot go on elsewhere.
#[test]
fn keys_of_tcp_md5_are_refused_by_name() {
    in_own_network(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("address");
        let ours: OwnedFd = sockopt::tcp_socket(false).expect("socket");
        for end in [listener.as_fd(), ours.as_fd()] {
            set_md5_key(end);
        }
        tcp::connect(ours.as_fd(), address).expect("connect");
        let (mut theirs, _) = listener.accept().expect("accept");
        let (frozen, refused) = soccr::freeze([&ours]);
        assert_eq!((frozen.connections().len(), refused.len()), (0, 1));
        assert!(soccr::chain(&refused[0].error).contains("TCP-MD5"), "{}", refused[0].error);
        let mut ours = TcpStream::from(ours.try_clone().expect("duplicate"));
        ours.write_all(b"it lives").expect("write");
        expect_bytes(&mut theirs, b"it lives");
    });
}

/// A `struct tcp_md5sig` for 127.0.0.1: the address, 128 bytes, then flags, prefix, length, interface, and a key of up to 80.
fn set_md5_key(socket: std::os::fd::BorrowedFd<'_>) {
    const TCP_MD5SIG: i32 = 14;
    let mut value = [0; 128 + 8 + 80];
    value[..2].copy_from_slice(&2_u16.to_ne_bytes()); // AF_INET
    value[4..8].copy_from_slice(&[127, 0, 0, 1]);
    value[130..132].copy_from_slice(&3_u16.to_ne_bytes());
    value[136..139].copy_from_slice(b"key");
    sockopt::set_bytes(socket, libc::IPPROTO_TCP, TCP_MD5SIG, &value).expect("TCP_MD5SIG");
}

#[test]
fn many_are_frozen_and_thawed_together() {
    const MANY: usize = 300;
    in_own_network(|| {
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..MANY).map(|n| connected(FAMILIES[n % 3])).unzip();
        let before: Vec<_> = ours.iter().map(|stream| stream.local_addr().expect("address")).collect();
        let frozen = frozen(soccr::freeze(ours));
        assert_eq!(locks(), [MANY]);
        let bytes = bytes(&frozen);
        drop(frozen.release());
        let error = soccr::thaw(&connections(&bytes[1..])).expect_err("one is missing");
        assert!(matches!(error, ThawError::Apart { here: 299, together: 300 }), "{error}");
        let thawed = thawed(&bytes);
        assert!(locks().is_empty());
        for ((mut ours, mut theirs), before) in thawed.into_iter().zip(theirs).zip(before) {
            assert_eq!(ours.local_addr().expect("address"), before);
            ours.write_all(b"here").expect("write");
            expect_bytes(&mut theirs, b"here");
        }
    });
}

/// A thaw that fails leaves nothing but the lock, behind which the peers wait for the next.
#[test]
fn a_thaw_that_fails_can_be_tried_again() {
    in_own_network(|| {
        let (first, mut firsts_peer) = connected("127.0.0.1:0");
        let (second, mut seconds_peer) = connected("127.0.0.1:0");
        let stays = second.try_clone().expect("duplicate");
        let frozen = frozen(soccr::freeze([first, second]));
        let bytes = bytes(&frozen);
        drop(frozen.release());
        let error = soccr::thaw(&connections(&bytes)).expect_err("one is still there");
        let ThawError::Connections { failed, .. } = &error else { panic!("{error}") };
        assert_eq!(failed[0].0.remote, seconds_peer.local_addr().expect("address"));
        assert_eq!((failed.len(), locks()), (1, vec![2]));
        drop(stays); // in repair mode it closes silently
        for (mut ours, theirs) in thawed(&bytes).into_iter().zip([&mut firsts_peer, &mut seconds_peer]) {
            ours.write_all(b"again").expect("write");
            expect_bytes(theirs, b"again");
        }
    });
}

#[test]
fn a_half_closed_connection_stays_so() {
    in_own_network(|| {
        let (ours, mut theirs) = connected("127.0.0.1:0");
        theirs.write_all(b"last words").expect("write");
        theirs.shutdown(Shutdown::Write).expect("shutdown");
        let frozen = frozen(soccr::freeze([ours]));
        let bytes = bytes(&frozen);
        assert_eq!(connections(&bytes)[0].control_block().state, State::CloseWait);
        drop(frozen.release());
        let ours = &mut thawed(&bytes)[0];
        let mut said = Vec::new();
        ours.read_to_end(&mut said).expect("read");
        assert_eq!(said, b"last words");
        ours.write_all(b"heard").expect("write");
        expect_bytes(&mut theirs, b"heard");
    });
}

#[test]
fn an_unlocked_one_says_so_and_is_locked_while_it_is_built() {
    in_own_network(|| {
        let (ours, mut theirs) = connected("127.0.0.1:0");
        let frozen = frozen(soccr::freeze_unlocked([ours]));
        assert!(locks().is_empty());
        let bytes = bytes(&frozen);
        drop(frozen.release());
        let ours = &mut thawed(&bytes)[0];
        assert!(locks().is_empty());
        theirs.write_all(b"quiet till now").expect("write");
        expect_bytes(ours, b"quiet till now");
    });
}

/// Whether a non-local address may be bound is an option of the socket, which is set before bind().
#[test]
fn a_non_local_source_comes_back() {
    in_own_network(|| {
        let ip = |args: &str| {
            let ran = std::process::Command::new("ip").args(args.split(' ')).status();
            assert!(ran.expect("package iproute2").success(), "ip {args}");
        };
        ip("addr add 10.77.0.1/32 dev lo");
        ip("addr add 10.77.0.2/32 dev lo");
        for transparent in [true, false] {
            let listener = TcpListener::bind("10.77.0.1:0").expect("bind");
            let theirs = sockopt::tcp_socket(false).expect("a socket");
            tcp::bind(theirs.as_fd(), "10.77.0.2:0".parse().expect("an address")).expect("bind");
            tcp::connect(theirs.as_fd(), listener.local_addr().expect("its address")).expect("connect");
            let (ours, _) = listener.accept().expect("accept");
            drop(listener);
            let on = i32::from(transparent).to_ne_bytes();
            sockopt::set_bytes(ours.as_fd(), libc::SOL_IP, libc::IP_TRANSPARENT, &on)
                .expect("IP_TRANSPARENT");
            let frozen = frozen(soccr::freeze([ours]));
            let bytes = bytes(&frozen);
            drop(frozen.release());
            ip("addr del 10.77.0.1/32 dev lo");
            if !transparent {
                soccr::thaw(&connections(&bytes)).expect_err("nobody has the address");
            }
            let early = transparent.then(|| thawed(&bytes));
            ip("addr add 10.77.0.1/32 dev lo");
            let ours = &mut early.unwrap_or_else(|| thawed(&bytes))[0];
            ours.write_all(b"on").expect("write");
            expect_bytes(&mut TcpStream::from(theirs), b"on");
        }
    });
}
