//! `soccr list` and `soccr check --pid` on this very process, in a network namespace of its own.

mod support;

use std::io::{IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use soccr::kernel::sockopt;
use soccr::kernel::tcp::{self, Repair};
use soccr_testkit::sockets::ebpf_filter;
use support::{connected, in_own_network, lacks, program, skip};

fn soccr(arguments: &[&str]) -> Output {
    let pid = std::process::id().to_string();
    let mut command = program();
    command.args(arguments).args(["--pid", &pid]).output().expect("soccr runs")
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// What `check --pid` finds, and whether it is content.
fn findings() -> (Vec<(String, String)>, bool) {
    let output = soccr(&["check", "--json"]);
    let report = json_of(&output);
    let findings = report["findings"].as_array().expect("a list").iter();
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let findings = findings.map(|finding| (text(&finding["socket"]), text(&finding["what"]))).collect();
    (findings, output.status.success())
}

/// The one thing that is in the way.
fn the_finding() -> (String, String) {
    let (mut findings, content) = findings();
    assert!(!content && findings.len() == 1, "{findings:?}");
    findings.remove(0)
}

/// Segments may be on their way for a moment, even here; the test's own limit of time ends a wait in vain.
fn until(there: impl Fn() -> bool) {
    while !there() {
        std::thread::yield_now();
    }
}

/// Connections that nobody has accepted yet.
fn waiting(listener: &TcpListener) -> u32 {
    tcp::info(listener.as_fd()).expect("TCP_INFO").unacked
}

fn name(stream: &TcpStream) -> String {
    format!("{} → {}", stream.local_addr().expect("an address"), stream.peer_addr().expect("an address"))
}

#[test]
fn sockets_are_listed_with_their_queues_and_all_descriptors() {
    in_own_network(|| {
        let (mut ours, theirs) = connected("127.0.0.1:0");
        let copy = theirs.try_clone().expect("a copy");
        ours.write_all(b"hello").expect("sent");
        ours.set_nodelay(true).expect("TCP_NODELAY");
        let (v6, _v6) = connected("[::1]:0");
        v6.shutdown(std::net::Shutdown::Write).expect("a FIN");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("an address").to_string();
        let _waits = TcpStream::connect(&address).expect("connect");
        until(|| waiting(&listener) == 1 && tcp::receive_queue_len(theirs.as_fd()).expect("SIOCINQ") == 5);
        let list = json_of(&soccr(&["list", "--json"]));
        let sockets = list["sockets"].as_array().expect("a list");
        let of = |local: String, remote: Option<String>| {
            let mut found =
                sockets.iter().filter(|s| s["local"] == json!(local) && s["remote"] == json!(remote));
            found.next().unwrap_or_else(|| panic!("{local} {remote:?} in {list}"))
        };
        let at = |stream: &TcpStream| {
            of(stream.local_addr().unwrap().to_string(), Some(stream.peer_addr().unwrap().to_string()))
        };
        let receiver = at(&theirs);
        assert_eq!((&receiver["state"], &receiver["receive_queue"]), (&json!("ESTABLISHED"), &json!(5)));
        let mut fds: Vec<u64> =
            receiver["owners"].as_array().unwrap().iter().map(|o| o["fd"].as_u64().unwrap()).collect();
        fds.sort_unstable();
        let mut want = [&theirs, &copy].map(|stream| u64::try_from(stream.as_raw_fd()).unwrap());
        want.sort_unstable();
        assert_eq!(fds, want);
        let options = at(&ours)["options"].as_array().unwrap().clone();
        assert!(options.contains(&json!("nodelay")) && options.contains(&json!("sack")), "{options:?}");
        assert!(!receiver["options"].as_array().unwrap().contains(&json!("nodelay")));
        // Whether or not the FIN is acknowledged by now, it is no byte to send.
        let closing = at(&v6);
        assert!(closing["state"].as_str().unwrap().starts_with("FIN_WAIT"), "{closing}");
        assert_eq!(closing["send_queue"], json!(0));
        let waiting = of(address.clone(), None);
        assert_eq!((&waiting["state"], &waiting["receive_queue"]), (&json!("LISTEN"), &json!(1)));
        let here = soccr::kernel::netns::NetNs::current().expect("a namespace").to_string();
        assert!(sockets.iter().all(|socket| socket["net_ns"] == json!(here)));
        let table = String::from_utf8(soccr(&["list"]).stdout).expect("text");
        assert!(table.starts_with("LOCAL") && table.contains(&address), "{table}");
    });
}

#[test]
fn a_tree_is_looked_at_to_its_leaves() {
    in_own_network(|| {
        let (ours, mut theirs) = connected("127.0.0.1:0");
        let stdin = Stdio::from(std::os::fd::OwnedFd::from(ours));
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", "cat; true"]).stdin(stdin).stdout(Stdio::piped()).spawn();
        let mut shell = shell.expect("sh runs");
        theirs.write_all(b"x").expect("sent");
        shell.stdout.as_mut().expect("a pipe").read_exact(&mut [0]).expect("cat runs");
        let list = json_of(&soccr(&["list", "--json"]));
        let sockets = list["sockets"].as_array().expect("a list");
        let of_shell = |owner: &Value| owner == &json!({ "pid": shell.id(), "fd": 0 });
        let held: Vec<_> = sockets.iter().flat_map(|s| s["owners"].as_array().expect("a list")).collect();
        assert!(held.iter().any(|owner| of_shell(owner)), "{list}");
        assert_eq!(held.iter().filter(|owner| owner["fd"] == json!(0)).count(), 2, "sh and cat: {list}");
        drop(theirs);
        shell.wait().expect("its end");
    });
}

#[test]
fn what_can_be_carried_is_counted_and_left_as_it_is() {
    in_own_network(|| {
        let _pair = connected("127.0.0.1:0");
        let _listener = TcpListener::bind("[::1]:0").expect("bind");
        let output = soccr(&["check"]);
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stdout).expect("text");
        assert!(said.contains("2 connections of"), "{said}");
    });
}

#[test]
fn an_mptcp_listener_is_found() {
    in_own_network(|| {
        let Ok(socket) = sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP) else {
            return lacks("this kernel has no MPTCP");
        };
        tcp::bind(socket.as_fd(), "127.0.0.1:7100".parse().expect("an address")).expect("bind");
        nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(1).expect("small")).expect("listen");
        let (socket, what) = the_finding();
        assert!(socket == "127.0.0.1:7100" && what.contains("MPTCP"), "{socket}: {what}");
        let said = String::from_utf8(soccr(&["check"]).stdout).expect("text");
        assert!(said.contains("GODEBUG=multipathtcp=0"), "{said}");
        let list = json_of(&soccr(&["list", "--json"]));
        assert_eq!(list["sockets"][0]["protocol"], json!("mptcp"), "{list}");
    });
}

#[test]
fn connections_that_nobody_accepted_are_found() {
    in_own_network(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let to = listener.local_addr().expect("an address");
        let _waiting = [TcpStream::connect(to).expect("connect"), TcpStream::connect(to).expect("connect")];
        until(|| waiting(&listener) == 2);
        let (socket, what) = the_finding();
        assert!(
            socket == to.to_string() && what.starts_with("2 connections wait to be accepted"),
            "{socket}: {what}"
        );
        listener.accept().expect("accepted");
        listener.accept().expect("accepted");
        assert!(findings().1);
    });
}

#[test]
fn urgent_data_is_found_until_it_is_read() {
    in_own_network(|| {
        let (ours, theirs) = connected("127.0.0.1:0");
        let send =
            |bytes: &[u8], flags| nix::sys::socket::send(ours.as_raw_fd(), bytes, flags).expect("sent");
        let receive = |length, flags| {
            let mut bytes = vec![0; length];
            nix::sys::socket::recv(theirs.as_raw_fd(), &mut bytes, flags).expect("received")
        };
        for inline in [false, true] {
            sockopt::set_oob_inline(theirs.as_fd(), inline).expect("SO_OOBINLINE");
            send(b"abc", MsgFlags::MSG_OOB);
            send(b"def", MsgFlags::empty());
            // Until the segments are there, whichever way they come.
            until(|| findings().0.iter().any(|(_, what)| what.contains("urgent data is unread")));
            let (socket, _) = the_finding();
            assert_eq!(socket, name(&theirs));
            assert_eq!(receive(10, MsgFlags::empty()), 2, "up to the mark");
            assert!(!findings().1, "the mark comes next");
            let mut left = if inline { 4 } else { 3 };
            while left > 0 {
                left -= receive(10, MsgFlags::empty());
            }
            assert!(findings().1, "the mark is read over");
        }
    });
}

#[test]
fn signed_segments_are_found() {
    in_own_network(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let socket = sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP).expect("a socket");
        let keyed = [listener.as_fd(), socket.as_fd()]
            .map(|fd| sockopt::set_bytes(fd, libc::SOL_TCP, libc::TCP_MD5SIG, &key()));
        if keyed.iter().any(Result::is_err) {
            return lacks("this kernel has no TCP-MD5");
        }
        let (at, what) = the_finding();
        assert_eq!(at, listener.local_addr().expect("an address").to_string());
        assert!(what.contains("TCP-MD5"), "{what}");
        tcp::connect(socket.as_fd(), listener.local_addr().expect("an address")).expect("connect");
        let _accepted = listener.accept().expect("accepted");
        let (findings, content) = findings();
        assert!(
            !content && findings.len() == 3 && findings.iter().all(|(_, what)| what.contains("TCP-MD5")),
            "{findings:?}"
        );
    });
}

#[test]
fn an_ebpf_filter_is_found() {
    // Not in a network of its own, where who owns the namespace loads no program.
    let (ours, _theirs) = connected("127.0.0.1:0");
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let filter = match ebpf_filter() {
        Ok(filter) => filter,
        Err(error) => return skip(&format!("{error:#}")),
    };
    for (socket, named) in [
        (ours.as_fd(), name(&ours)),
        (listener.as_fd(), listener.local_addr().expect("an address").to_string()),
    ] {
        let set = |name, value: &[u8]| sockopt::set_bytes(socket, libc::SOL_SOCKET, name, value);
        set(libc::SO_ATTACH_BPF, &filter.as_raw_fd().to_ne_bytes()).expect("SO_ATTACH_BPF");
        let (at, what) = the_finding();
        assert!(at == named && what.contains("SO_ATTACH_BPF"), "{at}: {what}");
        set(libc::SO_DETACH_FILTER, &[0; 4]).expect("SO_DETACH_FILTER");
        assert!(findings().1);
    }
}

/// `struct tcp_md5sig` for a peer at 127.0.0.1.
fn key() -> Vec<u8> {
    let mut key = vec![0; 216];
    key[..2].copy_from_slice(&u16::try_from(libc::AF_INET).expect("small").to_ne_bytes());
    key[4..8].copy_from_slice(&[127, 0, 0, 1]);
    key[130..132].copy_from_slice(&6_u16.to_ne_bytes());
    key[136..142].copy_from_slice(b"secret");
    key
}

#[test]
fn what_a_killed_dump_left_is_found() {
    in_own_network(|| {
        let (ours, _theirs) = connected("127.0.0.1:0");
        tcp::set_repair(ours.as_fd(), Repair::On).expect("TCP_REPAIR");
        let (socket, what) = the_finding();
        assert!(socket == name(&ours) && what.contains("in repair mode"), "{socket}: {what}");
        assert!(tcp::in_repair(ours.as_fd()).expect("TCP_REPAIR"), "nothing is changed");
    });
}

#[test]
fn descriptors_in_flight_are_told_and_not_touched() {
    in_own_network(|| {
        let (ours, _theirs) = connected("127.0.0.1:0");
        let (here, there) = UnixStream::pair().expect("a pair");
        let fds = [ours.as_raw_fd()];
        let data = [IoSlice::new(b"x")];
        let rights = [ControlMessage::ScmRights(&fds)];
        sendmsg::<()>(here.as_raw_fd(), &data, &rights, MsgFlags::empty(), None).expect("sent");
        let (findings, content) = findings();
        assert!(content, "it is not in the way");
        assert!(
            matches!(&findings[..], [(_, what)] if what.starts_with("1 descriptors wait")),
            "{findings:?}"
        );
        drop(there);
    });
}

#[test]
fn a_capability_that_is_missing_is_named() {
    in_own_network(|| {
        let _pair = connected("127.0.0.1:0");
        for command in ["list", "check"] {
            let mut setpriv = Command::new("setpriv");
            setpriv.args([
                "--inh-caps=-all",
                "--bounding-set=-all",
                env!("CARGO_BIN_EXE_soccr"),
                command,
                "--pid",
            ]);
            let output = setpriv.arg(std::process::id().to_string()).output().expect("setpriv runs");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && said.contains("CAP_SYS_PTRACE is missing"), "{said}");
        }
    });
}

#[test]
fn a_task_that_is_not_there_is_named() {
    let output = program().args(["list", "--pid", "2147483647"]).output();
    let output = output.expect("soccr runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("pid 2147483647") && said.contains("ESRCH"), "{said}");
}

#[test]
fn a_closed_pipe_is_no_error() {
    for arguments in [&["--version"][..], &["check"], &["check", "--json"]] {
        let mut command = program();
        command.args(arguments).env("HOME", "/nonexistent").env("PATH", "");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = command.stdout(writer).stderr(Stdio::piped()).output().expect("soccr runs");
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}
