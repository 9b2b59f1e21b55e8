//! The kernel's description of its own types and functions (BTF, `Documentation/bpf/btf.rst`): the number by which a BPF
//! program calls a function of the kernel.

use std::fs;
use std::io;

const FILE: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

/// The kernel's BTF as it lies in its file.
#[derive(Debug)]
pub struct Btf(Vec<u8>);

impl Btf {
    /// Reads that of the running kernel.
    ///
    /// # Errors
    /// ENOENT on a kernel that was built without (CONFIG_DEBUG_INFO_BTF).
    pub fn of_kernel() -> io::Result<Self> {
        Ok(Self(fs::read(FILE)?))
    }

    /// The number of a function; `None` if the kernel has none of that name.
    #[must_use]
    pub fn function(&self, name: &str) -> Option<u32> {
        const FUNCTION: u32 = 12;
        let header = self.0.get(..24)?;
        if u16::from_ne_bytes(header.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let at = |at: usize| usize::try_from(word(header, at)?).ok();
        let body = self.0.get(at(4)?..)?;
        let mut types = section(body, at(8)?, at(12)?)?;
        let strings = section(body, at(16)?, at(20)?)?;
        for id in 1.. {
            let (kind, name_at, rest) = next_type(types)?;
            if kind == FUNCTION && is_string(strings, name_at, name) {
                return Some(id);
            }
            types = rest;
        }
        None
    }
}

fn section(body: &[u8], offset: usize, length: usize) -> Option<&[u8]> {
    body.get(offset..)?.get(..length)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// The first of these types: its kind, where its name is, and what follows it. `None` at the end, and at a kind that is not
/// known, whose length nobody can tell.
fn next_type(types: &[u8]) -> Option<(u32, u32, &[u8])> {
    const HEAD: usize = 12;
    let info = word(types, 4)?;
    // Of 24 and seven bits; most kernels use only 16 and five, and leave the others 0.
    let (kind, members) = (info >> 24 & 0x7f, usize::try_from(info & 0x00ff_ffff).ok()?);
    let more = match kind {
        2 | 7..=12 | 16 | 18 => 0, // pointers, names for other types, functions, floats
        1 | 14 | 17 => 4,          // integers, variables, tags of declarations
        3 => 12,                   // arrays
        4 | 5 | 15 | 19 => 12 * members, // structures, unions, sections, long enumerations
        6 | 13 => 8 * members,     // enumerations, prototypes
        _ => return None,
    };
    Some((kind, word(types, 0)?, types.get(HEAD + more..)?))
}

fn is_string(strings: &[u8], at: u32, wanted: &str) -> bool {
    let tail = usize::try_from(at).ok().and_then(|at| strings.get(at..)).unwrap_or_default();
    tail.strip_prefix(wanted.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An integer, a function named `first`, and one named `second`.
    fn small() -> Vec<u8> {
        let strings = b"\0int\0first\0second\0";
        let types: [u32; 10] = [1, 1 << 24, 4, 32, 5, 12 << 24, 0, 11, 12 << 24, 0];
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        let strings_len = u32::try_from(strings.len()).unwrap();
        for number in [24, 0, 40, 40, strings_len].into_iter().chain(types) {
            btf.extend(number.to_ne_bytes());
        }
        btf.extend(strings);
        btf
    }

    #[test]
    fn functions_are_found_by_their_whole_names() {
        let btf = Btf(small());
        assert_eq!((btf.function("first"), btf.function("second")), (Some(2), Some(3)));
        assert_eq!((btf.function("int"), btf.function("firs"), btf.function("third")), (None, None, None));
    }

    #[test]
    fn each_part_of_it_is_read_in_its_bounds() {
        let whole = small();
        for length in 0..whole.len() {
            assert_eq!(Btf(whole[..length].to_vec()).function("second"), None);
        }
    }
}
