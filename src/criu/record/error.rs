//! What can go wrong with records.

use std::io;
use std::path::PathBuf;

use super::store::FOLDER_VARIABLE;
use super::{BadRecordId, RECORD_VARIABLE, RecordId};
use crate::criu::tasks::ProcessId;
use crate::lock::BadOption;

/// A record could not be written, read or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The folder of the records cannot be made or opened.
    #[error(
        "cannot use {} for the record of what is changed on this host: {FOLDER_VARIABLE} can name another folder, \
         and {RECORD_VARIABLE}=off does without (what a crash leaves is not found then)", path.display()
    )]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder of the records belongs to somebody else, who could have put anything there.
    #[error("{} belongs to user {owner}: records there are not trusted", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// The folder of the records is open to others, who could have put anything there.
    #[error("{} has mode {mode:03o}: others can write there, so records there are not trusted", path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A system call failed.
    #[error("cannot {call} {}", path.display())]
    Io {
        /// What was tried.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A record is larger than any that is read.
    #[error("{}: {size} bytes are more than a record can have", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
    },
    /// The record was written by another version of soccr.
    #[error("{} has version {version}, which this soccr does not know", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The file is no record, or was damaged.
    #[error("{} line {line}: {why}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// Somebody else restores it.
    #[error("{id} is being restored by criu (pid {criu}) right now")]
    AtWork {
        /// The record.
        id: RecordId,
        /// Who restores it.
        criu: ProcessId,
    },
    /// The images name the record of another dump.
    #[error(
        "the images name the dump {id} (into {folder}) as theirs, but hold other connections than it locked: they \
         are not restored, or its lock would go (if that dump is not needed any more: soccr clean {id})"
    )]
    OtherDump {
        /// The record.
        id: RecordId,
        /// Where the dump's images are.
        folder: String,
    },
    /// An environment variable has a value that means nothing.
    #[error(transparent)]
    Option(#[from] BadOption),
    /// The id cannot name a record.
    #[error(transparent)]
    Id(#[from] BadRecordId),
    /// `/proc` does not tell about a process.
    #[error("cannot identify process {pid} in /proc")]
    Process {
        /// The process.
        pid: i32,
        /// Why.
        source: procfs::ProcError,
    },
}

impl RecordError {
    /// Whether the record itself is at fault: damaged, or of another version.
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        matches!(self, Self::Broken { .. } | Self::Version { .. } | Self::TooLarge { .. })
    }
}
