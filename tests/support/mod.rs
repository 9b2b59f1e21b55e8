//! What these tests share with those of the testkit.

#[allow(unused_imports)] // each test takes what it needs
pub use soccr_testkit::sandbox::{connected, expect_bytes, in_own_network, pattern};
