//! What can be wrong with a block's place in a file.

/// Length of the header in a block list's entry, bytes.
pub const HEADER_LEN: usize = 28;

pub(super) const VERSION: u32 = 1;

/// What is wrong with the place of a block's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The header is cut off.
    #[error("mapped-ram header shorter than {HEADER_LEN} bytes")]
    Cut,
    /// A version that does not exist.
    #[error("mapped-ram header of version {version}, expected {VERSION}")]
    Version {
        /// What stands there.
        version: u32,
    },
    /// Pages of another size.
    #[error("mapped-ram pages of {page_size} bytes, expected 4096")]
    PageSize {
        /// What stands there, bytes.
        page_size: u64,
    },
    /// The block has no pages in the file, but they are not elsewhere either.
    #[error("mapped-ram header without pages in the file")]
    NoArea,
    /// The bitmap lies over what stands before it.
    #[error(
        "mapped-ram bitmap at {bitmap:#x}, expected behind its header, which ends at {header_end:#x}"
    )]
    Bitmap {
        /// Offset of the bitmap in the file.
        bitmap: u64,
        /// Where the header ends.
        header_end: u64,
    },
    /// The pages lie over their bitmap, or not on a page's boundary.
    #[error(
        "mapped-ram pages at {pages:#x}, expected on a page boundary behind their bitmap at {bitmap:#x}"
    )]
    Pages {
        /// Offset of the bitmap in the file.
        bitmap: u64,
        /// Offset of page 0 in the file.
        pages: u64,
    },
    /// The pages end where no file does.
    #[error("mapped-ram pages at {pages:#x} end beyond 63 bits")]
    TooFar {
        /// Offset of page 0 in the file.
        pages: u64,
    },
}
