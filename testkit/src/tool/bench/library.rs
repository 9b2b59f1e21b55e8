//! The C library beside CRIU's own: one program, linked with either.
//!
//! The two take turns, short ones and many, and change who begins: what else the machine does meets both.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use soccr_testkit::NetNs;
use tempfile::TempDir;

use super::case::Bytes;
use super::pair::{Pair, median};
use crate::target;

/// A queue length, and how often it is measured.
#[derive(Clone, Copy)]
pub struct Length {
    /// In each queue.
    bytes: usize,
    turns: usize,
    connections: usize,
    /// What a save and a restore may cost beside CRIU's: of an empty queue the two calls weigh that compute the segment size.
    most: [f64; 2],
}

pub const ALL: [Length; 4] = [
    Length { bytes: 0, turns: 60, connections: 1000, most: [1.0, 1.15] },
    Length { bytes: 1 << 10, turns: 60, connections: 1000, most: [1.0, 1.0] },
    Length { bytes: 64 << 10, turns: 60, connections: 400, most: [1.0, 1.0] },
    Length { bytes: 4 << 20, turns: 40, connections: 8, most: [1.0, 1.0] },
];

/// That nothing has gone wrong by far.
pub const SMOKE: [Length; 1] = [Length { bytes: 0, turns: 5, connections: 200, most: [2.0, 2.0] }];

impl Length {
    /// The words of `--only`.
    pub fn name(self) -> String {
        format!("library {}", Bytes(self.bytes))
    }
}

/// Both programs, and where they run.
pub struct Libraries {
    crius: PathBuf,
    ours: PathBuf,
    ns: NetNs,
    _dir: TempDir,
}

const SAVE_AND_RESTORE: [&str; 2] = ["pause + save", "restore + resume"];

impl Libraries {
    pub fn build(criu: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix("soccr-bench-")?;
        // criu is at criu/criu of its tree.
        let tree = criu.ancestors().nth(2).context("criu has a source tree")?;
        let (crius, ours) = (dir.path().join("criu"), dir.path().join("ours"));
        compile(&crius, &tree.join("soccr/libsoccr.a"), &["-lnet"])?;
        compile(&ours, &target("release/libsoccr.a"), &[])?;
        Ok(Self { crius, ours, ns: NetNs::locked()?, _dir: dir })
    }

    pub fn measure(&self, length: Length) -> Result<[Pair; 2]> {
        let turns: Vec<_> =
            (0..length.turns).map(|nth| self.both(length, nth % 2 == 1)).collect::<Result<_>>()?;
        let pair = |nth: usize| {
            let all = |of: fn([f64; 2]) -> f64| {
                median(turns.iter().map(|(crius, ours)| of([crius[nth], ours[nth]])).collect())
            };
            let what = format!("{} {}", length.name(), SAVE_AND_RESTORE[nth]);
            let (crius, ours) = (all(|[crius, _]| crius), all(|[_, ours]| ours));
            let ratio = all(|[crius, ours]| ours / crius);
            let missing = "there is a turn";
            anyhow::Ok(Pair {
                what,
                other: "CRIU's library",
                other_us: crius.context(missing)? / 1e3,
                ours_us: ours.context(missing)? / 1e3,
                ratio: ratio.context(missing)?,
                most: length.most[nth],
            })
        };
        Ok([pair(0)?, pair(1)?])
    }

    /// Nanoseconds of CRIU's and of ours.
    fn both(&self, length: Length, ours_first: bool) -> Result<([f64; 2], [f64; 2])> {
        if ours_first {
            let ours = self.turn(&self.ours, length)?;
            return Ok((self.turn(&self.crius, length)?, ours));
        }
        Ok((self.turn(&self.crius, length)?, self.turn(&self.ours, length)?))
    }

    fn turn(&self, program: &Path, length: Length) -> Result<[f64; 2]> {
        let mut command = self.ns.command(program);
        command.args([length.bytes.to_string(), length.connections.to_string()]);
        let said = output(&mut command)?;
        let numbers: Vec<f64> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        <[f64; 2]>::try_from(numbers).ok().with_context(|| format!("{}: {said:?}", program.display()))
    }
}

/// `libsoccr/tests/bench.c` with this library.
fn compile(program: &Path, library: &Path, more: &[&str]) -> Result<()> {
    ensure!(library.exists(), "no {} (make; make criu)", library.display());
    let libsoccr = Path::new(env!("CARGO_MANIFEST_DIR")).join("../libsoccr");
    let mut command = Command::new("cc");
    command.arg("-O2").arg("-I").arg(libsoccr.join("include"));
    command.args(["bench.c", "connection.c"].map(|file| libsoccr.join("tests").join(file)));
    command.arg(library).args(more).arg("-o").arg(program);
    output(&mut command).map(drop)
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().with_context(|| format!("cannot run {name}"))?;
    ensure!(out.status.success(), "{name}: {}: {}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    Ok(String::from_utf8(out.stdout)?)
}
