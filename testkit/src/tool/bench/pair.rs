//! Two ways to do the same, side by side.

use std::fmt;

use serde_json::{Value, json};

/// What one call costs either way.
pub struct Pair {
    pub what: String,
    /// Whose way the other one is.
    pub other: &'static str,
    /// Microseconds, medians.
    pub other_us: f64,
    pub ours_us: f64,
    /// Ours to the other's, where they took turns the median of their ratios.
    pub ratio: f64,
    pub most: f64,
}

impl Pair {
    /// To the hundredth: from run to run it differs by as much.
    pub fn rounded(&self) -> f64 {
        (self.ratio * 100.0).round() / 100.0
    }

    pub fn json(&self) -> Value {
        json!({
            "what": self.what, "other": self.other, "other_us": self.other_us, "ours_us": self.ours_us,
            "ratio": self.ratio,
        })
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, other, other_us, ours_us, ratio, .. } = self;
        write!(f, "{what}: {other} {other_us:.2} µs, ours {ours_us:.2} µs, ratio {ratio:.2}")
    }
}

pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}
