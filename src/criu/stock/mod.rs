//! What stock CRIU leaves behind when a dump is not followed by its own restore, or when it is killed.
//!
//! - For each connection of a tree in its own network namespace: rules of iptables, or a table of nf_tables.
//! - For a tree with a namespace apart: a [lock of all of that namespace](namespace).

pub mod namespace;
mod rules;

pub use namespace::{NamespaceLock, find_namespace_locks, remove_namespace_locks};
pub use rules::{RemoveTableError, StockChain, StockRule, find_rules, remove_rules, remove_table};
