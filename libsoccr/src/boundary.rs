//! What no call lets through to C: a panic, or a failure without errno and a message.

use std::error::Error;
use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::checkpoint::QueueError;
use engine::forge::ForgeError;
use engine::kernel::SysError;
use libc::c_int;
use nix::errno::Errno;

/// Runs a call's body; if it panics, the call fails with `on_panic`.
///
/// A handle is never left half changed by that: its parts are replaced whole.
pub fn guarded<T>(on_panic: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        // The panic hook has told the details; a message that panics again must not get out either.
        let _ = catch_unwind(|| log::error!("internal error: please report it"));
        Errno::ENOTRECOVERABLE.set();
        on_panic
    })
}

/// Reports arguments that break the contract; returns what most calls answer then.
pub fn refuse(what: &str) -> c_int {
    log::error!("{what}");
    Errno::EINVAL.set();
    -1
}

/// Reports a failure and leaves its cause in errno, whatever the log function does to it.
pub fn report(what: &str, error: &(dyn Error + 'static)) {
    log::error!("{what}: {}", engine::chain(error));
    errno_of(error).unwrap_or(Errno::EINVAL).set();
}

/// The system call's error in a chain of errors.
fn errno_of(mut error: &(dyn Error + 'static)) -> Option<Errno> {
    loop {
        if let Some(errno) = own_errno(error) {
            return Some(errno);
        }
        error = error.source()?;
    }
}

/// Errors that only pass a system call's on name the cause of that one, not itself, as their source.
fn own_errno(error: &(dyn Error + 'static)) -> Option<Errno> {
    if let Some(sys) = error.downcast_ref::<SysError>() {
        return Some(sys.errno);
    }
    match error.downcast_ref() {
        Some(QueueError::Sys(sys)) => return Some(sys.errno),
        Some(QueueError::Memory(_)) => return Some(Errno::ENOMEM),
        _ => {}
    }
    if let Some(ForgeError::Sys(sys)) = error.downcast_ref() {
        return Some(sys.errno);
    }
    None
}
