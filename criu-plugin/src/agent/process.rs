//! Makes the copy of criu that a fork is a process of its own.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{chdir, setsid};

/// Leaves criu's session, folder, descriptors and signal handlers behind; `keep` are the descriptors that stay.
pub fn detach(keep: impl Iterator<Item = RawFd>) {
    let _ = setsid();
    let _ = prctl::set_name(c"soccr-agent");
    let _ = chdir("/");
    keep_only(keep);
    default_signals();
}

/// Closes all of criu's descriptors but these, and opens /dev/null as the standard ones.
#[allow(unsafe_code)]
fn keep_only(keep: impl Iterator<Item = RawFd>) {
    let mut keep: Vec<u32> = keep.filter_map(|fd| u32::try_from(fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 0;
    for fd in keep.iter().copied().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: no memory; the descriptors belong to code that never runs in this process again.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
    if let Ok(null) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let null: OwnedFd = null.into();
        for standard in 0..=2 {
            if !keep.contains(&standard) && null.as_raw_fd().unsigned_abs() != standard {
                // SAFETY: 0 to 2 are free or were opened here.
                unsafe { libc::dup2(null.as_raw_fd(), standard.cast_signed()) };
            }
        }
        if null.as_raw_fd() <= 2 {
            std::mem::forget(null);
        }
    }
}

/// criu's handlers and mask are not ours.
#[allow(unsafe_code)]
fn default_signals() {
    for number in Signal::iterator() {
        // SAFETY: the default action needs no handler. (SIGKILL and SIGSTOP answer EINVAL.)
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
    }
    // SAFETY: as above.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
    // SAFETY: as above. A file that may not grow is an error that names it.
    let _ = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) };
    let _ = SigSet::empty().thread_set_mask();
}
