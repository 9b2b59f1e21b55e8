//! `soccr save` and `soccr restore`: connections go from one program to the next, their clients busy meanwhile.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use soccr::kernel::netns::NetNs;
use soccr::kernel::{sockopt, tcp};
use soccr::lock;
use soccr_testkit::{Client, Fleet, Pace};
use support::{Soccr, connected, expect_bytes, in_own_network, lacks, program};

/// Debian's: another one on PATH may be a script that looks for it.
const PYTHON: &str = "/usr/bin/python3";
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the records and the files of connections are.
struct Host {
    dir: tempfile::TempDir,
}

impl Soccr for Host {
    fn command(&self) -> Command {
        let mut command = program();
        command.env("SOCCR_RUN_DIR", self.path("run"));
        command
    }
}

impl Host {
    fn new() -> Self {
        let status = Command::new("ip").args(["address", "add", "192.0.2.1/32", "dev", "lo"]).status();
        assert!(status.expect("ip runs").success());
        Self { dir: tempfile::tempdir().expect("a folder") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn images(&self) -> String {
        self.path("images").to_str().expect("a plain path").to_owned()
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> = fs::read_dir(self.path("images"))
            .map(|entries| entries.map(|entry| entry.expect("an entry").path()).collect())
            .unwrap_or_default();
        files.sort();
        files
    }

    fn save(&self, pid: u32, arguments: &[&str]) -> Value {
        let (pid, images) = (pid.to_string(), self.images());
        self.json(&[&["save", "--pid", &pid, "-D", &images], arguments].concat())
    }

    fn save_refused(&self, pid: u32, arguments: &[&str]) -> String {
        let (pid, images) = (pid.to_string(), self.images());
        let why = self.refused(&[&["save", "--pid", &pid, "-D", &images], arguments].concat());
        assert!(self.files().is_empty(), "{:?}", self.files());
        self.is_clean();
        why
    }

    /// The connections in another echo server.
    fn restore(&self) -> Server {
        self.restore_with(&[])
    }

    fn restore_with(&self, arguments: &[&str]) -> Server {
        let mut command = self.command();
        command.args(["restore", "-D", &self.images()]).args(arguments).args(["--", PYTHON]).arg(script());
        let server = Server::start(&mut command);
        assert!(self.files().is_empty());
        self.is_clean();
        server
    }

    /// Nothing is left of a save or a restore.
    fn is_clean(&self) {
        assert_eq!(self.done(&["status"]), "");
        assert_eq!(lock::list(&here()).expect("locks"), []);
    }

    /// Its state and how many connections it has.
    fn record(&self) -> (Value, Value) {
        let status = self.json(&["status"]);
        assert_eq!(status["strays"], json!([]));
        let record = &status["records"][0];
        (record["state"].clone(), record["connections"].clone())
    }
}

fn here() -> NetNs {
    NetNs::current().expect("a namespace")
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/echo.py")
}

/// An echo server, ended with this value.
struct Server {
    child: Child,
    says: Lines<BufReader<ChildStdout>>,
    /// What it has said of itself.
    ready: String,
}

impl Server {
    fn listening() -> Self {
        Self::start(Command::new(PYTHON).arg(script()))
    }

    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it runs");
        let says = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let mut server = Self { child, says, ready: String::new() };
        server.ready = server.said();
        assert!(server.ready.starts_with("ready"), "{}", server.ready);
        server
    }

    fn address(&self) -> SocketAddr {
        self.ready["ready ".len()..].parse().expect("an address")
    }

    fn clients(&self, count: usize) -> Vec<Client> {
        let mut clients: Vec<_> =
            (0..count).map(|_| Client::connect(self.address()).expect("a client")).collect();
        clients.iter_mut().for_each(|client| client.ping(1).expect("an echo"));
        clients
    }

    fn said(&mut self) -> String {
        self.says.next().expect("it says something").expect("text")
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The descriptor of its connection with this client.
    fn fd_of(&self, host: &Host, client: &Client) -> String {
        let peer = tcp_name(client);
        let list = host.json(&["list", "--pid", &self.pid().to_string()]);
        let sockets = list["sockets"].as_array().expect("a list");
        let socket = sockets.iter().find(|socket| socket["remote"] == json!(peer)).expect("the connection");
        socket["owners"][0]["fd"].to_string()
    }

    fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("its state");
        stat.rsplit_once(") ").expect("a state").1.starts_with('T')
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tcp_name(client: &Client) -> String {
    soccr::repair::four_tuple(client.as_fd()).expect("connected").local.to_string()
}

#[test]
fn busy_connections_go_from_program_to_program() {
    in_own_network(|| {
        let host = Host::new();
        let mut first = Server::listening();
        let fleet = Fleet::echoes(first.clients(50), Pace::FAST).expect("clients");
        let told = host.save(first.pid(), &["--all"]);
        assert_eq!(told["connections"].as_array().expect("a list").len(), 50, "{told}");
        assert_eq!(host.record(), (json!("dumped"), json!(50)));
        // It lives, and finds the end of each stream.
        (0..50).for_each(|_| assert_eq!(first.said(), "end"));
        assert!(!first.is_stopped());
        for file in host.files() {
            assert_eq!(file.metadata().expect("a file").permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(host.path("images").metadata().expect("a folder").permissions().mode() & 0o777, 0o700);
        let shown = host.json(&["show", &host.images()]);
        assert_eq!(shown["connections"].as_array().expect("a list").len(), 50);
        let second = host.restore();
        drop(first);
        // Once more, from the second to a third.
        host.save(second.pid(), &["--all"]);
        let _third = host.restore();
        drop(second);
        fleet.stop(PATIENCE).whole().expect("no client has noticed");
    });
}

/// Whoever calls is in another namespace.
#[test]
fn a_restore_makes_its_sockets_in_the_namespace_that_it_is_told() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let mut clients = server.clients(3);
        host.save(server.pid(), &["--all"]);
        let elsewhere = soccr_testkit::NetNs::new().expect("a namespace");
        let there = soccr_testkit::NetNs::current().expect("this one");
        let missing = elsewhere.run(|| host.refused(&["restore", "-D", &host.images(), "--", "true"]));
        assert!(missing.contains("choose with --netns"), "{missing}");
        let _second = elsewhere.run(|| host.restore_with(&["--netns", &there.path()]));
        drop(server);
        clients.iter_mut().for_each(|client| client.ping(1000).expect("an echo"));
        host.is_clean();
    });
}

#[test]
fn connections_go_over_a_unix_socket() {
    in_own_network(|| {
        let host = Host::new();
        let first = Server::listening();
        let fleet = Fleet::echoes(first.clients(300), Pace::FAST).expect("clients");
        host.save(first.pid(), &["--all"]);
        let unix = host.path("unix");
        let unix = unix.to_str().expect("a plain path");
        let nobody = host.refused(&["restore", "-D", &host.images(), "--unix", unix]);
        assert!(nobody.contains(unix) && nobody.contains("No such file"), "{nobody}");
        assert_eq!(host.record().0, json!("dumped"));
        let mut second = Server::start(Command::new(PYTHON).arg(script()).arg(unix));
        let told = host.json(&["restore", "-D", &host.images(), "--unix", unix]);
        assert_eq!(told, json!({ "sent": 300 }));
        assert_eq!(second.said(), "received");
        host.is_clean();
        drop(first);
        fleet.stop(PATIENCE).whole().expect("no client has noticed");
    });
}

/// cat on descriptor 3 gets the one, the others stay.
#[test]
fn one_connection_goes_by_its_descriptor() {
    in_own_network(|| {
        let host = Host::new();
        let first = Server::listening();
        let mut clients = first.clients(3);
        let fd = first.fd_of(&host, &clients[1]);
        host.save(first.pid(), &["--fd", &fd]);
        clients[1].send(10_000).expect("it is in the lock, and sent again");
        clients[0].ping(1000).expect("it has stayed");
        let script =
            "[ $LISTEN_FDS = 1 ] && [ $LISTEN_PID = $$ ] && [ $LISTEN_FDNAMES = fd$0 ] && exec cat <&3 >&3";
        let mut command = host.command();
        command.args(["restore", "-D", &host.images(), "--", "sh", "-c", script, &fd]);
        let mut cat = command.spawn().expect("it runs");
        clients[1].receive_echo(10_000).expect("an echo of cat");
        clients.iter_mut().for_each(|client| client.ping(1000).expect("an echo"));
        host.is_clean();
        clients[1].finish().expect("a FIN");
        assert!(cat.wait().expect("its end").success());
    });
}

#[test]
fn a_look_leaves_the_connections_where_they_are() {
    in_own_network(|| {
        let host = Host::new();
        let first = Server::listening();
        let fleet = Fleet::echoes(first.clients(20), Pace::FAST).expect("clients");
        let told = host.save(first.pid(), &["--all", "--keep"]);
        assert_eq!(told["id"], Value::Null);
        host.is_clean();
        assert_eq!(host.files().len(), 20);
        assert!(!first.is_stopped());
        // They are alive where they are, so nobody else gets them; and they go on.
        let why = host.refused(&["restore", "-D", &host.images(), "--", "true"]);
        assert!(why.contains("192.0.2.1"), "{why}");
        host.done(&["clean", "--all"]);
        host.is_clean();
        let again = host.refused(&["save", "--pid", &first.pid().to_string(), "--all", "-D", &host.images()]);
        assert!(again.contains("holds connections already"), "{again}");
        fleet.stop(PATIENCE).whole().expect("no client has noticed");
    });
}

#[test]
fn what_cannot_be_saved_is_named_and_lives_on() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let mut clients = server.clients(2);
        for (arguments, why) in [
            (["--fd", "0"], "fd 0: not a TCP socket"),
            (["--fd", "99"], "fd 99: not a TCP socket"),
            (["--fd", "3"], "fd 3: not a TCP socket"), // epoll's
        ] {
            let said = host.save_refused(server.pid(), &arguments);
            assert!(said.contains(why), "{said}");
        }
        assert!(host.save_refused(2_147_483_647, &["--all"]).contains("pid 2147483647: "));
        let listener = host.json(&["list", "--pid", &server.pid().to_string()]);
        let listener = listener["sockets"].as_array().expect("a list").iter();
        let listener =
            listener.clone().find(|socket| socket["state"] == json!("LISTEN")).expect("a listener");
        let said = host.save_refused(server.pid(), &["--fd", &listener["owners"][0]["fd"].to_string()]);
        assert!(said.contains("a socket without a peer"), "{said}");
        // All or none.
        let fd = server.fd_of(&host, &clients[1]);
        send(clients[1].as_fd().as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("urgent data");
        kill_and_wait(&server, Signal::SIGSTOP);
        send(clients[1].as_fd().as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("urgent data");
        let said = host.save_refused(server.pid(), &["--all"]);
        assert!(said.contains("urgent") && said.contains(&tcp_name(&clients[1])), "{said}");
        assert!(said.contains("1 of 2 cannot be saved"), "{said}");
        assert!(server.is_stopped(), "as it was before");
        kill(Pid::from_raw(server.pid().cast_signed()), Signal::SIGCONT).expect("continued");
        clients[0].ping(1000).expect("it lives");
        drop(fd);
    });
}

fn kill_and_wait(server: &Server, signal: Signal) {
    kill(Pid::from_raw(server.pid().cast_signed()), signal).expect("signalled");
    while !server.is_stopped() {
        std::thread::yield_now();
    }
}

#[test]
fn a_folder_that_is_full_ends_nothing() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let mut clients = server.clients(10);
        fs::create_dir(host.images()).expect("a folder");
        let mut command = Command::new("unshare");
        let mount = "mount -t tmpfs -o size=16k tmpfs \"$0\" && exec \"$@\"";
        command.args(["-m", "sh", "-c", mount, &host.images()]).arg(program().get_program());
        command.args(["save", "--pid", &server.pid().to_string(), "--all", "-D", &host.images()]);
        let output = command.env("SOCCR_RUN_DIR", host.path("run")).output().expect("unshare runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(said.contains("cannot write") && said.contains("No space left"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        host.is_clean();
        clients.iter_mut().for_each(|client| client.ping(100).expect("an echo"));
    });
}

#[test]
fn mptcp_is_refused_by_name() {
    in_own_network(|| {
        let host = Host::new();
        let make = || sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP);
        let (Ok(listener), Ok(client)) = (make(), make()) else {
            return lacks("this kernel has no MPTCP");
        };
        tcp::bind(listener.as_fd(), "192.0.2.1:7100".parse().expect("an address")).expect("bind");
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).expect("small"))
            .expect("listen");
        tcp::connect(client.as_fd(), "192.0.2.1:7100".parse().expect("an address")).expect("connect");
        let mut cat = Command::new("cat").stdin(Stdio::from(client)).spawn().expect("cat runs");
        let said = host.save_refused(cat.id(), &["--all"]);
        assert!(said.contains("MPTCP") && said.contains("192.0.2.1:7100"), "{said}");
        cat.kill().expect("killed");
        cat.wait().expect("its end");
    });
}

/// Its child has the connection as well, and would meet a socket in repair mode.
#[test]
fn whoever_has_the_socket_stands_still() {
    in_own_network(|| {
        let host = Host::new();
        let (theirs, mut peer) = connected("192.0.2.1:0");
        let socket = || Stdio::from(std::os::fd::OwnedFd::from(theirs.try_clone().expect("a copy")));
        let mut shell = Command::new("sh");
        let mut shell =
            shell.args(["-c", "cat; exit 7"]).stdin(socket()).stdout(socket()).spawn().expect("sh");
        drop(theirs);
        peer.write_all(b"to cat").expect("sent");
        expect_bytes(&mut peer, b"to cat");
        host.save(shell.id(), &["--fd", "0"]);
        // cat, which waited in read(), has found the end, and not an error.
        assert_eq!(shell.wait().expect("its end").code(), Some(7));
        peer.write_all(b"to another").expect("sent");
        let mut command = host.command();
        command.args(["restore", "-D", &host.images(), "--", "sh", "-c", "cat <&3 >&3"]);
        let mut cat = command.spawn().expect("it runs");
        expect_bytes(&mut peer, b"to another");
        peer.shutdown(std::net::Shutdown::Write).expect("a FIN");
        assert!(cat.wait().expect("its end").success());
        host.is_clean();
    });
}

#[test]
fn a_restore_that_fails_can_be_tried_again() {
    in_own_network(|| {
        let host = Host::new();
        let first = Server::listening();
        let fleet = Fleet::echoes(first.clients(10), Pace::FAST).expect("clients");
        host.save(first.pid(), &["--all"]);
        let images = host.images();
        let waits = || {
            assert_eq!(host.record(), (json!("dumped"), json!(10)));
            assert_eq!(host.files().len(), 10);
        };
        let why = host.refused(&["restore", "-D", &images, "--", "/nonexistent/program"]);
        assert!(why.contains("/nonexistent/program: there is no such program"), "{why}");
        waits();
        // The kernel finds out only when nobody can be told any more.
        let broken = host.path("broken");
        fs::write(&broken, "#!/nonexistent/interpreter").expect("written");
        fs::set_permissions(&broken, PermissionsExt::from_mode(0o755)).expect("executable");
        let why = host.refused(&["restore", "-D", &images, "--", broken.to_str().expect("a plain path")]);
        assert!(why.contains("cannot run") && why.contains("again"), "{why}");
        waits();
        let lost = host.files().remove(3);
        let moved = host.path("elsewhere");
        fs::rename(&lost, &moved).expect("moved");
        let why = host.refused(&["restore", "-D", &images, "--", "true"]);
        assert!(why.contains("9 of the 10 connections"), "{why}");
        fs::rename(moved, lost).expect("moved back");
        waits();
        let address = |verb| {
            let status = Command::new("ip").args(["address", verb, "192.0.2.1/32", "dev", "lo"]).status();
            assert!(status.expect("ip runs").success());
        };
        address("delete");
        let why = host.refused(&["restore", "-D", &images, "--", "true"]);
        assert!(why.contains("EADDRNOTAVAIL"), "{why}");
        waits();
        address("add");
        let _second = host.restore();
        drop(first);
        fleet.stop(PATIENCE).whole().expect("no client has noticed");
    });
}

#[test]
fn a_save_can_be_given_up() {
    in_own_network(|| {
        let host = Host::new();
        let first = Server::listening();
        let _clients = first.clients(2);
        host.save(first.pid(), &["--all"]);
        host.done(&["release", &host.images()]);
        host.is_clean();
    });
}

#[test]
fn two_looks_are_compared() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let mut clients = server.clients(2);
        let [old, new] =
            ["old", "new"].map(|name| host.path(name).to_str().expect("a plain path").to_owned());
        let look = |at: &str| {
            let pid = server.pid().to_string();
            host.done(&["save", "--pid", &pid, "--all", "--keep", "-D", at]);
        };
        look(&old);
        kill_and_wait(&server, Signal::SIGSTOP);
        clients[0].send(100).expect("sent");
        let list = || host.json(&["list", "--pid", &server.pid().to_string()]);
        let arrived = |socket: &Value| socket["receive_queue"] == json!(100);
        while !list()["sockets"].as_array().expect("a list").iter().any(arrived) {}
        look(&new);
        let output = host.soccr(&["diff", "--json", &old, &new]);
        assert_eq!(output.status.code(), Some(1));
        let diff: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(
            (&diff["gone"], &diff["added"], &diff["unchanged"]),
            (&json!({}), &json!({}), &json!(1)),
            "{diff}"
        );
        let name = format!("{} → {}", server.address(), tcp_name(&clients[0]));
        let queue = &diff["changed"][&name]["receive queue"];
        assert_eq!((&queue["old"], &queue["new"]), (&json!("0"), &json!("100")), "{diff}");
        let text = String::from_utf8(host.soccr(&["diff", &old, &new]).stdout).expect("text");
        assert!(text.contains("    receive queue: 0 → 100\n"), "{text}");
        // A file is compared as well as a folder of one.
        let file = |folder: &str| {
            let fd = server.fd_of(&host, &clients[1]).parse::<u32>().expect("a number");
            format!("{folder}/soccr-ext-{fd:x}.img")
        };
        assert_eq!(host.json(&["diff", &file(&old), &file(&new)])["unchanged"], json!(1));
        assert!(host.done(&["show", &file(&new)]).contains(&tcp_name(&clients[1])));
        let one_gone = host.soccr(&["diff", &old, &file(&new)]);
        let text = String::from_utf8(one_gone.stdout).expect("text");
        assert!(text.starts_with(&format!("- {name}: ESTABLISHED, 0 to read, 0 to send\n")), "{text}");
        assert!(text.ends_with("1 gone, 0 added, 0 changed, 1 the same\n"), "{text}");
        kill(Pid::from_raw(server.pid().cast_signed()), Signal::SIGCONT).expect("continued");
        clients[0].receive_echo(100).expect("an echo");
    });
}

/// The files go to a host where the connections are held before they come. The two hosts differ by their records.
#[test]
fn a_save_goes_to_another_host() {
    in_own_network(|| {
        let here = Host::new();
        let there = Host { dir: tempfile::tempdir().expect("a folder") };
        let first = Server::listening();
        let fleet = Fleet::echoes(first.clients(10), Pace::FAST).expect("clients");
        here.save(first.pid(), &["--all"]);
        let copied = Command::new("cp").args(["-r", &here.images(), &there.images()]).status();
        assert!(copied.expect("cp runs").success());
        there.done(&["hold", &there.images()]);
        here.done(&["release", &here.images()]);
        assert_eq!(there.record(), (json!("dumped"), json!(10)));
        let _second = there.restore();
        fleet.stop(PATIENCE).whole().expect("no client has noticed");
    });
}

/// For peers that are known to be silent.
#[test]
fn a_save_can_do_without_a_lock() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let mut client = TcpStream::connect(server.address()).expect("a client");
        client.write_all(b"x").expect("sent");
        expect_bytes(&mut client, b"x");
        let run = |arguments: &[&str]| {
            let output =
                host.command().args(arguments).env("SOCCR_LOCK", "skip").output().expect("soccr runs");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).expect("text")
        };
        let said = run(&["save", "--pid", &server.pid().to_string(), "--all", "-D", &host.images()]);
        assert!(said.ends_with(" now, and not locked\n"), "{said}");
        assert_eq!(fs::read_dir(host.path("run")).expect("the records").count(), 0);
        run(&["restore", "-D", &host.images(), "--", "sh", "-c", "echo hello >&3"]);
        expect_bytes(&mut client, b"hello\n");
        assert_eq!(fs::read_dir(host.path("run")).expect("the records").count(), 0);
    });
}

/// Files can come from anybody, and claim the lock of another save as theirs.
#[test]
fn files_release_no_lock_of_another_save() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let clients = server.clients(2);
        let save = |client| {
            let told = host.save(server.pid(), &["--fd", &server.fd_of(&host, client)]);
            told["id"].as_str().expect("an id").to_owned()
        };
        let victim = save(&clients[0]);
        fs::rename(host.path("images"), host.path("kept")).expect("moved");
        let own = save(&clients[1]);
        let file = host.files().remove(0);
        let mut bytes = fs::read(&file).expect("the file");
        let at = bytes.windows(own.len()).position(|part| part == own.as_bytes()).expect("its lock");
        bytes[at..at + own.len()].copy_from_slice(victim.as_bytes());
        fs::write(&file, bytes).expect("written");
        let refused = |why: &str| {
            let said = host.refused(&["restore", "-D", &host.images(), "--", "true"]);
            assert!(said.contains(why), "{said}");
            assert_eq!(lock::list(&here()).expect("locks").len(), 2);
        };
        refused("hold other connections than it locked");
        // A record and its lock need not have one name.
        let run = host.path("run");
        let record = fs::read_to_string(run.join(&victim)).expect("the record");
        let renamed = record.replacen(&format!("\"id\":\"{victim}\""), "\"id\":\"another\"", 1);
        fs::write(run.join("another"), renamed).expect("written");
        fs::remove_file(run.join(&victim)).expect("removed");
        refused("which is that of another");
        host.done(&["clean", "--all"]);
        host.is_clean();
    });
}

/// Whoever cannot write to /run has records of his own.
#[test]
fn records_are_where_the_user_can_write() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let _clients = server.clients(1);
        let without_run = |variable: Option<&str>, arguments: &[&str]| {
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-c", "mount -t tmpfs -o ro tmpfs /run && exec \"$@\"", "sh"]);
            command.arg(program().get_program()).args(arguments).env_remove("SOCCR_RUN_DIR");
            command.env("XDG_RUNTIME_DIR", host.dir.path());
            variable.into_iter().for_each(|folder| {
                command.env("SOCCR_RUN_DIR", folder);
            });
            let output = command.output().expect("unshare runs");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).expect("text")
        };
        let pid = server.pid().to_string();
        without_run(None, &["save", "--pid", &pid, "--all", "-D", &host.images()]);
        assert_eq!(fs::read_dir(host.path("soccr")).expect("the records").count(), 1);
        assert!(without_run(None, &["status"]).contains("dumped"));
        let elsewhere = host.path("run");
        assert!(!without_run(elsewhere.to_str(), &["status"]).contains("dumped"));
        without_run(None, &["release", &host.images()]);
        host.is_clean();
    });
}

/// A lock that has gone since, such as by a lease, is told: the peers may have been reset.
#[test]
fn a_lock_that_is_gone_is_told() {
    in_own_network(|| {
        let host = Host::new();
        let first = Server::listening();
        let mut client = TcpStream::connect(first.address()).expect("a client");
        client.write_all(b"x").expect("sent");
        expect_bytes(&mut client, b"x");
        host.save(first.pid(), &["--all"]);
        let [lock] = &lock::list(&here()).expect("locks")[..] else { panic!("one lock") };
        lock::remove(&here(), lock.method, &lock.name).expect("removed");
        let output = host.soccr(&["restore", "-D", &host.images(), "--", "sh", "-c", "echo hello >&3"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("is gone"), "{output:?}");
        expect_bytes(&mut client, b"hello\n"); // it was silent meanwhile
        host.is_clean();
    });
}

/// Killed before any of its system calls, a save leaves a task that goes on after `soccr clean`, or files that can be
/// restored. The last calls are those in which it is decided.
#[test]
fn a_save_that_is_killed_loses_nothing() {
    in_own_network(|| {
        let host = Host::new();
        let mut server = Server::listening();
        let mut clients = server.clients(3);
        let calls = save_until(&host, &server, u32::MAX);
        assert!(calls > 300, "{calls} system calls");
        server = host.restore();
        let (mut cleaned, mut restored) = (0, 0);
        for kill in (1..20).map(|part| calls * part / 20).chain((calls - 80..calls + 10).step_by(5)) {
            clients.iter_mut().for_each(|client| client.send(100).expect("sent"));
            save_until(&host, &server, kill);
            let status = host.json(&["status"]);
            match status["records"][0]["state"].as_str() {
                None => {}
                Some("orphaned") => {
                    host.done(&["clean", "--orphans"]);
                    cleaned += 1;
                }
                Some("dumped") => {
                    server = host.restore();
                    restored += 1;
                }
                other => panic!("killed before call {kill}: {other:?}"),
            }
            assert!(!server.is_stopped(), "killed before call {kill}");
            host.is_clean();
            let _ = fs::remove_dir_all(host.images());
            for client in &mut clients {
                client
                    .receive_echo(100)
                    .unwrap_or_else(|error| panic!("killed before call {kill}: {error:#}"));
            }
        }
        assert!(cleaned > 5 && restored > 5, "{cleaned} cleaned, {restored} restored");
    });
}

/// The second one would read sockets that the first one is about to end.
#[test]
fn a_task_is_saved_by_one_at_a_time() {
    in_own_network(|| {
        let host = Host::new();
        let server = Server::listening();
        let mut clients = server.clients(1);
        let pid = server.pid().to_string();
        let elsewhere = host.path("elsewhere");
        let second = || {
            let elsewhere = elsewhere.to_str().expect("a plain path");
            let said = host.refused(&["save", "--pid", &pid, "--all", "-D", elsewhere]);
            assert!(fs::read_dir(elsewhere).is_ok_and(|mut files| files.next().is_none()));
            said
        };
        run_while(&host, &["save", "--pid", &pid, "--all", "-D", &host.images()], |_| {
            let begun = fs::read_dir(host.path("run")).is_ok_and(|mut records| {
                records
                    .any(|record| !record.expect("a record").file_name().to_string_lossy().starts_with('.'))
            });
            if begun {
                let said = second();
                assert!(said.contains("is frozen, and has this task"), "{said}");
            }
            !begun
        });
        host.done(&["clean", "--orphans"]);
        host.is_clean();
        clients[0].ping(10).expect("it goes on");
        // What is left of one that was killed is not taken for the program's own.
        run_while(&host, &["save", "--pid", &pid, "--all", "-D", &host.images()], |_| {
            host.files().is_empty()
        });
        assert_eq!(host.record().0, json!("orphaned"));
        let said =
            host.refused(&["save", "--pid", &pid, "--all", "-D", elsewhere.to_str().expect("a plain path")]);
        assert!(said.contains("in repair mode"), "{said}");
        host.done(&["clean", "--orphans"]);
        clients[0].ping(10).expect("it goes on");
        host.is_clean();
    });
}

/// Killed before any of its system calls, a restore can be tried again; until the lock goes, when the sockets are the
/// command's own and end with it.
#[test]
fn a_restore_that_is_killed_can_be_tried_again() {
    in_own_network(|| {
        let host = Host::new();
        let mut server = Server::listening();
        let mut clients = server.clients(3);
        let mut tries = 0;
        for kill in (1..).step_by(47) {
            clients.iter_mut().for_each(|client| client.send(100).expect("sent"));
            host.save(server.pid(), &["--all"]);
            run_until(&host, &["restore", "-D", &host.images(), "--", "true"], kill);
            if lock::list(&here()).expect("locks").is_empty() {
                break;
            }
            assert_eq!(host.record(), (json!("dumped"), json!(3)), "killed before call {kill}");
            server = host.restore();
            for client in &mut clients {
                client
                    .receive_echo(100)
                    .unwrap_or_else(|error| panic!("killed before call {kill}: {error:#}"));
            }
            tries += 1;
        }
        assert!(tries > 8, "{tries} tries");
    });
}

fn save_until(host: &Host, server: &Server, last: u32) -> u32 {
    run_until(host, &["save", "--pid", &server.pid().to_string(), "--all", "-D", &host.images()], last)
}

/// Kills the command when it is about to do its system call number `last`. How many it did.
fn run_until(host: &Host, arguments: &[&str], last: u32) -> u32 {
    run_while(host, arguments, |call| call < last)
}

/// Kills the command at the first system call that is not to be. How many it did.
#[allow(clippy::zombie_processes)] // waitpid() waits for it
fn run_while(host: &Host, arguments: &[&str], mut may: impl FnMut(u32) -> bool) -> u32 {
    let mut command = Command::new("sh");
    command.args(["-c", "kill -STOP $$; exec \"$@\"", "sh"]).arg(program().get_program()).args(arguments);
    let child =
        command.env("SOCCR_RUN_DIR", host.path("run")).stdout(Stdio::null()).spawn().expect("sh runs");
    let pid = Pid::from_raw(child.id().cast_signed());
    waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it stops");
    let options = ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_TRACEEXEC;
    ptrace::seize(pid, options).expect("PTRACE_SEIZE");
    kill(pid, Signal::SIGCONT).expect("continued");
    let (mut counting, mut entries, mut inside) = (false, 0, false);
    loop {
        let mut signal = None;
        match waitpid(pid, None).expect("its state") {
            WaitStatus::PtraceSyscall(_) if counting => {
                inside = !inside;
                entries += u32::from(inside);
                if inside && !may(entries) {
                    kill(pid, Signal::SIGKILL).expect("killed");
                    waitpid(pid, None).expect("its end");
                    return entries;
                }
            }
            WaitStatus::PtraceEvent(_, _, event) if event == libc::PTRACE_EVENT_EXEC => {
                (counting, inside) = (true, true); // its end comes next
            }
            WaitStatus::Stopped(_, with) => signal = Some(with),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return entries,
            _ => {}
        }
        ptrace::syscall(pid, signal).expect("PTRACE_SYSCALL");
    }
}

/// Nobody listens any more where connections were accepted.
#[test]
fn a_client_and_its_server_both_go() {
    in_own_network(|| {
        let host = Host::new();
        let listener = TcpListener::bind("192.0.2.1:0").expect("a listener");
        let ours = TcpStream::connect(listener.local_addr().expect("bound")).expect("a client");
        let (theirs, _) = listener.accept().expect("a connection");
        drop(listener);
        let socket = |stream: TcpStream| Stdio::from(std::os::fd::OwnedFd::from(stream));
        let mut cat =
            Command::new("cat").stdin(socket(ours)).stdout(socket(theirs)).spawn().expect("cat runs");
        host.save(cat.id(), &["--all"]);
        assert_eq!(host.files().len(), 2, "both ends");
        assert!(cat.wait().expect("its end").success());
        let script =
            "echo hello >&3; read -r said <&4; [ \"$said\" = hello ] && [ $LISTEN_FDNAMES = fd0:fd1 ]";
        host.done(&["restore", "-D", &host.images(), "--", "sh", "-c", script]);
        host.is_clean();
    });
}
