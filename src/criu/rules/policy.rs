//! What becomes of a connection: whether it is carried at all.

use super::BadRule;
use super::block::Block;
use crate::four_tuple::FourTuple;

/// The environment variable with rules such as `close remote 10.0.0.0/8; refuse local :22`.
pub const VARIABLE: &str = "SOCCR_POLICY";

/// What to do with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is carried.
    Keep,
    /// It is closed without a word to its peer when the tasks end, and its socket comes back shut down.
    Close,
    /// As `Close`, and its peer is told so by a RST.
    Reset,
    /// It makes the dump, or the restore, fail.
    Refuse,
}

/// Rules, of which the first that fits holds. What none fits is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<Rule>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    action: Action,
    local: Option<Block>,
    remote: Option<Block>,
    /// Only connections of this host with itself.
    loopback: bool,
    /// For the log and for errors: where it stands.
    place: String,
}

impl Policy {
    /// Adds the rules in `text`, with semicolons between them. `place` is where they stand.
    pub(super) fn add(&mut self, text: &str, place: &str) -> Result<(), BadRule> {
        for rule in text.split(';').map(str::trim).filter(|rule| !rule.is_empty()) {
            let bad = |why| BadRule { place: place.to_owned(), rule: rule.to_owned(), why };
            self.0.push(parse(rule, place).map_err(bad)?);
        }
        Ok(())
    }

    /// What to do with this connection, and where the rule stands that says so.
    #[must_use]
    pub fn of(&self, tuple: &FourTuple) -> (Action, &str) {
        let rule = self.0.iter().find(|rule| rule.fits(tuple));
        rule.map_or((Action::Keep, ""), |rule| (rule.action, rule.place.as_str()))
    }
}

impl Rule {
    fn fits(&self, tuple: &FourTuple) -> bool {
        let (local, remote) = (tuple.local.ip().to_canonical(), tuple.remote.ip().to_canonical());
        self.local.is_none_or(|block| block.contains(tuple.local))
            && self.remote.is_none_or(|block| block.contains(tuple.remote))
            && (!self.loopback || remote.is_loopback() || local == remote)
    }
}

fn parse(rule: &str, place: &str) -> Result<Rule, &'static str> {
    let mut words = rule.split_whitespace();
    let action = match words.next() {
        Some("keep") => Action::Keep,
        Some("close") => Action::Close,
        Some("reset") => Action::Reset,
        Some("refuse") => Action::Refuse,
        _ => return Err("it begins with keep, close, reset or refuse"),
    };
    let mut rule = Rule { action, local: None, remote: None, loopback: false, place: place.to_owned() };
    while let Some(word) = words.next() {
        let block = match word {
            "local" => &mut rule.local,
            "remote" => &mut rule.remote,
            "loopback" => {
                rule.loopback = true;
                continue;
            }
            _ => return Err("behind the action stand local ADDRESS, remote ADDRESS or loopback"),
        };
        let text = words.next().ok_or("an address is missing")?;
        if block.replace(Block::parse(text)?).is_some() {
            return Err("one end stands there twice");
        }
    }
    Ok(rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Result<Policy, BadRule> {
        let mut policy = Policy::default();
        policy.add(text, VARIABLE).map(|()| policy)
    }

    #[test]
    fn the_first_rule_that_fits_holds() {
        let policy = policy(
            "keep local :80 remote 10.0.0.0/8; reset remote 10.0.0.0/8; close loopback; refuse local [fd00::1]:22",
        )
        .unwrap();
        for (local, remote, action) in [
            ("10.0.0.1:80", "10.2.3.4:5", Action::Keep),
            ("10.0.0.1:81", "10.2.3.4:5", Action::Reset),
            ("[::ffff:127.0.0.1]:81", "[::ffff:127.0.0.1]:5", Action::Close),
            ("192.0.2.1:81", "192.0.2.1:5", Action::Close),
            ("[fd00::1]:22", "[fd00::2]:5", Action::Refuse),
            ("192.0.2.1:81", "192.0.2.2:5", Action::Keep),
        ] {
            let tuple = FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() };
            assert_eq!(policy.of(&tuple).0, action, "{tuple}");
        }
    }

    #[test]
    fn refuses_rules_that_make_no_sense() {
        for text in ["drop", "close near", "close local", "close local x", "close local :1 local :2"] {
            let said = policy(text).unwrap_err().to_string();
            assert!(said.starts_with(VARIABLE) && said.contains(text), "{said}");
        }
    }
}
