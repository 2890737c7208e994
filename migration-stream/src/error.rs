//! The error of every decoder of the crate.

use std::error::Error;

use crate::raw::command::CommandError;
use crate::raw::container::ContainerError;
use crate::raw::dirty_bitmap::DirtyBitmapError;
use crate::raw::header::HeaderError;
use crate::raw::postcopy::{BitmapError, OrderError, PackageError};
use crate::raw::ram::RamError;
use crate::raw::return_path::ReturnPathError;
use crate::raw::section::SectionError;
use crate::{ConfigurationError, IdStrError};

/// What was wrong with received bytes, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset:#x} of the stream: {cause}")]
#[non_exhaustive]
pub struct DecodeError {
    /// Where the offending item begins, bytes since the stream did.
    pub offset: u64,
    /// What is wrong with it.
    pub cause: Cause,
}

impl DecodeError {
    pub(crate) fn new(offset: u64, cause: impl Into<Cause>) -> Self {
        Self {
            offset,
            cause: cause.into(),
        }
    }

    /// How many bytes are missing at least, if more bytes would help.
    #[must_use]
    pub const fn missing(&self) -> Option<usize> {
        match self.cause {
            Cause::Truncated { needed } => Some(needed),
            _ => None,
        }
    }
}

/// What was wrong, by the part of the format it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Cause {
    /// The bytes end inside an item.
    #[error("ends inside an item, at least {needed} more bytes expected")]
    Truncated {
        /// Bytes missing at least.
        needed: usize,
    },
    /// A counted string that is no name.
    #[error(transparent)]
    IdStr(#[from] IdStrError),
    /// The file header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The image in which the stream is.
    #[error(transparent)]
    Container(ContainerError),
    /// The configuration section.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// A section's frame.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// A command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The body of a RAM section.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The body of a `dirty-bitmap` section.
    #[error(transparent)]
    DirtyBitmap(#[from] DirtyBitmapError),
    /// The order of postcopy's commands.
    #[error(transparent)]
    PostcopyOrder(#[from] OrderError),
    /// A package of postcopy.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The bitmap of received pages.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// A message of the return path.
    #[error(transparent)]
    ReturnPath(#[from] ReturnPathError),
}

/// An error of the VMM's own. It is kept as the source of the library's error.
pub type BoxError = Box<dyn Error + Send + Sync>;
