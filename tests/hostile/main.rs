//! Images and answers made by somebody who means harm.
//!
//! - [`images`]: what each kind of damage to each kind of file is answered with.
//! - [`fuzz`]: the fuzz targets of `fuzz/` on their corpora and on random mutations of them, for a bounded time.
//! - [`restore`]: damaged images as far as into a socket.
//! - [`secrets`]: who can see the bytes of a queue.
//! - [`side`]: forged items of `soccr.img`, and the connections of others.

mod corpus;
mod fuzz;
mod images;
mod memory;
mod mutate;
mod restore;
mod secrets;
mod side;
#[path = "../support/mod.rs"]
#[allow(dead_code)] // this test program uses its part
mod support;
#[path = "../../fuzz/src/targets.rs"]
mod targets;
