//! CRIU's plugin interface, version 0.2, as CRIU 4.0 to 4.2 load it (`criu-plugin.h`).

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::host::{self, Stage};
use super::{order, session};
use crate::fault;

/// The number of hooks of CRIU 4.0; each later version has at least these.
const HOOKS_OF_4_0: c_uint = 12;
/// Of CRIU 4.2.
pub const HOOKS: usize = 13;

const DUMP_EXT_FILE: usize = 2;
const RESTORE_EXT_FILE: usize = 3;
const RESUME_DEVICES_LATE: usize = 9;
const CHECKPOINT_DEVICES: usize = 11;
const POST_FORKING: usize = 12;

/// `cr_plugin_desc_t`.
#[repr(C)]
pub struct PluginDesc {
    name: *const c_char,
    init: extern "C" fn(c_int) -> c_int,
    exit: extern "C" fn(c_int, c_int),
    version: c_uint,
    max_hooks: c_uint,
    hooks: [*const c_void; HOOKS],
}
const _: () = {
    assert!(offset_of!(PluginDesc, init) == size_of::<usize>());
    assert!(offset_of!(PluginDesc, version) == 3 * size_of::<usize>());
    assert!(offset_of!(PluginDesc, max_hooks) == 3 * size_of::<usize>() + 4);
    assert!(offset_of!(PluginDesc, hooks) == 3 * size_of::<usize>() + 8);
    assert!(HOOKS_OF_4_0 as usize > CHECKPOINT_DEVICES);
};

// SAFETY: CRIU is single-threaded where it reads the descriptor, and nobody writes it after init().
unsafe impl Sync for PluginDesc {}

impl PluginDesc {
    const fn ours() -> Self {
        Self {
            name: c"soccr".as_ptr(),
            init,
            exit,
            version: 2 << 8, // 0.2.0
            max_hooks: HOOKS_OF_4_0,
            hooks: hooks(),
        }
    }

    /// Whether the plugin has this hook.
    pub fn has(&self, hook: usize) -> bool {
        let count = usize::try_from(self.max_hooks).unwrap_or(0).min(HOOKS);
        self.hooks[..count].get(hook).is_some_and(|hook| !hook.is_null())
    }
}

const fn hooks() -> [*const c_void; HOOKS] {
    let mut hooks = [std::ptr::null(); HOOKS];
    hooks[DUMP_EXT_FILE] = dump_ext_file as *const c_void;
    hooks[RESTORE_EXT_FILE] = restore_ext_file as *const c_void;
    hooks[RESUME_DEVICES_LATE] = resume_devices_late as *const c_void;
    hooks[CHECKPOINT_DEVICES] = checkpoint_devices as *const c_void;
    hooks[POST_FORKING] = post_forking as *const c_void;
    hooks
}

/// What CRIU looks up in the library.
#[allow(missing_docs)]
#[unsafe(no_mangle)]
pub static mut CR_PLUGIN_DESC: PluginDesc = PluginDesc::ours();

/// What it finds where we stand before others ([`order`]).
static FIRST: PluginDesc = PluginDesc::ours();

/// CRIU refuses a plugin with more hooks than it knows itself, and reads the descriptor before it calls init(). So
/// the loader runs this first and offers POST_FORKING only to a CRIU that has it.
#[used]
#[unsafe(link_section = ".init_array")]
static FIT_HOST: extern "C" fn() = fit_host;

extern "C" fn fit_host() {
    let known = host::hook_count().filter(|_| fault::point("hook.count").is_ok()).unwrap_or(HOOKS_OF_4_0);
    if let Ok(most) = c_uint::try_from(HOOKS) {
        // SAFETY: the loader runs this before anybody can look the symbol up.
        unsafe { CR_PLUGIN_DESC.max_hooks = known.clamp(HOOKS_OF_4_0, most) };
    }
}

/// Whether this CRIU has POST_FORKING.
fn has_post_forking() -> bool {
    known_hooks() > POST_FORKING
}

/// How many of the hooks this CRIU has.
fn known_hooks() -> usize {
    // SAFETY: written by the loader only, before anybody calls.
    usize::try_from(unsafe { CR_PLUGIN_DESC.max_hooks }).unwrap_or(0)
}

/// A panic ends as an error code at this boundary.
fn guarded(failure: c_int, body: impl FnOnce() -> c_int) -> c_int {
    guarded_or(|| failure, body)
}

/// As [`guarded`], where a failure takes more than a number.
fn guarded_or(failure: impl FnOnce() -> c_int, body: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        host::print(log::Level::Error, "the plugin panicked");
        failure()
    })
}

extern "C" fn init(stage: c_int) -> c_int {
    guarded(-1, || {
        let Some(stage) = Stage::from_criu(stage) else { return 0 };
        if let Err(error) = stand_first() {
            host::print(log::Level::Error, &format!("cannot stand before the other plugins: {error}"));
            return -1;
        }
        let result = session::begin(stage, has_post_forking(), at_exit);
        if result != 0 {
            order::leave();
        }
        result
    })
}

/// Before the plugins that are loaded already; CRIU adds us behind them after init(), for the hooks that we still have.
fn stand_first() -> Result<(), &'static str> {
    let Some(lists) = host::plugin_lists() else { return Ok(()) };
    let (mut left, known) = (hooks(), known_hooks());
    for (hook, entry) in left.iter_mut().enumerate().take(known).filter(|(_, entry)| !entry.is_null()) {
        // SAFETY: CRIU has a list for each hook that it knows.
        if unsafe { order::stand_first(lists, hook, &raw const FIRST) }? {
            *entry = std::ptr::null();
        }
    }
    // SAFETY: in init(), before CRIU reads them.
    unsafe { CR_PLUGIN_DESC.hooks = left };
    Ok(())
}

extern "C" fn exit(stage: c_int, ret: c_int) {
    guarded(0, || {
        if Stage::from_criu(stage).is_some() {
            session::end(ret);
            order::leave();
        }
        0
    });
}

extern "C" fn checkpoint_devices(pid: c_int) -> c_int {
    guarded(-1, || session::checkpoint(pid))
}

extern "C" fn post_forking() -> c_int {
    guarded(-1, session::post_forking)
}

extern "C" fn resume_devices_late(pid: c_int) -> c_int {
    let failure = || {
        session::fail_task(pid); // CRIU ignores the number
        -1
    };
    guarded_or(failure, || session::resume(pid))
}

extern "C" fn dump_ext_file(fd: c_int, id: c_int) -> c_int {
    guarded(-1, || session::dump_file(fd, id))
}

extern "C" fn restore_ext_file(id: c_int) -> c_int {
    guarded(-1, || session::restore_file(id))
}

/// Runs when the criu process ends by exit().
extern "C" fn at_exit() {
    guarded(0, || {
        session::settle();
        0
    });
}
