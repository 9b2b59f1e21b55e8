//! The network lock in nf_tables, over netlink.

mod abi;
pub(super) mod answer;
mod client;
mod error;
mod expr;
pub(crate) mod fuzzing;
pub(super) mod rules;
mod table;
pub(crate) mod whole;

use std::time::Duration;

use nix::errno::Errno;

use super::{Listener, LockError, LockInfo, LockName, LockOptions, Method};
use crate::four_tuple::FourTuple;
use crate::kernel::netns::NetNs;
pub(super) use crate::kernel::wire;
use table::{Keys, Policy};

use wire::{Attributes, Malformed};

pub(super) use client::{Client, Transaction, netlink_flag};
pub use error::NftError;
pub use expr::MARK;
pub(super) use table::{AT_SOCKET, ON_PATH};

/// See [`super::NetworkLock::lock`].
pub(super) fn lock(
    ns: &NetNs,
    name: &LockName,
    tuples: &[FourTuple],
    policy: &Policy,
    options: &LockOptions,
) -> Result<(), LockError> {
    let keys = Keys::of(tuples)?;
    let set = |options: &LockOptions| {
        let client = Client::open(ns)?;
        // To refuse takes the kernel an RCU grace period, so it is not asked to make what is there.
        if !lock_names(&client).is_ok_and(|names| names.contains(name)) {
            let mut new = Transaction::new();
            table::create(&mut new, name.as_str(), &keys, policy, options);
            match client.commit(new) {
                Err(e) if e.is(Errno::EEXIST) => (),
                other => return other,
            }
        }
        let mut replacement = Transaction::new();
        table::replace(&mut replacement, name.as_str(), &keys, policy, options);
        client.commit(replacement)
    };
    let result = match set(options) {
        Err(e) if e.is(Errno::ENOENT) && options.log.is_some() => {
            log::warn!("{ns}: packets are dropped and not held: this kernel has no nft_log");
            set(&LockOptions { log: None, ..*options })
        }
        other => other,
    };
    result.map_err(|e| failed("set", name, ns, e))
}

/// See [`super::NetworkLock::add`].
pub(super) fn add(ns: &NetNs, name: &LockName, tuples: &[FourTuple]) -> Result<(), LockError> {
    let keys = Keys::of(tuples)?;
    let mut transaction = Transaction::new();
    table::add(&mut transaction, name.as_str(), &keys);
    commit(ns, transaction).map_err(|e| failed("add to", name, ns, e))
}

/// See [`super::NetworkLock::stop_newcomers`].
pub(super) fn stop_newcomers(
    ns: &NetNs,
    name: &LockName,
    listeners: &[Listener],
    time: Duration,
    log: Option<u16>,
) -> Result<(), LockError> {
    let policy = if name.is_on_path() { &ON_PATH } else { &AT_SOCKET };
    let mut transaction = Transaction::new();
    table::stop_newcomers(&mut transaction, name.as_str(), listeners, policy, time, log);
    commit(ns, transaction).map_err(|e| failed("add listeners to", name, ns, e))
}

/// See [`super::rename`].
pub(super) fn rename(
    ns: &NetNs,
    from: &LockName,
    to: &LockName,
    tuples: &[FourTuple],
    options: &LockOptions,
) -> Result<(), LockError> {
    if from == to {
        return lock(ns, to, tuples, &AT_SOCKET, options);
    }
    let keys = Keys::of(tuples)?;
    let mut transaction = Transaction::new();
    table::replace(&mut transaction, to.as_str(), &keys, &AT_SOCKET, options);
    table::delete(&mut transaction, from.as_str());
    commit(ns, transaction).map_err(|e| failed("rename", from, ns, e))
}

/// See [`super::remove`].
pub(super) fn remove(ns: &NetNs, name: &LockName) -> Result<bool, LockError> {
    let delete = || {
        let client = Client::open(ns)?;
        // To refuse takes the kernel an RCU grace period, so it is not asked to delete what is not there.
        if lock_names(&client).is_ok_and(|names| !names.contains(name)) {
            return Ok(false);
        }
        let mut transaction = Transaction::new();
        table::delete(&mut transaction, name.as_str());
        match client.commit(transaction) {
            Ok(()) => Ok(true),
            Err(e) if e.is(Errno::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    };
    delete().map_err(|e| failed("remove", name, ns, e))
}

/// See [`super::list`].
pub(super) fn list(ns: &NetNs) -> Result<Vec<LockInfo>, LockError> {
    match list_tables(ns) {
        Err(NftError::Missing) => Ok(Vec::new()),
        other => other.map_err(|source| LockError::Nftables {
            action: "list network locks".into(),
            ns: ns.clone(),
            source,
        }),
    }
}

fn list_tables(ns: &NetNs) -> Result<Vec<LockInfo>, NftError> {
    let client = Client::open(ns)?;
    let names = match lock_names(&client) {
        Err(e) if e.is(Errno::EINVAL) => return Err(NftError::Missing), // no such subsystem of nfnetlink
        other => other?,
    };
    let info = |name: LockName| {
        let entries = table::SETS
            .iter()
            .map(|set| count_elements(&client, name.as_str(), set))
            .sum::<Result<_, _>>()?;
        Ok(LockInfo { method: Method::Nftables, name, entries })
    };
    names.into_iter().map(info).collect()
}

/// See [`super::is_there`].
pub(super) fn is_there(ns: &NetNs, name: &LockName) -> Result<bool, LockError> {
    has_table(ns, table::FAMILY, name.as_str()).map_err(|e| failed("look for", name, ns, e))
}

/// Whether there is a table of this family and name. A kernel without nf_tables has none.
pub(super) fn has_table(ns: &NetNs, family: u8, name: &str) -> Result<bool, NftError> {
    let is_it =
        |_: u8, table: Attributes<'_>| Ok((table.require(abi::table::NAME)?.str()? == name).then_some(()));
    match Client::open(ns)?.dump("list tables", libc::NFT_MSG_GETTABLE, family, |_| (), is_it) {
        Err(e) if e.is(Errno::EINVAL) => Ok(false), // no such subsystem of nfnetlink
        other => Ok(!other?.is_empty()),
    }
}

fn lock_names(client: &Client) -> Result<Vec<LockName>, NftError> {
    client.dump("list tables", libc::NFT_MSG_GETTABLE, table::FAMILY, |_| (), lock_name)
}

fn lock_name(_: u8, table: Attributes<'_>) -> Result<Option<LockName>, Malformed> {
    Ok(table.require(abi::table::NAME)?.str()?.parse().ok())
}

fn count_elements(client: &Client, table: &str, set: &str) -> Result<usize, NftError> {
    let filter = |w: &mut wire::Writer| {
        w.put_str(abi::element_list::TABLE, table);
        w.put_str(abi::element_list::SET, set);
    };
    let parts = client.dump(
        "list a lock's connections",
        libc::NFT_MSG_GETSETELEM,
        table::FAMILY,
        filter,
        elements_in,
    );
    match parts {
        Ok(parts) => Ok(parts.into_iter().sum()),
        Err(e) if e.is(Errno::ENOENT) => Ok(0), // another program's table, or gone since
        Err(e) => Err(e),
    }
}

/// How many elements one part of a set's list has.
fn elements_in(_: u8, part: Attributes<'_>) -> Result<Option<usize>, Malformed> {
    let elements = part.find(abi::element_list::ELEMENTS)?;
    let mut n = 0;
    for element in elements.into_iter().flat_map(wire::Value::nested) {
        element?;
        n += 1;
    }
    Ok(Some(n))
}

fn commit(ns: &NetNs, transaction: Transaction) -> Result<(), NftError> {
    Client::open(ns)?.commit(transaction)
}

fn failed(verb: &str, name: &LockName, ns: &NetNs, source: NftError) -> LockError {
    let (action, ns) = (format!("{verb} the network lock {name}"), ns.clone());
    match source {
        NftError::Missing => LockError::NoNftables { action, ns },
        source => LockError::Nftables { action, ns, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_nf_tables_gets_the_way_out_named() {
        let name = LockName::criu("1f").unwrap();
        let error = failed("set", &name, &NetNs::current().unwrap(), NftError::Missing);
        assert!(matches!(error, LockError::NoNftables { .. }));
        let text = error.to_string();
        assert!(text.starts_with("cannot set the network lock CRIU-1f in net:["), "{text}");
        assert!(text.contains("SOCCR_LOCK=iptables"), "{text}");
    }
}
