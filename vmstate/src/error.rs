//! What can go wrong when state is saved or loaded.

use std::fmt;

/// Where in a section an error was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The way to the field, such as `serial 0: inner.regs[3]`; empty at the top of a description
    /// that is read on its own.
    pub path: String,
    /// Offset from the first byte of the body.
    pub offset: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}, ", self.path)?;
        }
        write!(f, "byte {}", self.offset)
    }
}

/// Why bytes are not the state they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The bytes end too early; see [`LoadError::is_truncated`].
    #[error("{at}: {needed} bytes wanted, {available} there")]
    Truncated {
        /// Where.
        at: Location,
        /// How many bytes the next thing takes, at least.
        needed: usize,
        /// How many are left.
        available: usize,
    },
    /// A newer version than this program knows.
    #[error("{at}: unsupported version {version} for '{name}', the newest known is {newest}")]
    VersionTooNew {
        /// Where.
        at: Location,
        /// The description's name.
        name: &'static str,
        /// The version received.
        version: u32,
        /// The newest version that can be loaded.
        newest: u32,
    },
    /// An older version than this program can still read.
    #[error("{at}: version {version} of '{name}' is too old, the oldest readable is {oldest}")]
    VersionTooOld {
        /// Where.
        at: Location,
        /// The description's name.
        name: &'static str,
        /// The version received.
        version: u32,
        /// The oldest version that can be loaded.
        oldest: u32,
    },
    /// A subsection whose name says that it belongs here, but that is not known.
    #[error("{at}: subsection '{name}' of '{parent}' does not exist", name = .name.escape_debug())]
    UnknownSubsection {
        /// Where.
        at: Location,
        /// The name received.
        name: String,
        /// The description it was found in.
        parent: &'static str,
    },
    /// More elements than the field may have, or a negative number of them.
    #[error("{at}: {count} elements, expected 0 to {max}")]
    Count {
        /// Where.
        at: Location,
        /// The number received.
        count: i128,
        /// The most there may be.
        max: usize,
    },
    /// A value that the field or the description does not allow.
    #[error("{at}: {what}")]
    Invalid {
        /// Where.
        at: Location,
        /// What is wrong.
        what: String,
    },
    /// Descriptions nested deeper than [`Reader::MAX_DEPTH`](crate::Reader::MAX_DEPTH).
    #[error("{at}: descriptions are nested more than {limit} levels deep")]
    TooDeep {
        /// Where.
        at: Location,
        /// The limit.
        limit: usize,
    },
    /// A byte that says whether a pointer is NULL says something else.
    #[error("{at}: unexpected ptr marker: {marker}")]
    PointerMarker {
        /// Where.
        at: Location,
        /// The byte.
        marker: u8,
    },
    /// A value that is not the receiver's.
    #[error("{at}: {found} received, {expected} expected")]
    NotEqual {
        /// Where.
        at: Location,
        /// The value received.
        found: String,
        /// The receiver's.
        expected: String,
    },
    /// Bytes are left over after a body that was said to be whole.
    #[error("{at}: {extra} bytes too many")]
    Trailing {
        /// Where the body ended.
        at: Location,
        /// How many bytes follow.
        extra: usize,
    },
    /// No such section is registered.
    #[error("unknown section or instance '{idstr}' {instance_id}: the two sides' devices differ", idstr = .idstr.escape_debug())]
    UnknownSection {
        /// The section's name.
        idstr: String,
        /// Which of the sections of this name.
        instance_id: u32,
    },
}

impl LoadError {
    /// Whether more bytes could help: with a [`Reader::partial`](crate::Reader::partial) reader,
    /// read on and parse again.
    #[must_use]
    pub const fn is_truncated(&self) -> bool {
        matches!(self, Self::Truncated { .. })
    }
}

/// Why state could not be put into bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The field that counts a list says something else than the list's length: bytes written
    /// this way could not be read again.
    #[error("field '{field}' has {len} elements, but its count says {count}")]
    Count {
        /// The list.
        field: &'static str,
        /// Its length.
        len: usize,
        /// What the counting field says.
        count: i128,
    },
    /// The description cannot be written in the form of this version.
    #[error("'{name}' cannot be written at version {version}")]
    Version {
        /// The description's name.
        name: &'static str,
        /// The version wanted.
        version: u32,
    },
    /// The description's `pre_save` refused.
    #[error("pre-save of '{name}' failed: {what}")]
    PreSave {
        /// The description's name.
        name: &'static str,
        /// What it said.
        what: String,
    },
    /// The list is longer than the description allows.
    #[error("field '{field}' has {len} elements, at most {max} are allowed")]
    TooMany {
        /// The list.
        field: &'static str,
        /// Its length.
        len: usize,
        /// The most there may be.
        max: usize,
    },
}
