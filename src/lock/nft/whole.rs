//! Tables that lock a namespace as a whole, as stock CRIU makes them, step by step:
//!
//! ```text
//! table inet CRIU-ID {
//!     chain output { type filter hook output priority 0; policy drop; meta mark 0x0000c114 accept }
//!     chain input { type filter hook input priority 0; policy drop; meta mark 0x0000c114 accept }
//! }
//! ```
//!
//! Anybody can give a table such a name, so one is CRIU's only if nothing else is in it: the kernel counts
//! what is in a table and in a chain.

use nix::errno::Errno;

use super::abi;
use super::client::Client;
use super::error::NftError;
use super::expr::{MARK, number};
use super::table::FAMILY;
use super::wire::{Attributes, Malformed, Value, Writer};
use crate::kernel::netns::NetNs;
use crate::lock::LockName;

pub(super) struct Table {
    name: LockName,
    used: u32,
}

pub(super) struct Chain {
    table: String,
    name: String,
    /// Whether it is one of the two that CRIU makes, as far as its rules do not count.
    drops_all: bool,
    used: u32,
}

/// CRIU's tables in `ns` that lock all of it, whole or half made. A kernel without nf_tables has none.
pub(crate) fn find(ns: &NetNs) -> Result<Vec<LockName>, NftError> {
    match try_find(ns) {
        // No such subsystem of nfnetlink; or the table went away meanwhile.
        Err(error) if error.is(Errno::EINVAL) || error.is(Errno::ENOENT) => Ok(Vec::new()),
        Err(NftError::Missing) => Ok(Vec::new()),
        other => other,
    }
}

fn try_find(ns: &NetNs) -> Result<Vec<LockName>, NftError> {
    let client = Client::open(ns)?;
    let tables = client.dump("list tables", libc::NFT_MSG_GETTABLE, FAMILY, |_| (), criu_table)?;
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let chains = client.dump("list chains", libc::NFT_MSG_GETCHAIN, FAMILY, |_| (), chain)?;
    let mut found = Vec::new();
    for table in tables {
        let chains: Vec<_> = chains.iter().filter(|chain| chain.table == table.name.as_str()).collect();
        let nothing_else = usize::try_from(table.used) == Ok(chains.len());
        if nothing_else && chains.iter().all(|chain| chain.drops_all) && only_marked_pass(&client, &chains)? {
            found.push(table.name);
        }
    }
    Ok(found)
}

pub(super) fn criu_table(_: u8, table: Attributes<'_>) -> Result<Option<Table>, Malformed> {
    let name = table.require(abi::table::NAME)?.str()?.parse::<LockName>();
    let Some(name) = name.ok().filter(|name| name.as_str().starts_with(LockName::CRIU)) else {
        return Ok(None);
    };
    Ok(Some(Table { name, used: table.require(abi::table::USE)?.u32()? }))
}

pub(super) fn chain(_: u8, chain: Attributes<'_>) -> Result<Option<Chain>, Malformed> {
    let name = chain.require(abi::chain::NAME)?.str()?;
    Ok(Some(Chain {
        table: chain.require(abi::chain::TABLE)?.str()?.to_owned(),
        name: name.to_owned(),
        drops_all: drops_all(name, &chain)?,
        used: chain.require(abi::chain::USE)?.u32()?,
    }))
}

/// Whether it is a chain `input` or `output` that drops what no rule accepts.
fn drops_all(name: &str, chain: &Attributes<'_>) -> Result<bool, Malformed> {
    let wanted = match name {
        "input" => libc::NF_INET_LOCAL_IN,
        "output" => libc::NF_INET_LOCAL_OUT,
        _ => return Ok(false),
    };
    let (Some(hook), Some(policy)) = (chain.find(abi::chain::HOOK)?, chain.find(abi::chain::POLICY)?) else {
        return Ok(false); // only rules call it
    };
    let hook = hook.nested();
    Ok(hook.require(abi::hook::NUM)?.u32()? == number(wanted)
        && hook.require(abi::hook::PRIORITY)?.u32()? == 0
        && policy.u32()? == number(libc::NF_DROP)
        && chain.find(abi::chain::TYPE)?.map(Value::str).transpose()? == Some("filter"))
}

/// Whether each chain has no rule yet, or the one that lets marked packets through.
fn only_marked_pass(client: &Client, chains: &[&Chain]) -> Result<bool, NftError> {
    for chain in chains {
        let filter = |w: &mut Writer| {
            w.put_str(abi::rule::TABLE, &chain.table);
            w.put_str(abi::rule::CHAIN, &chain.name);
        };
        let accepts = |_: u8, rule: Attributes<'_>| accepts_marked(&rule).map(Some);
        let rules = client.dump("list rules", libc::NFT_MSG_GETRULE, FAMILY, filter, accepts)?;
        if usize::try_from(chain.used) != Ok(rules.len()) || !matches!(rules[..], [] | [true]) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the rule is `meta mark 0xc114 accept`.
pub(super) fn accepts_marked(rule: &Attributes<'_>) -> Result<bool, Malformed> {
    let Some(expressions) = rule.find(abi::rule::EXPRESSIONS)? else { return Ok(false) };
    let mut found = Vec::new();
    for expression in expressions.nested() {
        let expression = expression?.1.nested();
        let Some(data) = expression.find(abi::expr::DATA)? else { return Ok(false) };
        found.push((expression.require(abi::expr::NAME)?.str()?, data.nested()));
    }
    let [("meta", meta), ("cmp", compare), ("immediate", verdict)] = &found[..] else { return Ok(false) };
    let accept = verdict.require(abi::immediate::DATA)?.nested().find(abi::data::VERDICT)?;
    let Some(accept) = accept else { return Ok(false) };
    let register = meta.find(abi::meta::DREG)?.map(Value::u32).transpose()?;
    Ok(register.is_some()
        && register == Some(compare.require(abi::cmp::SREG)?.u32()?)
        && meta.require(abi::meta::KEY)?.u32()? == number(libc::NFT_META_MARK)
        && compare.require(abi::cmp::OP)?.u32()? == number(libc::NFT_CMP_EQ)
        && compare.require(abi::cmp::DATA)?.nested().require(abi::data::VALUE)?.bytes() == MARK.to_ne_bytes()
        && accept.nested().require(abi::verdict::CODE)?.u32()? == number(libc::NF_ACCEPT))
}
