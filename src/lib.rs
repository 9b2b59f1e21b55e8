//! Checkpoint, restore and migrate live TCP connections.

#![deny(unsafe_code)]

pub mod checkpoint;
pub mod connection;
pub mod criu;
pub mod fin;
pub mod kernel;
pub mod lock;
pub mod options;
pub mod restore;

/// Ways into parsers that are otherwise private, for the fuzz targets in `fuzz/`. Not a part of the interface.
#[doc(hidden)]
pub mod fuzzing {
    /// Reads `datagrams` as the kernel's answer to each request that this crate sends to nf_tables.
    pub fn read_netlink_answers(datagrams: &[&[u8]]) {
        crate::lock::read_answers(datagrams);
    }
}
