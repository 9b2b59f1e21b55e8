//! How to lock: the method and the lease, as the environment chooses them.

use std::env::{self, VarError};
use std::time::Duration;

/// The environment variable that chooses the [`Method`].
pub const METHOD_VARIABLE: &str = "SOCCR_LOCK";
/// The environment variable that gives the lease, such as `90`, `90s`, `10m` or `1h`.
pub const LEASE_VARIABLE: &str = "SOCCR_LOCK_LEASE";

/// The environment variable that tells for how long after a dump packets are held for its restore; `0` or `off`: they are
/// dropped. See [`held`](super::held).
pub const HOLD_VARIABLE: &str = "SOCCR_HOLD";
/// The environment variable that tells for how long after the freeze who would connect to the tree's listeners is kept
/// waiting, where nobody listens; `0` or `off`: not at all.
pub const HOLD_NEW_VARIABLE: &str = "SOCCR_HOLD_NEW";
const HOLD_NEW_TIME: Duration = Duration::from_secs(30);
/// A peer sends again and again for about so long (`net.ipv4.tcp_retries2`), and then gives up.
const HOLD_TIME: Duration = Duration::from_secs(15 * 60);

/// What keeps the connections' packets away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "criu", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum Method {
    /// One nf_tables transaction per namespace: constant cost per connection, no program started.
    #[default]
    Nftables,
    /// One run of `iptables-restore` (and `ip6tables-restore`) per namespace, for kernels without nf_tables.
    Iptables,
    /// Nothing. A peer that sends while the connections have no socket resets them: only for peers
    /// that are known to be silent.
    Skip,
}

/// How to lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockOptions {
    /// The method.
    pub method: Method,
    /// After this time the kernel ends the lock by itself, whatever has become of us; `None`: never.
    /// Connections without a socket are reset from then on when their peers send. nf_tables only.
    pub lease: Option<Duration>,
    /// A group of the netfilter log, which gets a copy of each packet that is dropped (see
    /// [`Holder`](super::held::Holder)). nf_tables only.
    pub log: Option<u16>,
}

/// An environment variable has a value that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}={value:?} is not understood: it takes {expected}")]
pub struct BadOption {
    /// The variable.
    pub variable: &'static str,
    /// Its value.
    pub value: String,
    /// What it could be.
    pub expected: &'static str,
}

impl Method {
    /// The method that `SOCCR_LOCK` chooses; nf_tables where it is not set or empty.
    ///
    /// # Errors
    /// [`BadOption`] for any other value than `nftables`, `iptables` or `skip`.
    pub fn from_env() -> Result<Self, BadOption> {
        Self::parse(&variable(METHOD_VARIABLE))
    }

    fn parse(value: &str) -> Result<Self, BadOption> {
        match value {
            "" | "nftables" => Ok(Self::Nftables),
            "iptables" => Ok(Self::Iptables),
            "skip" => Ok(Self::Skip),
            other => Err(BadOption {
                variable: METHOD_VARIABLE,
                value: other.into(),
                expected: "nftables, iptables or skip",
            }),
        }
    }
}

impl LockOptions {
    /// What `SOCCR_LOCK` and `SOCCR_LOCK_LEASE` choose.
    ///
    /// # Errors
    /// [`BadOption`].
    pub fn from_env() -> Result<Self, BadOption> {
        let (method, lease) = (Method::from_env()?, Self::lease_of(&variable(LEASE_VARIABLE))?);
        Ok(Self { method, lease, log: None })
    }

    /// A lease such as `90`, `90s`, `10m` or `1h`; none where the text is empty.
    ///
    /// # Errors
    /// [`BadOption`], as if `SOCCR_LOCK_LEASE` had this value.
    pub fn lease_of(text: &str) -> Result<Option<Duration>, BadOption> {
        parse_lease(text)
    }
}

/// A value that is not Unicode is as wrong as any other, and shown with its bad bytes replaced.
pub(crate) fn variable(name: &str) -> String {
    match env::var(name) {
        Ok(value) => value,
        Err(VarError::NotPresent) => String::new(),
        Err(VarError::NotUnicode(value)) => value.to_string_lossy().into_owned(),
    }
}

fn parse_lease(value: &str) -> Result<Option<Duration>, BadOption> {
    if value.is_empty() { Ok(None) } else { parse_time(LEASE_VARIABLE, value).map(Some) }
}

/// What `SOCCR_HOLD` says.
pub(super) fn hold_time() -> Result<Duration, BadOption> {
    time_or_off(HOLD_VARIABLE, HOLD_TIME)
}

/// What `SOCCR_HOLD_NEW` says.
pub(super) fn hold_new_time() -> Result<Duration, BadOption> {
    time_or_off(HOLD_NEW_VARIABLE, HOLD_NEW_TIME)
}

fn time_or_off(name: &'static str, default: Duration) -> Result<Duration, BadOption> {
    match variable(name).as_str() {
        "" => Ok(default),
        "0" | "off" => Ok(Duration::ZERO),
        value => parse_time(name, value),
    }
}

fn parse_time(variable: &'static str, value: &str) -> Result<Duration, BadOption> {
    let bad = || BadOption {
        variable,
        value: value.into(),
        expected: "a whole number above 0 of seconds, or with s, m or h behind it",
    };
    let (number, unit) = match value.as_bytes().last() {
        Some(b's') => (&value[..value.len() - 1], 1),
        Some(b'm') => (&value[..value.len() - 1], 60),
        Some(b'h') => (&value[..value.len() - 1], 3600),
        _ => (value, 1),
    };
    let seconds = number.parse::<u32>().ok().filter(|n| *n > 0).ok_or_else(bad)?;
    Ok(Duration::from_secs(u64::from(seconds) * unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods() {
        assert_eq!(Method::parse(""), Ok(Method::Nftables));
        assert_eq!(Method::parse("nftables"), Ok(Method::Nftables));
        assert_eq!(Method::parse("iptables"), Ok(Method::Iptables));
        assert_eq!(Method::parse("skip"), Ok(Method::Skip));
        let error = Method::parse("nft").unwrap_err().to_string();
        assert_eq!(error, "SOCCR_LOCK=\"nft\" is not understood: it takes nftables, iptables or skip");
    }

    #[test]
    fn leases() {
        let seconds = |text| parse_lease(text).unwrap().map(|d| d.as_secs());
        assert_eq!(seconds(""), None);
        assert_eq!(seconds("90"), Some(90));
        assert_eq!(seconds("90s"), Some(90));
        assert_eq!(seconds("10m"), Some(600));
        assert_eq!(seconds("2h"), Some(7200));
        for bad in ["0", "0m", "-1", "m", "1d", "1.5h", "99999999999", "5é"] {
            assert!(parse_lease(bad).is_err(), "{bad}");
        }
    }
}
