//! What CRIU's images do not tell of sockets.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::time::Duration;

use protobuf::Message;

use crate::criu::image::allowance::{Allowance, in_tree};
use crate::criu::image::{Fault, ImageError};
use crate::criu::tasks::Owner;
use crate::criu::warm::CongestionWindow;
use crate::encoding::decode::decode;
use crate::encoding::proto::soccr::Soccr_socket;
use crate::encoding::wire::{self, Value};
use crate::kernel::options::{self, SocketOption};

/// What a socket has beside its entry in CRIU's images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketExtra {
    /// Who owns it, by the task's numbers; CRIU makes all of them root's.
    pub owner: Owner,
    /// Options that are not the kernel's default, in the order to set them.
    pub options: Vec<SocketOption>,
    /// The smoothed round trip time of a connection with ECN: only that is opened by SYN segments, which measure it anew.
    pub rtt: Option<Duration>,
    /// The clock of its timestamps ticks in microseconds.
    pub usec_ts: bool,
    /// Its congestion window, where that is worth carrying.
    pub cwnd: Option<CongestionWindow>,
}

/// Those of all sockets, by inode: messages that are decoded one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    messages: Vec<u8>,
    places: BTreeMap<u32, Range<u32>>,
}

impl SocketExtra {
    /// Whether CRIU's images tell all.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    fn to_message(&self, ino: u32) -> Soccr_socket {
        let some = |id: u32| Some(id).filter(|id| *id != 0);
        let options = self.options.iter().map(SocketOption::to_entry).collect();
        let (uid, gid) = (some(self.owner.uid), some(self.owner.gid));
        let rtt_us = self.rtt.and_then(|rtt| u32::try_from(rtt.as_micros()).ok());
        let usec_ts = self.usec_ts.then_some(true);
        let mut message =
            Soccr_socket { ino: Some(ino), uid, gid, options, rtt_us, usec_ts, ..Default::default() };
        if let Some(cwnd) = &self.cwnd {
            cwnd.write_to(&mut message);
        }
        message
    }
}

impl Sockets {
    /// What there is of the socket with this inode.
    ///
    /// # Errors
    /// What is wrong with its item, and with the options in it.
    pub fn get(&self, ino: u32) -> Result<Option<SocketExtra>, ImageError> {
        let Some(place) = self.places.get(&ino) else { return Ok(None) };
        let malformed = |fault: Fault| {
            let fault = Fault::value("socket", format!("of inode {ino}: {fault}"));
            ImageError::malformed(super::NAME, 0, fault)
        };
        let message: Soccr_socket = decode(&self.messages[place.start as usize..place.end as usize])
            .map_err(|(_, fault)| malformed(fault))?;
        let owner = Owner { uid: message.uid(), gid: message.gid() };
        let rtt = message.rtt_us.map(|microseconds| Duration::from_micros(microseconds.into()));
        let usec_ts = message.usec_ts();
        let cwnd = CongestionWindow::of(&message);
        let options: Vec<_> = message.options.into_iter().map(SocketOption::from_entry).collect();
        options::check(&options).map_err(|error| malformed(Fault::value("options", error.to_string())))?;
        Ok(Some(SocketExtra { owner, options, rtt, usec_ts, cwnd }))
    }

    /// Whether there is anything of the socket with this inode.
    #[must_use]
    pub fn contains(&self, ino: u32) -> bool {
        self.places.contains_key(&ino)
    }

    /// The inodes of all.
    pub fn inodes(&self) -> impl Iterator<Item = u32> {
        self.places.keys().copied()
    }

    /// Adds one more socket; of the first with its inode all stays as it is.
    pub fn add(&mut self, ino: u32, extra: &SocketExtra) {
        let message = extra.to_message(ino).write_to_bytes().expect("all required fields are there");
        self.put(ino, &message).expect("as many as sockets, and short");
    }

    /// Adds what was read; it takes so much memory as `allowance` gives.
    pub(super) fn take(
        &mut self,
        message: &[u8],
        length: usize,
        allowance: &mut Allowance,
    ) -> Result<(), Fault> {
        allowance.take(in_tree::<(u32, Range<u32>)>() + 2 * message.len(), length)?;
        self.put(ino_of(message)?, message)
    }

    fn put(&mut self, ino: u32, message: &[u8]) -> Result<(), Fault> {
        let Entry::Vacant(place) = self.places.entry(ino) else {
            return Err(Fault::value("ino", format!("{ino} stands here twice")));
        };
        let too_many = |_| Fault::value("socket", "they take 4 GiB");
        let start = u32::try_from(self.messages.len()).map_err(too_many)?;
        let end = u32::try_from(self.messages.len() + message.len()).map_err(too_many)?;
        place.insert(start..end);
        self.messages.extend_from_slice(message);
        Ok(())
    }

    /// The messages, in the order in which they came.
    pub(super) fn messages(&self) -> impl Iterator<Item = &[u8]> {
        let mut places: Vec<&Range<u32>> = self.places.values().collect();
        places.sort_unstable_by_key(|place| place.start);
        places.into_iter().map(|place| &self.messages[place.start as usize..place.end as usize])
    }
}

fn ino_of(message: &[u8]) -> Result<u32, Fault> {
    const INO: u32 = 1;
    let mut ino = None;
    for field in wire::fields(message) {
        let field = field.map_err(|_| Fault::Wire)?;
        if let (INO, Value::Varint(value)) = (field.number, field.value) {
            ino = u32::try_from(value).ok();
        }
    }
    ino.ok_or_else(|| Fault::value("ino", "is missing"))
}
