//! What soccr's end-to-end tests, the demo and the benchmark are made of: network namespaces
//! that vanish by themselves, a driver for CRIU, servers to dump, clients that check every byte,
//! and a look at what is left behind.
//!
//! Everything needs root. Nothing here is used by the engine, the plugin or the command.

pub mod capture;
pub mod client;
pub mod criu;
pub mod fleet;
pub mod interrupt;
pub mod lan;
pub mod leftovers;
pub mod netns;
pub mod pattern;
pub mod peers;
pub mod relay;
pub mod rpc;
pub mod sandbox;
pub mod server;
pub mod skip;
pub mod sockets;
pub mod stage;
pub mod task;
pub mod waiting;

pub use capture::Capture;
pub use client::Client;
pub use criu::{Criu, Lock, Side};
pub use fleet::{Fleet, Pace};
pub use lan::{Lan, Way};
pub use netns::NetNs;
pub use pattern::Pattern;
pub use peers::Peers;
pub use server::Server;
pub use stage::{Place, Stage};
pub use task::Task;
