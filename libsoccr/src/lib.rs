//! libsoccr: the C interface to the engine, call for call that of CRIU's own libsoccr.
//!
//! Here are the exported functions and nothing else: each checks its pointers and hands over to the handle
//! (module `handle`) inside a panic boundary (module `boundary`). `scripts/header` writes `include/soccr.h` from
//! these signatures and comments, so the comments speak to C programmers.

#![allow(clippy::missing_safety_doc)] // the header's comments say what a C caller must keep

mod address;
mod boundary;
mod data;
mod handle;
mod memory;
mod sink;

use libc::{c_char, c_int, c_uint};

pub use address::libsoccr_addr;
pub use data::{SOCCR_FLAGS_WINDOW, libsoccr_sk_data};
pub use handle::libsoccr_sk;
pub use sink::{SOCCR_LOG_DBG, SOCCR_LOG_ERR};

use boundary::guarded;
use handle::SaveFailure;

/// Packets with this mark (0xC114) must pass whatever blocks a connection's packets: the
/// segments that the library forges to bring a FIN into a receive queue carry it.
pub const SOCCR_MARK: c_int = 0xC114;

/// In a call's flags: the memory changes owner. What is got must be free()d by the caller; what
/// is set is free()d by the library, whatever comes of the handle. A call that fails takes
/// nothing.
pub const SOCCR_MEM_EXCL: c_uint = 0x1;

/// Sets where messages go: log is called like printf(), for messages of at most this level. The
/// text ends with a newline. Without log, or at level 0, there are no messages.
#[unsafe(no_mangle)]
pub extern "C" fn libsoccr_set_log(
    level: c_uint,
    log: Option<unsafe extern "C" fn(level: c_uint, fmt: *const c_char, ...)>,
) {
    guarded((), || sink::set(level, log));
}

/// Puts a TCP socket into repair mode, in which the calls below work and closing it is silent.
/// The descriptor stays the caller's and must stay open as long as the handle is in use. NULL
/// on failure, with errno set; needs CAP_NET_ADMIN in the socket's network namespace.
#[unsafe(no_mangle)]
pub extern "C" fn libsoccr_pause(fd: c_int) -> *mut libsoccr_sk {
    guarded(std::ptr::null_mut(), || libsoccr_sk::pause(fd).map_or(std::ptr::null_mut(), Box::into_raw))
}

/// Leaves repair mode, which wakes the connection, and frees the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_resume(sk: *mut libsoccr_sk) {
    // SAFETY: the contract: NULL, or a handle from libsoccr_pause that is not used after this.
    guarded((), || unsafe { owned(sk) }.into_iter().for_each(|sk| sk.resume()));
}

/// Frees the handle and leaves the socket in repair mode.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_release(sk: *mut libsoccr_sk) {
    // SAFETY: the contract: NULL, or a handle from libsoccr_pause that is not used after this.
    guarded((), || unsafe { owned(sk) }.into_iter().for_each(|sk| sk.release()));
}

/// Reads the connection into data and copies both queues into the handle. data_size is the size
/// of the caller's data, at least 68; all of it is zeroed first. Returns the number of bytes
/// filled in (68) or a negative number:
///   -1 bad arguments
///   -2 the state cannot be carried, or the lengths of the queues cannot be read
///   -3 the negotiated options cannot be read
///   -4 the windows cannot be read
///   -5 the receive queue cannot be read
///   -6 the send queue cannot be read
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_save(
    sk: *mut libsoccr_sk,
    data: *mut libsoccr_sk_data,
    data_size: c_uint,
) -> c_int {
    guarded(SaveFailure::Arguments as c_int, || {
        // SAFETY: the contract: NULL or a live handle; NULL or `data_size` writable bytes.
        let (Some(sk), Some(data)) = (unsafe { sk.as_mut() }, unsafe { data::zeroed(data, data_size) })
        else {
            boundary::refuse("libsoccr_save: a NULL pointer or data_size below 68");
            return SaveFailure::Arguments as c_int;
        };
        match sk.save() {
            Ok(saved) => {
                *data = saved;
                data::SIZE
            }
            Err(failure) => failure as c_int,
        }
    })
}

/// The bytes of a queue, TCP_RECV_QUEUE (data.inq_len of them) or TCP_SEND_QUEUE
/// (data.outq_len). NULL for an empty queue, any other queue_id, and unknown flags. They stay
/// the library's and die with the handle, unless flags has SOCCR_MEM_EXCL: then they are the
/// caller's, and the handle has none any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_get_queue_bytes(
    sk: *mut libsoccr_sk,
    queue_id: c_int,
    flags: c_uint,
) -> *mut c_char {
    guarded(std::ptr::null_mut(), || {
        // SAFETY: the contract: NULL or a live handle.
        let sk = unsafe { sk.as_mut() };
        let Some((sk, exclusive)) = sk.zip(exclusive(flags)) else {
            boundary::refuse("libsoccr_get_queue_bytes: a NULL handle or unknown flags");
            return std::ptr::null_mut();
        };
        sk.queue(queue_id).map_or(std::ptr::null_mut(), |queue| queue.get(exclusive))
    })
}

/// The address of one end: the source (ours) if source is not 0, otherwise the destination (the
/// peer's). It is the one that was set, or else the socket's own. NULL for a socket without
/// that address and for unknown flags. It stays the library's and dies with the handle, unless
/// flags has SOCCR_MEM_EXCL: then it is a copy that the caller must free().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_get_addr(
    sk: *mut libsoccr_sk,
    source: c_int,
    flags: c_uint,
) -> *mut libsoccr_addr {
    guarded(std::ptr::null_mut(), || {
        // SAFETY: the contract: NULL or a live handle.
        let sk = unsafe { sk.as_mut() };
        let Some((sk, exclusive)) = sk.zip(exclusive(flags)) else {
            boundary::refuse("libsoccr_get_addr: a NULL handle or unknown flags");
            return std::ptr::null_mut();
        };
        sk.address(source != 0, exclusive)
    })
}

/// Gives the bytes of a queue for libsoccr_restore(), as many as its data will say; NULL for an
/// empty queue. They must live until libsoccr_restore() is through, unless flags has
/// SOCCR_MEM_EXCL: then they must come from malloc() and are the library's. 0, or -1 for
/// another queue_id or unknown flags.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_set_queue_bytes(
    sk: *mut libsoccr_sk,
    queue_id: c_int,
    bytes: *mut c_char,
    flags: c_uint,
) -> c_int {
    guarded(-1, || {
        // SAFETY: the contract: NULL or a live handle.
        let sk = unsafe { sk.as_mut() };
        let Some((queue, exclusive)) = sk.and_then(|sk| sk.queue(queue_id)).zip(exclusive(flags)) else {
            return boundary::refuse(
                "libsoccr_set_queue_bytes: a NULL handle, no such queue or unknown flags",
            );
        };
        // SAFETY: the contract: what comes with SOCCR_MEM_EXCL comes from malloc() and is the library's now.
        unsafe { queue.set(bytes, exclusive) };
        0
    })
}

/// Gives the address of one end for libsoccr_restore(): the source (ours) if source is not 0,
/// otherwise the destination. It must live until libsoccr_restore() is through, unless flags
/// has SOCCR_MEM_EXCL: then it must come from malloc() and is the library's. 0, or -1 for NULL
/// or unknown flags.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_set_addr(
    sk: *mut libsoccr_sk,
    source: c_int,
    addr: *mut libsoccr_addr,
    flags: c_uint,
) -> c_int {
    guarded(-1, || {
        // SAFETY: the contract: NULL or a live handle.
        let sk = unsafe { sk.as_mut() };
        let Some((sk, exclusive)) = sk.zip(exclusive(flags)).filter(|_| !addr.is_null()) else {
            return boundary::refuse("libsoccr_set_addr: a NULL pointer or unknown flags");
        };
        // SAFETY: the contract: what comes with SOCCR_MEM_EXCL comes from malloc() and is the library's now.
        unsafe { sk.end(source != 0).set(addr, exclusive) };
        0
    })
}

/// Builds the connection in the handle's socket, which must be fresh: not bound and not
/// connected. Its buffers keep their sizes, whether the queues fit in or not. data is only read;
/// data_size is its size, at least 68. The socket stays in repair mode. 0, or a negative number:
/// then the socket is good for nothing but close().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn libsoccr_restore(
    sk: *mut libsoccr_sk,
    data: *mut libsoccr_sk_data,
    data_size: c_uint,
) -> c_int {
    guarded(-1, || {
        // SAFETY: the contract: NULL or a live handle; NULL or `data_size` readable bytes.
        let (Some(sk), Some(data)) = (unsafe { sk.as_mut() }, unsafe { data::read(data, data_size) }) else {
            return boundary::refuse("libsoccr_restore: a NULL pointer or data_size below 68");
        };
        // SAFETY: the contract: what was set lives, and is as long as `data` says.
        if unsafe { sk.restore(&data) } { 0 } else { -1 }
    })
}

/// Takes a handle back from the caller.
///
/// # Safety `sk` is NULL or came from `libsoccr_pause` and is not used again.
unsafe fn owned(sk: *mut libsoccr_sk) -> Option<Box<libsoccr_sk>> {
    // SAFETY: `libsoccr_pause` made it with Box::into_raw; the caller gives it up.
    (!sk.is_null()).then(|| unsafe { Box::from_raw(sk) })
}

/// Whether SOCCR_MEM_EXCL is among the flags; `None` when others are, too.
fn exclusive(flags: c_uint) -> Option<bool> {
    (flags & !SOCCR_MEM_EXCL == 0).then_some(flags & SOCCR_MEM_EXCL != 0)
}
