//! What can be wrong with an image.

use std::io;

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

/// What is wrong with an image's content.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The file does not begin as its kind does.
    #[error("magic {found:#010x}, expected {expected:#010x}")]
    Magic {
        /// What the kind of file demands.
        expected: u32,
        /// What the file holds.
        found: u32,
    },
    /// The file ends before the part that begins here.
    #[error("{needed} bytes needed, {left} left in the file")]
    Truncated {
        /// Length of the part, in bytes.
        needed: u64,
        /// Bytes from here to the file's end.
        left: u64,
    },
    /// The message is longer than any of its kind can be.
    #[error("message of {length} bytes, at most {limit} make sense")]
    TooLong {
        /// Length of the message, in bytes.
        length: u64,
        /// The longest accepted, in bytes.
        limit: u64,
    },
    /// The file goes on where it should end.
    #[error("{0} bytes too many")]
    Trailing(u64),
    /// The message is not valid protobuf, or a required field is missing.
    #[error(transparent)]
    Message(#[from] protobuf::Error),
    /// The message is not valid protobuf at its very byte.
    #[error("not a protobuf field")]
    Wire,
    /// The image has more and shorter entries than any that CRIU makes.
    #[error("with this entry they take more memory than the files' sizes and {spare} bytes")]
    Memory {
        /// What all entries together may take beyond their lengths in the files, in bytes.
        spare: u64,
    },
    /// A field's value makes no sense.
    #[error("{field}: {reason}")]
    Value {
        /// The field, by the name it has in the `.proto` file.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Fault {
    pub(super) fn value(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Value { field, reason: reason.into() }
    }

    pub(super) fn missing(field: &'static str) -> Self {
        Self::value(field, "is missing")
    }
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
