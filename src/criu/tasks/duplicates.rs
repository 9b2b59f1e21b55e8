//! Our duplicates of the tasks' sockets: all tasks together can have more than one process may have open, so those beyond the
//! bound are parked, and opened again some at a time.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit};

use crate::criu::parallel;
use crate::kernel::SysResult;
use crate::kernel::parked::Parked;

/// What else is open: tasks, namespaces, netlink.
const OTHERS: usize = 512;

/// Sockets that stay open until this is dropped.
#[derive(Debug)]
pub struct Duplicates {
    chunks: Vec<Chunk>,
    /// So many of the chunks, from the first on, are parked.
    parked: usize,
    limit: usize,
}

/// The place of a socket among the [`Duplicates`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

#[derive(Debug)]
enum Chunk {
    Open(Vec<OwnedFd>),
    Parked(Parked),
}

/// What was parked and is open for a moment.
#[derive(Debug, Default)]
pub struct Opened {
    chunk: Option<usize>,
    sockets: Vec<OwnedFd>,
}

impl Default for Duplicates {
    fn default() -> Self {
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        Self::within(usize::try_from(limit).unwrap_or(usize::MAX))
    }
}

impl Duplicates {
    /// None yet, in a process that may have so many descriptors.
    fn within(limit: usize) -> Self {
        Self { chunks: Vec::new(), parked: 0, limit }
    }

    /// One more.
    ///
    /// # Errors
    /// As [`Parked::park`].
    pub fn add(&mut self, socket: OwnedFd) -> SysResult<Slot> {
        match self.chunks.last_mut() {
            Some(Chunk::Open(last)) if last.len() < Parked::MOST => last.push(socket),
            _ => {
                self.leave_room(self.limit / 4)?;
                self.chunks.push(Chunk::Open(vec![socket]));
            }
        }
        let Some(Chunk::Open(last)) = self.chunks.last() else { unreachable!("it was added to") };
        Ok(Slot((self.chunks.len() - 1) * Parked::MOST + last.len() - 1))
    }

    /// Parks until so many more descriptors can be open, besides the few that everybody has.
    ///
    /// # Errors
    /// As [`Parked::park`].
    pub fn leave_room(&mut self, descriptors: usize) -> SysResult<()> {
        // Each thread may have opened a chunk.
        let others = OTHERS + parallel::threads() * Parked::MOST;
        let open = self.limit.saturating_sub(descriptors + others) / Parked::MOST;
        while self.chunks.len() - self.parked > open {
            let chunk = &mut self.chunks[self.parked];
            if let Chunk::Open(sockets) = chunk {
                *chunk = Chunk::Parked(Parked::park(sockets)?);
            }
            self.parked += 1;
        }
        Ok(())
    }

    /// One of them, and where that is parked its neighbours: those who go from one to the next open each once.
    ///
    /// # Errors
    /// As [`Parked::open`].
    ///
    /// # Panics
    /// Where the slot is another's.
    pub fn get<'a>(&'a self, Slot(slot): Slot, opened: &'a mut Opened) -> SysResult<BorrowedFd<'a>> {
        let (chunk, place) = (slot / Parked::MOST, slot % Parked::MOST);
        match &self.chunks[chunk] {
            Chunk::Open(sockets) => Ok(sockets[place].as_fd()),
            Chunk::Parked(parked) => {
                if opened.chunk != Some(chunk) {
                    *opened = Opened::default();
                    *opened = Opened { sockets: parked.open()?, chunk: Some(chunk) };
                }
                Ok(opened.sockets[place].as_fd())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn more_than_may_be_open_are_there_in_their_order() {
        const COUNT: usize = 2000;
        let mut duplicates = Duplicates::within(1500);
        let before = open();
        let added = (0..COUNT).map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let port = socket.local_addr().unwrap().port();
            (duplicates.add(socket.into()).unwrap(), port)
        });
        let added: Vec<(Slot, u16)> = added.collect();
        assert!(open() - before <= 1500, "{}", open() - before);
        let mut opened = Opened::default();
        for (slot, port) in added.iter().chain(added.iter().rev()) {
            let socket = duplicates.get(*slot, &mut opened).unwrap();
            assert_eq!(crate::kernel::addr::local(socket).unwrap().port(), *port);
        }
        duplicates.leave_room(1500).unwrap();
        drop(opened);
        assert!(open() - before <= COUNT.div_ceil(Parked::MOST), "{}", open() - before);
        drop(duplicates);
        assert_eq!(open(), before);
        for (_, port) in added {
            UdpSocket::bind(("127.0.0.1", port)).expect("it is closed");
        }
    }

    fn open() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }
}
