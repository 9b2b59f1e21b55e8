//! Decoding a message in bounded memory.

use protobuf::Message;

use super::Fault;
use super::proto::core::{Core_entry, Task_kobj_ids_entry};
use super::proto::fdinfo::{Fdinfo_entry, File_entry};
use super::proto::inventory::Inventory_entry;
use super::proto::pstree::Pstree_entry;
use super::proto::sk_inet::Inet_sk_entry;
use super::proto::sk_packet::Sk_packet_entry;
use super::proto::sk_unix::Unix_sk_entry;
use super::proto::soccr::{
    Soccr_connection_entry, Soccr_dump_entry, Soccr_item, Soccr_socket, Soccr_translation,
};
use super::proto::tcp_stream::Tcp_stream_entry;
use super::wire::{self, NotAField, Value};

/// The longest message, in bytes, that is decoded. A decoded message can take thirty times its own
/// length (empty submessages), so this bounds the memory that a hostile file can take; the longest
/// known one, a socket's entry with a full classic BPF filter, has 37 KiB.
pub(crate) const LIMIT: u64 = 256 << 10;

/// A message of an image that can be decoded in bounded memory.
pub trait ImageMessage: Message {
    /// Its fields that are messages themselves.
    const NESTED: Nested;
}

/// The numbers of those fields of a message that are messages, and what is nested in them. A message
/// that is missing here is decoded all the same, only its lengths are not checked beforehand.
#[derive(Clone, Copy, Debug)]
pub struct Nested(&'static [(u32, Nested)]);

/// Decodes a message. An error comes with its offset in the message.
///
/// Lengths are checked first: the protobuf crate takes memory for as much as a field's length says,
/// up to 40 MB, before it looks whether so much is there.
pub(crate) fn decode<M: ImageMessage>(message: &[u8]) -> Result<M, (usize, Fault)> {
    check_length(message.len() as u64).map_err(|fault| (0, fault))?;
    check(message, M::NESTED).map_err(|e| (e.0, Fault::Wire))?;
    M::parse_from_bytes(message).map_err(|e| (0, Fault::Message(e.to_string())))
}

/// Whether a message of `length` bytes can be decoded.
pub(crate) fn check_length(length: u64) -> Result<(), Fault> {
    if length > LIMIT { Err(Fault::TooLong { length, limit: LIMIT }) } else { Ok(()) }
}

fn check(message: &[u8], nested: Nested) -> Result<(), NotAField> {
    for field in wire::fields(message) {
        let field = field?;
        let Value::Bytes(bytes) = field.value else { continue };
        if let Some((_, inner)) = nested.0.iter().find(|(number, _)| *number == field.number) {
            let start = field.span.end - bytes.len();
            check(bytes, *inner).map_err(|e| NotAField(start + e.0))?;
        }
    }
    Ok(())
}

const FLAT: Nested = Nested(&[]);

impl ImageMessage for Tcp_stream_entry {
    const NESTED: Nested = FLAT;
}

impl ImageMessage for Fdinfo_entry {
    const NESTED: Nested = FLAT;
}

impl ImageMessage for Pstree_entry {
    const NESTED: Nested = FLAT;
}

impl ImageMessage for Task_kobj_ids_entry {
    const NESTED: Nested = FLAT;
}

impl ImageMessage for Core_entry {
    const NESTED: Nested = Nested(&[(3, FLAT), (4, FLAT)]);
}

impl ImageMessage for Inventory_entry {
    const NESTED: Nested = Nested(&[(3, FLAT), (12, FLAT)]);
}

impl ImageMessage for Sk_packet_entry {
    const NESTED: Nested = Nested(&[(4, FLAT)]);
}

impl ImageMessage for Inet_sk_entry {
    const NESTED: Nested = Nested(&[(13, FLAT), (14, FLAT), (16, Nested(&[(4, FLAT)])), (20, FLAT)]);
}

impl ImageMessage for Unix_sk_entry {
    const NESTED: Nested = Nested(&[(9, FLAT), (10, FLAT), (13, FLAT)]);
}

impl ImageMessage for File_entry {
    const NESTED: Nested = Nested(&[(4, Inet_sk_entry::NESTED), (16, Unix_sk_entry::NESTED)]);
}

impl ImageMessage for Soccr_connection_entry {
    const NESTED: Nested = Nested(&[(2, FLAT), (3, FLAT), (5, FLAT), (6, FLAT)]);
}

impl ImageMessage for Soccr_dump_entry {
    const NESTED: Nested = FLAT;
}

impl ImageMessage for Soccr_item {
    const NESTED: Nested = Nested(&[
        (1, Soccr_translation::NESTED),
        (2, Soccr_socket::NESTED),
        (3, ACCEPTED),
        (4, DIRECTION),
        (6, LISTENER),
    ]);
}

impl ImageMessage for Soccr_socket {
    const NESTED: Nested = Nested(&[(4, FLAT)]);
}

impl ImageMessage for Soccr_translation {
    const NESTED: Nested = Nested(&[(1, DIRECTION), (2, DIRECTION)]);
}

const ACCEPTED: Nested = Nested(&[(3, FLAT), (4, FLAT)]);
const LISTENER: Nested = Nested(&[(1, FLAT)]);
/// And what else begins with two endpoints.
const DIRECTION: Nested = Nested(&[(1, FLAT), (2, FLAT)]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_broken_length_wherever_it_is() {
        // file_entry { isk { ip_opts { raw { icmpv_filter: 10 MB, packed } } } }
        let raw = [0x22, 0x80, 0xad, 0xe2, 0x04];
        let mut message = raw.to_vec();
        for number in [4, 16, 4] {
            let inner = std::mem::take(&mut message);
            wire::put_bytes(&mut message, number, &inner);
        }
        let (at, fault) = decode::<File_entry>(&message).unwrap_err();
        assert!(matches!(fault, Fault::Wire));
        assert_eq!(at, message.len() - raw.len());
    }

    #[test]
    fn refuses_what_is_too_long() {
        let long = vec![0; 1 + usize::try_from(LIMIT).unwrap()];
        assert!(matches!(decode::<Tcp_stream_entry>(&long), Err((0, Fault::TooLong { .. }))));
    }
}
