//! Errors for people.

use std::error::Error;
use std::iter;

use migration_stream::Escaped;

/// An error and its causes, on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let causes = iter::successors(Some(error), |&error| error.source());
    let said = causes
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    // Names in it may come from the other side.
    Escaped(&said).to_string()
}
