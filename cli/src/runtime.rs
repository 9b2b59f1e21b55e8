//! The programs that start criu: which criu it will be, and which configuration it will read.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;

use crate::host;

/// A configuration file of CRIU, by whom it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConfigFile {
    /// Every criu reads it.
    Default,
    /// runc names it to criu; so does crun where there is no `crun.conf`.
    Runc,
    /// crun names it to criu.
    Crun,
}

impl ConfigFile {
    pub const ALL: [Self; 3] = [Self::Default, Self::Runc, Self::Crun];

    /// The file in this folder.
    pub fn within(self, criu_dir: &Path) -> PathBuf {
        criu_dir.join(match self {
            Self::Default => "default.conf",
            Self::Runc => "runc.conf",
            Self::Crun => "crun.conf",
        })
    }
}

/// A program that starts criu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Runc,
    Crun,
    Podman,
    /// Which works through runc.
    Containerd,
    /// `lxc-checkpoint`.
    Lxc,
    /// Whoever starts criu with no file of its own.
    #[value(skip)]
    Criu,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Runc, Self::Crun, Self::Podman, Self::Containerd, Self::Lxc, Self::Criu];

    /// Its program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Podman => "podman",
            Self::Containerd => "containerd",
            Self::Lxc => "lxc-checkpoint",
            Self::Criu => "criu",
        }
    }
}

/// What stands in the way, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub what: String,
    pub cure: String,
}

impl Problem {
    pub fn new(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self { what: what.into(), cure: cure.into() }
    }
}

/// A runtime on this host.
#[derive(Clone, Debug, Serialize)]
pub struct Runtime {
    pub kind: Kind,
    pub path: PathBuf,
    /// What it says of itself, in one line.
    pub version: String,
    /// Through what it starts criu.
    pub through: Option<Box<Runtime>>,
    /// Whether it can start a criu at all.
    pub starts_criu: bool,
    /// The file that it names to criu, which then counts more than default.conf.
    pub names: Option<ConfigFile>,
    /// Why it cannot start a criu that heeds these.
    pub problems: Vec<Problem>,
}

/// All that are on PATH.
pub fn all() -> Vec<Runtime> {
    Kind::ALL.into_iter().filter_map(find).collect()
}

/// The one on PATH.
pub fn find(kind: Kind) -> Option<Runtime> {
    host::find(kind.program()).map(|path| at(kind, path))
}

fn at(kind: Kind, path: PathBuf) -> Runtime {
    let (said, problem) = match host::ask(&path, ["--version"]) {
        Ok(said) => (said, None),
        Err(error) => (String::new(), Some(Problem::new(format!("{error:#}"), "see to it that it runs"))),
    };
    let version = said.lines().next().unwrap_or_default().to_owned();
    let (through, names, problems) = (None, None, Vec::new());
    let mut runtime = Runtime { kind, path, version, through, starts_criu: true, names, problems };
    match problem {
        Some(problem) => runtime.cannot_start(problem),
        None => match kind {
            Kind::Runc => runtime.names = Some(ConfigFile::Runc),
            Kind::Crun => runtime.be_crun(&said),
            Kind::Podman => runtime.go_through(of_podman(&runtime.path)),
            Kind::Containerd => runtime.go_through(find(Kind::Runc).context("there is no runc on PATH")),
            Kind::Lxc | Kind::Criu => {}
        },
    }
    runtime
}

impl Runtime {
    fn cannot_start(&mut self, problem: Problem) {
        self.starts_criu = false;
        self.problems.push(problem);
    }

    fn go_through(&mut self, other: Result<Runtime>) {
        match other {
            Ok(other) => {
                (self.starts_criu, self.names) = (other.starts_criu, other.names);
                self.problems.extend(other.problems.iter().cloned());
                self.through = Some(Box::new(other));
            }
            Err(error) => {
                self.problems.push(Problem::new(format!("{error:#}"), "install what it works through"))
            }
        }
    }

    /// What its criu reads, in this order.
    pub fn reads(&self, criu_dir: &Path) -> Vec<PathBuf> {
        let home = env::var_os("HOME").map(|home| Path::new(&home).join(".criu/default.conf"));
        let named = match self.names {
            // Where it has no file of its own, crun takes runc's.
            Some(ConfigFile::Crun) if !ConfigFile::Crun.within(criu_dir).exists() => Some(ConfigFile::Runc),
            named => named,
        };
        let given = env::var_os("CRIU_CONFIG_FILE").map(PathBuf::from);
        let own = named.map(|file| file.within(criu_dir));
        [Some(ConfigFile::Default.within(criu_dir)), home, given, own].into_iter().flatten().collect()
    }

    /// crun names a file of its own to criu since 1.26, if its libcriu (4.2) can tell criu. From 1.23 on it says
    /// "tcp-close: no" at each restore, against which only such a file helps: what a criu is told counts more than
    /// default.conf.
    fn be_crun(&mut self, said: &str) {
        const NAMES_A_FILE: (u32, u32) = (1, 26);
        const FORBIDS_TCP_CLOSE: (u32, u32) = (1, 23);
        if !said.contains("+CRIU") {
            let cure = "install a crun built with CRIU, or use runc (podman --runtime runc)";
            return self.cannot_start(Problem::new("this crun is built without CRIU", cure));
        }
        let version = host::version(&self.version);
        let libcriu = match libcriu() {
            Ok(Some(libcriu)) => libcriu,
            Ok(None) => {
                let what = "there is no libcriu.so.2, by which crun starts criu";
                return self.cannot_start(Problem::new(what, "install libcriu 4.2 or later (libcriu2)"));
            }
            Err(error) => {
                return self
                    .problems
                    .push(Problem::new(format!("{error:#}"), "install libcriu 4.2 or later"));
            }
        };
        if version >= Some(NAMES_A_FILE) && libcriu.names_a_file {
            self.names = Some(ConfigFile::Crun);
        } else if version >= Some(FORBIDS_TCP_CLOSE) {
            let what =
                "it takes tcp-close back at each restore, and names criu no configuration file of its own";
            let cure =
                "install crun 1.26 or later and libcriu 4.2 or later, or use runc (podman --runtime runc)";
            self.problems.push(Problem::new(what, cure));
        }
    }
}

struct LibCriu {
    /// It has `criu_set_config_file()`, new in 4.2.
    names_a_file: bool,
}

/// The library that crun opens when it needs criu.
fn libcriu() -> Result<Option<LibCriu>> {
    const NAME: &str = "libcriu.so.2";
    let ldconfig = host::find_system("ldconfig").context("there is no ldconfig to find libcriu by")?;
    let cache = host::ask(&ldconfig, ["-p"])?;
    let mut lines = cache.lines().map(str::trim_start);
    let Some(line) = lines.find(|line| line.strip_prefix(NAME).is_some_and(|rest| rest.starts_with(' ')))
    else {
        return Ok(None);
    };
    let path = line.split(" => ").nth(1).with_context(|| format!("ldconfig says {line:?}"))?;
    Ok(Some(LibCriu { names_a_file: host::holds(Path::new(path), b"criu_set_config_file\0")? }))
}

/// What podman starts containers with.
fn of_podman(podman: &Path) -> Result<Runtime> {
    let path = host::ask(podman, ["info", "--format", "{{.Host.OCIRuntime.Path}}"])?;
    let path = PathBuf::from(path.trim());
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let kind = match name {
        "crun" => Kind::Crun,
        "runc" => Kind::Runc,
        _ => anyhow::bail!("podman's runtime is {}, which is neither runc nor crun", path.display()),
    };
    Ok(at(kind, path))
}
