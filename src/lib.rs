//! Checkpoint, restore and migrate live TCP connections.

#![deny(unsafe_code)]

mod chain;
pub mod checkpoint;
pub mod connection;
pub mod criu;
pub mod forge;
mod four_tuple;
pub mod kernel;
pub mod lock;
pub mod repair;
pub mod restore;

pub use chain::chain;

/// Ways into parsers that are otherwise private, for the fuzz targets in `fuzz/`. Not a part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    /// Reads `datagrams` as the kernel's answer to each request that this crate sends to nf_tables.
    pub fn read_netlink_answers(datagrams: &[&[u8]]) {
        crate::lock::read_answers(datagrams);
    }
}
