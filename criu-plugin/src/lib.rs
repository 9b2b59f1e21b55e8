//! `soccr_plugin.so`: stock CRIU leaves TCP to soccr.
//!
//! `criu dump --tcp-close --lib DIR` makes CRIU skip the connections, and the plugin saves them; the images are what
//! `criu dump --tcp-established` would have written. `criu restore --tcp-close --lib DIR` makes fresh sockets, and the
//! plugin brings the connections back into them.
//!
//! * `hooks`: what runs in criu's process, as little as possible: CRIU's plugin interface, and how the agent is asked.
//! * `agent`: the process that does the work.
//! * `protocol`: what the two say to each other.
//! * `fault`: where tests can have somebody die.

#![deny(unsafe_code)]

mod agent;
mod fault;
mod hooks;
mod protocol;
