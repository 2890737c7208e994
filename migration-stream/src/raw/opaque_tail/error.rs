//! Why the end of a stream cannot be kept.

use crate::error::DecodeError;
use crate::raw::decoder::MAX_SECTIONS;
use crate::raw::vmdesc::DescriptionError;
use crate::{IdStr, InstanceId};

/// Why a tail could not be taken or split. Offsets count from its first byte.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TailError {
    /// It did not end within its limit.
    #[error("the stream's tail does not end within {max} bytes")]
    TooLong {
        /// The limit, bytes.
        max: usize,
        /// Why the last thing that looked like its end was none.
        #[source]
        rejected: Option<Box<TailError>>,
    },
    /// The bytes are over before the tail is.
    #[error("the stream's tail does not end within the {len} bytes there are")]
    Incomplete {
        /// How many there are.
        len: usize,
    },
    /// Too many things in it look like its end.
    #[error("the stream's tail has more than {max} false ends")]
    FalseEnds {
        /// The limit.
        max: usize,
    },
    /// Too many places in it look like the end of a section.
    #[error("the stream's tail has more than {max} places where a section could end")]
    TooManyEnds {
        /// The limit.
        max: usize,
    },
    /// Too many descriptions in it are wrong about the lengths of sections.
    #[error(
        "the stream's tail has more than {max} descriptions of other lengths than its sections"
    )]
    TooManySearches {
        /// The limit.
        max: usize,
    },
    /// The description is none.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// More devices described than a stream may have sections.
    #[error("{count} devices described, at most {MAX_SECTIONS} expected")]
    TooManySections {
        /// How many.
        count: usize,
    },
    /// A section's header is cut off or none.
    #[error("in the stream's tail")]
    Frame(#[from] DecodeError),
    /// Another section stands where a described one is expected.
    #[error("no section '{idstr}' instance {instance} at byte {offset:#x} of the stream's tail")]
    Header {
        /// The device described.
        idstr: IdStr,
        /// Which one of that idstr.
        instance: InstanceId,
        /// Where it was expected.
        offset: usize,
    },
    /// The end of a section's body cannot be told.
    #[error(
        "the end of section '{idstr}' instance {instance} at byte {offset:#x} of the stream's \
         tail, {described} bytes by its description, cannot be told"
    )]
    Body {
        /// The device.
        idstr: IdStr,
        /// Which one of that idstr.
        instance: InstanceId,
        /// Where its body begins.
        offset: usize,
        /// Its length according to the description, bytes.
        described: u64,
    },
    /// Something follows the sections described.
    #[error("{len} bytes at byte {offset:#x} of the stream's tail are not described")]
    NotDescribed {
        /// Where they begin.
        offset: usize,
        /// How many there are.
        len: usize,
    },
}
