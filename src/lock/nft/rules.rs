//! Rules in other people's chains: put first, found again by their comment, removed.

use std::collections::HashSet;

use super::client::{Client, Transaction};
use super::error::NftError;
use super::expr::{Expressions, Verdict};
use super::wire::{Attributes, Malformed, Value, Writer};
use super::{abi, table};
use crate::lock::LockName;

/// `NFPROTO_UNSPEC`: chains and rules of every family.
const ANY_FAMILY: u8 = 0;

/// A chain that the kernel itself calls.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BaseChain {
    family: u8,
    table: String,
    chain: String,
}

/// A rule, by the number that the kernel gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleHandle {
    family: u8,
    table: String,
    chain: String,
    handle: u64,
}

/// The chains that may drop a packet between a local raw socket and a local TCP socket, except those
/// of network locks, and those that only their owner may change.
pub fn filtering_chains(client: &Client) -> Result<Vec<BaseChain>, NftError> {
    let owned = owned_tables(client)?;
    let chains = client.dump("list chains", libc::NFT_MSG_GETCHAIN, ANY_FAMILY, |_| (), filtering_chain)?;
    let (owned, free): (Vec<_>, Vec<_>) = chains
        .into_iter()
        .filter(|c| !is_lock(c))
        .partition(|c| owned.contains(&(c.family, c.table.clone())));
    for chain in owned {
        log::warn!(
            "the table {} has an owner: no rule can be put into its chain {}",
            chain.table,
            chain.chain
        );
    }
    Ok(free)
}

fn owned_tables(client: &Client) -> Result<HashSet<(u8, String)>, NftError> {
    let tables = client.dump("list tables", libc::NFT_MSG_GETTABLE, ANY_FAMILY, |_| (), owned_table)?;
    Ok(tables.into_iter().collect())
}

pub(super) fn owned_table(family: u8, table: Attributes<'_>) -> Result<Option<(u8, String)>, Malformed> {
    let owned = table.find(abi::table::OWNER)?.is_some();
    Ok(if owned { Some((family, table.require(abi::table::NAME)?.str()?.to_owned())) } else { None })
}

pub(super) fn filtering_chain(family: u8, chain: Attributes<'_>) -> Result<Option<BaseChain>, Malformed> {
    Ok(if filters(family, &chain)? { Some(base_chain(family, &chain)?) } else { None })
}

fn filters(family: u8, chain: &Attributes<'_>) -> Result<bool, Malformed> {
    let ip = [libc::NFPROTO_INET, libc::NFPROTO_IPV4, libc::NFPROTO_IPV6].contains(&i32::from(family));
    let (Some(hook), Some(kind)) = (chain.find(abi::chain::HOOK)?, chain.find(abi::chain::TYPE)?) else {
        return Ok(false); // only rules call it
    };
    if !ip || !matches!(kind.str()?, "filter" | "route") {
        return Ok(false); // the third type, nat, cannot drop
    }
    let hook = hook.nested().require(abi::hook::NUM)?.u32()?;
    let ours = [
        libc::NF_INET_PRE_ROUTING,
        libc::NF_INET_LOCAL_IN,
        libc::NF_INET_LOCAL_OUT,
        libc::NF_INET_POST_ROUTING,
    ];
    Ok(ours.iter().any(|h| u32::try_from(*h) == Ok(hook)))
}

fn base_chain(family: u8, chain: &Attributes<'_>) -> Result<BaseChain, Malformed> {
    Ok(BaseChain {
        family,
        table: chain.require(abi::chain::TABLE)?.str()?.to_owned(),
        chain: chain.require(abi::chain::NAME)?.str()?.to_owned(),
    })
}

/// Locks let marked packets through by themselves.
fn is_lock(chain: &BaseChain) -> bool {
    chain.family == table::FAMILY && chain.table.parse::<LockName>().is_ok()
}

/// Adds the step that lets marked packets through `chain`, before all its other rules.
pub fn accept_marked_first(transaction: &mut Transaction, chain: &BaseChain, comment: &str) {
    let step = "put a rule in front of a chain";
    transaction.step(step, libc::NFT_MSG_NEWRULE, libc::NLM_F_CREATE, chain.family, |w| {
        w.put_str(abi::rule::TABLE, &chain.table);
        w.put_str(abi::rule::CHAIN, &chain.chain);
        Expressions::put(w, |e| {
            e.marked();
            e.verdict(Verdict::Accept);
        });
        put_comment(w, comment);
    });
}

fn put_comment(w: &mut Writer, comment: &str) {
    let len = u8::try_from(comment.len() + 1).expect("comments are short");
    let mut data = vec![abi::UDATA_RULE_COMMENT, len];
    data.extend_from_slice(comment.as_bytes());
    data.push(0);
    w.put(abi::rule::USERDATA, &data);
}

/// The rules whose comment `is_ours`.
pub fn find_by_comment(client: &Client, is_ours: impl Fn(&str) -> bool) -> Result<Vec<RuleHandle>, NftError> {
    client.dump(
        "list rules",
        libc::NFT_MSG_GETRULE,
        ANY_FAMILY,
        |_| (),
        |family, rule| commented_rule(family, &rule, &is_ours),
    )
}

pub(super) fn commented_rule(
    family: u8,
    rule: &Attributes<'_>,
    is_ours: impl Fn(&str) -> bool,
) -> Result<Option<RuleHandle>, Malformed> {
    match rule.find(abi::rule::USERDATA)?.and_then(comment) {
        Some(text) if is_ours(text) => Ok(Some(RuleHandle {
            family,
            table: rule.require(abi::rule::TABLE)?.str()?.to_owned(),
            chain: rule.require(abi::rule::CHAIN)?.str()?.to_owned(),
            handle: rule.require(abi::rule::HANDLE)?.u64()?,
        })),
        _ => Ok(None),
    }
}

/// The comment in a rule's user data; `None` for what other programs keep there.
fn comment(data: Value<'_>) -> Option<&str> {
    let mut rest = data.bytes();
    while let [kind, len, tail @ ..] = rest {
        let (value, next) = tail.split_at_checked(usize::from(*len))?;
        if *kind == abi::UDATA_RULE_COMMENT {
            return std::str::from_utf8(value.strip_suffix(&[0])?).ok();
        }
        rest = next;
    }
    None
}

/// Adds the step that removes a rule.
pub fn delete(transaction: &mut Transaction, rule: &RuleHandle) {
    transaction.step("remove a rule", libc::NFT_MSG_DELRULE, 0, rule.family, |w| {
        w.put_str(abi::rule::TABLE, &rule.table);
        w.put_str(abi::rule::CHAIN, &rule.chain);
        w.put_u64(abi::rule::HANDLE, rule.handle);
    });
}
