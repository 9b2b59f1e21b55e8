//! What can be wrong with an image.

use std::io;

use crate::encoding::Fault;

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A system call failed.
    #[error("cannot {call} image {file}")]
    Io {
        /// What was tried.
        call: &'static str,
        /// The file's name inside the image directory.
        file: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is not there.
    #[error("image {file} is missing")]
    Missing {
        /// The file's name inside the image directory.
        file: String,
    },
    /// A symbolic link, directory, device, socket or pipe stands where a file should be.
    #[error("image {file} is not a regular file")]
    NotRegular {
        /// The file's name inside the image directory.
        file: String,
    },
    /// The content is wrong.
    #[error("image {file}, byte {offset}")]
    Malformed {
        /// The file's name inside the image directory.
        file: String,
        /// Where the wrong part begins, in bytes from the file's start.
        offset: u64,
        /// What is wrong with it.
        #[source]
        fault: Fault,
    },
    /// The data to write contradicts itself or does not fit the format.
    #[error("cannot put into image {file}: {reason}")]
    Unwritable {
        /// The file's name inside the image directory.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ImageError {
    pub(super) fn io(call: &'static str, file: &str, source: impl Into<io::Error>) -> Self {
        Self::Io { call, file: file.to_owned(), source: source.into() }
    }

    pub(super) fn malformed(file: &str, offset: u64, fault: impl Into<Fault>) -> Self {
        Self::Malformed { file: file.to_owned(), offset, fault: fault.into() }
    }

    pub(super) fn unwritable(file: &str, reason: impl Into<String>) -> Self {
        Self::Unwritable { file: file.to_owned(), reason: reason.into() }
    }
}
