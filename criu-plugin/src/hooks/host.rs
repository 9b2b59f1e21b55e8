//! What the criu process offers a plugin: its log, its image folder, and hints about its version.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::fd::BorrowedFd;

/// "Not mine": CRIU goes on to the next plugin, and does without one where there is none.
pub const ENOTSUP: c_int = -libc::ENOTSUP;

/// What criu does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `criu dump`.
    Dump,
    /// `criu restore`.
    Restore,
}

impl Stage {
    /// CRIU's number; `None` for stages in which connections are left alone (pre-dump).
    #[must_use]
    pub fn from_criu(stage: i32) -> Option<Self> {
        match stage {
            0 => Some(Self::Dump),
            2 => Some(Self::Restore),
            _ => None,
        }
    }
}

/// A symbol of the host program; looked up by hand, since a host that lacks one must still load the plugin.
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a lookup by a NUL-terminated name.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Writes one line to CRIU's log, or to stderr in a host without one.
pub fn print(level: log::Level, text: &str) {
    type PrintOnLevel = unsafe extern "C" fn(c_uint, *const c_char, ...);
    let criu_level = match level {
        log::Level::Error => 1,
        log::Level::Warn => 2,
        log::Level::Info => 3,
        log::Level::Debug | log::Level::Trace => 4,
    };
    let line = CString::new(text.replace('\0', "?")).unwrap_or_default();
    let Some(print) = symbol(c"print_on_level") else {
        eprintln!("soccr: {text}");
        return;
    };
    // SAFETY: CRIU's `void print_on_level(unsigned int, const char *format, ...)`.
    let print: PrintOnLevel = unsafe { std::mem::transmute(print) };
    let prefix = match level {
        log::Level::Error => c"Error",
        log::Level::Warn => c"Warn ",
        _ => c"",
    };
    let format = if prefix.is_empty() { c"%ssoccr: %s\n" } else { c"%s (soccr): %s\n" };
    // SAFETY: the format takes two strings, and both are NUL-terminated and live.
    unsafe { print(criu_level, format.as_ptr(), prefix.as_ptr(), line.as_ptr()) };
}

/// What CRIU's log takes; everything, in a host that does not say.
#[must_use]
pub fn log_level() -> log::LevelFilter {
    let Some(found) = symbol(c"log_get_loglevel") else { return log::LevelFilter::Debug };
    // SAFETY: CRIU's `unsigned int log_get_loglevel(void)`.
    let get: unsafe extern "C" fn() -> c_uint = unsafe { std::mem::transmute(found) };
    // SAFETY: no arguments.
    match unsafe { get() } {
        0 | 1 => log::LevelFilter::Error,
        2 => log::LevelFilter::Warn,
        3 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    }
}

/// The folder that CRIU writes its images to or reads them from.
#[must_use]
pub fn image_dir() -> Option<BorrowedFd<'static>> {
    let found = symbol(c"criu_get_image_dir")?;
    // SAFETY: CRIU's `int criu_get_image_dir(void)`.
    let get: unsafe extern "C" fn() -> c_int = unsafe { std::mem::transmute(found) };
    // SAFETY: no arguments.
    let fd = unsafe { get() };
    // SAFETY: CRIU keeps this descriptor open while plugins are loaded.
    (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
}

/// CRIU's lists of plugins: one list head for all, and one for each hook.
#[must_use]
pub fn plugin_lists() -> Option<*mut c_void> {
    symbol(c"cr_plugin_ctl")
}

/// How many hooks this CRIU has, read from the size of its table of hook chains: one list head for the plugins
/// and one for each hook.
#[must_use]
pub fn hook_count() -> Option<c_uint> {
    let table = plugin_lists()?;
    let list_head = 2 * size_of::<usize>();
    let heads = symbol_size(table)? / list_head;
    heads.checked_sub(1).and_then(|hooks| c_uint::try_from(hooks).ok())
}

/// The size that the symbol table gives for an object of the host.
fn symbol_size(address: *const c_void) -> Option<usize> {
    const RTLD_DL_SYMENT: c_int = 1;
    unsafe extern "C" {
        fn dladdr1(
            addr: *const c_void,
            info: *mut libc::Dl_info,
            extra: *mut *mut c_void,
            flags: c_int,
        ) -> c_int;
    }
    // SAFETY: Dl_info is plain pointers.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    let mut entry: *mut c_void = std::ptr::null_mut();
    // SAFETY: glibc fills both results, whose types these flags ask for.
    let found = unsafe { dladdr1(address, &raw mut info, &raw mut entry, RTLD_DL_SYMENT) };
    if found == 0 || entry.is_null() || !std::ptr::eq(info.dli_saddr, address) {
        return None;
    }
    #[cfg(target_pointer_width = "64")]
    // SAFETY: the loader's own, permanent symbol table entry.
    let size = unsafe { (*entry.cast::<libc::Elf64_Sym>()).st_size };
    #[cfg(target_pointer_width = "32")]
    // SAFETY: as above.
    let size = unsafe { (*entry.cast::<libc::Elf32_Sym>()).st_size };
    usize::try_from(size).ok()
}

/// Whether CRIU means to let the tasks run on after a dump (`--leave-running`). A hint: the first `int` of CRIU's
/// options was the tasks' final state in every version so far.
#[must_use]
#[allow(unsafe_code)]
pub fn tasks_stay_alive() -> bool {
    const TASK_ALIVE: c_int = 1;
    // SAFETY: `opts` is a structure of CRIU, larger than an int.
    symbol(c"opts").is_some_and(|opts| unsafe { opts.cast::<c_int>().read() } == TASK_ALIVE)
}

/// Keeps this library in memory after CRIU unloads it, and has `at_exit` called when criu's process ends by exit().
///
/// # Errors
/// When the loader does not find the library that this code is in.
pub fn pin(at_exit: extern "C" fn()) -> Result<(), &'static str> {
    // SAFETY: Dl_info is plain pointers.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: an address in this library; the result outlives the library's mapping only by name, used at once.
    let handle = unsafe {
        if libc::dladdr(pin as *const c_void, &raw mut info) == 0 {
            return Err("the loader does not know the plugin");
        }
        libc::dlopen(info.dli_fname, libc::RTLD_LAZY | libc::RTLD_NODELETE | libc::RTLD_NOLOAD)
    };
    // SAFETY: registers a function of a library that is never unloaded from here on.
    if handle.is_null() || unsafe { libc::atexit(at_exit) } != 0 {
        return Err("the plugin cannot be pinned in memory");
    }
    Ok(())
}
