//! What these tests share with those of the testkit.

#[allow(unused_imports)] // each test takes what it needs
pub use soccr_testkit::sandbox::{connected, expect_bytes, in_own_network, pattern};

/// Says that the test of this thread is skipped for want of a privilege or a tool.
#[allow(dead_code)] // as above
pub fn skip(why: &str) {
    soccr_testkit::skip::skip(why).expect("that may be skipped");
}

/// Says that the test of this thread is skipped because this kernel cannot do what it needs.
#[allow(dead_code)] // as above
pub fn lacks(why: &str) {
    soccr_testkit::skip::lacks(why).expect("that can be said");
}
