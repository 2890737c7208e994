//! Errors for people.

use std::error::Error;
use std::iter;

/// An error and its causes, on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let causes = iter::successors(Some(error), |&error| error.source());
    causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}
