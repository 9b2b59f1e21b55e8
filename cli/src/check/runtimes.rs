//! Which criu each runtime will start, and whether that one will load the plugin: a configuration that is wrong or in
//! the wrong file says nothing of itself, and the connections are lost at the first restore.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::config::{Settings, Statement, statements};
use crate::host::{self, read_if_there};
use crate::plugins;
use crate::runtime::{self, ConfigFile, Kind, Problem, Runtime};

/// What becomes of the connections of a container that this runtime dumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    /// The plugin carries them.
    Carried,
    /// The plugin is not set up: they are CRIU's matter.
    Stock,
    /// The plugin is set up and will not do its work.
    Broken,
}

#[derive(Debug, Serialize)]
pub struct Assessed {
    #[serde(flatten)]
    runtime: Runtime,
    criu: Option<Criu>,
    /// The files that its criu reads, in this order, as far as they are there.
    configuration: Vec<PathBuf>,
    #[serde(flatten)]
    settings: Settings,
    outcome: Outcome,
    problems: Vec<Problem>,
}

#[derive(Clone, Debug, Serialize)]
struct Criu {
    path: PathBuf,
    version: String,
}

impl Assessed {
    /// Whether the plugin does its work where it is set up.
    pub fn is_consistent(&self) -> bool {
        self.outcome != Outcome::Broken
    }
}

/// All runtimes on PATH.
pub fn assess(criu_dir: &Path) -> Vec<Assessed> {
    let mut criu_problems = Vec::new();
    let criu = runtime::find(Kind::Criu);
    match &criu {
        None => criu_problems.push(Problem::new("there is no criu on PATH", "install CRIU 4.2 or later")),
        Some(criu) if criu.problems.is_empty() => {
            criu_problems.extend(outdated(host::version(&criu.version), host::kernel()));
        }
        Some(criu) => criu_problems.extend(criu.problems.iter().cloned()),
    }
    let criu = criu.map(|criu| Criu { path: criu.path, version: criu.version });
    let one = |mut runtime: Runtime| {
        let mut problems = std::mem::take(&mut runtime.problems);
        let criu = criu.clone().filter(|_| runtime.starts_criu);
        if runtime.kind == Kind::Criu {
            problems.clone_from(&criu_problems); // its own are among them
        } else if runtime.starts_criu {
            problems.extend(criu_problems.iter().cloned());
        }
        assess_one(runtime, criu, problems, criu_dir)
    };
    runtime::all().into_iter().map(one).collect()
}

fn assess_one(runtime: Runtime, criu: Option<Criu>, mut problems: Vec<Problem>, criu_dir: &Path) -> Assessed {
    let mut settings = Settings::default();
    let mut configuration = Vec::new();
    for path in runtime.reads(criu_dir) {
        match read_if_there(&path) {
            Ok(None) => continue,
            Ok(Some(text)) => {
                problems.extend(wrong_lines(&path, &text));
                settings.read(&text);
            }
            Err(error) => {
                problems.push(Problem::new(format!("{error:#}"), "run this as root, or mend the file"))
            }
        }
        configuration.push(path);
    }
    let folder = settings.lib_dir.as_deref();
    let ours = folder.map(plugins::verify);
    let named = folder.is_some_and(plugins::has_plugin);
    let ignored = ignored_file(&runtime, criu_dir);
    let set_up = settings.tcp_close || named || ignored.is_some();
    if settings.tcp_close || named {
        problems.extend(half_set_up(&settings, named));
        problems.extend(ours.and_then(Result::err).map(|error| {
            Problem::new(
                format!("{error:#}"),
                "CRIU refuses to work with what it cannot load: mend or remove it",
            )
        }));
    }
    problems.extend(ignored);
    let outcome = match (set_up, problems.is_empty()) {
        (false, _) => Outcome::Stock,
        (true, true) => Outcome::Carried,
        (true, false) => Outcome::Broken,
    };
    Assessed { runtime, criu, configuration, settings, outcome, problems }
}

/// crun.conf with the plugin in it, where it is for nobody.
fn ignored_file(runtime: &Runtime, criu_dir: &Path) -> Option<Problem> {
    let crun = runtime.through.as_deref().unwrap_or(runtime);
    let path = ConfigFile::Crun.within(criu_dir);
    let text =
        read_if_there(&path).ok().flatten().filter(|_| crun.kind == Kind::Crun && crun.names.is_none())?;
    let mut settings = Settings::default();
    settings.read(&text);
    settings.lib_dir.filter(|dir| plugins::has_plugin(dir)).map(|_| {
        let what = format!("{} names the plugin, and this crun does not have criu read it", path.display());
        Problem::new(what, "install crun 1.26 or later and libcriu 4.2 or later, or use runc")
    })
}

/// Why this criu cannot work with the plugin on this kernel.
fn outdated(criu: Option<(u32, u32)>, kernel: Option<(u32, u32)>) -> Option<Problem> {
    const HOOKS: (u32, u32) = (4, 0);
    const PASSES_CREDENTIALS: (u32, u32) = (4, 2);
    const REFUSES_CREDENTIALS: (u32, u32) = (6, 16);
    let cure = "install CRIU 4.2 or later";
    match criu {
        None => Some(Problem::new("this criu does not say its version", cure)),
        Some(criu) if criu < HOOKS => {
            Some(Problem::new("this criu has not the hooks that the plugin needs (CRIU 4.0)", cure))
        }
        Some(criu) if criu < PASSES_CREDENTIALS && kernel >= Some(REFUSES_CREDENTIALS) => {
            Some(Problem::new("this criu cannot dump any inet socket on a kernel since 6.16", cure))
        }
        Some(_) => None,
    }
}

fn wrong_lines(path: &Path, text: &str) -> Vec<Problem> {
    let wrong = statements(text).filter_map(|(line, statement)| match statement {
        Statement::Wrong(why) => {
            Some(Problem::new(format!("{}:{line}: {why}", path.display()), "criu ends there: mend the line"))
        }
        _ => None,
    });
    wrong.collect()
}

fn half_set_up(settings: &Settings, plugin: bool) -> Option<Problem> {
    if !plugin {
        let what = "tcp-close is set and no libdir with soccr_plugin.so: a restore drops the connections";
        return Some(Problem::new(what, "`soccr enable` sets both"));
    }
    (!settings.tcp_close).then(|| {
        let what = "libdir names the plugin and tcp-close is not set: CRIU carries the connections itself";
        Problem::new(what, "`soccr enable` sets both")
    })
}

/// A paragraph for each.
pub fn print(runtimes: &[Assessed]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if runtimes.is_empty() {
        writeln!(out, "\nThere is no criu on PATH, nor a program that starts one.")?;
    }
    for assessed in runtimes {
        let Assessed { runtime, outcome, problems, .. } = assessed;
        let sign = match outcome {
            Outcome::Carried => '✓',
            Outcome::Stock => '-',
            Outcome::Broken => '✗',
        };
        writeln!(out, "\n{sign} {} ({})", runtime.path.display(), runtime.version)?;
        if let Some(through) = &runtime.through {
            writeln!(out, "    works through {} ({})", through.path.display(), through.version)?;
        }
        if let Some(criu) = assessed.criu.as_ref().filter(|_| runtime.kind != Kind::Criu) {
            writeln!(out, "    starts {} ({})", criu.path.display(), criu.version)?;
        }
        writeln!(out, "    {}", connections(assessed))?;
        for Problem { what, cure } in problems {
            writeln!(out, "    {what}: {cure}")?;
        }
    }
    Ok(())
}

fn connections(assessed: &Assessed) -> String {
    let files: Vec<String> = assessed.configuration.iter().map(|path| path.display().to_string()).collect();
    let files = if files.is_empty() { "no configuration file".into() } else { files.join(", ") };
    match assessed.outcome {
        Outcome::Carried => format!("connections are carried by the plugin, according to {files}"),
        Outcome::Broken => format!("the plugin is set up and will not do its work, according to {files}"),
        Outcome::Stock => {
            format!("connections are CRIU's own matter, according to {files}{}", cure(assessed))
        }
    }
}

/// What has the plugin carry them, if nothing is in the way.
fn cure(Assessed { runtime, problems, .. }: &Assessed) -> String {
    if !problems.is_empty() {
        return String::new();
    }
    let whom = match runtime.names {
        Some(ConfigFile::Crun) if runtime.kind == Kind::Crun => "crun",
        Some(_) if runtime.kind == Kind::Podman => "podman",
        Some(_) => "runc",
        None => "default",
    };
    format!("; `soccr enable {whom}` has the plugin carry them")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_criu_works_on_which_kernel() {
        let works = |criu, kernel| outdated(Some(criu), Some(kernel)).is_none();
        assert!(
            !works((3, 17), (5, 10))
                && works((4, 0), (6, 15))
                && works((4, 2), (6, 16))
                && works((5, 0), (7, 0))
        );
        assert!(!works((4, 1), (6, 16)) && !works((4, 0), (7, 0)));
        assert!(outdated(None, Some((5, 10))).is_some());
    }
}
