//! What these tests share with those of the testkit.

#[allow(unused_imports)] // each test takes what it needs
pub use soccr_testkit::sandbox::{connected, expect_bytes, in_own_network, pattern};

/// Where both ends of a connection are: IPv4, IPv6, and IPv4 by sockets of IPv6.
#[allow(dead_code)] // as above
pub const FAMILIES: [&str; 3] = ["127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"];

/// Each family, first without ECN, then with it.
#[allow(dead_code)] // as above
pub fn variants() -> impl Iterator<Item = &'static str> {
    ["2", "1"].into_iter().flat_map(|ecn| {
        std::fs::write("/proc/sys/net/ipv4/tcp_ecn", ecn).expect("net.ipv4.tcp_ecn");
        FAMILIES
    })
}

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
