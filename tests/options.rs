//! The table of socket options against the kernel: its headers, and its sockets.

#[path = "support/options.rs"]
mod every;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};

use soccr::kernel::netns::NetNs;
use soccr::kernel::options::{self, Beside, Known, Level, Reader, TABLE, When};
use soccr::kernel::{addr, sockopt, tcp};
use support::{connected, in_own_network};

/// Numbers in the headers that are no option of a socket.
fn is_option(name: &str) -> bool {
    const OTHERS: [&str; 25] = [
        "TCP_MSS_",
        "TCP_REPAIR_ON",
        "TCP_REPAIR_OFF",
        "TCP_MD5SIG_MAX",
        "TCP_MD5SIG_FLAG_",
        "TCP_AO_MAX",
        "TCP_AO_KEYF_",
        "TCP_RECEIVE_ZEROCOPY_",
        "TCP_CM_INQ",
        "IP_PMTUDISC_",
        "IP_DEFAULT_",
        "IPV6_FL_",
        "IPV6_FLOWINFO_",
        "IPV6_PRIORITY_",
        "IPV6_TLV_",
        "IPV6_PMTUDISC_",
        "IPV6_PREFER_SRC_",
        "IPV6_MIN_MTU",
        "IPV6_SRCRT_",
        "IPV6_OPT_ROUTERALERT_",
        "SO_ORIGINAL_DST",
        "IP_MSFILTER_SIZE",
        "SO_EE_",
        "TCP_BPF_",
        "IPV6_USE_MIN_MTU",
    ];
    name == "IPV6_FLOWINFO_SEND" || !OTHERS.iter().any(|other| name.starts_with(other))
}

/// Names of `text` lines such as `#define NAME 7`, or of a list `NAME 7`.
fn numbers(text: &str) -> BTreeMap<String, i32> {
    let define = |line: &str| {
        let mut words = line.trim_start_matches("#define").split_ascii_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(define).filter(|(name, _)| level_of(name).is_some() && is_option(name)).collect()
}

fn level_of(name: &str) -> Option<Level> {
    let (prefix, _) = name.split_once('_')?;
    Some(match prefix {
        "SO" => Level::Socket,
        "TCP" => Level::Tcp,
        "IP" => Level::Ip,
        "IPV6" => Level::Ipv6,
        _ => return None,
    })
}

fn compare(numbers: &BTreeMap<String, i32>, whose: &str) {
    let known = |name: &str, number: i32| {
        TABLE.iter().any(|known| Some(known.level) == level_of(name) && known.name == number)
    };
    let unknown: Vec<_> = numbers.iter().filter(|(name, number)| !known(name, **number)).collect();
    assert!(unknown.is_empty(), "{whose} knows options that the table does not: {unknown:?}");
}

/// All that Linux 6.18 has (tests/data/options-6.18.txt), by the same numbers.
#[test]
fn the_table_has_all_of_linux_6_18() {
    let numbers = numbers(include_str!("data/options-6.18.txt"));
    compare(&numbers, "Linux 6.18");
    for Known { text, name, .. } in TABLE {
        assert_eq!(numbers.get(*text), Some(name), "{text}");
    }
    let once: BTreeSet<_> = TABLE.iter().map(|known| (known.level.number(), known.name)).collect();
    assert_eq!(once.len(), TABLE.len(), "an option stands twice");
}

/// Whatever version this machine's headers are of: a later one brings options that somebody must look at.
#[test]
fn the_table_has_all_of_this_machines_headers() {
    for file in ["asm-generic/socket.h", "linux/tcp.h", "linux/in.h", "linux/in6.h"] {
        match std::fs::read_to_string(format!("/usr/include/{file}")) {
            Ok(text) => compare(&numbers(&text), file),
            Err(error) => soccr_testkit::skip::skip(&format!("no {file}: {error}")).expect("headers"),
        }
    }
}

/// What this kernel has beyond the table would be lost without a word: it is asked for numbers that nobody knows.
#[test]
fn this_kernel_has_no_option_that_the_table_has_not() {
    let socket = sockopt::tcp_socket(true).expect("a socket");
    let mut value = [0; 256];
    for level in [Level::Socket, Level::Tcp, Level::Ip, Level::Ipv6] {
        for name in 0..256 {
            let netfilters =
                level == Level::Ipv6 && (64..=80).contains(&name) || level == Level::Ip && name >= 64;
            let answer = sockopt::get_into(socket.as_fd(), level.number(), name, &mut value);
            let known = netfilters || options::find(level.number(), name).is_some();
            assert!(known || answer.is_err(), "{level:?} {name} is unknown to the table");
        }
    }
}

fn carry(from: BorrowedFd<'_>, to: BorrowedFd<'_>, connected: bool) -> Vec<String> {
    let ns = NetNs::current().expect("namespace");
    let saved = Reader::new(&ns, Beside::Nobody).expect("defaults").read(from, connected).expect("options");
    let mut lost = Vec::new();
    for when in [When::Early, When::Late] {
        options::write(to, &saved, when, |error| lost.push(error.to_string())).expect("set");
    }
    lost
}

/// Every option of a socket never connected and of a listener goes over to a fresh socket; FACTS of one kernel, so what it
/// cannot change is named.
#[test]
fn every_option_goes_over() {
    in_own_network(|| {
        for (ipv6, address) in [(false, "127.0.0.1:0"), (true, "[::1]:0")] {
            let fresh = sockopt::tcp_socket(ipv6).expect("a socket");
            goes_over(fresh.as_fd(), ipv6, &[]);
            let listener = TcpListener::bind(address).expect("bind");
            goes_over(listener.as_fd(), ipv6, &["IPV6_V6ONLY", "TCP_FASTOPEN_CONNECT"]);
        }
    });
}

/// What takes more than a network of one's own: privileges on the host; a cgroup that accounts for memory; segment routing.
const NEEDS_MORE: [&str; 5] =
    ["SO_BUSY_POLL", "SO_DEBUG", "SO_PREFER_BUSY_POLL", "SO_RESERVE_MEM", "IPV6_RTHDR"];

fn goes_over(from: BorrowedFd<'_>, ipv6: bool, but: &[&str]) {
    let unchanged = every::change(from, "lo", &[but, &NEEDS_MORE].concat());
    let has = |name: &&str| ipv6 || level_of(name) != Some(Level::Ipv6);
    let missing: Vec<_> = unchanged.into_iter().filter(has).collect();
    assert!(missing.is_empty(), "not changed: {missing:?}");
    let to = sockopt::tcp_socket(ipv6).expect("a socket");
    let lost = carry(from, to.as_fd(), false);
    assert!(lost.is_empty(), "{lost:?}");
    let (before, after) = (every::all(from), every::all(to.as_fd()));
    for (name, value) in before {
        assert_eq!(after.get(name), Some(&value), "{name}");
    }
}

/// A program that has set nothing costs nothing but what the kernel changes by itself.
#[test]
fn a_plain_connection_has_hardly_any() {
    in_own_network(|| {
        for address in ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"] {
            let (ours, theirs) = connected(address);
            let mut reader =
                Reader::new(&NetNs::current().expect("namespace"), Beside::Criu).expect("defaults");
            for socket in [ours.as_fd(), theirs.as_fd()] {
                let options = reader.read(socket, true).expect("options");
                let names: Vec<_> = options
                    .iter()
                    .filter_map(|option| options::find(option.level, option.name))
                    .map(|known| known.text)
                    .filter(|name| !["TCP_WINDOW_CLAMP", "TCP_QUICKACK"].contains(name))
                    .collect();
                assert!(names.is_empty(), "{address}: {names:?}");
            }
        }
    });
}

/// What an image says is not believed.
#[test]
fn options_of_images_are_checked() {
    let socket = sockopt::tcp_socket(false).expect("a socket");
    let option = |level, name| options::SocketOption { level, name, value: vec![1, 0, 0, 0] };
    for bad in [
        option(libc::SOL_TCP, libc::TCP_REPAIR),
        option(libc::SOL_SOCKET, libc::SO_ATTACH_BPF),
        option(libc::SOL_IP, libc::IP_HDRINCL),
        option(999, 1),
    ] {
        let written = options::write(socket.as_fd(), &[bad], When::Early, |_| {});
        assert!(written.is_err());
    }
}

/// A target may lack a congestion control algorithm, which is named; a device to be bound to it must not lack.
#[test]
fn what_the_target_lacks_is_named() {
    let socket = sockopt::tcp_socket(false).expect("a socket");
    let option = |level, name, value: &[u8]| [options::SocketOption { level, name, value: value.to_vec() }];
    let mut lost = Vec::new();
    let algorithm = option(libc::SOL_TCP, libc::TCP_CONGESTION, b"none-such");
    options::write(socket.as_fd(), &algorithm, When::Late, |error| lost.push(error.to_string()))
        .expect("the rest");
    assert_eq!(lost, ["cannot set TCP_CONGESTION: ENOENT: No such file or directory"]);
    let device = option(libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"none-such");
    let written = options::write(socket.as_fd(), &device, When::Early, |_| panic!("no default will do"));
    assert_eq!(
        written.expect_err("no such device").to_string(),
        "cannot set SO_BINDTODEVICE: ENODEV: No such device"
    );
}

/// Why programs that choose among the listeners of a port are lost, and not refused by name: whatever can be asked answers the
/// same with one. The only call that tells takes it away.
#[test]
fn a_reuseport_program_cannot_be_seen() {
    in_own_network(|| {
        let sockets = [(); 2].map(|()| sockopt::tcp_socket(false).expect("a socket"));
        let mut address = "127.0.0.1:0".parse().expect("an address");
        for socket in &sockets {
            sockopt::set_reuse_port(socket.as_fd(), true).expect("SO_REUSEPORT");
            tcp::bind(socket.as_fd(), address).expect("bind");
            nix::sys::socket::listen(socket, nix::sys::socket::Backlog::new(8).expect("8")).expect("listen");
            address = addr::local(socket.as_fd()).expect("an address");
        }
        let shown = || -> Vec<_> { sockets.iter().map(|socket| all_that_is_shown(socket.as_fd())).collect() };
        let before = shown();
        // Return 0: the first listener.
        let instruction = [6_u16.to_ne_bytes(), [0; 2], [0; 2], [0; 2]].concat();
        let length = 1_u64.to_ne_bytes(); // struct sock_fprog: u16 and padding, then the pointer
        let program = [length, (instruction.as_ptr() as u64).to_ne_bytes()].concat();
        let set = |name, value: &[u8]| {
            sockopt::set_bytes(sockets[0].as_fd(), libc::SOL_SOCKET, name, value).map_err(|error| error.errno)
        };
        set(libc::SO_ATTACH_REUSEPORT_CBPF, &program).expect("attached");
        assert_eq!(before, shown(), "the kernel shows it: it can be refused by name");
        const SO_DETACH_REUSEPORT_BPF: i32 = 68;
        assert_eq!(set(SO_DETACH_REUSEPORT_BPF, &[0; 4]), Ok(()), "there was one");
        assert_eq!(
            set(SO_DETACH_REUSEPORT_BPF, &[0; 4]),
            Err(nix::errno::Errno::ENOENT),
            "now there is none"
        );
    });
}

/// Every option of every number, what sock_diag and /proc tell, but for clocks.
fn all_that_is_shown(socket: BorrowedFd<'_>) -> (Vec<Option<Vec<u8>>>, String) {
    const CLOCKS: [(Level, i32); 2] = [(Level::Tcp, libc::TCP_INFO), (Level::Tcp, libc::TCP_TIMESTAMP)];
    let mut value = [0; 4096];
    let mut options = Vec::new();
    for level in [Level::Socket, Level::Tcp, Level::Ip, Level::Ipv6] {
        for name in (0..256).filter(|name| !CLOCKS.contains(&(level, *name))) {
            let length = sockopt::get_into(socket, level.number(), name, &mut value);
            options.push(length.ok().map(|length| value[..length].to_vec()));
        }
    }
    let script = "ss -tlnepmib --tos --cgroup --inet-sockopt && cat /proc/net/tcp";
    let output = std::process::Command::new("sh").args(["-c", script]).output().expect("sh runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (options, String::from_utf8_lossy(&output.stdout).into_owned())
}

/// docs/FIDELITY.md is the table.
#[test]
fn fidelity_is_documented() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/FIDELITY.md");
    let text = options::fidelity();
    if std::env::var_os("SOCCR_PRINT").is_some() {
        std::fs::write(path, &text).expect("written");
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(there == text, "docs/FIDELITY.md is old: SOCCR_PRINT=1 cargo test --test options fidelity");
}
