//! The lock as nf_tables has it: one table of family `inet` per dump and namespace.
//!
//! ```text
//! table inet CRIU-ID {
//!     set conns4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; elements = { … } }
//!     set conns6 { type ipv6_addr . inet_service . ipv6_addr . inet_service; elements = { … } }
//!     chain output {
//!         type filter hook output priority raw; policy accept;
//!         meta mark 0x0000c114 accept
//!         ip saddr . tcp sport . ip daddr . tcp dport @conns4 drop
//!         ip daddr . tcp dport . ip saddr . tcp sport @conns4 drop
//!         …the same for ip6 and conns6…
//!     }
//!     chain input { type filter hook input priority 300; policy accept; …the same rules… }
//! }
//! ```
//!
//! A connection is one element, its own end first, which packets of both directions find: an element takes more time than
//! all the rest of a lock.
//!
//! Which packets are locked ([`Keys`], the sets) is kept apart from what happens to them and where
//! ([`Policy`], the chains), so that another policy needs no other sets. Where somebody holds the packets that come in, those rules
//! have `log group N` before `drop`: he gets a copy, and if he is gone nothing else changes.

use std::time::Duration;

use super::abi;
use super::client::Transaction;
use super::expr::{Base, Expressions, Verdict, number};
use super::wire::Writer;
use crate::four_tuple::FourTuple;
use crate::lock::{Listener, LockError, LockOptions};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// `NFPROTO_INET`: the table sees IPv4 and IPv6.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the constant is 1
pub const FAMILY: u8 = libc::NFPROTO_INET as u8;

/// A chain: where in the packet's way the policy acts.
#[derive(Debug)]
struct Hook {
    chain: &'static str,
    hook: libc::c_int,
    priority: i32,
    /// Whether who would connect is stopped here.
    newcomers: bool,
}

impl Hook {
    /// Whether what is dropped here may be held. Who sends from this host is told that its packet was dropped on the way
    /// out, and does not count it as sent: an acknowledgement would be one of what was never sent, which TCP ignores for good.
    fn comes_in(&self) -> bool {
        matches!(self.hook, libc::NF_INET_PRE_ROUTING | libc::NF_INET_LOCAL_IN)
    }
}

/// What becomes of locked packets, and where.
#[derive(Debug)]
pub struct Policy {
    hooks: &'static [Hook],
    verdict: Verdict,
}

/// Drops them where sockets see them as they are: with a NAT in between, the socket's addresses are
/// those *before* the address is rewritten on the way out (`dstnat`, -100) and *after* it is
/// rewritten back on the way in (`srcnat`, 100). Before `mangle` (-150), the mark is still ours, too.
pub const AT_SOCKET: Policy = Policy {
    hooks: &[
        Hook { chain: "output", hook: libc::NF_INET_LOCAL_OUT, priority: -300, newcomers: false },
        Hook { chain: "input", hook: libc::NF_INET_LOCAL_IN, priority: 300, newcomers: true },
    ],
    verdict: Verdict::Drop,
};

/// Drops them where they pass on the way to and from a socket in another namespace: what that sends (its resets, too)
/// and what its peer sends before any translation (conntrack begins at -200), what is sent here likewise, and what
/// goes to the socket after the last (`srcnat`, 100). A forward hook would miss the peers on this host.
pub const ON_PATH: Policy = Policy {
    hooks: &[
        Hook { chain: "prerouting", hook: libc::NF_INET_PRE_ROUTING, priority: -300, newcomers: true },
        Hook { chain: "output", hook: libc::NF_INET_LOCAL_OUT, priority: -300, newcomers: true },
        Hook { chain: "postrouting", hook: libc::NF_INET_POST_ROUTING, priority: 300, newcomers: true },
    ],
    verdict: Verdict::Drop,
};

const V4_KEY: usize = 16;
const V6_KEY: usize = 40;

/// A set of connections, and how to find a packet's key: the address and the port of our end, then of the peer's, each
/// padded to four bytes.
struct Selector {
    set: &'static str,
    id: u32,
    address: u32,
    key_len: u32,
    nfproto: u8,
    /// Offset in the IP header, and bytes, of the source and the destination address.
    source: u32,
    destination: u32,
    address_len: u32,
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // constants: 2, 10, 16, 40
const V4: Selector = Selector {
    set: "conns4",
    id: 1,
    address: abi::datatype::IPV4_ADDR,
    key_len: V4_KEY as u32,
    nfproto: libc::NFPROTO_IPV4 as u8,
    source: 12,
    destination: 16,
    address_len: 4,
};

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // as above
const V6: Selector = Selector {
    set: "conns6",
    id: 2,
    address: abi::datatype::IPV6_ADDR,
    key_len: V6_KEY as u32,
    nfproto: libc::NFPROTO_IPV6 as u8,
    source: 8,
    destination: 24,
    address_len: 16,
};

/// A set of listeners: of one address each, or of all that a port has.
struct Door {
    set: &'static str,
    id: u32,
    selector: &'static Selector,
    any_address: bool,
}

/// All of them.
const DOORS: [Door; 4] = [
    Door { set: "listeners4", id: 3, selector: &V4, any_address: false },
    Door { set: "listeners6", id: 4, selector: &V6, any_address: false },
    Door { set: "ports4", id: 5, selector: &V4, any_address: true },
    Door { set: "ports6", id: 6, selector: &V6, any_address: true },
];

impl Door {
    /// The listener's element, if it belongs here. One of IPv6 at any address hears IPv4 as well, unless told otherwise.
    fn key(&self, listener: &Listener) -> Option<Vec<u8>> {
        let Listener { local, v6only } = *listener;
        let (ip, is_v4) = (local.ip().to_canonical(), self.selector.address_len == 4);
        let hears = ip.is_ipv4() == is_v4 || (is_v4 && ip.is_unspecified() && !v6only);
        if !hears || ip.is_unspecified() != self.any_address {
            return None;
        }
        let mut key = match ip {
            _ if self.any_address => Vec::new(),
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        key.extend(local.port().to_be_bytes());
        key.resize(if self.any_address { 2 } else { key.len().next_multiple_of(4) }, 0);
        Some(key)
    }

    fn create_set(&self, transaction: &mut Transaction, table: &str, time: Duration) {
        let Selector { address, address_len, .. } = *self.selector;
        let key = if self.any_address {
            (abi::datatype::INET_SERVICE, 2)
        } else {
            (address << abi::datatype::BITS | abi::datatype::INET_SERVICE, address_len + 4)
        };
        new_set(transaction, table, (self.set, self.id), key, None, Some(time));
    }

    fn matches(&self, e: &mut Expressions<'_>) {
        let Selector { destination, address_len, .. } = *self.selector;
        self.selector.is_tcp(e);
        e.opens_a_connection();
        let first = number(libc::NFT_REG32_00);
        let mut port = first;
        if !self.any_address {
            e.load(register(first), Base::Network, destination, address_len);
            port += address_len / 4;
        }
        e.load(register(port), Base::Transport, 2, 2);
        e.in_set(register(first), self.set, self.id);
    }
}

/// The names of the sets, here and in stock CRIU's tables.
pub const SETS: [&str; 2] = [V4.set, V6.set];

/// Elements in one message: their list is one attribute, whose length is 16 bits.
const ELEMENTS_PER_MESSAGE: usize = 1024;
const _: () = assert!(ELEMENTS_PER_MESSAGE * (V6_KEY + 3 * 4) + 4 <= u16::MAX as usize);

/// The set elements of some connections, each only once.
#[derive(Debug, Default)]
pub struct Keys {
    v4: Vec<[u8; V4_KEY]>,
    v6: Vec<[u8; V6_KEY]>,
}

impl Keys {
    /// The elements for these connections.
    pub fn of(tuples: &[FourTuple]) -> Result<Self, LockError> {
        let mut keys = Self::default();
        for tuple in tuples {
            let wire = tuple.on_wire();
            if !keys.push(wire.local, wire.remote) {
                return Err(LockError::MixedFamilies(*tuple));
            }
        }
        keys.v4.sort_unstable();
        keys.v4.dedup();
        keys.v6.sort_unstable();
        keys.v6.dedup();
        Ok(keys)
    }

    /// Whether both ends are of one family.
    fn push(&mut self, local: SocketAddr, remote: SocketAddr) -> bool {
        match (local, remote) {
            (SocketAddr::V4(l), SocketAddr::V4(r)) => {
                self.v4.push(key(l.ip().octets(), l.port(), r.ip().octets(), r.port()));
            }
            (SocketAddr::V6(l), SocketAddr::V6(r)) => {
                self.v6.push(key(l.ip().octets(), l.port(), r.ip().octets(), r.port()));
            }
            _ => return false,
        }
        true
    }
}

fn key<const A: usize, const K: usize>(
    local: [u8; A],
    local_port: u16,
    remote: [u8; A],
    remote_port: u16,
) -> [u8; K] {
    const { assert!(K == 2 * (A + 4)) };
    let mut key = [0; K];
    let (ours, peers) = key.split_at_mut(A + 4);
    for (half, address, port) in [(ours, local, local_port), (peers, remote, remote_port)] {
        half[..A].copy_from_slice(&address);
        half[A..A + 2].copy_from_slice(&port.to_be_bytes());
    }
    key
}

/// Adds the steps that make the table `name` hold exactly these elements, whether it exists or not.
pub fn replace(
    transaction: &mut Transaction,
    name: &str,
    keys: &Keys,
    policy: &Policy,
    options: &LockOptions,
) {
    // Deleting what is not there would fail, so it is made first; nothing of this shows outside.
    create_table(transaction, name, libc::NLM_F_CREATE);
    delete(transaction, name);
    create(transaction, name, keys, policy, options);
}

/// Adds the steps that make the table `name`, which must not exist.
pub fn create(
    transaction: &mut Transaction,
    name: &str,
    keys: &Keys,
    policy: &Policy,
    options: &LockOptions,
) {
    create_table(transaction, name, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
    for (selector, keys) in [(&V4, keys.v4.len()), (&V6, keys.v6.len())] {
        create_set(transaction, name, selector, keys, options.lease);
    }
    add(transaction, name, keys);
    for hook in policy.hooks {
        create_chain(transaction, name, hook);
        let log = options.log.filter(|_| hook.comes_in());
        create_rules(transaction, name, hook.chain, policy.verdict, log);
    }
}

/// Adds the steps that have the table `name` stop, for `time`, who would connect to these listeners.
pub fn stop_newcomers(
    transaction: &mut Transaction,
    name: &str,
    listeners: &[Listener],
    policy: &Policy,
    time: Duration,
    log: Option<u16>,
) {
    for door in &DOORS {
        let keys: BTreeSet<Vec<u8>> = listeners.iter().filter_map(|listener| door.key(listener)).collect();
        if keys.is_empty() {
            continue;
        }
        door.create_set(transaction, name, time);
        let keys: Vec<Vec<u8>> = keys.into_iter().collect();
        for chunk in keys.chunks(ELEMENTS_PER_MESSAGE) {
            add_elements(transaction, name, door.set, chunk);
        }
        for hook in policy.hooks.iter().filter(|hook| hook.newcomers) {
            rule(transaction, name, hook.chain, |e| {
                door.matches(e);
                log.filter(|_| hook.comes_in()).into_iter().for_each(|group| e.log(group));
                e.verdict(policy.verdict);
            });
        }
    }
}

/// Adds the step that deletes the table `name` with all that is in it; it must exist.
pub fn delete(transaction: &mut Transaction, name: &str) {
    transaction.step("delete the lock's table", libc::NFT_MSG_DELTABLE, 0, FAMILY, |w| {
        w.put_str(abi::table::NAME, name);
    });
}

/// Adds the steps that put more elements into the table `name`; those already there are left alone.
pub fn add(transaction: &mut Transaction, name: &str, keys: &Keys) {
    for chunk in keys.v4.chunks(ELEMENTS_PER_MESSAGE) {
        add_elements(transaction, name, V4.set, chunk);
    }
    for chunk in keys.v6.chunks(ELEMENTS_PER_MESSAGE) {
        add_elements(transaction, name, V6.set, chunk);
    }
}

fn create_table(transaction: &mut Transaction, name: &str, flags: libc::c_int) {
    transaction.step("create the lock's table", libc::NFT_MSG_NEWTABLE, flags, FAMILY, |w| {
        w.put_str(abi::table::NAME, name);
        w.put_u32(abi::table::FLAGS, 0);
    });
}

/// A set that is told how many elements it may have does not grow while they are put in, which takes as long again.
/// There is room for many more than those that are known now.
fn create_set(
    transaction: &mut Transaction,
    table: &str,
    selector: &Selector,
    keys: usize,
    lease: Option<Duration>,
) {
    const ROOM: usize = 1 << 15;
    let size = (keys > 0).then(|| u32::try_from(4 * keys + ROOM).ok()).flatten();
    let Selector { set, id, key_len, .. } = *selector;
    new_set(transaction, table, (set, id), (selector.key_type(), key_len), size, lease);
}

fn new_set(
    transaction: &mut Transaction,
    table: &str,
    (name, id): (&str, u32),
    (key_type, key_len): (u32, u32),
    size: Option<u32>,
    lease: Option<Duration>,
) {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    transaction.step("create a set of connections", libc::NFT_MSG_NEWSET, flags, FAMILY, |w| {
        w.put_str(abi::set::TABLE, table);
        w.put_str(abi::set::NAME, name);
        w.put_u32(abi::set::ID, id);
        w.put_u32(abi::set::KEY_TYPE, key_type);
        w.put_u32(abi::set::KEY_LEN, key_len);
        w.put_u32(abi::set::FLAGS, if lease.is_some() { number(libc::NFT_SET_TIMEOUT) } else { 0 });
        if let Some(size) = size {
            w.nest(abi::set::DESCRIPTION, |w| w.put_u32(abi::set_description::SIZE, size));
        }
        if let Some(lease) = lease {
            let milliseconds = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
            w.put_u64(abi::set::TIMEOUT, milliseconds.max(1)); // 0 would mean "for ever"
        }
    });
}

fn add_elements(transaction: &mut Transaction, table: &str, set: &str, keys: &[impl AsRef<[u8]>]) {
    let step = "add connections to the lock's set";
    transaction.step(step, libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE, FAMILY, |w| {
        w.put_str(abi::element_list::TABLE, table);
        w.put_str(abi::element_list::SET, set);
        w.nest(abi::element_list::ELEMENTS, |w| keys.iter().for_each(|key| element(w, key.as_ref())));
    });
}

fn element(w: &mut Writer, key: &[u8]) {
    w.nest(abi::list::ELEM, |w| w.nest(abi::element::KEY, |w| w.put(abi::data::VALUE, key)));
}

fn create_chain(transaction: &mut Transaction, table: &str, hook: &Hook) {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    transaction.step("create a chain of the lock", libc::NFT_MSG_NEWCHAIN, flags, FAMILY, |w| {
        w.put_str(abi::chain::TABLE, table);
        w.put_str(abi::chain::NAME, hook.chain);
        w.put_str(abi::chain::TYPE, "filter");
        w.nest(abi::chain::HOOK, |w| {
            w.put_u32(abi::hook::NUM, number(hook.hook));
            w.put_u32(abi::hook::PRIORITY, hook.priority.cast_unsigned());
        });
    });
}

fn create_rules(transaction: &mut Transaction, table: &str, chain: &str, verdict: Verdict, log: Option<u16>) {
    rule(transaction, table, chain, |e| {
        e.marked();
        e.verdict(Verdict::Accept);
    });
    for (selector, from) in [(&V4, From::Us), (&V4, From::Peer), (&V6, From::Us), (&V6, From::Peer)] {
        rule(transaction, table, chain, |e| {
            selector.matches(e, from);
            log.into_iter().for_each(|group| e.log(group));
            e.verdict(verdict);
        });
    }
}

/// Who has sent a packet: which of its ends is ours, the first of a key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Us,
    Peer,
}

fn rule(transaction: &mut Transaction, table: &str, chain: &str, write: impl FnOnce(&mut Expressions<'_>)) {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_APPEND;
    transaction.step("create a rule of the lock", libc::NFT_MSG_NEWRULE, flags, FAMILY, |w| {
        w.put_str(abi::rule::TABLE, table);
        w.put_str(abi::rule::CHAIN, chain);
        Expressions::put(w, write);
    });
}

impl Selector {
    /// `nft`'s name for the key: address . port . address . port.
    fn key_type(&self) -> u32 {
        [self.address, abi::datatype::INET_SERVICE, self.address, abi::datatype::INET_SERVICE]
            .into_iter()
            .fold(0, |all, one| all << abi::datatype::BITS | one)
    }

    /// Goes on only for TCP packets of this family.
    fn is_tcp(&self, e: &mut Expressions<'_>) {
        e.meta_is(libc::NFT_META_NFPROTO, &[self.nfproto]);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the constant is 6
        e.meta_is(libc::NFT_META_L4PROTO, &[libc::IPPROTO_TCP as u8]);
    }

    /// Goes on only for the set's TCP packets. `nft` prints these expressions as
    /// `ip saddr . tcp sport . ip daddr . tcp dport @conns4`, as it does stock CRIU's, or the other way round.
    fn matches(&self, e: &mut Expressions<'_>, from: From) {
        self.is_tcp(e);
        // A key lies in consecutive registers of four bytes each. The first is named NFT_REG_1, a
        // name for sixteen bytes, because `nft` reads the rule back only when it is.
        let first = number(libc::NFT_REG32_00);
        let half = self.address_len / 4 + 1;
        let (mut ours, mut peers) = ((self.source, 0), (self.destination, 2));
        if from == From::Peer {
            std::mem::swap(&mut ours, &mut peers);
        }
        let fields = [
            (0, Base::Network, ours.0, self.address_len),
            (half - 1, Base::Transport, ours.1, 2),
            (half, Base::Network, peers.0, self.address_len),
            (2 * half - 1, Base::Transport, peers.1, 2),
        ];
        for (at, base, offset, len) in fields {
            e.load(register(first + at), base, offset, len);
        }
        e.in_set(register(first), self.set, self.id);
    }
}

/// The name that `nft` gives a register: the one of sixteen bytes where one begins there.
fn register(four_bytes: u32) -> u32 {
    let at = four_bytes - number(libc::NFT_REG32_00);
    if at.is_multiple_of(4) { number(libc::NFT_REG_1) + at / 4 } else { four_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(local: &str, remote: &str) -> FourTuple {
        FourTuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    /// As `nft` writes `1.2.3.4 . 5 . 6.7.8.9 . 10`.
    #[test]
    fn keys_are_padded_to_registers() {
        let keys = Keys::of(&[tuple("1.2.3.4:5", "6.7.8.9:10")]).unwrap();
        assert_eq!(keys.v4[0], [1, 2, 3, 4, 0, 5, 0, 0, 6, 7, 8, 9, 0, 10, 0, 0]);
        assert_eq!(keys.v4.len(), 1);
        assert!(keys.v6.is_empty());
    }

    #[test]
    fn mapped_addresses_add_nothing() {
        let keys = Keys::of(&[
            tuple("1.2.3.4:5", "6.7.8.9:10"),
            tuple("6.7.8.9:10", "1.2.3.4:5"),
            tuple("[::ffff:1.2.3.4]:5", "[::ffff:6.7.8.9]:10"),
        ]);
        let keys = keys.unwrap();
        assert_eq!((keys.v4.len(), keys.v6.len()), (2, 0));
    }

    /// What `nft --debug=mnl` shows for these types.
    #[test]
    fn key_types_are_nfts() {
        assert_eq!(V4.key_type(), 0x001c_d1cd);
        assert_eq!(V6.key_type(), 0x0020_d20d);
    }
}
