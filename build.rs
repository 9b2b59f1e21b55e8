//! Generates the Rust code of CRIU's image messages from `proto/`.

fn main() {}
