//! `soccr hold` and `soccr release`, in a network of their own.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use soccr::connection::Queues;
use soccr::criu::image::ImageDir;
use soccr::criu::image::external::ExternalImage;
use soccr::repair::{Paused, Probe, four_tuple};
use support::{Soccr, in_own_network, program};

/// A host with images of one connection between two of its addresses, which are not loopback ones.
struct Host {
    dir: tempfile::TempDir,
    client: TcpStream,
    server: TcpStream,
}

impl Soccr for Host {
    fn command(&self) -> Command {
        let mut command = program();
        command.env("SOCCR_RUN_DIR", self.dir.path().join("run"));
        command
    }
}

impl Host {
    fn new() -> Self {
        run("ip", &["address", "add", "192.0.2.1/32", "dev", "lo"]);
        let listener = std::net::TcpListener::bind("192.0.2.1:0").expect("a listener");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("a client");
        let server = listener.accept().expect("a connection").0;
        client.set_read_timeout(Some(Duration::from_millis(300))).expect("a limit");
        let dir = tempfile::tempdir().expect("a folder");
        let host = Self { dir, client, server };
        std::fs::create_dir(host.images()).expect("a folder");
        host.dump();
        host
    }

    fn images(&self) -> PathBuf {
        self.dir.path().join("checkpoint")
    }

    fn dump(&self) {
        let mut queues = Queues::default();
        let paused = Paused::pause(&self.server).expect("repair mode");
        let tcp = paused.save(&mut queues).expect("saved");
        paused.resume(Probe::None).expect("resumed");
        let image = ExternalImage {
            tuple: four_tuple(self.server.as_fd()).expect("connected"),
            tcp,
            options: Vec::new(),
            shut_rd: false,
            usec_ts_known: false,
            lock_id: Some("soccr-0123456789ab".into()),
        };
        let images = ImageDir::open(&self.images()).expect("the folder");
        image.write(&images, 1, &queues.recv, &queues.send).expect("written");
    }

    /// What is sent arrives, or does not.
    fn passes(&mut self) -> bool {
        self.server.write_all(b"x").expect("sent");
        match self.client.read(&mut [0; 16]) {
            Ok(count) => count > 0,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) => panic!("{error}"),
        }
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("it runs");
    assert!(status.success(), "{program} {arguments:?}");
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn a_hold_locks_what_the_images_hold_until_it_is_released() {
    in_own_network(|| {
        let mut host = Host::new();
        let images = text(&host.images());
        assert!(host.passes());
        let told = host.json(&["hold", &images]);
        assert_eq!((&told["id"], &told["connections"]), (&"soccr-0123456789ab".into(), &1.into()));
        assert!(!host.passes(), "it is not locked");

        let status = host.json(&["status"]);
        assert_eq!(status["records"][0]["state"], "dumped", "{status}");
        assert_eq!(status["strays"], Value::Array(Vec::new()), "{status}");
        let again = host.refused(&["hold", &images]);
        assert!(again.contains("known here as soccr-0123456789ab"), "{again}");

        assert!(host.done(&["release", "--dry-run", &images]).contains("soccr-path-0123456789ab"));
        assert!(!host.passes(), "a dry run releases nothing");
        let told = host.json(&["release", &images]);
        assert_eq!(told["records"][0]["unlocked"][0]["name"], "soccr-path-0123456789ab", "{told}");
        assert!(host.passes());
        assert!(host.refused(&["release", &images]).contains("there is no such record"));
    });
}

/// Whoever calls is in another namespace, where nothing is to be locked.
#[test]
fn a_hold_locks_in_the_namespace_that_it_is_told() {
    in_own_network(|| {
        let mut host = Host::new();
        let images = text(&host.images());
        let elsewhere = soccr_testkit::NetNs::new().expect("a namespace");
        let there = soccr_testkit::NetNs::current().expect("this one");
        let told = elsewhere.run(|| host.json(&["hold", "--netns", &there.path(), &images]));
        assert_eq!(told["netns"], format!("net:[{}]", there.inode()), "{told}");
        assert!(!host.passes(), "it is not locked");
        assert_eq!(soccr_testkit::leftovers::rules(&elsewhere).expect("rules"), [] as [String; 0]);
        elsewhere.run(|| host.done(&["release", &images]));
        assert!(host.passes());
    });
}

#[test]
fn an_archive_is_held_and_released_by_its_id() {
    in_own_network(|| {
        let mut host = Host::new();
        let archive = host.dir.path().join("export.tar");
        let folder = text(host.dir.path());
        // podman's archives have an inventory beside the connections.
        let stock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stock-4.2.1/outside");
        for image in std::fs::read_dir(&stock).expect("the images") {
            let image = image.expect("an image");
            std::fs::copy(image.path(), host.images().join(image.file_name())).expect("copied");
        }
        run("tar", &["-C", &folder, "-cf", &text(&archive), "checkpoint"]);
        host.done(&["hold", &text(&archive), "--lease", "10m"]);
        assert!(!host.passes());
        let status = host.json(&["status"]);
        let id = status["records"][0]["id"].as_str().expect("an id").to_owned();
        host.done(&["release", &id]);
        assert!(host.passes());
    });
}

#[test]
fn what_cannot_be_held_is_said() {
    in_own_network(|| {
        let host = Host::new();
        let stock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stock-4.2.1/outside");
        let error = host.refused(&["hold", &text(&stock)]);
        assert!(error.contains("no TCP connection that leaves its host"), "{error}");
        let error = host.refused(&["hold", "/nonexistent"]);
        assert_eq!(error.matches("No such file").count(), 1, "{error}");
        let lease = host.soccr(&["hold", "--lease", "soon", &text(&host.images())]);
        assert!(String::from_utf8_lossy(&lease.stderr).contains("a whole number above 0"), "{lease:?}");
        assert!(host.refused(&["release", "nothing"]).contains("there is no such record"));
    });
}
