//! Connections that nobody has accepted are taken out of a listener's queue and put back.

mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use soccr::accept_queue::{self, AcceptQueues, Unavailable};
use soccr::connection::{ControlBlock, FourTuple, Queues, State};
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::{diag, sockopt, tcp};
use soccr::lock::{LockName, LockOptions, NetworkLock};
use soccr::repair::{Paused, Probe, four_tuple};
use support::{expect_bytes, pattern};

struct Taken {
    tuple: FourTuple,
    tcp: ControlBlock,
    queues: Queues,
}

/// Runs `body` in a network of its own; BPF needs the first user namespace's root.
fn as_root(body: impl FnOnce(&NetNs, &AcceptQueues) + Send) {
    if !nix::unistd::geteuid().is_root() {
        return support::skip("BPF needs root");
    }
    let own = soccr_testkit::NetNs::new().expect("a namespace");
    let ns = NetNs::open(Path::new(&own.path())).expect("the same");
    match AcceptQueues::open(&ns) {
        Ok(queues) => own.run(|| body(&ns, &queues)),
        Err(Unavailable::Function | Unavailable::Btf(_)) => support::lacks("bpf_sk_assign_tcp_reqsk"),
        Err(error) => panic!("{}", soccr::chain(&error)),
    }
}

fn wait_until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < deadline, "waited for: {what}");
        std::thread::yield_now();
    }
}

fn connect(to: SocketAddr) -> TcpStream {
    let client = TcpStream::connect(to).expect("connect");
    for set in [TcpStream::set_read_timeout, TcpStream::set_write_timeout] {
        set(&client, Some(Duration::from_secs(20))).expect("a timeout");
    }
    client
}

fn unread_at(ns: &NetNs, client: &TcpStream) -> u32 {
    let tuple = FourTuple { local: client.peer_addr().unwrap(), remote: client.local_addr().unwrap() };
    let find = || {
        let monitor = soccr::kernel::netlink::NetlinkSocket::sock_diag().unwrap();
        soccr::kernel::diag::receiving(&monitor, &tuple.on_wire(), 0).unwrap()
    };
    ns.run(find).unwrap().map_or(0, |receiving| receiving.unread)
}

/// Empties the queue, behind a lock, as a dump does.
fn take_all(ns: &NetNs, listener: &TcpListener) -> (Vec<Taken>, NetworkLock) {
    let taken = || accept_queue::take(listener.as_fd()).expect("accept");
    let sockets: Vec<_> = std::iter::from_fn(taken).collect();
    let tuples: Vec<_> =
        sockets.iter().map(|socket| four_tuple(socket.as_fd()).expect("addresses")).collect();
    let name = LockName::soccr("acceptq").expect("a name");
    let lock = NetworkLock::lock(ns, &name, &tuples, &LockOptions::default()).expect("lock");
    let read = |(socket, tuple)| {
        let paused = Paused::pause(socket).expect("pause");
        let mut queues = Queues::default();
        let tcp = paused.save(&mut queues).expect("save");
        drop(paused.release()); // in repair mode: without a word
        Taken { tuple, tcp, queues }
    };
    (sockets.into_iter().zip(tuples).map(read).collect(), lock)
}

fn put_all(queues: &AcceptQueues, listener: &TcpListener, taken: &[Taken]) {
    let forge = Forge::new();
    for connection in taken {
        queues
            .put(&forge, listener.as_fd(), &connection.tuple, &connection.tcp, &connection.queues.recv, None)
            .unwrap_or_else(|error| panic!("{}", soccr::chain(&error)));
    }
    forge.finish().expect("no rule is left");
}

/// What was put back and accepted reads as what was taken, up to the clock and our window.
fn check_same(stream: &TcpStream, was: &Taken) {
    let paused = Paused::pause(stream.as_fd()).expect("pause");
    let mut queues = Queues::default();
    let mut is = paused.save(&mut queues).expect("save");
    let clock = (was.tcp.negotiated.timestamp, is.negotiated.timestamp);
    if let (Some(before), Some(after)) = clock {
        assert!(after.wrapping_sub(before) < 60_000_000, "the clock went from {before} to {after}");
    }
    is.negotiated.timestamp = was.tcp.negotiated.timestamp;
    assert_eq!(is.window.map(|window| window.snd_wnd), was.tcp.window.map(|window| window.snd_wnd));
    is.window = was.tcp.window;
    assert_eq!(is, was.tcp);
    assert!(queues == was.queues, "the bytes differ");
    paused.resume(Probe::None).expect("resume");
}

/// Clients that have sent nothing, some bytes, and some bytes and a FIN, in turn.
fn there_and_back(listen: &str, reach: &str) {
    as_root(|ns, queues| {
        let listener = TcpListener::bind(listen).expect("bind");
        let to = SocketAddr::new(reach.parse().unwrap(), listener.local_addr().unwrap().port());
        let mut clients: Vec<TcpStream> = (0..20).map(|_| connect(to)).collect();
        let sent = |nth: usize| pattern(u32::try_from(nth).unwrap(), [0, 1, 3001][nth % 3]);
        for (nth, client) in clients.iter_mut().enumerate() {
            client.write_all(&sent(nth)).unwrap();
            if nth % 4 == 0 {
                client.shutdown(Shutdown::Write).unwrap();
            }
            let len = sent(nth).len() + usize::from(nth % 4 == 0); // a FIN counts
            wait_until("all has arrived", || unread_at(ns, client) as usize == len);
        }
        wait_until("all are queued", || accept_queue::waiting(listener.as_fd()) == Ok(20));
        let (taken, lock) = take_all(ns, &listener);
        assert_eq!(accept_queue::waiting(listener.as_fd()), Ok(0));
        put_all(queues, &listener, &taken);
        assert_eq!(accept_queue::waiting(listener.as_fd()), Ok(20));
        lock.unlock().expect("unlock");
        for (nth, client) in clients.iter_mut().enumerate() {
            let (mut server, from) = listener.accept().expect("accept");
            assert_eq!(from.port(), client.local_addr().unwrap().port(), "the order is another one");
            check_same(&server, &taken[nth]);
            expect_bytes(&mut server, &sent(nth));
            server.write_all(b"welcome").unwrap();
            expect_bytes(client, b"welcome");
            if nth % 4 == 0 {
                assert_eq!(server.read(&mut [0]).unwrap(), 0, "the client's FIN is lost");
                continue;
            }
            client.write_all(b"thanks").unwrap();
            expect_bytes(&mut server, b"thanks");
            drop(server);
            assert_eq!(client.read(&mut [0]).unwrap(), 0, "no FIN");
        }
    });
}

#[test]
fn twenty_over_ipv4() {
    there_and_back("127.0.0.1:0", "127.0.0.1");
}

#[test]
fn twenty_over_ipv6() {
    there_and_back("[::1]:0", "::1");
}

#[test]
fn twenty_over_ipv4_at_a_listener_of_both() {
    there_and_back("[::]:0", "127.0.0.1");
}

/// As much as a client can send to a program that does not take it.
#[test]
fn a_full_receive_queue() {
    as_root(|ns, queues| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut client = connect(listener.local_addr().unwrap());
        client.set_nonblocking(true).unwrap();
        let bytes = pattern(7, 16 << 20);
        let mut sent = 0;
        // The window opens a little now and then.
        let mut quiet = Instant::now();
        while quiet.elapsed() < Duration::from_millis(500) {
            if let Ok(more) = client.write(&bytes[sent..]) {
                (sent, quiet) = (sent + more, Instant::now());
            }
        }
        client.set_nonblocking(false).unwrap();
        let (taken, lock) = take_all(ns, &listener);
        let unread = taken[0].queues.recv.len();
        assert!(unread > 50_000, "only {unread} bytes wait");
        put_all(queues, &listener, &taken);
        lock.unlock().expect("unlock");
        let (mut server, _) = listener.accept().expect("accept");
        server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        expect_bytes(&mut server, &bytes[..sent]);
        assert_eq!(tcp::info(server.as_fd()).unwrap().state, State::Established as u8);
    });
}

/// The program's map tells it of one segment: whatever else carries the mark is left alone.
#[test]
fn other_segments_pass() {
    as_root(|_, _| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let mut client = connect(listener.local_addr().unwrap());
        sockopt::set_mark(client.as_fd(), soccr::forge::MARK).unwrap();
        let (mut server, _) = listener.accept().expect("accept");
        client.write_all(b"marked").unwrap();
        expect_bytes(&mut server, b"marked");
    });
}

/// In a queue that is full there is no room, and the error says so.
#[test]
fn a_full_accept_queue_is_named() {
    as_root(|ns, queues| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let _client = connect(listener.local_addr().unwrap());
        wait_until("it is queued", || accept_queue::waiting(listener.as_fd()) == Ok(1));
        let (taken, lock) = take_all(ns, &listener);
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
        let _other = connect(listener.local_addr().unwrap());
        wait_until("the other is queued", || accept_queue::waiting(listener.as_fd()) == Ok(1));
        let (forge, it) = (Forge::new(), &taken[0]);
        let error =
            queues.put(&forge, listener.as_fd(), &it.tuple, &it.tcp, &it.queues.recv, None).unwrap_err();
        assert!(soccr::chain(&error).to_string().contains("the queue is full"), "{error}");
        forge.finish().expect("no rule is left");
        lock.unlock().expect("unlock");
    });
}

/// With TCP_DEFER_ACCEPT a handshake is over when the client has sent something, and what is put back stands in the queue at once.
#[test]
fn at_a_listener_that_waits_for_bytes() {
    as_root(|ns, queues| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let seconds = 60_i32.to_ne_bytes();
        sockopt::set_bytes(listener.as_fd(), libc::SOL_TCP, libc::TCP_DEFER_ACCEPT, &seconds).unwrap();
        let mut client = connect(listener.local_addr().unwrap());
        let opening = diag::requests().unwrap();
        assert_eq!(opening.iter().map(|it| it.remote).collect::<Vec<_>>(), [client.local_addr().unwrap()]);
        assert_eq!(accept_queue::waiting(listener.as_fd()), Ok(0));
        client.write_all(b"hello").unwrap();
        wait_until("it is queued", || accept_queue::waiting(listener.as_fd()) == Ok(1));
        let (taken, lock) = take_all(ns, &listener);
        put_all(queues, &listener, &taken);
        assert_eq!(accept_queue::waiting(listener.as_fd()), Ok(1));
        lock.unlock().expect("unlock");
        let (mut server, _) = listener.accept().expect("accept");
        check_same(&server, &taken[0]);
        expect_bytes(&mut server, b"hello");
        server.write_all(b"welcome").unwrap();
        expect_bytes(&mut client, b"welcome");
    });
}
