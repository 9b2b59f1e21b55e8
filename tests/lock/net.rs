//! Connections to lock, within a network namespace and between two.

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use soccr::connection::FourTuple;
use soccr::kernel::netns::NetNs;
use soccr_testkit::netns::{self, End, veth};
use soccr_testkit::sandbox::connected;
pub use soccr_testkit::sandbox::expect_bytes as expect;

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
        let (client, server) = connected(to);
        Self::of(client, server)
    }

    /// A connection from the client `from`, where the server listens on `listen` but is reached at `to`.
    pub fn of(client: TcpStream, server: TcpStream) -> Self {
        for end in [&client, &server] {
            end.set_nodelay(true).unwrap();
            end.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
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

/// Whether nothing has arrived at this end, neither bytes nor a FIN nor a RST.
pub fn is_silent(end: &TcpStream) -> bool {
    end.set_nonblocking(true).unwrap();
    let silent = matches!(end.peek(&mut [0]), Err(e) if e.kind() == ErrorKind::WouldBlock);
    end.set_nonblocking(false).unwrap();
    silent
}

/// Another network namespace.
pub struct OtherNs {
    /// The namespace.
    pub ns: NetNs,
    _same: netns::NetNs,
}

impl OtherNs {
    /// A new namespace, joined to this one by a veth: 10.9.0.1 and fd09::1 here, …2 there.
    pub fn joined() -> Self {
        let (here, there) = (netns::NetNs::current().unwrap(), netns::NetNs::new().unwrap());
        let end = |ns, name, addresses| End { ns, name, addresses };
        veth(
            end(&here, "here", &["10.9.0.1/24", "fd09::1/64"]),
            end(&there, "there", &["10.9.0.2/24", "fd09::2/64"]),
        )
        .unwrap();
        Self { ns: NetNs::open(Path::new(&there.path())).unwrap(), _same: there }
    }

    /// A connection from this namespace to a server there, at `to` (10.9.0.2 or fd09::2).
    pub fn connect(&self, to: &str) -> Pair {
        let listener =
            self.ns.run(|| TcpListener::bind(SocketAddr::new(to.parse().unwrap(), 0))).unwrap().unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Pair::of(client, listener.accept().unwrap().0)
    }
}
