//! Connections by file id, in little memory.

use std::fmt;

use crate::connection::{FourTuple, State};

/// A TCP socket that has a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InetConnection {
    /// CRIU's id of the file, by which descriptors refer to it.
    pub file_id: u32,
    /// The socket's inode number, which names its tcp-stream image.
    pub ino: u32,
    /// Both ends. The image has no scope id of a link-local address: it is 0 here, and comes from
    /// [`ifname`](Self::ifname) when the interface is known.
    pub tuple: FourTuple,
    /// The state.
    pub state: State,
    /// The network namespace; `None` in old images, which had one only.
    pub net_ns_id: Option<u32>,
    /// The interface of a link-local local address.
    pub ifname: Option<Box<str>>,
    /// The interface that the socket is bound to (`SO_BINDTODEVICE`).
    pub bound_device: Option<Box<str>>,
    /// Whether the reading side is shut: by the program, or by the peer's FIN.
    pub shutdown_read: bool,
    /// Whether the writing side is shut.
    pub shutdown_write: bool,
    /// `SO_REUSEADDR`; repair mode itself disturbs it.
    pub reuseaddr: bool,
    /// `SO_REUSEPORT`; `None` in images that do not tell.
    pub reuseport: Option<bool>,
    /// Whether there is a tcp-stream image for it.
    pub has_stream: bool,
}

/// The connections of an image by their file ids.
///
/// A hash table would take twice what its entries take, and more while it grows. Here the entries stay where they were
/// put, in pieces, and an order of four bytes an entry finds them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Connections {
    pieces: Vec<Vec<InetConnection>>,
    /// Positions, by the file ids of what is there.
    order: Vec<u32>,
}

const PIECE: usize = 1024;

/// What one entry takes, in bytes.
pub(super) const ENTRY: usize = size_of::<InetConnection>() + size_of::<u32>();

impl Connections {
    /// The connections, in any order. Of those with the same file id each after the first is left out, and the id
    /// given to `twice`.
    pub(super) fn of(found: Found, mut twice: impl FnMut(u32)) -> Self {
        let Found { pieces, len } = found;
        let mut new = Self { pieces, order: (0..len).collect() };
        let Self { pieces, order } = &mut new;
        let id = |position: &u32| at(pieces, *position).file_id;
        order.sort_by_key(id);
        order.dedup_by(|later, first| {
            let same = id(later) == id(first);
            if same {
                twice(id(later));
            }
            same
        });
        new
    }

    /// The connection with this file id.
    #[must_use]
    pub fn get(&self, file_id: &u32) -> Option<&InetConnection> {
        let found = self.order.binary_search_by_key(file_id, |position| at(&self.pieces, *position).file_id);
        found.ok().map(|place| at(&self.pieces, self.order[place]))
    }

    /// File ids and connections, by ascending file id.
    pub fn iter(&self) -> impl Iterator<Item = (&u32, &InetConnection)> {
        self.values().map(|connection| (&connection.file_id, connection))
    }

    /// The connections, by ascending file id.
    pub fn values(&self) -> impl Iterator<Item = &InetConnection> {
        self.order.iter().map(|position| at(&self.pieces, *position))
    }

    /// The connections, in any order.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut InetConnection> {
        self.pieces.iter_mut().flatten()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

/// Connections as they are found.
#[derive(Default)]
pub(super) struct Found {
    pieces: Vec<Vec<InetConnection>>,
    len: u32,
}

impl Found {
    pub(super) fn push(&mut self, connection: InetConnection) {
        match self.pieces.last_mut() {
            Some(piece) if piece.len() < PIECE => piece.push(connection),
            _ => self.pieces.push(vec![connection]),
        }
        self.len += 1;
    }
}

fn at(pieces: &[Vec<InetConnection>], position: u32) -> &InetConnection {
    let position = position as usize;
    &pieces[position / PIECE][position % PIECE]
}
