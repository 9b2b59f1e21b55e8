//! Tests that need a network of their own: each body runs in a process of its own, in new user and network
//! namespaces, so that no test needs root and none sees another's packets.

#![allow(unsafe_code, clippy::missing_panics_doc)]

use std::env;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::time::Duration;

/// 1 in CI: a test that cannot have its namespaces fails instead of being skipped.
const REQUIRE: &str = "SOCCR_TEST_REQUIRE";
/// The file in which `scripts/test` counts skipped tests, which have passed for the test runner.
const SKIPPED: &str = "SOCCR_TEST_SKIPPED";
/// Set for the process that has its namespaces.
const INSIDE: &str = "SOCCR_TEST_INSIDE";
const TIMEOUT_SECONDS: &str = "60";

/// Runs `body` in a process with its own network (loopback only, up); what fails there fails the test here.
///
/// That process is this test program anew, told to run this one test: a mere fork of a program with
/// threads may find a lock held for ever by a thread that it does not have. So a test calls this
/// itself, not in a helper, and once.
pub fn in_own_network<F: FnOnce()>(body: F) {
    if env::var_os(INSIDE).is_some() {
        loopback_up().expect("lo is up");
        return body();
    }
    if !namespaces_are_available() {
        return skip("user and network namespaces are not available");
    }
    let test = name_of_test::<F>();
    let output = Command::new("timeout")
        .args(["--kill-after=5", TIMEOUT_SECONDS, "unshare", "-Urn"])
        .arg(env::current_exe().expect("this program"))
        .args([test, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("timeout, unshare and this program run");
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{test} failed in its own network: {}", output.status);
    assert!(said.contains("1 passed"), "{test} did not run in its own network");
}

fn skip(why: &str) {
    assert!(env::var_os(REQUIRE).is_none_or(|it| it != "1"), "{why}");
    let line = format!("SKIPPED {}: {why}\n", std::thread::current().name().unwrap_or("?"));
    eprint!("{line}");
    if let Some(list) = env::var_os(SKIPPED) {
        let list = File::options().append(true).create(true).open(list);
        list.and_then(|mut list| list.write_all(line.as_bytes())).expect(SKIPPED);
    }
}

/// A closure's type is named after the function that it is written in: `program::module::test::{{closure}}`.
fn name_of_test<F>() -> &'static str {
    let path = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    path.split_once("::").map_or(path, |(_program, test)| test)
}

fn namespaces_are_available() -> bool {
    let unshare = Command::new("unshare").args(["-Urn", "true"]).stderr(Stdio::null()).status();
    unshare.is_ok_and(|status| status.success())
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
