//! What becomes of dumps of a tree with a network namespace apart, by a real criu, which locks that namespace as a whole.
//! Needs root and CRIU, and the plugin for its tests; without them a test says that it is skipped, or fails where
//! `SOCCR_TEST_REQUIRE=1`.

mod support;

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::{read, write};
use soccr::criu::image::ImageDir;
use soccr::criu::image::inventory::release_to_stock;
use soccr::criu::record::{Phase, Recorder, Store};
use soccr::criu::stock;
use soccr::criu::tasks::ProcessId;
use soccr::kernel::netns::NetNs;
use soccr::lock;
use support::{Soccr, connected, expect_bytes, pattern, program, skip};

const INSIDE: &str = "SOCCR_TEST_INSIDE";
/// CRIU's numbers of the methods (`images/rpc.proto`).
const IPTABLES: u8 = 1;
const NFTABLES: u8 = 2;

fn criu() -> PathBuf {
    built("CRIU_BIN", "criu/criu/criu")
}

fn plugins() -> PathBuf {
    built("SOCCR_PLUGIN_DIR", "plugins")
}

fn built(variable: &str, path: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    env::var_os(variable).map_or_else(|| target.join(path), PathBuf::from)
}

/// Runs the test `name` again, as a process that has network, mounts and pids of its own.
fn on_own_host(name: &str, body: impl FnOnce()) {
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let there = nix::unistd::geteuid().is_root() && criu().exists() && plugins().exists();
    if !there {
        return skip(&format!("root, {} or {} is missing", criu().display(), plugins().display()));
    }
    // What is open from another mount namespace cannot be dumped.
    let prepare = "mount -t tmpfs run /run && ip link set lo up &&
        for fd in /proc/self/fd/*; do [ ${fd##*/} -le 2 ] || eval \"exec ${fd##*/}<&-\"; done; exec \"$@\"";
    let output = Command::new("timeout")
        .args(["--kill-after=5", "120", "unshare", "-nmp", "--fork", "--kill-child", "--mount-proc"])
        .args(["bash", "-c", prepare, "bash"])
        .arg(env::current_exe().expect("this program"))
        .args([name, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("timeout, unshare and this program run");
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "{name}: {}", output.status);
}

/// A server with one connection in a namespace that is not criu's, and what criu and soccr need to work on it.
struct Stage {
    dir: tempfile::TempDir,
    /// Of the records.
    run: PathBuf,
    ns: NetNs,
    server: Child,
    peer: TcpStream,
}

impl Soccr for Stage {
    fn command(&self) -> Command {
        let mut command = program();
        command.env("SOCCR_RUN_DIR", self.run_dir());
        command
    }
}

impl Stage {
    fn new() -> Self {
        let apart = || unshare(CloneFlags::CLONE_NEWNET).map(|()| NetNs::current().expect("a namespace"));
        let ns = std::thread::spawn(apart).join().expect("no panic").expect("a namespace");
        let dir = tempfile::tempdir().expect("a folder");
        Self::within(ns, dir.path().join("run"), dir)
    }

    /// In criu's own namespace, with the records of another stage.
    fn at_home(records: Option<&Stage>) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let run = records.map_or_else(|| dir.path().join("run"), Self::run_dir);
        Self::within(NetNs::current().expect("a namespace"), run, dir)
    }

    fn within(ns: NetNs, run: PathBuf, dir: tempfile::TempDir) -> Self {
        let (server, peer) = ns.run(Self::serve).expect("entered");
        Self { dir, run, ns, server, peer }
    }

    fn serve() -> (Child, TcpStream) {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip runs");
        assert!(up.success());
        let (theirs, peer) = connected("127.0.0.1:0");
        theirs.set_read_timeout(None).expect("no timeout");
        let socket = OwnedFd::from(theirs);
        let copy = || Stdio::from(socket.try_clone().expect("a copy"));
        let mut command = Command::new("setsid");
        command.arg("cat").stdin(copy()).stdout(copy()).stderr(Stdio::null());
        (command.spawn().expect("setsid runs"), peer)
    }

    fn images(&self) -> PathBuf {
        let path = self.dir.path().join("images");
        fs::create_dir_all(&path).expect("a folder");
        path
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).expect("written");
        path
    }

    /// Runs `criu dump` or `restore` with the plugin, to its end.
    fn criu(&self, action: &str, arguments: &[&str]) {
        let status = self.criu_command(action, arguments).status().expect("criu runs");
        assert!(status.success(), "criu {action}: {}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.images().join("criu.log")).unwrap_or_default()
    }

    fn criu_command(&self, action: &str, arguments: &[&str]) -> Command {
        let namespace = format!("/proc/{}/fd/{}", std::process::id(), self.ns.as_fd().as_raw_fd());
        let mut command = Command::new("bash");
        command.args(["-c", "exec 9<\"$0\" && exec \"$@\"", &namespace]).arg(criu());
        command.args([action, "--tcp-close", "-v4", "-o", "criu.log", "--lib"]).arg(plugins());
        command.arg("-D").arg(self.images()).args(arguments).env("SOCCR_RUN_DIR", self.run_dir());
        command.stdin(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn run_dir(&self) -> PathBuf {
        self.run.clone()
    }

    /// Begins a dump, as container runtimes do, and leaves criu waiting when it has just locked the namespace.
    fn waiting_dump(&self, method: u8, configuration: &str) -> Dump {
        let images = File::open(self.images()).expect("the folder");
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .expect("sockets");
        let mut command = Command::new("sh");
        command
            .args(["-c", "exec \"$0\" swrk 3 3<&0 </dev/null"])
            .arg(criu())
            .env("SOCCR_RUN_DIR", self.run_dir());
        let criu = command.stdin(theirs).stderr(Stdio::null()).spawn().expect("criu runs");
        let dump = Dump { criu, images, socket: ours };
        let options = [
            number(1, dump.images.as_raw_fd().cast_unsigned()),
            number(2, self.server.id()),
            number(5, 1), // tcp_established
            bytes(10, b"criu.log"),
            number(12, 1), // notify_scripts
            bytes(37, format!("net[{}]:tree", self.ns.inode()).as_bytes()),
            number(64, method.into()),
            bytes(51, self.file("criu.conf", configuration).as_os_str().as_bytes()),
        ];
        write(&dump.socket, &[number(1, 1), bytes(2, &options.concat())].concat()).expect("asked to dump");
        let mut said = [0; 4096];
        loop {
            let len = read(&dump.socket, &mut said).expect("criu answers");
            assert!(len > 0, "criu ended: {}", self.log());
            // It asks this between its lock and its first look into a task.
            if said[..len].windows(15).any(|word| word == b"query-ext-files") {
                return dump;
            }
            write(&dump.socket, &[number(1, 6), number(3, 1)].concat()).expect("criu goes on");
        }
    }

    fn is_locked(&self) -> bool {
        !stock::find_namespace_locks(&self.ns).expect("locks").is_empty()
    }

    /// The agent may be a moment behind.
    fn wait_until_clean(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.is_locked() || !self.done(&["status"]).is_empty() {
            assert!(Instant::now() < deadline, "{}", self.done(&["status"]));
        }
    }

    /// As the agent does before criu locks anything.
    fn record(&self, dump: &Dump) {
        let store = Store::create_at(self.run_dir()).expect("the records");
        let criu = dump.criu.id().cast_signed();
        let recorder = Recorder::new("dump", Phase::Saving, dump.images.as_fd(), criu);
        let mut recorder = recorder.expect("a record").keep_in(store);
        recorder.add_criu_lock(&self.ns);
        recorder.add_task(self.server.id().cast_signed());
        recorder.save(Phase::Saving).expect("written");
        // The agent is this test; it dies with criu.
        let path = self.run_dir().join("dump");
        let text = fs::read_to_string(&path).expect("the record");
        let (agent, dead) = (ProcessId::this().expect("this process"), recorder.record().criu);
        let json = |id| serde_json::to_string(&id).expect("JSON");
        fs::write(&path, text.replace(&json(agent), &json(dead))).expect("the record");
    }

    /// Sends more than one window, and gets back the same.
    fn echoes(&mut self) {
        let bytes = pattern(7, 1_000_000);
        let mut writer = self.peer.try_clone().expect("a copy");
        let sent = bytes.clone();
        let writing = std::thread::spawn(move || writer.write_all(&sent));
        expect_bytes(&mut self.peer, &bytes);
        writing.join().expect("no panic").expect("sent");
    }
}

/// A criu that waits for our answer.
struct Dump {
    criu: Child,
    images: File,
    socket: OwnedFd,
}

impl Dump {
    fn kill(mut self) {
        self.criu.kill().expect("killed");
        self.criu.wait().expect("its end");
    }
}

/// A field of a protobuf message.
fn number(field: u32, value: u32) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn bytes(field: u32, value: &[u8]) -> Vec<u8> {
    [&varint(field << 3 | 2), &varint(value.len().try_into().expect("short")), value].concat()
}

fn varint(mut value: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    bytes.push(value.to_le_bytes()[0]);
    bytes
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Nobody has recorded the dump: stock CRIU made it.
fn stock_dump(method: u8) {
    let mut stage = Stage::new();
    stage.echoes();
    let dump = stage.waiting_dump(method, "");
    assert!(stage.is_locked());
    let refused = stage.soccr(&["clean", "--stock-rules"]);
    let why = String::from_utf8(refused.stderr).expect("text");
    assert!(!refused.status.success() && why.contains("a criu may be at work") && stage.is_locked(), "{why}");
    dump.kill();
    assert!(stage.is_locked());
    let shown = stage.done(&["status"]);
    assert!(shown.contains("CRIU's lock of the whole namespace"), "{shown}");
    let path = format!("/proc/{}/ns/net", stage.server.id());
    let told = stage.done(&["clean", "--stock-rules", "--netns", &path]);
    assert!(told.contains("CRIU's lock of the whole namespace") && !stage.is_locked(), "{told}");
    stage.echoes();
    assert_eq!(stage.done(&["status"]), "");
}

/// The agent has recorded the dump, and died with criu.
fn recorded_dump(method: u8) {
    let mut stage = Stage::new();
    let dump = stage.waiting_dump(method, "");
    stage.record(&dump);
    assert!(!stage.soccr(&["clean", "--all"]).status.success() && stage.is_locked());
    dump.kill();
    let shown = stage.done(&["status"]);
    assert!(shown.contains("orphaned") && shown.contains(&format!("{} (whole)", stage.ns)), "{shown}");
    assert!(!shown.contains("Not ours"), "{shown}");
    let told = stage.done(&["clean", "--orphans"]);
    assert!(told.contains("CRIU's lock of the whole namespace") && !stage.is_locked(), "{told}");
    stage.echoes();
    assert_eq!(stage.done(&["status"]), "");
}

/// The plugin's agent lives on when its criu is killed, and the tasks do.
fn killed_with_plugin(method: u8) {
    let mut stage = Stage::new();
    stage.echoes();
    let dump = stage.waiting_dump(method, &format!("tcp-close\nlibdir {}\n", plugins().display()));
    assert!(stage.is_locked());
    dump.kill();
    stage.echoes();
    stage.wait_until_clean();
}

/// CRIU forgets its lock when the transfer of lazy pages fails, and lets the tasks run.
fn lazy_transfer_that_fails(method: &str) {
    let mut stage = Stage::new();
    let (pid, namespace) = (stage.server.id().to_string(), format!("net[{}]:tree", stage.ns.inode()));
    let lazy = ["--lazy-pages", "--address", "127.0.0.1", "--port", "7001", "--network-lock", method];
    let mut command = stage.criu_command("dump", &["-t", &pid, "--external", &namespace]);
    let mut dump = command.args(lazy).spawn().expect("criu runs");
    let mut client = loop {
        assert!(dump.try_wait().expect("its state").is_none(), "{}", stage.log());
        if let Ok(client) = TcpStream::connect("127.0.0.1:7001") {
            break client;
        }
    };
    client.write_all(&[0xff; 64]).expect("sent what is no request for pages");
    assert!(!dump.wait().expect("its end").success(), "the transfer did not fail");
    stage.echoes();
    stage.wait_until_clean();
}

/// What the agent may do, and who can reach it, whatever criu may do.
fn agent_of_a_dump() {
    // CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_PTRACE, CAP_SYS_ADMIN
    const EIGHT: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 19 | 1 << 21;
    let stage = Stage::new();
    let dump = stage.waiting_dump(NFTABLES, &format!("tcp-close\nlibdir {}\n", plugins().display()));
    let processes = fs::read_dir("/proc").expect("processes").flatten().map(|entry| entry.path());
    let is_agent =
        |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|it| it == "soccr-agent\n");
    let agents: Vec<PathBuf> = processes.filter(is_agent).collect();
    let [agent] = &agents[..] else { panic!("{agents:?}") };
    let status = fs::read_to_string(agent.join("status")).expect("its status");
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).expect("a field").trim();
    for (set, least) in [("CapInh:", 0), ("CapAmb:", 0), ("CapPrm:", EIGHT), ("CapEff:", EIGHT)] {
        assert_eq!(u64::from_str_radix(field(set), 16), Ok(least), "{set}");
    }
    // So that no program that it starts gets them back.
    assert_eq!(field("NoNewPrivs:"), "1");
    // It has sockets of criu, without a name that others could connect to, and no files but two folders.
    let files = fs::read_dir(agent.join("fd")).expect("its files").flatten();
    let files: Vec<PathBuf> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
    let unix = fs::read_to_string(agent.join("net/unix")).expect("sockets");
    for file in files.iter().map(|file| file.display().to_string()) {
        if let Some(inode) = file.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) {
            let line = unix.lines().find(|line| line.split_whitespace().nth(6) == Some(inode));
            assert!(line.is_none_or(|line| line.split_whitespace().count() == 7), "{line:?}");
        } else {
            let folders = [stage.images(), stage.run_dir(), "/dev/null".into()];
            let known = folders.iter().any(|folder| file == folder.display().to_string());
            assert!(known || file.starts_with("anon_inode:") || file.starts_with("net:["), "{file}");
        }
    }
    dump.kill();
    stage.wait_until_clean();
}

/// Nobody is in the namespace until the restore.
fn dumped_with_plugin(method: &str) {
    let mut stage = Stage::new();
    stage.echoes();
    let (pid, namespace) = (stage.server.id().to_string(), format!("net[{}]:tree", stage.ns.inode()));
    stage.criu("dump", &["-t", &pid, "--external", &namespace, "--network-lock", method]);
    stage.server.wait().expect("its end");
    assert!(!stage.is_locked(), "others in this namespace would depend on the restore");
    let locks = lock::list(&stage.ns).expect("locks");
    assert!(locks.len() == 1 && locks[0].entries > 0, "{locks:?}");
    for arguments in [["status"].as_slice(), &["status", "--json"]] {
        let shown = stage.done(arguments);
        assert!(shown.contains("dumped") && shown.contains(&stage.ns.inode().to_string()), "{shown}");
        assert!(!shown.contains("Not ours"), "{shown}");
    }
    stage.criu("restore", &["-d", "--inherit-fd", "fd[9]:tree", "--network-lock", method]);
    stage.echoes();
    stage.wait_until_clean();
}

/// Images that somebody sent, and that claim to be of the dump of another.
fn images_with_anothers_id() {
    let dump = |stage: &mut Stage| {
        let pid = stage.server.id().to_string();
        stage.criu("dump", &["-t", &pid]);
        stage.server.wait().expect("its end");
    };
    let mut victim = Stage::at_home(None);
    dump(&mut victim);
    let status: serde_json::Value = serde_json::from_str(&victim.done(&["status", "--json"])).expect("JSON");
    let id = status["records"][0]["id"].as_str().expect("its id").to_owned();
    let mut hostile = Stage::at_home(Some(&victim));
    dump(&mut hostile);
    release_to_stock(&ImageDir::open(&hostile.images()).expect("images"), Some(&id)).expect("another id");
    let restored = hostile.criu_command("restore", &["-d"]).status().expect("criu runs");
    let locks: Vec<_> =
        lock::list(&victim.ns).expect("locks").into_iter().map(|lock| lock.name.to_string()).collect();
    assert!(
        locks.contains(&format!("CRIU-{id}")),
        "the restore (success: {}) left {locks:?}",
        restored.success()
    );
    assert!(victim.done(&["status"]).contains(&id));
    victim.criu("restore", &["-d"]);
    victim.echoes();
}

/// A restore of connections that nobody has kept still any more says so.
fn lease_that_ended() {
    let mut stage = Stage::at_home(None);
    stage.echoes();
    let pid = stage.server.id().to_string();
    let mut dump = stage.criu_command("dump", &["-t", &pid]);
    assert!(dump.env("SOCCR_LOCK_LEASE", "1").status().expect("criu runs").success(), "{}", stage.log());
    stage.server.wait().expect("its end");
    while lock::list(&stage.ns).expect("locks").iter().any(|lock| lock.entries > 0) {
        std::thread::yield_now(); // the kernel tells nobody of it
    }
    stage.criu("restore", &["-d"]);
    assert!(
        stage.log().contains("is gone: connections whose peers have sent meanwhile were reset"),
        "{}",
        stage.log()
    );
    stage.echoes();
    stage.wait_until_clean();
}

#[test]
fn a_lease_that_ended_is_told() {
    on_own_host("a_lease_that_ended_is_told", lease_that_ended);
}

#[test]
fn stock_criu_with_iptables() {
    on_own_host("stock_criu_with_iptables", || stock_dump(IPTABLES));
}

#[test]
fn stock_criu_with_nftables() {
    on_own_host("stock_criu_with_nftables", || stock_dump(NFTABLES));
}

#[test]
fn with_a_record_and_iptables() {
    on_own_host("with_a_record_and_iptables", || recorded_dump(IPTABLES));
}

#[test]
fn with_a_record_and_nftables() {
    on_own_host("with_a_record_and_nftables", || recorded_dump(NFTABLES));
}

#[test]
fn the_agent_unlocks_with_iptables() {
    on_own_host("the_agent_unlocks_with_iptables", || killed_with_plugin(IPTABLES));
}

#[test]
fn the_agent_unlocks_with_nftables() {
    on_own_host("the_agent_unlocks_with_nftables", || killed_with_plugin(NFTABLES));
}

#[test]
fn a_dump_that_waits_is_shown_with_iptables() {
    on_own_host("a_dump_that_waits_is_shown_with_iptables", || dumped_with_plugin("iptables"));
}

#[test]
fn a_dump_that_waits_is_shown_with_nftables() {
    on_own_host("a_dump_that_waits_is_shown_with_nftables", || dumped_with_plugin("nftables"));
}

#[test]
fn the_agent_may_do_what_it_needs() {
    on_own_host("the_agent_may_do_what_it_needs", agent_of_a_dump);
}

#[test]
fn a_lazy_transfer_fails_with_iptables() {
    on_own_host("a_lazy_transfer_fails_with_iptables", || lazy_transfer_that_fails("iptables"));
}

#[test]
fn a_lazy_transfer_fails_with_nftables() {
    on_own_host("a_lazy_transfer_fails_with_nftables", || lazy_transfer_that_fails("nftables"));
}

#[test]
fn images_release_no_lock_of_another_dump() {
    on_own_host("images_release_no_lock_of_another_dump", images_with_anothers_id);
}
