//! How far long work has come, on a terminal; nothing where there is none.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar for so many steps.
pub fn bar(what: &'static str, steps: usize) -> ProgressBar {
    drawn(ProgressBar::new(steps as u64), what, "{msg} {wide_bar} {pos}/{len}")
}

/// A bar for so many bytes.
pub fn bytes(what: &'static str, bytes: u64) -> ProgressBar {
    drawn(ProgressBar::new(bytes), what, "{msg} {wide_bar} {bytes}/{total_bytes}")
}

fn drawn(bar: ProgressBar, what: &'static str, template: &str) -> ProgressBar {
    bar.with_style(ProgressStyle::with_template(template).expect("a template that is one")).with_message(what)
}
