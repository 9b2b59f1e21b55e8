//! What somebody beside us on the host may try; docs/SECURITY.md names these tests.

#[path = "../support/mod.rs"]
#[allow(dead_code)] // this test program uses its part
mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use soccr::criu::record::{
    self, CleanOptions, LockRecord, NsId, Phase, Record, RecordError, Recorder, State, Store,
};
use soccr::criu::tasks::ProcessId;
use soccr::kernel::netns::{NetNs, NetNsError};
use soccr::lock::{self, LockName, LockOptions, Method, NetworkLock};
use support::{connected, in_own_network};

const NFTABLES: LockOptions = LockOptions { method: Method::Nftables, lease: None, log: None };

/// A process that says when it is ready, and ends with this value.
struct Helper(Child);

impl Helper {
    fn start(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(child)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn why(result: Result<NetNs, NetNsError>) -> ErrorKind {
    match result {
        Err(NetNsError::Open { source, .. }) => source.kind(),
        other => panic!("{other:?}"),
    }
}

/// `/proc/PID/fd/N` can be anything by the time it is opened, and root opens it. A pipe would hold `soccr status` up
/// for ever.
#[test]
fn only_namespaces_are_opened() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("net:[4026531840]");
    mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    for path in [&pipe, Path::new("/dev/zero"), Path::new("/proc/self/stat"), folder.path()] {
        assert_eq!(why(NetNs::open(path)), ErrorKind::InvalidInput, "{}", path.display());
        let inside = path.strip_prefix("/").unwrap();
        assert_eq!(why(NetNs::open_within(Path::new("/"), inside)), ErrorKind::InvalidInput);
    }
    assert_eq!(NetNs::open(Path::new("/proc/self/ns/net")).unwrap(), NetNs::current().unwrap());
}

/// A container decides what its own paths mean, but only within its root.
#[test]
fn no_link_leads_out_of_a_containers_root() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("run")).unwrap();
    for (name, target) in [
        ("absolute", "/proc/self/ns/net"),
        ("relative", "../../../../../../proc/self/ns/net"),
        ("folder", "/proc/self/ns"),
    ] {
        symlink(target, root.path().join("run").join(name)).unwrap();
    }
    for path in ["run/absolute", "run/relative", "run/folder/net", "../../../../../proc/self/ns/net"] {
        assert_eq!(why(NetNs::open_within(root.path(), Path::new(path))), ErrorKind::NotFound, "{path}");
    }
}

/// As `ip netns` and container managers keep them, in a mount namespace that is not ours.
#[test]
fn a_namespace_that_is_only_mounted_elsewhere_is_found() {
    in_own_network(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ns");
        File::create(&path).unwrap();
        let home = format!("/proc/{}/ns/net", std::process::id());
        let script = "mount --bind /proc/self/ns/net \"$0\" && stat -Lc %i \"$0\" > \"$0.inode\" && \
            exec nsenter --net=\"$1\" sh -c 'echo ready; exec cat'";
        let keeper = ["-m", "-n", "sh", "-c", script, path.to_str().unwrap(), &home];
        let keeper = Helper::start("unshare", &keeper);
        let inode: u64 = fs::read_to_string(path.with_extension("inode")).unwrap().trim().parse().unwrap();
        let found = || record::all_namespaces().iter().any(|(ns, _)| ns.inode() == inode);
        assert!(found());
        drop(keeper);
        assert!(!found());
    });
}

/// A record whose criu and agent are dead, with a lock here.
fn orphan(store: &Path, id: &str) -> Record {
    let images = File::open(store.parent().unwrap()).unwrap();
    let this = std::process::id().cast_signed();
    let recorder = Recorder::new(id, Phase::Saving, images.as_fd(), this).unwrap();
    let mut recorder = recorder.keep_in(Store::create_at(store.to_owned()).unwrap());
    let ns = NsId::from(&NetNs::current().unwrap());
    recorder.add_lock(LockRecord { ns, name: LockName::criu(id).unwrap(), method: Method::Nftables });
    recorder.save(Phase::Saving).unwrap();
    let dead = ProcessId { start: 1, ..ProcessId::this().unwrap() };
    Record { criu: dead, agent: dead, ..recorder.record().clone() }
}

/// The pid of a task that is gone is somebody else's now.
#[test]
fn a_pid_that_is_used_again_leads_nowhere() {
    in_own_network(|| {
        let folder = tempfile::tempdir().unwrap();
        let mut record = orphan(&folder.path().join("run"), "old");
        assert_eq!(record.state(), State::Orphaned);
        let other = Helper::start("unshare", &["-n", "sh", "-c", "echo ready; exec cat"]);
        let other = ProcessId::of(other.0.id().cast_signed()).map(|id| (id, other)).unwrap();
        record.tasks = vec![ProcessId { start: other.0.start - 1, ..other.0 }];
        assert_eq!(record::locked_by_criu(&record), []);
        record.tasks = vec![other.0];
        assert_eq!(record::locked_by_criu(&record).len(), 1);
    });
}

/// Who may write a record can only have locks removed that have a name as ours have, one by one.
#[test]
fn a_record_ends_its_own_lock_and_no_other() {
    in_own_network(|| {
        let folder = tempfile::tempdir().unwrap();
        let record = orphan(&folder.path().join("run"), "mine");
        let (near, _far) = connected("127.0.0.1:0");
        let tuple = soccr::repair::four_tuple(near.as_fd()).unwrap();
        let here = NetNs::current().unwrap();
        for name in ["mine", "other"] {
            NetworkLock::lock(&here, &LockName::criu(name).unwrap(), &[tuple], &NFTABLES).unwrap().keep();
        }
        let store = Store::create_at(folder.path().join("run")).unwrap();
        let report = record::clean(&store, &record, CleanOptions::default());
        assert_eq!((report.unlocked.len(), report.problems.len()), (1, 0), "{report:?}");
        let left: Vec<_> = lock::list(&here).unwrap().into_iter().map(|lock| lock.name.to_string()).collect();
        assert_eq!(left, ["CRIU-other"]);
    });
}

/// Whoever else could write into the folder of the records could have locks removed.
#[test]
fn nobody_else_writes_records() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    drop(Store::create_at(run.clone()).unwrap());
    assert_eq!(fs::metadata(&run).unwrap().permissions().mode() & 0o777, 0o700);
    for mode in [0o720, 0o702, 0o777, 0o1777] {
        fs::set_permissions(&run, fs::Permissions::from_mode(mode)).unwrap();
        assert!(matches!(Store::create_at(run.clone()), Err(RecordError::Open { .. })), "{mode:o}");
    }
    if nix::unistd::geteuid().is_root() {
        fs::set_permissions(&run, fs::Permissions::from_mode(0o700)).unwrap();
        nix::unistd::chown(&run, Some(65534.into()), None).unwrap();
        assert!(matches!(Store::create_at(run), Err(RecordError::Foreign { owner: 65534, .. })));
    }
    let link = folder.path().join("link");
    symlink(folder.path(), &link).unwrap();
    assert!(matches!(Store::create_at(link), Err(RecordError::Folder { .. })));
}
