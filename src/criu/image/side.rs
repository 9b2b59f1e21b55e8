//! `soccr.img`: what this project knows of a dump and CRIU's messages have no field for (`proto/soccr.proto`).

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use protobuf::MessageField;

use super::container::{Magic, Reader, head};
use super::index::Index;
use super::{Fault, ImageDir, ImageError};
use crate::encoding::container::push_message;
use crate::encoding::proto::soccr::{
    Soccr_direction, Soccr_dump_entry, Soccr_item, Soccr_kept, Soccr_translation,
};
use crate::encoding::{from_endpoint, to_endpoint};
use crate::four_tuple::FourTuple;
use crate::lock::LockName;
use crate::lock::conntrack::{Direction, Translation};

/// The file's name.
pub const NAME: &str = "soccr.img";
const VERSION: u32 = 2;

/// The image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideImage {
    /// Names the dump, and its record on the host where it was made.
    pub id: String,
    /// The connections that are translated on their way.
    pub translations: Vec<Translation>,
    /// What else is known of some connections, by the inode numbers of their images.
    pub kept: HashMap<u32, Kept>,
}

/// What CRIU's image of a connection has no field for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// The smoothed round trip time of one with ECN: only that is opened by SYN segments, which measure it anew.
    pub rtt: Option<Duration>,
    /// The clock of its timestamps is known to tick in microseconds.
    pub usec_ts: bool,
}

impl SideImage {
    /// Writes the image; one that was there is replaced.
    ///
    /// # Errors
    /// As [`ImageDir::create`].
    pub fn write(&self, dir: &ImageDir) -> Result<(), ImageError> {
        let entry =
            Soccr_dump_entry { version: Some(VERSION), id: Some(self.id.clone()), ..Default::default() };
        let mut image = head(NAME, Magic::SoccrDump, &entry)?;
        for item in self.items() {
            push_message(&mut image, &item).map_err(|reason| ImageError::unwritable(NAME, reason))?;
        }
        dir.create(NAME, &[&image])
    }

    /// The dump's lock, where it shares criu's network namespace; one on the way has its [name](LockName::on_path), too.
    #[must_use]
    pub fn lock(&self) -> Option<LockName> {
        LockName::criu(&self.id).ok()
    }

    /// The translations of connections that `index` holds. What is said of others was left behind by other images, or is
    /// not to be trusted.
    pub fn translations_of(&self, index: &Index) -> Vec<Translation> {
        let carried: HashSet<FourTuple> =
            index.carried().map(|connection| connection.tuple.on_wire()).collect();
        let sides = |translation: &&Translation| [translation.original.tuple(), translation.reply.tuple()];
        let of_these =
            |translation: &&Translation| sides(translation).iter().any(|side| carried.contains(side));
        self.translations.iter().filter(of_these).copied().collect()
    }

    /// Reads the image; `None` if it is not there, as in images that stock CRIU made.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(dir: &ImageDir) -> Result<Option<Self>, ImageError> {
        let Some(mut reader) = Reader::open_if_there(dir, NAME, Magic::SoccrDump)? else { return Ok(None) };
        let entry: Soccr_dump_entry = reader.required()?;
        if entry.version() != VERSION {
            let fault = Fault::value("version", format!("{} is not known", entry.version()));
            return Err(reader.bad_message(fault));
        }
        let mut image = Self { id: entry.id().to_owned(), translations: Vec::new(), kept: HashMap::new() };
        while let Some(item) = reader.next_message()? {
            image.take(&item).map_err(|fault| reader.bad_message(fault))?;
        }
        Ok(Some(image))
    }

    fn items(&self) -> impl Iterator<Item = Soccr_item> {
        let translations = self.translations.iter().map(|translation| Soccr_item {
            translation: MessageField::some(to_translation(translation)),
            ..Default::default()
        });
        let kept = self.kept.iter().map(|(ino, kept)| Soccr_item {
            kept: MessageField::some(Soccr_kept {
                ino: Some(*ino),
                rtt_us: kept.rtt.and_then(|rtt| u32::try_from(rtt.as_micros()).ok()),
                usec_ts: kept.usec_ts.then_some(true),
                ..Default::default()
            }),
            ..Default::default()
        });
        translations.chain(kept)
    }

    /// What a later version has written is passed over.
    fn take(&mut self, item: &Soccr_item) -> Result<(), Fault> {
        if let Some(entry) = item.translation.as_ref() {
            self.translations.push(from_translation(entry)?);
        }
        if let Some(entry) = item.kept.as_ref() {
            let rtt = entry.rtt_us.map(|microseconds| Duration::from_micros(microseconds.into()));
            self.kept.insert(entry.ino(), Kept { rtt, usec_ts: entry.usec_ts() });
        }
        Ok(())
    }
}

fn to_translation(translation: &Translation) -> Soccr_translation {
    Soccr_translation {
        original: MessageField::some(to_direction(translation.original)),
        reply: MessageField::some(to_direction(translation.reply)),
        ..Default::default()
    }
}

fn to_direction(direction: Direction) -> Soccr_direction {
    Soccr_direction {
        source: MessageField::some(to_endpoint(direction.source)),
        destination: MessageField::some(to_endpoint(direction.destination)),
        ..Default::default()
    }
}

fn from_translation(entry: &Soccr_translation) -> Result<Translation, Fault> {
    let [original, reply] = [from_direction(&entry.original)?, from_direction(&entry.reply)?];
    if original.source.is_ipv4() != reply.source.is_ipv4() {
        return Err(Fault::value("translations", "its directions are of different families"));
    }
    Ok(Translation { original, reply })
}

fn from_direction(entry: &Soccr_direction) -> Result<Direction, Fault> {
    let source = from_endpoint(&entry.source, "source")?;
    let destination = from_endpoint(&entry.destination, "destination")?;
    if source.is_ipv4() != destination.is_ipv4() {
        return Err(Fault::value("source, destination", "they are of different families"));
    }
    Ok(Direction { source, destination })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn direction(source: &str, destination: &str) -> Direction {
        Direction { source: source.parse().unwrap(), destination: destination.parse().unwrap() }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ImageDir::open(folder.path()).unwrap();
        assert_eq!(SideImage::read(&dir).unwrap(), None);
        let v4 = Translation {
            original: direction("10.9.0.1:40000", "192.0.2.1:7100"),
            reply: direction("10.88.0.2:7000", "10.9.0.1:40000"),
        };
        let v6 = Translation {
            original: direction("[fd00::1]:1", "[fd00::2]:2"),
            reply: direction("[fd01::2]:3", "[fd00::1]:1"),
        };
        let image = SideImage {
            id: "soccr-0123456789ab".into(),
            translations: vec![v4, v6],
            kept: HashMap::from([
                (7, Kept { rtt: Some(Duration::from_micros(80_001)), usec_ts: false }),
                (u32::MAX, Kept { rtt: None, usec_ts: true }),
            ]),
        };
        image.write(&dir).unwrap();
        assert_eq!(SideImage::read(&dir).unwrap(), Some(image));
    }

    #[test]
    fn families_do_not_mix() {
        let mixed = Translation {
            original: direction("10.9.0.1:1", "10.9.0.2:2"),
            reply: direction("[fd01::2]:3", "[fd00::1]:1"),
        };
        assert!(from_translation(&to_translation(&mixed)).is_err());
    }
}
