//! Owners, as a task sees their numbers and as we do: its user namespace may be another one.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use nix::sys::stat::fstat;

use crate::kernel::{SysError, SysResult};

/// A user and a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl Owner {
    /// That of a socket, by our numbers.
    ///
    /// # Errors
    /// EBADF.
    pub fn of_socket(socket: BorrowedFd<'_>) -> SysResult<Self> {
        let stat = fstat(socket).map_err(|errno| SysError { call: "stat a socket", errno })?;
        Ok(Self { uid: stat.st_uid, gid: stat.st_gid })
    }
}

/// A task's user namespace: which numbers of ours its own are.
#[derive(Debug)]
pub struct OwnerMap {
    uids: Vec<Extent>,
    gids: Vec<Extent>,
}

/// So many numbers inside are consecutive ones outside.
#[derive(Clone, Copy, Debug)]
struct Extent {
    inside: u32,
    outside: u32,
    count: u32,
}

impl OwnerMap {
    /// That of the task with this pid.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self { uids: extents(pid, "uid_map")?, gids: extents(pid, "gid_map")? })
    }

    /// Who this is to the task; `None` for who it has no number for.
    #[must_use]
    pub fn inside(&self, owner: Owner) -> Option<Owner> {
        let turn = |Extent { inside, outside, count }| Extent { inside: outside, outside: inside, count };
        let look_up = |map: &[Extent], id| map.iter().copied().find_map(|extent| turn(extent).find(id));
        Some(Owner { uid: look_up(&self.uids, owner.uid)?, gid: look_up(&self.gids, owner.gid)? })
    }

    /// Who this is to us; `None` where the namespace has no such number.
    #[must_use]
    pub fn outside(&self, owner: Owner) -> Option<Owner> {
        let look_up = |map: &[Extent], id| map.iter().find_map(|extent| extent.find(id));
        Some(Owner { uid: look_up(&self.uids, owner.uid)?, gid: look_up(&self.gids, owner.gid)? })
    }
}

impl Extent {
    fn find(self, inside: u32) -> Option<u32> {
        let distance = inside.checked_sub(self.inside).filter(|distance| *distance < self.count)?;
        self.outside.checked_add(distance)
    }
}

fn extents(pid: i32, map: &str) -> io::Result<Vec<Extent>> {
    let text = fs::read_to_string(format!("/proc/{pid}/{map}"))?;
    Ok(text.lines().filter_map(extent).collect())
}

/// A line of "inside outside count".
fn extent(line: &str) -> Option<Extent> {
    let mut words = line.split_ascii_whitespace().map(|word| word.parse().ok());
    Some(Extent { inside: words.next()??, outside: words.next()??, count: words.next()?? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_in_and_out() {
        let lines = ["         0     100000       1000", "      1000       1000          1"];
        let extents: Vec<Extent> = lines.iter().filter_map(|line| extent(line)).collect();
        let map = OwnerMap { uids: extents.clone(), gids: extents };
        for (inside, outside) in [(0, 100_000), (999, 100_999), (1000, 1000)] {
            let [inside, outside] = [inside, outside].map(|id| Owner { uid: id, gid: 0 });
            let outside = Owner { gid: 100_000, ..outside };
            assert_eq!(map.outside(inside), Some(outside));
            assert_eq!(map.inside(outside), Some(inside));
        }
        assert_eq!(map.inside(Owner { uid: 0, gid: 100_000 }), None);
        assert_eq!(map.outside(Owner { uid: 1001, gid: 0 }), None);
    }

    #[test]
    fn ours_are_our_own() {
        let owner = Owner { uid: 7, gid: 8 };
        let map = OwnerMap::of(std::process::id().cast_signed()).unwrap();
        assert_eq!(map.inside(owner), map.outside(owner));
    }
}
