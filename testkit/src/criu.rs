//! Drives the `criu` program: stock alone, or stock with our plugin.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;

use crate::netns::NetNs;
use crate::task::{self, Ended, Task, Usage};

/// The environment variable that says where records are; also what marks the processes of a [`crate::Stage`].
pub const RUN_DIR: &str = "SOCCR_RUN_DIR";

/// How connections are kept still while their process does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// Rules by iptables: one exec for each rule in stock CRIU, its default.
    Iptables,
    /// One nftables table.
    Nftables,
    /// None: fast, and any packet of a peer resets its connection.
    Skip,
}

impl Lock {
    /// The word that `criu --network-lock` and `SOCCR_LOCK` know.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
            Self::Skip => "skip",
        }
    }
}

/// Who carries the TCP connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// CRIU itself: `--tcp-established`.
    Stock(Lock),
    /// Our plugin: `--tcp-close --lib DIR`.
    Plugin(Lock),
}

/// The `criu` program, the plugin's folder, and where that keeps its records.
#[derive(Clone, Debug)]
pub struct Criu {
    bin: PathBuf,
    plugins: PathBuf,
    records: Option<PathBuf>,
}

/// One call of criu, to be refined and run.
#[derive(Debug)]
pub struct Call<'a> {
    criu: &'a Criu,
    action: &'static str,
    side: Side,
    images: &'a Path,
    ns: Option<&'a NetNs>,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    plugins: PathBuf,
    inherit: Vec<(OwnedFd, String)>,
    limit: Duration,
    verbosity: &'static str,
    through: Vec<OsString>,
}

/// A call that succeeded.
#[derive(Debug)]
pub struct Done {
    /// How long `criu` ran.
    pub took: Duration,
    /// What it used, and its children that it has waited for.
    pub usage: Usage,
    /// Its log.
    pub log: PathBuf,
}

impl Criu {
    /// These two paths.
    pub fn new(bin: impl Into<PathBuf>, plugins: impl Into<PathBuf>) -> Self {
        Self { bin: bin.into(), plugins: plugins.into(), records: None }
    }

    /// The same with records of its own, not the host's in `/run/soccr`.
    pub fn with_records(&self, records: &Path) -> Self {
        Self { records: Some(records.to_owned()), ..self.clone() }
    }

    /// The same with another plugin: one in which faults can be injected.
    pub fn with_plugins(&self, plugins: impl Into<PathBuf>) -> Self {
        Self { plugins: plugins.into(), ..self.clone() }
    }

    /// The criu of `$CRIU_BIN` or `target/criu`, the plugin of `$SOCCR_PLUGIN_DIR` or
    /// `target/plugins`, where `make criu` and `make` put them.
    pub fn from_env() -> Self {
        let path =
            |name, default| std::env::var_os(name).map_or_else(|| target().join(default), PathBuf::from);
        Self::new(path("CRIU_BIN", "criu/criu/criu"), path("SOCCR_PLUGIN_DIR", "plugins"))
    }

    /// The program.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The plugin's file.
    pub fn plugin(&self) -> PathBuf {
        self.plugins.join("soccr_plugin.so")
    }

    /// Makes `command` a silent one with our records, and without what whoever runs this has set for criu or the plugin.
    pub fn set_up(&self, command: &mut Command) {
        let is_set = |name: &OsString| {
            let name = name.to_string_lossy();
            // What marks our processes stays.
            name == "CRIU_LIBS_DIR" || name.starts_with("SOCCR_") && !name.starts_with("SOCCR_TEST_")
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_set(name)) {
            command.env_remove(name);
        }
        if let Some(records) = &self.records {
            command.env(RUN_DIR, records);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    }

    /// CRIU's `crit`: the one of the same source tree, or the installed one.
    pub fn crit(&self) -> Command {
        let tree = self
            .bin
            .parent()
            .and_then(Path::parent)
            .filter(|tree| tree.join("crit/crit/__main__.py").exists());
        let Some(tree) = tree else { return Command::new("crit") };
        // The Python that has CRIU's dependencies is Debian's.
        let mut command = Command::new("/usr/bin/python3");
        command.env("PYTHONPATH", format!("{0}/lib:{0}/crit", tree.display()));
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command.args(["-m", "crit"]);
        command
    }

    /// Whether the program is there, and the plugin if `with_plugin`.
    pub fn check(&self, with_plugin: bool) -> Result<()> {
        if !self.bin.exists() {
            bail!("no criu at {} (run `make criu`, or set CRIU_BIN)", self.bin.display());
        }
        if with_plugin && !self.plugin().exists() {
            bail!("no plugin at {} (run `make`, or set SOCCR_PLUGIN_DIR)", self.plugin().display());
        }
        Ok(())
    }

    /// Whether it calls plugins once it has forked its tasks, as it does since 4.2.
    pub fn has_post_forking(&self) -> Result<bool> {
        let said = Command::new(&self.bin).arg("--version").output().context("criu --version")?.stdout;
        let said = String::from_utf8(said)?;
        let version = said.lines().find_map(|line| line.strip_prefix("Version:")).context("a version")?;
        let mut numbers = version.trim().split('.').map_while(|number| number.parse::<u32>().ok());
        Ok((numbers.next(), numbers.next()) >= (Some(4), Some(2)))
    }

    /// Whether the plugin is what these sources make, where it is the one of `target/plugins`.
    pub fn check_fresh(&self) -> Result<()> {
        // On another machine than the one it was built on there are no sources.
        let built = target().join("plugins").canonicalize().ok();
        if Some(self.plugins.canonicalize()?) != built {
            return Ok(());
        }
        is_fresh(&self.plugin()).context("the plugin is not that of these sources: run `make`")
    }

    /// `criu dump` of the tree that starts at `pid` into the folder `images`.
    pub fn dump<'a>(&'a self, side: Side, pid: Pid, images: &'a Path) -> Call<'a> {
        self.call("dump", side, images).arg("-t").arg(pid.to_string())
    }

    /// `criu pre-dump`.
    pub fn pre_dump<'a>(&'a self, side: Side, pid: Pid, images: &'a Path) -> Call<'a> {
        self.call("pre-dump", side, images).arg("-t").arg(pid.to_string())
    }

    /// `criu restore`, detached. Run it with [`Call::restore`].
    pub fn restore<'a>(&'a self, side: Side, images: &'a Path) -> Call<'a> {
        self.call("restore", side, images).arg("-d").arg("--pidfile").arg(images.join("restored.pid"))
    }

    /// `criu ACTION`, with nothing said but what all have in common.
    pub fn call<'a>(&'a self, action: &'static str, side: Side, images: &'a Path) -> Call<'a> {
        let limit = Duration::from_secs(60);
        let (args, env, inherit) = (Vec::new(), Vec::new(), Vec::new());
        let (plugins, verbosity, through) = (self.plugins.clone(), "-v4", Vec::new());
        Call {
            criu: self,
            action,
            side,
            images,
            ns: None,
            args,
            env,
            plugins,
            inherit,
            limit,
            verbosity,
            through,
        }
    }
}

impl<'a> Call<'a> {
    /// Runs criu in this network namespace.
    pub fn inside(mut self, ns: &'a NetNs) -> Self {
        self.ns = Some(ns);
        self
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// One more variable in criu's environment.
    pub fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name, value.as_ref().to_owned()));
        self
    }

    /// Hands criu this network namespace as the external one that the images call `key`.
    pub fn inherit(mut self, ns: &NetNs, key: &str) -> Result<Self> {
        self.inherit.push((ns.as_fd().try_clone_to_owned()?, key.to_owned()));
        Ok(self)
    }

    /// Kills criu after this time (1 minute unless told).
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Has criu log warnings and errors only, where its log would cost more than what is measured.
    pub fn quiet(mut self) -> Self {
        self.verbosity = "-v2";
        self
    }

    /// Has this program start it: criu and its arguments are the last words of `command`.
    pub fn through<S: AsRef<OsStr>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.through = command.into_iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// Runs it.
    pub fn run(self) -> Result<Done> {
        let log = self.log();
        let (action, side, limit) = (self.action, self.side, self.limit);
        let Ended { status, took, usage } = task::run(&mut self.command(), limit)
            .with_context(|| format!("criu {action} ({side:?}):\n{}", last_errors(&log)))?;
        if !status.success() {
            bail!("criu {action} ({side:?}): {status}:\n{}", last_errors(&log));
        }
        Ok(Done { took, usage, log })
    }

    /// Dumps a task and waits until the whole tree is gone, so that its process ids are free.
    pub fn dump_and_wait(self, task: Task) -> Result<Done> {
        let limit = self.limit;
        let done = self.run()?;
        task.wait(limit).context("the dumped tree is still there")?;
        Ok(done)
    }

    /// Restores, and takes charge of the restored tree.
    pub fn restore(self) -> Result<(Task, Done)> {
        let pidfile = self.images.join("restored.pid");
        match fs::remove_file(&pidfile) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", pidfile.display()));
            }
            _ => {}
        }
        let done = self.run()?;
        let text = fs::read_to_string(&pidfile)
            .with_context(|| format!("criu restore left no {}", pidfile.display()))?;
        let pid = text.trim().parse().with_context(|| format!("a pid in {}", pidfile.display()))?;
        Ok((Task::adopt(Pid::from_raw(pid)), done))
    }

    /// Another plugin: one in which faults can be injected.
    pub fn plugins(mut self, plugins: impl Into<PathBuf>) -> Self {
        self.plugins = plugins.into();
        self
    }

    /// Starts criu and comes back at once, with the log's path.
    pub fn spawn(self) -> Result<(std::process::Child, PathBuf)> {
        let log = self.log();
        let bin = self.criu.bin.display().to_string();
        Ok((self.command().spawn().with_context(|| format!("cannot run {bin}"))?, log))
    }

    fn log(&self) -> PathBuf {
        self.images.join(format!("{}.log", self.action))
    }

    /// The command, for who wants to change more about it. What this call refers to must live until it is spawned.
    pub fn command(self) -> Command {
        let mut words = self.through.iter().map(OsString::as_os_str).chain([self.criu.bin.as_os_str()]);
        let program = words.next().expect("criu at least");
        let mut command = self.ns.map_or_else(|| Command::new(program), |ns| ns.command(program));
        command.args(words).arg(self.action).arg("--no-default-config");
        command.arg("-D").arg(self.images).args([self.verbosity, "-o"]).arg(self.log());
        match self.side {
            Side::Stock(lock) => {
                command.args(["--tcp-established", "--network-lock", lock.name()]);
                // No plugin that somebody installed on this machine.
                command.arg("--lib").arg(self.images);
            }
            Side::Plugin(_) => {
                command.arg("--tcp-close").arg("--lib").arg(&self.plugins);
            }
        }
        self.criu.set_up(&mut command);
        if let Side::Plugin(lock) = self.side {
            command.env("SOCCR_LOCK", lock.name());
        }
        command.args(&self.args).envs(self.env);
        inherit(&mut command, self.inherit);
        command
    }
}

/// `target/`.
fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")
}

/// Whether the plugin is what cargo has built last, and newer than all that cargo has built it of.
fn is_fresh(plugin: &Path) -> Result<()> {
    let built = target().join("release/libsoccr_plugin.so");
    let list = built.with_extension("d");
    let sources = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let age = fs::metadata(&built)?.modified()?;
    for source in sources.split_whitespace().skip(1) {
        // One that is gone was not needed, or cargo will say so.
        if fs::metadata(source).is_ok_and(|it| it.modified().is_ok_and(|modified| modified > age)) {
            bail!("{source} is newer than {}", built.display());
        }
    }
    if fs::read(plugin)? != fs::read(&built)? {
        bail!("{} is not {}", plugin.display(), built.display());
    }
    Ok(())
}

/// `--inherit-fd fd[N]:KEY` for each, with N open in the child.
fn inherit(command: &mut Command, descriptors: Vec<(OwnedFd, String)>) {
    for (fd, key) in descriptors {
        command.arg("--inherit-fd").arg(format!("fd[{}]:{key}", fd.as_raw_fd()));
        pass_on(command, fd);
    }
}

/// Leaves the descriptor open in the child.
pub(crate) fn pass_on(command: &mut Command, fd: OwnedFd) {
    // SAFETY: between fork and exec only fcntl() is called, which is async-signal-safe; the
    // closure owns the descriptor, which is therefore open when it runs.
    unsafe {
        command.pre_exec(move || {
            nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
            Ok(())
        });
    }
}

/// The lines of a criu log that tell what went wrong, the last dozen.
pub fn last_errors(log: &Path) -> String {
    let Ok(bytes) = fs::read(log) else { return format!("(no log at {})", log.display()) };
    let text = String::from_utf8_lossy(&bytes);
    let matters = |line: &&str| ["Error", "BUG", "soccr:", "(soccr)"].iter().any(|word| line.contains(word));
    let mut lines: Vec<_> = text.lines().filter(matters).collect();
    if lines.is_empty() {
        lines = text.lines().collect();
    }
    let skip = lines.len().saturating_sub(12);
    lines[skip..].join("\n")
}

/// What CRIU itself measured of a dump: how long the tasks were frozen, from `stats-dump`.
pub fn frozen_time(images: &Path) -> Result<Duration> {
    let path = images.join("stats-dump");
    let file = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    // Two magic words and the length of the message; in it field 1, `dump`, and there field 2.
    let stats = file.get(12..).and_then(|entry| Some(field(entry, 1)?.0));
    let frozen = stats.and_then(|dump| Some(field(dump, 2)?.1));
    frozen.map(Duration::from_micros).with_context(|| format!("no frozen_time in {}", path.display()))
}

/// The bytes or the number of one field of a protobuf message that has only varints and messages.
pub fn field(mut message: &[u8], wanted: u64) -> Option<(&[u8], u64)> {
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let number = varint(&mut message)?;
        let mut bytes: &[u8] = &[];
        if key & 7 == 2 {
            (bytes, message) = message.split_at_checked(usize::try_from(number).ok()?)?;
        }
        if key >> 3 == wanted {
            return Some((bytes, number));
        }
    }
    None
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Measures a piece of work.
pub fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Duration)> {
    let start = Instant::now();
    let made = work()?;
    Ok((made, start.elapsed()))
}
