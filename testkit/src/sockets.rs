//! The TCP sockets of other processes, seen from outside.

use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};
use nix::unistd::Pid;

use crate::task::pidfd_open;

/// `TCP_ESTABLISHED` and so on, as `net/tcp_states.h` numbers them.
pub mod state {
    #![allow(missing_docs)] // RFC 9293 names them
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// A duplicate of a TCP socket that belongs to another process.
#[derive(Debug)]
pub struct TaskSocket {
    /// Its number in that process.
    pub number: RawFd,
    socket: OwnedFd,
}

/// The TCP sockets in the descriptor table of a process, listeners included.
pub fn tcp_sockets(pid: Pid) -> Result<Vec<TaskSocket>> {
    let mut found = sockets(pid)?;
    found.retain(TaskSocket::is_tcp);
    Ok(found)
}

/// All its sockets.
pub fn sockets(pid: Pid) -> Result<Vec<TaskSocket>> {
    let mut found = Vec::new();
    for_each(pid, |socket| {
        found.push(socket);
        Ok(())
    })?;
    found.sort_by_key(|socket| socket.number);
    Ok(found)
}

/// Shows each socket of a process, one at a time: it may have more than we have descriptors left.
pub fn for_each(pid: Pid, mut look: impl FnMut(TaskSocket) -> Result<()>) -> Result<()> {
    let pidfd = pidfd_open(pid)?;
    let dir = format!("/proc/{pid}/fd");
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {dir}"))? {
        let entry = entry?;
        let is_socket =
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if is_socket {
            look(TaskSocket { number, socket: pidfd_getfd(&pidfd, number)? })?;
        }
    }
    Ok(())
}

/// The connections of some processes, and how many have something queued.
#[derive(Debug, Default)]
pub struct Queues {
    /// All that are no listeners.
    pub connections: usize,
    /// Those with bytes to read.
    pub unread: usize,
    /// Those with bytes that are not acknowledged.
    pub unacked: usize,
    /// Those with both.
    pub full: usize,
}

impl Queues {
    /// As they are now.
    pub fn of(pids: &[Pid]) -> Result<Self> {
        let mut queues = Self::default();
        for socket in pids.iter().map(|pid| tcp_sockets(*pid)).collect::<Result<Vec<_>>>()?.iter().flatten() {
            if socket.state()? != state::LISTEN {
                let (unread, unacked) = (socket.unread()? > 0, socket.unacked()? > 0);
                queues.connections += 1;
                queues.unread += usize::from(unread);
                queues.unacked += usize::from(unacked);
                queues.full += usize::from(unread && unacked);
            }
        }
        Ok(queues)
    }
}

impl TaskSocket {
    /// A socket of our own.
    pub fn of(socket: &impl AsFd) -> Result<Self> {
        let fd = socket.as_fd();
        Ok(Self { number: fd.as_raw_fd(), socket: fd.try_clone_to_owned()? })
    }

    /// Whether it is a TCP socket.
    pub fn is_tcp(&self) -> bool {
        let inet = get(&self.socket, libc::SOL_SOCKET, libc::SO_DOMAIN)
            .is_ok_and(|domain: i32| domain == libc::AF_INET || domain == libc::AF_INET6);
        inet && get(&self.socket, libc::SOL_SOCKET, libc::SO_PROTOCOL)
            .is_ok_and(|it: i32| it == libc::IPPROTO_TCP)
    }

    /// One of [`state`].
    pub fn state(&self) -> Result<u8> {
        Ok(self.info()?[0])
    }

    /// The largest segment that is sent now (`tcpi_snd_mss`).
    pub fn snd_mss(&self) -> Result<u32> {
        let info = self.info()?;
        Ok(u32::from_ne_bytes(info[16..20].try_into()?))
    }

    /// Whether both ends agreed on ECN (RFC 3168).
    pub fn has_ecn(&self) -> Result<bool> {
        const TCPI_OPT_ECN: u8 = 8;
        Ok(self.info()?[5] & TCPI_OPT_ECN != 0)
    }

    /// The smoothed round trip time; 0 before the first one is measured.
    pub fn rtt(&self) -> Result<Duration> {
        let info = self.info()?;
        Ok(Duration::from_micros(u32::from_ne_bytes(info[68..72].try_into()?).into()))
    }

    /// The congestion window, in segments.
    pub fn snd_cwnd(&self) -> Result<u32> {
        let info = self.info()?;
        Ok(u32::from_ne_bytes(info[80..84].try_into()?))
    }

    /// Whether the socket is in repair mode, where nothing of it works for its program.
    pub fn in_repair(&self) -> Result<bool> {
        let on: i32 = get(&self.socket, libc::IPPROTO_TCP, libc::TCP_REPAIR).context("TCP_REPAIR")?;
        Ok(on != 0)
    }

    /// Bytes received and not read.
    pub fn unread(&self) -> Result<usize> {
        queued(&self.socket, libc::FIONREAD)
    }

    /// Bytes written and not acknowledged by the peer.
    pub fn unacked(&self) -> Result<usize> {
        queued(&self.socket, libc::TIOCOUTQ)
    }

    /// Of these, bytes that have not been sent once.
    pub fn unsent(&self) -> Result<usize> {
        queued(&self.socket, SIOCOUTQNSD)
    }

    /// Whether data waits to be read, and more to be sent than the peer's window takes: nothing is under way.
    pub fn is_stuck(&self) -> Result<bool> {
        let unsent = self.unsent()?;
        Ok(self.unread()? > 0 && unsent > 0 && self.unacked()? == unsent)
    }

    /// Of a listener: connections that nobody has accepted.
    pub fn waiting(&self) -> Result<u32> {
        let info = self.info()?;
        Ok(u32::from_ne_bytes(info[24..28].try_into()?))
    }

    /// Its own address; `None` where there is none.
    pub fn local(&self) -> Option<SocketAddr> {
        address(&getsockname::<SockaddrStorage>(self.socket.as_raw_fd()).ok()?)
    }

    /// The other end; `None` where there is none.
    pub fn peer(&self) -> Option<SocketAddr> {
        address(&getpeername::<SockaddrStorage>(self.socket.as_raw_fd()).ok()?)
    }

    /// A socket option that is an `int`.
    pub fn option(&self, level: i32, name: i32) -> Result<i32> {
        get(&self.socket, level, name).with_context(|| format!("socket option {level}:{name}"))
    }

    /// `struct tcp_info` as far as `tcpi_rtt`: `tcpi_state` is its first byte, `tcpi_options` the sixth, `tcpi_snd_mss` begins at
    /// the sixteenth, and `tcpi_unacked`, the backlog of a listener, at the 24th.
    fn info(&self) -> Result<[u8; 84]> {
        get(&self.socket, libc::IPPROTO_TCP, libc::TCP_INFO).context("TCP_INFO")
    }
}

impl AsFd for TaskSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for TaskSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn address(addr: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = addr.as_sockaddr_in().map(|v4| SocketAddr::from(std::net::SocketAddrV4::from(*v4)));
    v4.or_else(|| addr.as_sockaddr_in6().map(|v6| SocketAddr::from(std::net::SocketAddrV6::from(*v6))))
}

/// `SIOCINQ` or `SIOCOUTQ`: bytes in a queue of a socket.
pub fn queued(socket: &impl AsRawFd, request: libc::Ioctl) -> Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: these requests write one int at the address given.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut bytes) };
    Errno::result(done).context("SIOCINQ or SIOCOUTQ")?;
    Ok(usize::try_from(bytes)?)
}

/// linux/sockios.h
const SIOCOUTQNSD: libc::Ioctl = 0x894B;

/// An eBPF program for `SO_ATTACH_BPF`, which takes each packet whole.
pub fn ebpf_filter() -> Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        licence: u64,
        rest: [u64; 12],
    }
    // r0 = -1; exit
    let instructions: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
    let load = Load {
        kind: BPF_PROG_TYPE_SOCKET_FILTER,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        licence: c"GPL".as_ptr() as u64,
        ..Load::default()
    };
    // SAFETY: the kernel reads the live structure, and what it points to, which lives as long.
    let program = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    let program = i32::try_from(Errno::result(program).context("cannot load a program")?)?;
    // SAFETY: a descriptor that the kernel has just given.
    Ok(unsafe { OwnedFd::from_raw_fd(program) })
}

/// Types that any bytes are a value of.
pub(crate) trait Plain: Copy {}
impl Plain for i32 {}
impl Plain for [u32; 2] {}
impl Plain for [u8; 84] {}

pub(crate) fn get<T: Plain>(socket: &OwnedFd, level: i32, name: i32) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = libc::socklen_t::try_from(size_of::<T>()).expect("a small type");
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has that size.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(done)?;
    // SAFETY: zeroed before, and `Plain` types have no invalid values.
    Ok(unsafe { value.assume_init() })
}

fn pidfd_getfd(pidfd: &OwnedFd, number: RawFd) -> Result<OwnedFd> {
    // SAFETY: pidfd_getfd takes three integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0) };
    let fd = Errno::result(fd).with_context(|| format!("pidfd_getfd({number})"))?;
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}
