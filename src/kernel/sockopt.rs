//! Socket options of any socket, and the plumbing that the TCP options share.

use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{SysError, SysResult, check};

/// Plain kernel data: any bit pattern is a value, and there is no padding.
///
/// # Safety
/// The type is `repr(C)` or a primitive, without padding, and every bit pattern is valid.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: integers have no padding and no invalid patterns.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: arrays add no padding between integers.
unsafe impl<const N: usize> Plain for [u32; N] {}

fn length<T>() -> libc::socklen_t {
    const { assert!(size_of::<T>() < u32::MAX as usize) };
    #[allow(clippy::cast_possible_truncation)] // asserted above
    {
        size_of::<T>() as libc::socklen_t
    }
}

/// Reads an option whose value is exactly a `T`.
pub(super) fn get<T: Plain>(fd: BorrowedFd<'_>, level: i32, name: i32, call: &'static str) -> SysResult<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = length::<T>();
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`.
    let ret =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    check(call, ret)?;
    if len != length::<T>() {
        return Err(SysError { call, errno: Errno::EMSGSIZE });
    }
    // SAFETY: zeroed before, so initialised whatever the kernel wrote; `Plain` allows any pattern.
    Ok(unsafe { value.assume_init() })
}

/// Writes an option whose value is exactly a `T`.
pub(super) fn set<T: Plain>(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &T,
    call: &'static str,
) -> SysResult<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a live, padding-free `T`.
    let ret = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length::<T>())
    };
    check(call, ret).map(drop)
}

/// Writes an option whose value is an array of `T`s, maybe an empty one.
pub(super) fn set_slice<T: Plain>(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    values: &[T],
    call: &'static str,
) -> SysResult<()> {
    let len =
        libc::socklen_t::try_from(size_of_val(values)).map_err(|_| SysError { call, errno: Errno::E2BIG })?;
    // SAFETY: the kernel reads `len` bytes, the size of the live slice of padding-free values.
    let ret = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, values.as_ptr().cast(), len) };
    check(call, ret).map(drop)
}

macro_rules! flag {
    ($(#[$doc:meta])* $get:ident, $set:ident, $level:expr, $name:expr, $text:literal) => {
        $(#[$doc])*
        ///
        /// # Errors
        /// The kernel's answer.
        pub fn $get(fd: BorrowedFd<'_>) -> SysResult<bool> {
            Ok(get::<i32>(fd, $level, $name, concat!("get ", $text))? != 0)
        }
        /// Sets what the function of the same name reads.
        ///
        /// # Errors
        /// The kernel's answer.
        pub fn $set(fd: BorrowedFd<'_>, on: bool) -> SysResult<()> {
            set::<i32>(fd, $level, $name, &i32::from(on), concat!("set ", $text))
        }
    };
}

flag!(
    /// Whether SO_REUSEPORT is on.
    reuse_port, set_reuse_port, libc::SOL_SOCKET, libc::SO_REUSEPORT, "SO_REUSEPORT"
);
flag!(
    /// Whether urgent data stays in the stream (SO_OOBINLINE).
    oob_inline, set_oob_inline, libc::SOL_SOCKET, libc::SO_OOBINLINE, "SO_OOBINLINE"
);
flag!(
    /// Whether addresses that this host does not have (yet) can be bound (IP_FREEBIND).
    free_bind, set_free_bind, libc::SOL_IP, libc::IP_FREEBIND, "IP_FREEBIND"
);
flag!(
    /// Whether the Nagle algorithm is off (TCP_NODELAY).
    no_delay, set_no_delay, libc::SOL_TCP, libc::TCP_NODELAY, "TCP_NODELAY"
);
flag!(
    /// Whether partial segments are held back (TCP_CORK).
    cork, set_cork, libc::SOL_TCP, libc::TCP_CORK, "TCP_CORK"
);

/// SO_REUSEADDR as the kernel keeps it: 0, 1, or 2 while repair mode forces it.
///
/// # Errors
/// The kernel's answer.
pub fn reuse_addr(fd: BorrowedFd<'_>) -> SysResult<i32> {
    get(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, "get SO_REUSEADDR")
}

/// Sets SO_REUSEADDR.
///
/// # Errors
/// The kernel's answer.
pub fn set_reuse_addr(fd: BorrowedFd<'_>, on: bool) -> SysResult<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, &i32::from(on), "set SO_REUSEADDR")
}

/// Clears the socket's pending error (SO_ERROR), which the next call would tell.
///
/// # Errors
/// The kernel's answer.
pub fn clear_error(fd: BorrowedFd<'_>) -> SysResult<()> {
    get::<i32>(fd, libc::SOL_SOCKET, libc::SO_ERROR, "get SO_ERROR").map(drop)
}

/// The socket's family (`AF_INET`, …).
///
/// # Errors
/// ENOTSOCK for a descriptor of another kind.
pub fn domain(fd: BorrowedFd<'_>) -> SysResult<i32> {
    get(fd, libc::SOL_SOCKET, libc::SO_DOMAIN, "get SO_DOMAIN")
}

/// The socket's type (`SOCK_STREAM`, …).
///
/// # Errors
/// ENOTSOCK for a descriptor of another kind.
pub fn kind(fd: BorrowedFd<'_>) -> SysResult<i32> {
    get(fd, libc::SOL_SOCKET, libc::SO_TYPE, "get SO_TYPE")
}

/// The socket's protocol (`IPPROTO_TCP`, …).
///
/// # Errors
/// ENOTSOCK for a descriptor of another kind.
pub fn protocol(fd: BorrowedFd<'_>) -> SysResult<i32> {
    get(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL, "get SO_PROTOCOL")
}

/// Whether the descriptor is a TCP socket over IPv4 or IPv6.
#[must_use]
pub fn is_tcp(fd: BorrowedFd<'_>) -> bool {
    // No other family has stream sockets with a protocol of this number.
    protocol(fd) == Ok(libc::IPPROTO_TCP) && kind(fd) == Ok(libc::SOCK_STREAM)
}

/// The kernel's own name of a socket, unique until reboot, the same behind every descriptor of it.
///
/// # Errors
/// ENOTSOCK for a descriptor of another kind.
pub fn cookie(fd: BorrowedFd<'_>) -> SysResult<u64> {
    get(fd, libc::SOL_SOCKET, libc::SO_COOKIE, "get SO_COOKIE")
}

/// The name of the device that the socket is bound to (SO_BINDTODEVICE); empty where it is to none.
///
/// # Errors
/// The kernel's answer.
pub fn bound_device(fd: BorrowedFd<'_>) -> SysResult<Vec<u8>> {
    let mut name = [0; libc::IFNAMSIZ];
    let len = get_into(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut name)?;
    Ok(name[..len].split(|byte| *byte == 0).next().unwrap_or_default().to_vec())
}

/// The index of that device; 0 where it is to none.
///
/// # Errors
/// The kernel's answer.
pub fn bound_index(fd: BorrowedFd<'_>) -> SysResult<u32> {
    get(fd, libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, "get SO_BINDTOIFINDEX").map(i32::cast_unsigned)
}

/// Binds the socket to the device of this name.
///
/// # Errors
/// ENODEV for a name that the socket's network namespace does not have.
pub fn bind_to_device(fd: BorrowedFd<'_>, name: &[u8]) -> SysResult<()> {
    set_slice(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, name, "set SO_BINDTODEVICE")
}

/// Which buffer of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    /// SO_SNDBUF.
    Send,
    /// SO_RCVBUF.
    Receive,
}

/// What both buffers of a socket have room for, in the kernel's accounting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSizes {
    /// SO_SNDBUF.
    pub send: i32,
    /// SO_RCVBUF.
    pub receive: i32,
}

/// The size of a buffer in the kernel's accounting: twice what a program set.
///
/// # Errors
/// The kernel's answer.
pub fn buffer_size(fd: BorrowedFd<'_>, which: Buffer) -> SysResult<i32> {
    match which {
        Buffer::Send => get(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, "get SO_SNDBUF"),
        Buffer::Receive => get(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, "get SO_RCVBUF"),
    }
}

/// The sizes of both buffers, as [`buffer_size`] shows them; by one call since Linux 4.12 (SO_MEMINFO).
///
/// # Errors
/// The kernel's answer.
pub fn buffer_sizes(fd: BorrowedFd<'_>) -> SysResult<BufferSizes> {
    let size = |size| i32::try_from(size).unwrap_or(i32::MAX);
    match get::<[u32; 4]>(fd, libc::SOL_SOCKET, libc::SO_MEMINFO, "get SO_MEMINFO") {
        Ok([_rmem_alloc, rcvbuf, _wmem_alloc, sndbuf]) => {
            Ok(BufferSizes { send: size(sndbuf), receive: size(rcvbuf) })
        }
        Err(SysError { errno: Errno::ENOPROTOOPT, .. }) => Ok(BufferSizes {
            send: buffer_size(fd, Buffer::Send)?,
            receive: buffer_size(fd, Buffer::Receive)?,
        }),
        Err(error) => Err(error),
    }
}

/// Sets a buffer's size in the kernel's accounting (as [`buffer_size`] shows it), beyond the system's
/// limit where CAP_NET_ADMIN of the first user namespace allows it, and up to the limit otherwise.
///
/// # Errors
/// The kernel's answer.
pub fn set_buffer_size(fd: BorrowedFd<'_>, which: Buffer, size: i32) -> SysResult<()> {
    let half = size / 2;
    let (force, plain, call_force, call) = match which {
        Buffer::Send => (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, "set SO_SNDBUFFORCE", "set SO_SNDBUF"),
        Buffer::Receive => (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, "set SO_RCVBUFFORCE", "set SO_RCVBUF"),
    };
    match set(fd, libc::SOL_SOCKET, force, &half, call_force) {
        Err(SysError { errno: Errno::EPERM, .. }) => set(fd, libc::SOL_SOCKET, plain, &half, call),
        other => other,
    }
}

/// SO_BUF_LOCK, which libc does not know.
pub(crate) const SO_BUF_LOCK: i32 = 72;

/// Which buffers the program fixed, so that the kernel does not tune them (SO_BUF_LOCK, Linux 5.14).
///
/// # Errors
/// ENOPROTOOPT before Linux 5.14.
pub fn buffer_locks(fd: BorrowedFd<'_>) -> SysResult<u32> {
    get(fd, libc::SOL_SOCKET, SO_BUF_LOCK, "get SO_BUF_LOCK")
}

/// Sets what [`buffer_locks`] reads.
///
/// # Errors
/// ENOPROTOOPT before Linux 5.14.
pub fn set_buffer_locks(fd: BorrowedFd<'_>, locks: u32) -> SysResult<()> {
    set(fd, libc::SOL_SOCKET, SO_BUF_LOCK, &locks, "set SO_BUF_LOCK")
}

/// Marks every packet of the socket (SO_MARK).
///
/// # Errors
/// EPERM without CAP_NET_ADMIN or CAP_NET_RAW in the socket's network namespace.
pub fn set_mark(fd: BorrowedFd<'_>, mark: u32) -> SysResult<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_MARK, &mark, "set SO_MARK")
}

/// Where MSG_PEEK of a Unix or TCP socket starts (SO_PEEK_OFF); -1 is off.
///
/// # Errors
/// ENOPROTOOPT or EOPNOTSUPP where the socket's protocol has none.
pub fn peek_offset(fd: BorrowedFd<'_>) -> SysResult<i32> {
    get(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, "get SO_PEEK_OFF")
}

/// Sets what [`peek_offset`] reads.
///
/// # Errors
/// ENOPROTOOPT or EOPNOTSUPP where the socket's protocol has none.
pub fn set_peek_offset(fd: BorrowedFd<'_>, offset: i32) -> SysResult<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &offset, "set SO_PEEK_OFF")
}

/// `socket()`, close-on-exec.
///
/// # Errors
/// The kernel's answer.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> SysResult<OwnedFd> {
    // SAFETY: no pointers.
    let fd = check("create a socket", unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: a descriptor the kernel just gave us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A TCP socket, close-on-exec.
///
/// # Errors
/// The kernel's answer.
pub fn tcp_socket(ipv6: bool) -> SysResult<OwnedFd> {
    socket(if ipv6 { libc::AF_INET6 } else { libc::AF_INET }, libc::SOCK_STREAM, libc::IPPROTO_TCP)
}

/// Runs `f` with O_NONBLOCK on the socket, and puts the flags back.
///
/// # Errors
/// Those of `f`, else the kernel's answer.
pub fn with_nonblocking<R>(fd: BorrowedFd<'_>, f: impl FnOnce() -> SysResult<R>) -> SysResult<R> {
    // SAFETY: no pointers.
    let flags = check("get the status flags", unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let set = |flags: i32| {
        // SAFETY: no pointers.
        check("set the status flags", unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) })
    };
    if flags & libc::O_NONBLOCK != 0 {
        return f();
    }
    set(flags | libc::O_NONBLOCK)?;
    let result = f();
    set(flags)?;
    result
}

/// The kernel's own name of the socket's network namespace, unique until reboot (SO_NETNS_COOKIE, Linux 5.14).
///
/// # Errors
/// ENOPROTOOPT before Linux 5.14.
pub fn netns_cookie(fd: BorrowedFd<'_>) -> SysResult<u64> {
    const SO_NETNS_COOKIE: i32 = 71;
    get(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, "get SO_NETNS_COOKIE")
}

/// Puts an option's value into `value`, as the kernel gives it, and tells how long it is.
///
/// # Errors
/// ENOPROTOOPT for an option that the kernel or the socket does not have.
pub fn get_into(fd: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> SysResult<usize> {
    let mut len = socklen(value.len())?;
    // SAFETY: the kernel writes at most `len` bytes, the size of `value`.
    let ret =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    check("get a socket option", ret)?;
    Ok(value.len().min(len as usize))
}

/// Sets what [`get_into`] reads.
///
/// # Errors
/// The kernel's answer.
pub fn set_bytes(fd: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> SysResult<()> {
    set_slice(fd, level, name, value, "set a socket option")
}

/// Puts the instructions of the socket's classic BPF filter (SO_GET_FILTER) into `value`, which is empty or has room for all,
/// and tells how many bytes they take.
///
/// # Errors
/// EACCES for an eBPF program.
pub fn filter(fd: BorrowedFd<'_>, value: &mut [u8]) -> SysResult<usize> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    // This option counts in instructions.
    let mut count = socklen(value.len() / INSTRUCTION)?;
    let into = if value.is_empty() { std::ptr::null_mut() } else { value.as_mut_ptr() };
    // SAFETY: the kernel writes at most `count` instructions, which fit into `value`, and none where there is no room.
    let ret = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, into.cast(), &raw mut count)
    };
    check("get SO_GET_FILTER", ret)?;
    Ok(count as usize * INSTRUCTION)
}

/// Attaches a classic BPF filter with these instructions.
///
/// # Errors
/// EINVAL for what is no filter, EPERM where the filter there is locked.
pub fn attach_filter(fd: BorrowedFd<'_>, instructions: &[u8]) -> SysResult<()> {
    const CALL: &str = "set SO_ATTACH_FILTER";
    let einval = SysError { call: CALL, errno: Errno::EINVAL };
    // Copied to where instructions may lie in memory.
    let (whole, rest) = instructions.as_chunks::<8>();
    const { assert!(size_of::<libc::sock_filter>() == 8) };
    let mut filter: Vec<u64> = whole.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect();
    let len = u16::try_from(filter.len()).ok().filter(|_| rest.is_empty()).ok_or(einval)?;
    let program = libc::sock_fprog { len, filter: filter.as_mut_ptr().cast() };
    // SAFETY: the kernel reads the live structure, and `len` instructions of 8 bytes behind it.
    let ret = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            length::<libc::sock_fprog>(),
        )
    };
    check(CALL, ret).map(drop)
}

fn socklen(len: usize) -> SysResult<libc::socklen_t> {
    libc::socklen_t::try_from(len).map_err(|_| SysError { call: "get a socket option", errno: Errno::E2BIG })
}

/// The priority of the socket's packets in queues (SO_PRIORITY).
///
/// # Errors
/// The kernel's answer.
pub fn priority(fd: BorrowedFd<'_>) -> SysResult<i32> {
    get(fd, libc::SOL_SOCKET, libc::SO_PRIORITY, "get SO_PRIORITY")
}

/// Sets what [`priority`] reads.
///
/// # Errors
/// EPERM for a priority above 6 without CAP_NET_ADMIN.
pub fn set_priority(fd: BorrowedFd<'_>, priority: i32) -> SysResult<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_PRIORITY, &priority, "set SO_PRIORITY")
}
