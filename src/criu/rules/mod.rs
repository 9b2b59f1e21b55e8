//! What a host's owner has to say about connections: `/etc/criu/soccr.conf`, and the environment, which comes first.
//!
//! ```text
//! # lines of these kinds, in any order; of each kind the first that fits holds
//! policy reset remote 10.0.0.0/8
//! policy refuse local :22
//! remap 10.0.0.5=10.0.0.9
//! wait-address 5s
//! warm half
//! ```

mod block;
mod policy;
mod remap;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use policy::{Action, Policy};
pub use remap::{End, Remap};

use super::warm::Warmth;
use crate::lock::{LockOptions, variable};

/// Where the file is, unless `SOCCR_CONF` names another one.
pub const FILE: &str = "/etc/criu/soccr.conf";
const FILE_VARIABLE: &str = "SOCCR_CONF";
const WAIT_VARIABLE: &str = "SOCCR_WAIT_ADDRESS";
const WARM_VARIABLE: &str = "SOCCR_WARM";

/// A rule makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {rule:?}: {why}")]
pub struct BadRule {
    /// A variable, or a file and the number of a line in it.
    pub place: String,
    /// The rule.
    pub rule: String,
    /// What is wrong with it.
    pub why: &'static str,
}

/// The rules cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RulesError {
    /// One makes no sense.
    #[error(transparent)]
    Bad(#[from] BadRule),
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Which connections are carried.
    pub policy: Policy,
    /// Other addresses for what is restored.
    pub remap: Remap,
    /// How long a restore waits for an address that is not there yet.
    pub wait_address: Option<Duration>,
    /// What becomes of congestion windows.
    pub warm: Option<Warmth>,
}

impl Rules {
    /// Those of the environment, and of the file if it is there.
    ///
    /// # Errors
    /// [`RulesError`], which names variable or line.
    pub fn read() -> Result<Self, RulesError> {
        let mut rules = Self::default();
        for (kind, name) in [
            ("policy", policy::VARIABLE),
            ("remap", remap::VARIABLE),
            ("wait-address", WAIT_VARIABLE),
            ("warm", WARM_VARIABLE),
        ] {
            rules.add(kind, &variable(name), name)?;
        }
        let path = match variable(FILE_VARIABLE) {
            name if name.is_empty() => FILE.to_owned(),
            name => name,
        };
        match std::fs::read_to_string(&path) {
            Ok(text) => rules.add_lines(&text, Path::new(&path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path == FILE => {}
            Err(source) => return Err(RulesError::File { path: path.into(), source }),
        }
        Ok(rules)
    }

    /// Those in the text of a file.
    ///
    /// # Errors
    /// [`BadRule`], which names the line.
    pub fn parse(text: &str, file: &Path) -> Result<Self, BadRule> {
        let mut rules = Self::default();
        rules.add_lines(text, file).map(|()| rules)
    }

    fn add_lines(&mut self, text: &str, file: &Path) -> Result<(), BadRule> {
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            let (kind, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            if !kind.is_empty() {
                self.add(kind, rest, &format!("{}:{}", file.display(), number + 1))?;
            }
        }
        Ok(())
    }

    fn add(&mut self, kind: &str, text: &str, place: &str) -> Result<(), BadRule> {
        let bad = |why| BadRule { place: place.to_owned(), rule: format!("{kind} {text}"), why };
        match kind {
            "policy" => self.policy.add(text, place),
            "remap" => self.remap.add(text, place),
            "wait-address" => {
                let time = LockOptions::lease_of(text).map_err(|_| bad("a time such as 5s is wanted"))?;
                self.wait_address = self.wait_address.or(time);
                Ok(())
            }
            "warm" => {
                let warm = match text.trim() {
                    "" => None, // the variable is not set
                    "keep" => Some(Warmth::Keep),
                    "half" => Some(Warmth::Half),
                    "fresh" => Some(Warmth::Fresh),
                    _ => return Err(bad("keep, half or fresh is wanted")),
                };
                self.warm = self.warm.or(warm);
                Ok(())
            }
            _ => Err(bad("a line begins with policy, remap, wait-address or warm")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Result<Rules, BadRule> {
        Rules::parse(text, Path::new("soccr.conf"))
    }

    #[test]
    fn a_file_has_lines_of_all_kinds() {
        let all = rules(
            "# a comment\n\n policy close local :22 # ssh\nremap 10.0.0.5=10.0.0.9\nwait-address 5s\nwait-address 9s\nwarm half\n",
        )
        .unwrap();
        assert_eq!(all.warm, Some(Warmth::Half));
        assert_eq!(all.wait_address, Some(Duration::from_secs(5)));
        assert!(!all.remap.is_empty());
        let tuple = crate::four_tuple::FourTuple {
            local: "10.0.0.1:22".parse().unwrap(),
            remote: "10.0.0.2:5".parse().unwrap(),
        };
        assert_eq!(all.policy.of(&tuple), (Action::Close, "soccr.conf:3"));
    }

    #[test]
    fn errors_name_the_line() {
        for text in ["\n\nfoo", "\n\npolicy drop", "\n\nremap x=y", "\n\nwait-address soon", "\n\nwarm up"] {
            let said = rules(text).unwrap_err().to_string();
            assert!(said.starts_with("soccr.conf:3: "), "{said}");
        }
    }
}
