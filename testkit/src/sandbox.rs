//! Tests that need a network of their own: each body runs in a process of its own, in new user and network
//! namespaces, so that no test needs root and none sees another's packets.

use std::env;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::skip::skip;

/// Set for the process that has its namespaces.
const INSIDE: &str = "SOCCR_TEST_INSIDE";
const TIMEOUT_SECONDS: &str = "60";

/// Runs `body` in a process with its own network (loopback only, up); what fails there fails the test here.
///
/// That process is this test program anew, told to run this one test: a mere fork of a program with
/// threads may find a lock held for ever by a thread that it does not have. So a test calls this
/// itself, not in a helper, and once.
pub fn in_own_network<F: FnOnce()>(body: F) {
    let runs = |command: &mut Command| command.stderr(Stdio::null()).status().is_ok_and(|it| it.success());
    if env::var_os(INSIDE).is_some() {
        assert!(runs(Command::new("ip").args(["link", "set", "lo", "up"])), "lo is up (package iproute2)");
        return body();
    }
    if !runs(Command::new("unshare").args(["-Urn", "true"])) {
        return skip("user and network namespaces are not available").expect("that may be skipped");
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

/// A closure's type is named after the function that it is written in: `program::module::test::{{closure}}`.
fn name_of_test<F>() -> &'static str {
    let path = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    path.split_once("::").map_or(path, |(_program, test)| test)
}

/// Long enough for any machine; only a failing test waits for it.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(20));

/// A connected pair over loopback: (the end to be moved, its peer).
pub fn connected(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).expect("bind");
    let to: SocketAddr = listener.local_addr().expect("local address");
    let ours = TcpStream::connect(to).expect("connect");
    let (theirs, _) = listener.accept().expect("accept");
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(PATIENCE).expect("timeout");
        stream.set_write_timeout(PATIENCE).expect("timeout");
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
