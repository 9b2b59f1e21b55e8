//! Byte streams whose every byte depends on the stream and on its offset, so that a lost,
//! repeated, swapped or foreign byte is seen at once.

use anyhow::{Result, bail};

/// An endless byte stream; two patterns with different seeds share bytes only by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    seed: u64,
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Pattern {
    /// What the client with this port sends to its server.
    pub fn to_server(client_port: u16) -> Self {
        Self { seed: u64::from(client_port) << 1 }
    }

    /// What the server sends to the client with this port.
    pub fn to_client(client_port: u16) -> Self {
        Self { seed: u64::from(client_port) << 1 | 1 }
    }

    /// Writes the bytes from `offset` on into `buf`.
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        for (at, byte) in (offset..).zip(buf) {
            *byte = self.byte(at);
        }
    }

    /// The `len` bytes from `offset` on.
    pub fn bytes(self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        self.fill(offset, &mut buf);
        buf
    }

    /// Whether `buf` is what the stream has at `offset`.
    pub fn check(self, offset: u64, buf: &[u8]) -> Result<()> {
        for (at, &byte) in (offset..).zip(buf) {
            if byte != self.byte(at) {
                bail!("byte {at} of the stream is {byte:#04x}, expected {:#04x}", self.byte(at));
            }
        }
        Ok(())
    }

    /// One byte of the 64-bit word that covers `offset` (`SplitMix64` in counter mode).
    fn byte(self, offset: u64) -> u8 {
        let mut word = self.seed.wrapping_mul(GOLDEN).wrapping_add((offset / 8).wrapping_mul(GOLDEN));
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        word.to_le_bytes()[(offset % 8) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_make_the_whole() {
        let pattern = Pattern::to_server(4711);
        let whole = pattern.bytes(0, 100);
        let pieces = [pattern.bytes(0, 13), pattern.bytes(13, 50), pattern.bytes(63, 37)].concat();
        assert_eq!(whole, pieces);
        pattern.check(13, &whole[13..]).unwrap();
    }

    #[test]
    fn a_shift_or_a_foreign_stream_is_seen() {
        let pattern = Pattern::to_server(4711);
        let bytes = pattern.bytes(0, 64);
        assert!(pattern.check(1, &bytes).is_err());
        assert!(pattern.check(8, &bytes).is_err());
        assert!(Pattern::to_client(4711).check(0, &bytes).is_err());
        assert!(Pattern::to_server(4712).check(0, &bytes).is_err());
    }
}
