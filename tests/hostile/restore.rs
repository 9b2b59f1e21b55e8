//! Hostile images as far as into a socket: refused by name or taken, never a crash, never a wait without an end, and
//! nothing is left: no rule, no socket, no packet to the peer.

use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use soccr::connection::{ControlBlock, FourTuple, Queues, State, Window, WindowScale};
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::image::{ImageDir, ImageError};
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::sockopt;
use soccr::lock::{self, LockName, LockOptions, Method, NetworkLock};
use soccr::repair::{Paused, Probe};
use soccr::restore::RestoreError;

use crate::mutate::{Random, mutated};
use crate::support::{connected, expect_bytes, in_own_network};

const STATES: [State; 8] = [
    State::Established,
    State::SynSent,
    State::FinWait1,
    State::FinWait2,
    State::Close,
    State::CloseWait,
    State::LastAck,
    State::Closing,
];

/// One restore may take so long on a machine that has other things to do.
const SLOW: Duration = Duration::from_secs(5);

/// A connection whose near end is in an image, behind a lock.
struct Victim {
    folder: tempfile::TempDir,
    tuple: FourTuple,
    tcp: ControlBlock,
    queues: Queues,
    domain: i32,
    peer: TcpStream,
    lock: NetworkLock,
}

impl Victim {
    fn on(address: &str) -> Self {
        let (mut near, mut peer) = connected(address);
        peer.write_all(b"unread").unwrap();
        near.write_all(b"received").unwrap();
        expect_bytes(&mut peer, b"received");
        near.set_read_timeout(None).unwrap();
        assert_eq!(near.peek(&mut [0; 6]).unwrap(), 6);
        let tuple = FourTuple { local: near.local_addr().unwrap(), remote: near.peer_addr().unwrap() };
        let options = LockOptions { method: Method::Nftables, lease: None, log: None };
        let name = LockName::criu("hostile").unwrap();
        let lock = NetworkLock::lock(&NetNs::current().unwrap(), &name, &[tuple], &options).unwrap();
        near.write_all(b"unacknowledged").unwrap();
        let domain = sockopt::domain(near.as_fd()).unwrap();
        let mut queues = Queues::default();
        let paused = Paused::pause(near).unwrap();
        let tcp = paused.save(&mut queues).unwrap();
        drop(paused.release()); // closed in repair mode
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        TcpStreamImage::write(&dir, 1, &tcp, &queues.recv, &queues.send).unwrap();
        assert_eq!((&queues.recv[..], &queues.send[..]), (&b"unread"[..], &b"unacknowledged"[..]));
        Self { folder, tuple, tcp, queues, domain, peer, lock }
    }

    /// Restores and closes again, silently.
    fn try_restore(
        &self,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        queues: &Queues,
    ) -> Result<(), RestoreError> {
        self.restore(tuple, tcp, queues).map(|paused| drop(paused.release()))
    }

    fn restore(
        &self,
        tuple: &FourTuple,
        tcp: &ControlBlock,
        queues: &Queues,
    ) -> Result<Paused<OwnedFd>, RestoreError> {
        let start = Instant::now();
        let socket = sockopt::socket(self.domain, libc::SOCK_STREAM, libc::IPPROTO_TCP).unwrap();
        let paused = Paused::pause(socket).unwrap();
        let forge = Forge::new();
        let result = paused.restore(tuple, tcp, &queues.recv, &queues.send, &forge);
        forge.finish().unwrap();
        assert!(start.elapsed() < SLOW, "{tuple} {tcp:?}: {:?}", start.elapsed());
        if let Err(error) = &result {
            // Its state is not that of a connection any more, in or out of repair mode.
            assert!(error.to_string().contains(&tuple.to_string()), "{error}");
            assert_eq!(soccr::kernel::tcp::info(paused.socket()).unwrap().state, State::Close as u8);
        }
        result.map(|()| paused)
    }

    /// The good image still restores, the peer has noticed nothing, and the host is as it was.
    fn lives_on(mut self) {
        assert_eq!(sockets_of(self.tuple), 1, "only the peer's");
        let paused = self.restore(&self.tuple, &self.tcp, &self.queues).unwrap();
        assert!(self.lock.unlock().unwrap());
        let near = paused.socket().try_clone_to_owned().unwrap();
        paused.resume(Probe::Send).unwrap();
        let mut near = TcpStream::from(near);
        near.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        expect_bytes(&mut near, b"unread");
        expect_bytes(&mut self.peer, b"unacknowledged");
        near.write_all(b"there").unwrap();
        expect_bytes(&mut self.peer, b"there");
        self.peer.write_all(b"back").unwrap();
        expect_bytes(&mut near, b"back");
        assert_eq!(lock::list(&NetNs::current().unwrap()).unwrap(), []);
        let rules = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&rules.stdout), "");
    }
}

/// How many sockets in this network have these ports, listening ones aside.
fn sockets_of(tuple: FourTuple) -> usize {
    let ports = [tuple.local.port(), tuple.remote.port()].map(|port| format!(":{port:04X}"));
    let lists = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap());
    let both = |line: &&str| {
        let ends: Vec<_> = line.split_whitespace().skip(1).take(2).collect();
        ends.iter().all(|end| ports.iter().any(|port| end.ends_with(port)))
    };
    lists.iter().flat_map(|list| list.lines().skip(1)).filter(both).count()
}

/// The file is damaged at random; what can still be read goes into a socket.
#[test]
fn mutated_images_are_refused_or_restored() {
    in_own_network(|| {
        let victim = Victim::on("127.0.0.1:0");
        let good = std::fs::read(victim.folder.path().join(TcpStreamImage::name(1))).unwrap();
        let mut random = Random::seeded();
        let (mut unreadable, mut refused, mut taken) = (0, 0, 0);
        let deadline = Instant::now() + Duration::from_secs(4);
        while Instant::now() < deadline {
            let state = *random.of(&STATES);
            match read(victim.folder.path(), &mutated(std::slice::from_ref(&good), &mut random), state) {
                Err(error) => {
                    assert!(error.to_string().starts_with("image tcp-stream-2.img, byte "), "{error}");
                    unreadable += 1;
                }
                Ok((tcp, queues)) => match victim.try_restore(&victim.tuple, &tcp, &queues) {
                    Err(_) => refused += 1,
                    Ok(()) => taken += 1,
                },
            }
        }
        println!("{unreadable} images unreadable, {refused} refused by engine or kernel, {taken} restored");
        assert!(unreadable > 10 && refused > 10 && taken > 10);
        victim.lives_on();
    });
}

fn read(folder: &Path, content: &[u8], state: State) -> Result<(ControlBlock, Queues), ImageError> {
    std::fs::write(folder.join(TcpStreamImage::name(2)), content).unwrap();
    let mut queues = Queues::default();
    let image = TcpStreamImage::read(&ImageDir::open(folder).unwrap(), 2, state, &mut queues)?;
    Ok((image.tcp, queues))
}

/// Fields at their limits, in every state: the readers let them through, the kernel has to stand them.
#[test]
fn extreme_fields_are_refused_or_restored() {
    in_own_network(|| {
        let victim = Victim::on("[::1]:0");
        let good = victim.tcp;
        let (mut refused, mut taken) = (0, 0);
        for state in STATES {
            for (number, change) in EXTREMES.iter().enumerate() {
                let mut tcp = plausible(good, state);
                change(&mut tcp);
                let mut queues = victim.queues.clone();
                queues.recv.resize(tcp.recv_len as usize, 0);
                queues.send.resize(tcp.send_len as usize, 0);
                match victim.try_restore(&victim.tuple, &tcp, &queues) {
                    Err(error) if number == 0 => panic!("{state}: {error}"),
                    Err(_) => refused += 1,
                    Ok(()) => taken += 1,
                }
            }
        }
        println!("{refused} refused, {taken} restored");
        assert!(refused > 10 && taken > 10);
        victim.lives_on();
    });
}

/// The connection in another state, with such queues as it can have there.
fn plausible(tcp: ControlBlock, state: State) -> ControlBlock {
    let nothing_to_send = state.fin_acked() || state == State::SynSent;
    let (send_len, unsent_len) = if nothing_to_send { (0, 0) } else { (tcp.send_len, tcp.unsent_len) };
    let (recv_len, window) = if state == State::SynSent { (0, None) } else { (tcp.recv_len, tcp.window) };
    ControlBlock { state, recv_len, send_len, unsent_len, window, ..tcp }
}

const EXTREMES: [fn(&mut ControlBlock); 22] = [
    |_| (),
    |tcp| tcp.negotiated.mss_clamp = 0,
    |tcp| tcp.negotiated.mss_clamp = 1,
    |tcp| tcp.negotiated.mss_clamp = 65_535,
    |tcp| tcp.negotiated.wscale = Some(WindowScale { snd: 14, rcv: 14 }),
    |tcp| tcp.negotiated.wscale = None,
    |tcp| tcp.negotiated.timestamp = None,
    |tcp| tcp.negotiated.timestamp = Some(u32::MAX),
    |tcp| tcp.negotiated.mask = 0xff,
    |tcp| (tcp.rcv_nxt, tcp.write_seq) = (0, 0),
    |tcp| (tcp.rcv_nxt, tcp.write_seq) = (u32::MAX, u32::MAX),
    |tcp| tcp.write_seq = tcp.write_seq.wrapping_add(1 << 31),
    |tcp| tcp.unsent_len = tcp.send_len,
    |tcp| (tcp.recv_len, tcp.send_len, tcp.unsent_len) = (0, 0, 0),
    |tcp| (tcp.recv_len, tcp.send_len) = (300_000, 300_000),
    |tcp| tcp.window = None,
    |tcp| tcp.window = Some(Window::default()),
    |tcp| window(tcp, |window| window.rcv_wup = window.rcv_wup.wrapping_add(1 << 30)),
    |tcp| window(tcp, |window| window.snd_wl1 = window.snd_wl1.wrapping_add(1 << 30)),
    |tcp| window(tcp, |window| window.max_window = 0),
    |tcp| window(tcp, |window| (window.snd_wnd, window.max_window) = (Window::LARGEST, Window::LARGEST)),
    |tcp| window(tcp, |window| window.rcv_wnd = Window::LARGEST),
];

fn window(tcp: &mut ControlBlock, change: impl Fn(&mut Window)) {
    tcp.window.iter_mut().for_each(change);
}

/// What would lead to another connection than the image says, or to none that can be, is refused by name.
#[test]
fn contradictions_are_refused_by_name() {
    in_own_network(|| {
        let victim = Victim::on("127.0.0.1:0");
        let refusal = |tuple: &FourTuple, tcp: &ControlBlock| {
            let error = victim.try_restore(tuple, tcp, &victim.queues).expect_err("it must be refused");
            soccr::chain(&error)
        };
        let good = victim.tcp;
        for (change, reason) in [
            (ControlBlock { state: State::SynSent, ..good }, "SYN_SENT"),
            (ControlBlock { state: State::FinWait2, ..good }, "has acknowledged"),
            (ControlBlock { recv_len: u32::MAX, ..good }, "receive queue"),
            (ControlBlock { send_len: u32::MAX, ..good }, "send queue"),
            (ControlBlock { unsent_len: u32::MAX, ..good }, "unsent"),
            (
                {
                    let wscale = Some(WindowScale { snd: 15, rcv: 0 });
                    ControlBlock {
                        negotiated: soccr::connection::Negotiated { wscale, ..good.negotiated },
                        ..good
                    }
                },
                "scale",
            ),
            (
                ControlBlock { window: Some(Window { snd_wnd: u32::MAX, ..Window::default() }), ..good },
                "window",
            ),
        ] {
            let error = refusal(&victim.tuple, &change);
            assert!(error.contains(reason), "{error}");
        }
        let remote = |text: &str| FourTuple { remote: text.parse().unwrap(), ..victim.tuple };
        let local = |text: &str| FourTuple { local: text.parse().unwrap(), ..victim.tuple };
        for (tuple, reason) in [
            (remote("0.0.0.0:7"), "peer's address is unspecified"),
            (remote("127.0.0.1:0"), "peer's port is 0"),
            (remote("224.0.0.1:7"), "multicast"),
            (remote("255.255.255.255:7"), "broadcast"),
            (remote("[::1]:7"), "families"),
            (local("0.0.0.0:7"), "local address is unspecified"),
            (local("224.0.0.1:7"), "multicast"),
            (local("127.255.255.255:7"), "not one of a connection"),
            // The kernel's own words.
            (remote("127.255.255.255:7"), "unreachable"),
            (local("192.0.2.1:7"), "assign"),
        ] {
            let error = refusal(&tuple, &good);
            assert!(error.contains(reason), "{tuple}: {error}");
        }
        victim.lives_on();
    });
}

/// Where bind() takes it for an address, and only connect() knows better.
#[test]
fn a_broadcast_address_in_ipv6_form_is_refused() {
    in_own_network(|| {
        let victim = Victim::on("[::ffff:127.0.0.1]:0");
        let tuple = FourTuple { local: "[::ffff:127.255.255.255]:7".parse().unwrap(), ..victim.tuple };
        let error = victim.try_restore(&tuple, &victim.tcp, &victim.queues).expect_err("it must be refused");
        let error = soccr::chain(&error);
        assert!(error.contains("unreachable"), "{error}");
        victim.lives_on();
    });
}
