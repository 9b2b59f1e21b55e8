//! Netlink messages: written into one growing buffer, read from the kernel's answers.
//!
//! A writer of our own because a lock has tens of thousands of set elements: they go into the
//! batch as bytes, without a value in between for each attribute. The reader trusts no length.

/// `struct nlmsghdr`.
pub const HEADER_LEN: usize = 16;
/// `struct nfgenmsg`, which follows it in every netfilter message.
pub const FAMILY_LEN: usize = 4;
const ATTR_HEADER_LEN: usize = 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Netlink messages, one after the other.
#[derive(Debug, Default)]
pub struct Writer {
    buf: Vec<u8>,
}

/// What a message's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
}

impl Writer {
    /// The messages.
    pub fn bytes(&self) -> &[u8] {
        &self.buf
    }

    /// The same, without the writer.
    pub fn into_bytes(self) -> Vec<u8> {
        self.buf
    }

    /// Adds a message of netfilter: `family` is the table's, `res_id` is 0 except where a batch begins and ends.
    pub fn message(&mut self, header: Header, family: u8, res_id: u16, attributes: impl FnOnce(&mut Self)) {
        self.message_of(header, |w| {
            w.buf.extend_from_slice(&[family, 0]);
            w.buf.extend_from_slice(&res_id.to_be_bytes());
            attributes(w);
        });
    }

    /// Adds a message of another subsystem, which begins with a structure of its own.
    pub fn plain(&mut self, header: Header, payload: &[u8], attributes: impl FnOnce(&mut Self)) {
        self.message_of(header, |w| {
            w.buf.extend_from_slice(payload);
            attributes(w);
        });
    }

    fn message_of(&mut self, header: Header, payload: impl FnOnce(&mut Self)) {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; 4]);
        self.buf.extend_from_slice(&header.kind.to_ne_bytes());
        self.buf.extend_from_slice(&header.flags.to_ne_bytes());
        self.buf.extend_from_slice(&header.seq.to_ne_bytes());
        self.buf.extend_from_slice(&[0; 4]); // port 0: the kernel
        payload(self);
        let len = u32::try_from(self.buf.len() - start).expect("a message is far below 4 GiB");
        self.buf[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }

    /// Sets flags of the message that starts at `start`.
    pub fn add_flags(&mut self, start: usize, flags: u16) {
        let at = start + 6;
        let old = u16::from_ne_bytes([self.buf[at], self.buf[at + 1]]);
        self.buf[at..at + 2].copy_from_slice(&(old | flags).to_ne_bytes());
    }

    /// An attribute of bytes.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        self.attribute(kind, |w| w.buf.extend_from_slice(value));
    }

    /// An attribute with a number in network order, as all of nf_tables' are.
    pub fn put_u32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// As [`Self::put_u32`].
    pub fn put_u64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    /// A string attribute, with the NUL at its end.
    pub fn put_str(&mut self, kind: u16, value: &str) {
        self.attribute(kind, |w| {
            w.buf.extend_from_slice(value.as_bytes());
            w.buf.push(0);
        });
    }

    /// An attribute of attributes.
    pub fn nest(&mut self, kind: u16, attributes: impl FnOnce(&mut Self)) {
        self.attribute(kind | NESTED, attributes);
    }

    fn attribute(&mut self, kind: u16, value: impl FnOnce(&mut Self)) {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; 2]);
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        value(self);
        let len = u16::try_from(self.buf.len() - start).expect("callers keep attributes below 64 KiB");
        self.buf[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.buf.resize(start + align(usize::from(len)), 0);
    }
}

fn align(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// An answer of the kernel that is not what netlink promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {offset} of an answer")]
pub struct Malformed {
    /// What is wrong.
    pub what: &'static str,
    /// Where, from the beginning of the datagram or of the attribute list.
    pub offset: usize,
}

/// A message of an answer.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Its header.
    pub header: Header,
    /// All after the header.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The family and the attributes of a netfilter message.
    pub fn netfilter(&self) -> Result<(u8, Attributes<'a>), Malformed> {
        match self.payload.split_at_checked(FAMILY_LEN) {
            Some((family, attributes)) => Ok((family[0], Attributes::new(attributes))),
            None => Err(Malformed { what: "a message without nfgenmsg", offset: 0 }),
        }
    }
}

/// The messages of one datagram; ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Messages<'a> {
    /// The messages of `datagram`.
    pub fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram, offset: 0 }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let offset = self.offset;
        let read = || {
            let head: &[u8; HEADER_LEN] = self.rest.first_chunk()?;
            let len = usize::try_from(u32::from_ne_bytes(*head.first_chunk()?)).ok()?;
            let header = Header {
                kind: u16::from_ne_bytes([head[4], head[5]]),
                flags: u16::from_ne_bytes([head[6], head[7]]),
                seq: u32::from_ne_bytes([head[8], head[9], head[10], head[11]]),
            };
            Some((Message { header, payload: self.rest.get(HEADER_LEN..len)? }, len))
        };
        let Some((message, len)) = read() else {
            self.rest = &[];
            return Some(Err(Malformed { what: "a message of an impossible length", offset }));
        };
        let step = align(len).min(self.rest.len());
        self.rest = &self.rest[step..];
        self.offset += step;
        Some(Ok(message))
    }
}

/// The attributes of a message or of an attribute; ends after the first malformed one.
#[derive(Clone, Debug)]
pub struct Attributes<'a> {
    rest: &'a [u8],
    offset: usize,
}

impl<'a> Attributes<'a> {
    /// The attributes in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, offset: 0 }
    }

    /// The first attribute of type `kind`.
    pub fn find(&self, kind: u16) -> Result<Option<Value<'a>>, Malformed> {
        for attribute in self.clone() {
            let (found, value) = attribute?;
            if found == kind {
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    /// The attribute of type `kind`, which has to be there.
    pub fn require(&self, kind: u16) -> Result<Value<'a>, Malformed> {
        self.find(kind)?.ok_or(Malformed { what: "an attribute missing", offset: self.offset })
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, Value<'a>), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let offset = self.offset;
        let read = || {
            let head: &[u8; ATTR_HEADER_LEN] = self.rest.first_chunk()?;
            let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
            let kind = u16::from_ne_bytes([head[2], head[3]]) & TYPE_MASK;
            Some((kind, self.rest.get(ATTR_HEADER_LEN..len)?, len))
        };
        let Some((kind, bytes, len)) = read() else {
            self.rest = &[];
            return Some(Err(Malformed { what: "an attribute of an impossible length", offset }));
        };
        let step = align(len).min(self.rest.len());
        self.rest = &self.rest[step..];
        self.offset += step;
        Some(Ok((kind, Value { bytes, offset })))
    }
}

/// An attribute's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Value<'a> {
    /// The bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// A number in network order.
    pub fn u32(self) -> Result<u32, Malformed> {
        self.bytes.try_into().map(u32::from_be_bytes).map_err(|_| self.bad("a number not of 4 bytes"))
    }

    /// A number in network order.
    pub fn u64(self) -> Result<u64, Malformed> {
        self.bytes.try_into().map(u64::from_be_bytes).map_err(|_| self.bad("a number not of 8 bytes"))
    }

    /// A string; the NUL at its end is optional.
    pub fn str(self) -> Result<&'a str, Malformed> {
        let text = self.bytes.strip_suffix(&[0]).unwrap_or(self.bytes);
        std::str::from_utf8(text).map_err(|_| self.bad("a string that is not UTF-8"))
    }

    /// The attributes within.
    pub fn nested(self) -> Attributes<'a> {
        Attributes::new(self.bytes)
    }

    fn bad(self, what: &'static str) -> Malformed {
        Malformed { what, offset: self.offset }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header { kind: 0xa06, flags: 1, seq: 5 };

    fn sample() -> Writer {
        let mut writer = Writer::default();
        writer.message(HEADER, 1, 0, |w| {
            w.put_str(1, "odd");
            w.nest(2, |w| {
                w.put_u32(1, 0xc114);
                w.put_u64(2, 7);
            });
            w.put(3, &[1, 2, 3, 4, 5]);
        });
        writer.message(HEADER, 2, 10, |_| ());
        writer
    }

    #[test]
    fn what_is_written_is_read() {
        let writer = sample();
        let messages: Vec<_> = Messages::new(writer.bytes()).map(Result::unwrap).collect();
        assert_eq!(messages.len(), 2);
        assert_eq!(messages[0].header, HEADER);
        let (family, attributes) = messages[0].netfilter().unwrap();
        assert_eq!(family, 1);
        assert_eq!(attributes.require(1).unwrap().str().unwrap(), "odd");
        let nested = attributes.require(2).unwrap().nested();
        assert_eq!(nested.require(1).unwrap().u32().unwrap(), 0xc114);
        assert_eq!(nested.require(2).unwrap().u64().unwrap(), 7);
        assert_eq!(attributes.require(3).unwrap().bytes(), [1, 2, 3, 4, 5]);
        assert!(attributes.find(4).unwrap().is_none() && attributes.require(4).is_err());
        assert!(attributes.require(3).unwrap().u32().is_err());
    }

    /// The bytes that `nft --debug=mnl` shows for `add table inet CRIU-t`, from the header's end.
    #[test]
    fn the_layout_is_the_kernels() {
        let mut writer = Writer::default();
        writer.message(HEADER, 1, 0, |w| {
            w.put_str(1, "CRIU-t");
            w.put_u32(2, 0);
        });
        assert_eq!(writer.bytes().len(), 40);
        assert_eq!(writer.bytes()[HEADER_LEN..], *b"\x01\0\0\0\x0b\0\x01\0CRIU-t\0\0\x08\0\x02\0\0\0\0\0");
    }

    #[test]
    fn flags_are_added_to_one_message() {
        let mut writer = sample();
        writer.add_flags(0, 4);
        let flags: Vec<_> = Messages::new(writer.bytes()).map(|m| m.unwrap().header.flags).collect();
        assert_eq!(flags, [5, 1]);
    }

    /// Everything that can be read of a datagram; ends for any bytes.
    fn walk(bytes: &[u8]) -> usize {
        fn attributes(list: Attributes<'_>, depth: usize) -> usize {
            let values = list.flatten();
            let all = values.map(|(_, v)| 1 + if depth > 0 { attributes(v.nested(), depth - 1) } else { 0 });
            all.sum()
        }
        let messages = Messages::new(bytes).flatten();
        messages.map(|m| 1 + m.netfilter().map_or(0, |(_, list)| attributes(list, 3))).sum()
    }

    #[test]
    fn lengths_are_not_trusted() {
        let good = sample().bytes().to_vec();
        let whole = walk(&good);
        for cut in 0..good.len() {
            assert!(walk(&good[..cut]) < whole);
        }
        for at in 0..good.len() {
            for value in [0, 1, 2, 3, 4, 5, 15, 16, 17, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                assert!(walk(&bad) <= good.len());
            }
        }
    }

    #[test]
    fn an_attribute_shorter_than_its_header_ends_the_list() {
        let mut list = Attributes::new(&[3, 0, 1, 0, 4, 0, 1, 0]);
        assert_eq!(
            list.next(),
            Some(Err(Malformed { what: "an attribute of an impossible length", offset: 0 }))
        );
        assert_eq!(list.next(), None);
    }
}
