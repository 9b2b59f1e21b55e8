//! Memory for what is read, beyond the bytes that it has in the files.

use super::Fault;

/// What the entries of an index, or of a side image, may take beyond their own lengths in the files. A connection that stock
/// CRIU writes takes no more memory than it has bytes in its file; images of millions of entries as short as can be would
/// take several times their size.
#[derive(Debug)]
pub(super) struct Allowance {
    left: u64,
    spare: u64,
}

impl Allowance {
    /// For an index as a whole.
    pub(super) fn of_index() -> Self {
        Self::new(6 << 20)
    }

    /// For a side image: as many sockets as anybody dumps, each with options, its connection translated.
    pub(super) fn of_side_image() -> Self {
        Self::new(12 << 20)
    }

    fn new(spare: u64) -> Self {
        Self { left: spare, spare }
    }

    /// Accounts for an entry that takes `memory` bytes and has `length` in its file.
    pub(super) fn take(&mut self, memory: usize, length: usize) -> Result<(), Fault> {
        let beyond = memory.saturating_sub(length) as u64;
        self.left = self.left.checked_sub(beyond).ok_or(Fault::Memory { spare: self.spare })?;
        Ok(())
    }
}

/// The most that one more `Entry` in a hash table takes, in bytes, at the moment when the table has just doubled and
/// the old half is still there: 16/7 buckets an entry, each with a control byte, and half of that again.
pub(super) const fn in_hash_table<Entry>() -> usize {
    (size_of::<Entry>() + 1) * 7 / 2
}

/// The same for a vector: twice the place, and the old half.
pub(super) const fn in_vector<Entry>() -> usize {
    size_of::<Entry>() * 3
}

/// The same for a map of type `BTreeMap`, whose nodes of eleven places have at least five entries.
pub(super) const fn in_tree<Entry>() -> usize {
    size_of::<Entry>() * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_file_has_is_free() {
        let mut allowance = Allowance::of_index();
        for _ in 0..1 << 20 {
            allowance.take(100, 100).unwrap();
        }
        let all = usize::try_from(allowance.spare).unwrap();
        allowance.take(all + 7, 7).unwrap();
        assert!(matches!(allowance.take(8, 7), Err(Fault::Memory { .. })));
    }
}
