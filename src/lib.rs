//! Checkpoint, restore and migrate live TCP connections.

#![deny(unsafe_code)]

pub mod checkpoint;
pub mod connection;
pub mod fin;
pub mod image;
pub mod kernel;
pub mod lock;
pub mod options;
pub mod restore;
