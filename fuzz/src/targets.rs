//! What the fuzz targets do with an input. The programs in `fuzz_targets/` and the test `tests/hostile` share these
//! functions: a target panics when it finds something, and only then.

use std::cell::RefCell;
use std::io;
use std::path::Path;

use soccr::Connection;
use soccr::connection::{Queues, State};
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::Index;
use soccr::criu::image::inventory::{self, Inventory, NetworkLock, release_to_stock};
use soccr::criu::image::nftables::strip_table;
use soccr::criu::image::side::{self, SideImage};
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::image::{ImageDir, ImageError};

/// A target: takes any bytes.
pub type Target = fn(&[u8]);

/// All targets, by the names of their corpora.
pub const TARGETS: [(&str, Target); 7] = [
    ("tcp_stream", tcp_stream),
    ("external", external),
    ("inventory", inventory),
    ("nftables", nftables),
    ("index", index),
    ("netlink", netlink),
    ("side", side),
];

/// A tcp-stream image.
pub fn tcp_stream(input: &[u8]) {
    with_files(&[(&TcpStreamImage::name(1), input)], |dir| {
        let mut queues = Queues::default();
        let image = TcpStreamImage::read(dir, 1, State::Established, &mut queues);
        let Some(image) = explained(image, input.len()) else { return };
        // What can be read can be written, and says the same then.
        TcpStreamImage::write(dir, 2, &image.tcp, &queues.recv, &queues.send).expect("it can be written");
        let mut queues_again = Queues::default();
        let again = TcpStreamImage::read(dir, 2, State::Established, &mut queues_again).expect("it is good");
        assert_eq!((image.tcp, queues), (again.tcp, queues_again));
        dir.remove(&TcpStreamImage::name(2)).expect("it was written just now");
    });
}

/// An image of a connection that CRIU handed over, which is also what the crate's users have.
pub fn external(input: &[u8]) {
    let connection = Connection::from_bytes(input).ok();
    if let Some(connection) = &connection {
        let again = Connection::from_bytes(&connection.to_bytes()).expect("what was read can be written");
        assert!(again == *connection);
    }
    with_files(&[(&ExternalImage::name(1), input)], |dir| {
        let mut queues = Queues::default();
        let image = explained(ExternalImage::read(dir, 1, &mut queues), input.len());
        if let Some(connection) = &connection {
            assert_eq!(Some(connection.four_tuple()), image.as_ref().map(|image| image.tuple));
            assert_eq!(*connection.queues(), queues);
        }
        let Some(image) = image else { return };
        image.write(dir, 2, &queues.recv, &queues.send).expect("it can be written");
        let mut queues_again = Queues::default();
        let again = ExternalImage::read(dir, 2, &mut queues_again).expect("it is good");
        assert_eq!((image, queues), (again, queues_again));
        dir.remove(&ExternalImage::name(2)).expect("it was written just now");
    });
}

/// The inventory, read and released to stock CRIU.
pub fn inventory(input: &[u8]) {
    with_files(&[(inventory::NAME, input)], |dir| {
        let before = explained(Inventory::read(dir), input.len());
        let released = explained(release_to_stock(dir, Some("ours")), input.len()).is_some();
        let after = explained(Inventory::read(dir), input.len() + 64);
        match (released, &before, after) {
            (true, Some(before), after) => {
                let wanted = Inventory {
                    tcp_close: false,
                    network_lock: NetworkLock::Nftables,
                    dump_run_id: Some("ours".into()),
                    root_net_ns_id: before.root_net_ns_id,
                };
                assert_eq!(after, Some(wanted));
            }
            (false, before, after) => assert_eq!(*before, after, "a file that is wrong was changed"),
            (true, None, _) => {} // from a CRIU so old that only the release may go on
        }
    });
}

/// A ruleset as text.
pub fn nftables(input: &[u8]) {
    with_files(&[("nftables-9.img", input)], |dir| {
        let strip = || strip_table(dir, "inet", "quiet").expect("any text can be stripped");
        if strip() == 1 {
            assert_eq!(strip(), 0, "a table is left");
        }
    });
}

/// All files of an image that lead to a connection, as an [archive](files_of).
pub fn index(input: &[u8]) {
    let files = files_of(input);
    with_files(&files, |dir| {
        let Some(index) = explained(Index::read(dir), input.len()) else { return };
        let mut queues = Queues::default();
        for connection in index.connections.values().filter(|connection| connection.has_stream) {
            explained(TcpStreamImage::read(dir, connection.ino, connection.state, &mut queues), input.len());
        }
    });
}

/// Our own image beside CRIU's.
pub fn side(input: &[u8]) {
    with_files(&[(side::NAME, input)], |dir| {
        let Some(image) = explained(SideImage::read(dir), input.len()).flatten() else { return };
        for inode in image.sockets.inodes() {
            explained(image.sockets.get(inode), input.len());
        }
        // What can be read can be written, and says the same then.
        image.write(dir).expect("it can be written");
        assert_eq!(SideImage::read(dir).expect("it is good"), Some(image));
    });
}

/// Answers of nf_tables: datagrams, each behind its length as a little-endian `u16`.
pub fn netlink(input: &[u8]) {
    let mut datagrams = Vec::new();
    let mut rest = input;
    while let Some((length, after)) = rest.split_first_chunk() {
        let (datagram, after) = after.split_at(usize::from(u16::from_le_bytes(*length)).min(after.len()));
        datagrams.push(datagram);
        rest = after;
    }
    soccr::fuzzing::read_netlink_answers(&datagrams);
}

/// Files as one input: each is the length of its name (one byte), the name, the length of its content (little-endian
/// `u32`), the content. Names that no image has, and the rest after a cut, are left out.
pub fn files_of(archive: &[u8]) -> Vec<(&str, &[u8])> {
    const MOST: usize = 64;
    let mut files = Vec::new();
    let mut rest = archive;
    while files.len() < MOST {
        let Some(((name, content), after)) = first_file(rest) else { break };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        if name.ends_with(b".img") && name.iter().copied().all(plain) {
            files.push((std::str::from_utf8(name).expect("ASCII"), content));
        }
        rest = after;
    }
    files
}

type NameAndContent<'a> = (&'a [u8], &'a [u8]);

fn first_file(archive: &[u8]) -> Option<(NameAndContent<'_>, &[u8])> {
    let (length, rest) = archive.split_first()?;
    let (name, rest) = rest.split_at_checked((*length).into())?;
    let (length, rest) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let (content, rest) = rest.split_at(length.min(rest.len()));
    Some(((name, content), rest))
}

/// The counterpart of [`files_of`].
#[allow(dead_code)] // whoever makes a corpus needs it
pub fn archive_of<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in files {
        archive.push(u8::try_from(name.len()).expect("names are short"));
        archive.extend(name.as_bytes());
        archive.extend(u32::try_from(content.len()).expect("files are small").to_le_bytes());
        archive.extend(content);
    }
    archive
}

/// The result, if there is one. An error must be about the content, and name file and offset.
fn explained<T>(result: Result<T, ImageError>, size: usize) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(ImageError::Malformed { file, offset, .. }) => {
            assert!(file.ends_with(".img") && offset <= size as u64, "{file}, byte {offset} of {size}");
            None
        }
        Err(ImageError::Missing { file }) => {
            assert!(file.ends_with(".img"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

thread_local! {
    /// In memory where that is possible: on a disk each file would be written out at once.
    static FOLDER: tempfile::TempDir =
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder for images");
    static NAMES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with a folder that holds these files and nothing else.
fn with_files(files: &[(&str, &[u8])], work: impl FnOnce(&ImageDir)) {
    FOLDER.with(|folder| {
        put(folder.path(), files).expect("the folder can be written");
        work(&ImageDir::open(folder.path()).expect("the folder is there"));
    });
}

fn put(folder: &Path, files: &[(&str, &[u8])]) -> io::Result<()> {
    NAMES.with_borrow_mut(|names| {
        for name in names.drain(..) {
            match std::fs::remove_file(folder.join(name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => (),
            }
        }
        for (name, content) in files {
            std::fs::write(folder.join(name), content)?;
            names.push((*name).to_owned());
        }
        Ok(())
    })
}
