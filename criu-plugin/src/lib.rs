//! `soccr_plugin.so`: stock CRIU leaves TCP to soccr.
//!
//! `criu dump --tcp-close --lib DIR` makes CRIU skip the connections, and the plugin saves them; the images are what
//! `criu dump --tcp-established` would have written. `criu restore --tcp-close --lib DIR` makes fresh sockets, and the
//! plugin brings the connections back into them.
//!
//! * `abi`: CRIU's plugin interface; `host`: what criu's process offers.
//! * `session`: the hooks, thin; `channel`: how they ask the agent.
//! * `agent`: the process that does the work.
//! * `solo`: the two hooks for descriptors that CRIU hands over one by one.

#![deny(unsafe_code)]

pub mod abi;
mod agent;
mod channel;
mod fault;
mod host;
mod mode;
mod session;
mod solo;
