//! Tests that need a network of their own: each body runs in a child process, in new user and network
//! namespaces, so that no test needs root and none sees another's packets.

#![allow(unsafe_code, clippy::missing_panics_doc)]

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, getegid, geteuid};

/// Set in CI: a test that cannot have its namespaces fails instead of being skipped.
const REQUIRE: &str = "SOCCR_TEST_REQUIRE";
const SKIPPED: i32 = 77;
const TIMEOUT_SECONDS: u32 = 60;

/// Runs `body` in a child process with its own network (loopback only, up); panics there fail the test here.
pub fn in_own_network(body: impl FnOnce() + std::panic::UnwindSafe) {
    // SAFETY: the child uses no lock of another thread: it runs the body and leaves with _exit().
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            nix::unistd::alarm::set(TIMEOUT_SECONDS);
            // The harness's captured output is in the parent; what is wrong has to be seen.
            std::panic::set_hook(Box::new(|panic| drop(writeln!(std::io::stderr(), "{panic}"))));
            let code = match enter() {
                Ok(()) => i32::from(std::panic::catch_unwind(body).is_err()),
                Err(error) => {
                    eprintln!("no namespaces of our own: {error}");
                    SKIPPED
                }
            };
            // SAFETY: ends the child at once, without the parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => match waitpid(child, None).expect("waitpid") {
            WaitStatus::Exited(_, 0) => {}
            WaitStatus::Exited(_, SKIPPED) if std::env::var_os(REQUIRE).is_none() => {
                eprintln!("SKIPPED: user and network namespaces are not available");
            }
            status => panic!("the isolated test ended with {status:?}"),
        },
    }
}

fn enter() -> Result<(), Box<dyn std::error::Error>> {
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    loopback_up()?;
    Ok(())
}

fn loopback_up() -> nix::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(|_| nix::errno::Errno::EADDRNOTAVAIL)?;
    // SAFETY: ifreq is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = libc::c_char::try_from(b'l').expect("ASCII");
    request.ifr_name[1] = libc::c_char::try_from(b'o').expect("ASCII");
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("small");
    // SAFETY: SIOCSIFFLAGS reads an ifreq.
    nix::errno::Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })
    .map(drop)
}

/// A connected pair over loopback: (the end to be moved, its peer).
pub fn connected(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).expect("bind");
    let to: SocketAddr = listener.local_addr().expect("local address");
    let ours = TcpStream::connect(to).expect("connect");
    let (theirs, _) = listener.accept().expect("accept");
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        stream.set_write_timeout(Some(Duration::from_secs(10))).expect("timeout");
    }
    (ours, theirs)
}

/// Bytes that differ at every place, from a seed.
pub fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut word = seed | 1;
    std::iter::repeat_with(|| {
        word ^= word << 13;
        word ^= word >> 17;
        word ^= word << 5;
        word.to_le_bytes()[1]
    })
    .take(len)
    .collect()
}

/// Reads exactly `want` and checks every byte.
pub fn expect_bytes(stream: &mut TcpStream, want: &[u8]) {
    let mut got = vec![0; want.len()];
    stream.read_exact(&mut got).expect("read");
    assert!(got == want, "the bytes differ");
}
