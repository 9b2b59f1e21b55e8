//! Socket options that a program may have set, for sockets that nobody else makes anew.
//!
//! CRIU carries the options of the sockets in its own images; this list is for those that it hands over whole.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::{SysError, sockopt};

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

/// What is read and set, in the order to set it: a buffer's size before who fixed it.
const CARRIED: &[(i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_PRIORITY),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL),
    (libc::SOL_SOCKET, libc::SO_INCOMING_CPU),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (libc::SOL_TCP, libc::TCP_NODELAY),
    (libc::SOL_TCP, libc::TCP_CORK),
    (libc::SOL_TCP, libc::TCP_KEEPIDLE),
    (libc::SOL_TCP, libc::TCP_KEEPINTVL),
    (libc::SOL_TCP, libc::TCP_KEEPCNT),
    (libc::SOL_TCP, libc::TCP_SYNCNT),
    (libc::SOL_TCP, libc::TCP_LINGER2),
    (libc::SOL_TCP, libc::TCP_USER_TIMEOUT),
    (libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::SOL_TCP, libc::TCP_CONGESTION),
    (libc::SOL_IP, libc::IP_TOS),
    (libc::SOL_IP, libc::IP_TTL),
    (libc::SOL_IP, libc::IP_MTU_DISCOVER),
    (libc::SOL_IP, libc::IP_FREEBIND),
    (libc::SOL_IP, libc::IP_TRANSPARENT),
    (libc::SOL_IPV6, libc::IPV6_V6ONLY),
    (libc::SOL_IPV6, libc::IPV6_TCLASS),
    (libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER),
];

/// Reads the options that this kernel and this socket have, and the buffers' sizes.
#[must_use]
pub fn read(socket: BorrowedFd<'_>) -> Vec<SocketOption> {
    let read = |&(level, name): &(i32, i32)| {
        sockopt::get_bytes(socket, level, name).ok().map(|value| SocketOption { level, name, value })
    };
    let mut options: Vec<SocketOption> = CARRIED.iter().filter_map(read).collect();
    for (buffer, name) in BUFFERS {
        if let Ok(size) = sockopt::buffer_size(socket, buffer) {
            let value = size.to_ne_bytes().to_vec();
            options.push(SocketOption { level: libc::SOL_SOCKET, name, value });
        }
    }
    if let Ok(locks) = sockopt::buffer_locks(socket) {
        let value = locks.to_ne_bytes().to_vec();
        options.push(SocketOption { level: libc::SOL_SOCKET, name: sockopt::SO_BUF_LOCK, value });
    }
    options
}

const BUFFERS: [(sockopt::Buffer, i32); 2] =
    [(sockopt::Buffer::Send, libc::SO_SNDBUF), (sockopt::Buffer::Receive, libc::SO_RCVBUF)];

/// Sets options on a fresh socket. Options that are not in the list of those carried are refused, since they come out of
/// an image.
///
/// # Errors
/// The kernel's answer, for an option that it holds otherwise than saved; EINVAL for an option that is not carried.
pub fn write(socket: BorrowedFd<'_>, options: &[SocketOption]) -> Result<(), SysError> {
    for option in options {
        if let Some((buffer, _)) = BUFFERS.iter().find(|(_, name)| is(option, *name)) {
            sockopt::set_buffer_size(socket, *buffer, number(option))?;
        } else if is(option, sockopt::SO_BUF_LOCK) {
            sockopt::set_buffer_locks(socket, number(option).cast_unsigned())?;
        } else if !CARRIED.contains(&(option.level, option.name)) {
            let call = "set an option of the image that is not carried";
            return Err(SysError { call, errno: Errno::EINVAL });
        } else if sockopt::get_bytes(socket, option.level, option.name).as_ref() != Ok(&option.value) {
            sockopt::set_bytes(socket, option.level, option.name, &option.value)?;
        }
    }
    Ok(())
}

fn is(option: &SocketOption, name: i32) -> bool {
    option.level == libc::SOL_SOCKET && option.name == name
}

fn number(option: &SocketOption) -> i32 {
    option.value.as_slice().try_into().map_or(0, i32::from_ne_bytes)
}

/// What the options say of SO_REUSEADDR, which the end of repair mode clears.
#[must_use]
pub fn reuse_addr(options: &[SocketOption]) -> bool {
    options.iter().find(|option| is(option, libc::SO_REUSEADDR)).is_some_and(|option| number(option) == 1)
}
