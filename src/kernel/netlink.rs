//! Netlink sockets: whole messages in, whole messages out.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, NetlinkAddr, bind, send};

use super::sockopt::{self, Buffer};
use super::{SysError, SysResult};

/// Below this a send buffer needs no raising: half of what kernels give by default.
const DEFAULT_BUFFER: i32 = 106_496;

/// A netlink socket, bound to the network namespace that the thread was in when it was opened,
/// wherever the thread goes afterwards.
#[derive(Debug)]
pub struct NetlinkSocket {
    fd: OwnedFd,
}

impl NetlinkSocket {
    /// Opens a socket of netfilter (`NETLINK_NETFILTER`) in the calling thread's network namespace.
    ///
    /// # Errors
    /// EPROTONOSUPPORT where the kernel has no netfilter netlink at all.
    pub fn netfilter() -> SysResult<Self> {
        Self::open(libc::NETLINK_NETFILTER)
    }

    /// Opens a socket of the socket monitor (`NETLINK_SOCK_DIAG`) in the calling thread's network namespace.
    ///
    /// # Errors
    /// EPROTONOSUPPORT where the kernel has none.
    pub fn sock_diag() -> SysResult<Self> {
        Self::open(libc::NETLINK_SOCK_DIAG)
    }

    /// Opens a socket of routing (`NETLINK_ROUTE`, rtnetlink(7)) in the calling thread's network namespace, which hears of what
    /// these groups (`RTMGRP_*`) tell.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn route(groups: libc::c_int) -> SysResult<Self> {
        let socket = Self::open(libc::NETLINK_ROUTE)?;
        bind(socket.fd.as_raw_fd(), &NetlinkAddr::new(0, groups.cast_unsigned()))
            .map_err(|errno| SysError { call: "hear of changes of the network", errno })?;
        Ok(socket)
    }

    fn open(protocol: i32) -> SysResult<Self> {
        let fd = sockopt::socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol)?;
        let socket = Self { fd };
        // Only the header of a refused message comes back (Linux 4.3), not its 50 KiB of elements,
        // so that a few answers cannot overrun the receive buffer.
        socket.set(libc::NETLINK_CAP_ACK, "set NETLINK_CAP_ACK")?;
        // The kernel's own words for a refusal (Linux 4.12); an older kernel gives the number alone.
        let _ = socket.set(libc::NETLINK_EXT_ACK, "set NETLINK_EXT_ACK");
        Ok(socket)
    }

    fn set(&self, option: libc::c_int, call: &'static str) -> SysResult<()> {
        sockopt::set(self.fd.as_fd(), libc::SOL_NETLINK, option, &1_i32, call)
    }

    /// Sends `messages` in one call: the kernel takes them as one skb, which is what makes a
    /// netfilter batch one transaction. It has worked through all of them when this returns.
    ///
    /// # Errors
    /// EMSGSIZE: more bytes than the send buffer may hold (`net.core.wmem_max`, twice, for a
    /// process without CAP_NET_ADMIN in the initial user namespace). EPERM: no CAP_NET_ADMIN here.
    pub fn send(&self, messages: &[u8]) -> SysResult<()> {
        self.make_room(messages.len());
        let sent = send(self.fd.as_raw_fd(), messages, MsgFlags::empty())
            .map_err(|errno| SysError { call: "send a netlink message", errno })?;
        if sent == messages.len() {
            Ok(())
        } else {
            Err(SysError { call: "send a netlink message", errno: Errno::EMSGSIZE })
        }
    }

    /// A message may be as long as the send buffer less 32 bytes. Where the buffer may not be
    /// raised that far, [`Self::send`] gets EMSGSIZE and says so.
    fn make_room(&self, len: usize) {
        let size = i32::try_from(len).unwrap_or(i32::MAX).saturating_mul(2);
        if size > DEFAULT_BUFFER {
            let _ = sockopt::set_buffer_size(self.fd.as_fd(), Buffer::Send, size);
        }
    }

    /// Gives the kernel room for so many bytes of messages that come unasked, more than it has, as far as it allows.
    pub fn set_receive_room(&self, bytes: i32) {
        let _ = sockopt::set_buffer_size(self.fd.as_fd(), Buffer::Receive, bytes);
    }

    /// Gives the socket a port that was nobody's before. Left to itself the kernel takes the process id, or a negative number
    /// beside another socket of the process.
    ///
    /// Closing a socket frees its port before the subsystems are told, and what they end then is whatever belongs to the
    /// port: also a successor's. nf_tables, where it is told first, makes the others wait for an RCU grace period.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn take_new_port(&self) -> SysResult<()> {
        const CALL: &str = "give a netlink socket a port";
        /// No process id is as large.
        const FIRST: u32 = 1 << 30;
        loop {
            let random = RandomState::new().build_hasher().finish() % u64::from(FIRST);
            let port = FIRST + u32::try_from(random).expect("it is smaller than one");
            match bind(self.fd.as_raw_fd(), &NetlinkAddr::new(port, 0)) {
                Err(Errno::EADDRINUSE) => {}
                other => return other.map_err(|errno| SysError { call: CALL, errno }),
            }
        }
    }

    /// Receives the next datagram of the kernel's answer, `None` when there is no more. Never
    /// waits: the kernel puts every answer to a request in the queue before it returns from the
    /// request, and the next part of a dump before it returns from this call.
    ///
    /// # Errors
    /// ENOBUFS: answers were lost. EMSGSIZE: `buffer` is too small for a datagram.
    pub fn receive(&self, buffer: &mut [u8]) -> SysResult<Option<usize>> {
        const CALL: &str = "receive a netlink message";
        loop {
            let (len, sender) = match self.receive_from(buffer) {
                Ok(got) => got,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(SysError { call: CALL, errno }),
            };
            if sender != 0 {
                continue; // any process may write to our address; only port 0 is the kernel
            }
            if len > buffer.len() {
                return Err(SysError { call: CALL, errno: Errno::EMSGSIZE });
            }
            return Ok(Some(len));
        }
    }

    /// The datagram's own length, which may exceed the buffer's, and the sender's port.
    fn receive_from(&self, buffer: &mut [u8]) -> Result<(usize, u32), Errno> {
        // SAFETY: all zeroes is a valid sockaddr_nl.
        let mut from: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        let mut from_len =
            libc::socklen_t::try_from(size_of::<libc::sockaddr_nl>()).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the kernel writes at most `buffer.len()` bytes to the buffer and at most
        // `from_len` bytes to the address; both are live and that long.
        let len = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT | libc::MSG_TRUNC,
                (&raw mut from).cast(),
                &raw mut from_len,
            )
        };
        Ok((usize::try_from(len).map_err(|_| Errno::last())?, from.nl_pid))
    }
}

/// Readable when something has come.
impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
