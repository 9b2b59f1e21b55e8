//! A folder of connections: a file for each, `soccr-ext-N.img`, where N is the descriptor that it had, in hexadecimal.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use soccr::Connection;
use soccr::criu::image::external::ExternalImage;
use soccr::criu::image::inventory;

use crate::progress;

#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    dir: File,
}

impl Folder {
    /// Opens the folder for a save, and makes it where it is missing: it must hold no connections, nor images of CRIU.
    pub fn create(path: &Path) -> Result<Self> {
        match fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot make {}", path.display()));
            }
            _ => {}
        }
        let folder = Self::open(path)?;
        if !folder.numbers()?.is_empty() || path.join(inventory::NAME).exists() {
            bail!("{} holds connections already: choose another folder", path.display());
        }
        Ok(folder)
    }

    /// Opens the folder of a save.
    pub fn open(path: &Path) -> Result<Self> {
        let dir = File::open(path).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), dir })
    }

    /// Writes a connection under its descriptor; the file is whole before it has its name.
    pub fn write(&self, fd: u32, connection: &Connection) -> Result<()> {
        let path = self.file(fd);
        self.write_one(&path, &connection.to_bytes())
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn write_one(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.path)?; // mode 0600
        file.write_all(bytes)?;
        file.persist(path)?;
        Ok(())
    }

    /// The connections by their descriptors, without their queues, which can be more than memory holds.
    pub fn read(&self) -> Result<Vec<(u32, Connection)>> {
        let numbers = self.numbers()?;
        if numbers.is_empty() {
            bail!("{}: no connection was saved there", self.path.display());
        }
        let bar = progress::bar("reading", numbers.len());
        let mut connections = Vec::with_capacity(numbers.len());
        for fd in numbers {
            let mut connection = self.load(fd)?;
            connection.drop_queues();
            connections.push((fd, connection));
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(connections)
    }

    /// A connection with its queues.
    pub fn load(&self, fd: u32) -> Result<Connection> {
        let path = self.file(fd);
        read_one(&path).with_context(|| path.display().to_string())
    }

    /// Removes the connections' files.
    pub fn remove_files(&self) -> Result<()> {
        for fd in self.numbers()? {
            let path = self.file(fd);
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }

    fn numbers(&self) -> Result<Vec<u32>> {
        let listed = || -> Result<Vec<u32>> {
            let mut numbers = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                let name = entry?.file_name();
                numbers.extend(name.to_str().and_then(ExternalImage::id_of));
            }
            numbers.sort_unstable();
            Ok(numbers)
        };
        listed().with_context(|| format!("cannot list {}", self.path.display()))
    }

    fn file(&self, fd: u32) -> PathBuf {
        self.path.join(ExternalImage::name(fd))
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// The folder may be anybody's: no link is followed, and no pipe waited for.
fn read_one(path: &Path) -> Result<Connection> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        bail!("not a regular file");
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(Connection::from_bytes(&bytes)?)
}
