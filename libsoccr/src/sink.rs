//! The program's printf-like log function, fed from the `log` macros of this crate and of the engine.

use std::ffi::CString;
use std::sync::{PoisonError, RwLock};

use libc::{c_char, c_uint};
use log::{LevelFilter, Log, Metadata, Record};

/// Level of messages about what went wrong.
pub const SOCCR_LOG_ERR: c_uint = 1;
/// Level of messages about what is being done.
pub const SOCCR_LOG_DBG: c_uint = 2;

type Printf = unsafe extern "C" fn(level: c_uint, fmt: *const c_char, ...);

static PRINTF: RwLock<Option<Printf>> = RwLock::new(None);

/// Sends messages of at most this level to `printf`; the others are not even formatted.
pub fn set(level: c_uint, printf: Option<Printf>) {
    *PRINTF.write().unwrap_or_else(PoisonError::into_inner) = printf;
    // Fails from the second call on: the logger is in place then.
    let _ = log::set_logger(&Sink);
    log::set_max_level(match (printf, level) {
        (None, _) | (_, 0) => LevelFilter::Off,
        (_, SOCCR_LOG_ERR) => LevelFilter::Warn,
        _ => LevelFilter::Debug,
    });
}

struct Sink;

impl Log for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        // Copied out, so that the function may call libsoccr_set_log().
        let Some(printf) = *PRINTF.read().unwrap_or_else(PoisonError::into_inner) else { return };
        if !self.enabled(record.metadata()) {
            return;
        }
        let (level, kind) = match record.level() {
            log::Level::Error => (SOCCR_LOG_ERR, "Error"),
            log::Level::Warn => (SOCCR_LOG_ERR, "Warning"),
            _ => (SOCCR_LOG_DBG, "Debug"),
        };
        let Ok(text) = CString::new(format!("{kind} (libsoccr): {}", record.args())) else { return };
        // SAFETY: `%s` takes one string, which lives for the call.
        unsafe { printf(level, c"%s\n".as_ptr(), text.as_ptr()) };
    }

    fn flush(&self) {}
}
