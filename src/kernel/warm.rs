//! Gives a connection another congestion window than the ten segments of a new one.
//!
//! TCP_REPAIR has no call for it; only a BPF program can set one, by TCP_BPF_IW, as long as the connection has sent no data. The kernel
//! calls the `sock_ops` programs of a socket's control group when it is connected, in repair mode as well, and ours sets the
//! window of those whose cookies are keys in a map. As the one of [`super::ecn`] it ends with this process. There is
//! no such option for the slow start threshold: TCP_BPF_SNDCWND_CLAMP sets it, but limits the window for good.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::bpf::{Callee, Insn, Map, MapKind, Register};
use super::{SysResult, sock_ops, sockopt};

/// BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB.
const ACTIVE_ESTABLISHED: u32 = 4;

/// The program, loaded and attached. Dropping it detaches it.
#[derive(Debug)]
pub struct SetWindow {
    /// Windows in segments, by the cookies of the sockets.
    windows: Map,
    _link: OwnedFd,
}

/// So many sockets can be chosen at the same time.
const AT_ONCE: u32 = 1024;

impl SetWindow {
    /// Loads the program and attaches it (Linux 5.7).
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, or CAP_BPF and CAP_NET_ADMIN, in the first user namespace.
    pub fn attach() -> SysResult<Self> {
        let windows = Map::new(MapKind::Hash, size_of::<u64>(), size_of::<u32>(), AT_ONCE)?;
        let link = sock_ops::attach(ACTIVE_ESTABLISHED, &windows, &set())?;
        Ok(Self { windows, _link: link })
    }

    /// This socket gets a window of so many segments as soon as it is connected, unless the answer is dropped before. A connection
    /// begins with a send buffer that fits its window: this one keeps the buffer that it has (Linux 5.14).
    ///
    /// # Errors
    /// The kernel's answer; E2BIG for too many sockets at a time.
    pub fn choose<'a>(&'a self, socket: BorrowedFd<'a>, segments: u32) -> SysResult<Chosen<'a>> {
        const SOCK_SNDBUF_LOCK: u32 = 1;
        let (cookie, locks) = (sockopt::cookie(socket)?.to_ne_bytes(), sockopt::buffer_locks(socket)?);
        self.windows.insert(&cookie, &segments.to_ne_bytes())?;
        let chosen = Chosen { windows: &self.windows, cookie, socket, locks };
        sockopt::set_buffer_locks(socket, locks | SOCK_SNDBUF_LOCK).map(|()| chosen)
    }
}

/// A socket that is to get a window.
#[derive(Debug)]
pub struct Chosen<'a> {
    windows: &'a Map,
    cookie: [u8; size_of::<u64>()],
    socket: BorrowedFd<'a>,
    /// Which of its buffers have a fixed size.
    locks: u32,
}

impl Drop for Chosen<'_> {
    fn drop(&mut self) {
        // Both were there, and took what they take now.
        let _ = self.windows.remove(&self.cookie);
        let _ = sockopt::set_buffer_locks(self.socket, self.locks);
    }
}

/// ```text
/// bpf_setsockopt(ctx, SOL_TCP, TCP_BPF_IW, segments, 4)
/// ```
fn set() -> [Insn; 6] {
    use Register::{R0, R1, R2, R3, R4, R5, R6};
    const SETSOCKOPT: Callee = Callee::Helper(49);
    const TCP_BPF_IW: i32 = 1001;
    [
        Insn::copy(R4, R0),
        Insn::copy(R1, R6),
        Insn::set(R2, libc::SOL_TCP),
        Insn::set(R3, TCP_BPF_IW),
        Insn::set(R5, 4),
        Insn::call(SETSOCKOPT),
    ]
}
