//! `soccr.img`: what this project knows of a dump and CRIU's messages have no field for (`proto/soccr.proto`).

use std::collections::HashSet;

use protobuf::MessageField;

use super::container::{Magic, Reader, head};
use super::index::Index;
use super::tcp_stream::TcpStreamImage;
use super::{Fault, ImageDir, ImageError};
use crate::connection::State;
use crate::encoding::container::push_message;
use crate::encoding::proto::soccr::{
    Soccr_accepted, Soccr_direction, Soccr_dump_entry, Soccr_item, Soccr_translation,
};
use crate::encoding::{from_endpoint, state_of, to_endpoint};
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
    /// The connections that nobody had accepted, of each listener in the order of its queue.
    pub accepted: Vec<Accepted>,
}

/// A connection that waited in an accept queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// The listener's inode.
    pub listener: u32,
    /// Its own, which names the image of its state.
    pub ino: u32,
    /// Both ends.
    pub tuple: FourTuple,
    /// Its state.
    pub state: State,
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

    /// The connections in accept queues of listeners that `index` holds.
    fn waiting<'a>(&'a self, index: &Index) -> impl Iterator<Item = &'a Accepted> {
        let listeners: HashSet<u32> = index.unconnected.iter().map(|socket| socket.ino).collect();
        self.accepted.iter().filter(move |accepted| listeners.contains(&accepted.listener))
    }

    /// The translations of connections that `index` holds. What is said of others was left behind by other images, or is
    /// not to be trusted.
    pub fn translations_of(&self, index: &Index) -> Vec<Translation> {
        let carried = index.carried().map(|connection| connection.tuple);
        let carried = carried.chain(self.waiting(index).map(|accepted| accepted.tuple));
        let carried: HashSet<FourTuple> = carried.map(|tuple| tuple.on_wire()).collect();
        let sides = |translation: &&Translation| [translation.original.tuple(), translation.reply.tuple()];
        let of_these =
            |translation: &&Translation| sides(translation).iter().any(|side| carried.contains(side));
        self.translations.iter().filter(of_these).copied().collect()
    }

    /// The connections in the accept queues of listeners that `index` holds, as far as they have images: others were left
    /// behind by other images, or are not to be trusted.
    pub fn accepted_of(&self, index: &Index, dir: &ImageDir) -> Vec<Accepted> {
        let has_image = |accepted: &&Accepted| dir.contains(&TcpStreamImage::name(accepted.ino));
        self.waiting(index).filter(has_image).copied().collect()
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
        let mut image = Self { id: entry.id().to_owned(), translations: Vec::new(), accepted: Vec::new() };
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
        let accepted = self.accepted.iter().map(|accepted| Soccr_item {
            accepted: MessageField::some(to_accepted(accepted)),
            ..Default::default()
        });
        translations.chain(accepted)
    }

    /// What a later version has written is passed over.
    fn take(&mut self, item: &Soccr_item) -> Result<(), Fault> {
        if let Some(entry) = item.translation.as_ref() {
            self.translations.push(from_translation(entry)?);
        }
        if let Some(entry) = item.accepted.as_ref() {
            self.accepted.push(from_accepted(entry)?);
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

fn to_accepted(accepted: &Accepted) -> Soccr_accepted {
    Soccr_accepted {
        listener: Some(accepted.listener),
        ino: Some(accepted.ino),
        local: MessageField::some(to_endpoint(accepted.tuple.local)),
        remote: MessageField::some(to_endpoint(accepted.tuple.remote)),
        state: Some(u32::from(accepted.state as u8)),
        ..Default::default()
    }
}

fn from_accepted(entry: &Soccr_accepted) -> Result<Accepted, Fault> {
    let local = from_endpoint(&entry.local, "local")?;
    let tuple = FourTuple { local, remote: from_endpoint(&entry.remote, "remote")? };
    if let Some(why) = tuple.impossible() {
        return Err(Fault::value("local, remote", why));
    }
    let state = state_of(entry.state())?;
    Ok(Accepted { listener: entry.listener(), ino: entry.ino(), tuple, state })
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
        let tuple = v4.reply.tuple();
        let accepted = vec![Accepted { listener: 7, ino: 8, tuple, state: State::CloseWait }];
        let image = SideImage { id: "soccr-0123456789ab".into(), translations: vec![v4, v6], accepted };
        image.write(&dir).unwrap();
        assert_eq!(SideImage::read(&dir).unwrap(), Some(image));
    }

    #[test]
    fn no_connection_waits_for_an_impossible_peer() {
        let tuple = direction("10.9.0.1:1", "10.9.0.2:0").tuple();
        let accepted = Accepted { listener: 7, ino: 8, tuple, state: State::Established };
        assert!(from_accepted(&to_accepted(&accepted)).is_err());
        assert!(from_accepted(&Soccr_accepted::default()).is_err());
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
