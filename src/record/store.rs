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
use nix::unistd::{UnlinkatFlags, geteuid, mkdir, unlinkat};

use super::file::{self, LARGEST};
use super::{ConnectionRecord, Record, RecordError, RecordId};
use crate::tasks::ProcessId;

/// Where the records are, unless [`FOLDER_VARIABLE`] names another folder.
pub const DEFAULT_FOLDER: &str = "/run/soccr";
/// The environment variable that names the folder of the records.
pub const FOLDER_VARIABLE: &str = "SOCCR_RUN_DIR";

/// Written under such a name first, with the writer's pid and start time, then renamed.
const TEMPORARY: &str = ".new-";

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

/// The folder that the environment chooses.
fn chosen_folder() -> PathBuf {
    let named = std::env::var_os(FOLDER_VARIABLE).filter(|path| !path.is_empty());
    named.map_or_else(|| DEFAULT_FOLDER.into(), PathBuf::from)
}

impl Store {
    /// Opens the folder, and makes it where it is missing.
    ///
    /// # Errors
    /// [`RecordError::Folder`], [`RecordError::Foreign`], [`RecordError::Open`].
    pub fn create() -> Result<Self, RecordError> {
        let path = chosen_folder();
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
        let (record, connections) = file::read(file, &path)?;
        if record.id != *id {
            let why = format!("this is the record {}", record.id);
            return Err(RecordError::Broken { path, line: 1, why });
        }
        Ok(Some((record, connections)))
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

    /// Removes the record; that it is not there is no error.
    ///
    /// # Errors
    /// [`RecordError::Io`]: it is still there.
    pub fn remove(&self, id: &RecordId) -> Result<(), RecordError> {
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
