//! The engine on real sockets: every state, both queues, every address family.

mod support;

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::MsgFlags;
use soccr::checkpoint::SaveError;
use soccr::connection::{
    ControlBlock, FourTuple, OPT_ECN, OPT_SACK, OPT_TIMESTAMPS, OPT_WSCALE, Queues, State, Window,
};
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::warm::SetWindow;
use soccr::kernel::{sockopt, tcp};
use soccr::lock::{LockName, LockOptions, NetworkLock};
use soccr::repair::{Paused, Probe, four_tuple};
use soccr_testkit::NetNs as TestNs;
use soccr_testkit::netns::End;
use soccr_testkit::relay::{Relay, Weather};
use soccr_testkit::skip::in_time;
use support::{FAMILIES, connected, expect_bytes, in_own_network, lacks, pattern, variants};

struct Saved {
    tuple: FourTuple,
    tcp: ControlBlock,
    queues: Queues,
    domain: i32,
    mss: u32,
    /// Until it is built: what a peer sends again in between would make the two differ.
    lock: Cell<Option<NetworkLock>>,
}

fn lock(tuple: &FourTuple) -> NetworkLock {
    let ns = NetNs::current().expect("namespace");
    let name = LockName::soccr(&format!("{}-{}", tuple.local.port(), tuple.remote.port())).expect("name");
    NetworkLock::lock(&ns, &name, &[*tuple], &LockOptions::default()).expect("lock")
}

/// Locks and reads the connection, and lets the socket go without a word to its peer.
fn save_and_close(stream: TcpStream) -> Saved {
    let mss = tcp::max_segment(stream.as_fd()).expect("segment size");
    let domain = sockopt::domain(stream.as_fd()).expect("domain");
    let tuple = four_tuple(stream.as_fd()).expect("addresses");
    let lock = Cell::new(Some(lock(&tuple)));
    let paused = Paused::pause(stream.as_fd()).expect("pause");
    let mut queues = Queues::default();
    let tcp = paused.save(&mut queues).expect("save");
    let _in_repair = paused.release();
    drop(stream);
    Saved { tuple, tcp, queues, domain, mss, lock }
}

fn build(saved: &Saved) -> TcpStream {
    build_and(saved, Compare::All)
}

/// Whether what was built is read again and compared.
#[derive(PartialEq)]
enum Compare {
    All,
    Nothing,
}

fn build_and(saved: &Saved, compare: Compare) -> TcpStream {
    let socket = sockopt::socket(saved.domain, libc::SOCK_STREAM, libc::IPPROTO_TCP).expect("socket");
    build_in(socket, saved, compare)
}

fn build_in(socket: OwnedFd, saved: &Saved, compare: Compare) -> TcpStream {
    let paused = Paused::pause(socket.as_fd()).expect("pause");
    let forge = Forge::new();
    paused
        .restore(&saved.tuple, &saved.tcp, &saved.queues.recv, &saved.queues.send, &forge)
        .unwrap_or_else(|error| panic!("{}", soccr::chain(&error)));
    forge.finish().expect("no rule left");
    if compare == Compare::All {
        check_same(&paused, saved);
    }
    if let Some(lock) = saved.lock.take() {
        lock.unlock().expect("unlock");
    }
    paused.resume(Probe::Send).expect("resume");
    TcpStream::from(socket)
}

const AGREED: u32 = OPT_TIMESTAMPS | OPT_SACK | OPT_WSCALE | OPT_ECN;

/// What was built reads as what was saved, up to the clock.
fn check_same<F: AsFd>(paused: &Paused<F>, saved: &Saved) {
    let mut queues = Queues::default();
    let mut again = paused.save(&mut queues).expect("save again");
    again.negotiated.timestamp = saved.tcp.negotiated.timestamp;
    // Whether a mark was seen is no agreement, and CLOSE needs none on ECN.
    let agreed = if saved.tcp.state == State::Close { AGREED & !OPT_ECN } else { AGREED };
    again.negotiated.mask |= saved.tcp.negotiated.mask & !agreed;
    if let (Some(before), Some(after)) = (&saved.tcp.window, &mut again.window) {
        forget_late_ack(before, after, &saved.tcp);
    }
    assert_eq!(again, saved.tcp);
    assert!(queues == saved.queues, "queues differ");
}

/// The kernel acknowledges a forged FIN by a timer, which may be over by now: with it goes a new window, whose right edge is
/// not before the old one.
fn forget_late_ack(before: &Window, after: &mut Window, tcp: &ControlBlock) {
    if tcp.state.fin_received() && after.rcv_wup == tcp.rcv_nxt && after.rcv_wup != before.rcv_wup {
        let edge = |window: &Window| window.rcv_wup.wrapping_add(window.rcv_wnd);
        assert!(edge(after).wrapping_sub(edge(before)) < 1 << 31, "{after:?} is less than {before:?}");
        (after.rcv_wup, after.rcv_wnd) = (before.rcv_wup, before.rcv_wnd);
    }
}

fn state_of(stream: &TcpStream) -> State {
    State::try_from(tcp::info(stream.as_fd()).expect("TCP_INFO").state).expect("state")
}

fn await_state(stream: &TcpStream, state: State) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while state_of(stream) != state {
        assert!(Instant::now() < deadline, "still {}", state_of(stream));
        std::thread::yield_now();
    }
}

fn moved(stream: TcpStream) -> TcpStream {
    build(&save_and_close(stream))
}

#[test]
fn established_with_bytes_to_read() {
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            let unread = pattern(1, 100_000);
            theirs.write_all(&unread).expect("write");
            let mut ours = moved(ours);
            expect_bytes(&mut ours, &unread);
            ours.write_all(&unread).expect("write");
            expect_bytes(&mut theirs, &unread);
            theirs.write_all(b"on").expect("write");
            expect_bytes(&mut ours, b"on");
        }
    });
}

#[test]
fn bytes_beyond_the_peers_window_are_sent_later() {
    in_own_network(|| {
        for address in variants() {
            let (mut ours, mut theirs) = connected(address);
            ours.set_nonblocking(true).expect("non-blocking");
            let mut written = Vec::new();
            let part = pattern(7, 65_536);
            loop {
                match ours.write(&part) {
                    Ok(len) => written.extend_from_slice(&part[..len]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let saved = save_and_close(ours);
            assert!(saved.tcp.unsent_len > 0, "the window is not closed: {:?}", saved.tcp);
            let ours = build(&saved);
            expect_bytes(&mut theirs, &written);
            drop(ours);
            assert_eq!(theirs.read(&mut [0]).expect("the end of the stream"), 0);
        }
    });
}

/// Where the kernel had no memory for what came, its window is closed and `snd_wl1` lies beyond: it goes on when it is read.
#[test]
fn a_window_closed_for_want_of_memory_is_restored_and_opens() {
    in_own_network(|| {
        for address in FAMILIES {
            let (ours, mut theirs) = connected(address);
            theirs.write_all(&pattern(3, 20_000)).expect("write");
            let mut saved = save_and_close(ours);
            let rcv_nxt = saved.tcp.rcv_nxt;
            let window = saved.tcp.window.as_mut().expect("a window");
            *window = Window { rcv_wnd: 0, rcv_wup: rcv_nxt, snd_wl1: rcv_nxt.wrapping_add(5000), ..*window };
            let mut ours = build_and(&saved, Compare::Nothing);
            theirs.write_all(&pattern(5, 30_000)).expect("write");
            expect_bytes(&mut ours, &pattern(3, 20_000));
            expect_bytes(&mut ours, &pattern(5, 30_000));
            ours.write_all(b"on").expect("write");
            expect_bytes(&mut theirs, b"on");
        }
    });
}

/// What the engine makes room with for a full queue leaves no trace: with tuning switched off the peer fills the same buffer
/// again as it fills one that has never moved, and with tuning it grows.
#[test]
fn a_receive_buffer_is_as_it_was_and_grows_as_before() {
    in_own_network(|| {
        shell("ip link set lo mtu 1500"); // so that segments are small beside the buffer
        let tuning = |on: u8| shell(&format!("echo {on} > /proc/sys/net/ipv4/tcp_moderate_rcvbuf"));
        for address in FAMILIES {
            tuning(0);
            let refilled = |move_it: &dyn Fn(TcpStream) -> TcpStream| {
                let (ours, mut theirs) = connected(address);
                fill(&mut theirs, &ours);
                let before = receive_buffer(&ours);
                let mut ours = move_it(ours);
                assert_eq!(receive_buffer(&ours), before, "{address}");
                for _ in 0..2 {
                    read_all(&mut ours, &mut theirs);
                    fill(&mut theirs, &ours);
                }
                receive_buffer(&ours)
            };
            let (never_moved, after_move) = (refilled(&|ours| ours), refilled(&moved));
            assert!(
                after_move <= never_moved,
                "{address}: {after_move} bytes, and never moved {never_moved}"
            );
            tuning(1);
            let (ours, mut theirs) = connected(address);
            if sockopt::buffer_locks(ours.as_fd()).is_err() {
                return lacks("before Linux 5.14 a buffer whose size was ever set does not grow");
            }
            let before = receive_buffer(&ours);
            fill(&mut theirs, &ours);
            let mut ours = moved(ours);
            read_all(&mut ours, &mut theirs);
            assert!(receive_buffer(&ours) > before, "{address}: it grows no more");
        }
    });
}

fn receive_buffer(of: &TcpStream) -> i32 {
    sockopt::buffer_size(of.as_fd(), sockopt::Buffer::Receive).expect("SO_RCVBUF")
}

/// Until no more goes into the reader's queue; what is there then.
fn fill(writer: &mut TcpStream, reader: &TcpStream) -> u32 {
    writer.set_nonblocking(true).expect("non-blocking");
    let part = pattern(5, 65_536);
    let writable = || {
        let mut fds = [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, 300_u16).expect("poll") > 0 && (&*writer).write(&part).is_ok()
    };
    while writable() {}
    tcp::receive_queue_len(reader.as_fd()).expect("SIOCINQ")
}

/// What is under way, too.
fn read_all(reader: &mut TcpStream, writer: &mut TcpStream) {
    let mut buffer = vec![0; 1 << 20];
    let under_way = |writer: &TcpStream| tcp::send_queue_len(writer.as_fd()).expect("SIOCOUTQ") > 0;
    while under_way(writer) || tcp::receive_queue_len(reader.as_fd()).expect("SIOCINQ") > 0 {
        assert!(reader.read(&mut buffer).expect("read") > 0);
    }
}

#[test]
fn the_segment_size_survives() {
    in_own_network(|| {
        for address in variants() {
            let (mut ours, mut theirs) = connected(address);
            for _ in 0..50 {
                ours.write_all(&pattern(3, 10_000)).expect("write");
                expect_bytes(&mut theirs, &pattern(3, 10_000));
            }
            let saved = save_and_close(ours);
            let ours = build(&saved);
            let mss = tcp::max_segment(ours.as_fd()).expect("segment size");
            assert_eq!(mss, saved.mss, "{address}");
        }
    });
}

/// Where ECN was agreed on, marks of a congested path are echoed: before and after alike.
#[test]
fn marked_segments_are_echoed() {
    in_own_network(|| {
        shell(
            "nft 'add table inet path; add chain inet path out { type filter hook output priority 0; }; \
             add rule inet path out ip ecn ect0 ip ecn set ce; add rule inet path out ip6 ecn ect0 ip6 ecn set ce'",
        );
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            let saved = save_and_close(ours);
            let with_ecn = saved.tcp.negotiated.mask & OPT_ECN != 0;
            let mut ours = build(&saved);
            for _ in 0..2 {
                theirs.write_all(&pattern(5, 10_000)).expect("write");
                expect_bytes(&mut ours, &pattern(5, 10_000));
                ours.write_all(b"all there").expect("write");
                expect_bytes(&mut theirs, b"all there");
            }
            assert_eq!(echoed(&theirs) > 0, with_ecn, "{address}");
            assert_eq!(echoed(&ours) > 0, with_ecn, "{address}");
        }
    });
}

/// Segments that arrived with a mark, as the peer has echoed it (tcpi_delivered_ce, Linux 4.18).
fn echoed(stream: &TcpStream) -> u32 {
    info_word(stream, 196)
}

/// Segments that arrived before their turn (tcpi_rcv_ooopack, Linux 5.4).
fn out_of_order(stream: &TcpStream) -> u32 {
    info_word(stream, 224)
}

/// The word at this offset of `struct tcp_info`.
fn info_word(stream: &TcpStream, at: usize) -> u32 {
    let mut info = [0_u8; 228];
    let mut len: libc::socklen_t = 228;
    let (fd, into) = (stream.as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `len` bytes, the size of `info`.
    let ret = unsafe { libc::getsockopt(fd, libc::SOL_TCP, libc::TCP_INFO, into, &raw mut len) };
    assert_eq!((ret, len), (0, 228), "TCP_INFO");
    u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"))
}

/// What came before its turn is acknowledged selectively and not carried: the peer has it still, and sends it again.
#[test]
fn segments_out_of_order_are_sent_again() {
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            theirs.set_nodelay(true).expect("TCP_NODELAY");
            let paused = Paused::pause(ours.as_fd()).expect("pause");
            let next = paused.save(&mut Queues::default()).expect("save").rcv_nxt;
            paused.resume(Probe::None).expect("resume");
            shell(&format!(
                "nft 'add table inet path; add chain inet path in {{ type filter hook input priority 0; }}; \
                 add rule inet path in tcp sport {} tcp sequence {next} drop'",
                theirs.local_addr().expect("address").port()
            ));
            theirs.write_all(&pattern(1, 1000)).expect("write");
            theirs.write_all(&pattern(2, 1000)).expect("write");
            let deadline = Instant::now() + Duration::from_secs(5);
            while out_of_order(&ours) == 0 {
                assert!(Instant::now() < deadline, "nothing came out of order");
                std::thread::yield_now();
            }
            let saved = save_and_close(ours);
            assert_eq!((saved.tcp.recv_len, saved.tcp.rcv_nxt), (0, next));
            shell("nft delete table inet path");
            let mut ours = build(&saved);
            expect_bytes(&mut ours, &pattern(1, 1000));
            expect_bytes(&mut ours, &pattern(2, 1000));
        }
    });
}

/// The kernel takes the time of the answer to a SYN: it comes as late as the peer's would, and its path is known at once.
/// What is in flight is no more than the window, until the first of it is acknowledged 50 ms later.
#[test]
fn a_burst_begins_with_the_window_that_was_given() {
    let delay = Duration::from_millis(25);
    let (host, peer) = (TestNs::new().expect("namespace"), TestNs::new().expect("namespace"));
    let relay = Relay::start(
        End { ns: &host, name: "tun0", addresses: &["10.9.0.1/24"] },
        End { ns: &peer, name: "tun0", addresses: &["10.9.0.2/24"] },
        Weather { loss: 0.0, reorder: 0.0, delay: (delay, delay), seed: 1 },
        None,
    )
    .expect("relay");
    for segments in [None, Some(50)] {
        let listener = host.run(|| TcpListener::bind("10.9.0.1:0")).expect("bind");
        let to = listener.local_addr().expect("address");
        let mut theirs = peer.run(|| TcpStream::connect(to)).expect("connect");
        let (mut ours, _) = listener.accept().expect("accept");
        // So that the peer's receive buffer grows.
        let bytes = pattern(1, 4 << 20);
        std::thread::scope(|scope| {
            scope.spawn(|| ours.write_all(&bytes).expect("write"));
            expect_bytes(&mut theirs, &bytes);
        });
        while tcp::info(ours.as_fd()).expect("TCP_INFO").unacked > 0 {
            std::thread::yield_now();
        }
        let mut ours = host.run(|| {
            let saved = save_and_close(ours);
            let socket = sockopt::tcp_socket(false).expect("socket");
            let set = SetWindow::attach().expect("attach");
            let same = socket.try_clone().expect("duplicate");
            let _chosen = segments.map(|segments| set.choose(same.as_fd(), segments).expect("choose"));
            build_in(socket, &saved, Compare::All)
        });
        let window = segments.unwrap_or(10);
        assert_eq!(tcp::info(ours.as_fd()).expect("TCP_INFO").snd_cwnd, window);
        ours.set_nonblocking(true).expect("O_NONBLOCK");
        let begun = Instant::now();
        let written = ours.write(&bytes).expect("write");
        let mut in_flight = 0;
        // A segment waits for its turn at the device, perhaps.
        while in_flight < window && begun.elapsed() < 2 * delay {
            in_flight = tcp::info(ours.as_fd()).expect("TCP_INFO").unacked;
        }
        assert!(
            in_flight == window || in_time(begun.elapsed(), 2 * delay),
            "{in_flight} segments are in flight, not {window}"
        );
        expect_bytes(&mut theirs, &bytes[..written]);
    }
    relay.stop().expect("relay");
}

#[test]
fn the_round_trip_time_is_as_it_was() {
    const RTT: Duration = Duration::from_millis(50);
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            let saved = save_and_close(ours);
            let socket = sockopt::tcp_socket(saved.domain == libc::AF_INET6).expect("socket");
            let paused = Paused::pause(socket).expect("pause");
            let (Saved { tuple, tcp, .. }, forge) = (&saved, Forge::new());
            let opening = paused.open(tuple, tcp, RTT, &forge).expect("open");
            assert_eq!(opening.is_some(), tcp.negotiated.mask & OPT_ECN != 0, "{address}");
            match opening {
                Some(opening) => {
                    let opened = paused.answer(opening, tuple, tcp, &forge);
                    paused.restore_opened(opened, tuple, tcp, b"", b"", &forge)
                }
                None => paused.restore(tuple, tcp, b"", b"", &forge),
            }
            .unwrap_or_else(|error| panic!("{}", soccr::chain(&error)));
            let rtt = soccr::kernel::tcp::info(paused.socket()).expect("TCP_INFO").rtt;
            let range = if tcp.negotiated.mask & OPT_ECN == 0 { 0..=0 } else { 50..=800 };
            assert!(range.contains(&rtt.as_millis()), "{address}: {rtt:?}");
            check_same(&paused, &saved);
            saved.lock.take().expect("locked").unlock().expect("unlock");
            let mut ours = TcpStream::from(paused.resume(Probe::Send).expect("resume"));
            theirs.write_all(b"on").expect("write");
            expect_bytes(&mut ours, b"on");
        }
    });
}

#[test]
fn close_wait() {
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            theirs.write_all(b"last words").expect("write");
            theirs.shutdown(Shutdown::Write).expect("shutdown");
            assert_eq!(state_of(&ours), State::CloseWait);
            let mut ours = moved(ours);
            expect_bytes(&mut ours, b"last words");
            assert_eq!(ours.read(&mut [0]).expect("the end"), 0);
            transfer_back(ours, theirs);
        }
    });
}

/// A FIN is forged through the host's own stack, where everybody's rules see it.
#[test]
fn a_forged_fin_passes_other_peoples_firewalls() {
    in_own_network(|| {
        for (firewall, end) in [
            (
                "nft 'add table inet fw; add chain inet fw in { type filter hook input priority 0; policy drop; }'",
                "nft delete table inet fw",
            ),
            (
                "iptables -A OUTPUT -p tcp -j DROP && ip6tables -A OUTPUT -p tcp -j DROP",
                "iptables -F OUTPUT && ip6tables -F OUTPUT",
            ),
            (
                "iptables-legacy -A INPUT -j DROP && ip6tables-legacy -A INPUT -j DROP",
                "iptables-legacy -F INPUT && ip6tables-legacy -F INPUT",
            ),
        ] {
            for address in variants() {
                let (ours, mut theirs) = connected(address);
                theirs.write_all(b"last words").expect("write");
                theirs.shutdown(Shutdown::Write).expect("shutdown");
                while state_of(&ours) != State::CloseWait {
                    std::thread::yield_now();
                }
                shell(firewall);
                let rules = shell(RULES);
                // Not every field is compared: programs run meanwhile, and the delayed ACK of the FIN may go out.
                let mut ours = build_and(&save_and_close(ours), Compare::Nothing);
                assert_eq!(shell(RULES), rules);
                shell(end);
                expect_bytes(&mut ours, b"last words");
                assert_eq!(ours.read(&mut [0]).expect("the end"), 0);
                transfer_back(ours, theirs);
            }
        }
    });
}

const RULES: &str =
    "nft --stateless list ruleset; iptables-legacy-save | grep ^-A; ip6tables-legacy-save | grep ^-A; true";

fn transfer_back(mut ours: TcpStream, mut theirs: TcpStream) {
    ours.write_all(b"answer").expect("write");
    drop(ours);
    let mut answer = Vec::new();
    theirs.read_to_end(&mut answer).expect("read");
    assert_eq!(answer, b"answer");
}

fn shell(command: &str) -> String {
    let output = std::process::Command::new("sh").args(["-c", command]).output().expect("sh");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn fin_wait2() {
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            ours.shutdown(Shutdown::Write).expect("shutdown");
            assert_eq!(theirs.read(&mut [0]).expect("the end"), 0);
            await_state(&ours, State::FinWait2); // the acknowledgement may be a delayed one
            let mut ours = moved(ours);
            theirs.write_all(b"more").expect("write");
            drop(theirs);
            let mut got = Vec::new();
            ours.read_to_end(&mut got).expect("read");
            assert_eq!(got, b"more");
        }
    });
}

#[test]
fn closed_with_bytes_to_read() {
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            ours.shutdown(Shutdown::Write).expect("shutdown");
            theirs.write_all(b"unread").expect("write");
            theirs.shutdown(Shutdown::Write).expect("shutdown");
            // Both FINs are acknowledged; ours went first, so this end passes TIME_WAIT.
            await_state(&ours, State::Close);
            let tuple = four_tuple(ours.as_fd()).expect("the peer's address is still known");
            assert_eq!(tuple.remote, theirs.local_addr().expect("address"));
            let mut ours = moved(ours);
            let mut got = Vec::new();
            ours.read_to_end(&mut got).expect("read");
            assert_eq!(got, b"unread");
        }
    });
}

#[test]
fn a_paused_socket_resumes_untouched() {
    in_own_network(|| {
        let (mut ours, mut theirs) = connected("127.0.0.1:0");
        sockopt::set_reuse_addr(ours.as_fd(), true).expect("SO_REUSEADDR");
        theirs.write_all(b"kept").expect("write");
        let mut queues = Queues::default();
        {
            let paused = Paused::pause(ours.as_fd()).expect("pause");
            paused.save(&mut queues).expect("save");
            assert!(tcp::in_repair(ours.as_fd()).expect("TCP_REPAIR"));
            paused.resume(Probe::None).expect("resume");
        }
        assert_eq!(queues.recv, b"kept");
        assert!(!tcp::in_repair(ours.as_fd()).expect("TCP_REPAIR"));
        assert_eq!(sockopt::reuse_addr(ours.as_fd()), Ok(1));
        expect_bytes(&mut ours, b"kept");
    });
}

#[test]
fn urgent_data_is_refused_by_name() {
    in_own_network(|| {
        for inline in [false, true] {
            // The kernel tells less of queues of a page and more.
            for before in [0, 10, 9000] {
                refuses_urgent_data(inline, before, false);
            }
        }
        // The program has read the urgent byte, and its mark is still in the stream.
        refuses_urgent_data(false, 10, true);
        refuses_urgent_data(false, 9000, true);
    });
}

fn refuses_urgent_data(inline: bool, before: usize, read: bool) {
    let (ours, mut theirs) = connected("127.0.0.1:0");
    sockopt::set_oob_inline(ours.as_fd(), inline).expect("SO_OOBINLINE");
    theirs.write_all(&pattern(7, before)).expect("write");
    nix::sys::socket::send(theirs.as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("send urgent data");
    theirs.write_all(b"ten more b").expect("write");
    if read {
        let mut byte = [0];
        nix::sys::socket::recv(ours.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB).expect("read urgent data");
    }
    let paused = Paused::pause(ours.as_fd()).expect("pause");
    let error = paused.save(&mut Queues::default()).expect_err("urgent data");
    let all = u32::try_from(before + 11).expect("small");
    assert!(matches!(error, SaveError::Urgent { unread, .. } if unread == all), "{error}");
    assert!(error.to_string().contains(&theirs.local_addr().expect("address").to_string()));
    assert_eq!(sockopt::oob_inline(ours.as_fd()), Ok(inline));
}

#[test]
fn an_urgent_byte_alone_is_refused_by_name() {
    in_own_network(|| {
        let (ours, theirs) = connected("127.0.0.1:0");
        nix::sys::socket::send(theirs.as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("send urgent data");
        let paused = Paused::pause(ours.as_fd()).expect("pause");
        let error = paused.save(&mut Queues::default()).expect_err("urgent data");
        assert!(matches!(error, SaveError::Urgent { unread: 1, .. }), "{error}");
    });
}

#[test]
fn a_programs_peek_offset_neither_shifts_a_save_nor_moves() {
    in_own_network(|| {
        for unread in [100, 9000] {
            for offset in [-1, 0, 1, 40, 20_000] {
                keeps_peek_offset(unread, offset);
            }
        }
    });
}

fn keeps_peek_offset(unread: usize, offset: i32) {
    let (ours, mut theirs) = connected("127.0.0.1:0");
    let bytes = pattern(3, unread);
    theirs.write_all(&bytes).expect("write");
    if sockopt::set_peek_offset(ours.as_fd(), offset).is_err() {
        return eprintln!("TCP has no SO_PEEK_OFF before Linux 6.9");
    }
    let paused = Paused::pause(ours.as_fd()).expect("pause");
    for _ in 0..2 {
        let mut queues = Queues::default();
        paused.save(&mut queues).expect("save");
        assert!(queues.recv == bytes, "{unread} bytes, offset {offset}");
    }
    paused.resume(Probe::None).expect("resume");
    assert_eq!(sockopt::peek_offset(ours.as_fd()), Ok(offset), "{unread} bytes");
}

/// Nothing locks this connection: at whatever moment a byte arrives, it is in the queue if it is counted.
#[test]
fn no_byte_is_counted_that_is_not_saved() {
    const SAVES: usize = 20_000;
    in_own_network(|| {
        let (mut ours, mut theirs) = connected("127.0.0.1:0");
        ours.set_nonblocking(true).expect("non-blocking");
        theirs.set_nodelay(true).expect("TCP_NODELAY");
        let save = |ours: &TcpStream, queues: &mut Queues| {
            let paused = Paused::pause(ours.as_fd()).expect("pause");
            let saved = paused.save(queues);
            paused.resume(Probe::None).expect("resume");
            saved
        };
        let mut queues = Queues::default();
        let mut next = save(&ours, &mut queues).expect("save").rcv_nxt;
        let busy = std::thread::spawn(move || while theirs.write_all(b"x").is_ok() {});
        let (mut saved, mut empty, mut buffer) = (0, 0, [0; 65_536]);
        for _ in 0..SAVES {
            match save(&ours, &mut queues) {
                Ok(tcp) => {
                    assert_eq!(tcp.rcv_nxt.wrapping_sub(next) as usize, queues.recv.len(), "{saved} saves");
                    saved += 1;
                    empty += usize::from(tcp.recv_len == 0);
                }
                Err(error) => assert!(soccr::chain(&error).contains("is the connection locked?"), "{error}"),
            }
            while let Ok(got) = ours.read(&mut buffer) {
                next = next.wrapping_add(u32::try_from(got).expect("small"));
            }
        }
        assert!(saved > SAVES / 10 && empty > SAVES / 100, "{saved} of {SAVES} saved, {empty} empty");
        drop(ours);
        busy.join().expect("the peer ends");
    });
}

#[test]
fn bytes_that_arrive_during_a_save_are_saved() {
    in_own_network(|| {
        let (ours, mut theirs) = connected("127.0.0.1:0");
        theirs.write_all(b"some").expect("write");
        let paused = Paused::pause(ours.as_fd()).expect("pause");
        let (mut copies, mut before) = (0, None);
        let tcp = paused
            .save_with(|queue| {
                let mut bytes = [std::mem::MaybeUninit::uninit(); 64];
                queue.copy_to(&mut bytes[..=queue.length()])?;
                copies += 1;
                if before.replace(queue.length()).is_none() {
                    theirs.write_all(b"more").expect("write");
                }
                Ok(())
            })
            .expect("save");
        assert_eq!((copies, before, tcp.recv_len), (2, Some(8), 8));
    });
}

#[test]
fn a_listener_is_refused() {
    in_own_network(|| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
        let error = Paused::pause(listener.as_fd()).expect_err("a listener has no connection");
        assert_eq!(error.source.errno, nix::errno::Errno::EPERM);
    });
}

#[test]
fn an_orphan_that_holds_the_addresses_makes_room() {
    in_own_network(|| {
        for address in variants() {
            let (ours, mut theirs) = connected(address);
            let saved = {
                let paused = Paused::pause(ours.as_fd()).expect("pause");
                let mut queues = Queues::default();
                let tcp = paused.save(&mut queues).expect("save");
                let tuple = paused.four_tuple().expect("addresses");
                paused.resume(Probe::None).expect("resume");
                let domain = sockopt::domain(ours.as_fd()).expect("domain");
                Saved { tuple, tcp, queues, domain, mss: 0, lock: Cell::new(Some(lock(&tuple))) }
            };
            drop(ours); // aloud: its FIN waits behind the lock
            let mut ours = build(&saved);
            ours.write_all(b"here").expect("write");
            expect_bytes(&mut theirs, b"here");
        }
    });
}

#[test]
fn a_connection_with_an_owner_is_left_alone() {
    in_own_network(|| {
        let (mut ours, mut theirs) = connected("127.0.0.1:0");
        let paused = Paused::pause(ours.as_fd()).expect("pause");
        let tcp = paused.save(&mut Queues::default()).expect("save");
        let tuple = paused.four_tuple().expect("addresses");
        paused.resume(Probe::None).expect("resume");
        let again = sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP).expect("socket");
        let paused = Paused::pause(again).expect("pause");
        let error = paused.restore(&tuple, &tcp, &[], &[], &Forge::new()).expect_err("it is there already");
        assert!(soccr::chain(&error).contains("EADDRNOTAVAIL"), "{error}");
        drop(paused.release());
        ours.write_all(b"alive").expect("write");
        expect_bytes(&mut theirs, b"alive");
    });
}
