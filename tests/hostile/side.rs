//! `soccr.img` by somebody who knows other connections of this host: their addresses, and even their sequences.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;

use soccr::accept_queue::{self, AcceptQueues, Unavailable};
use soccr::connection::{ControlBlock, FourTuple, Queues, State};
use soccr::criu::image::ImageDir;
use soccr::criu::image::index::Index;
use soccr::criu::image::side::{self, Accepted, Place, SideImage, TreeListener};
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::lock::Listener;
use soccr::lock::held::HeldPackets;
use soccr::repair::{Paused, Probe, four_tuple};

use crate::corpus::golden;
use crate::support::{connected, expect_bytes, in_own_network, lacks, skip};

/// A connection of somebody else, and its near end's state.
struct Stranger {
    near: TcpStream,
    peer: TcpStream,
    tuple: FourTuple,
    tcp: ControlBlock,
}

impl Stranger {
    fn new() -> Self {
        let (near, peer) = connected("127.0.0.1:0");
        let tuple = four_tuple(near.as_fd()).unwrap();
        let paused = Paused::pause(near.as_fd()).unwrap();
        let tcp = paused.save(&mut Queues::default()).unwrap();
        paused.resume(Probe::None).unwrap();
        Self { near, peer, tuple, tcp }
    }

    /// What its peer could have sent, with these flags.
    fn segment(&self, flags: u8, bytes: &[u8]) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(self.tuple.remote.port().to_be_bytes());
        segment.extend(self.tuple.local.port().to_be_bytes());
        segment.extend(self.tcp.rcv_nxt.to_be_bytes());
        segment.extend(self.tcp.write_seq.to_be_bytes());
        segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
        segment.extend(bytes);
        segment
    }

    /// Nothing has reached it, and it goes on.
    fn goes_on(mut self) {
        self.peer.write_all(b"to").unwrap();
        expect_bytes(&mut self.near, b"to");
        self.near.write_all(b"fro").unwrap();
        expect_bytes(&mut self.peer, b"fro");
    }
}

const RST_ACK: u8 = 0x14;
const PSH_ACK: u8 = 0x18;

/// Written and read again.
fn read(image: &SideImage) -> SideImage {
    let folder = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(folder.path()).unwrap();
    image.write(&dir).unwrap();
    SideImage::read(&dir).unwrap().unwrap()
}

#[test]
fn held_segments_reach_only_the_sockets_that_are_restored() {
    in_own_network(|| {
        let (stranger, restored) = (Stranger::new(), Stranger::new());
        let mut held = HeldPackets::default();
        held.add_any(stranger.tuple, &stranger.segment(PSH_ACK, b"evil"));
        held.add_any(stranger.tuple, &stranger.segment(RST_ACK, b""));
        // Of another connection than it is said to be, and none at all.
        held.add_any(restored.tuple, &stranger.segment(PSH_ACK, b"evil"));
        held.add_any(restored.tuple, &[0xff; 7]);
        let image = SideImage { held, ..SideImage::default() };
        read(&image).held.release([(restored.near.as_fd(), restored.tuple)]);
        stranger.goes_on();
        restored.goes_on();
    });
}

#[test]
fn held_segments_are_bounded() {
    let tuple = |port| FourTuple {
        local: "10.0.0.1:1".parse().unwrap(),
        remote: std::net::SocketAddr::new("10.0.0.2".parse().unwrap(), port),
    };
    let mut bytes = Vec::new();
    for port in 1..=60 {
        for seq in 0..300_u32 {
            let mut segment = vec![0; 20 + 4000];
            segment[4..8].copy_from_slice(&(seq * 4000).to_be_bytes());
            segment[12..14].copy_from_slice(&[5 << 4, PSH_ACK]);
            let mut one = HeldPackets::default();
            one.add_any(tuple(port), &segment);
            bytes.extend(side::held_to_bytes(&one));
        }
    }
    assert!(bytes.len() > 60 << 20);
    let held = side::held_from_bytes(&bytes);
    let size: usize = held.iter().map(|(_, segment)| segment.len()).sum();
    assert!((16 << 20..=32 << 20).contains(&size), "{size} bytes");
    let of_one = held.iter().filter(|(it, _)| it.remote.port() == 1).count();
    assert_eq!(of_one, 256);
}

/// The image says that it waited for a listener of the tree, and has the sequences right.
#[test]
fn a_strangers_connection_is_put_into_no_accept_queue() {
    if !nix::unistd::geteuid().is_root() {
        return skip("BPF needs root");
    }
    let own = soccr_testkit::NetNs::new().unwrap();
    let ns = NetNs::open(Path::new(&own.path())).unwrap();
    let queues = match AcceptQueues::open(&ns) {
        Ok(queues) => queues,
        Err(Unavailable::Function | Unavailable::Btf(_)) => return lacks("bpf_sk_assign_tcp_reqsk"),
        Err(error) => panic!("{}", soccr::chain(&error)),
    };
    own.run(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stranger = Stranger::new();
        let tcp = ControlBlock {
            state: State::CloseWait,
            recv_len: 4,
            rcv_nxt: stranger.tcp.rcv_nxt.wrapping_add(4 + 1),
            send_len: 0,
            unsent_len: 0,
            ..stranger.tcp
        };
        let forge = Forge::new();
        let put = queues.put(&forge, listener.as_fd(), &stranger.tuple, &tcp, b"evil", None);
        let error = soccr::chain(&put.unwrap_err());
        assert!(error.contains(&stranger.tuple.to_string()) && error.contains("another socket"), "{error}");
        forge.finish().unwrap();
        assert_eq!(accept_queue::waiting(listener.as_fd()).unwrap(), 0);
        stranger.goes_on();
    });
}

/// Those of listeners that the images do not hold, and those without an image of their own, are none.
#[test]
fn accepted_connections_need_a_listener_and_an_image() {
    let dir = ImageDir::open(&golden("inside")).unwrap();
    let index = Index::read(&dir).unwrap();
    let (listener, stream) = (index.unconnected[0].ino, index.carried().next().unwrap());
    let (tuple, state) = (stream.tuple, State::Established);
    let good = Accepted { listener, ino: stream.ino, tuple, state };
    let accepted = vec![Accepted { listener: 1, ..good }, good, Accepted { ino: 1, ..good }];
    let image = read(&SideImage { accepted, ..SideImage::default() });
    assert_eq!(image.accepted_of(&index, &dir), [good]);
}

#[test]
fn items_that_cannot_be_are_refused_by_name() {
    let refusal = |image: SideImage, place: Option<(u8, u8)>| {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        image.write(&dir).unwrap();
        if let Some((from, to)) = place {
            let path = folder.path().join(side::NAME);
            let mut bytes = std::fs::read(&path).unwrap();
            assert_eq!(bytes.pop(), Some(from));
            bytes.push(to);
            std::fs::write(path, bytes).unwrap();
        }
        soccr::chain(&SideImage::read(&dir).expect_err("it must be refused"))
    };
    let accepted = |local: &str, remote: &str| {
        let tuple = FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() };
        let accepted = vec![Accepted { listener: 1, ino: 2, tuple, state: State::Established }];
        SideImage { accepted, ..SideImage::default() }
    };
    for (local, remote, reason) in [
        ("10.0.0.1:1", "0.0.0.0:7", "unspecified"),
        ("10.0.0.1:1", "10.0.0.2:0", "port is 0"),
        ("10.0.0.1:1", "[::1]:7", "families"),
        ("224.0.0.1:1", "10.0.0.2:7", "multicast"),
    ] {
        let error = refusal(accepted(local, remote), None);
        assert!(error.starts_with("image soccr.img, byte ") && error.contains(reason), "{error}");
    }
    // The place is the item's last byte.
    let listener = Listener { local: "0.0.0.0:80".parse().unwrap(), v6only: false };
    let listeners = vec![TreeListener { listener, place: Place::OnPath }];
    let error = refusal(SideImage { listeners, ..SideImage::default() }, Some((2, 3)));
    assert!(error.contains("place: 3 is not known"), "{error}");
}
