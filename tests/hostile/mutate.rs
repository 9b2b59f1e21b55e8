//! Random changes that a seed determines.

use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};

use crate::targets::{archive_of, files_of};

/// Numbers that a seed determines.
pub struct Random {
    seed: u64,
    count: u64,
}

impl Random {
    /// From the variable `SOCCR_SEED`, or another seed each time; printed, so that a run can be repeated.
    pub fn seeded() -> Self {
        let seed = std::env::var("SOCCR_SEED").map_or_else(
            |_| RandomState::new().build_hasher().finish(),
            |seed| seed.parse().expect("SOCCR_SEED is a number"),
        );
        println!("SOCCR_SEED={seed}");
        Self { seed, count: 0 }
    }

    /// A number from 0 to `limit` - 1.
    pub fn below(&mut self, limit: usize) -> usize {
        self.count += 1;
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.seed);
        hasher.write_u64(self.count);
        usize::try_from(hasher.finish() % limit as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }

    /// One of `things`.
    pub fn of<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        &things[self.below(things.len())]
    }
}

/// A damaged copy of one of `inputs`: one to four changes.
pub fn mutated(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut content = random.of(inputs).clone();
    for _ in 0..=random.below(4) {
        let other = random.of(inputs);
        change(&mut content, other, random);
    }
    content
}

/// A damaged copy of an archive: the change is to one file's content, so that the others lead there.
pub fn mutated_archive(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let archive = random.of(inputs).clone();
    let mut files = files_of(&archive);
    let which = random.below(files.len());
    let others: Vec<Vec<u8>> = files.iter().map(|(_, content)| content.to_vec()).collect();
    let content = mutated(std::slice::from_ref(&others[which]), random);
    let content = if random.below(8) == 0 { mutated(&others, random) } else { content };
    files[which].1 = &content;
    archive_of(files)
}

/// Numbers at which lengths, counts and sequences change their meaning.
const WORDS: [u32; 10] =
    [0, 1, 0x7f, 0x7fff_ffff, 0x8000_0000, u32::MAX, u32::MAX - 3, 1 << 24, 0xffff, 0x10_0000];
/// Varints at the limits of 32 and 64 bits, beyond them, without an end, and ten million.
const VARINTS: [&[u8]; 6] = [
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0x80, 0x80, 0x80, 0x80, 0x10],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
    &[0x80; 12],
    &[0x80, 0xad, 0xe2, 0x04],
];

fn change(content: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(content.len() + 1);
    let piece = at..(at + random.below(40)).min(content.len());
    match random.below(9) {
        0 => content.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.below(8)),
        1 => content.iter_mut().skip(at).take(1).for_each(|byte| *byte = random.byte()),
        2 => {
            let word = random.of(&WORDS).to_le_bytes();
            content.iter_mut().skip(at).zip(word).for_each(|(byte, new)| *byte = new);
        }
        3 => {
            let word = random.of(&WORDS).to_le_bytes();
            content.iter_mut().skip(at).take(2).zip(word).for_each(|(byte, new)| *byte = new);
        }
        4 => drop(content.splice(at..(at + 1).min(content.len()), random.of(&VARINTS).iter().copied())),
        5 => drop(content.drain(piece)),
        6 => content.splice(at..at, content[piece].to_vec()).for_each(drop),
        7 => content.truncate(at),
        _ => {
            let from = random.below(other.len() + 1);
            content.truncate(at);
            content.extend_from_slice(&other[from..]);
        }
    }
}
