//! What can be wrong with a message, or with what holds it.

/// What is wrong with encoded content.
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
    #[error("{0}")]
    Message(String),
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
    pub(crate) fn value(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Value { field, reason: reason.into() }
    }

    pub(crate) fn missing(field: &'static str) -> Self {
        Self::value(field, "is missing")
    }
}
