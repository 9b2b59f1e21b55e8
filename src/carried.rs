//! A connection between two sockets: owned, and as bytes.

use std::fmt;

use protobuf::SpecialFields;

use crate::connection::{ControlBlock, FourTuple, Queues};
use crate::encoding::proto::soccr::Soccr_connection_entry;
use crate::encoding::{COMMON, Fault, Head, Magic, container, decode};
use crate::kernel::options::SocketOption;
use crate::lock::LockName;

/// A connection without a socket: all that it takes to go on in another one.
///
/// [`freeze`](crate::freeze) makes it, [`thaw`](crate::thaw) makes a socket of it. In between it is data, to be sent or
/// stored with [`Connection::to_bytes`].
#[derive(Clone, PartialEq)]
pub struct Connection {
    pub(crate) head: Head,
    pub(crate) queues: Queues,
    /// How many connections are locked by `head.lock_id`; 0 where [`freeze`](crate::freeze) has locked none.
    pub(crate) locked_together: u32,
    unknown: Unknown,
}

/// Fields that a later version has written: of the message, and of the control block in it.
#[derive(Clone, Debug, Default, PartialEq)]
struct Unknown {
    message: SpecialFields,
    stream: SpecialFields,
}

/// Bytes that are no connection.
#[derive(Debug, thiserror::Error)]
#[error("not a connection, from byte {offset} on")]
pub struct BadBytes {
    /// Where they go wrong.
    pub offset: usize,
    source: Fault,
}

impl Connection {
    pub(crate) fn new(head: Head, queues: Queues) -> Self {
        Self { head, queues, locked_together: 0, unknown: Unknown::default() }
    }

    /// Both ends.
    #[must_use]
    pub fn four_tuple(&self) -> FourTuple {
        self.head.tuple
    }

    /// State, sequences, windows, and what the ends agreed on.
    #[must_use]
    pub fn control_block(&self) -> &ControlBlock {
        &self.head.tcp
    }

    /// The bytes in both queues.
    #[must_use]
    pub fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Gives up the bytes of both queues, which may be many; what is left is no whole connection.
    #[doc(hidden)]
    pub fn drop_queues(&mut self) {
        self.queues = Queues::default();
    }

    /// The socket options, in the order to set them.
    #[doc(hidden)]
    #[must_use]
    pub fn options(&self) -> &[SocketOption] {
        &self.head.options
    }

    /// The lock that keeps the peer's segments away until [`thaw`](crate::thaw), and how many connections it holds.
    #[doc(hidden)]
    #[must_use]
    pub fn lock(&self) -> Option<(LockName, u32)> {
        let id = self.head.lock_id.as_deref().filter(|_| self.locked_together > 0)?;
        LockName::soccr(id).ok().map(|name| (name, self.locked_together))
    }

    /// Says which lock keeps the peer's segments away, and from how many connections.
    pub(crate) fn lock_behind(&mut self, name: &LockName, together: usize) {
        self.head.lock_id = Some(name.id().to_owned());
        self.locked_together = u32::try_from(together).unwrap_or(u32::MAX);
    }

    /// The connection as bytes, for [`Connection::from_bytes`] of this or any later version.
    ///
    /// They are one protobuf message (`proto/soccr.proto`) behind two magic words and its length, then the bytes of the
    /// receive queue, then those of the send queue: what the program and its peer have told each other, as secret as
    /// that.
    #[must_use]
    #[allow(clippy::missing_panics_doc)] // all required fields are there, and the message is far below 4 GiB
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut entry = self.head.to_entry();
        entry.locked_together = Some(self.locked_together).filter(|number| *number > 0);
        entry.special_fields = self.unknown.message.clone();
        entry.stream.mut_or_insert_default().special_fields = self.unknown.stream.clone();
        let mut bytes = container::head(Magic::SoccrExternal, &entry).expect("a whole message");
        bytes.reserve_exact(self.queues.recv.len() + self.queues.send.len());
        bytes.extend_from_slice(&self.queues.recv);
        bytes.extend_from_slice(&self.queues.send);
        bytes
    }

    /// The connection that [`Connection::to_bytes`] wrote. Fields that a later version has added are kept for the next
    /// `to_bytes`.
    ///
    /// The bytes may come from anybody: each length is checked before memory is taken for it.
    ///
    /// # Errors
    /// [`BadBytes`]: they are not a connection's, are not complete, or go on behind its end.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadBytes> {
        const HEAD: usize = 12;
        let bad = |offset, source| BadBytes { offset, source };
        let short = |offset: usize, needed: usize| {
            let left = bytes.len().saturating_sub(offset) as u64;
            bad(offset, Fault::Truncated { needed: needed as u64, left })
        };
        for (at, expected) in [(0, COMMON), (4, Magic::SoccrExternal as u32)] {
            let found = word(bytes, at).ok_or_else(|| short(at, 4))?;
            if found != expected {
                return Err(bad(at, Fault::Magic { expected, found }));
            }
        }
        let length = word(bytes, 8).ok_or_else(|| short(8, 4))? as usize;
        decode::check_length(length as u64).map_err(|fault| bad(8, fault))?;
        let message = bytes.get(HEAD..HEAD + length).ok_or_else(|| short(HEAD, length))?;
        let mut entry: Soccr_connection_entry =
            decode::decode(message).map_err(|(at, fault)| bad(HEAD + at, fault))?;
        let unknown = Unknown {
            message: std::mem::take(&mut entry.special_fields),
            stream: std::mem::take(&mut entry.stream.mut_or_insert_default().special_fields),
        };
        let locked_together = entry.locked_together();
        let head = Head::from_entry(entry).map_err(|fault| bad(HEAD, fault))?;
        let at = HEAD + length;
        let queues = queues(&bytes[at..], &head.tcp).map_err(|fault| bad(at, fault))?;
        Ok(Self { head, queues, locked_together, unknown })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

/// The queues' bytes, which must be these and no more.
fn queues(bytes: &[u8], tcp: &ControlBlock) -> Result<Queues, Fault> {
    let (needed, left) = (u64::from(tcp.recv_len) + u64::from(tcp.send_len), bytes.len() as u64);
    if left < needed {
        return Err(Fault::Truncated { needed, left });
    }
    if left > needed {
        return Err(Fault::Trailing(left - needed));
    }
    let (recv, send) = bytes.split_at(tcp.recv_len as usize);
    Ok(Queues { recv: recv.to_vec(), send: send.to_vec() })
}

/// Without the queues' bytes, which are not for logs.
impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("four_tuple", &self.head.tuple)
            .field("control_block", &self.head.tcp)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Negotiated, State};
    use crate::encoding::wire;

    fn connection() -> Connection {
        let negotiated = Negotiated { mss_clamp: 1440, ..Negotiated::default() };
        let head = Head {
            tuple: FourTuple {
                local: "[fe80::1%3]:443".parse().unwrap(),
                remote: "[fe80::2]:50000".parse().unwrap(),
            },
            tcp: ControlBlock {
                state: State::CloseWait,
                recv_len: 3,
                rcv_nxt: 7,
                send_len: 5,
                write_seq: u32::MAX,
                unsent_len: 2,
                negotiated,
                window: None,
            },
            options: vec![SocketOption { level: 6, name: 1, value: vec![1, 0, 0, 0] }],
            shut_rd: false,
            usec_ts_known: false,
            lock_id: Some("1f".into()),
        };
        let queues = Queues { recv: b"abc".to_vec(), send: b"defgh".to_vec() };
        Connection { locked_together: 3, ..Connection::new(head, queues) }
    }

    #[test]
    fn reads_what_it_writes() {
        let connection = connection();
        let read = Connection::from_bytes(&connection.to_bytes()).unwrap();
        assert_eq!(read, connection);
        assert_eq!(read.lock(), Some((LockName::soccr("1f").unwrap(), 3)));
    }

    /// A version of tomorrow adds fields to the message and to the control block in it.
    #[test]
    fn keeps_unknown_fields() {
        let mut entry = connection().head.to_entry();
        entry.special_fields.mut_unknown_fields().add_varint(1000, 5);
        entry.stream.mut_or_insert_default().special_fields.mut_unknown_fields().add_varint(1001, 6);
        let mut bytes = container::head(Magic::SoccrExternal, &entry).unwrap();
        bytes.extend_from_slice(b"abcdefgh");
        assert_eq!(Connection::from_bytes(&bytes).unwrap().to_bytes(), bytes);
    }

    #[test]
    fn refuses_each_part_of_it_and_more() {
        let bytes = connection().to_bytes();
        for length in 0..bytes.len() {
            let error = Connection::from_bytes(&bytes[..length]).unwrap_err();
            assert!(error.offset <= length, "{length}: {}", crate::chain(&error));
        }
        let error = Connection::from_bytes(&[&bytes[..], b"x"].concat()).unwrap_err();
        assert!(matches!(error.source, Fault::Trailing(1)));
    }

    /// No memory is taken for what a length claims.
    #[test]
    fn refuses_lengths_beyond_the_bytes() {
        let mut bytes = connection().to_bytes();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(Connection::from_bytes(&bytes).unwrap_err().source, Fault::TooLong { .. }));
        let mut connection = connection();
        connection.head.tcp.recv_len = u32::MAX;
        let error = Connection::from_bytes(&connection.to_bytes()).unwrap_err();
        assert!(matches!(error.source, Fault::Truncated { .. }));
        let mut message = Vec::new();
        wire::put_bytes(&mut message, 2, &[0x0a, 0xff, 0xff, 0xff, 0x7f]); // an address of 256 MiB
        let mut bytes = connection.to_bytes()[..8].to_vec();
        bytes.extend_from_slice(&u32::try_from(message.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&message);
        assert!(matches!(Connection::from_bytes(&bytes).unwrap_err().source, Fault::Wire));
    }
}
