//! How errors are told.

use std::error::Error;
use std::iter::successors;

/// An error and all its causes, in one line: `what: why: why that`.
///
/// Every error of this crate says what went wrong on its own level and gives the cause as its
/// [`source`](Error::source).
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let causes = successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
