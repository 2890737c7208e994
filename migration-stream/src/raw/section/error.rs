//! What can be wrong with a section's frame.

use super::id::{InstanceId, SectionId};
use crate::IdStr;

/// What is wrong with a section's frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SectionError {
    /// No section begins with this byte here.
    #[error("section type {found:#04x} is not one that can stand here")]
    UnexpectedType {
        /// The byte.
        found: u8,
    },
    /// A PART or END of an id that no START or FULL announced.
    #[error("section {id} was not announced")]
    NotAnnounced {
        /// The id.
        id: SectionId,
    },
    /// An id was announced before.
    #[error("section {id} is announced as '{idstr}' but is in use")]
    AnnouncedTwice {
        /// The id.
        id: SectionId,
        /// What it would be now.
        idstr: IdStr,
    },
    /// A START or FULL section where only announced ids go on (a COLO checkpoint).
    #[error("section {id} is announced as '{idstr}' inside a checkpoint")]
    AnnouncedInCheckpoint {
        /// The id.
        id: SectionId,
        /// What it would be.
        idstr: IdStr,
    },
    /// More ids than a stream may announce.
    #[error("more than {max} sections")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// Something else stands where the footer belongs.
    #[error("section {id} ends without a footer, byte {found:#04x} found")]
    FooterMissing {
        /// The open section.
        id: SectionId,
        /// The byte in the footer's place.
        found: u8,
    },
    /// The footer is that of another section.
    #[error("section {id} ends with the footer of section {found}")]
    FooterMismatch {
        /// The open section.
        id: SectionId,
        /// The id in the footer.
        found: SectionId,
    },
    /// There is no such instance.
    #[error("section '{idstr}' instance {instance}, expected instance 0")]
    Instance {
        /// The section.
        idstr: IdStr,
        /// The instance received.
        instance: InstanceId,
    },
    /// The body's version is one this side does not read.
    #[error("version {version} of section '{idstr}', expected {expected}")]
    Version {
        /// The section.
        idstr: IdStr,
        /// The version received.
        version: u32,
        /// The version known.
        expected: u32,
    },
    /// The stream was decoded to its end.
    #[error("the stream has ended")]
    AfterEnd,
    /// The description after EOF is longer than allowed.
    #[error("vm description of {len} bytes, at most {max} expected")]
    DescriptionLength {
        /// Its length, bytes.
        len: u32,
        /// The limit, bytes.
        max: u32,
    },
}
