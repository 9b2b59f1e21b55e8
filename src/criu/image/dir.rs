//! The image directory: the only place where image files are opened.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat, fstatat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, unlinkat};

use super::ImageError;

/// A directory of image files.
///
/// Files are opened relative to it, never through a symbolic link, and only if they are regular
/// ones. New files have mode 0600: the queues hold what the program and its peers told each other.
/// A file that is replaced keeps its mode and owner.
#[derive(Debug)]
pub struct ImageDir {
    fd: OwnedFd,
    /// Who owns new files, if not this process's user.
    owner: Option<(Uid, Gid)>,
}

/// An image file opened for reading.
#[derive(Debug)]
pub(super) struct ImageFile {
    pub(super) file: File,
    pub(super) name: String,
    /// Its length in bytes when it was opened.
    pub(super) size: u64,
}

impl ImageDir {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// [`ImageError::Io`] if it cannot be opened or is not a directory.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map(Self::from)
            .map_err(|e| ImageError::io("open the directory of", &path.to_string_lossy(), e))
    }

    /// Makes a handle of its own from a directory's descriptor that somebody else keeps, such as
    /// the one that CRIU shows to its plugins.
    ///
    /// # Errors
    /// [`ImageError::Io`] if the descriptor cannot be duplicated.
    pub fn duplicate(fd: BorrowedFd<'_>) -> Result<Self, ImageError> {
        fd.try_clone_to_owned()
            .map(Self::from)
            .map_err(|e| ImageError::io("duplicate the directory of", ".", e))
    }

    /// Gives new files to this user and group. Tasks in a user namespace read their images as its root, to whom a
    /// file of ours would be closed.
    pub fn give_new_files_to(&mut self, uid: u32, gid: u32) {
        self.owner = Some((Uid::from_raw(uid), Gid::from_raw(gid)));
    }

    /// Whether a regular file of this name is there.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG)
    }

    /// Removes the file `name`; that it is not there is no error.
    ///
    /// # Errors
    /// [`ImageError::Io`] if it is there and stays.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(ImageError::io("remove", name, e)),
        }
    }

    /// Calls `visit` with every name in the directory that is valid UTF-8, as all of CRIU's are.
    pub(super) fn for_each_name(&self, mut visit: impl FnMut(&str)) -> Result<(), ImageError> {
        let list = |e| ImageError::io("list the directory of", ".", e);
        // Opened anew: a duplicate would share, and move, the position of the other descriptor.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(&self.fd, ".", flags, Mode::empty()).map_err(list)?;
        for entry in dir.iter() {
            if let Ok(name) = entry.map_err(list)?.file_name().to_str() {
                visit(name);
            }
        }
        Ok(())
    }

    /// Opens `name` for reading.
    pub(super) fn read(&self, name: &str) -> Result<ImageFile, ImageError> {
        self.read_if_there(name)?.ok_or_else(|| ImageError::Missing { file: name.to_owned() })
    }

    /// Opens `name` for reading, or `None` if it is not there.
    pub(super) fn read_if_there(&self, name: &str) -> Result<Option<ImageFile>, ImageError> {
        // O_NONBLOCK: the open of a pipe that somebody put there would wait for a writer for ever.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | NO_LINK;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP | Errno::ENXIO | Errno::ENODEV) => return Err(not_regular(name)),
            Err(e) => return Err(ImageError::io("open", name, e)),
        };
        let meta = file.metadata().map_err(|e| ImageError::io("stat", name, e))?;
        if !meta.is_file() {
            return Err(not_regular(name));
        }
        Ok(Some(ImageFile { file, name: name.to_owned(), size: meta.len() }))
    }

    /// Makes the file `name` of `parts`, one after the other. What was there under this name before
    /// is removed first, not written through: it may be a link or have another mode. A file that
    /// could not be written whole is removed.
    pub(super) fn create(&self, name: &str, parts: &[&[u8]]) -> Result<(), ImageError> {
        let mut file = self.create_empty(name)?;
        let mut slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        write_all_vectored(&mut file, &mut slices).map_err(|e| {
            // The error to tell is that of the write; a restore refuses the rest of a file anyhow.
            let _ = self.remove(name);
            ImageError::io("write", name, e)
        })
    }

    /// Replaces the file `name`, or makes it: whoever reads sees the old content or the new, whole.
    pub(super) fn replace(&self, name: &str, parts: &[&[u8]]) -> Result<(), ImageError> {
        let temporary = format!(".{name}.{}", std::process::id());
        self.create(&temporary, parts)?;
        self.look_alike(name, &temporary).map_err(|e| {
            let _ = self.remove(&temporary); // as in `create`
            ImageError::io("set owner and mode of", &temporary, e)
        })?;
        renameat(&self.fd, temporary.as_str(), &self.fd, name).map_err(|e| {
            let _ = self.remove(&temporary); // as in `create`
            ImageError::io("replace", name, e)
        })
    }

    /// Gives `copy` the owner and the mode of `model`, if that is there.
    fn look_alike(&self, model: &str, copy: &str) -> Result<(), Errno> {
        let stat = match fstatat(&self.fd, model, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(()),
            other => other?,
        };
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        fchownat(&self.fd, copy, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_bits_truncate(stat.st_mode);
        fchmodat(&self.fd, copy, mode, FchmodatFlags::FollowSymlink)
    }

    fn create_empty(&self, name: &str) -> Result<File, ImageError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | NO_LINK;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let fd = match openat(&self.fd, name, flags, mode) {
            Err(Errno::EEXIST) => {
                self.remove(name)?;
                openat(&self.fd, name, flags, mode)
            }
            other => other,
        };
        let fd = fd.map_err(|e| ImageError::io("create", name, e))?;
        if let Some((uid, gid)) = self.owner {
            fchown(&fd, Some(uid), Some(gid)).map_err(|e| ImageError::io("give away", name, e))?;
        }
        Ok(File::from(fd))
    }
}

impl From<OwnedFd> for ImageDir {
    fn from(fd: OwnedFd) -> Self {
        Self { fd, owner: None }
    }
}

impl AsFd for ImageDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const NO_LINK: OFlag = OFlag::O_NOFOLLOW.union(OFlag::O_CLOEXEC);

fn not_regular(name: &str) -> ImageError {
    ImageError::NotRegular { file: name.to_owned() }
}

/// `Write::write_all_vectored` is not stable yet.
fn write_all_vectored(file: &mut File, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    IoSlice::advance_slices(&mut slices, 0); // drops leading empty ones
    while !slices.is_empty() {
        match file.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn follows_no_link_and_waits_for_no_pipe() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        std::fs::write(folder.path().join("file"), b"content").unwrap();
        symlink("file", folder.path().join("link")).unwrap();
        std::fs::create_dir(folder.path().join("folder")).unwrap();
        nix::unistd::mkfifo(&folder.path().join("pipe"), Mode::S_IRWXU).unwrap();
        assert_eq!(dir.read("file").unwrap().size, 7);
        assert!(dir.read_if_there("nothing").unwrap().is_none());
        assert!(matches!(dir.read("nothing"), Err(ImageError::Missing { .. })));
        for name in ["link", "folder", "pipe"] {
            assert!(matches!(dir.read(name), Err(ImageError::NotRegular { .. })), "{name}");
            assert!(!dir.contains(name), "{name}");
        }
    }

    #[test]
    fn writes_new_private_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name| folder.path().join(name);
        let dir = ImageDir::open(folder.path()).unwrap();
        std::fs::write(path("old"), b"old").unwrap();
        symlink("old", path("link")).unwrap();
        std::fs::hard_link(path("old"), path("hard")).unwrap();
        for name in ["new", "link", "hard"] {
            dir.create(name, &[b"", b"one", b"", b" two"]).unwrap();
            dir.replace(name, &[b"three", b""]).unwrap();
            assert_eq!(std::fs::read(path(name)).unwrap(), b"three");
            let meta = std::fs::symlink_metadata(path(name)).unwrap();
            assert!(meta.is_file());
            assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(std::fs::read(path("old")).unwrap(), b"old");
        let mut names = Vec::new();
        dir.for_each_name(|name| names.push(name.to_owned())).unwrap();
        names.retain(|name| !name.starts_with('.') || name.len() > 2);
        names.sort();
        assert_eq!(names, ["hard", "link", "new", "old"]); // no temporary file is left
    }
}
