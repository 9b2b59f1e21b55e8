//! The soccr command on leftovers of crashes that are made by hand, each in a network namespace of its own.

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use soccr::criu::image::ImageDir;
use soccr::criu::image::inventory::release_to_stock;
use soccr::criu::record::{
    ConnectionRecord, FOLDER_VARIABLE, LockRecord, NsId, Phase, RECORD_VARIABLE, Recorder, Store,
};
use soccr::criu::stock::{self, NamespaceLock};
use soccr::criu::tasks::{Duplicates, Finder, ProcessId, Task};
use soccr::kernel::ecn::AskForEcn;
use soccr::kernel::netns::NetNs;
use soccr::kernel::sockopt;
use soccr::kernel::tcp::{self, Repair};
use soccr::kernel::warm::SetWindow;
use soccr::lock::{
    self, HOLD_NEW_VARIABLE, HOLD_VARIABLE, LEASE_VARIABLE, LockName, LockOptions, METHOD_VARIABLE, Method,
    NetworkLock, conntrack, held,
};
use soccr::repair::four_tuple;
use support::{Soccr, connected, expect_bytes, in_own_network, pattern, program};

const NFTABLES: LockOptions = LockOptions { method: Method::Nftables, lease: None, log: None };

/// The folder of the records, and one for images.
struct Host {
    dir: tempfile::TempDir,
}

impl Soccr for Host {
    fn command(&self) -> Command {
        let mut command = program();
        command.env("SOCCR_RUN_DIR", self.run_dir());
        command
    }
}

impl Host {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a folder") }
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn store(&self) -> Store {
        Store::create_at(self.run_dir()).expect("the records")
    }

    /// What is written down of a dump of `task`, a tree in a namespace apart, whose criu is dead.
    fn record_apart(&self, id: &str, phase: Phase, ns: Option<&NetNs>, task: Option<&Child>) {
        let images = File::open(self.dir.path()).expect("the folder");
        let recorder = Recorder::new(id, phase, images.as_fd(), std::process::id().cast_signed());
        let mut recorder = recorder.expect("a record").keep_in(self.store());
        ns.into_iter().for_each(|ns| recorder.add_criu_lock(ns));
        task.into_iter().for_each(|task| recorder.add_task(task.id().cast_signed()));
        recorder.save(phase).expect("written");
        self.orphan(id);
    }

    fn status(&self) -> Value {
        self.json(&["status"])
    }

    fn record(&self, id: &str) -> PathBuf {
        self.run_dir().join(id)
    }

    /// Makes the record one of a criu and an agent that are dead.
    fn orphan(&self, id: &str) {
        let mut child = Command::new("true").spawn().expect("a process");
        let dead = ProcessId::of(child.id().cast_signed()).expect("its start");
        child.wait().expect("its end");
        self.edit(id, |head| {
            head["criu"] = json!(dead);
            head["agent"] = json!(dead);
        });
    }

    fn edit(&self, id: &str, change: impl FnOnce(&mut Value)) {
        let text = fs::read_to_string(self.record(id)).expect("the record");
        let (head, connections) = text.split_once('\n').expect("a first line");
        let mut head: Value = serde_json::from_str(head).expect("JSON");
        change(&mut head);
        fs::write(self.record(id), format!("{head}\n{connections}")).expect("the record");
    }
}

/// A program with a connection that it echoes; its other end is ours.
struct Echo {
    child: Child,
    socket: OwnedFd,
    peer: TcpStream,
}

impl Echo {
    fn start() -> Self {
        let (theirs, peer) = connected("127.0.0.1:0");
        theirs.set_read_timeout(None).expect("no timeout");
        let socket = OwnedFd::from(theirs);
        let copy = || Stdio::from(socket.try_clone().expect("a copy"));
        let child = Command::new("cat").stdin(copy()).stdout(copy()).spawn().expect("cat runs");
        Self { child, socket, peer }
    }

    fn lock(&self, name: &LockName) {
        let tuple = four_tuple(self.socket.as_fd()).expect("a connection");
        NetworkLock::lock(&here(), name, &[tuple], &NFTABLES).expect("a lock").keep();
    }

    /// What a dump writes down before it locks this.
    fn record(&self, host: &Host, id: &str, phase: Phase) -> LockName {
        let images = File::open(host.dir.path()).expect("the folder");
        let pid = self.child.id().cast_signed();
        let recorder = Recorder::new(id, phase, images.as_fd(), std::process::id().cast_signed());
        let mut recorder = recorder.expect("a record").keep_in(host.store());
        let name = LockName::criu(id).expect("a name");
        let lock = LockRecord { ns: NsId::from(&here()), name: name.clone(), method: Method::Nftables };
        recorder.add_lock(lock);
        recorder.add_task(pid);
        let (task, mut duplicates) = (Task::open(pid).expect("the task"), Duplicates::default());
        let found = Finder::default().of_task(&task, &mut duplicates).expect("its sockets");
        recorder.add_connections(found.connections.iter().map(ConnectionRecord::from));
        recorder.save(phase).expect("written");
        name
    }

    /// Puts the socket into repair mode when the program waits in read(), which would fail if it came later.
    fn repair(&self) {
        let syscall = format!("/proc/{}/syscall", self.child.id());
        let read = format!("{} ", nix::libc::SYS_read);
        while !fs::read_to_string(&syscall).expect("its system call").starts_with(&read) {
            std::thread::yield_now();
        }
        tcp::set_repair(self.socket.as_fd(), Repair::On).expect("TCP_REPAIR");
    }

    /// Sends and gets back the same.
    fn echoes(&mut self) {
        let bytes = pattern(7, 100_000);
        let mut writer = self.peer.try_clone().expect("a copy");
        let sent = bytes.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        expect_bytes(&mut self.peer, &bytes);
        writing.join().expect("no panic").expect("sent");
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn here() -> NetNs {
    NetNs::current().expect("a namespace")
}

fn locks() -> Vec<String> {
    lock::list(&here()).expect("locks").into_iter().map(|lock| lock.name.to_string()).collect()
}

fn in_repair(socket: BorrowedFd<'_>) -> bool {
    tcp::in_repair(socket).expect("TCP_REPAIR")
}

#[test]
fn what_a_killed_dump_left_is_shown_and_brought_back() {
    in_own_network(|| {
        let host = Host::new();
        let mut echo = Echo::start();
        echo.echoes();
        sockopt::set_reuse_addr(echo.socket.as_fd(), true).expect("SO_REUSEADDR");
        let name = echo.record(&host, "crashed", Phase::Saving);
        echo.lock(&name);
        echo.repair();
        host.orphan("crashed");

        let status = host.status();
        let record = &status["records"][0];
        assert_eq!((&record["id"], &record["state"]), (&json!("crashed"), &json!("orphaned")));
        assert_eq!(record["connections"], json!(1));
        assert_eq!(record["tasks"][0]["pid"], json!(echo.child.id()));
        assert_eq!(status["strays"], json!([]), "the lock is ours");
        let shown = host.done(&["status"]);
        assert!(shown.contains("crashed  orphaned"), "{shown}");

        let would = host.done(&["clean", "--orphans", "--dry-run"]);
        assert!(would.contains("would be brought back") && would.contains("would be removed"), "{would}");
        assert!(
            in_repair(echo.socket.as_fd()) && locks() == ["CRIU-crashed"] && host.record("crashed").exists()
        );

        let tuple = four_tuple(echo.socket.as_fd()).expect("a connection");
        let would = host.json(&["clean", "--orphans", "--dry-run"]);
        assert_eq!((&would["dry_run"], &would["records"][0]["id"]), (&json!(true), &json!("crashed")));
        let told = host.done(&["clean", "--orphans"]);
        assert!(told.contains(&format!("{tuple}: brought back from repair mode")), "{told}");
        assert!(told.contains("lock CRIU-crashed (Nftables) removed"), "{told}");
        assert!(!in_repair(echo.socket.as_fd()) && locks().is_empty());
        assert_eq!(sockopt::reuse_addr(echo.socket.as_fd()), Ok(1));
        echo.echoes();
        assert_eq!(fs::read_dir(host.run_dir()).expect("the records").count(), 0);
        assert_eq!(host.done(&["status"]), "");
    });
}

/// The kernel turns SO_REUSEADDR off when repair mode ends, and who dies just then cannot turn it on again. A restored
/// socket is known by its addresses only.
#[test]
fn an_option_that_repair_mode_took_is_put_back() {
    for phase in [Phase::Saving, Phase::Waking] {
        in_own_network(|| {
            let host = Host::new();
            let echo = Echo::start();
            let socket = echo.socket.as_fd();
            sockopt::set_reuse_addr(socket, true).expect("SO_REUSEADDR");
            echo.record(&host, "crashed", phase);
            if phase == Phase::Waking {
                let cookie = format!("\"cookie\":{}", sockopt::cookie(socket).expect("SO_COOKIE"));
                let text = fs::read_to_string(host.record("crashed")).expect("the record");
                assert!(text.contains(&cookie), "{text}");
                fs::write(host.record("crashed"), text.replace(&cookie, "\"cookie\":0")).expect("the record");
            }
            echo.repair();
            tcp::set_repair(socket, Repair::OffNoProbe).expect("TCP_REPAIR");
            assert_eq!(sockopt::reuse_addr(socket), Ok(0));
            host.orphan("crashed");
            host.done(&["clean", "--orphans", "--dry-run"]);
            assert_eq!(sockopt::reuse_addr(socket), Ok(0));
            host.done(&["clean", "--orphans"]);
            assert_eq!(sockopt::reuse_addr(socket), Ok(1), "{phase:?}");
        });
    }
}

#[test]
fn a_dump_at_work_is_left_alone() {
    in_own_network(|| {
        let host = Host::new();
        let mut echo = Echo::start();
        let name = echo.record(&host, "busy", Phase::Saving);
        echo.lock(&name);
        for arguments in [["clean", "busy"], ["clean", "--all"]] {
            let why = host.refused(&arguments);
            assert!(why.contains("busy: left alone, it is frozen") && why.contains("--force"), "{why}");
        }
        assert!(host.refused(&["clean", "--table", "CRIU-busy"]).contains("belongs to busy"));
        assert_eq!(host.done(&["clean", "--orphans"]), "");
        assert_eq!(locks(), ["CRIU-busy"]);
        host.done(&["clean", "busy", "--force"]);
        assert!(locks().is_empty() && !host.record("busy").exists());
        echo.echoes();
    });
}

#[test]
fn a_dump_that_waits_is_shown_until_its_lock_is_gone() {
    in_own_network(|| {
        let host = Host::new();
        let echo = Echo::start();
        let name = echo.record(&host, "waits", Phase::Dumped);
        echo.lock(&name);
        host.orphan("waits");
        let record = &host.status()["records"][0];
        assert_eq!((&record["state"], &record["images_there"]), (&json!("dumped"), &json!(true)));
        assert_eq!(host.done(&["clean", "--orphans"]), "", "it is no orphan");
        // As stock CRIU does when it restores these images.
        assert!(lock::remove(&here(), Method::Nftables, &name).expect("removed"));
        assert_eq!(host.status()["records"], json!([]));
        assert!(!host.record("waits").exists());
    });
}

/// As `nft flush ruleset` removes it: nobody has restored the images. Without them nobody can.
#[test]
fn a_dump_whose_lock_is_gone_is_told() {
    in_own_network(|| {
        let host = Host::new();
        let echo = Echo::start();
        let name = echo.record(&host, "waits", Phase::Dumped);
        echo.lock(&name);
        host.orphan("waits");
        assert_eq!(host.status()["records"][0]["ended_locks"], json!([]));
        drop(echo);
        let flushed = Command::new("nft").args(["flush", "ruleset"]).status().expect("nft runs");
        assert!(flushed.success());
        let record = &host.status()["records"][0];
        assert_eq!(record["state"], "dumped", "{record}");
        assert_eq!(record["ended_locks"][0]["name"], "CRIU-waits", "{record}");
        let told =
            format!("waits: {}: the lock CRIU-waits is gone: connections whose peers have sent", here());
        assert!(host.done(&["status"]).contains(&told), "{}", host.done(&["status"]));
        host.edit("waits", |head| head["images"]["ino"] = json!(0));
        assert_eq!(host.status()["records"], json!([]));
    });
}

/// A namespace that only we keep open: as one with a path, in which nobody is while a dump waits for its restore.
fn empty_namespace() -> NetNs {
    let unshare = || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map(|()| here());
    std::thread::spawn(unshare).join().expect("no panic").expect("a namespace")
}

/// Locks the whole namespace as criu does by default, and with nftables.
fn lock_as_criu(ns: &NetNs) -> [NamespaceLock; 2] {
    const SCRIPT: &str = "printf '*filter\\n:CRIU - [0:0]\\n-I INPUT -j CRIU\\n-I OUTPUT -j CRIU\\n\
        -A CRIU -m mark --mark 0xC114 -j ACCEPT\\n-A CRIU -j DROP\\nCOMMIT\\n' | iptables-restore -w -n &&
        nft 'create table inet CRIU-61f2
             add chain inet CRIU-61f2 output { type filter hook output priority 0; policy drop; }
             add rule inet CRIU-61f2 output meta mark 0xC114 accept'";
    let status = ns.run(|| Command::new("sh").args(["-c", SCRIPT]).status()).expect("entered");
    assert!(status.expect("sh runs").success());
    [NamespaceLock::Table("CRIU-61f2".parse().expect("a name")), NamespaceLock::Chain]
}

#[test]
fn a_dump_of_a_namespace_with_a_path_is_shown_until_criu_unlocks_it() {
    in_own_network(|| {
        let host = Host::new();
        let ns = empty_namespace();
        host.record_apart("waits", Phase::Dumped, Some(&ns), None);
        let locks = lock_as_criu(&ns);
        let status = host.status();
        assert_eq!(status["records"][0]["state"], json!("dumped"));
        assert_eq!(status["records"][0]["locked_by_criu"][0]["ino"], json!(ns.inode()));
        assert_eq!(status["strays"], json!([]), "the lock belongs to the dump");
        assert!(host.done(&["status"]).contains(&format!("{ns} (whole)")));
        let why = host.refused(&["clean", "--stock-rules"]);
        assert!(why.contains("it belongs to waits: `soccr clean waits`"), "{why}");
        assert_eq!(stock::find_namespace_locks(&ns).expect("locks"), locks);
        // As criu does at the end of the restore.
        assert_eq!(stock::remove_namespace_locks(&ns).expect("removed"), locks);
        assert_eq!(host.status()["records"], json!([]));
        assert!(!host.record("waits").exists());
    });
}

#[test]
fn a_dump_of_a_namespace_with_a_path_can_be_given_up() {
    in_own_network(|| {
        let host = Host::new();
        let (ns, other) = (empty_namespace(), empty_namespace());
        host.record_apart("waits", Phase::Dumped, Some(&ns), None);
        lock_as_criu(&ns);
        lock_as_criu(&other);
        let would = host.done(&["clean", "waits", "--dry-run"]);
        assert!(
            would.contains("lock of the whole namespace (iptables chain CRIU) would be removed"),
            "{would}"
        );
        assert_eq!(stock::find_namespace_locks(&ns).expect("locks").len(), 2);
        let told = host.done(&["clean", "waits"]);
        assert!(
            told.contains(&format!(
                "{ns}: CRIU's lock of the whole namespace (table inet CRIU-61f2) removed"
            ))
        );
        assert_eq!(stock::find_namespace_locks(&ns).expect("locks"), []);
        assert!(!host.record("waits").exists());
        assert_eq!(stock::find_namespace_locks(&other).expect("locks").len(), 2, "that of another dump");
    });
}

/// The record may be of a soccr that did not know that CRIU locks: the task that lives leads to its namespace.
#[test]
fn crius_lock_goes_with_the_record_of_a_killed_dump() {
    in_own_network(|| {
        let host = Host::new();
        let ns = empty_namespace();
        let mut task =
            ns.run(|| Command::new("cat").stdin(Stdio::piped()).spawn()).expect("entered").expect("cat");
        host.record_apart("crashed", Phase::Saving, None, Some(&task));
        lock_as_criu(&ns);
        // Another container in the same namespace waits for its restore.
        host.record_apart("neighbour", Phase::Dumped, Some(&ns), None);
        host.done(&["clean", "crashed", "--dry-run"]);
        host.done(&["clean", "--orphans"]);
        assert_eq!(stock::find_namespace_locks(&ns).expect("locks").len(), 2, "the neighbour needs them");
        fs::remove_file(host.record("neighbour")).expect("removed");
        host.record_apart("crashed", Phase::Saving, None, Some(&task));
        assert_eq!(host.status()["records"][0]["locked_by_criu"][0]["ino"], json!(ns.inode()));
        let told = host.done(&["clean", "--orphans"]);
        assert!(told.contains("lock of the whole namespace (iptables chain CRIU) removed"), "{told}");
        assert_eq!(stock::find_namespace_locks(&ns).expect("locks"), []);
        task.kill().expect("killed");
        task.wait().expect("its end");
    });
}

#[test]
fn what_stock_criu_left_is_found_in_every_namespace() {
    in_own_network(|| {
        let host = Host::new();
        let (ns, other) = (empty_namespace(), empty_namespace());
        let mut task =
            ns.run(|| Command::new("cat").stdin(Stdio::piped()).spawn()).expect("entered").expect("cat");
        lock_as_criu(&ns);
        lock_as_criu(&other);
        let shown = host.done(&["status"]);
        let path = format!("/proc/{}/ns/net", task.id());
        assert!(shown.contains(&format!("Not ours, in {ns} ({path}):")), "{shown}");
        assert!(shown.contains(&format!("`soccr clean --stock-rules --netns {path}` removes it")), "{shown}");
        assert_eq!(host.status()["strays"].as_array().expect("a list").len(), 2);
        let only = host.done(&["status", "--pid", &task.id().to_string()]);
        assert!(only.contains(&path) && !only.contains(&other.to_string()), "{only}");
        host.done(&["clean", "--stock-rules", "--dry-run"]);
        host.done(&["clean", "--stock-rules", "--netns", &path]);
        assert_eq!(stock::find_namespace_locks(&ns).expect("locks"), []);
        assert_eq!(stock::find_namespace_locks(&other).expect("locks").len(), 2);
        host.done(&["clean", "--stock-rules"]);
        assert_eq!(stock::find_namespace_locks(&other).expect("locks"), []);
        assert_eq!(host.done(&["clean", "--stock-rules"]), "there is nothing of stock CRIU\n");
        task.kill().expect("killed");
        task.wait().expect("its end");
    });
}

#[test]
fn a_killed_restore_waits_for_another_try() {
    in_own_network(|| {
        let host = Host::new();
        let echo = Echo::start();
        let name = echo.record(&host, "again", Phase::Restoring);
        echo.lock(&name);
        assert_eq!(host.status()["records"][0]["state"], json!("restoring"));
        host.orphan("again");
        assert_eq!(host.status()["records"][0]["state"], json!("dumped"));
        host.done(&["clean", "--all"]);
        assert!(locks().is_empty() && !host.record("again").exists());
    });
}

#[test]
fn a_record_from_before_a_reboot_is_only_a_file() {
    in_own_network(|| {
        let host = Host::new();
        let echo = Echo::start();
        let name = echo.record(&host, "old", Phase::Dumped);
        echo.lock(&name);
        host.edit("old", |head| head["boot"] = json!("another"));
        assert_eq!(host.status()["records"][0]["state"], json!("orphaned"));
        host.done(&["clean", "--orphans"]);
        assert!(!host.record("old").exists());
        assert_eq!(locks(), ["CRIU-old"], "a lock of this boot is not that of the last one");
    });
}

#[test]
fn locks_without_a_record_go_only_by_name() {
    in_own_network(|| {
        let host = Host::new();
        let mut echo = Echo::start();
        echo.lock(&LockName::criu("foreign").expect("a name"));
        let status = host.status();
        assert_eq!(status["strays"][0]["tables"][0]["name"], json!("CRIU-foreign"));
        let shown = host.done(&["status"]);
        assert!(
            shown.starts_with("Not ours") && shown.contains("soccr clean --table CRIU-foreign"),
            "{shown}"
        );
        host.done(&["clean", "--all"]);
        assert_eq!(locks(), ["CRIU-foreign"]);
        assert!(host.refused(&["clean", "--table", "CRIU-other"]).contains("there is no lock CRIU-other"));
        host.done(&["clean", "--table", "CRIU-foreign"]);
        assert!(locks().is_empty());
        echo.echoes();
    });
}

#[test]
fn a_record_that_cannot_be_read_is_shown_and_removed_by_force() {
    in_own_network(|| {
        let host = Host::new();
        let echo = Echo::start();
        echo.record(&host, "damaged", Phase::Dumped);
        fs::write(host.record("damaged"), "{\"version\":1,").expect("written");
        assert!(host.done(&["status"]).contains("damaged: unreadable: "), "shown");
        assert!(host.refused(&["clean", "damaged"]).contains("line 1"));
        host.done(&["clean", "damaged", "--force"]);
        assert_eq!(host.done(&["status"]), "");
        assert!(host.refused(&["clean", "damaged"]).contains("there is no such record"));
    });
}

#[test]
fn without_a_folder_there_is_nothing() {
    in_own_network(|| {
        let host = Host::new();
        assert_eq!(host.done(&["status"]), "");
        assert_eq!(host.done(&["clean", "--all"]), "");
        assert!(!host.run_dir().exists());
        assert!(!host.soccr(&["clean"]).status.success(), "what to clean is to be said");
    });
}

#[test]
fn this_kernel_has_what_it_takes() {
    in_own_network(|| {
        let host = Host::new();
        let root = host.dir.path().to_str().expect("a plain path");
        let shown = host.done(&["check", "--root", root]);
        assert!(shown.contains("✓ TCP_REPAIR ") && shown.contains("✓ pidfd_getfd "), "{shown}");
        let report = host.done(&["check", "--json", "--root", root]);
        let report: Value = serde_json::from_str(&report).expect("JSON");
        let there = |feature: &Value| feature["need"] != json!("must") || feature["there"] == json!(true);
        let features = report["kernel"].as_array().expect("a list");
        assert!(features.iter().all(there));
        let is_there = |name: &str| {
            let mut named = features.iter().filter(|feature| feature["name"] == json!(name));
            named.next().unwrap_or_else(|| panic!("no {name} in {report}"))["there"] == json!(true)
        };
        // The privilege for BPF is the caller's, the same here as there.
        assert_eq!(is_there("NEEDS_ECN (BPF)"), AskForEcn::attach().is_ok());
        assert_eq!(is_there("TCP_BPF_IW (BPF)"), SetWindow::attach().is_ok());
        let name = LockName::soccr("here").expect("a name");
        assert_eq!(is_there("nft_log, nfnetlink_log"), held::check(&here(), &name).is_ok());
        assert_eq!(is_there("nf_conntrack_netlink"), conntrack::is_there(&here()).is_ok_and(|there| there));
        assert!(locks().is_empty(), "it checks elsewhere");
    });
}

/// A folder's name, and an id in an image that somebody sent, are nothing that a terminal should act on.
#[test]
fn no_name_controls_the_terminal() {
    const NAME: &str = "\u{1b}]0;owned\u{7}\u{9b}2J\r";
    in_own_network(|| {
        let host = Host::new();
        host.record_apart("waits", Phase::Dumped, Some(&empty_namespace()), None);
        host.edit("waits", |head| {
            head["images"]["path"] = json!(NAME);
            head["pid_ns"] = json!(1); // so that nobody sees that all is undone
            head["phase"] = json!("saving");
        });
        let images = host.dir.path().join("images");
        fs::create_dir(&images).expect("a folder");
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stock-4.2.1/inside");
        for file in fs::read_dir(golden).expect("images").flatten() {
            fs::copy(file.path(), images.join(file.file_name())).expect("copied");
        }
        let plain = "a".repeat(NAME.len());
        release_to_stock(&ImageDir::open(&images).expect("images"), Some(&plain)).expect("another id");
        let mut inventory = fs::read(images.join("inventory.img")).expect("the inventory");
        let at = inventory.windows(NAME.len()).position(|bytes| bytes == plain.as_bytes()).expect("the id");
        inventory[at..at + NAME.len()].copy_from_slice(NAME.as_bytes());
        fs::write(images.join("inventory.img"), inventory).expect("written");
        let images = images.to_str().expect("a plain path");
        for shown in [host.done(&["status"]), host.done(&["show", images]), host.refused(&["show", NAME])] {
            assert!(shown.contains("\\u{1b}]0;owned\\u{7}\\u{9b}2J\\r"), "{shown}");
            assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
        }
    });
}

#[test]
fn images_show_their_connections() {
    let host = Host::new();
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stock-4.2.1/inside");
    let images = images.to_str().expect("a plain path");
    let shown = host.json(&["show", images]);
    let connections = shown["connections"].as_array().expect("a list");
    assert_eq!(connections.len(), 6);
    let owners = |connection: &Value| connection["owners"].as_array().map_or(0, Vec::len);
    assert!(connections.iter().all(|connection| owners(connection) > 0));
    let closing = connections.iter().find(|connection| connection["state"] == json!("CLOSE_WAIT"));
    let closing = closing.expect("one in CLOSE_WAIT");
    assert_eq!((&closing["receive_queue"], &closing["remote"]), (&json!(10), &json!("127.0.0.1:8002")));
    let table = host.done(&["show", images]);
    assert!(table.contains("(in flight)") && table.contains("ESTABLISHED"), "{table}");
    let nothing = host.refused(&["show", host.dir.path().to_str().expect("a plain path")]);
    assert!(nothing.contains("there are no images"), "{nothing}");
}

/// Two dumps of the same program on the same ports, which began at other sequence numbers.
#[test]
fn dumps_are_compared() {
    let host = Host::new();
    let [inside, outside] = ["inside", "outside"].map(|name| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stock-4.2.1").join(name);
        path.to_str().expect("a plain path").to_owned()
    });
    let same = host.json(&["diff", &inside, &inside]);
    assert_eq!((&same["unchanged"], &same["changed"]), (&json!(6), &json!({})));
    let output = host.soccr(&["diff", &inside, &outside, "--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let diff: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&diff["gone"], &diff["added"], &diff["unchanged"]), (&json!({}), &json!({}), &json!(0)));
    for (name, changes) in diff["changed"].as_object().expect("an object") {
        let fields: Vec<_> = changes.as_object().expect("an object").keys().collect();
        assert_eq!(fields, ["rcv_nxt", "write_seq"], "{name}");
    }
    let text = String::from_utf8(host.soccr(&["diff", &inside, &outside]).stdout).expect("text");
    assert!(text.contains("~ [::1]:7002 → [::1]:8003:\n    rcv_nxt: "), "{text}");
}

#[test]
fn a_dump_without_connections_has_nothing_to_release() {
    let host = Host::new();
    let empty = host.dir.path().join("images");
    fs::create_dir(&empty).expect("a folder");
    let path = empty.to_str().expect("a plain path");
    assert!(host.refused(&["release", path]).contains("there are no images"));
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/stock-4.2.1/inside");
    for file in fs::read_dir(golden).expect("images").flatten() {
        fs::copy(file.path(), empty.join(file.file_name())).expect("copied");
    }
    // Its magic and no entry.
    let files = fs::read(empty.join("files.img")).expect("the image");
    fs::write(empty.join("files.img"), &files[..8]).expect("written");
    let output = host.soccr(&["release", path]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("no TCP connection in these images"), "{output:?}");
}

#[test]
fn a_cause_is_told_once() {
    let said = Host::new().refused(&["show", "/nonexistent/images"]);
    assert_eq!(said.matches("No such file or directory").count(), 1, "{said}");
}

#[test]
fn pages_and_completions_have_every_command() {
    let host = Host::new();
    let text = |path: &str| fs::read_to_string(host.dir.path().join(path)).expect("generated");
    host.done(&["generate", host.dir.path().to_str().expect("a plain path")]);
    let help = host.done(&["--help"]);
    let commands = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let commands = commands.take_while(|line| !line.is_empty());
    let names = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let names: Vec<&str> = names.filter(|name| !name.is_empty() && *name != "help").collect();
    assert!(names.contains(&"status") && names.contains(&"enable") && !names.contains(&"generate"), "{help}");
    let page = text("man/soccr.1");
    assert!(page.contains(".SH EXIT STATUS") && page.contains(".SH ENVIRONMENT"));
    for variable in
        [FOLDER_VARIABLE, RECORD_VARIABLE, METHOD_VARIABLE, LEASE_VARIABLE, HOLD_VARIABLE, HOLD_NEW_VARIABLE]
    {
        assert!(page.contains(&format!("\n.TP\n.B {variable}\n")), "{variable}");
    }
    for name in names {
        assert!(page.contains(&format!("soccr\\-{name}(1)")), "{name}");
        assert!(text(&format!("man/soccr-{name}.1")).contains(".SH DESCRIPTION"), "{name}");
        for shell in ["soccr.bash", "_soccr", "soccr.fish"] {
            assert!(text(&format!("completions/{shell}")).contains(name), "{name} in {shell}");
        }
    }
}
