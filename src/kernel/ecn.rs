//! Has connect() ask for ECN (RFC 3168) for one socket, whatever net.ipv4.tcp_ecn says.
//!
//! The kernel asks the `sock_ops` programs of a socket's control group whether its SYN shall ask for ECN
//! (BPF_SOCK_OPS_NEEDS_ECN). Ours says yes for the one socket whose cookie is the key in a map. It hangs on the root group
//! by a link, which ends with its descriptor: nothing of it outlives this process, however that ends. The setting of
//! the namespace would, and would hold for everybody in it.

use std::os::fd::{BorrowedFd, OwnedFd};

use super::bpf::{Insn, Map, MapKind, Register, Width};
use super::{SysResult, sock_ops, sockopt};

/// BPF_SOCK_OPS_NEEDS_ECN.
const NEEDS_ECN: u32 = 6;

/// The program, loaded and attached. Dropping it detaches it.
#[derive(Debug)]
pub struct AskForEcn {
    /// The cookie of one socket at a time.
    chosen: Map,
    _link: OwnedFd,
}

impl AskForEcn {
    /// Loads the program and attaches it (Linux 5.7).
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, or CAP_BPF and CAP_NET_ADMIN, in the first user namespace.
    pub fn attach() -> SysResult<Self> {
        let chosen = Map::new(MapKind::Hash, size_of::<u64>(), 1, 1)?;
        let link = sock_ops::attach(NEEDS_ECN, &chosen, &ask())?;
        Ok(Self { chosen, _link: link })
    }

    /// Runs `connect`, during which a SYN of this socket asks for ECN. Only one socket can be chosen at a time.
    ///
    /// # Errors
    /// Those of `connect`, else the kernel's answer.
    pub fn during<R>(
        &mut self,
        socket: BorrowedFd<'_>,
        connect: impl FnOnce() -> SysResult<R>,
    ) -> SysResult<R> {
        let cookie = sockopt::cookie(socket)?.to_ne_bytes();
        self.chosen.insert(&cookie, &[0])?;
        let result = connect();
        self.chosen.remove(&cookie).and(result)
    }
}

/// ```text
/// ctx.reply = 1
/// ```
fn ask() -> [Insn; 2] {
    /// Of `struct bpf_sock_ops`.
    const REPLY: i16 = 4;
    [Insn::set(Register::R2, 1), Insn::store(Width::Word, Register::R6, REPLY, Register::R2)]
}
