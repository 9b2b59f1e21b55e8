//! What runs in criu's process.
//!
//! * `abi`: CRIU's plugin interface; `order`: before CRIU's other plugins; `host`: what criu's process offers a plugin.
//! * `session`: the hooks, thin: each asks the agent; `client`: how; `start`: how the agent comes to be.
//! * `mode`: whether the plugin deals with TCP at all.
//! * `tracees`: the end of the tasks that criu restores, where one cannot be whole.
//! * `solo`: the two hooks for descriptors that CRIU hands over one by one.

mod abi;
mod client;
mod host;
mod mode;
mod order;
mod session;
mod solo;
mod start;
mod tracees;
