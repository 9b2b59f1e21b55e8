//! CRIU's container format.
//!
//! A file begins with [`COMMON`] and the magic of its kind (`inventory.img`, and every file of
//! images older than CRIU 1.1, with the latter only). Then come messages, each behind its length as
//! a little-endian `u32`. Some kinds put raw bytes after a message: as many as the message says.

use std::fs::File;
use std::io::{self, BufReader, Read};

use protobuf::Message;

use super::dir::ImageFile;
use super::{Fault, ImageDir, ImageError};
use crate::encoding::container;
use crate::encoding::decode::{ImageMessage, check_length, decode};

pub use crate::encoding::{COMMON, Magic};

/// Reads a container's messages one after the other.
#[derive(Debug)]
pub struct Reader {
    input: BufReader<File>,
    name: String,
    size: u64,
    offset: u64,
    message: Vec<u8>,
    message_offset: u64,
}

impl Reader {
    /// Opens the file `name` and checks its magic.
    ///
    /// # Errors
    /// [`ImageError::Missing`] if it is not there, or what else is wrong with it.
    pub fn open(dir: &ImageDir, name: &str, magic: Magic) -> Result<Self, ImageError> {
        Self::new(dir.read(name)?, magic)
    }

    /// As [`open`](Self::open), but `None` if the file is not there.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn open_if_there(dir: &ImageDir, name: &str, magic: Magic) -> Result<Option<Self>, ImageError> {
        dir.read_if_there(name)?.map(|file| Self::new(file, magic)).transpose()
    }

    /// The next message as it stands in the file, or `None` at the file's end. Takes memory for one
    /// message, which is at most the file's size.
    ///
    /// # Errors
    /// [`ImageError::Io`], or [`ImageError::Malformed`] if the file ends inside the message.
    pub fn next_bytes(&mut self) -> Result<Option<&[u8]>, ImageError> {
        let Some(length) = self.next_length()? else { return Ok(None) };
        self.read_message(length).map(Some)
    }

    /// The next message, or `None` at the file's end.
    ///
    /// # Errors
    /// As [`next_bytes`](Self::next_bytes), or if it is longer than 256 KiB or no valid `M`.
    pub fn next_message<M: ImageMessage>(&mut self) -> Result<Option<M>, ImageError> {
        let Some(length) = self.next_length()? else { return Ok(None) };
        check_length(length).map_err(|fault| self.bad_message(fault))?;
        let message = decode(self.read_message(length)?);
        message.map(Some).map_err(|(at, fault)| self.bad_byte(at, fault))
    }

    /// The next message, which must be there.
    ///
    /// # Errors
    /// As [`next_message`](Self::next_message), or [`Fault::Truncated`] at the file's end.
    pub fn required<M: ImageMessage>(&mut self) -> Result<M, ImageError> {
        let end = self.offset;
        self.next_message()?.ok_or_else(|| self.malformed(end, Fault::Truncated { needed: 4, left: 0 }))
    }

    /// Fills `buffer` with the next `length` raw bytes; what it held before is gone, after an error
    /// too.
    ///
    /// # Errors
    /// [`ImageError::Io`], or [`ImageError::Malformed`] if the file has fewer.
    pub fn read_raw(&mut self, length: u64, buffer: &mut Vec<u8>) -> Result<(), ImageError> {
        let filled = self.fill(length, buffer);
        if filled.is_err() {
            buffer.clear();
        }
        filled
    }

    /// Passes over the next `length` raw bytes.
    ///
    /// # Errors
    /// As [`read_raw`](Self::read_raw).
    pub fn skip_raw(&mut self, length: u64) -> Result<(), ImageError> {
        self.check_left(length)?;
        let step = i64::try_from(length).map_err(|_| {
            self.malformed(self.offset, Fault::TooLong { length, limit: i64::MAX.unsigned_abs() })
        })?;
        self.input.seek_relative(step).map_err(|e| ImageError::io("seek in", &self.name, e))?;
        self.offset += length;
        Ok(())
    }

    /// Checks that the file ends here.
    ///
    /// # Errors
    /// [`Fault::Trailing`] if it does not.
    pub fn finish(self) -> Result<(), ImageError> {
        match self.left() {
            0 => Ok(()),
            left => Err(self.malformed(self.offset, Fault::Trailing(left))),
        }
    }

    /// The message read last, as it stands in the file.
    pub(super) fn message(&self) -> &[u8] {
        &self.message
    }

    /// The error that says `fault` about the message read last.
    #[must_use]
    pub fn bad_message(&self, fault: impl Into<Fault>) -> ImageError {
        self.malformed(self.message_offset, fault)
    }

    /// The error that says `fault` about the byte `at` of the message read last.
    pub(super) fn bad_byte(&self, at: usize, fault: impl Into<Fault>) -> ImageError {
        self.malformed(self.message_offset.saturating_add(at as u64), fault)
    }

    pub(super) fn new(file: ImageFile, magic: Magic) -> Result<Self, ImageError> {
        let ImageFile { file, name, size } = file;
        let input = BufReader::with_capacity(4096, file);
        let mut reader = Self { input, name, size, offset: 0, message: Vec::new(), message_offset: 0 };
        reader.check_magic(magic)?;
        Ok(reader)
    }

    fn check_magic(&mut self, magic: Magic) -> Result<(), ImageError> {
        let mut at = self.offset;
        let mut found = self.word()?;
        if found == COMMON && magic != Magic::Inventory {
            at = self.offset;
            found = self.word()?;
        }
        if found != magic as u32 {
            return Err(self.malformed(at, Fault::Magic { expected: magic as u32, found }));
        }
        Ok(())
    }

    fn next_length(&mut self) -> Result<Option<u64>, ImageError> {
        if self.left() == 0 {
            return Ok(None);
        }
        let length = u64::from(self.word()?);
        self.check_left(length)?;
        self.message_offset = self.offset;
        Ok(Some(length))
    }

    fn read_message(&mut self, length: u64) -> Result<&[u8], ImageError> {
        let mut message = std::mem::take(&mut self.message);
        let read = self.read_raw(length, &mut message);
        self.message = message;
        read.map(|()| self.message.as_slice())
    }

    fn fill(&mut self, length: u64, buffer: &mut Vec<u8>) -> Result<(), ImageError> {
        self.check_left(length)?;
        let fits = usize::try_from(length);
        let fits =
            fits.map_err(|_| self.malformed(self.offset, Fault::TooLong { length, limit: u64::MAX }))?;
        if buffer.capacity() < fits {
            *buffer = Vec::new(); // growing would take the old and the new one at a time
            buffer.try_reserve_exact(fits).map_err(|_| self.no_memory())?;
        }
        buffer.resize(fits, 0);
        self.input.read_exact(buffer).map_err(|e| ImageError::io("read", &self.name, e))?;
        self.offset += length;
        Ok(())
    }

    fn word(&mut self) -> Result<u32, ImageError> {
        let mut word = [0; 4];
        self.check_left(4)?;
        self.input.read_exact(&mut word).map_err(|e| ImageError::io("read", &self.name, e))?;
        self.offset += 4;
        Ok(u32::from_le_bytes(word))
    }

    /// Bytes from here to the file's end.
    pub(super) fn left(&self) -> u64 {
        self.size.saturating_sub(self.offset)
    }

    fn check_left(&self, needed: u64) -> Result<(), ImageError> {
        let left = self.left();
        if needed > left {
            return Err(self.malformed(self.offset, Fault::Truncated { needed, left }));
        }
        Ok(())
    }

    /// The error that says that there is no memory for what the file holds.
    pub(super) fn no_memory(&self) -> ImageError {
        ImageError::io("take memory for", &self.name, io::ErrorKind::OutOfMemory)
    }

    fn malformed(&self, offset: u64, fault: impl Into<Fault>) -> ImageError {
        ImageError::malformed(&self.name, offset, fault)
    }
}

/// The beginning of a container: magic and one message; raw bytes and further messages may follow.
///
/// # Errors
/// [`ImageError::Unwritable`] if the message lacks a required field or is 4 GiB long.
pub(super) fn head(name: &str, magic: Magic, message: &impl Message) -> Result<Vec<u8>, ImageError> {
    container::head(magic, message).map_err(|reason| ImageError::unwritable(name, reason))
}
