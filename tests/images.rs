//! Images that stock CRIU dumped: read, understood, written back; and what is left of them after
//! every kind of damage. `tests/data/stock-4.2.1/README.md` tells what is in them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use protobuf::Message;
use soccr::connection::{FourTuple, OPT_SACK, OPT_TIMESTAMPS, OPT_WSCALE, Queues, State};
use soccr::criu::image::container::{COMMON, Magic, Reader};
use soccr::criu::image::index::{Index, InetConnection, readdress};
use soccr::criu::image::inventory::{Inventory, NetworkLock, release_to_stock};
use soccr::criu::image::nftables::strip_table;
use soccr::criu::image::proto::{core, fdinfo, inventory, pstree, sk_packet, tcp_stream};
use soccr::criu::image::side::SideImage;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::image::{Fault, ImageDir, ImageError, ImageMessage};
use soccr::criu::rules::{Remap, Rules};
use soccr::lock::conntrack::{Direction, Translation};

const SETS: [&str; 2] = ["inside", "outside"];

fn golden(set: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stock-4.2.1").join(set)
}

fn open(path: &Path) -> ImageDir {
    ImageDir::open(path).unwrap()
}

/// All files of a set with their content.
fn files(set: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(golden(set)).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), std::fs::read(e.path()).unwrap())).collect()
}

/// A copy of a set that a test may spoil.
fn copy(set: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files(set) {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

fn connection(index: &Index, client_port: u16) -> (u32, &InetConnection) {
    let mut found = index.connections.iter().filter(|(_, c)| c.tuple.remote.port() == client_port);
    let (id, connection) = found.next().unwrap();
    assert!(found.next().is_none());
    (*id, connection)
}

fn tuple(local: &str, remote: &str) -> FourTuple {
    FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
}

#[test]
fn index_finds_every_connection() {
    for set in SETS {
        let index = Index::read(&open(&golden(set))).unwrap();
        assert_eq!(index.connections.len(), 6, "listeners and UDP are no connections");
        for (port, local, remote, state) in [
            (8001, "127.0.0.1:7001", "127.0.0.1:8001", State::Established),
            (8002, "127.0.0.1:7001", "127.0.0.1:8002", State::CloseWait),
            (8003, "[::1]:7002", "[::1]:8003", State::Established),
            (8004, "[::ffff:127.0.0.1]:7002", "[::ffff:127.0.0.1]:8004", State::Established),
            (8005, "127.0.0.1:7001", "127.0.0.1:8005", State::Established),
            (8006, "127.0.0.1:7001", "127.0.0.1:8006", State::Established),
        ] {
            let (_, found) = connection(&index, port);
            assert_eq!((found.tuple, found.state), (tuple(local, remote), state));
            assert!(found.has_stream);
            assert_eq!(found.reuseport, Some(port == 8003));
            assert_eq!((found.shutdown_read, found.shutdown_write), (matches!(port, 8002 | 8004), false));
            assert_eq!((&found.ifname, &found.bound_device), (&None, &None));
            let outside = set == "outside";
            assert_eq!(found.net_ns_id != index.root_net_ns_id, outside, "{found:?}");
        }
    }
}

#[test]
fn index_knows_tasks_and_descriptors() {
    for set in SETS {
        let index = Index::read(&open(&golden(set))).unwrap();
        let [(_, server), (_, child), (_, zombie)] = index.tasks.iter().collect::<Vec<_>>()[..] else {
            panic!("three tasks expected, got {:?}", index.tasks)
        };
        assert_eq!(index.root, index.tasks.keys().next().copied());
        assert_eq!([server.alive, child.alive, zombie.alive], [true, true, false]);
        assert_ne!(server.files_id, child.files_id);
        assert_eq!((zombie.files_id, zombie.net_ns_id, zombie.fds.len()), (None, None, 0));
        assert_eq!(server.net_ns_id, connection(&index, 8001).1.net_ns_id);
        let has = |task: &soccr::criu::image::index::DumpedTask, port| {
            let id = connection(&index, port).0;
            task.fds.iter().filter(|fd| fd.file_id == id).count()
        };
        for (port, in_server, in_child) in
            [(8001, 1, 0), (8002, 1, 0), (8003, 1, 1), (8004, 1, 1), (8005, 0, 1), (8006, 0, 0)]
        {
            assert_eq!((has(server, port), has(child, port)), (in_server, in_child), "{port}");
        }
        assert!(server.fds.iter().any(|fd| fd.fd == 0));
    }
}

#[test]
fn index_knows_descriptors_in_flight() {
    for set in SETS {
        let index = Index::read(&open(&golden(set))).unwrap();
        let [(receiver, packets)] = index.in_flight.iter().collect::<Vec<_>>()[..] else {
            panic!("one socket expected, got {:?}", index.in_flight)
        };
        assert!(index.tasks.values().any(|task| task.fds.iter().any(|fd| fd.file_id == *receiver)));
        let [packet] = &packets[..] else { panic!("one packet expected, got {packets:?}") };
        assert_eq!((packet.offset, packet.position, packet.length), (5, 1, 4));
        assert_eq!(*packet.files, [connection(&index, 8006).0]);
    }
}

#[test]
fn inventory_tells_the_lock() {
    let inside = Inventory::read(&open(&golden("inside"))).unwrap();
    let outside = Inventory::read(&open(&golden("outside"))).unwrap();
    assert_eq!((inside.network_lock, outside.network_lock), (NetworkLock::Skip, NetworkLock::Nftables));
    assert!(!inside.tcp_close && !outside.tcp_close);
    assert_eq!(outside.dump_run_id.unwrap().len(), 36);
}

#[test]
fn streams_hold_state_and_queues() {
    for set in SETS {
        let dir = open(&golden(set));
        let index = Index::read(&dir).unwrap();
        let mut queues = Queues::default();
        let mut read = |port| {
            let (_, found) = connection(&index, port);
            let image = TcpStreamImage::read(&dir, found.ino, found.state, &mut queues).unwrap();
            assert_eq!((image.cork, image.nodelay), (None, None));
            (image.tcp, queues.clone())
        };
        let (tcp, queues) = read(8001);
        assert_eq!(queues, Queues { recv: b"unread".to_vec(), send: b"in flightnever sent".to_vec() });
        assert_eq!((tcp.recv_len, tcp.send_len, tcp.unsent_len), (6, 19, 10));
        assert_eq!(tcp.negotiated.mask & 7, OPT_TIMESTAMPS | OPT_SACK | OPT_WSCALE);
        assert_eq!(tcp.negotiated.mss_clamp, 65495); // loopback's MTU less the headers
        assert!(tcp.negotiated.timestamp.is_some());
        let (scale, window) = (tcp.negotiated.wscale.unwrap(), tcp.window.unwrap());
        assert_eq!(scale.snd, scale.rcv);
        assert!(scale.snd > 0 && window.rcv_wnd > 0 && window.snd_wnd <= window.max_window);

        let (tcp, queues) = read(8002);
        assert_eq!(queues, Queues { recv: b"last words".to_vec(), send: Vec::new() });
        assert_eq!((tcp.state, tcp.recv_len, tcp.unsent_len), (State::CloseWait, 10, 0));
        assert_eq!((tcp.negotiated.wscale, tcp.negotiated.timestamp), (None, None));

        for port in [8003, 8004, 8005, 8006] {
            assert_eq!(read(port).1, Queues::default());
        }
    }
}

#[test]
fn streams_are_written_as_stock_writes_them() {
    for set in SETS {
        let (dir, folder) = (open(&golden(set)), tempfile::tempdir().unwrap());
        let copy = open(folder.path());
        let mut queues = Queues::default();
        for found in Index::read(&dir).unwrap().connections.values() {
            let image = TcpStreamImage::read(&dir, found.ino, found.state, &mut queues).unwrap();
            TcpStreamImage::write(&copy, found.ino, &image.tcp, &queues.recv, &queues.send).unwrap();
            let name = TcpStreamImage::name(found.ino);
            assert_eq!(std::fs::read(folder.path().join(&name)).unwrap(), files(set)[&name], "{name}");
        }
    }
}

/// The file's content, put together again from its decoded messages.
fn encoded_again<M: ImageMessage>(dir: &ImageDir, name: &str, magic: Magic) -> Vec<u8> {
    let mut out = Vec::new();
    if magic != Magic::Inventory {
        out.extend(COMMON.to_le_bytes());
    }
    out.extend((magic as u32).to_le_bytes());
    let mut reader = Reader::open(dir, name, magic).unwrap();
    while let Some(message) = reader.next_message::<M>().unwrap() {
        let bytes = message.write_to_bytes().unwrap();
        out.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        out.extend(bytes);
        let raw = match name.split('-').next().unwrap() {
            "tcp" => {
                let entry = tcp_stream::Tcp_stream_entry::parse_from_bytes(&out[12..]).unwrap();
                entry.inq_len() + entry.outq_len()
            }
            "sk" => sk_packet::Sk_packet_entry::parse_from_bytes(&message.write_to_bytes().unwrap())
                .unwrap()
                .length(),
            _ => 0,
        };
        let mut payload = Vec::new();
        reader.read_raw(raw.into(), &mut payload).unwrap();
        out.extend(payload);
    }
    out
}

#[test]
fn every_kind_encodes_back_to_the_same_bytes() {
    for set in SETS {
        let dir = open(&golden(set));
        let mut kinds = std::collections::BTreeSet::new();
        for (name, content) in files(set) {
            let kind = name.split(['-', '.']).next().unwrap();
            kinds.insert(kind.to_owned());
            let again = match kind {
                "inventory" => encoded_again::<inventory::Inventory_entry>(&dir, &name, Magic::Inventory),
                "pstree" => encoded_again::<pstree::Pstree_entry>(&dir, &name, Magic::Pstree),
                "ids" => encoded_again::<core::Task_kobj_ids_entry>(&dir, &name, Magic::Ids),
                "fdinfo" => encoded_again::<fdinfo::Fdinfo_entry>(&dir, &name, Magic::Fdinfo),
                "files" => encoded_again::<fdinfo::File_entry>(&dir, &name, Magic::Files),
                "sk" => encoded_again::<sk_packet::Sk_packet_entry>(&dir, &name, Magic::SkQueues),
                "tcp" => encoded_again::<tcp_stream::Tcp_stream_entry>(&dir, &name, Magic::TcpStream),
                "core" | "nftables" => continue, // trimmed to what is needed; text
                other => panic!("{other}: {name} is of no known kind"),
            };
            assert_eq!(again, content, "{set}/{name}");
        }
        for kind in ["inventory", "pstree", "ids", "fdinfo", "files", "sk", "tcp", "core"] {
            assert!(kinds.contains(kind), "{set} has no {kind}");
        }
    }
}

#[test]
fn release_changes_three_fields_only() {
    let folder = copy("outside");
    let dir = open(folder.path());
    let read = || std::fs::read(folder.path().join("inventory.img")).unwrap();
    let before = Inventory::read(&dir).unwrap();
    let stock = read();

    release_to_stock(&dir, None).unwrap();
    assert_eq!(read(), stock, "nothing to remove: nothing changes");

    // What `--tcp-close` adds, at the place where stock puts it.
    let mut entry = inventory::Inventory_entry::parse_from_bytes(&stock[8..]).unwrap();
    entry.tcp_close = Some(true);
    let message = entry.write_to_bytes().unwrap();
    let length = u32::try_from(message.len()).unwrap().to_le_bytes();
    std::fs::write(folder.path().join("inventory.img"), [&stock[..4], &length, &message].concat()).unwrap();
    assert!(Inventory::read(&dir).unwrap().tcp_close);
    release_to_stock(&dir, None).unwrap();
    assert_eq!(read(), stock);

    release_to_stock(&dir, Some("soccr-0123456789")).unwrap();
    let after = Inventory::read(&dir).unwrap();
    let run_id = Some("soccr-0123456789".to_owned());
    assert_eq!(after, Inventory { dump_run_id: run_id, network_lock: NetworkLock::Nftables, ..before });
}

#[test]
fn release_refuses_an_id_that_breaks_the_rule_text() {
    let folder = copy("outside");
    let error = release_to_stock(&open(folder.path()), Some("x; flush ruleset")).unwrap_err();
    assert!(matches!(error, ImageError::Unwritable { .. }), "{error}");
    assert_eq!(
        std::fs::read(folder.path().join("inventory.img")).unwrap(),
        files("outside")["inventory.img"]
    );
}

#[test]
fn the_locks_table_is_cut_out_of_the_rules() {
    let folder = copy("outside");
    let dir = open(folder.path());
    let (name, text) = files("outside").into_iter().find(|(name, _)| name.starts_with("nftables")).unwrap();
    let text = String::from_utf8(text).unwrap();
    let start = text.find("table inet CRIU-").unwrap();
    let table = text[start..].split(' ').nth(2).unwrap();
    assert_eq!(strip_table(&dir, "inet", table).unwrap(), 1);
    assert_eq!(std::fs::read_to_string(folder.path().join(name)).unwrap(), text[..start]);
    assert_eq!(strip_table(&dir, "inet", table).unwrap(), 0);
}

#[test]
fn errors_say_where() {
    let folder = copy("inside");
    let dir = open(folder.path());
    let mut fdinfo = files("inside")["fdinfo-2.img"].clone();
    fdinfo[4] ^= 1;
    std::fs::write(folder.path().join("fdinfo-2.img"), &fdinfo).unwrap();
    let error = Index::read(&dir).unwrap_err();
    assert!(matches!(error, ImageError::Malformed { offset: 4, fault: Fault::Magic { .. }, .. }));
    assert_eq!(soccr::chain(&error), "image fdinfo-2.img, byte 4: magic 0x56213733, expected 0x56213732");

    std::fs::remove_file(folder.path().join("pstree.img")).unwrap();
    assert_eq!(Index::read(&dir).unwrap_err().to_string(), "image pstree.img is missing");
}

#[test]
fn older_layouts_are_read() {
    let folder = copy("inside");
    let path = |name: &str| folder.path().join(name);
    let dir = open(folder.path());
    let wanted = Index::read(&dir).unwrap();
    // inetsk.img in place of files.img; no common magic before each file's own.
    let mut sockets = (Magic::InetSk as u32).to_le_bytes().to_vec();
    let mut reader = Reader::open(&dir, "files.img", Magic::Files).unwrap();
    while let Some(entry) = reader.next_message::<fdinfo::File_entry>().unwrap() {
        if let Some(isk) = entry.isk.into_option() {
            let bytes = isk.write_to_bytes().unwrap();
            sockets.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
            sockets.extend(bytes);
        }
    }
    for (name, content) in files("inside").iter().filter(|(name, _)| *name != "inventory.img") {
        std::fs::write(path(name), &content[4..]).unwrap();
    }
    std::fs::remove_file(path("files.img")).unwrap();
    std::fs::write(path("inetsk.img"), sockets).unwrap();
    let index = Index::read(&dir).unwrap();
    assert_eq!(index.connections, wanted.connections);
    assert_eq!((index.tasks, index.in_flight), (wanted.tasks, wanted.in_flight));
}

/// `soccr.img` comes with the images, but anybody can have written it.
#[test]
fn translations_of_other_connections_are_left_out() {
    let dir = ImageDir::open(&golden("outside")).unwrap();
    let index = Index::read(&dir).unwrap();
    let carried = index.carried().next().unwrap().tuple.on_wire();
    let end = |text: &str| text.parse().unwrap();
    let behind = |socket: Direction| Translation {
        original: Direction { source: socket.destination, destination: end("192.0.2.1:7100") },
        reply: socket,
    };
    let ours = behind(Direction { source: carried.local, destination: carried.remote });
    let others = behind(Direction { source: end("192.0.2.2:22"), destination: end("192.0.2.3:40000") });
    let side = SideImage {
        id: "soccr-0123456789ab".into(),
        translations: [others, ours, ours].into_iter().collect(),
        ..SideImage::default()
    };
    assert_eq!(side.translations_of(&index), [ours]);
}

/// Other addresses are all that changes in `files.img`, and another time changes nothing; a damaged file stays as it was.
#[test]
fn other_addresses_are_all_that_changes() {
    let folder = copy("outside");
    let (dir, file) = (open(folder.path()), folder.path().join("files.img"));
    let (before, index) = (std::fs::read(&file).unwrap(), Index::read(&dir).unwrap());
    let old = index.carried().next().unwrap().tuple.on_wire().local;
    let new: SocketAddr = if old.is_ipv4() { "192.0.2.77:7" } else { "[fd77::77]:7" }.parse().unwrap();
    let (remap, back) = (rule(old, new), rule(new, old));

    assert!(readdress(&dir, &remap).unwrap() > 0);
    let changed = Index::read(&dir).unwrap();
    for (one, other) in index.connections.values().zip(changed.connections.values()) {
        assert_eq!(remap.four_tuple(one.tuple), other.tuple);
    }
    assert_ne!(index.connections, changed.connections);
    assert_eq!(readdress(&dir, &remap).unwrap(), 0);
    assert!(readdress(&dir, &back).unwrap() > 0);
    assert_eq!(std::fs::read(&file).unwrap(), before);

    let damaged = &before[..before.len() - 1];
    std::fs::write(&file, damaged).unwrap();
    assert!(readdress(&dir, &remap).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), damaged);
}

fn rule(old: SocketAddr, new: SocketAddr) -> Remap {
    Rules::parse(&format!("remap local {old}={new}"), Path::new("rules")).unwrap().remap
}
