//! A temporary way through other people's firewall for the segments that soccr forges.
//!
//! A forged segment goes through the host's own stack, and a rule of anybody that drops it there
//! wins: that our lock accepts the mark helps only within the lock's own table. So a rule that
//! accepts the mark [`MARK`] is put in front of every chain on the way, and taken out again.
//!
//! That is one transaction over netlink for all of nf_tables, and so for the tables of `iptables-nft`,
//! which show it as `-m mark --mark 0xc114 -j ACCEPT`; the old `ip_tables`, where it is in use, has
//! programs of its own. The rules carry a comment, by which [`sweep`] finds them after a crash.

use std::collections::hash_map::RandomState;
use std::fmt::Write;
use std::hash::{BuildHasher, Hasher};

use nix::errno::Errno;

use super::nft::{Client, NftError, Transaction, rules};
use super::xtables::{Family, Variant, XtablesError, legacy_tables};
use super::{LockError, MARK};
use crate::kernel::netns::NetNs;

const COMMENT_PREFIX: &str = "soccr-passage-";

/// How often a transaction is built anew because a chain or rule went away meanwhile.
const TRIES: usize = 5;

/// The tables of `ip_tables` that can drop a packet, and their chains on the way.
const LEGACY_CHAINS: [(&str, &[&str]); 4] = [
    ("raw", &["PREROUTING", "OUTPUT"]),
    ("mangle", &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]),
    ("filter", &["INPUT", "OUTPUT"]),
    ("security", &["INPUT", "OUTPUT"]),
];

/// An open way through the firewall of one network namespace. Dropping it closes it, as far as that works.
///
/// While it is open, anyone who may set `SO_MARK` (CAP_NET_ADMIN) passes, too; so keep it short.
#[derive(Debug)]
#[must_use = "dropping a passage closes it"]
pub struct Passage {
    ns: NetNs,
    comment: String,
    open: bool,
}

impl Passage {
    /// Lets marked packets through every chain of `ns` that filters local traffic.
    ///
    /// Tables that belong to another program (`flags owner`) cannot be passed; they are logged.
    ///
    /// # Errors
    /// [`LockError`]; nothing is left of it then.
    pub fn open(ns: &NetNs) -> Result<Self, LockError> {
        let unique = RandomState::new().build_hasher().finish();
        let comment = format!("{COMMENT_PREFIX}{}-{unique:x}", std::process::id());
        // From here on, an error closes what is open already.
        let passage = Self { ns: ns.clone(), comment, open: true };
        match open_nftables(ns, &passage.comment) {
            Err(NftError::Missing) => log::debug!("{ns}: no nf_tables to pass"),
            other => other.map_err(|e| nft_failed(OPEN, ns, e))?,
        }
        open_legacy(ns, &passage.comment).map_err(|e| xtables_failed(OPEN, ns, e))?;
        Ok(passage)
    }

    /// Removes the rules again; those that somebody else has removed already are no error.
    ///
    /// # Errors
    /// [`LockError`]; what could not be removed stays until [`sweep`].
    pub fn close(mut self) -> Result<(), LockError> {
        self.open = false;
        remove(&self.ns, |comment| comment == self.comment).map(drop)
    }
}

impl Drop for Passage {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        if let Err(error) = remove(&self.ns, |comment| comment == self.comment) {
            log::error!("a way through the firewall stays open: {}", crate::chain(&error));
        }
    }
}

/// Closes all passages in `ns`, whoever opened them, and counts the rules that it removed: what is
/// left after a crash. It would also close one that another soccr is using right now.
///
/// # Errors
/// [`LockError`]; rules are left.
pub fn sweep(ns: &NetNs) -> Result<usize, LockError> {
    remove(ns, |comment| comment.starts_with(COMMENT_PREFIX))
}

const OPEN: &str = "open a way through the firewall for forged segments";
const CLOSE: &str = "close the way through the firewall for forged segments";

fn open_nftables(ns: &NetNs, comment: &str) -> Result<(), NftError> {
    let client = Client::open(ns)?;
    retried(|| {
        let mut transaction = Transaction::new();
        for chain in rules::filtering_chains(&client)? {
            rules::accept_marked_first(&mut transaction, &chain, comment);
        }
        client.commit(transaction)
    })
}

/// Tries both interfaces, whatever becomes of the first.
fn remove(ns: &NetNs, is_ours: impl Fn(&str) -> bool) -> Result<usize, LockError> {
    let nftables = match remove_nftables(ns, &is_ours) {
        Err(NftError::Missing) => Ok(0),
        other => other.map_err(|e| nft_failed(CLOSE, ns, e)),
    };
    let legacy = remove_legacy(ns, &is_ours).map_err(|e| xtables_failed(CLOSE, ns, e));
    Ok(nftables? + legacy?)
}

fn remove_nftables(ns: &NetNs, is_ours: &impl Fn(&str) -> bool) -> Result<usize, NftError> {
    let client = Client::open(ns)?;
    retried(|| {
        let found = rules::find_by_comment(&client, is_ours)?;
        let mut transaction = Transaction::new();
        for rule in &found {
            rules::delete(&mut transaction, rule);
        }
        client.commit(transaction).map(|()| found.len())
    })
}

/// Again, when something that was there a moment ago is gone.
fn retried<T>(mut work: impl FnMut() -> Result<T, NftError>) -> Result<T, NftError> {
    for _ in 1..TRIES {
        match work() {
            Err(e) if e.is(Errno::ENOENT) => (),
            other => return other,
        }
    }
    work()
}

fn open_legacy(ns: &NetNs, comment: &str) -> Result<(), XtablesError> {
    for family in Family::BOTH {
        let in_use = legacy_tables(ns, family)?;
        let mut script = String::new();
        for (table, chains) in LEGACY_CHAINS.iter().filter(|(table, _)| in_use.iter().any(|t| t == table)) {
            let _ = writeln!(script, "*{table}");
            for chain in *chains {
                let _ = writeln!(
                    script,
                    "-I {chain} 1 -m mark --mark {MARK:#x} -m comment --comment {comment} -j ACCEPT"
                );
            }
            script.push_str("COMMIT\n");
        }
        if script.is_empty() {
            continue;
        }
        match family.restore_with(ns, Variant::Legacy, &script) {
            Err(e) if e.not_installed() => {
                log::warn!(
                    "{ns}: rules of the old ip_tables may stop forged segments: {e} is needed to pass them"
                );
            }
            other => other?,
        }
    }
    Ok(())
}

fn remove_legacy(ns: &NetNs, is_ours: impl Fn(&str) -> bool) -> Result<usize, XtablesError> {
    let mut removed = 0;
    for family in Family::BOTH {
        if legacy_tables(ns, family)?.is_empty() {
            continue;
        }
        let saved = match family.save_with(ns, Variant::Legacy, &[]) {
            Err(e) if e.not_installed() => continue,
            other => other?,
        };
        let (script, count) = legacy_removal(&saved, &is_ours);
        if count > 0 {
            family.restore_with(ns, Variant::Legacy, &script)?;
        }
        removed += count;
    }
    Ok(removed)
}

/// The script that removes our rules from what `iptables-legacy-save` printed, and their number.
fn legacy_removal(saved: &str, is_ours: impl Fn(&str) -> bool) -> (String, usize) {
    let (mut script, mut count) = (String::new(), 0);
    for line in saved.lines() {
        if line.starts_with('*') || line == "COMMIT" {
            let _ = writeln!(script, "{line}");
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let mut words = rule.split(' ').skip_while(|word| *word != "--comment");
            if words.nth(1).is_some_and(&is_ours) {
                let _ = writeln!(script, "-D {rule}");
                count += 1;
            }
        }
    }
    (script, count)
}

fn nft_failed(action: &str, ns: &NetNs, source: NftError) -> LockError {
    LockError::Nftables { action: action.into(), ns: ns.clone(), source }
}

fn xtables_failed(action: &str, ns: &NetNs, source: XtablesError) -> LockError {
    LockError::Iptables { action: action.into(), ns: ns.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_legacy_rules_are_removed() {
        let saved = "# Generated\n*filter\n:INPUT ACCEPT [0:0]\n\
            -A INPUT -m mark --mark 0xc114 -m comment --comment soccr-passage-7-ab -j ACCEPT\n\
            -A INPUT -m mark --mark 0xc114 -m comment --comment soccr-passage-8-cd -j ACCEPT\n\
            -A INPUT -m mark --mark 0xc114 -j ACCEPT\n\
            -A INPUT -m comment --comment \"about soccr-passage-7-ab\" -j DROP\nCOMMIT\n";
        let (script, count) = legacy_removal(saved, |comment| comment == "soccr-passage-7-ab");
        assert_eq!(count, 1);
        assert_eq!(
            script,
            "*filter\n-D INPUT -m mark --mark 0xc114 -m comment --comment soccr-passage-7-ab -j ACCEPT\nCOMMIT\n"
        );
        assert_eq!(legacy_removal(saved, |c| c.starts_with(COMMENT_PREFIX)).1, 2);
    }
}
