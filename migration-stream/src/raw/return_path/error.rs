//! What can be wrong with a message.

use super::number::ReturnPathNumber;

/// What is wrong with a return path message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReturnPathError {
    /// No message has this number.
    #[error("unknown return path message {number:#x} (length {len})")]
    Unknown {
        /// The number.
        number: u16,
        /// Length of its payload, bytes.
        len: u16,
    },
    /// The payload's length is not one the message can have.
    #[error("return path message {message:?} with a payload of {len} bytes")]
    Length {
        /// The message.
        message: ReturnPathNumber,
        /// Length of its payload, bytes.
        len: u16,
    },
}
