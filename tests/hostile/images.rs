//! Damaged and malicious images: every reader ends with an error or a result, in memory bounded by
//! the files, and never panics.

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;

use protobuf::{Message, MessageField};
use soccr::connection::{Queues, State};
use soccr::criu::image::container::{COMMON, Magic, Reader};
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::Index;
use soccr::criu::image::inventory::{Inventory, release_to_stock};
use soccr::criu::image::nftables::strip_table;
use soccr::criu::image::proto::fdinfo::File_entry;
use soccr::criu::image::proto::fown::Fown_entry;
use soccr::criu::image::proto::sk_inet::Inet_sk_entry;
use soccr::criu::image::proto::sk_opts::Sk_opts_entry;
use soccr::criu::image::side::{self, SideImage, SocketExtra, Sockets};
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::image::{Fault, ImageDir, ImageError};
use soccr::criu::tasks::Owner;
use soccr::kernel::options::SocketOption;
use soccr::lock::conntrack::{Direction, Translation};

use crate::corpus::{contents, external, golden};
use crate::memory::{ALLOWANCE, peak_of};

/// A copy of stock's images together with one of each kind that stock does not write.
struct Victim {
    folder: tempfile::TempDir,
    files: BTreeMap<String, Vec<u8>>,
}

impl Victim {
    fn new() -> Self {
        // Thousands of files are written: on a disk, ext4 would write each of them out at once.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        for entry in std::fs::read_dir(golden("outside")).unwrap().map(Result::unwrap) {
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        let image = external("[fe80::1%2]:1", "[fe80::2]:2");
        image.write(&ImageDir::open(folder.path()).unwrap(), 7, b"recv", b"send").unwrap();
        let files = contents(folder.path());
        Self { folder, files }
    }

    fn put(&self, name: &str, content: &[u8]) {
        std::fs::write(self.folder.path().join(name), content).unwrap();
    }

    /// Reads all that can be read, and returns the errors.
    fn read(&self) -> Vec<ImageError> {
        let dir = ImageDir::open(self.folder.path()).unwrap();
        let mut errors = Vec::new();
        let mut queues = Queues::default();
        let index = Index::read(&dir).map_err(|e| errors.push(e)).ok();
        for name in self.files.keys() {
            let hex = name.strip_prefix("tcp-stream-").and_then(|rest| rest.strip_suffix(".img"));
            let Some(ino) = hex.map(|hex| u32::from_str_radix(hex, 16).unwrap()) else { continue };
            let state = index.as_ref().and_then(|i| i.connections.values().find(|c| c.ino == ino));
            let state = state.map_or(State::Established, |found| found.state);
            errors.extend(TcpStreamImage::read(&dir, ino, state, &mut queues).err());
        }
        errors.extend(ExternalImage::read(&dir, 7, &mut queues).err());
        errors.extend(SideImage::read(&dir).err());
        errors
    }

    /// Changes what the plugin changes. The files are whole again after [`restore`](Self::restore).
    fn rewrite(&self) -> Vec<ImageError> {
        let dir = ImageDir::open(self.folder.path()).unwrap();
        let mut errors: Vec<_> = release_to_stock(&dir, Some("ours")).err().into_iter().collect();
        errors.extend(strip_table(&dir, "inet", "quiet").err());
        errors
    }

    fn restore(&self, name: &str) {
        for name in [name, "inventory.img", "nftables-9.img"] {
            self.put(name, &self.files[name]);
        }
    }
}

/// Where a container's messages end: a file cut there is a shorter, good one.
fn message_ends(dir: &Path, name: &str, magic: Magic) -> Vec<usize> {
    let mut reader = Reader::open(&ImageDir::open(dir).unwrap(), name, magic).unwrap();
    let mut end = 8;
    let mut ends = vec![end];
    while let Some(message) = reader.next_bytes().unwrap() {
        end += 4 + message.len();
        ends.push(end);
    }
    ends
}

#[test]
fn a_cut_file_is_an_error_that_names_it() {
    let victim = Victim::new();
    assert!(victim.read().is_empty() && victim.files.len() > 15);
    for (name, content) in &victim.files {
        let repeated = match name.split(['-', '.']).next().unwrap() {
            "nftables" => continue, // text has no end of its own
            "files" => message_ends(victim.folder.path(), name, Magic::Files),
            "fdinfo" => message_ends(victim.folder.path(), name, Magic::Fdinfo),
            "pstree" => message_ends(victim.folder.path(), name, Magic::Pstree),
            "sk" => vec![8, 8 + 4 + 4 + 5], // after a packet's entry come its bytes
            _ => Vec::new(),
        };
        for length in 0..content.len() {
            victim.put(name, &content[..length]);
            let errors = victim.read();
            if repeated.contains(&length) {
                continue;
            }
            assert!(!errors.is_empty(), "{name} cut to {length} bytes");
            for error in errors {
                let ImageError::Malformed { file, offset, .. } = &error else { panic!("{error}") };
                assert!(file == name && *offset <= length as u64, "{name} cut to {length}: {error}");
            }
        }
        victim.restore(name);
    }
}

#[test]
fn bytes_after_the_end_are_an_error() {
    let victim = Victim::new();
    for (name, content) in victim.files.iter().filter(|(n, _)| n.starts_with("tcp") || n.starts_with("soccr"))
    {
        victim.put(name, &[content, &b"x"[..]].concat());
        let errors = victim.read();
        let [ImageError::Malformed { file, offset, fault: Fault::Trailing(1) }] = &errors[..] else {
            panic!("{name}: {errors:?}")
        };
        assert_eq!((file, *offset), (name, content.len() as u64));
        victim.restore(name);
    }
}

/// A length of ten million wherever one may stand: the memory it asks for is not taken.
#[test]
fn no_length_is_believed() {
    const LENGTH: [u8; 4] = [0x80, 0xad, 0xe2, 0x04];
    let victim = Victim::new();
    for (name, content) in &victim.files {
        // Most of a core image is registers, which are not decoded.
        let step = if name.starts_with("core") { 16 } else { 1 };
        for at in (0..content.len()).step_by(step) {
            for key in [&[][..], &[0x5a], &[0x82, 0x01]] {
                let mut content = content.clone();
                content.splice(at..at, [key, &LENGTH].concat());
                victim.put(name, &content);
                let peak = peak_of(|| drop(victim.read()));
                assert!(peak < 1 << 20, "{name}, byte {at}: {peak} bytes of memory");
            }
        }
        victim.restore(name);
    }
}

/// The shortest entry of a connection that is complete.
fn shortest_connection(id: u32) -> Vec<u8> {
    let fown = Fown_entry {
        uid: Some(0),
        euid: Some(0),
        signum: Some(0),
        pid_type: Some(0),
        pid: Some(0),
        ..Default::default()
    };
    let opts = Sk_opts_entry {
        so_sndbuf: Some(0),
        so_rcvbuf: Some(0),
        so_snd_tmo_sec: Some(0),
        so_snd_tmo_usec: Some(0),
        so_rcv_tmo_sec: Some(0),
        so_rcv_tmo_usec: Some(0),
        ..Default::default()
    };
    let isk = Inet_sk_entry {
        id: Some(id),
        ino: Some(0),
        family: Some(2),
        type_: Some(1),
        proto: Some(6),
        state: Some(1),
        src_port: Some(1),
        dst_port: Some(1),
        flags: Some(0),
        backlog: Some(0),
        src_addr: vec![1],
        dst_addr: vec![1],
        fown: MessageField::some(fown),
        opts: MessageField::some(opts),
        ..Default::default()
    };
    let isk = isk.write_to_bytes().unwrap();
    [&[0x22, u8::try_from(isk.len()).unwrap()][..], &isk].concat()
}

/// As much as it has in the files of stock CRIU, so that no image of a real dump is refused for its size.
#[test]
fn a_connection_takes_no_more_memory_than_stock_has_bytes_for_it() {
    const CONNECTIONS: u32 = 20_000;
    let victim = Victim::new();
    victim.put("files.img", &messages(Magic::Files, (0..CONNECTIONS).map(shortest_connection)));
    let dir = ImageDir::open(victim.folder.path()).unwrap();
    let mut found = 0;
    let peak = peak_of(|| found = Index::read(&dir).unwrap().connections.len());
    assert_eq!(found, CONNECTIONS as usize);
    let each = peak / u64::from(CONNECTIONS);
    let stocks = shortest_of_stock();
    println!("{each} bytes of memory a connection, {stocks} in the file");
    assert!(each <= stocks + 12, "{each} bytes of memory for a connection, {stocks} in the file");
}

/// The length in bytes of the shortest entry of a connection that stock CRIU wrote.
fn shortest_of_stock() -> u64 {
    let dir = ImageDir::open(&golden("outside")).unwrap();
    let connections = Index::read(&dir).unwrap().connections;
    let mut files = Reader::open(&dir, "files.img", Magic::Files).unwrap();
    let mut shortest = u64::MAX;
    while let Some(file) = files.next_message::<File_entry>().unwrap() {
        if connections.get(&file.id()).is_some() {
            shortest = shortest.min(4 + file.compute_size());
        }
    }
    shortest
}

/// A container of these messages.
fn messages(magic: Magic, messages: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut out = container(magic, &[], 0);
    for message in messages {
        out.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
        out.extend(message);
    }
    out
}

/// An unread packet without a byte in the queue of the unix socket `id`.
fn queued(id: u32, rights: &[u8]) -> Vec<u8> {
    let mut id = protobuf_varint(id);
    id.insert(0, 0x08);
    [&id[..], &[0x10, 0], rights].concat()
}

fn protobuf_varint(number: u32) -> Vec<u8> {
    let mut out = Vec::new();
    protobuf::CodedOutputStream::vec(&mut out).write_raw_varint32(number).unwrap();
    out
}

fn container(magic: Magic, message: &[u8], times: usize) -> Vec<u8> {
    let mut out = COMMON.to_le_bytes().to_vec();
    out.extend((magic as u32).to_le_bytes());
    for _ in 0..times {
        out.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
        out.extend(message);
    }
    out
}

#[test]
fn memory_is_bounded_by_the_file() {
    const MIB: usize = 1 << 20;
    let name = |kind: &str| {
        let victim = Victim::new();
        victim.files.keys().find(|n| n.starts_with(kind)).unwrap().clone()
    };
    for (name, content) in [
        // A length that the file does not have.
        (name("tcp-stream"), [&container(Magic::TcpStream, &[], 0)[..], &[0xff; 4]].concat()),
        // Queues that the file does not have.
        (name("tcp-stream"), {
            let message = [0x08, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x10, 0, 0x18, 0, 0x20, 0];
            let rest = [0x28, 0, 0x30, 0, 0x38, 0, 0x60, 0];
            container(Magic::TcpStream, &[&message[..], &rest].concat(), 1)
        }),
        // Unknown fields, each of which would be a vector of its own.
        (name("tcp-stream"), container(Magic::TcpStream, &[0xfa, 0x07, 0].repeat(MIB), 1)),
        (name("tcp-stream"), container(Magic::TcpStream, &[0xfa, 0x07, 0].repeat(MIB / 13), 1)),
        ("inventory.img".into(), {
            let message = [0xfa, 0x07, 0].repeat(8 * MIB);
            let mut out = (Magic::Inventory as u32).to_le_bytes().to_vec();
            out.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            [out, message].concat()
        }),
        ("files.img".into(), container(Magic::Files, &[0x1a, 0].repeat(3 * MIB), 1)),
        (
            "files.img".into(),
            container(Magic::Files, &[&[0x22, 0x80, 0x80, 1][..], &[0x58, 0].repeat(8192)].concat(), 600),
        ),
        (name("core"), container(Magic::Core, &[0x12, 0].repeat(3 * MIB), 1)),
        ("pstree.img".into(), container(Magic::Pstree, &[0x28, 1].repeat(3 * MIB), 1)),
        // Empty submessages, the largest that are decoded, and a longer one.
        ("sk-queues.img".into(), container(Magic::SkQueues, &[0x22, 0].repeat(128 << 10), 1)),
        ("sk-queues.img".into(), container(Magic::SkQueues, &[0x22, 0].repeat(MIB), 1)),
        // As many short options as are decoded, of a connection that is good otherwise.
        (ExternalImage::name(7), {
            let good = &Victim::new().files[&ExternalImage::name(7)];
            let length = usize::try_from(u32::from_le_bytes(good[8..12].try_into().unwrap())).unwrap();
            let options = [0x32, 6, 0x08, 0, 0x10, 0, 0x1a, 0].repeat(30 << 10);
            let message = [&good[12..12 + length], &options[..]].concat();
            [&container(Magic::SoccrExternal, &message, 1)[..], &good[12 + length..]].concat()
        }),
        // Many good entries.
        (name("fdinfo"), container(Magic::Fdinfo, &[0x08, 1, 0x10, 0, 0x18, 4, 0x20, 9], MIB)),
        (
            "sk-queues.img".into(),
            container(Magic::SkQueues, &[0x08, 1, 0x10, 0, 0x22, 4, 0x08, 1, 0x10, 1], MIB / 8),
        ),
        // The same where each is of a socket of its own.
        ("sk-queues.img".into(), {
            let rights = [0x22, 4, 0x08, 1, 0x10, 1];
            messages(Magic::SkQueues, (0..80_000).map(|id| queued(id, &rights)))
        }),
        ("sk-queues.img".into(), messages(Magic::SkQueues, (0..300_000).map(|id| queued(id, &[])))),
        // The shortest connections, more than any dump has.
        ("files.img".into(), messages(Magic::Files, (0..120_000).map(shortest_connection))),
        // The shortest entries of a side image, more than any dump has.
        (side::NAME.into(), side_image((0..200_000).map(translated))),
        (side::NAME.into(), side_image((0..300_000).map(|_| listener()))),
        (side::NAME.into(), side_image((0..400_000).map(socket))),
        // And half as many behind something large.
        ("files.img".into(), {
            let large = std::iter::once([0x1a, 0].repeat(3 * MIB));
            messages(Magic::Files, large.chain((0..60_000).map(shortest_connection)))
        }),
    ] {
        let victim = Victim::new();
        victim.put(&name, &content);
        let peak = peak_of(|| {
            victim.read();
            victim.rewrite();
        });
        let limit = content.len() as u64 + ALLOWANCE;
        assert!(peak < limit, "{name} of {} bytes: {peak} bytes of memory", content.len());
        println!("{name} of {} bytes: {peak} bytes of memory", content.len());
    }
}

/// A message in the field `number` of another one.
fn nested(number: u8, message: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, u8::try_from(message.len()).unwrap()][..], message].concat()
}

fn endpoint(port: u8) -> Vec<u8> {
    [&nested(1, &[10, 0, 0, 1])[..], &[0x10, port]].concat()
}

/// An item with the shortest translation.
fn translated(port: u32) -> Vec<u8> {
    let port = port.to_le_bytes()[0] & 0x7f;
    let direction = [nested(1, &endpoint(port)), nested(2, &endpoint(port))].concat();
    nested(1, &[nested(1, &direction), nested(2, &direction)].concat())
}

/// An item with the shortest listener.
fn listener() -> Vec<u8> {
    nested(6, &[nested(1, &endpoint(1)), vec![0x18, 0]].concat())
}

/// An item with the shortest socket.
fn socket(ino: u32) -> Vec<u8> {
    nested(2, &[vec![0x08], protobuf_varint(ino)].concat())
}

/// A side image with these items.
fn side_image(items: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let head = vec![0x08, 2, 0x12, 1, b'1'];
    messages(Magic::SoccrDump, std::iter::once(head).chain(items))
}

/// As many connections as anybody has dumped, each with options, each translated, over IPv6.
#[test]
fn a_large_dump_is_no_hostile_one() {
    const CONNECTIONS: u16 = 60_000;
    let end = |net: u16, port| SocketAddr::from((Ipv6Addr::new(0xfd09, 1, 2, 3, 4, 5, 6, net), port));
    let translation = |port| Translation {
        original: Direction { source: end(1, port), destination: end(2, 50_000) },
        reply: Direction { source: end(3, 50_000), destination: end(1, port) },
    };
    let number = |name, value: u32| SocketOption { level: 6, name, value: value.to_ne_bytes().to_vec() };
    let mut sockets = Sockets::default();
    for ino in 0..u32::from(CONNECTIONS) {
        let options = vec![number(10, 100_000 + ino), number(12, 0)];
        sockets.add(
            100_000 + ino,
            &SocketExtra { owner: Owner { uid: 1000, gid: 1000 }, options, ..SocketExtra::default() },
        );
    }
    let translations = (0..CONNECTIONS).map(translation).collect();
    let image = SideImage { id: "1".into(), translations, sockets, ..SideImage::default() };
    let folder = tempfile::tempdir().unwrap();
    let dir = ImageDir::open(folder.path()).unwrap();
    image.write(&dir).unwrap();
    let read = SideImage::read(&dir).unwrap().unwrap();
    assert_eq!(read.translations.iter().count(), usize::from(CONNECTIONS));
    assert!(read == image);
}

#[test]
fn the_inventory_is_whole_after_any_rewrite() {
    let victim = Victim::new();
    let dir = ImageDir::open(victim.folder.path()).unwrap();
    for length in 0..victim.files["inventory.img"].len() {
        victim.put("inventory.img", &victim.files["inventory.img"][..length]);
        assert!(release_to_stock(&dir, Some("ours")).is_err());
        let left = std::fs::read(victim.folder.path().join("inventory.img")).unwrap();
        assert_eq!(left, victim.files["inventory.img"][..length], "a file that is wrong was changed");
    }
    victim.restore("inventory.img");
    release_to_stock(&dir, Some("ours")).unwrap();
    assert_eq!(Inventory::read(&dir).unwrap().dump_run_id.as_deref(), Some("ours"));
}
