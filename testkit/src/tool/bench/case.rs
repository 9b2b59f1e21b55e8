//! What is measured: cases, and who is measured in each.

use std::fmt;

use soccr_testkit::{Lock, Place, Side};

/// Who carries the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// Nobody: `--tcp-close` without a plugin. What CRIU itself costs; the connections are lost.
    Floor,
    /// CRIU, with this lock.
    Stock(Lock),
    /// The plugin, locked and holding.
    Ours,
}

/// Where the images are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In memory.
    Tmpfs,
    /// Where `target/` is.
    Disk,
}

/// Connections of one server, as they are when it is dumped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub connections: usize,
    /// Bytes that wait in each receive queue.
    pub queued: usize,
    /// Processes that share the listener.
    pub processes: usize,
    pub place: Place,
    pub storage: Storage,
    /// CRIU logs at `-v4`, as runtimes have it, and not at `-v2`.
    pub verbose: bool,
}

/// A case, who is measured in it in turns, and how often.
#[derive(Clone, Debug)]
pub struct Series<C> {
    pub case: C,
    pub parties: Vec<Party>,
    /// Times the number of rounds that is asked for: some take a minute.
    pub rounds: Rounds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounds {
    AsAsked,
    Once,
}

const IPTABLES: Party = Party::Stock(Lock::Iptables);
const NFTABLES: Party = Party::Stock(Lock::Nftables);
pub const SKIP: Party = Party::Stock(Lock::Skip);

/// Queue bytes of the largest case, in all.
pub const GIB: usize = 1 << 30;

const fn empty(connections: usize) -> Case {
    let (place, storage) = (Place::Host, Storage::Tmpfs);
    Case { connections, queued: 0, processes: 1, place, storage, verbose: false }
}

/// Processes of the largest case.
pub const PARTS: usize = 4;

/// Everything, with so many connections in the largest case.
pub fn all(most: usize) -> Vec<Series<Case>> {
    let mut all = Vec::new();
    for connections in [1, 100, 1000, 10_000] {
        all.push(compared(empty(connections)));
    }
    for connections in [1000, 10_000] {
        let case = empty(connections);
        all.push(compared(Case { verbose: true, ..case }));
        all.push(compared(Case { place: Place::External, ..case }));
        all.push(compared(Case { storage: Storage::Disk, ..case }));
        for queued in [1 << 10, 64 << 10] {
            all.push(compared(Case { queued, ..case }));
        }
    }
    all.push(compared(Case { queued: GIB / 1024, ..empty(1024) }));
    // Stock has a descriptor open for each connection of all tasks, which is too many here.
    let largest = Case { processes: PARTS, ..empty(most) };
    all.push(Series { case: largest, parties: vec![Party::Floor, Party::Ours], rounds: Rounds::AsAsked });
    all.push(Series {
        case: empty(100),
        parties: vec![IPTABLES, NFTABLES, Party::Ours],
        rounds: Rounds::AsAsked,
    });
    all.push(Series { case: empty(450), parties: vec![NFTABLES, Party::Ours], rounds: Rounds::AsAsked });
    all.push(Series { case: empty(1000), parties: vec![IPTABLES], rounds: Rounds::Once });
    all
}

/// What tells that all of it works: some seconds. What has no limit is tried once.
pub fn smoke() -> Vec<Series<Case>> {
    let others = [
        Case { verbose: true, ..empty(1000) },
        Case { place: Place::External, ..empty(100) },
        Case { storage: Storage::Disk, queued: 64 << 10, ..empty(100) },
        Case { processes: 4, ..empty(1000) },
    ];
    let mut all = [100, 1000].map(|connections| compared(empty(connections))).to_vec();
    all.extend(others.map(|case| Series { rounds: Rounds::Once, ..compared(case) }));
    all.push(Series { case: empty(100), parties: vec![NFTABLES], rounds: Rounds::Once });
    all
}

fn compared(case: Case) -> Series<Case> {
    Series { case, parties: vec![Party::Floor, SKIP, Party::Ours], rounds: Rounds::AsAsked }
}

impl Party {
    pub fn side(self) -> Side {
        match self {
            Self::Stock(lock) => Side::Stock(lock),
            Self::Floor | Self::Ours => Side::Plugin(Lock::Nftables),
        }
    }

    /// Whether the connections are alive after a restore.
    pub fn carries(self) -> bool {
        self != Self::Floor
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Floor => f.write_str("floor"),
            Self::Stock(lock) => write!(f, "stock {}", lock.name()),
            Self::Ours => f.write_str("ours"),
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Tmpfs { "tmpfs" } else { "disk" })
    }
}

/// The words of `--only`.
impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.place == Place::Host { "host" } else { "elsewhere" };
        let verbosity = if self.verbose { "v4" } else { "v2" };
        write!(f, "{} {place} {} {} {verbosity}", self.connections, self.storage, Bytes(self.queued))?;
        if self.processes > 1 {
            write!(f, " {}-processes", self.processes)?;
        }
        Ok(())
    }
}

pub struct Bytes(pub usize);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("empty"),
            bytes if bytes.is_multiple_of(1 << 20) => write!(f, "{}MiB", bytes >> 20),
            bytes => write!(f, "{}KiB", bytes >> 10),
        }
    }
}
