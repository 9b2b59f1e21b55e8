//! Programs that the kernel runs at events of sockets (`sock_ops`), and that act for chosen sockets only. They hang on the root
//! control group by a link, which ends with its descriptor.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::bpf::{Callee, Insn, Map, Program, Register, Width};
use super::{SysError, SysResult};

/// Has `then` run at `event` for the sockets whose cookies are keys of `chosen`, with the context in R6 and the address of
/// the key's value in R0.
pub fn attach(event: u32, chosen: &Map, then: &[Insn]) -> SysResult<OwnedFd> {
    Program::of_socket_events(&program(event, chosen, then))?.attach_to_group(root_group()?.as_fd())
}

/// ```text
/// if ctx.op == event {
///     let cookie = bpf_get_socket_cookie(ctx);
///     if let value = bpf_map_lookup_elem(chosen, &cookie) { then }
/// }
/// return 1
/// ```
fn program(event: u32, chosen: &Map, then: &[Insn]) -> Vec<Insn> {
    use Register::{R0, R1, R2, R6, R10};
    const LOOKUP: Callee = Callee::Helper(1);
    const GET_SOCKET_COOKIE: Callee = Callee::Helper(46);
    /// Of `struct bpf_sock_ops`.
    const OP: i16 = 0;
    const COOKIE: i16 = -8;
    let [map, map_too] = Insn::map(R1, chosen);
    let is_chosen = [
        Insn::copy(R6, R1),
        Insn::load(Width::Word, R2, R6, OP),
        Insn::skip_unless(R2, event, 8),
        Insn::call(GET_SOCKET_COOKIE),
        Insn::store(Width::Double, R10, COOKIE, R0),
        Insn::copy(R2, R10),
        Insn::add(R2, COOKIE.into()),
        map,
        map_too,
        Insn::call(LOOKUP),
        Insn::skip_unless_null(R0, 2),
    ];
    let end = [Insn::set(R0, 1), Insn::exit()]; // 0 would silence programs of others
    [&is_chosen[..], &end, then, &end].concat()
}

/// The root of the control groups (version 2), mounted for nobody but this descriptor (Linux 5.2).
fn root_group() -> SysResult<OwnedFd> {
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
