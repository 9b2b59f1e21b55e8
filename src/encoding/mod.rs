//! Connections as bytes: the messages of `proto/`, and how they are read from whoever sent them.
//!
//! Every length is checked against what is there before memory is taken for it. The generated decoder takes memory for
//! what a length claims, so [`wire`] looks at the lengths first; it also changes one field of a message while every
//! other byte stays, and picks a small part out of a large message, which the generated code cannot.

pub(crate) mod container;
pub(crate) mod decode;
mod fault;
mod head;
pub(crate) mod stream;
pub(crate) mod wire;

/// The messages of `proto/`, generated.
#[allow(missing_docs, dead_code, clippy::all, clippy::pedantic)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
}

pub use container::{COMMON, Magic};
pub use decode::{ImageMessage, Nested};
pub use fault::Fault;
pub use head::Head;
#[cfg(feature = "criu")]
pub(crate) use head::{from_endpoint, port_of, state_of, to_endpoint};
pub(crate) use stream::check_writable;
