//! What a target asks of its VMM, which knows the devices.

use crate::dirty_bitmap::{Chunk, MigratedBitmap};
use crate::precopy::BoxError;
use crate::section::SectionHeader;

/// What a target asks of its VMM.
pub trait TargetVm {
    /// A device section begins; `body` is as much of what follows as has arrived, and may already
    /// run over into the next section. Called again with more after [`Body::NeedMore`], from the
    /// start of the body.
    ///
    /// Nothing may change in the VM until the whole stream was loaded: parse, check, and keep.
    ///
    /// # Errors
    /// The device is unknown, or its state is not sound. The migration fails.
    fn load_device(&mut self, section: &SectionHeader, body: &[u8]) -> Result<Body, BoxError>;

    /// A chunk of `bitmap` (the capability `dirty-bitmaps`), whose alias is its node's and its own
    /// name unless the source maps them. Bits come while the guest still runs at the source; what
    /// was said above of changes holds here, too.
    ///
    /// # Errors
    /// The bitmap is not wanted, which is all that happens unless this is implemented. The
    /// migration fails.
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        _chunk: &Chunk,
    ) -> Result<(), BoxError> {
        Err(format!("dirty bitmap '{}' of '{}'", bitmap.name, bitmap.node).into())
    }
}

/// What a device found in the bytes shown to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// The body is this many bytes long.
    Complete(usize),
    /// The body is longer than what was there.
    NeedMore,
}
