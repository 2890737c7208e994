//! How far postcopy has come.

use std::fmt;

/// How far an incoming migration is on its way into postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PostcopyState {
    /// Nothing was said of postcopy.
    None,
    /// Postcopy may follow.
    Advised,
    /// Pages that are stale are being dropped.
    Discarding,
    /// Pages may come while devices load, inside the package.
    Listening,
    /// The guest runs here, and what it lacks is asked for.
    Running,
    /// The connection broke while the guest ran.
    Paused,
    /// There is a new connection, and the source asks which pages have arrived.
    Recovering,
    /// The stream ended, and every page is there.
    Ended,
}

impl fmt::Display for PostcopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Advised => "advised",
            Self::Discarding => "discarding",
            Self::Listening => "listening",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Recovering => "recovering",
            Self::Ended => "ended",
        })
    }
}
