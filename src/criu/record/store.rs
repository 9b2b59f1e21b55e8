//! The folder of the records.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{AccessFlags, UnlinkatFlags, access, geteuid, mkdir, unlinkat};

use super::file::{self, LARGEST};
use super::{ConnectionRecord, Record, RecordError, RecordId};
use crate::criu::tasks::ProcessId;

/// Where the records are, unless [`FOLDER_VARIABLE`] names another folder.
pub const DEFAULT_FOLDER: &str = "/run/soccr";
/// The environment variable that names the folder of the records.
pub const FOLDER_VARIABLE: &str = "SOCCR_RUN_DIR";

/// Written under such a name first, with the writer's pid and start time, then renamed.
const TEMPORARY: &str = ".new-";

/// The socket behind which packets are held for this record's restore.
const HELD: &str = ".held-";

/// The folder of the records.
#[derive(Debug)]
pub struct Store {
    fd: OwnedFd,
    path: PathBuf,
}

/// A record that was found, or why a file that should be one is none.
#[derive(Debug)]
pub struct Listed {
    /// The record's id.
    pub id: RecordId,
    /// The record.
    pub record: Result<Record, RecordError>,
}

/// The folder that the environment chooses. Who cannot write to `/run`, as in a user namespace on a host of others, has
/// a folder of its own, which the XDG Base Directory Specification makes private.
fn chosen_folder() -> PathBuf {
    let named = |variable| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    let default = PathBuf::from(DEFAULT_FOLDER);
    let own = || {
        let writable = default.parent().is_some_and(|run| access(run, AccessFlags::W_OK).is_ok());
        if writable { None } else { named("XDG_RUNTIME_DIR").map(|folder| folder.join("soccr")) }
    };
    named(FOLDER_VARIABLE).or_else(own).unwrap_or(default)
}

impl Store {
    /// Opens the folder, and makes it where it is missing.
    ///
    /// # Errors
    /// [`RecordError::Folder`], [`RecordError::Foreign`], [`RecordError::Open`].
    pub fn create() -> Result<Self, RecordError> {
        Self::create_at(chosen_folder())
    }

    /// Opens the folder `path`, and makes it where it is missing.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_at(path: PathBuf) -> Result<Self, RecordError> {
        match mkdir(&path, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => Self::open_at(path),
            Err(errno) => Err(RecordError::Folder { path, source: errno.into() }),
        }
    }

    /// Opens the folder; `None` where it is missing, since there are no records then.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn open() -> Result<Option<Self>, RecordError> {
        match Self::open_at(chosen_folder()) {
            Err(RecordError::Folder { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    fn open_at(path: PathBuf) -> Result<Self, RecordError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let failed = |errno: Errno| RecordError::Folder { path: path.clone(), source: errno.into() };
        let fd = open(&path, flags, Mode::empty()).map_err(failed)?;
        let stat = fstat(&fd).map_err(failed)?;
        if stat.st_uid != geteuid().as_raw() {
            return Err(RecordError::Foreign { path, owner: stat.st_uid });
        }
        if stat.st_mode & 0o022 != 0 {
            return Err(RecordError::Open { path, mode: stat.st_mode & 0o777 });
        }
        Ok(Self { fd, path })
    }

    /// The folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All records, by id. A file that cannot be read is listed with the reason.
    ///
    /// # Errors
    /// [`RecordError::Io`] when the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Listed>, RecordError> {
        let mut listed = Vec::new();
        for name in self.names()? {
            let Ok(id) = name.parse::<RecordId>() else { continue };
            match self.read(&id) {
                Ok(Some((record, _))) => listed.push(Listed { id, record: Ok(record) }),
                Ok(None) => {} // removed meanwhile
                Err(error) => listed.push(Listed { id, record: Err(error) }),
            }
        }
        listed.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(listed)
    }

    /// The record with this id and its connections; `None` when there is none.
    ///
    /// # Errors
    /// [`RecordError`]: what is wrong with the file.
    pub fn read(&self, id: &RecordId) -> Result<Option<(Record, Vec<ConnectionRecord>)>, RecordError> {
        self.read_with(id, file::read, |(record, _)| record)
    }

    /// As [`read`](Self::read); gives also the connections' lines as they are.
    pub(super) fn read_whole(&self, id: &RecordId) -> Result<Option<file::Whole>, RecordError> {
        self.read_with(id, file::read_whole, |(record, ..)| record)
    }

    /// The record without its connections, however many there are.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn head(&self, id: &RecordId) -> Result<Option<Record>, RecordError> {
        self.read_with(id, file::read_head, |record| record)
    }

    fn read_with<T>(
        &self,
        id: &RecordId,
        read: impl FnOnce(File, &Path) -> Result<T, RecordError>,
        record: impl FnOnce(&T) -> &Record,
    ) -> Result<Option<T>, RecordError> {
        let path = self.path.join(id.as_str());
        // O_NONBLOCK: the open of a pipe would wait for a writer for ever.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match openat(&self.fd, id.as_str(), flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(RecordError::Io { call: "open", path, source: errno.into() }),
        };
        let meta =
            file.metadata().map_err(|source| RecordError::Io { call: "stat", path: path.clone(), source })?;
        if !meta.is_file() {
            return Err(RecordError::Broken { path, line: 0, why: "not a regular file".into() });
        }
        if meta.size() > LARGEST {
            return Err(RecordError::TooLarge { path, size: meta.size() });
        }
        let found = read(file, &path)?;
        let other = &record(&found).id;
        if other != id {
            let why = format!("this is the record {other}");
            return Err(RecordError::Broken { path, line: 1, why });
        }
        Ok(Some(found))
    }

    /// Writes a record, or replaces it at one stroke.
    pub(super) fn write(&self, writer: ProcessId, record: &Record, body: &[u8]) -> Result<(), RecordError> {
        let head = file::head(record);
        let path = self.path.join(record.id.as_str());
        let size = (head.len() + body.len()) as u64;
        if size > LARGEST {
            return Err(RecordError::TooLarge { path, size });
        }
        let temporary = format!("{TEMPORARY}{}-{}", writer.pid, writer.start);
        let written = self.write_new(&temporary, &[&head, body]);
        let renamed = written.and_then(|()| {
            renameat(&self.fd, temporary.as_str(), &self.fd, record.id.as_str()).map_err(io::Error::from)
        });
        renamed.map_err(|source| {
            let _ = self.unlink(&temporary); // the first error is the one to tell
            RecordError::Io { call: "write the record", path, source }
        })
    }

    fn write_new(&self, name: &str, parts: &[&[u8]]) -> io::Result<()> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let mut file = File::from(openat(&self.fd, name, flags, mode)?);
        parts.iter().try_for_each(|part| file.write_all(part))
    }

    /// Where who holds packets for the restore of this record listens.
    #[must_use]
    pub fn held(&self, id: &RecordId) -> PathBuf {
        self.path.join(format!("{HELD}{id}"))
    }

    /// Removes the record; that it is not there is no error.
    ///
    /// # Errors
    /// [`RecordError::Io`]: it is still there.
    pub fn remove(&self, id: &RecordId) -> Result<(), RecordError> {
        let _ = self.unlink(&format!("{HELD}{id}")); // nobody listens there if it is there
        self.unlink(id.as_str()).map_err(|errno| RecordError::Io {
            call: "remove the record",
            path: self.path.join(id.as_str()),
            source: errno.into(),
        })
    }

    /// Removes files that a writer began and, killed, did not finish.
    ///
    /// # Errors
    /// [`RecordError::Io`].
    pub fn sweep(&self) -> Result<(), RecordError> {
        for name in self.names()? {
            let writer = name.strip_prefix(TEMPORARY).and_then(|writer| writer.split_once('-'));
            let writer = writer.and_then(|(pid, start)| Some((pid.parse().ok()?, start.parse().ok()?)));
            if let Some((pid, start)) = writer
                && !(ProcessId { pid, start }).lives()
            {
                self.unlink(&name).map_err(|errno| RecordError::Io {
                    call: "remove",
                    path: self.path.join(&name),
                    source: errno.into(),
                })?;
            }
        }
        Ok(())
    }

    fn unlink(&self, name: &str) -> Result<(), Errno> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn names(&self) -> Result<Vec<String>, RecordError> {
        let failed =
            |errno: Errno| RecordError::Io { call: "list", path: self.path.clone(), source: errno.into() };
        // Opened anew: a duplicate would share the position of the other descriptor.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(self.fd.as_fd(), ".", flags, Mode::empty()).map_err(failed)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            if let Ok(name) = entry.map_err(failed)?.file_name().to_str() {
                names.push(name.to_owned());
            }
        }
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::super::{LockRecord, NsId, Phase, Recorder};
    use super::*;
    use crate::lock::{LockName, Method};

    const PHASES: [Phase; 6] =
        [Phase::Saving, Phase::Deciding, Phase::LeftStopped, Phase::Dumped, Phase::Restoring, Phase::Waking];

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("run")
        }

        fn store(&self) -> Store {
            Store::create_at(self.path()).unwrap()
        }

        fn recorder(&self, id: &str) -> Recorder {
            let images = fs::File::open(self.0.path()).unwrap();
            let criu = std::process::id().cast_signed();
            let mut recorder =
                Recorder::new(id, Phase::Saving, images.as_fd(), criu).unwrap().keep_in(self.store());
            let (name, method) = (LockName::criu(id).unwrap(), Method::Nftables);
            recorder.add_lock(LockRecord { ns: NsId { dev: 4, ino: 1 }, name, method });
            recorder.add_task(criu);
            recorder
        }
    }

    fn connection(number: u16) -> ConnectionRecord {
        ConnectionRecord {
            local: format!("[fe80::1%3]:{number}").parse().unwrap(),
            remote: "[fe80::2]:443".parse().unwrap(),
            ino: 7,
            cookie: u64::MAX,
            pid: Some(1),
            fd: None,
            reuse_addr: true,
        }
    }

    #[test]
    fn a_record_follows_its_phases_and_goes() {
        let folder = Folder::new();
        let mut recorder = folder.recorder("a-1");
        let connections: Vec<_> = (1..=3).map(connection).collect();
        recorder.add_connections(connections.iter().copied());
        let id = "a-1".parse().unwrap();
        for phase in PHASES {
            recorder.save(phase).unwrap();
            let (record, read) = folder.store().read(&id).unwrap().unwrap();
            assert_eq!((&record, record.phase, &read), (recorder.record(), phase, &connections));
            assert!(record.images.is_there());
        }
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&folder.path()), mode(&folder.path().join("a-1"))), (0o700, 0o600));
        recorder.remove().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        recorder.remove().unwrap(); // once is enough
    }

    #[test]
    fn nothing_is_written_before_it_is_told_to() {
        let folder = Folder::new();
        let mut recorder = folder.recorder("a");
        recorder.enter(Phase::Dumped).unwrap();
        assert!(folder.store().list().unwrap().is_empty());
    }

    #[test]
    fn folders_that_others_can_write_to_are_not_trusted() {
        let folder = Folder::new();
        drop(folder.store());
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(Store::create_at(folder.path()), Err(RecordError::Open { mode: 0o770, .. })));
        symlink("run", folder.0.path().join("link")).unwrap();
        let linked = Store::create_at(folder.0.path().join("link"));
        assert!(matches!(linked, Err(RecordError::Folder { .. })), "{linked:?}");
    }

    #[test]
    fn what_is_no_record_is_listed_with_the_reason() {
        let folder = Folder::new();
        let mut recorder = folder.recorder("good");
        recorder.add_connections([connection(1), connection(2)]);
        recorder.save(Phase::Dumped).unwrap();
        let path = |name: &str| folder.path().join(name);
        let good = fs::read_to_string(path("good")).unwrap();
        let put = |name: &str, text: &str| fs::write(path(name), text.replacen("good", name, 1)).unwrap();
        put("empty", "");
        put("later", &good.replace("\"version\":1", "\"version\":2"));
        put("cut", &good[..good.len() - 5]);
        put("short", good.trim_end().rsplit_once('\n').unwrap().0);
        put("elsewhere", &good.replace("CRIU-good", "../etc"));
        fs::write(path("renamed"), &good).unwrap();
        fs::write(path("zeros"), [0; 4096]).unwrap();
        symlink("good", path("link")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        fs::File::create(path("large")).unwrap().set_len(LARGEST + 1).unwrap();
        fs::write(path(".hidden"), "").unwrap();
        for Listed { id, record } in folder.store().list().unwrap() {
            match (id.as_str(), record) {
                ("good", Ok(_)) | ("later", Err(RecordError::Version { version: 2, .. })) => {}
                ("large", Err(RecordError::TooLarge { .. })) | ("link", Err(RecordError::Io { .. })) => {}
                ("cut" | "short", Err(RecordError::Broken { line, .. })) => assert_eq!(line, 3),
                ("empty" | "elsewhere" | "renamed" | "zeros", Err(RecordError::Broken { line: 1, .. })) => {}
                ("pipe", Err(RecordError::Broken { line: 0, .. })) => {}
                (id, other) => panic!("{id}: {other:?}"),
            }
        }
        assert_eq!(folder.store().list().unwrap().len(), 11);
    }

    #[test]
    fn what_a_dead_writer_left_is_swept() {
        let folder = Folder::new();
        let store = folder.store();
        let this = ProcessId::this().unwrap();
        let of = |start| format!("{TEMPORARY}{}-{start}", this.pid);
        store.write_new(&of(this.start), &[b"at work"]).unwrap();
        store.write_new(&of(this.start + 1), &[b"dead"]).unwrap();
        store.sweep().unwrap();
        assert_eq!(store.names().unwrap(), [of(this.start)]);
    }

    #[test]
    fn ids_are_plain_names() {
        for bad in ["", ".", "..", ".a", "a/b", "a b", "ä", &"x".repeat(65)] {
            assert!(bad.parse::<RecordId>().is_err(), "{bad}");
        }
        assert!("soccr-0a1b2c".parse::<RecordId>().is_ok());
    }
}
