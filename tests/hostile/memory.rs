//! Counts memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What reading may take beyond the size of what is read.
pub const ALLOWANCE: u64 = 16 << 20;

/// Counts the bytes that each thread has allocated, and their maximum.
struct Counting;

thread_local! {
    static USED: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    USED.set(USED.get() + bytes);
    PEAK.set(PEAK.get().max(USED.get()));
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller keeps alloc()'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller keeps dealloc()'s contract; `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most memory that `work` held at a time, in bytes.
pub fn peak_of(work: impl FnOnce()) -> u64 {
    let before = USED.get();
    PEAK.set(before);
    work();
    u64::try_from(PEAK.get() - before).unwrap()
}
