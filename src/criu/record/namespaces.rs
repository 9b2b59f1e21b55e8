//! The way back from a network namespace's number to the namespace.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use procfs::process::Process;

use super::NsId;
use crate::criu::tasks::ProcessId;
use crate::kernel::netns::NetNs;

/// The namespaces that were found.
#[derive(Debug, Default)]
pub struct Namespaces {
    found: HashMap<NsId, (NetNs, PathBuf)>,
    /// Some process could not be looked at, so what was not found may still be there.
    hidden: bool,
}

impl Namespaces {
    /// The namespace, if it was found.
    #[must_use]
    pub fn get(&self, id: NsId) -> Option<&NetNs> {
        self.found.get(&id).map(|(ns, _)| ns)
    }

    /// Whether the namespace has certainly ended.
    pub(super) fn is_gone(&self, id: NsId) -> bool {
        !self.hidden && !self.found.contains_key(&id)
    }

    /// All that were found, each with a file that leads to it.
    pub fn iter(&self) -> impl Iterator<Item = (&NetNs, &Path)> {
        self.found.values().map(|(ns, path)| (ns, path.as_path()))
    }
}

/// Finds namespaces that are in use: ours, those of processes, those that are mounted where a process sees them (as
/// `ip netns` and container managers do), and those that a process keeps open. It looks no further than necessary.
pub(super) fn find(wanted: &[NsId]) -> Namespaces {
    search(Some(wanted))
}

/// All namespaces that are in use on this host, as far as this user can see them.
#[must_use]
pub fn all_namespaces() -> Namespaces {
    search(None)
}

fn search(wanted: Option<&[NsId]>) -> Namespaces {
    let mut search = Search { wanted, namespaces: Namespaces::default() };
    search.look_at(Path::new("/proc/self/ns/net"));
    for place in [of_process, mounted, kept_open] {
        let mut views = HashSet::new();
        for pid in pids() {
            if search.is_complete() {
                break;
            }
            place(pid, &mut search, &mut views);
        }
    }
    search.namespaces
}

/// The mount namespaces whose mounts were looked at.
type Views = HashSet<PathBuf>;

struct Search<'a> {
    /// `None`: all.
    wanted: Option<&'a [NsId]>,
    namespaces: Namespaces,
}

impl Search<'_> {
    fn is_complete(&self) -> bool {
        self.wanted.is_some_and(|wanted| wanted.iter().all(|id| self.namespaces.found.contains_key(id)))
    }

    fn look_at(&mut self, path: &Path) {
        if !self.is_complete()
            && let Ok(ns) = NetNs::open(path)
        {
            self.consider(ns, path);
        }
    }

    /// The path is what a process has mounted.
    fn look_within(&mut self, root: &Path, path: &Path) {
        let path = path.strip_prefix("/").unwrap_or(path);
        if !self.is_complete()
            && let Ok(ns) = NetNs::open_within(root, path)
        {
            self.consider(ns, &root.join(path));
        }
    }

    fn consider(&mut self, ns: NetNs, path: &Path) {
        let id = NsId::from(&ns);
        if self.wanted.is_none_or(|wanted| wanted.contains(&id)) {
            self.namespaces.found.entry(id).or_insert_with(|| (ns, path.to_owned()));
        }
    }

    /// A process that is gone or a zombie hides nothing; one that we may not look at may. The exception is an init
    /// with more privileges than this host's root has here, as in containers.
    fn note<T>(&mut self, pid: i32, result: io::Result<T>) -> Option<T> {
        let denied = matches!(&result, Err(error) if error.kind() == io::ErrorKind::PermissionDenied);
        self.namespaces.hidden |=
            denied && pid != 1 && ProcessId::of(pid).is_ok_and(|process| process.lives());
        result.ok()
    }

    /// Looks at the file behind a link of `/proc` if that says that it is a network namespace.
    fn look_behind(&mut self, pid: i32, link: &Path) {
        let target = self.note(pid, std::fs::read_link(link));
        if target.is_some_and(|target| target.to_string_lossy().starts_with("net:[")) {
            self.look_at(link);
        }
    }
}

fn of_process(pid: i32, search: &mut Search<'_>, _: &mut Views) {
    search.look_behind(pid, Path::new(&format!("/proc/{pid}/ns/net")));
}

/// Where namespaces' files are mounted, once in each mount namespace.
fn mounted(pid: i32, search: &mut Search<'_>, views: &mut Views) {
    let Some(view) = search.note(pid, std::fs::read_link(format!("/proc/{pid}/ns/mnt"))) else { return };
    if !views.insert(view) {
        return;
    }
    let mounts = Process::new(pid).and_then(|process| process.mountinfo());
    for mount in mounts.map(|mounts| mounts.0).unwrap_or_default() {
        if mount.fs_type == "nsfs" && mount.root.starts_with("net:[") {
            search.look_within(Path::new(&format!("/proc/{pid}/root")), &mount.mount_point);
        }
    }
}

fn kept_open(pid: i32, search: &mut Search<'_>, _: &mut Views) {
    let entries = search.note(pid, std::fs::read_dir(format!("/proc/{pid}/fd")));
    for entry in entries.into_iter().flatten().flatten() {
        search.look_behind(pid, &entry.path());
    }
}

fn pids() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()))
}
