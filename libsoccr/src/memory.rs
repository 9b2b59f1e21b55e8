//! Memory that changes hands between the library and a C program.

use std::mem::{MaybeUninit, replace, size_of};
use std::ptr::{NonNull, null_mut, slice_from_raw_parts_mut};

/// A pointer to memory of C's allocator, or of the caller, with the knowledge of who frees it.
pub struct Slot<T> {
    ptr: *mut T,
    ours: bool,
}

impl<T> Slot<T> {
    /// A slot with nothing in it.
    pub const EMPTY: Self = Self { ptr: null_mut(), ours: false };

    /// What is in the slot, NULL if nothing; with `exclusive` the slot gives it up.
    pub fn get(&mut self, exclusive: bool) -> *mut T {
        if !exclusive {
            return self.ptr;
        }
        self.ours = false;
        replace(&mut self.ptr, null_mut())
    }

    /// What is in the slot.
    pub fn as_ptr(&self) -> Option<NonNull<T>> {
        NonNull::new(self.ptr)
    }

    /// Puts `ptr` into the slot and frees what the library owned there before. Memory that the library owns
    /// already stays its own.
    ///
    /// # Safety
    /// With `exclusive`, `ptr` comes from malloc() and nobody else frees it; otherwise it outlives its use.
    pub unsafe fn set(&mut self, ptr: *mut T, exclusive: bool) {
        if ptr == self.ptr {
            self.ours |= exclusive;
        } else {
            *self = Self { ptr, ours: exclusive };
        }
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        if self.ours {
            // SAFETY: `ours` says that it came from malloc() and that the library is to free it.
            unsafe { libc::free(self.ptr.cast()) };
        }
    }
}

/// A copy of `value` in memory of C's allocator; `None` without memory.
pub fn allocated<T: Copy>(value: T) -> Option<Slot<T>> {
    // SAFETY: malloc() has no precondition; its memory is aligned for any C type.
    let ptr = NonNull::new(unsafe { libc::malloc(size_of::<T>()) }.cast::<T>())?;
    // SAFETY: just allocated with that size.
    unsafe { ptr.write(value) };
    Some(Slot { ptr: ptr.as_ptr(), ours: true })
}

/// Room for bytes in memory of C's allocator.
pub struct Room {
    slot: Slot<libc::c_char>,
    len: usize,
}

/// What the kernel maps at once where it can, on most machines.
const HUGE_PAGE: usize = 2 << 20;

impl Room {
    /// Room for `len` bytes, at least one; `None` without memory.
    pub fn new(len: usize) -> Option<Self> {
        let ptr = if len < HUGE_PAGE { small(len) } else { large(len) }?;
        Some(Self { slot: Slot { ptr: ptr.as_ptr().cast(), ours: true }, len })
    }

    /// The room, to be written to.
    pub fn bytes(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: `new` allocated `len` bytes, which may be uninitialised; the borrow is unique.
        unsafe { &mut *slice_from_raw_parts_mut(self.slot.ptr.cast(), self.len) }
    }

    /// The memory, now that it is filled.
    pub fn into_slot(self) -> Slot<libc::c_char> {
        self.slot
    }
}

fn small(len: usize) -> Option<NonNull<libc::c_void>> {
    // SAFETY: malloc() has no precondition.
    NonNull::new(unsafe { libc::malloc(len) })
}

/// Filling large memory costs most of its time in page faults, one for each 4 KiB: huge pages are asked for, and what is
/// to be filled is mapped by one call.
fn large(len: usize) -> Option<NonNull<libc::c_void>> {
    let mut ptr = null_mut();
    // SAFETY: `ptr` is written to; the alignment is a power of two and a multiple of a pointer's size.
    if unsafe { libc::posix_memalign(&raw mut ptr, HUGE_PAGE, len) } != 0 {
        return None;
    }
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
        // SAFETY: the memory is ours and page-aligned. A refusal changes nothing but the speed.
        unsafe { libc::madvise(ptr, len, advice) };
    }
    NonNull::new(ptr)
}
