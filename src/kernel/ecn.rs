//! Has connect() ask for ECN (RFC 3168) for one socket, whatever net.ipv4.tcp_ecn says.
//!
//! The kernel asks the `sock_ops` programs of a socket's control group whether its SYN shall ask for ECN
//! (BPF_SOCK_OPS_NEEDS_ECN). Ours says yes for the one socket whose cookie stands in a map. It hangs on the root group by
//! a link, which ends with its descriptor: nothing of it outlives this process, however that ends. The setting of
//! the namespace would, and would hold for everybody in it.
//!
//! ```text
//! if ctx.op == BPF_SOCK_OPS_NEEDS_ECN && bpf_get_socket_cookie(ctx) == chosen { ctx.reply = 1 }
//! return 1
//! ```

use std::ffi::CStr;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::{SysError, SysResult, sockopt};

/// The program, loaded and attached. Dropping it detaches it.
#[derive(Debug)]
pub struct AskForEcn {
    /// An array of one cookie.
    chosen: OwnedFd,
    _link: OwnedFd,
}

/// No socket's cookie.
const NONE: u64 = 0;

impl AskForEcn {
    /// Loads the program and attaches it (Linux 5.7).
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, or CAP_BPF and CAP_NET_ADMIN, in the first user namespace.
    pub fn attach() -> SysResult<Self> {
        let chosen = create_map()?;
        let program = load(&program(chosen.as_fd()))?;
        let link = link(program.as_fd(), root_group()?.as_fd())?;
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
        self.choose(sockopt::cookie(socket)?)?;
        let result = connect();
        self.choose(NONE).and(result)
    }

    fn choose(&self, cookie: u64) -> SysResult<()> {
        let index = 0_u32;
        let mut attr = attr::MapUpdate {
            map: raw(self.chosen.as_fd()),
            _pad: 0,
            key: address(&index),
            value: address(&cookie),
            flags: 0,
        };
        call(command::MAP_UPDATE_ELEM, &mut attr, "choose a socket for ECN").map(drop)
    }
}

/// `enum bpf_cmd` of linux/bpf.h.
mod command {
    pub const MAP_CREATE: i32 = 0;
    pub const MAP_UPDATE_ELEM: i32 = 2;
    pub const PROG_LOAD: i32 = 5;
    pub const LINK_CREATE: i32 = 28;
}

/// The members of `union bpf_attr`, as far as they are used; the kernel takes the rest for zero.
mod attr {
    /// For BPF_MAP_CREATE.
    #[repr(C)]
    pub struct MapCreate {
        pub kind: u32,
        pub key_size: u32,
        pub value_size: u32,
        pub max_entries: u32,
    }

    /// For BPF_MAP_UPDATE_ELEM.
    #[repr(C)]
    pub struct MapUpdate {
        pub map: u32,
        pub _pad: u32,
        pub key: u64,
        pub value: u64,
        pub flags: u64,
    }

    /// For BPF_PROG_LOAD.
    #[repr(C)]
    pub struct ProgLoad {
        pub kind: u32,
        pub instructions: u32,
        pub code: u64,
        pub license: u64,
    }

    /// For BPF_LINK_CREATE.
    #[repr(C)]
    pub struct LinkCreate {
        pub program: u32,
        pub target: u32,
        pub attach_type: u32,
        pub flags: u32,
    }

    /// # Safety
    /// `repr(C)` and without padding.
    pub unsafe trait Attr {}
    // SAFETY: integers of one size, or in pairs.
    unsafe impl Attr for MapCreate {}
    // SAFETY: as above.
    unsafe impl Attr for MapUpdate {}
    // SAFETY: as above.
    unsafe impl Attr for ProgLoad {}
    // SAFETY: as above.
    unsafe impl Attr for LinkCreate {}
}

fn call<A: attr::Attr>(command: i32, attr: &mut A, what: &'static str) -> SysResult<libc::c_int> {
    // SAFETY: the kernel reads `size_of::<A>()` initialised bytes of a live value, and what its addresses name is alive, too.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<A>()) };
    libc::c_int::try_from(ret).ok().filter(|ret| *ret >= 0).ok_or_else(|| SysError::last(what))
}

fn created<A: attr::Attr>(command: i32, attr: &mut A, what: &'static str) -> SysResult<OwnedFd> {
    let fd = call(command, attr, what)?;
    // SAFETY: these commands return a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>().addr() as u64
}

fn create_map() -> SysResult<OwnedFd> {
    const ARRAY: u32 = 2;
    let mut attr = attr::MapCreate { kind: ARRAY, key_size: 4, value_size: 8, max_entries: 1 };
    created(command::MAP_CREATE, &mut attr, "create a BPF map")
}

fn load(code: &[Instruction]) -> SysResult<OwnedFd> {
    const SOCK_OPS: u32 = 13;
    const LICENSE: &CStr = c"Dual MIT/GPL";
    let mut attr = attr::ProgLoad {
        kind: SOCK_OPS,
        instructions: u32::try_from(code.len()).unwrap_or(u32::MAX),
        code: address(code),
        license: address(LICENSE),
    };
    created(command::PROG_LOAD, &mut attr, "load a BPF program that asks for ECN")
}

fn link(program: BorrowedFd<'_>, group: BorrowedFd<'_>) -> SysResult<OwnedFd> {
    const CGROUP_SOCK_OPS: u32 = 3;
    let mut attr = attr::LinkCreate {
        program: raw(program),
        target: raw(group),
        attach_type: CGROUP_SOCK_OPS,
        flags: 0,
    };
    created(command::LINK_CREATE, &mut attr, "attach a BPF program that asks for ECN")
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

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The program for the map with the chosen cookie.
fn program(chosen: BorrowedFd<'_>) -> [Instruction; 12] {
    const NEEDS_ECN: i32 = 6;
    const GET_SOCKET_COOKIE: i32 = 46;
    /// Of `struct bpf_sock_ops`.
    const OP: i16 = 0;
    const REPLY: i16 = 4;
    const MAP_VALUE: u8 = 2;
    let [load32, load64, store32] = [0x61, 0x79, 0x63];
    let [if_not, if_not_equal, call, exit] = [0x55, 0x5d, 0x85, 0x95];
    let [copy, set, load_address] = [0xbf, 0xb7, 0x18];
    let to = |code, dst: u8, src: u8, offset, immediate| Instruction {
        code,
        registers: if cfg!(target_endian = "little") { src << 4 | dst } else { dst << 4 | src },
        offset,
        immediate,
    };
    [
        to(load32, 2, 1, OP, 0),
        to(if_not, 2, 0, 8, NEEDS_ECN),
        to(copy, 6, 1, 0, 0),
        to(call, 0, 0, 0, GET_SOCKET_COOKIE),
        to(load_address, 1, MAP_VALUE, 0, chosen.as_raw_fd()),
        to(0, 0, 0, 0, 0), // the second half of that instruction
        to(load64, 1, 1, 0, 0),
        to(if_not_equal, 0, 1, 2, 0),
        to(set, 2, 0, 0, 1),
        to(store32, 6, 2, REPLY, 0),
        to(set, 0, 0, 0, 1), // where both jumps lead
        to(exit, 0, 0, 0, 0),
    ]
}
