//! Tests that cannot run here.

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Set to `1`, a test fails for want of a privilege or a tool: in CI, for instance.
pub const REQUIRE: &str = "SOCCR_TEST_REQUIRE";
/// A file that takes a line for each test that was skipped: to the test runner it has passed.
pub const LIST: &str = "SOCCR_TEST_SKIPPED";

/// Says that the test of this thread is skipped for want of a privilege or a tool.
pub fn skip(why: &str) -> Result<()> {
    ensure!(std::env::var_os(REQUIRE).is_none_or(|it| it != "1"), "{why}");
    lacks(why)
}

/// Says that the test of this thread is skipped because this kernel cannot do what it needs.
pub fn lacks(why: &str) -> Result<()> {
    let thread = std::thread::current();
    let line = format!("SKIPPED {}: {why}\n", thread.name().unwrap_or("?").replace('\n', " "));
    // Not by a macro, whose output the test runner would hide.
    std::io::stderr().write_all(line.as_bytes())?;
    if let Some(list) = std::env::var_os(LIST) {
        let list = File::options().append(true).create(true).open(&list);
        list.context(LIST)?.write_all(line.as_bytes())?;
    }
    Ok(())
}

/// Set to `1`, the machine is an emulated one, and how long something takes says nothing.
pub const EMULATED: &str = "SOCCR_TEST_EMULATED";

/// Whether something has taken no longer than it may; where times say nothing it has.
#[must_use]
pub fn in_time(took: Duration, limit: Duration) -> bool {
    took <= limit || std::env::var_os(EMULATED).is_some_and(|it| it == "1")
}

/// Whether this kernel is older than that version, such as `5.15`.
#[must_use]
pub fn is_before(version: &str) -> bool {
    let number = |text: &str| {
        let mut parts = text.trim().split(['.', '-']).map(|part| part.parse().unwrap_or(0_u32));
        (parts.next(), parts.next().unwrap_or(0))
    };
    let running = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's version");
    number(&running) < number(version)
}
