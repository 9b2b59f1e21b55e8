//! `soccr enable` and `soccr disable`.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde::Serialize;

use crate::config::{self, Made, Statement};
use crate::host::{Host, read_if_there};
use crate::plugins;
use crate::runtime::{self, ConfigFile, Kind, Runtime};
use crate::{print_json, warn};

/// For whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum For {
    /// Also what works through it, as containerd does
    Runc,
    /// Since 1.26, with libcriu 4.2 or later
    Crun,
    /// The runtime that podman is set up to use
    Podman,
    /// Whoever starts criu on this host
    Default,
}

#[derive(Debug, clap::Args)]
pub struct EnableArguments {
    /// For whom; all of runc, crun and podman that are on PATH unless one is named.
    #[arg(value_name = "RUNTIME")]
    runtime: Option<For>,
    /// The folder of the plugin, in which CRIU must be able to load every `.so`; the installed one unless told.
    #[arg(long, value_name = "DIR")]
    plugins: Option<PathBuf>,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: Host,
}

#[derive(Debug, clap::Args)]
pub struct DisableArguments {
    /// For whom; for everybody unless one is named.
    #[arg(value_name = "RUNTIME")]
    runtime: Option<For>,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    host: Host,
}

/// What was done to a file, or would be.
#[derive(Debug, Serialize)]
struct Done {
    file: PathBuf,
    done: String,
    dry_run: bool,
}

pub fn enable(arguments: &EnableArguments) -> Result<bool> {
    let plugins = plugin_folder(arguments.plugins.as_deref())?;
    let files = match arguments.runtime {
        Some(runtime) => vec![file_of(runtime)?],
        None => files_found()?,
    };
    let criu_dir = arguments.host.criu_dir();
    let files = files.into_iter().map(|file| add(file, &criu_dir, &plugins, arguments.dry_run).map(Some));
    tell(files, arguments.json)?;
    for hidden in plugins::hidden_by(Path::new(&plugins)) {
        warn(&format!(
            "{}: CRIU does not load this any more; a link to it in {plugins} changes that",
            hidden.display()
        ));
    }
    Ok(true)
}

pub fn disable(arguments: &DisableArguments) -> Result<bool> {
    let files = match arguments.runtime {
        None => ConfigFile::ALL.to_vec(),
        Some(For::Default) => vec![ConfigFile::Default],
        Some(For::Runc) => vec![ConfigFile::Runc],
        Some(For::Crun) => vec![ConfigFile::Crun],
        Some(For::Podman) => vec![file_of(For::Podman)?],
    };
    let criu_dir = arguments.host.criu_dir();
    let files = files.into_iter().map(|file| take_back(&file.within(&criu_dir), arguments.dry_run));
    if tell(files, arguments.json)? == 0 && !arguments.json {
        writeln!(std::io::stdout(), "{}: there is nothing of soccr's", criu_dir.display())
            .context("cannot print")?;
    }
    Ok(true)
}

/// Tells what is done to each file, up to the first failure; to how many something was.
fn tell(files: impl Iterator<Item = Result<Option<Done>>>, json: bool) -> Result<usize> {
    let mut all = Vec::new();
    let mut failed = Ok(());
    for file in files {
        match file {
            Ok(done) => all.extend(done),
            Err(error) => {
                failed = Err(error);
                break;
            }
        }
    }
    if json {
        print_json(&all)?;
    }
    for Done { file, done, dry_run } in all.iter().filter(|_| !json) {
        let would = if *dry_run { "would be " } else { "" };
        writeln!(std::io::stdout(), "{}: {would}{done}", file.display()).context("cannot print")?;
    }
    failed.map(|()| all.len())
}

/// As it is written into a configuration file.
fn plugin_folder(given: Option<&Path>) -> Result<String> {
    let folder = given.map_or_else(plugins::installed, |given| Ok(given.to_owned()))?;
    plugins::verify(&folder)?;
    let folder = folder.canonicalize()?;
    let text =
        folder.to_str().filter(|text| !text.contains(|c: char| c.is_whitespace() || "#\"\\".contains(c)));
    let text = text.with_context(|| format!("{folder:?}: CRIU's configuration cannot name such a folder"))?;
    Ok(text.to_owned())
}

/// The files of all runtimes on this host. One that cannot be enabled does not keep the others from it.
fn files_found() -> Result<Vec<ConfigFile>> {
    let mut files = Vec::new();
    for kind in [Kind::Runc, Kind::Crun, Kind::Podman] {
        let Some(runtime) = runtime::find(kind) else { continue };
        match named_by(&runtime) {
            Ok(file) if files.contains(&file) => {}
            Ok(file) => files.push(file),
            Err(error) => warn(&format!("{error:#}")),
        }
    }
    ensure!(
        !files.is_empty(),
        "there is neither runc, crun nor podman that could be enabled; `soccr enable default` is for whoever starts criu"
    );
    Ok(files)
}

fn file_of(runtime: For) -> Result<ConfigFile> {
    let kind = match runtime {
        For::Default => return Ok(ConfigFile::Default),
        // Whichever version it is.
        For::Runc => return Ok(ConfigFile::Runc),
        For::Crun => Kind::Crun,
        For::Podman => Kind::Podman,
    };
    let program = kind.program();
    let found = runtime::find(kind);
    named_by(
        &found
            .with_context(|| format!("there is no {program} on PATH to ask which file it names to criu"))?,
    )
}

fn named_by(runtime: &Runtime) -> Result<ConfigFile> {
    let path = runtime.path.display();
    if let Some(problem) = runtime.problems.first() {
        bail!("{path}: {}; {}", problem.what, problem.cure);
    }
    runtime.names.with_context(|| {
        format!(
            "{path} ({}) names no file of its own to criu, which reads default.conf alone then: \
             `soccr enable default` is for whoever starts criu on this host",
            runtime.version
        )
    })
}

fn add(file: ConfigFile, criu_dir: &Path, plugins: &str, dry_run: bool) -> Result<Done> {
    let path = file.within(criu_dir);
    let before = read_if_there(&path)?;
    let ours = before.as_deref().map(without_ours(&path)).transpose()?.flatten();
    let (made, others) = match (&before, ours) {
        (_, Some(ours)) => ours,
        (Some(text), None) => (Made::Lines, text.clone()),
        (None, None) => (made_now(criu_dir)?, String::new()),
    };
    agree(&path, &others, plugins)?;
    if file == ConfigFile::Crun && before.is_none() {
        hides_nothing(criu_dir)?;
    }
    let text = config::ours(made, plugins) + &others;
    if before.as_ref() == Some(&text) {
        return Ok(Done { file: path, done: "names the plugin already".into(), dry_run: false });
    }
    if !dry_run {
        fs::create_dir_all(criu_dir).with_context(|| format!("cannot make {}", criu_dir.display()))?;
        write(&path, &text)?;
    }
    let done = match (before, made) {
        (None, _) => "made",
        (Some(_), Made::Lines) => "extended",
        (Some(_), Made::File | Made::Folder) => "changed",
    };
    Ok(Done { file: path, done: format!("{done}: tcp-close, libdir {plugins}"), dry_run })
}

/// A folder that came with one file of ours goes with the last.
fn made_now(criu_dir: &Path) -> Result<Made> {
    if !criu_dir.exists() {
        return Ok(Made::Folder);
    }
    for file in ConfigFile::ALL {
        let path = file.within(criu_dir);
        let text = read_if_there(&path)?.unwrap_or_default();
        if let Some((Made::Folder, _)) = without_ours(&path)(&text)? {
            return Ok(Made::Folder);
        }
    }
    Ok(Made::File)
}

fn without_ours(path: &Path) -> impl Fn(&str) -> Result<Option<(Made, String)>> {
    move |text| config::without_ours(text).with_context(|| format!("{}", path.display()))
}

/// What others have written is theirs to change.
fn agree(path: &Path, others: &str, plugins: &str) -> Result<()> {
    for (line, statement) in config::statements(others) {
        let place = format!("{}:{line}", path.display());
        match statement {
            Statement::LibDir(dir) if Path::new(dir) != Path::new(plugins) => {
                bail!("{place}: libdir is {dir} already; link its plugins into {plugins} and remove the line")
            }
            Statement::TcpClose(false) => {
                bail!("{place}: no-tcp-close is against what the plugin needs; remove it")
            }
            Statement::Wrong(why) => bail!("{place}: no criu takes this line: {why}"),
            Statement::TcpEstablished => {
                warn(&format!("{place}: tcp-established means nothing beside tcp-close"))
            }
            Statement::LibDir(_) | Statement::TcpClose(true) | Statement::Other => {}
        }
    }
    Ok(())
}

/// crun takes runc's file as long as it has none of its own.
fn hides_nothing(criu_dir: &Path) -> Result<()> {
    let path = ConfigFile::Runc.within(criu_dir);
    let Some(text) = read_if_there(&path)? else { return Ok(()) };
    let others = without_ours(&path)(&text)?.map_or(text, |(_, others)| others);
    ensure!(
        config::statements(&others).next().is_none(),
        "crun reads {} as long as there is no crun.conf, and would not heed it any more: `soccr enable runc` is for both",
        path.display()
    );
    Ok(())
}

/// `None`: there was nothing of ours.
fn take_back(path: &Path, dry_run: bool) -> Result<Option<Done>> {
    let Some(text) = read_if_there(path)? else { return Ok(None) };
    let Some((made, others)) = without_ours(path)(&text)? else { return Ok(None) };
    let remove = made != Made::Lines && others.trim().is_empty();
    if !dry_run && remove {
        fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        if made == Made::Folder {
            remove_if_empty(path.parent().unwrap_or(path))?;
        }
    } else if !dry_run {
        write(path, &others)?;
    }
    let done = if remove { "removed" } else { "without soccr's lines again" };
    Ok(Some(Done { file: path.to_owned(), done: done.into(), dry_run }))
}

fn remove_if_empty(folder: &Path) -> Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
        other => other.with_context(|| format!("cannot remove {}", folder.display())),
    }
}

/// Writes a file as a whole or not at all, with the mode and the owner that it had.
fn write(path: &Path, text: &str) -> Result<()> {
    // Through a link: what it leads to is what is written.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let new = path.with_extension(format!("soccr-{}", std::process::id()));
    let written = write_new(&new, &path, text).and_then(|()| fs::rename(&new, &path));
    if written.is_err() {
        // There may be none.
        let _ = fs::remove_file(&new);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn write_new(new: &Path, old: &Path, text: &str) -> std::io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).create_new(true).open(new)?;
    match fs::metadata(old) {
        Ok(old) => {
            fchown(&file, Some(old.uid()), Some(old.gid()))?;
            file.set_permissions(old.permissions())?;
        }
        // Whatever the umask: also a criu of another user is to read it.
        Err(_) => file.set_permissions(Permissions::from_mode(0o644))?,
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
