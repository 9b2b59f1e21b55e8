//! Connections to lock, within a network namespace and between two.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use soccr::connection::FourTuple;
use soccr::kernel::netns::NetNs;

/// Long enough for any machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a shell command that has to succeed and gives its output.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {} {stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// A connection with both its ends.
pub struct Pair {
    /// The end that connected.
    pub client: TcpStream,
    /// The end that was accepted.
    pub server: TcpStream,
}

impl Pair {
    /// Connects over loopback to `to`, an address to listen on with port 0.
    pub fn over(to: &str) -> Self {
        let listener = TcpListener::bind(to).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Self::of(client, listener.accept().unwrap().0)
    }

    /// A connection from the client `from`, where the server listens on `listen` but is reached at `to`.
    pub fn of(client: TcpStream, server: TcpStream) -> Self {
        for end in [&client, &server] {
            end.set_nodelay(true).unwrap();
            end.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        Self { client, server }
    }

    /// The client's view.
    pub fn tuple(&self) -> FourTuple {
        tuple_of(&self.client)
    }

    /// Sends from the client to the server and the other way round, and waits for both.
    pub fn flows(&mut self) {
        transfer(&mut self.client, &mut self.server, b"there");
        transfer(&mut self.server, &mut self.client, b"back");
    }
}

/// A socket's own view of its connection.
pub fn tuple_of(end: &TcpStream) -> FourTuple {
    FourTuple { local: end.local_addr().unwrap(), remote: end.peer_addr().unwrap() }
}

/// Sends `bytes` and waits until exactly they have arrived.
pub fn transfer(from: &mut TcpStream, to: &mut TcpStream, bytes: &[u8]) {
    from.write_all(bytes).unwrap();
    expect(to, bytes);
}

/// Waits for `bytes`.
pub fn expect(from: &mut TcpStream, bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    from.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes);
}

/// Whether nothing has arrived at this end, neither bytes nor a FIN nor a RST.
pub fn is_silent(end: &TcpStream) -> bool {
    end.set_nonblocking(true).unwrap();
    let silent = matches!(end.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
    end.set_nonblocking(false).unwrap();
    silent
}

/// Another network namespace, held by a process that ends with this value.
pub struct OtherNs {
    child: Child,
    /// The namespace.
    pub ns: NetNs,
}

impl OtherNs {
    /// A new namespace, joined to this one by a veth: 10.9.0.1 and fd09::1 here, …2 there.
    pub fn joined() -> Self {
        let new = Self::new();
        let pid = new.child.id();
        sh(&format!("ip link add here type veth peer name there netns {pid}"));
        let setup = |dev: &str, last: u8| {
            format!(
                "ip address add 10.9.0.{last}/24 dev {dev} && ip address add fd09::{last}/64 dev {dev} nodad && \
                 ip link set {dev} up && ip link set lo up"
            )
        };
        sh(&setup("here", 1));
        new.ns.run(|| sh(&setup("there", 2))).unwrap();
        new
    }

    fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["-n", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let ns = NetNs::of_task(child.id()).unwrap();
        Self { child, ns }
    }

    /// A connection from this namespace to a server there, at `to` (10.9.0.2 or fd09::2).
    pub fn connect(&self, to: &str) -> Pair {
        let listener =
            self.ns.run(|| TcpListener::bind(SocketAddr::new(to.parse().unwrap(), 0))).unwrap().unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Pair::of(client, listener.accept().unwrap().0)
    }
}

impl Drop for OtherNs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
