//! End to end: real servers, dumped and restored by CRIU, with clients that check every byte.
//!
//! Needs root, CRIU and the plugin; without them each test says that it is skipped, or fails where
//! `SOCCR_TEST_REQUIRE=1`. Each test makes its own network namespaces.

mod accept_queue;
mod away;
mod callers;
mod company;
mod container;
mod content;
mod crossing;
mod ecn;
mod elsewhere;
mod forged;
mod images;
mod migrate;
mod options;
mod outcomes;
mod pluginhost;
mod promises;
mod rules;
mod silence;
mod warm;
mod world;
