//! What client and server agree on: the order that opens a connection, and the form of the streams.
//!
//! The client's stream is its order, then [`Pattern::to_server`]. The server's stream is made of
//! blocks: each begins with a stamp, which is how much of the client's pattern the server's program
//! has read and found right, the rest is [`Pattern::to_client`]. After the last block comes one more
//! stamp, then the end. So the client sees that its own bytes arrive, and at the end that all did.

use anyhow::{Result, ensure};
use soccr_testkit::Pattern;

/// Bytes of a block, its stamp included.
pub const BLOCK: usize = 4096;

/// Bytes of a stamp.
pub const STAMP: usize = 8;

/// For [`Order::upload`] and [`Order::blocks`]: until the client ends its stream.
pub const OPEN: u64 = u64::MAX;

/// The first bytes of a connection: what the server shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Bytes of pattern that the client will send, or [`OPEN`].
    pub upload: u64,
    /// Blocks that the server sends before it ends its stream, or [`OPEN`].
    pub blocks: u64,
    /// Bytes that the server reads in each of its ticks at most; 0: as many as there are.
    pub read: u64,
    /// Bytes that the server writes in each of its ticks at most; 0: as many as fit.
    pub write: u64,
    /// The server's `SO_SNDBUF` and `SO_RCVBUF`; 0: as the kernel likes.
    pub buffers: u64,
}

impl Order {
    /// Its length on the wire.
    pub const LEN: usize = 40;

    pub fn encode(self) -> Vec<u8> {
        [self.upload, self.blocks, self.read, self.write, self.buffers].map(u64::to_be_bytes).concat()
    }

    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let word = |i: usize| u64::from_be_bytes(*bytes[i * 8..].first_chunk().expect("five words"));
        Self { upload: word(0), blocks: word(1), read: word(2), write: word(3), buffers: word(4) }
    }
}

/// Block `number` of the server's stream.
pub fn block(pattern: Pattern, number: u64, stamp: u64) -> Vec<u8> {
    let mut bytes = pattern.bytes(number * BLOCK as u64, BLOCK);
    bytes[..STAMP].copy_from_slice(&stamp.to_be_bytes());
    bytes
}

/// The client's view of the server's stream.
#[derive(Clone, Debug)]
pub struct Download {
    pattern: Pattern,
    received: u64,
    stamp: u64,
    partial: [u8; STAMP],
}

impl Download {
    pub fn new(pattern: Pattern) -> Self {
        Self { pattern, received: 0, stamp: 0, partial: [0; STAMP] }
    }

    /// Bytes so far, each of them right.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The last stamp.
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Checks the next bytes; no stamp can exceed what the client has `sent`.
    pub fn take(&mut self, mut bytes: &[u8], sent: u64) -> Result<()> {
        while !bytes.is_empty() {
            let at = usize::try_from(self.received % BLOCK as u64)?;
            let end = if at < STAMP { STAMP } else { BLOCK };
            let (part, rest) = bytes.split_at(bytes.len().min(end - at));
            if at < STAMP {
                self.partial[at..at + part.len()].copy_from_slice(part);
            } else {
                self.pattern.check(self.received, part)?;
            }
            self.received += part.len() as u64;
            if at < STAMP && at + part.len() == STAMP {
                self.take_stamp(sent)?;
            }
            bytes = rest;
        }
        Ok(())
    }

    fn take_stamp(&mut self, sent: u64) -> Result<()> {
        let stamp = u64::from_be_bytes(self.partial);
        ensure!(
            (self.stamp..=sent).contains(&stamp),
            "the stamp before byte {} is {stamp}; the last was {}, {sent} bytes were sent",
            self.received,
            self.stamp
        );
        self.stamp = stamp;
        Ok(())
    }

    /// Whether the stream may end here.
    pub fn complete(&self) -> bool {
        self.received % BLOCK as u64 == STAMP as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_survives_the_wire() {
        let order = Order { upload: OPEN, blocks: 7, read: 1, write: 2, buffers: 65536 };
        assert_eq!(Order::decode(order.encode().first_chunk().unwrap()), order);
    }

    #[test]
    fn blocks_in_pieces_make_a_download() {
        let pattern = Pattern::to_client(4711);
        let stream = [block(pattern, 0, 5), block(pattern, 1, 9), 11_u64.to_be_bytes().to_vec()].concat();
        for piece in [1, 3, 8, 4096, 5000] {
            let mut download = Download::new(pattern);
            for part in stream.chunks(piece) {
                assert!(!download.complete() || download.received() % BLOCK as u64 == STAMP as u64);
                download.take(part, 11).unwrap();
            }
            assert!(download.complete());
            assert_eq!(download.stamp(), 11);
        }
    }

    #[test]
    fn wrong_bytes_and_stamps_are_seen() {
        let pattern = Pattern::to_client(4711);
        let good = block(pattern, 0, 5);
        let mut flipped = good.clone();
        flipped[4000] ^= 1;
        assert!(Download::new(pattern).take(&flipped, 9).is_err());
        assert!(Download::new(pattern).take(&good, 4).is_err(), "more than was sent");
        let back = [block(pattern, 0, 5), block(pattern, 1, 4)].concat();
        assert!(Download::new(pattern).take(&back, 9).is_err());
        assert!(!Download::new(pattern).complete());
    }
}
