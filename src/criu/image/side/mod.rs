//! `soccr.img`: what this project knows of a dump and CRIU's messages have no field for (`proto/soccr.proto`).

mod sockets;
mod translations;

use std::collections::HashSet;

use protobuf::MessageField;

use super::allowance::{Allowance, in_vector};
use super::container::{Magic, Reader, head};
use super::index::Index;
use super::tcp_stream::TcpStreamImage;
use super::{Fault, ImageDir, ImageError};
use crate::connection::State;
use crate::encoding::container::push_message;
use crate::encoding::decode::decode;
use crate::encoding::proto::soccr::{
    Soccr_accepted, Soccr_direction, Soccr_dump_entry, Soccr_held, Soccr_item, Soccr_listener,
    Soccr_translation,
};
use crate::encoding::wire::{self, NotAField, Value};
use crate::encoding::{from_endpoint, state_of, to_endpoint};
use crate::four_tuple::FourTuple;
use crate::lock::conntrack::{Direction, Translation};
use crate::lock::held::HeldPackets;
use crate::lock::{Listener, LockName};
pub use sockets::{SocketExtra, Sockets};
use translations::TRANSLATION;
pub use translations::Translations;

/// The file's name.
pub const NAME: &str = "soccr.img";
const VERSION: u32 = 2;

/// The image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SideImage {
    /// Names the dump, and its record on the host where it was made.
    pub id: String,
    /// The dump's id in CRIU's inventory, if it has one.
    pub run_id: Option<String>,
    /// The connections that are translated on their way.
    pub translations: Translations,
    /// What CRIU's images do not tell of sockets.
    pub sockets: Sockets,
    /// The connections that nobody had accepted, of each listener in the order of its queue.
    pub accepted: Vec<Accepted>,
    /// What the connections' peers have sent during the dump.
    pub held: HeldPackets,
    /// Where the tree listens.
    pub listeners: Vec<TreeListener>,
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

/// A listener of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeListener {
    /// Where.
    pub listener: Listener,
    /// Where that is said.
    pub place: Place,
}

/// Which network namespace an address is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// One of the tree's.
    Inside = 0,
    /// The one that criu runs in.
    BesideCriu = 1,
    /// That too, through which packets pass to a listener in one of the tree's.
    OnPath = 2,
}

impl SideImage {
    /// Writes the image; one that was there is replaced. Who takes over from us when we die meanwhile finds none, or that.
    ///
    /// # Errors
    /// As [`ImageDir::create`].
    pub fn write(&self, dir: &ImageDir) -> Result<(), ImageError> {
        let entry = Soccr_dump_entry {
            version: Some(VERSION),
            id: Some(self.id.clone()),
            run_id: self.run_id.clone(),
            ..Default::default()
        };
        let mut image = head(NAME, Magic::SoccrDump, &entry)?;
        for item in self.items() {
            push_message(&mut image, &item).map_err(|reason| ImageError::unwritable(NAME, reason))?;
        }
        self.translations.messages().for_each(|message| push(&mut image, TRANSLATION, message));
        self.sockets.messages().for_each(|message| push(&mut image, SOCKET, message));
        dir.replace(NAME, &[&image])
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
        let mut carried: HashSet<FourTuple> = carried.map(|tuple| tuple.on_wire()).collect();
        // Of each connection the first counts.
        let of_these = |translation: &Translation| {
            [translation.original.tuple(), translation.reply.tuple()].iter().any(|side| carried.remove(side))
        };
        self.translations.iter().filter(of_these).collect()
    }

    /// The connections in the accept queues of listeners that `index` holds, as far as they have images: others were left
    /// behind by other images, or are not to be trusted.
    pub fn accepted_of(&self, index: &Index, dir: &ImageDir) -> Vec<Accepted> {
        let has_image = |accepted: &&Accepted| dir.contains(&TcpStreamImage::name(accepted.ino));
        self.waiting(index).filter(has_image).copied().collect()
    }

    /// Whether it was written with the images of this index, or other ones were in this folder then.
    #[must_use]
    pub fn belongs_to(&self, index: &Index) -> bool {
        self.run_id == index.dump_run_id
    }

    /// Reads the image; `None` if it is not there, as in images that stock CRIU made.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn read(dir: &ImageDir) -> Result<Option<Self>, ImageError> {
        let Some((entry, mut reader)) = Self::open(dir)? else { return Ok(None) };
        let mut image = Self { id: entry.id().to_owned(), run_id: entry.run_id, ..Self::default() };
        let mut allowance = Allowance::of_side_image();
        while let Some(item) = reader.next_bytes()? {
            let taken = image.take(item, &mut allowance);
            taken.map_err(|(at, fault)| reader.bad_byte(at, fault))?;
        }
        Ok(Some(image))
    }

    /// The [id](Self::id) alone: all the rest may be long.
    ///
    /// # Errors
    /// What is wrong with the file's head.
    pub fn read_id(dir: &ImageDir) -> Result<Option<String>, ImageError> {
        Ok(Self::open(dir)?.map(|(entry, _)| entry.id().to_owned()))
    }

    fn open(dir: &ImageDir) -> Result<Option<(Soccr_dump_entry, Reader)>, ImageError> {
        let Some(mut reader) = Reader::open_if_there(dir, NAME, Magic::SoccrDump)? else { return Ok(None) };
        let entry: Soccr_dump_entry = reader.required()?;
        if entry.version() != VERSION {
            let fault = Fault::value("version", format!("{} is not known", entry.version()));
            return Err(reader.bad_message(fault));
        }
        Ok(Some((entry, reader)))
    }

    fn items(&self) -> impl Iterator<Item = Soccr_item> {
        let accepted = self.accepted.iter().map(|accepted| Soccr_item {
            accepted: MessageField::some(to_accepted(accepted)),
            ..Default::default()
        });
        let listeners = self.listeners.iter().map(|listener| Soccr_item {
            listener: MessageField::some(to_listener(listener)),
            ..Default::default()
        });
        accepted.chain(held_items(self.held.iter().chain(self.held.newcomers()))).chain(listeners)
    }

    /// What a later version has written is passed over.
    fn take(&mut self, item: &[u8], allowance: &mut Allowance) -> Result<(), (usize, Fault)> {
        let (length, at_start) = (4 + item.len(), |fault| (0, fault));
        match many(item).map_err(|e| (e.0, Fault::Wire))? {
            Some((SOCKET, message)) => self.sockets.take(message, length, allowance).map_err(at_start),
            Some((_, message)) => self.translations.take(message, length, allowance).map_err(at_start),
            None => self.take_message(&decode(item)?, length, allowance).map_err(at_start),
        }
    }

    fn take_message(
        &mut self,
        item: &Soccr_item,
        length: usize,
        allowance: &mut Allowance,
    ) -> Result<(), Fault> {
        if let Some(entry) = item.accepted.as_ref() {
            allowance.take(in_vector::<Accepted>(), length)?;
            self.accepted.push(from_accepted(entry)?);
        }
        if let Some(entry) = item.listener.as_ref() {
            allowance.take(in_vector::<TreeListener>(), length)?;
            let listener = Listener { local: from_endpoint(&entry.local, "local")?, v6only: entry.v6only() };
            let place = match entry.place() {
                0 => Place::Inside,
                1 => Place::BesideCriu,
                2 => Place::OnPath,
                other => return Err(Fault::value("place", format!("{other} is not known"))),
            };
            self.listeners.push(TreeListener { listener, place });
        }
        if let Some((tuple, segment)) = held_in(item)? {
            self.held.add_any(tuple, segment);
        }
        Ok(())
    }
}

const SOCKET: u32 = 2;

/// The number and the message of a socket or translation, of which there is one for each connection: such items are not
/// decoded.
fn many(item: &[u8]) -> Result<Option<(u32, &[u8])>, NotAField> {
    let mut found = None;
    for field in wire::fields(item) {
        let field = field?;
        if let (number @ (SOCKET | TRANSLATION), Value::Bytes(bytes)) = (field.number, field.value) {
            found = Some((number, bytes));
        }
    }
    Ok(found)
}

fn push(image: &mut Vec<u8>, number: u32, message: &[u8]) {
    let mut item = Vec::with_capacity(message.len() + 8);
    wire::put_bytes(&mut item, number, message);
    let length = u32::try_from(item.len()).expect("a message that was decoded, or made here");
    image.extend_from_slice(&length.to_le_bytes());
    image.extend_from_slice(&item);
}

/// Held packets as the image has them, and those of newcomers, for another process of this host.
#[must_use]
pub fn held_to_bytes(held: &HeldPackets) -> Vec<u8> {
    let mut bytes = Vec::new();
    for item in held_items(held.iter().chain(held.newcomers())) {
        push_message(&mut bytes, &item).expect("segments are short");
    }
    bytes
}

/// What [`held_to_bytes`] gave, as far as it is whole.
#[must_use]
pub fn held_from_bytes(mut bytes: &[u8]) -> HeldPackets {
    let mut held = HeldPackets::default();
    while let Some((len, rest)) = bytes.split_first_chunk::<4>()
        && let Ok(len) = usize::try_from(u32::from_le_bytes(*len))
        && let Some((message, rest)) = rest.split_at_checked(len)
        && let Ok(item) = decode::<Soccr_item>(message)
        && let Ok(Some((tuple, segment))) = held_in(&item)
    {
        held.add_any(tuple, segment);
        bytes = rest;
    }
    held
}

fn held_items<'a>(held: impl Iterator<Item = (FourTuple, &'a [u8])>) -> impl Iterator<Item = Soccr_item> {
    held.map(|(tuple, segment)| Soccr_item {
        held: MessageField::some(to_held(&tuple, segment)),
        ..Default::default()
    })
}

fn held_in(item: &Soccr_item) -> Result<Option<(FourTuple, &[u8])>, Fault> {
    let Some(entry) = item.held.as_ref() else { return Ok(None) };
    let local = from_endpoint(&entry.local, "local")?;
    let remote = from_endpoint(&entry.remote, "remote")?;
    Ok(Some((FourTuple { local, remote }, entry.segment())))
}

fn to_listener(TreeListener { listener, place }: &TreeListener) -> Soccr_listener {
    Soccr_listener {
        local: MessageField::some(to_endpoint(listener.local)),
        v6only: Some(listener.v6only),
        place: Some(*place as u32),
        ..Default::default()
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

fn to_held(tuple: &FourTuple, segment: &[u8]) -> Soccr_held {
    Soccr_held {
        local: MessageField::some(to_endpoint(tuple.local)),
        remote: MessageField::some(to_endpoint(tuple.remote)),
        segment: Some(segment.to_vec()),
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
    use std::time::Duration;

    use super::*;
    use crate::criu::tasks::Owner;
    use crate::criu::warm::{CongestionWindow, Silence};
    use crate::kernel::options::SocketOption;

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
        let mut sockets = Sockets::default();
        let option = SocketOption { level: libc::SOL_TCP, name: libc::TCP_LINGER2, value: vec![7, 0, 0, 0] };
        let extra = SocketExtra {
            owner: Owner { uid: 1000, gid: 0 },
            options: vec![option],
            rtt: Some(Duration::from_micros(80_001)),
            usec_ts: true,
            cwnd: Some(CongestionWindow {
                segments: 345,
                silence: Some(Silence {
                    since: Duration::from_secs(1 << 31),
                    rto: Duration::from_millis(250),
                }),
            }),
        };
        sockets.add(8, &SocketExtra::default());
        sockets.add(7, &extra);
        let listener = |local: &str, v6only| Listener { local: local.parse().unwrap(), v6only };
        let listeners = vec![
            TreeListener { listener: listener("0.0.0.0:80", false), place: Place::BesideCriu },
            TreeListener { listener: listener("[fd00::1]:81", true), place: Place::Inside },
            TreeListener { listener: listener("10.9.0.2:82", true), place: Place::OnPath },
        ];
        let image = SideImage {
            id: "soccr-0123456789ab".into(),
            run_id: None,
            translations: [v4, v6].into_iter().collect(),
            sockets,
            accepted: vec![Accepted {
                listener: 7,
                ino: 8,
                tuple: v4.reply.tuple(),
                state: State::CloseWait,
            }],
            held: held(),
            listeners,
        };
        image.write(&dir).unwrap();
        assert_eq!(held_from_bytes(&held_to_bytes(&image.held)), image.held);
        let read = SideImage::read(&dir).unwrap().unwrap();
        assert_eq!(read.translations.iter().collect::<Vec<_>>(), [v4, v6]);
        assert_eq!(read.accepted, image.accepted);
        assert_eq!(read.held, image.held);
        assert_eq!(read.listeners, image.listeners);
        assert_eq!(read.sockets.get(7).unwrap(), Some(extra));
        assert_eq!(read.sockets.get(8).unwrap(), Some(SocketExtra::default()));
        assert_eq!(read.sockets.get(9).unwrap(), None);
    }

    #[test]
    fn no_connection_waits_for_an_impossible_peer() {
        let tuple = direction("10.9.0.1:1", "10.9.0.2:0").tuple();
        let accepted = Accepted { listener: 7, ino: 8, tuple, state: State::Established };
        assert!(from_accepted(&to_accepted(&accepted)).is_err());
        assert!(from_accepted(&Soccr_accepted::default()).is_err());
    }

    /// An option that no socket is given, an inode that stands twice, none at all.
    #[test]
    fn a_socket_is_one_and_has_options_of_sockets() {
        let mut sockets = Sockets::default();
        let option = SocketOption { level: libc::SOL_TCP, name: libc::TCP_REPAIR, value: vec![1, 0, 0, 0] };
        sockets.add(7, &SocketExtra { options: vec![option], ..SocketExtra::default() });
        assert!(sockets.get(7).is_err());
        let mut allowance = Allowance::of_side_image();
        let mut take = |message: &[u8]| sockets.take(message, 100, &mut allowance);
        assert!(take(&[0x08, 0x08]).is_ok());
        assert!(take(&[0x08, 0x08]).is_err());
        assert!(take(&[0x10, 0x08]).is_err());
    }

    fn held() -> HeldPackets {
        let mut held = HeldPackets::default();
        let tuple =
            |local: &str| FourTuple { local: local.parse().unwrap(), remote: "10.9.0.1:1".parse().unwrap() };
        let mut segment = vec![0x50; 30];
        held.add(tuple("10.9.0.2:80"), &segment);
        segment[7] += 10;
        held.add(tuple("10.9.0.2:80"), &segment);
        held.add(tuple("[::ffff:10.9.0.2]:81"), &segment);
        assert_eq!(held.len(), 3);
        held
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
