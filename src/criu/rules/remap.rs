//! Other addresses for what is restored.

use std::net::SocketAddr;

use super::BadRule;
use super::block::Block;
use crate::four_tuple::FourTuple;

/// The environment variable with rules such as `10.0.0.5=10.0.0.9,remote [fd00::1]:80=[fd00::2]:8080`.
pub const VARIABLE: &str = "SOCCR_REMAP";

/// Rules, of which the first that fits holds.
///
/// No rule rewrites what one has written: so it makes no difference how often they are applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remap(Vec<Rule>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    /// Which end of a connection; both where it says nothing.
    only: Option<End>,
    from: Block,
    to: Block,
}

/// An end of a connection. A listener has the local one only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Ours.
    Local,
    /// The peer's.
    Remote,
}

impl Remap {
    /// Adds the rules in `text`, with commas between them. `place` is where they stand.
    pub(super) fn add(&mut self, text: &str, place: &str) -> Result<(), BadRule> {
        for rule in text.split(',').map(str::trim).filter(|rule| !rule.is_empty()) {
            let bad = |why| BadRule { place: place.to_owned(), rule: rule.to_owned(), why };
            self.0.push(parse(rule).map_err(bad)?);
            if self.0.iter().any(|one| self.0.iter().any(|two| one.rewrites(two))) {
                return Err(bad("one rule would rewrite what another has written"));
            }
        }
        Ok(())
    }

    /// Whether there is no rule.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The address for this one.
    #[must_use]
    pub fn address(&self, end: End, addr: SocketAddr) -> SocketAddr {
        let fits = |rule: &&Rule| rule.only.is_none_or(|only| only == end) && rule.from.contains(addr);
        self.0.iter().find(fits).map_or(addr, |rule| rule.to.counterpart(addr))
    }

    /// The addresses for these.
    #[must_use]
    pub fn four_tuple(&self, tuple: FourTuple) -> FourTuple {
        FourTuple {
            local: self.address(End::Local, tuple.local),
            remote: self.address(End::Remote, tuple.remote),
        }
    }
}

impl Rule {
    /// Whether this rule would rewrite what the other has written.
    fn rewrites(&self, other: &Self) -> bool {
        let ends = self.only.zip(other.only).is_none_or(|(one, two)| one == two);
        ends && self.from.overlaps(&other.to.or_port_of(&other.from))
    }
}

fn parse(rule: &str) -> Result<Rule, &'static str> {
    let (only, blocks) = match rule.split_once(char::is_whitespace) {
        Some(("local", blocks)) => (Some(End::Local), blocks),
        Some(("remote", blocks)) => (Some(End::Remote), blocks),
        _ => (None, rule),
    };
    let (from, to) = blocks.split_once('=').ok_or("OLD=NEW is wanted")?;
    let (from, to) = (Block::parse(from.trim())?, Block::parse(to.trim())?);
    if !from.corresponds_to(&to) {
        return Err(
            "both sides are of one family, with prefixes of one length, and a port on the right has one on the left",
        );
    }
    Ok(Rule { only, from, to })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remap(text: &str) -> Result<Remap, BadRule> {
        let mut remap = Remap::default();
        remap.add(text, VARIABLE).map(|()| remap)
    }

    fn tuple(local: &str, remote: &str) -> FourTuple {
        FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    #[test]
    fn the_first_rule_that_fits_holds() {
        let remap =
            remap("10.0.0.5:80=10.0.0.9:8080, 10.0.0.5=10.0.0.9, remote 10.1.0.0/16=10.2.0.0/16").unwrap();
        for (old, new) in [
            (tuple("10.0.0.5:80", "10.1.2.3:7"), tuple("10.0.0.9:8080", "10.2.2.3:7")),
            (tuple("10.0.0.5:81", "10.9.2.3:7"), tuple("10.0.0.9:81", "10.9.2.3:7")),
            (tuple("10.1.2.3:7", "10.0.0.5:80"), tuple("10.1.2.3:7", "10.0.0.9:8080")),
        ] {
            assert_eq!(remap.four_tuple(old), new);
            assert_eq!(remap.four_tuple(new), new, "applied again");
        }
    }

    #[test]
    fn refuses_rules_that_make_no_sense() {
        for (text, why) in [
            ("10.0.0.5", "OLD=NEW"),
            ("10.0.0.5=fd00::1", "one family"),
            ("10.0.0.0/8=10.1.0.0/16", "one length"),
            ("10.0.0.5=10.0.0.6:80", "a port on the right"),
            ("10.0.0.5=10.0.0.6,10.0.0.6=10.0.0.5", "has written"),
            ("10.0.0.0/24=10.0.0.0/24", "has written"),
        ] {
            let said = remap(text).unwrap_err().to_string();
            assert!(said.contains(why) && said.starts_with(VARIABLE), "{text}: {said}");
        }
        assert!(remap("local 10.0.0.5=10.0.0.6,remote 10.0.0.6=10.0.0.5").is_ok());
    }
}
