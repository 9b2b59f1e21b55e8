//! Protobuf's wire format, without knowing the message.
//!
//! Two jobs need it: changing one field of a message while every other byte stays as it is, and
//! picking a small part out of a large message without taking memory for the rest.

use std::ops::Range;

/// One field of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u32,
    pub(crate) value: Value<'a>,
    /// Where key and value stand in the message.
    pub(crate) span: Range<usize>,
}

/// A field's value as far as the wire tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32,
}

/// No field stands at this offset of the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotAField(pub(crate) usize);

/// The fields of `message`, in their order.
pub(crate) fn fields(message: &[u8]) -> Fields<'_> {
    Fields { message, at: 0 }
}

/// Appends the field `number` with an integer value.
pub(crate) fn put_varint(out: &mut Vec<u8>, number: u32, value: u64) {
    put_raw_varint(out, u64::from(number) << 3);
    put_raw_varint(out, value);
}

/// Appends the field `number` with a string, bytes or message value.
pub(crate) fn put_bytes(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    put_raw_varint(out, u64::from(number) << 3 | u64::from(LENGTH_DELIMITED));
    put_raw_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

#[derive(Debug)]
pub(crate) struct Fields<'a> {
    message: &'a [u8],
    at: usize,
}

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const LENGTH_DELIMITED: u8 = 2;
const FIXED32: u8 = 5;

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, NotAField>;

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.at;
        if start == self.message.len() {
            return None;
        }
        let field = self.field().ok_or(NotAField(start));
        if field.is_err() {
            self.at = self.message.len(); // nothing can be found after a broken field
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<Field<'a>> {
        let start = self.at;
        let key = u32::try_from(self.varint()?).ok()?;
        let number = key >> 3;
        let value = match key.to_le_bytes()[0] & 7 {
            VARINT => Value::Varint(self.varint()?),
            FIXED64 => self.bytes(8).map(|_| Value::Fixed64)?,
            LENGTH_DELIMITED => {
                let length = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.bytes(length)?)
            }
            FIXED32 => self.bytes(4).map(|_| Value::Fixed32)?,
            _ => return None, // groups: CRIU has none
        };
        (number != 0).then_some(Field { number, value, span: start..self.at })
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.message.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let end = self.at.checked_add(length)?;
        let bytes = self.message.get(self.at..end)?;
        self.at = end;
        Some(bytes)
    }
}

fn put_raw_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let mut message = Vec::new();
        put_varint(&mut message, 10, 1);
        put_bytes(&mut message, 13, b"id");
        put_varint(&mut message, 100, u64::MAX);
        let found: Vec<_> = fields(&message).map(|f| f.map(|f| (f.number, f.value))).collect();
        assert_eq!(
            found,
            [Ok((10, Value::Varint(1))), Ok((13, Value::Bytes(b"id"))), Ok((100, Value::Varint(u64::MAX)))]
        );
        let spans: Vec<_> = fields(&message).map(|f| f.unwrap().span).collect();
        assert_eq!(spans[0].start, 0);
        assert!(spans.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!(spans[2].end, message.len());
    }

    #[test]
    fn stops_at_a_broken_field() {
        for broken in [
            &[0x08][..],                                                      // value missing
            &[0x0a, 5, 1],    // five bytes announced, one there
            &[0x0b],          // a group
            &[0x00, 0x00],    // field number 0
            &[0x08, 0x80],    // unfinished varint
            &[0xff; 12],      // varint too long
            &[0x0d, 1, 2, 3], // fixed32 of three bytes
            &[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], // length wraps
        ] {
            let mut message = vec![0x50, 1];
            message.extend_from_slice(broken);
            let mut iter = fields(&message);
            assert!(iter.next().unwrap().is_ok());
            assert_eq!(iter.next(), Some(Err(NotAField(2))), "{broken:x?}");
            assert_eq!(iter.next(), None);
        }
    }
}
