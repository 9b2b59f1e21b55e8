//! A host that loads the plugin as CRIU does and hands it descriptors one by one, as a CRIU could
//! that takes TCP sockets for external files.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe};
use soccr_testkit::sockets::tcp_sockets;

/// `CR_PLUGIN_STAGE__*`.
#[derive(Clone, Copy)]
enum Stage {
    Dump = 0,
    Restore = 2,
}

/// `CR_PLUGIN_HOOK__*`, those that are called here.
#[derive(Clone, Copy)]
enum Hook {
    DumpExtFile = 2,
    RestoreExtFile = 3,
    CheckpointDevices = 11,
}

/// `cr_plugin_desc_t` up to its hooks.
#[repr(C)]
struct PluginDesc {
    name: *const c_char,
    init: Option<extern "C" fn(c_int) -> c_int>,
    exit: Option<extern "C" fn(c_int, c_int)>,
    version: c_uint,
    max_hooks: c_uint,
    hooks: [*const c_void; 12],
}

unsafe extern "C" {
    /// stdio.h
    fn dprintf(fd: c_int, format: *const c_char, ...) -> c_int;
}

static IMAGES: OnceLock<File> = OnceLock::new();

/// What CRIU offers plugins: the folder of the images.
#[unsafe(no_mangle)]
pub extern "C" fn criu_get_image_dir() -> c_int {
    IMAGES.get().map_or(-1, AsRawFd::as_raw_fd)
}

/// What CRIU offers plugins: its log, here standard error. In C it takes any number of arguments
/// after the format; on the platforms that CRIU runs on, those that are pointers or integers arrive
/// as if there were as many parameters.
///
/// # Safety
/// The format must be a printf format of at most four arguments, all pointers or integers, which
/// follow it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn print_on_level(
    _: c_uint,
    format: *const c_char,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
) {
    // SAFETY: the caller's format describes the caller's arguments, which are passed on as they came;
    // those that it does not mention are not looked at.
    unsafe { dprintf(libc::STDERR_FILENO, format, a, b, c, d) };
}

/// Calls the plugin's hooks for external files, as a CRIU could that takes TCP sockets for such
#[derive(clap::Args)]
pub struct Options {
    plugin: PathBuf,
    /// The folder of the images
    images: PathBuf,
    /// The file's id in the images
    id: i32,
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Freezes PID, dumps its descriptor FD, kills PID
    Dump { pid: i32, fd: i32 },
    /// Restores the file and echoes what comes to its end
    Restore,
}

pub fn run(options: &Options) -> Result<()> {
    IMAGES.set(File::open(&options.images)?).expect("set once");
    let plugin = Plugin::load(&options.plugin)?;
    match options.action {
        Action::Dump { pid, fd } => dump(&plugin, Pid::from_raw(pid), fd, options.id),
        Action::Restore => restore(&plugin, options.id),
    }
}

fn dump(plugin: &Plugin, pid: Pid, fd: i32, id: i32) -> Result<()> {
    freeze(pid)?;
    plugin.init(Stage::Dump)?;
    let saved = plugin.hook_of_int(Hook::CheckpointDevices)?(pid.as_raw());
    ensure!(saved == 0 || saved == -libc::ENOTSUP, "CHECKPOINT_DEVICES returned {saved}");

    let socket =
        tcp_sockets(pid)?.into_iter().find(|socket| socket.number == fd).context("no such socket")?;
    let dump_file = plugin.hook_of_two(Hook::DumpExtFile)?;
    let dumped = dump_file(socket.as_raw_fd(), id);
    ensure!(dumped == 0, "DUMP_EXT_FILE of a TCP connection returned {dumped}");
    drop(socket);
    let (reader, _writer) = pipe()?;
    let refused = dump_file(reader.as_raw_fd(), id + 1);
    ensure!(refused == -libc::ENOTSUP, "DUMP_EXT_FILE of a pipe returned {refused}");

    plugin.exit(Stage::Dump, 0)?;
    kill(pid, Signal::SIGKILL).context("kill")?;
    let end = waitpid(pid, None)?;
    ensure!(matches!(end, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "the task ended with {end:?}");
    Ok(())
}

/// As CRIU does: seized, not stopped by a signal.
fn freeze(pid: Pid) -> Result<()> {
    ptrace::seize(pid, ptrace::Options::empty()).context("PTRACE_SEIZE")?;
    ptrace::interrupt(pid).context("PTRACE_INTERRUPT")?;
    let stop = waitpid(pid, None)?;
    ensure!(matches!(stop, WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(..)), "a stop, not {stop:?}");
    Ok(())
}

fn restore(plugin: &Plugin, id: i32) -> Result<()> {
    plugin.init(Stage::Restore)?;
    let restore_file = plugin.hook_of_int(Hook::RestoreExtFile)?;
    let unknown = restore_file(id + 1);
    ensure!(unknown == -libc::ENOTSUP, "RESTORE_EXT_FILE of an unknown file returned {unknown}");
    let fd = restore_file(id);
    ensure!(fd >= 0, "RESTORE_EXT_FILE returned {fd}");
    // SAFETY: the hook made this descriptor for us, nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    plugin.exit(Stage::Restore, 0)?;
    echo(&TcpStream::from(socket))
}

fn echo(mut stream: &TcpStream) -> Result<()> {
    stream.set_nonblocking(false)?;
    let mut buf = [0; 4096];
    loop {
        match stream.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(len) => stream.write_all(&buf[..len]).context("write")?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read"),
        }
    }
}

/// The loaded plugin.
struct Plugin {
    desc: *const PluginDesc,
}

impl Plugin {
    /// As CRIU does: lazily bound, by its well-known symbol, refused with more hooks than we know.
    fn load(path: &Path) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: a NUL-terminated path. The library's constructors run, as they do in CRIU.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) };
        ensure!(!library.is_null(), "dlopen {}: {}", path.display(), dl_error());
        // SAFETY: an open library and a NUL-terminated name.
        let desc: *const PluginDesc = unsafe { libc::dlsym(library, c"CR_PLUGIN_DESC".as_ptr()) }.cast();
        ensure!(!desc.is_null(), "{} has no CR_PLUGIN_DESC", path.display());
        // SAFETY: CRIU's contract is that this symbol is a descriptor, and the library stays loaded.
        let (version, max_hooks) = unsafe { ((*desc).version, (*desc).max_hooks) };
        ensure!(version == 0x200, "the plugin is of interface version {version:#x}");
        ensure!(max_hooks <= 12, "the plugin has {max_hooks} hooks, CRIU 4.0 has 12");
        Ok(Self { desc })
    }

    fn init(&self, stage: Stage) -> Result<()> {
        // SAFETY: as in `load`; the function is the plugin's own.
        let init = unsafe { (*self.desc).init }.context("the plugin has no init()")?;
        let result = init(stage as c_int);
        ensure!(result == 0, "init({}) returned {result}", stage as c_int);
        Ok(())
    }

    fn exit(&self, stage: Stage, ret: c_int) -> Result<()> {
        // SAFETY: as in `load`.
        let exit = unsafe { (*self.desc).exit }.context("the plugin has no exit()")?;
        exit(stage as c_int, ret);
        Ok(())
    }

    fn hook(&self, hook: Hook) -> Result<*const c_void> {
        // SAFETY: as in `load`.
        let hooks = unsafe { (*self.desc).hooks };
        let found = hooks[hook as usize];
        ensure!(!found.is_null(), "the plugin has no hook {}", hook as usize);
        Ok(found)
    }

    fn hook_of_int(&self, hook: Hook) -> Result<extern "C" fn(c_int) -> c_int> {
        // SAFETY: the hooks that this is called for are `int (*)(int)` in CRIU's interface.
        Ok(unsafe { std::mem::transmute::<*const c_void, extern "C" fn(c_int) -> c_int>(self.hook(hook)?) })
    }

    fn hook_of_two(&self, hook: Hook) -> Result<extern "C" fn(c_int, c_int) -> c_int> {
        // SAFETY: DUMP_EXT_FILE is `int (*)(int, int)` in CRIU's interface.
        Ok(unsafe {
            std::mem::transmute::<*const c_void, extern "C" fn(c_int, c_int) -> c_int>(self.hook(hook)?)
        })
    }
}

fn dl_error() -> String {
    // SAFETY: dlerror returns NULL or a NUL-terminated string that lives until the next dl call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".into();
    }
    // SAFETY: as above.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
