//! Checkpoint, restore and migrate live TCP connections.

#![deny(unsafe_code)]

pub mod connection;
pub mod image;
pub mod kernel;
pub mod lock;
