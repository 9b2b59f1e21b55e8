//! A container of a real runc whose criu loads the plugin because `soccr enable runc` said so, and for no other reason.
//!
//! It runs with network, mounts and processes of its own, and with a copy of `/etc`, so nothing on the host changes.

mod support;

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use support::{connected, expect_bytes, pattern, program, skip};

/// Set for the process that has its namespaces.
const INSIDE: &str = "SOCCR_TEST_INSIDE";
const TEST: &str = "a_container_keeps_its_connection";

#[test]
fn a_container_keeps_its_connection() {
    if env::var_os(INSIDE).is_some() {
        return inside();
    }
    if let Some(missing) = missing() {
        return skip(&missing);
    }
    // A shell as the first process, which waits for whoever is left to it.
    let output = Command::new("timeout")
        .args(["--kill-after=5", "60", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"])
        .args([
            "--mount-proc",
            "--propagation=private",
            "sh",
            "-c",
            "ip link set lo up && \"$@\"; exit $?",
            "sh",
        ])
        .arg(env::current_exe().expect("this program"))
        .args([TEST, "--exact", "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("timeout and unshare run");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("runc and criu need root".into());
    }
    let on_path =
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| dir.join("runc").exists());
    if !on_path {
        return Some("there is no runc".into());
    }
    let files = [target().join("criu/criu/criu"), target().join("plugins/soccr_plugin.so")];
    files.into_iter().find(|file| !file.exists()).map(|file| format!("there is no {}", file.display()))
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")
}

/// A container with a `cat` in it, and the folders of its checkpoint.
struct Container {
    name: String,
    dir: PathBuf,
}

fn inside() {
    own_etc();
    let path = env::var("PATH").expect("a PATH");
    let container =
        Container { name: format!("soccr-test-{}", std::process::id()), dir: "/run/container".into() };
    container.make();

    let said = done(soccr(&path, &["enable", "runc"]).arg("--plugins").arg(target().join("plugins")));
    assert_eq!(said.lines().count(), 1, "{said}");
    let report: Value = serde_json::from_str(&done(&mut soccr(&path, &["check", "--json"]))).expect("JSON");
    let runc = &report["runtimes"][0];
    assert_eq!((&runc["kind"], &runc["outcome"]), (&json!("runc"), &json!("carried")), "{runc}");

    let (theirs, mut peer) = connected("127.0.0.1:0");
    theirs.set_read_timeout(None).expect("no timeout");
    let socket = OwnedFd::from(theirs);
    let copy = || Stdio::from(socket.try_clone().expect("a copy"));
    let mut run = container.runc(&path, &["run", "-d", "--pid-file", "pid"]);
    assert!(run.stdin(copy()).stdout(copy()).stderr(Stdio::null()).status().expect("runc runs").success());
    drop(run); // and its copies
    drop(socket);
    echoes(&mut peer, 1);
    let pid = fs::read_to_string(container.dir.join("pid")).expect("its pid");
    let said = done(&mut soccr(&path, &["check", "--pid", pid.trim()]));
    assert!(said.starts_with("1 connections of 1 tasks"), "{said}");

    container.checkpoint_and_restore(&path, &mut peer);
    assert_eq!(done(&mut soccr(&path, &["status"])), "");
    assert!(done(&mut soccr(&path, &["disable"])).contains("removed"));
    assert!(!Path::new("/etc/criu").exists(), "it was not there before");
    drop(peer); // the end of the stream, by which cat ends
    done(&mut container.runc(&path, &["delete", "--force"]));
}

/// `/run` is empty, and `/etc` a copy in it without CRIU's configuration.
fn own_etc() {
    let none: Option<&str> = None;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("a tmpfs");
    done(Command::new("cp").args(["--archive", "/etc", "/run/etc"]));
    let _ = fs::remove_dir_all("/run/etc/criu"); // there may be none
    mount(Some("/run/etc"), "/etc", none, MsFlags::MS_BIND, none).expect("a bind mount");
}

impl Container {
    fn make(&self) {
        for folder in ["rootfs/proc", "rootfs/dev", "rootfs/usr", "rootfs/tmp"] {
            fs::create_dir_all(self.dir.join(folder)).expect("a folder");
        }
        for link in ["bin", "lib", "lib64"] {
            let target = Path::new("usr").join(link);
            std::os::unix::fs::symlink(target, self.dir.join("rootfs").join(link)).expect("a link");
        }
        let mounts = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/usr", "type": "none", "source": "/usr", "options": ["rbind", "ro"] },
        ]);
        let namespaces = ["pid", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
        let process = json!({ "args": ["/usr/bin/cat"], "cwd": "/", "user": { "uid": 0, "gid": 0 } });
        let config = json!({
            "ociVersion": "1.0.2", "process": process, "root": { "path": "rootfs" }, "mounts": mounts,
            "linux": { "namespaces": namespaces },
        });
        fs::write(self.dir.join("config.json"), config.to_string()).expect("written");
    }

    fn runc(&self, path: &str, arguments: &[&str]) -> Command {
        let criu = target().join("criu/criu");
        let mut runc = Command::new("runc");
        runc.args(["--root", "state"]).args(arguments).arg(&self.name).current_dir(&self.dir);
        runc.env("PATH", format!("{}:{path}", criu.display())).env("HOME", "/run");
        runc
    }

    fn checkpoint_and_restore(&self, path: &str, peer: &mut TcpStream) {
        const FOLDERS: [&str; 5] = ["--tcp-established", "--image-path", "images", "--work-path", "work"];
        let checkpoint = self.runc(path, &[&["checkpoint"], &FOLDERS[..]].concat()).output();
        self.look(&checkpoint.expect("runc runs"), "dump.log", "1 TCP connections saved");
        let images = self.dir.join("images");
        let shown = done(soccr(path, &["show"]).arg(images));
        assert!(shown.contains("ESTABLISHED"), "{shown}");

        let bytes = pattern(2, 1000);
        peer.write_all(&bytes).expect("into the lock");
        let mut restore = self.runc(path, &[&["restore", "-d"], &FOLDERS[..]].concat());
        let null =
            || Stdio::from(File::options().read(true).write(true).open("/dev/null").expect("/dev/null"));
        let restored = restore.stdin(null()).stdout(null()).stderr(null()).output();
        self.look(&restored.expect("runc runs"), "restore.log", "1 TCP connections go on");
        expect_bytes(peer, &bytes);
        echoes(peer, 3);
    }

    /// runc succeeded, and criu's log has this.
    fn look(&self, output: &Output, log: &str, want: &str) {
        let log = fs::read_to_string(self.dir.join("work").join(log)).unwrap_or_default();
        assert!(output.status.success() && log.contains(want), "{output:?}\n{log}");
    }
}

fn soccr(path: &str, arguments: &[&str]) -> Command {
    let criu = target().join("criu/criu");
    let mut soccr = program();
    soccr.args(arguments).env("PATH", format!("{}:{path}", criu.display())).env("HOME", "/run");
    soccr
}

fn done(command: &mut Command) -> String {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn echoes(peer: &mut TcpStream, seed: u32) {
    let bytes = pattern(seed, 10_000);
    peer.write_all(&bytes).expect("sent");
    expect_bytes(peer, &bytes);
}
