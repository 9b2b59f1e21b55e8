//! The bytes of a queue are what a program and its peer told each other: nobody else sees them, in a log, in a file's
//! mode or through a link.

use std::fmt::{Debug, Write as _};
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::{Mutex, PoisonError};

use nix::sys::stat::{Mode, umask};
use soccr::connection::{Queues, State};
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::index::Index;
use soccr::criu::image::inventory::{Inventory, release_to_stock};
use soccr::criu::image::nftables::strip_table;
use soccr::criu::image::tcp_stream::TcpStreamImage;
use soccr::criu::image::{ImageDir, ImageError};
use soccr::forge::Forge;
use soccr::kernel::netns::NetNs;
use soccr::kernel::sockopt;
use soccr::lock::{LockName, LockOptions, Method, NetworkLock};
use soccr::repair::Paused;

use crate::corpus::{contents, external, golden};
use crate::support::{connected, expect_bytes, in_own_network};

const SECRET: &[u8] = b"Open, Sesame: 0123456789";

/// All that was logged, as text.
struct Captured(Mutex<String>);

static LOG: Captured = Captured(Mutex::new(String::new()));

impl log::Log for Captured {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(text, "{} {}", record.target(), record.args()).unwrap();
    }

    fn flush(&self) {}
}

/// Logs a value as somebody may who looks for a fault.
fn tell(value: impl Debug) {
    log::trace!("{value:?} {value:#?}");
}

/// The ways in which bytes are printed.
fn printed(bytes: &[u8]) -> [String; 5] {
    let joined = |separator: &str, print: fn(&u8) -> String| {
        bytes.iter().map(print).collect::<Vec<_>>().join(separator)
    };
    [
        String::from_utf8(bytes.to_vec()).unwrap(),
        joined("", |byte| format!("{byte:02x}")),
        joined(" ", |byte| format!("{byte:02x}")),
        joined(", ", u8::to_string),
        joined(",\n    ", u8::to_string),
    ]
}

/// A piece of the secret that is in the text, if any is.
fn secret_in(text: &str) -> Option<String> {
    const LEAST: usize = 6;
    let text = text.to_lowercase();
    let forms = SECRET.windows(LEAST).flat_map(printed);
    forms.map(|form| form.to_lowercase()).find(|form| text.contains(form))
}

#[test]
fn queues_are_never_logged() {
    in_own_network(|| {
        log::set_logger(&LOG).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
        let (mut near, mut peer) = connected("127.0.0.1:0");
        peer.write_all(SECRET).unwrap();
        near.write_all(SECRET).unwrap();
        expect_bytes(&mut peer, SECRET);
        near.peek(&mut [0; SECRET.len()]).unwrap();
        let domain = sockopt::domain(near.as_fd()).unwrap();
        let paused = Paused::pause(near).unwrap();
        let tuple = paused.four_tuple().unwrap();
        let options = LockOptions { method: Method::Nftables, lease: None, log: None };
        let name = LockName::criu("secret").unwrap();
        let lock = NetworkLock::lock(&NetNs::current().unwrap(), &name, &[tuple], &options).unwrap();
        let mut queues = Queues::default();
        let mut tcp = paused.save(&mut queues).unwrap();
        tell(&paused);
        drop(paused.release());
        queues.send.extend(SECRET);
        tcp.send_len = u32::try_from(queues.send.len()).unwrap();
        tell((&queues, &tcp, &lock));

        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        TcpStreamImage::write(&dir, 1, &tcp, &queues.recv, &queues.send).unwrap();
        ExternalImage { tuple, tcp, ..external("10.0.0.1:1", "10.0.0.2:2") }
            .write(&dir, 1, &queues.recv, &queues.send)
            .unwrap();
        let mut again = Queues::default();
        tell(TcpStreamImage::read(&dir, 1, State::Established, &mut again).unwrap());
        tell(ExternalImage::read(&dir, 1, &mut again).unwrap());
        assert!(again == queues && again.recv == SECRET && again.send == SECRET);
        for name in [TcpStreamImage::name(1), ExternalImage::name(1)] {
            let path = folder.path().join(name);
            let whole = std::fs::read(&path).unwrap();
            for content in [&whole[..whole.len() - 1], &[&whole[..], SECRET].concat()] {
                std::fs::write(&path, content).unwrap();
                let errors = [
                    TcpStreamImage::read(&dir, 1, State::Established, &mut again).map(drop),
                    ExternalImage::read(&dir, 1, &mut again).map(drop),
                ];
                assert!(errors.iter().any(Result::is_err));
                errors.into_iter().filter_map(Result::err).for_each(tell);
            }
        }

        let socket = sockopt::socket(domain, libc::SOCK_STREAM, libc::IPPROTO_TCP).unwrap();
        let paused = Paused::pause(socket).unwrap();
        let forge = Forge::new();
        tell(paused.restore(&tuple, &tcp, &queues.recv, b"short", &forge).unwrap_err());
        paused.restore(&tuple, &tcp, &queues.recv, &queues.send, &forge).unwrap();
        tell((&paused, &forge));
        drop(paused.release());
        assert!(lock.unlock().unwrap());
        let text = LOG.0.lock().unwrap();
        assert!(text.contains("ESTABLISHED") || text.contains("Established"), "nothing was captured");
        assert_eq!(secret_in(&text), None);
    });
}

#[test]
fn a_secret_is_seen_in_every_form() {
    for form in printed(SECRET) {
        assert!(secret_in(&format!("before {form} behind")).is_some(), "{form}");
    }
    assert_eq!(secret_in("Queues { recv_len: 24, send_len: 24, .. }"), None);
}

#[test]
fn images_are_private_whatever_the_umask() {
    in_own_network(|| {
        umask(Mode::empty());
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        let image = external("10.0.0.1:1", "10.0.0.2:2");
        image.write(&dir, 1, b"recv", b"send").unwrap();
        TcpStreamImage::write(&dir, 1, &image.tcp, b"recv", b"send").unwrap();
        for name in [TcpStreamImage::name(1), ExternalImage::name(1)] {
            let mode = std::fs::metadata(folder.path().join(&name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o600, "{name}");
        }
    });
}

/// Every file of an image in turn is a link to a good one outside.
#[test]
fn no_reader_follows_a_link_out_of_the_folder() {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut files = contents(&golden("outside"));
    let image = external("10.0.0.1:1", "10.0.0.2:2");
    image.write(&ImageDir::open(outside.path()).unwrap(), 1, b"recv", b"send").unwrap();
    files.extend(contents(outside.path()));
    for (name, content) in &files {
        std::fs::write(inside.path().join(name), content).unwrap();
        std::fs::write(outside.path().join(name), content).unwrap();
    }
    let dir = ImageDir::open(inside.path()).unwrap();
    assert_eq!(errors(&dir, &files.keys().cloned().collect::<Vec<_>>()), [""; 0]);
    for (name, content) in &files {
        let link = inside.path().join(name);
        std::fs::remove_file(&link).unwrap();
        symlink(outside.path().join(name), &link).unwrap();
        let errors = errors(&dir, std::slice::from_ref(name));
        let refused = format!("image {name} is not a regular file");
        assert!(!errors.is_empty() && errors.iter().all(|error| *error == refused), "{name}: {errors:?}");
        std::fs::remove_file(&link).unwrap();
        std::fs::write(&link, content).unwrap();
    }
    assert_eq!(contents(outside.path()), files, "something outside was changed");
}

/// What reading the whole image, and these files, and changing what the plugin changes, has to complain of.
fn errors(dir: &ImageDir, names: &[String]) -> Vec<String> {
    let mut queues = Queues::default();
    let mut errors: Vec<ImageError> = Vec::new();
    errors.extend(Inventory::read(dir).err());
    errors.extend(Index::read(dir).err());
    for name in names {
        let number = |prefix| {
            let hex = name.strip_prefix(prefix).and_then(|rest| rest.strip_suffix(".img"));
            hex.map(|hex| u32::from_str_radix(hex, 16).unwrap())
        };
        if let Some(ino) = number("tcp-stream-") {
            errors.extend(TcpStreamImage::read(dir, ino, State::Established, &mut queues).err());
        }
        if let Some(id) = number("soccr-ext-") {
            errors.extend(ExternalImage::read(dir, id, &mut queues).err());
        }
    }
    errors.extend(strip_table(dir, "inet", "quiet").err());
    errors.extend(release_to_stock(dir, None).err());
    errors.iter().map(|error| soccr::chain(error)).collect()
}
