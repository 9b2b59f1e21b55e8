//! Checkpoint, restore and migrate live TCP connections.

#![deny(unsafe_code, missing_docs)]

mod carried;
mod chain;
#[doc(hidden)]
pub mod checkpoint;
pub mod connection;
#[cfg(feature = "criu")]
#[doc(hidden)]
pub mod criu;
mod encoding;
#[doc(hidden)]
pub mod forge;
mod four_tuple;
mod freeze;
#[doc(hidden)]
pub mod kernel;
#[doc(hidden)]
pub mod lock;
#[doc(hidden)]
pub mod repair;
#[doc(hidden)]
pub mod restore;
mod thaw;

pub use carried::{BadBytes, Connection};
pub use chain::chain;
pub use connection::FourTuple;
pub use freeze::{Cause, FreezeError, Frozen, Refused, freeze, freeze_unlocked, freeze_with};
pub use lock::{LockOptions, Method};
#[doc(hidden)]
pub use thaw::build;
pub use thaw::{ThawError, thaw, thaw_with};

/// Ways into parsers that are otherwise private, for the fuzz targets in `fuzz/`. Not a part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    /// Reads `datagrams` as the kernel's answer to each request that this crate sends to nf_tables.
    pub fn read_netlink_answers(datagrams: &[&[u8]]) {
        crate::lock::read_answers(datagrams);
    }
}
