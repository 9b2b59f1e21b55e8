//! The programs and the configuration of this host.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{AccessFlags, access};
use soccr::kernel::process::pidfd_open;

/// Where CRIU's configuration is looked for.
#[derive(Clone, Debug, clap::Args)]
pub struct Host {
    /// Take CRIU's configuration from DIR/etc/criu instead of /etc/criu: for images of systems, and for tests.
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
    root: PathBuf,
}

impl Host {
    /// The folder of CRIU's configuration files.
    pub fn criu_dir(&self) -> PathBuf {
        self.root.join("etc/criu")
    }
}

/// The program of this name on PATH.
pub fn find(program: &str) -> Option<PathBuf> {
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join(program)).find(|path| is_program(path))
}

/// A program of the system, also when PATH does not lead to it.
pub fn find_system(program: &str) -> Option<PathBuf> {
    let elsewhere = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|folder| Path::new(folder).join(program));
    find(program).or_else(|| elsewhere.into_iter().find(|path| is_program(path)))
}

/// Whether it can be started.
pub fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

/// What a program says on its standard output.
pub fn ask<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>) -> Result<String> {
    try_ask(program, arguments).with_context(|| format!("{}", program.display()))
}

fn try_ask<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>) -> Result<String> {
    const PATIENCE: u16 = 60_000; // podman takes its time on a slow machine
    // Files, which need nobody to read them while the program runs.
    let (mut answer, mut complaint) = (tempfile::tempfile()?, tempfile::tempfile()?);
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null());
    let mut child = command.stdout(answer.try_clone()?).stderr(complaint.try_clone()?).spawn()?;
    let pidfd = pidfd_open(child.id().cast_signed())?;
    let mut ended = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ended, PollTimeout::from(PATIENCE))? == 0 {
        child.kill()?;
        child.wait()?;
        bail!("does not answer within {} seconds", PATIENCE / 1000);
    }
    let status = child.wait()?;
    if !status.success() {
        let said = written(&mut complaint)?;
        bail!("{status}: {}", said.lines().last().unwrap_or("nothing was said"));
    }
    written(&mut answer)
}

fn written(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The text of a file; `None` when there is no such file.
pub fn read_if_there(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Whether a file has these bytes in it.
pub fn holds(path: &Path, bytes: &[u8]) -> Result<bool> {
    let mut all = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut all))
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(all.windows(bytes.len()).any(|window| window == bytes))
}

/// A version's first two numbers, the first that a text has: (4, 2) of "Version: 4.2.1".
pub fn version(text: &str) -> Option<(u32, u32)> {
    let words = text.split(|c: char| !c.is_ascii_digit() && c != '.');
    words.filter_map(|word| word.split_once('.')).find_map(|(major, rest)| {
        let minor = rest.split('.').next()?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    })
}

/// The kernel's version.
pub fn kernel() -> Option<(u32, u32)> {
    version(&fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        for (text, want) in [
            ("Version: 4.2.1\nGitID: v4.2.1\n", Some((4, 2))),
            ("crun version 1.28\ncommit: 3f28b5\n", Some((1, 28))),
            ("runc version 1.1.5+ds1\nspec: 1.0.2-dev", Some((1, 1))),
            ("podman version 4.3.1", Some((4, 3))),
            ("6.18.44-cloud", Some((6, 18))),
            ("crun version UNKNOWN", None),
        ] {
            assert_eq!(version(text), want, "{text}");
        }
        assert!(kernel().is_some());
    }

    #[test]
    fn a_long_answer_is_read_to_its_end() {
        let said = ask(Path::new("/bin/sh"), ["-c", "head -c 300000 /dev/zero; echo end"]).unwrap();
        assert!(said.len() == 300_004 && said.ends_with("end\n"));
        let error = ask(Path::new("/bin/sh"), ["-c", "echo first >&2; echo why >&2; exit 3"]).unwrap_err();
        assert_eq!(format!("{error:#}"), "/bin/sh: exit status: 3: why");
    }
}
