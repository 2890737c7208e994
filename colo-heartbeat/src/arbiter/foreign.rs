//! Errors of other crates' behind ours.

use std::error::Error;
use std::fmt;

use migration_stream::Escaped;

use super::chain;

/// An error of another crate's with its causes, in one line. What a server or a file has put into
/// its text is escaped.
#[derive(Debug)]
struct Foreign(String);

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(&self.0).fmt(f)
    }
}

impl Error for Foreign {}

/// Returns `error` as one whose text can be shown.
pub(super) fn foreign(error: &dyn Error) -> Box<dyn Error + Send + Sync> {
    Box::new(Foreign(chain(error)))
}
