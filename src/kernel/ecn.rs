//! Has connect() ask for ECN (RFC 3168) for one socket, whatever net.ipv4.tcp_ecn says.
//!
//! The kernel asks the `sock_ops` programs of a socket's control group whether its SYN shall ask for ECN
//! (BPF_SOCK_OPS_NEEDS_ECN). Ours says yes for the one socket whose cookie is the key in a map. It hangs on the root group
//! by a link, which ends with its descriptor: nothing of it outlives this process, however that ends. The setting of
//! the namespace would, and would hold for everybody in it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::bpf::{Callee, Insn, Map, MapKind, Program, Register, Width};
use super::{SysError, SysResult, sockopt};

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
        let link = Program::of_socket_events(&program(&chosen))?.attach_to_group(root_group()?.as_fd())?;
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
/// if ctx.op == BPF_SOCK_OPS_NEEDS_ECN {
///     let cookie = bpf_get_socket_cookie(ctx);
///     if bpf_map_lookup_elem(chosen, &cookie) { ctx.reply = 1 }
/// }
/// return 1
/// ```
fn program(chosen: &Map) -> [Insn; 17] {
    use Register::{R0, R1, R2, R6, R10};
    const NEEDS_ECN: u32 = 6;
    const LOOKUP: Callee = Callee::Helper(1);
    const GET_SOCKET_COOKIE: Callee = Callee::Helper(46);
    /// Of `struct bpf_sock_ops`.
    const OP: i16 = 0;
    const REPLY: i16 = 4;
    const COOKIE: i16 = -8;
    let [map, map_too] = Insn::map(R1, chosen);
    [
        Insn::copy(R6, R1),
        Insn::load(Width::Word, R2, R6, OP),
        Insn::skip_unless(R2, NEEDS_ECN, 8),
        Insn::call(GET_SOCKET_COOKIE),
        Insn::store(Width::Double, R10, COOKIE, R0),
        Insn::copy(R2, R10),
        Insn::add(R2, COOKIE.into()),
        map,
        map_too,
        Insn::call(LOOKUP),
        Insn::skip_unless_null(R0, 2),
        Insn::set(R0, 1), // 0 would silence programs of others
        Insn::exit(),
        Insn::set(R2, 1),
        Insn::store(Width::Word, R6, REPLY, R2),
        Insn::set(R0, 1),
        Insn::exit(),
    ]
}

/// The root of the control groups (version 2), mounted for nobody but this descriptor (Linux 5.2).
pub(super) fn root_group() -> SysResult<OwnedFd> {
    const CALL: &str = "mount the control groups";
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let created = |ret: libc::c_long| match libc::c_int::try_from(ret) {
        // SAFETY: a new descriptor, which nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(SysError::last(CALL)),
    };
    // SAFETY: a string that ends in a zero byte.
    let context = created(unsafe { libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), FSOPEN_CLOEXEC) })?;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: this command takes neither key nor value.
    let ret =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0) };
    if ret < 0 {
        return Err(SysError::last(CALL));
    }
    // SAFETY: no pointers.
    created(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) })
}
