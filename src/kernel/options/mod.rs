//! Socket options that a program may have set.
//!
//! [`TABLE`] says of each what becomes of it. What a program has never set is the default of the kernel that it runs on,
//! here and at the target: so only values that differ from those of a fresh socket in the same network namespace travel.

mod fidelity;
mod table;

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::netns::{NetNs, NetNsError};
use super::{SysError, SysResult, sockopt};
pub use fidelity::fidelity;
pub use table::{Care, Known, Level, On, TABLE, When, find};

/// A socket option with the value that `setsockopt()` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP` and so on.
    pub level: i32,
    /// The option's number.
    pub name: i32,
    /// The value's bytes, in host order.
    pub value: Vec<u8>,
}

/// Who else carries options of the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// CRIU, in its own images.
    Criu,
    /// Nobody.
    Nobody,
}

/// Reads what programs have set on the sockets of one network namespace.
#[derive(Debug)]
pub struct Reader {
    ipv4: Vec<Fresh>,
    ipv6: Vec<Fresh>,
    value: Box<[u8]>,
}

/// An option that sockets of a family have, and what a fresh one shows.
#[derive(Debug)]
struct Fresh {
    known: &'static Known,
    value: Box<[u8]>,
}

/// The longest value: a classic BPF filter of 4096 instructions.
const LONGEST: usize = 8 << 12;

impl Reader {
    /// Looks at fresh sockets of the namespace, one of each family that it has.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn new(ns: &NetNs, beside: Beside) -> Result<Self, NetNsError> {
        let mut value = vec![0; LONGEST].into_boxed_slice();
        let mut of = |ipv6| match sockopt::tcp_socket(ipv6) {
            Ok(socket) => fresh(socket.as_fd(), beside, ipv6, &mut value),
            Err(_) => Vec::new(), // no socket of this family will come
        };
        let (ipv4, ipv6) = ns.run(|| (of(false), of(true)))?;
        Ok(Self { ipv4, ipv6, value })
    }

    /// What a program has set on a socket, in the order to set it. `connected`: whether it has a peer.
    ///
    /// # Errors
    /// The kernel's answer, and to the question for which option: ENOTSOCK for what is no socket; EACCES for a filter that
    /// nobody can read ([`refused`]).
    pub fn read(&mut self, socket: BorrowedFd<'_>, connected: bool) -> SysResult<Vec<SocketOption>> {
        let of_family = if sockopt::domain(socket)? == libc::AF_INET6 { &self.ipv6 } else { &self.ipv4 };
        let mut options = Vec::new();
        for Fresh { known, value } in of_family {
            if connected && matches!(known.care, Care::Carried(_, On::Unconnected)) {
                continue;
            }
            let now = match get(socket, known, &mut self.value) {
                Err(error) if is_absent(error) => continue, // in this state
                Err(SysError { errno, .. }) => return Err(SysError { call: known.get, errno }),
                Ok(now) => now,
            };
            if known.care == Care::Buffer || now != &**value {
                let (level, name, value) = (known.level.number(), known.name, now.to_vec());
                options.push(SocketOption { level, name, value });
            }
        }
        Ok(options)
    }
}

fn fresh(socket: BorrowedFd<'_>, beside: Beside, ipv6: bool, value: &mut [u8]) -> Vec<Fresh> {
    let travels = |known: &&Known| match known.care {
        Care::Carried(_, On::AnyButIpv4) => ipv6 || beside == Beside::Nobody,
        Care::Carried(..) => true,
        Care::ByCriu(_) | Care::Buffer => beside == Beside::Nobody,
        _ => false,
    };
    let default = |known| match get(socket, known, value) {
        Ok(value) => Some(Fresh { known, value: (*value).into() }),
        Err(error) if is_absent(error) => None,
        Err(_) => Some(Fresh { known, value: Box::default() }), // whoever has the option tells
    };
    TABLE.iter().filter(travels).filter_map(default).collect()
}

/// Whether the kernel does not have the option, or not for such a socket.
fn is_absent(error: SysError) -> bool {
    use Errno::{EINVAL, ENOPROTOOPT, ENOTCONN, EOPNOTSUPP, EPERM};
    matches!(error.errno, ENOPROTOOPT | EOPNOTSUPP | EINVAL | ENOTCONN | EPERM)
}

fn get<'v>(socket: BorrowedFd<'_>, known: &Known, value: &'v mut [u8]) -> SysResult<&'v [u8]> {
    let len = if known.is_filter() {
        sockopt::filter(socket, value)?
    } else {
        sockopt::get_into(socket, known.level.number(), known.name, value)?
    };
    Ok(&value[..len])
}

/// Why a socket cannot be carried; `None` for one that can.
///
/// # Errors
/// The kernel's answer.
pub fn refused(socket: BorrowedFd<'_>) -> SysResult<Option<&'static str>> {
    match sockopt::filter(socket, &mut []) {
        Err(SysError { errno: Errno::EACCES, .. }) => Ok(Some(EBPF)),
        other => other.map(|_| None),
    }
}

const EBPF: &str = "its filter is an eBPF program (SO_ATTACH_BPF), which cannot be read back from the kernel: \
    have it removed (SO_DETACH_FILTER) before the dump, or use a classic one";

/// Refuses options that no socket is given: they come out of an image.
///
/// # Errors
/// EINVAL.
pub fn check(options: &[SocketOption]) -> SysResult<()> {
    let known =
        |option: &SocketOption| find(option.level, option.name).is_some_and(|known| known.when().is_some());
    if options.iter().all(known) {
        return Ok(());
    }
    Err(SysError { call: "set an option of the image that is not carried", errno: Errno::EINVAL })
}

/// Sets those options that are set at this time. What a socket is reached by must be as it was; of the others each that
/// cannot be set is given to `lost`.
///
/// # Errors
/// The kernel's answer; EINVAL for an option that no socket is given.
pub fn write(
    socket: BorrowedFd<'_>,
    options: &[SocketOption],
    when: When,
    mut lost: impl FnMut(SysError),
) -> SysResult<()> {
    check(options)?;
    for option in options {
        let Some(known) = find(option.level, option.name).filter(|known| known.when() == Some(when)) else {
            continue;
        };
        match set(socket, known, &option.value) {
            Err(error) if when == When::Early => return Err(error),
            Err(error) => lost(error),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn set(socket: BorrowedFd<'_>, known: &Known, value: &[u8]) -> SysResult<()> {
    let number = || value.try_into().map_or(0, i32::from_ne_bytes);
    match (known.level, known.name) {
        (Level::Socket, libc::SO_SNDBUF) => sockopt::set_buffer_size(socket, sockopt::Buffer::Send, number()),
        (Level::Socket, libc::SO_RCVBUF) => {
            sockopt::set_buffer_size(socket, sockopt::Buffer::Receive, number())
        }
        (Level::Socket, libc::SO_ATTACH_FILTER) => sockopt::attach_filter(socket, value),
        // It sets the priority, too, which a program may have changed after that.
        (Level::Ip, libc::IP_TOS) => {
            let priority = sockopt::priority(socket)?;
            sockopt::set_slice(socket, libc::SOL_IP, libc::IP_TOS, value, known.set)?;
            sockopt::set_priority(socket, priority)
        }
        (level, name) => sockopt::set_slice(socket, level.number(), name, value, known.set),
    }
}

/// What the options say of SO_REUSEADDR, which the end of repair mode clears.
#[must_use]
pub fn reuse_addr(options: &[SocketOption]) -> bool {
    let reuse_addr =
        |option: &&SocketOption| (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    options.iter().find(reuse_addr).is_some_and(|option| option.value.first() == Some(&1))
}
