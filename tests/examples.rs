//! The programs in `examples/`, with peers that check every byte.

#[allow(dead_code)] // the examples make their connections themselves
mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use support::{in_own_network, pattern};

/// Cargo builds the examples together with the tests.
fn example(name: &str) -> Command {
    let here = std::env::current_exe().expect("this program");
    let profile = here.ancestors().nth(2).expect("target/PROFILE/deps/PROGRAM");
    Command::new(profile.join("examples").join(name))
}

/// Sends back what each client says, to the end.
fn echo_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            thread::spawn(move || {
                let mut reader = stream.try_clone().expect("duplicate");
                std::io::copy(&mut reader, &mut stream).expect("echo");
                stream.shutdown(Shutdown::Write).expect("shutdown");
            });
        }
    });
    address
}

#[test]
fn a_connection_goes_through_a_file() {
    in_own_network(|| {
        let folder = tempfile::tempdir().expect("folder");
        let file = folder.path().join("connection");
        let run = |command: &mut Command| {
            let output = command.output().expect("the example runs");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).expect("text")
        };
        let said = run(example("save_restore").args(["save", &echo_server().to_string()]).arg(&file));
        assert!(said.ends_with(": ESTABLISHED\n"), "{said}");
        let said = run(example("save_restore").arg("restore").arg(&file));
        assert_eq!(said, "hello, world\n");
        assert!(!file.exists());
    });
}

/// Ends with the test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Proxy {
    /// Returns when it serves, with what it says then.
    fn start(listen: SocketAddr, upstream: SocketAddr, path: &Path) -> (Self, String) {
        let mut command = example("proxy");
        command.args([listen.to_string(), upstream.to_string()]).arg(path).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the proxy runs");
        let mut said = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut said).expect("a line");
        (Self(child), said)
    }

    fn ended(&mut self) -> bool {
        self.0.wait().expect("wait").success()
    }
}

/// What a client has said and not yet got back, in parts at most: without privileges a restored socket takes no longer
/// queue than net.core.rmem_max allows, and loopback's grow beyond that.
const UNDER_WAY: usize = 64;

/// Talks until it is told to stop, and checks that it gets back all that it has said. Returns when the proxy has it.
fn client(proxy: SocketAddr, seed: u32) -> (UnixStream, JoinHandle<usize>) {
    let (stop, stopped) = UnixStream::pair().expect("pair");
    stopped.set_nonblocking(true).expect("non-blocking");
    let mut stream = TcpStream::connect(proxy).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    stream.set_write_timeout(Some(Duration::from_secs(20))).expect("timeout");
    let mut reader = stream.try_clone().expect("duplicate");
    let part = pattern(seed, 4099);
    stream.write_all(&part).expect("write");
    support::expect_bytes(&mut stream, &part);
    let expected = part.clone();
    let (said, heard) = sync_channel(UNDER_WAY);
    let check = thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        let mut parts = 0;
        while reader.read(&mut got[..1]).expect("the connection lives") == 1 {
            reader.read_exact(&mut got[1..]).expect("the connection lives");
            assert!(got == expected, "part {parts} differs");
            heard.recv().expect("it was said");
            parts += 1;
        }
        parts
    });
    let talk = thread::spawn(move || {
        let mut parts = 0;
        while !matches!((&stopped).read(&mut [0]), Ok(0)) {
            said.send(()).expect("somebody listens");
            stream.write_all(&part).expect("the connection lives");
            parts += 1;
        }
        stream.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(check.join().expect("checked"), parts);
        parts
    });
    (stop, talk)
}

/// Twenty busy clients, through four proxies one after the other.
#[test]
fn a_proxy_hands_its_connections_to_its_successor() {
    in_own_network(|| {
        let folder = tempfile::tempdir().expect("folder");
        let path: PathBuf = folder.path().join("proxy.sock");
        let listen = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
        let upstream = echo_server();
        let (mut proxy, said) = Proxy::start(listen, upstream, &path);
        assert_eq!(said, "serving, 0 connections taken over\n");
        let clients: Vec<_> = (1..=20).map(|seed| client(listen, seed)).collect();
        for _ in 0..3 {
            let (successor, said) = Proxy::start(listen, upstream, &path);
            assert_eq!(said, "serving, 40 connections taken over\n");
            assert!(proxy.ended());
            proxy = successor;
        }
        let (stops, talks): (Vec<_>, Vec<_>) = clients.into_iter().unzip();
        drop(stops);
        let parts: Vec<usize> = talks.into_iter().map(|talk| talk.join().expect("a client")).collect();
        assert!(parts.iter().all(|parts| *parts > 0), "{parts:?}");
    });
}

/// A successor that dies before it has everything changes nothing.
#[test]
fn a_proxy_goes_on_when_its_successor_dies() {
    in_own_network(|| {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("proxy.sock");
        let listen = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
        let (_proxy, _) = Proxy::start(listen, echo_server(), &path);
        let (stop, talk) = client(listen, 7);
        let mut successor = UnixStream::connect(&path).expect("connect");
        successor.read_exact(&mut [0; 100]).expect("it begins to give");
        drop(successor);
        // It serves again, and the client's connection has gone on.
        let (stop_other, other) = client(listen, 8);
        drop(stop_other);
        assert!(other.join().is_ok());
        drop(stop);
        assert!(talk.join().is_ok());
    });
}
