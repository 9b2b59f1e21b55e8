//! What can be wrong with a connection.

use std::fmt;

/// The end of a connection that should have gone on.
#[derive(Debug)]
pub enum Fault {
    /// It broke: reset, timed out.
    Dead(String),
    /// A byte was wrong, missing or too many.
    Wrong(String),
}

impl Fault {
    /// For `map_err` after this call.
    pub fn dead<E: fmt::Display>(call: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::Dead(format!("{call}: {error}"))
    }

    pub fn wrong(why: impl fmt::Display) -> Self {
        Self::Wrong(format!("{why:#}"))
    }

    pub fn is_wrong(&self) -> bool {
        matches!(self, Self::Wrong(_))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Dead(why) | Self::Wrong(why)) = self;
        f.write_str(why)
    }
}
