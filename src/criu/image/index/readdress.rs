//! Other addresses in `files.img`.
//!
//! CRIU binds listeners before any hook could, and a socket that is bound stays so. So another address for a listener has
//! to be in the image before CRIU reads it, and then those of the connections may be as well.

use std::net::{IpAddr, SocketAddr};

use super::sockets::{address, inet_entry, is_tcp};
use crate::criu::image::container::{COMMON, Magic, Reader};
use crate::criu::image::proto::sk_inet::Inet_sk_entry;
use crate::criu::image::wire::{self, NotAField, Value};
use crate::criu::image::{Fault, ImageDir, ImageError};
use crate::criu::rules::{End, Remap};

const NAME: &str = "files.img";

/// Of `file_entry`.
const ISK: u32 = 4;
/// Of `inet_sk_entry`.
const SRC_PORT: u32 = 7;
const DST_PORT: u32 = 8;
const SRC_ADDR: u32 = 11;
const DST_ADDR: u32 = 12;

/// Gives the TCP sockets in `files.img`, listeners too, the addresses that `remap` says, and counts those that changed.
/// All else in the file stays byte for byte.
///
/// # Errors
/// What is wrong with the file. It is replaced as a whole or stays as it was.
pub fn readdress(dir: &ImageDir, remap: &Remap) -> Result<usize, ImageError> {
    let Some(mut reader) = Reader::open_if_there(dir, NAME, Magic::Files)? else { return Ok(0) };
    let mut out = Vec::new();
    out.extend(COMMON.to_le_bytes());
    out.extend((Magic::Files as u32).to_le_bytes());
    let mut changed = 0;
    while let Some(message) = reader.next_bytes()? {
        let new = readdressed(message, remap).map_err(|(at, fault)| reader.bad_byte(at, fault))?;
        changed += usize::from(new.is_some());
        let message = new.as_deref().unwrap_or(reader.message());
        let length = u32::try_from(message.len())
            .map_err(|_| ImageError::unwritable(NAME, "a message's length does not fit 32 bits"))?;
        out.extend(length.to_le_bytes());
        out.extend(message);
    }
    if changed > 0 {
        dir.replace(NAME, &[&out])?;
    }
    Ok(changed)
}

/// The `file_entry` with other addresses; `None` where they stay.
fn readdressed(message: &[u8], remap: &Remap) -> Result<Option<Vec<u8>>, (usize, Fault)> {
    let Some(entry) = inet_entry(message)?.filter(is_tcp) else { return Ok(None) };
    let local = of_end(&entry, End::Local, remap).map_err(|fault| (0, fault))?;
    let remote = of_end(&entry, End::Remote, remap).map_err(|fault| (0, fault))?;
    if (local, remote) == (None, None) {
        return Ok(None);
    }
    let mut ends = [New::of(SRC_PORT, SRC_ADDR, local), New::of(DST_PORT, DST_ADDR, remote)];
    let edited = edit(message, |out, field, value| match value {
        Value::Bytes(socket) if field == ISK => {
            let socket = edit(socket, |out, field, _| Ok(ends.iter_mut().any(|end| end.put(out, field))))?;
            wire::put_bytes(out, ISK, &socket);
            Ok(true)
        }
        _ => Ok(false),
    });
    edited.map(Some).map_err(|NotAField(at)| (at, Fault::Wire))
}

/// The new address of one end, where it changes. A port of 0 is no end.
fn of_end(entry: &Inet_sk_entry, end: End, remap: &Remap) -> Result<Option<SocketAddr>, Fault> {
    let old = match end {
        End::Local => address(entry, &entry.src_addr, entry.src_port(), "src_addr")?,
        End::Remote if entry.dst_port() == 0 => return Ok(None),
        End::Remote => address(entry, &entry.dst_addr, entry.dst_port(), "dst_addr")?,
    };
    let new = remap.address(end, old);
    Ok((old.port() != 0 && new != old).then_some(new))
}

/// A copy of the message, in which `write` may write something else for a field.
fn edit(
    message: &[u8],
    mut write: impl FnMut(&mut Vec<u8>, u32, Value<'_>) -> Result<bool, NotAField>,
) -> Result<Vec<u8>, NotAField> {
    let mut out = Vec::with_capacity(message.len() + 16);
    for field in wire::fields(message) {
        let field = field?;
        if !write(&mut out, field.number, field.value)? {
            out.extend_from_slice(&message[field.span]);
        }
    }
    Ok(out)
}

/// The fields of one end.
struct New {
    port: u32,
    words: u32,
    addr: Option<SocketAddr>,
    /// Until they are written, all of them in the place of the first.
    left: Vec<u32>,
}

impl New {
    fn of(port: u32, words: u32, addr: Option<SocketAddr>) -> Self {
        Self { port, words, addr, left: addr.map(|addr| as_words(addr.ip())).unwrap_or_default() }
    }

    /// Writes what stands in the place of this field; `false` where that stays.
    fn put(&mut self, out: &mut Vec<u8>, field: u32) -> bool {
        let Some(addr) = self.addr else { return false };
        if field == self.port {
            wire::put_varint(out, field, addr.port().into());
        } else if field == self.words {
            self.left.drain(..).for_each(|word| wire::put_varint(out, field, word.into()));
        }
        [self.port, self.words].contains(&field)
    }
}

/// The address's bytes as words of this machine, as CRIU writes them.
fn as_words(ip: IpAddr) -> Vec<u32> {
    let words = |octets: &[u8]| {
        octets.chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])).collect()
    };
    match ip {
        IpAddr::V4(ip) => words(&ip.octets()),
        IpAddr::V6(ip) => words(&ip.octets()),
    }
}
