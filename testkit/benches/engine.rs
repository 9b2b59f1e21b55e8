//! What the engine costs beside the bare system calls that it makes, in C (`raw.c`).
//!
//! As root: connections that exist in one socket only, in a network namespace of their own.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, setsockopt, socket, sockopt};
use soccr::FourTuple;
use soccr::connection::{ControlBlock, Queues};
use soccr::forge::Forge;
use soccr::repair::{Paused, Probe};
use soccr_testkit::NetNs;

/// Bytes in each queue.
const LENGTHS: [u32; 3] = [0, 1 << 10, 64 << 10];

const LOCAL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 40000);
const REMOTE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 50000);

fn main() {
    let ns = NetNs::locked().expect("a network namespace; this needs root");
    ns.run(|| {
        let (warm_up, measurement) = (Duration::from_millis(300), Duration::from_secs(2));
        let mut criterion = Criterion::default().warm_up_time(warm_up).measurement_time(measurement);
        criterion = criterion.without_plots().configure_from_args();
        for queued in LENGTHS {
            saves(&mut criterion, queued);
            restores(&mut criterion, queued);
        }
        criterion.final_summary();
    });
}

/// Pause and save.
fn saves(criterion: &mut Criterion, queued: u32) {
    let mut raw = Raw::new(queued);
    let mut group = criterion.benchmark_group("save");
    let mut queues = Queues::default();
    group.bench_function(BenchmarkId::new("engine", queued), |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let socket = raw.restored();
                let start = Instant::now();
                let paused = Paused::pause_only(socket).expect("pause");
                let tcp = paused.save(&mut queues).expect("save");
                let took = start.elapsed();
                assert_eq!((tcp.recv_len, tcp.send_len), (queued, queued));
                drop(paused.release());
                took
            })
        });
    });
    group.bench_function(BenchmarkId::new("raw", queued), |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let socket = raw.restored();
                let start = Instant::now();
                raw.save(&socket);
                start.elapsed()
            })
        });
    });
}

/// Pause, restore and resume.
fn restores(criterion: &mut Criterion, queued: u32) {
    let raw = Raw::new(queued);
    let (tcp, queues) = raw.seen_by_engine();
    let tuple = FourTuple { local: LOCAL.into(), remote: REMOTE.into() };
    let forge = Forge::new();
    let mut group = criterion.benchmark_group("restore");
    group.bench_function(BenchmarkId::new("engine", queued), |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let socket = fresh(queued);
                let start = Instant::now();
                let paused = Paused::pause_only(socket).expect("pause");
                paused.restore(&tuple, &tcp, &queues.recv, &queues.send, &forge).expect("restore");
                let socket = paused.resume(Probe::Send).expect("resume");
                let took = start.elapsed();
                close(socket);
                took
            })
        });
    });
    group.bench_function(BenchmarkId::new("raw", queued), |bencher| {
        bencher.iter_custom(|rounds| {
            measure(rounds, || {
                let socket = fresh(queued);
                let start = Instant::now();
                raw.restore(&socket);
                let took = start.elapsed();
                close(socket);
                took
            })
        });
    });
    forge.finish().expect("nothing was forged");
}

fn measure(rounds: u64, once: impl FnMut() -> Duration) -> Duration {
    std::iter::repeat_with(once).take(usize::try_from(rounds).expect("64 bits")).sum()
}

/// With buffers that hold the queues.
fn fresh(queued: u32) -> OwnedFd {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).expect("socket");
    let room = (1 << 20) + 4 * queued as usize;
    setsockopt(&socket, sockopt::SndBufForce, &room).expect("SO_SNDBUFFORCE");
    setsockopt(&socket, sockopt::RcvBufForce, &room).expect("SO_RCVBUFFORCE");
    socket
}

/// Without a FIN, which would hold the addresses.
fn close(socket: OwnedFd) {
    drop(Paused::pause_only(socket).expect("pause").release());
}

/// A connection as `raw.c` has it.
struct Raw {
    c: RawConnection,
    _recv: Vec<u8>,
    _send: Vec<u8>,
}

/// `struct raw_connection`
#[repr(C)]
struct RawConnection {
    local: libc::sockaddr_in,
    remote: libc::sockaddr_in,
    recv: *mut u8,
    send: *mut u8,
    queued: u32,
}

unsafe extern "C" {
    fn raw_restore(fd: RawFd, c: *const RawConnection) -> libc::c_int;
    fn raw_save(fd: RawFd, c: *const RawConnection) -> libc::c_int;
}

impl Raw {
    fn new(queued: u32) -> Self {
        // A save wants room for one byte more.
        let (mut recv, mut send) = (vec![b'r'; queued as usize + 1], vec![b's'; queued as usize + 1]);
        let [local, remote] = [LOCAL, REMOTE].map(|address| *SockaddrIn::from(address).as_ref());
        let c = RawConnection { local, remote, recv: recv.as_mut_ptr(), send: send.as_mut_ptr(), queued };
        Self { c, _recv: recv, _send: send }
    }

    fn restore(&self, socket: &OwnedFd) {
        // SAFETY: it reads the structure, and `queued` bytes of both vectors, which live as long as `self`.
        let done = unsafe { raw_restore(socket.as_raw_fd(), &raw const self.c) };
        assert_eq!(done, 0, "raw_restore: {}", std::io::Error::last_os_error());
    }

    fn restored(&self) -> OwnedFd {
        let socket = fresh(self.c.queued);
        self.restore(&socket);
        socket
    }

    fn save(&mut self, socket: &OwnedFd) {
        // SAFETY: it reads the structure, and writes at most `queued` + 1 bytes to each vector; nobody else uses them.
        let done = unsafe { raw_save(socket.as_raw_fd(), &raw const self.c) };
        assert_eq!(done, 0, "raw_save: {}", std::io::Error::last_os_error());
    }

    /// What the engine takes it for.
    fn seen_by_engine(&self) -> (ControlBlock, Queues) {
        let mut queues = Queues::default();
        let paused = Paused::pause_only(self.restored()).expect("pause");
        let tcp = paused.save(&mut queues).expect("save");
        drop(paused.release());
        (tcp, queues)
    }
}
