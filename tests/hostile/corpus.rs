//! The corpora in `fuzz/corpus`, made of stock CRIU's images and a kernel's answers. With `SOCCR_WRITE_CORPUS=1` the
//! tests here write them anew.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use soccr::connection::{ControlBlock, FourTuple, Negotiated, State};
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::side::{self, SideImage, SocketExtra, Sockets};
use soccr::criu::tasks::Owner;
use soccr::criu::warm::CongestionWindow;
use soccr::kernel::netns::NetNs;
use soccr::kernel::options::SocketOption;
use soccr::lock::conntrack::{Direction, Translation};
use soccr::lock::{LockName, LockOptions, Method, NetworkLock};

use crate::support::in_own_network;
use crate::targets::{TARGETS, archive_of};

/// The inputs of a target.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(folder(target)).expect("each target has a corpus").map(Result::unwrap);
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{target} has no corpus");
    paths.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// Stock CRIU's images.
pub fn golden(set: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stock-4.2.1").join(set)
}

/// All files of a folder with their contents.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// An image of the kind that stock CRIU does not have.
pub fn external(local: &str, remote: &str) -> ExternalImage {
    ExternalImage {
        tuple: FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() },
        tcp: ControlBlock {
            state: State::CloseWait,
            recv_len: 4,
            rcv_nxt: 1,
            send_len: 4,
            write_seq: 2,
            unsent_len: 1,
            negotiated: Negotiated { mask: 1, mss_clamp: 1440, wscale: None, timestamp: Some(9) },
            window: None,
        },
        options: vec![SocketOption { level: 6, name: 1, value: vec![1, 0, 0, 0] }],
        shut_rd: true,
        usec_ts_known: true,
        lock_id: Some("soccr-1".into()),
    }
}

/// The content of such an image.
fn external_bytes(local: &str, remote: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    external(local, remote).write(&ImageDir::open(folder.path()).unwrap(), 1, b"recv", b"send").unwrap();
    std::fs::read(folder.path().join(ExternalImage::name(1))).unwrap()
}

/// The content of an image of our own beside CRIU's.
fn side_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let direction = |source: &str, destination: &str| Direction {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    let translation = Translation {
        original: direction("10.9.0.1:40000", "192.0.2.1:7100"),
        reply: direction("10.88.0.2:7000", "10.9.0.1:40000"),
    };
    let mut sockets = Sockets::default();
    for inode in [7, 70_000] {
        let options = vec![SocketOption { level: 6, name: 8, value: vec![7, 0, 0, 0] }];
        sockets.add(
            inode,
            &SocketExtra {
                owner: Owner { uid: inode, gid: 0 },
                options,
                rtt: Some(Duration::from_millis(inode.into())),
                usec_ts: true,
                cwnd: Some(CongestionWindow { segments: 345, silence: None }),
            },
        );
    }
    let side = SideImage {
        id: "soccr-1".into(),
        run_id: Some("1-2".into()),
        translations: [translation].into_iter().collect(),
        sockets,
        ..SideImage::default()
    };
    side.write(&ImageDir::open(folder.path()).unwrap()).unwrap();
    std::fs::read(folder.path().join(side::NAME)).unwrap()
}

/// What the corpora of the image readers consist of: target, name, content.
fn wanted() -> BTreeMap<(&'static str, String), Vec<u8>> {
    let mut wanted = BTreeMap::new();
    for set in ["inside", "outside"] {
        let files = contents(&golden(set));
        for (name, content) in &files {
            let target = match name.split('-').next().unwrap() {
                "tcp" => "tcp_stream",
                "inventory.img" => "inventory",
                "nftables" => "nftables",
                _ => continue,
            };
            // Few: each is a seed of its own only if it differs in kind.
            let new =
                wanted.values().all(|old: &Vec<u8>| old.len() != content.len() || target == "inventory");
            if new {
                wanted.insert((target, format!("{set}-{name}")), content.clone());
            }
        }
        let files = files.iter().filter(|(name, _)| !name.starts_with("nftables"));
        let archive = archive_of(files.map(|(name, content)| (name.as_str(), content.as_slice())));
        wanted.insert(("index", set.to_owned()), archive);
    }
    wanted.insert(("external", "v4".into()), external_bytes("10.0.0.1:1", "10.0.0.2:2"));
    wanted.insert(("external", "v6".into()), external_bytes("[fe80::1%2]:1", "[fe80::2]:2"));
    wanted.insert(("side", "all".into()), side_bytes());
    let text = b"table inet quiet { # a comment\n\tset s { elements = { \"}\" } }\n}\ntable ip nat {\n}\n";
    wanted.insert(("nftables", "quiet".into()), text.to_vec());
    wanted
}

fn writing() -> bool {
    std::env::var("SOCCR_WRITE_CORPUS").is_ok_and(|value| value == "1")
}

#[test]
fn the_corpora_are_small_and_made_of_the_goldens() {
    for ((target, name), content) in wanted() {
        let path = folder(target).join(&name);
        if writing() {
            std::fs::create_dir_all(folder(target)).unwrap();
            std::fs::write(&path, &content).unwrap();
        }
        assert!(std::fs::read(&path).unwrap() == content, "{} is stale", path.display());
    }
    let total: usize = TARGETS.iter().map(|(target, _)| corpus(target).concat().len()).sum();
    assert!(total < 200_000, "{total} bytes");
}

/// The kernel's answers to the requests that a lock makes: lists, an acknowledgement, refusals.
#[test]
fn the_kernels_own_answers_are_understood() {
    in_own_network(|| {
        let tuples = [("10.0.0.1:1", "10.0.0.2:2"), ("[fd00::1]:1", "[fd00::2]:2")].map(|(local, remote)| {
            FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
        });
        let name = LockName::criu("corpus").unwrap();
        let options = LockOptions { method: Method::Nftables, lease: None, log: None };
        let lock = NetworkLock::lock(&NetNs::current().unwrap(), &name, &tuples, &options).unwrap();
        let table = name.as_str();
        let [v4, v6] = tuples.map(|tuple| octets(tuple.remote));
        let in_table: &[&[u8]] = &[table.as_bytes()];
        for (file, request, told) in [
            ("tables", request(1, DUMP, &[]), in_table),
            ("chains", request(4, DUMP, &[]), in_table),
            ("rules", request(7, DUMP, &[]), in_table),
            ("elements4", request(13, DUMP, &[(1, table), (2, "conns4")]), &[&v4]),
            ("elements6", request(13, DUMP, &[(1, table), (2, "conns6")]), &[&v6]),
            (
                "refused",
                request(13, DUMP, &[(1, "no such table"), (2, "conns4")]),
                &[&(-libc::ENOENT).to_ne_bytes()],
            ),
            ("acknowledged", request(1, libc::NLM_F_ACK, &[(1, table)]), in_table),
        ] {
            let answer = ask(&request);
            for part in told {
                assert!(answer.windows(part.len()).any(|bytes| bytes == *part), "{file}: {answer:x?}");
            }
            crate::targets::netlink(&answer);
            if writing() {
                std::fs::create_dir_all(folder("netlink")).unwrap();
                std::fs::write(folder("netlink").join(file), answer).unwrap();
            }
        }
        lock.unlock().unwrap();
    });
}

const DUMP: i32 = libc::NLM_F_DUMP;

fn octets(address: std::net::SocketAddr) -> Vec<u8> {
    match address.ip() {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// A request to nf_tables with string attributes.
fn request(message: u16, flags: i32, attributes: &[(u16, &str)]) -> Vec<u8> {
    const HEADERS: usize = 20;
    let mut out = vec![0; HEADERS];
    for (kind, value) in attributes {
        let length = u16::try_from(4 + value.len() + 1).unwrap();
        out.extend(length.to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend(value.as_bytes());
        out.resize(out.len() + 1 + (4 - usize::from(length) % 4) % 4, 0);
    }
    let length = u32::try_from(out.len()).unwrap();
    out[0..4].copy_from_slice(&length.to_ne_bytes());
    out[4..6].copy_from_slice(&((10 << 8) | message).to_ne_bytes());
    out[6..8].copy_from_slice(&u16::try_from(libc::NLM_F_REQUEST | flags).unwrap().to_ne_bytes());
    out[16] = if attributes.is_empty() { 0 } else { 1 }; // NFPROTO_UNSPEC, NFPROTO_INET
    out
}

/// All datagrams of the answer, each behind its length.
fn ask(request: &[u8]) -> Vec<u8> {
    let socket: OwnedFd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter)
            .unwrap();
    setsockopt(&socket, sockopt::RcvBuf, &65536).unwrap();
    send(socket.as_raw_fd(), request, MsgFlags::empty()).unwrap();
    let (mut out, mut buffer) = (Vec::new(), vec![0; 32 << 10]);
    while let Ok(length) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
        out.extend(u16::try_from(length).unwrap().to_le_bytes());
        out.extend(&buffer[..length]);
    }
    out
}
