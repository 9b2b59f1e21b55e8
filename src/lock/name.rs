//! The name of a lock.

use std::fmt;
use std::str::FromStr;

/// A lock's name: the nf_tables table `inet NAME`, such as `CRIU-1f3a`, or `soccr-1f3a`.
///
/// With iptables the lock is a chain `SOCCR-ID`, where the ID is what follows the prefix.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(
    feature = "criu",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct LockName(String);

/// Text that cannot name a lock. Names come out of images, so they are not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot name a network lock: it takes \"CRIU-\" or \"soccr-\", then letters, digits, '-', '_' or '.', \
     {max} characters in all",
    max = LockName::MAX_LEN
)]
pub struct BadLockName(String);

impl LockName {
    /// Stock CRIU has room for 31 characters in `inet NAME`.
    pub const MAX_LEN: usize = 31 - "inet ".len();
    /// The prefix of stock CRIU's tables: of the locks that stock CRIU shall be able to remove.
    pub const CRIU: &str = "CRIU-";
    /// The prefix of locks that are soccr's own business.
    pub const SOCCR: &str = "soccr-";

    const PATH: &str = "path-";

    /// `CRIU-<id>`: what stock CRIU removes when `id` is its image's `dump_criu_run_id`.
    ///
    /// # Errors
    /// [`BadLockName`]; the id has at most 21 characters.
    pub fn criu(id: &str) -> Result<Self, BadLockName> {
        format!("{}{id}", Self::CRIU).parse()
    }

    /// The table of the CRIU run with this id, as CRIU names it: a name that is too long is cut.
    #[must_use]
    pub fn of_run(run_id: &str) -> Option<Self> {
        let room = Self::MAX_LEN - Self::CRIU.len();
        Self::criu(run_id.get(..room).unwrap_or(run_id)).ok()
    }

    /// `soccr-<id>`, which nobody but soccr removes.
    ///
    /// # Errors
    /// [`BadLockName`]; the id has at most 20 characters.
    pub fn soccr(id: &str) -> Result<Self, BadLockName> {
        format!("{}{id}", Self::SOCCR).parse()
    }

    /// `soccr-path-<id>`: the lock, where packets pass, of the dump whose own lock is `name`. An id that is too long is
    /// cut.
    #[must_use]
    pub fn on_path(&self) -> Self {
        let id = self.id();
        let id = id.strip_prefix(Self::SOCCR).unwrap_or(id);
        let name = format!("{}{}{id}", Self::SOCCR, Self::PATH);
        Self(name.get(..Self::MAX_LEN).unwrap_or(&name).to_owned())
    }

    /// Whether it is a lock [on the way](Self::on_path).
    #[must_use]
    pub fn is_on_path(&self) -> bool {
        self.id().starts_with(Self::PATH)
    }

    /// The table's name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What follows the prefix.
    #[must_use]
    pub fn id(&self) -> &str {
        Self::strip_prefix(&self.0).unwrap_or(&self.0)
    }

    fn strip_prefix(name: &str) -> Option<&str> {
        name.strip_prefix(Self::CRIU).or_else(|| name.strip_prefix(Self::SOCCR))
    }
}

impl FromStr for LockName {
    type Err = BadLockName;

    fn from_str(text: &str) -> Result<Self, BadLockName> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = text.len() <= Self::MAX_LEN
            && Self::strip_prefix(text).is_some_and(|id| !id.is_empty() && id.chars().all(plain));
        if good { Ok(Self(text.to_owned())) } else { Err(BadLockName(text.to_owned())) }
    }
}

impl TryFrom<String> for LockName {
    type Error = BadLockName;

    fn try_from(text: String) -> Result<Self, BadLockName> {
        text.parse()
    }
}

impl From<LockName> for String {
    fn from(name: LockName) -> Self {
        name.0
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_at_most_21_characters() {
        assert_eq!(LockName::criu(&"x".repeat(21)).unwrap().to_string().len(), 26);
        assert!(LockName::criu(&"x".repeat(22)).is_err());
    }

    #[test]
    fn the_id_of_a_run_is_cut_as_criu_cuts_it() {
        let name = LockName::of_run("0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f").unwrap();
        assert_eq!(name.as_str(), "CRIU-0a1b2c3d-0a1b-0a1b-0a");
        assert_eq!(LockName::of_run("a;b"), None);
    }

    #[test]
    fn the_id_is_what_follows_the_prefix() {
        assert_eq!(LockName::criu("12-a").unwrap().id(), "12-a");
        assert_eq!(LockName::soccr("b").unwrap().id(), "b");
    }

    #[test]
    fn a_dump_and_its_restore_call_their_lock_on_the_way_the_same() {
        let dump = LockName::criu("soccr-0123456789ab").unwrap();
        assert_eq!(dump.on_path().as_str(), "soccr-path-0123456789ab");
        assert!(dump.on_path().is_on_path() && !dump.is_on_path());
        assert_eq!(LockName::soccr(&"x".repeat(20)).unwrap().on_path().as_str().len(), LockName::MAX_LEN);
    }

    #[test]
    fn nothing_that_nft_or_iptables_would_read_as_syntax() {
        for id in ["", "a b", "a;flush", "a\n", "ä", "a\"", "a{", "a\0"] {
            assert!(LockName::criu(id).is_err(), "{id:?}");
        }
        assert!("filter".parse::<LockName>().is_err());
    }
}
