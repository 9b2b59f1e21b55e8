//! `soccr enable`, `disable` and `check` on runtimes that only say their versions, with a PATH and a root of their own.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use support::{Soccr, program};
use tempfile::TempDir;

const OUR_LINES: &str = "tcp-close\nlibdir ";
const WITH_CRIU: &str = "echo 'crun version 1.28'; echo '+SYSTEMD +SELINUX +CRIU +YAJL'";
const RUNC: &str = "echo 'runc version 1.1.5+ds1'";
const CRIU: &str = "echo 'Version: 4.2.1'";

/// A root folder, and a PATH with nothing else on it.
struct Host {
    dir: TempDir,
}

impl Soccr for Host {
    fn command(&self) -> Command {
        let mut command = program();
        command.env("PATH", self.path("bin")).env("HOME", self.path("root")).env_remove("CRIU_CONFIG_FILE");
        command
    }

    fn soccr(&self, arguments: &[&str]) -> Output {
        let mut command = self.command();
        command.args(arguments).args(["--root", &self.text("root")]).output().expect("soccr runs")
    }
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().expect("a folder") };
        for folder in ["bin", "root", "plugins", "lib"] {
            fs::create_dir(host.path(folder)).expect("a folder");
        }
        host.library("plugins/soccr_plugin.so", "int CR_PLUGIN_DESC;");
        host
    }

    /// A host on which runc, crun and podman (with crun) are as they should be.
    fn complete() -> Self {
        let host = Self::new();
        host.program("criu", CRIU);
        host.program("runc", RUNC);
        host.program("crun", WITH_CRIU);
        host.libcriu("criu_set_config_file");
        host.podman("crun");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().expect("a plain path").to_owned()
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("executable");
    }

    fn podman(&self, runtime: &str) {
        let path = self.path("bin").join(runtime);
        let script =
            format!("case $1 in --version) echo podman version 5.4.2;; info) echo {};; esac", path.display());
        self.program("podman", &script);
    }

    /// A libcriu with this function, which the dynamic linker's cache has.
    fn libcriu(&self, function: &str) {
        self.library("lib/libcriu.so.2.0", &format!("int {function}(void) {{ return 0; }}"));
        let line = format!("\tlibcriu.so.2 (libc6,x86-64) => {}", self.text("lib/libcriu.so.2.0"));
        self.program("ldconfig", &format!("echo '1 libs found in cache'; echo '{line}'"));
    }

    fn library(&self, name: &str, source: &str) {
        let file = self.path("source.c");
        fs::write(&file, source).expect("written");
        let mut cc = Command::new("cc");
        let status = cc.args(["-shared", "-fPIC", "-o"]).arg(self.path(name)).arg(file).status();
        assert!(status.expect("cc runs").success());
    }

    fn config(&self, name: &str) -> PathBuf {
        self.path("root/etc/criu").join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.config(name)).expect("the file")
    }

    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path("root/etc/criu")).expect("a folder");
        fs::write(self.config(name), text).expect("written");
    }

    fn enable(&self, arguments: &[&str]) -> String {
        self.done(&[&["enable", "--plugins", &self.text("plugins")], arguments].concat())
    }

    fn enable_refused(&self, arguments: &[&str]) -> String {
        self.refused(&[&["enable", "--plugins", &self.text("plugins")], arguments].concat())
    }

    /// What `check` says of the runtimes, whether or not it is content.
    fn check(&self) -> Value {
        let output = self.soccr(&["check", "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        report["runtimes"].clone()
    }

    fn outcome(&self, kind: &str) -> (String, String) {
        let runtimes = self.check();
        let mut runtimes = runtimes.as_array().expect("a list").iter();
        let found = runtimes.find(|runtime| runtime["kind"] == json!(kind)).expect("it is on PATH");
        (found["outcome"].as_str().expect("a word").to_owned(), found["problems"].to_string())
    }
}

#[test]
fn what_is_done_is_told_as_json() {
    let host = Host::complete();
    let plugins = host.text("plugins");
    let file = host.config("runc.conf");
    let enable = ["enable", "runc", "--plugins", &plugins];
    let would = host.json(&[&enable[..], &["--dry-run"]].concat());
    assert_eq!((&would[0]["file"], &would[0]["dry_run"]), (&json!(file), &json!(true)));
    assert!(!file.exists());
    let told = host.json(&enable);
    assert!(told[0]["done"].as_str().expect("text").starts_with("made: tcp-close"), "{told}");
    assert_eq!(host.json(&["disable"])[0]["done"], json!("removed"));
    assert_eq!(host.json(&["disable"]), json!([]));
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("text")).collect();
    names.sort();
    names
}

#[test]
fn each_runtime_gets_its_file_and_all_is_taken_back() {
    let host = Host::complete();
    let said = host.enable(&[]);
    assert!(said.contains("runc.conf: made") && said.contains("crun.conf: made"), "{said}");
    assert_eq!(names(&host.path("root/etc/criu")), ["crun.conf", "runc.conf"]);
    let ours = format!("{OUR_LINES}{}\n", host.text("plugins"));
    assert!(host.read("runc.conf").contains(&ours) && host.read("crun.conf").contains(&ours));
    assert_eq!(fs::metadata(host.config("runc.conf")).expect("the file").mode() & 0o777, 0o644);
    for kind in ["runc", "crun", "podman"] {
        assert_eq!(host.outcome(kind), ("carried".into(), "[]".into()), "{kind}");
    }
    assert_eq!(host.outcome("criu").0, "stock");

    let before = host.read("runc.conf");
    assert!(host.enable(&["runc"]).contains("names the plugin already"));
    assert_eq!(host.read("runc.conf"), before);
    let said = host.done(&["disable"]);
    assert!(said.contains("runc.conf: removed") && said.contains("crun.conf: removed"), "{said}");
    assert!(!host.path("root/etc/criu").exists(), "the folder was ours");
    assert!(host.path("root/etc").exists(), "this too, but others may count on it");
    assert!(host.done(&["disable"]).contains("nothing of soccr's"));
}

#[test]
fn others_keep_what_is_theirs() {
    let host = Host::complete();
    let theirs = "# ours\nlog-file /tmp/log\nlibdir \"PLUGINS\" # the same\nno-end"
        .replace("PLUGINS", &host.text("plugins"));
    host.write("real.conf", &theirs);
    fs::set_permissions(host.config("real.conf"), PermissionsExt::from_mode(0o640)).expect("a mode");
    symlink("real.conf", host.config("runc.conf")).expect("a link");
    host.write("default.conf", "");
    host.enable(&["runc"]);
    host.enable(&["default"]);
    assert!(fs::symlink_metadata(host.config("runc.conf")).expect("the link").is_symlink());
    assert_eq!(fs::metadata(host.config("real.conf")).expect("the file").mode() & 0o777, 0o640);
    assert!(host.read("real.conf").ends_with(&theirs) && host.read("real.conf").contains(OUR_LINES));
    host.done(&["disable", "runc"]);
    assert_eq!(host.read("real.conf"), theirs);
    host.done(&["disable", "default"]);
    assert_eq!(names(&host.path("root/etc/criu")), ["default.conf", "real.conf", "runc.conf"]);
    assert_eq!(host.read("default.conf"), "");
}

#[test]
fn what_was_added_to_a_file_of_ours_stays() {
    let host = Host::complete();
    host.enable(&["runc"]);
    let text = host.read("runc.conf");
    host.write("runc.conf", &format!("{text}log-file x\n"));
    host.enable(&["default"]);
    host.done(&["disable", "runc"]);
    assert_eq!(host.read("runc.conf"), "log-file x\n");
    fs::remove_file(host.config("runc.conf")).expect("removed");
    host.done(&["disable"]);
    assert!(!host.path("root/etc/criu").exists(), "the folder came with the first file of ours");
}

#[test]
fn a_plugin_that_moves_is_followed() {
    let host = Host::complete();
    host.enable(&["runc"]);
    fs::rename(host.path("plugins"), host.path("moved")).expect("moved");
    let said = host.done(&["enable", "runc", "--plugins", &host.text("moved")]);
    assert!(said.contains("changed"), "{said}");
    assert!(host.read("runc.conf").contains(&format!("libdir {}\n", host.text("moved"))));
    assert_eq!(host.read("runc.conf").matches("libdir").count(), 1);
}

#[test]
fn a_dry_run_touches_nothing() {
    let host = Host::complete();
    assert!(host.enable(&["--dry-run"]).contains("would be made"));
    assert!(!host.path("root/etc").exists());
    host.enable(&["runc"]);
    let before = host.read("runc.conf");
    assert!(host.done(&["disable", "--dry-run"]).contains("would be removed"));
    assert_eq!(host.read("runc.conf"), before);
}

#[test]
fn what_is_against_it_is_named_and_left() {
    let host = Host::complete();
    for (theirs, why) in [
        ("log-file x\nlibdir /usr/lib/criu\n", "runc.conf:2: libdir is /usr/lib/criu already"),
        ("no-tcp-close\n", "runc.conf:1: no-tcp-close is against"),
        ("--tcp-close\n", "runc.conf:1: no criu takes this line"),
        ("# >>> soccr enable did something\n", "goes on as `soccr enable` does not write it"),
    ] {
        host.write("runc.conf", theirs);
        let said = host.enable_refused(&["runc"]);
        assert!(said.contains(why), "{said}");
        assert_eq!(host.read("runc.conf"), theirs);
    }
    host.write("runc.conf", "tcp-established\n");
    let output = host.soccr(&["enable", "runc", "--plugins", &host.text("plugins")]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("tcp-established means nothing beside"));
    // crun would not see runc.conf any more.
    assert!(host.enable_refused(&["crun"]).contains("`soccr enable runc` is for both"));
}

#[test]
fn a_folder_that_would_end_criu_is_refused() {
    let host = Host::complete();
    fs::write(host.path("plugins/broken.so"), "text").expect("written");
    assert!(host.enable_refused(&["runc"]).contains("broken.so: is no library"));
    fs::remove_file(host.path("plugins/broken.so")).expect("removed");
    host.library("plugins/soccr_plugin.so", "int something_else;");
    assert!(host.enable_refused(&["runc"]).contains("has no CR_PLUGIN_DESC"));
    fs::remove_file(host.path("plugins/soccr_plugin.so")).expect("removed");
    assert!(host.enable_refused(&["runc"]).contains("there is no soccr_plugin.so"));
    assert!(!host.path("root/etc").exists());
}

#[test]
fn a_crun_that_reads_no_file_of_its_own_is_not_given_one() {
    let host = Host::complete();
    for (script, function, why) in [
        ("echo 'crun version 1.8.1'; echo '+SYSTEMD +YAJL'", "criu_set_config_file", "built without CRIU"),
        ("echo 'crun version 1.21'; echo '+CRIU'", "criu_set_config_file", "`soccr enable default`"),
        ("echo 'crun version 1.23'; echo '+CRIU'", "criu_set_config_file", "takes tcp-close back"),
        (WITH_CRIU, "criu_set_pid", "takes tcp-close back"),
    ] {
        host.program("crun", script);
        host.libcriu(function);
        for runtime in ["crun", "podman"] {
            let said = host.enable_refused(&[runtime]);
            assert!(said.contains(why), "{script} {function}: {said}");
        }
    }
    assert!(!host.path("root/etc").exists());
    host.podman("runc");
    assert!(host.enable(&["podman"]).contains("runc.conf: made"));
    host.program("ldconfig", "echo '0 libs found in cache'");
    assert!(host.enable_refused(&["crun"]).contains("no libcriu.so.2"));
    fs::remove_file(host.path("bin/crun")).expect("removed");
    assert!(host.enable_refused(&["crun"]).contains("there is no crun on PATH"));
}

#[test]
fn a_host_without_runtimes_has_only_the_default() {
    let host = Host::new();
    assert!(host.enable_refused(&[]).contains("`soccr enable default`"));
    assert!(host.enable(&["default"]).contains("default.conf: made"));
    let report = host.done(&["check"]);
    assert!(report.contains("no criu on PATH"), "{report}");
}

#[test]
fn check_tells_a_configuration_that_is_wrong() {
    let host = Host::complete();
    let plugins = host.text("plugins");
    for (text, why) in [
        ("tcp-close\n".to_owned(), "a restore drops the connections"),
        (format!("libdir {plugins}\n"), "tcp-close is not set"),
        (format!("tcp-close\nlibdir {plugins} x\n"), "more than one value"),
        ("tcp-close\nlibdir /nowhere\n".to_owned(), "/nowhere"),
    ] {
        host.write("runc.conf", &text);
        let (outcome, problems) = host.outcome("runc");
        assert!(outcome == "broken" && problems.contains(why), "{text}: {problems}");
        assert_eq!(host.outcome("crun").0, "broken", "it reads runc.conf too");
        assert_eq!(host.outcome("criu").0, "stock");
        assert!(!host.soccr(&["check"]).status.success());
    }
    host.write("runc.conf", &format!("tcp-close\nlibdir {plugins}\n"));
    assert_eq!(host.outcome("runc").0, "carried");
    fs::write(host.path("plugins/broken.so"), "text").expect("written");
    let (outcome, problems) = host.outcome("runc");
    assert!(outcome == "broken" && problems.contains("broken.so"), "{problems}");
}

#[test]
fn check_tells_a_file_that_nobody_reads() {
    let host = Host::complete();
    host.enable(&["crun"]);
    assert_eq!(host.outcome("podman").0, "carried");
    host.program("crun", "echo 'crun version 1.21'; echo '+CRIU'");
    for kind in ["crun", "podman"] {
        let (outcome, problems) = host.outcome(kind);
        assert!(outcome == "broken" && problems.contains("does not have criu read it"), "{kind}: {problems}");
    }
    host.done(&["disable"]);
    let shown = host.done(&["check"]);
    assert!(!shown.contains("`soccr enable crun`") && shown.contains("`soccr enable default`"), "{shown}");
    host.enable(&["default"]);
    assert_eq!(host.outcome("crun").0, "carried");
    host.program("crun", "echo 'crun version 1.24'; echo '+CRIU'");
    let (outcome, problems) = host.outcome("crun");
    assert!(outcome == "broken" && problems.contains("takes tcp-close back"), "{problems}");
}

#[test]
fn check_tells_a_criu_that_cannot_work() {
    let host = Host::complete();
    host.program("containerd", "echo 'containerd github.com/containerd/containerd 1.6.20'");
    host.program("lxc-checkpoint", "echo 5.0.2");
    host.enable(&[]);
    host.enable(&["default"]);
    let all = ["runc", "crun", "podman", "containerd", "lxc", "criu"];
    for kind in all {
        assert_eq!(host.outcome(kind), ("carried".into(), "[]".into()), "{kind}");
    }
    host.program("criu", "echo 'Version: 3.17.1'");
    for kind in all {
        let (outcome, problems) = host.outcome(kind);
        assert!(outcome == "broken" && problems.contains("has not the hooks"), "{kind}: {problems}");
    }
    host.program("criu", "echo 'no such library' >&2; exit 127");
    for kind in all {
        let (outcome, problems) = host.outcome(kind);
        assert!(outcome == "broken" && problems.contains("no such library"), "{kind}: {problems}");
    }
    fs::remove_file(host.path("bin/criu")).expect("removed");
    let shown = String::from_utf8(host.soccr(&["check"]).stdout).expect("text");
    assert!(shown.contains("there is no criu on PATH: install CRIU 4.2 or later"), "{shown}");
    assert!(shown.contains("works through"), "{shown}");
}
