//! BPF programs of a handful of instructions, made at run time (`bpf(2)`): no compiler, no object file.
//!
//! All of it belongs to its descriptors: what this process leaves behind, however it ends, is nothing.

use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::{SysError, SysResult};

/// Instructions as `linux/bpf.h` has them; see also `Documentation/bpf/standardization/instruction-set.rst`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Insn {
    code: u8,
    /// Destination and source, four bits each.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A register; r10 is the frame's end, r1 to r5 are arguments, r6 to r9 outlast calls.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Register {
    R0 = 0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R10 = 10,
}

/// How many bytes an instruction loads or stores.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub enum Width {
    /// 4.
    Word = 0x00,
    /// 8.
    Double = 0x18,
}

/// What a program calls.
#[derive(Clone, Copy, Debug)]
pub enum Callee {
    /// A helper, by its `BPF_FUNC_*` number.
    Helper(i32),
    /// A function of the kernel, by its number in the kernel's own BTF ([`super::btf`]).
    Kernel(u32),
}

impl Insn {
    const fn new(code: u8, dst: Register, src: u8, offset: i16, immediate: i32) -> Self {
        let registers =
            if cfg!(target_endian = "little") { src << 4 | dst as u8 } else { (dst as u8) << 4 | src };
        Self { code, registers, offset, immediate }
    }

    /// `dst = src`.
    #[must_use]
    pub const fn copy(dst: Register, src: Register) -> Self {
        Self::new(0xbf, dst, src as u8, 0, 0)
    }

    /// `dst = number`.
    #[must_use]
    pub const fn set(dst: Register, number: i32) -> Self {
        Self::new(0xb7, dst, 0, 0, number)
    }

    /// `dst += number`.
    #[must_use]
    pub const fn add(dst: Register, number: i32) -> Self {
        Self::new(0x07, dst, 0, 0, number)
    }

    /// `dst = src[offset]`.
    #[must_use]
    pub const fn load(width: Width, dst: Register, src: Register, offset: i16) -> Self {
        Self::new(0x61 | width as u8, dst, src as u8, offset, 0)
    }

    /// `dst[offset] = src`.
    #[must_use]
    pub const fn store(width: Width, dst: Register, offset: i16, src: Register) -> Self {
        Self::new(0x63 | width as u8, dst, src as u8, offset, 0)
    }

    /// `dst[offset] = number`.
    #[must_use]
    pub const fn store_number(width: Width, dst: Register, offset: i16, number: i32) -> Self {
        Self::new(0x62 | width as u8, dst, 0, offset, number)
    }

    /// Leaves out the next `offset` instructions if the low half of `register` is `number`.
    #[must_use]
    pub const fn skip_if(register: Register, number: u32, offset: i16) -> Self {
        Self::new(0x16, register, 0, offset, number.cast_signed())
    }

    /// Leaves out the next `offset` instructions unless the low half of `register` is `number`.
    #[must_use]
    pub const fn skip_unless(register: Register, number: u32, offset: i16) -> Self {
        Self::new(0x56, register, 0, offset, number.cast_signed())
    }

    /// Leaves out the next `offset` instructions unless `register`, a pointer, is 0.
    #[must_use]
    pub const fn skip_unless_null(register: Register, offset: i16) -> Self {
        Self::new(0x55, register, 0, offset, 0)
    }

    /// `r0 = callee(r1, …)`.
    #[must_use]
    pub const fn call(callee: Callee) -> Self {
        match callee {
            Callee::Helper(number) => Self::new(0x85, Register::R0, 0, 0, number),
            Callee::Kernel(number) => Self::new(0x85, Register::R0, 2, 0, number.cast_signed()),
        }
    }

    /// `dst` = the map: two instructions.
    #[must_use]
    pub fn map(dst: Register, map: &Map) -> [Self; 2] {
        let none = Self::new(0, Register::R0, 0, 0, 0);
        [Self::new(0x18, dst, 1, 0, map.fd.as_raw_fd()), none]
    }

    /// Returns r0.
    #[must_use]
    pub const fn exit() -> Self {
        Self::new(0x95, Register::R0, 0, 0, 0)
    }
}

/// A kind of map.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_HASH`.
    Hash = 1,
    /// `BPF_MAP_TYPE_SOCKMAP`: sockets, by their place in it. Listeners since Linux 5.7.
    Sockets = 15,
}

/// A map, with keys and values of fixed lengths.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key: usize,
    value: usize,
}

impl Map {
    /// A map of at most so many elements.
    ///
    /// # Errors
    /// EPERM without CAP_BPF and CAP_NET_ADMIN in the first user namespace, ENOSYS and EINVAL where the kernel lacks it.
    pub fn new(kind: MapKind, key: usize, value: usize, most: u32) -> SysResult<Self> {
        const CALL: &str = "create a BPF map";
        #[repr(C)]
        struct Attributes {
            kind: u32,
            key: u32,
            value: u32,
            most: u32,
            flags: u32,
        }
        let length =
            |len: usize| u32::try_from(len).map_err(|_| SysError { call: CALL, errno: Errno::E2BIG });
        let attributes =
            Attributes { kind: kind as u32, key: length(key)?, value: length(value)?, most, flags: 0 };
        Ok(Self { fd: owned(CALL, bpf(CALL, Command::MapCreate, &attributes)?)?, key, value })
    }

    /// Adds or replaces an element.
    ///
    /// # Errors
    /// E2BIG: the map is full. Of a map of sockets: what the kernel says of the socket.
    pub fn insert(&self, key: &[u8], value: &[u8]) -> SysResult<()> {
        self.element(
            "put an element into a BPF map",
            Command::MapUpdate,
            key,
            value.as_ptr().cast_mut(),
            value.len(),
        )
    }

    /// Reads an element.
    ///
    /// # Errors
    /// ENOENT.
    pub fn read(&self, key: &[u8], value: &mut [u8]) -> SysResult<()> {
        self.element("read an element of a BPF map", Command::MapLookUp, key, value.as_mut_ptr(), value.len())
    }

    /// Removes an element.
    ///
    /// # Errors
    /// ENOENT.
    pub fn remove(&self, key: &[u8]) -> SysResult<()> {
        self.element(
            "remove an element of a BPF map",
            Command::MapDelete,
            key,
            std::ptr::null_mut(),
            self.value,
        )
    }

    fn element(
        &self,
        call: &'static str,
        command: Command,
        key: &[u8],
        value: *mut u8,
        value_len: usize,
    ) -> SysResult<()> {
        #[repr(C)]
        struct Attributes {
            map: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        if (key.len(), value_len) != (self.key, self.value) {
            return Err(SysError { call, errno: Errno::EINVAL });
        }
        let attributes = Attributes {
            map: self.fd.as_raw_fd().cast_unsigned(),
            padding: 0,
            key: address(key.as_ptr()),
            value: address(value),
            flags: 0,
        };
        bpf(call, command, &attributes).map(drop)
    }
}

/// A program that was loaded.
#[derive(Debug)]
pub struct Program(OwnedFd);

impl Program {
    /// Loads a program that looks at packets (`BPF_PROG_TYPE_SCHED_CLS`).
    ///
    /// # Errors
    /// EPERM without CAP_BPF and CAP_NET_ADMIN in the first user namespace; EINVAL and EACCES for what the kernel's
    /// verifier refuses, which is also what an older kernel does with what it does not know.
    pub fn of_packets(instructions: &[Insn]) -> SysResult<Self> {
        const SCHED_CLS: u32 = 3;
        Self::load("load a BPF program of packets", SCHED_CLS, instructions)
    }

    /// Loads a program that hears of what becomes of sockets, and has a say in it (`BPF_PROG_TYPE_SOCK_OPS`).
    ///
    /// # Errors
    /// As [`Program::of_packets`].
    pub fn of_socket_events(instructions: &[Insn]) -> SysResult<Self> {
        const SOCK_OPS: u32 = 13;
        Self::load("load a BPF program of socket events", SOCK_OPS, instructions)
    }

    fn load(call: &'static str, kind: u32, instructions: &[Insn]) -> SysResult<Self> {
        /// The verifier leaves off where a signal waits for the thread.
        const TRIES: usize = 5;
        #[repr(C)]
        struct Attributes {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
        }
        let count = u32::try_from(instructions.len()).map_err(|_| SysError { call, errno: Errno::E2BIG })?;
        let attributes = Attributes {
            kind,
            count,
            instructions: address(instructions.as_ptr()),
            license: address(c"Dual MIT/GPL".as_ptr()),
        };
        let load = || bpf(call, Command::ProgramLoad, &attributes);
        let mut loaded = load();
        for _ in 1..TRIES {
            if !matches!(loaded, Err(SysError { errno: Errno::EAGAIN, .. })) {
                break;
            }
            loaded = load();
        }
        Ok(Self(owned(call, loaded?)?))
    }

    /// Shows it what arrives at an interface of the calling thread's network namespace (tcx, Linux 6.6), as long as the
    /// answer is open.
    ///
    /// # Errors
    /// EINVAL on an older kernel, EPERM without CAP_NET_ADMIN.
    pub fn attach_to_ingress(&self, interface: u32) -> SysResult<OwnedFd> {
        const TCX_INGRESS: u32 = 46;
        self.attach("attach a BPF program to an interface", interface, TCX_INGRESS)
    }

    /// Has it hear of the sockets of a control group, and of all below (Linux 5.7), as long as the answer is open.
    ///
    /// # Errors
    /// EINVAL on an older kernel, EPERM without CAP_NET_ADMIN.
    pub fn attach_to_group(&self, group: BorrowedFd<'_>) -> SysResult<OwnedFd> {
        const CGROUP_SOCK_OPS: u32 = 3;
        let group = group.as_raw_fd().cast_unsigned();
        self.attach("attach a BPF program to a control group", group, CGROUP_SOCK_OPS)
    }

    fn attach(&self, call: &'static str, target: u32, place: u32) -> SysResult<OwnedFd> {
        #[repr(C)]
        struct Attributes {
            program: u32,
            target: u32,
            place: u32,
            flags: u32,
        }
        let program = self.0.as_raw_fd().cast_unsigned();
        owned(call, bpf(call, Command::LinkCreate, &Attributes { program, target, place, flags: 0 })?)
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// `enum bpf_cmd`.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Command {
    MapCreate = 0,
    MapLookUp = 1,
    MapUpdate = 2,
    MapDelete = 3,
    ProgramLoad = 5,
    LinkCreate = 28,
}

/// Calls bpf(). Attributes that are longer in the kernel are 0 there; each structure here has no padding, and its pointers
/// lead to what the command says, as long as it says.
fn bpf<A>(call: &'static str, command: Command, attributes: &A) -> SysResult<libc::c_long> {
    // SAFETY: the kernel reads `size_of::<A>()` bytes of a live structure; the callers in this module answer for its
    // pointers, whose targets are live for the call and as long as the map's lengths, which they check, or a count says.
    let ret = unsafe {
        libc::syscall(libc::SYS_bpf, command as i32, std::ptr::from_ref(attributes), size_of::<A>())
    };
    if ret < 0 { Err(SysError::last(call)) } else { Ok(ret) }
}

fn owned(call: &'static str, fd: libc::c_long) -> SysResult<OwnedFd> {
    let fd = i32::try_from(fd).map_err(|_| SysError { call, errno: Errno::EBADF })?;
    // SAFETY: a descriptor the kernel just gave us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
