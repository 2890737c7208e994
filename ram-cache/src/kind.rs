//! Which caches there are.

use crate::block::CacheBlockSpec;
use crate::cache::RamCache;
use crate::cow::CowCache;
use crate::discard::DiscardInhibitor;
use crate::error::CacheError;
use crate::mirror::MirrorCache;

/// Which cache a secondary has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheKind {
    /// [`MirrorCache`]: a second copy of guest RAM.
    Mirror,
    /// [`CowCache`]: only the pages that the two sides have dirtied are there twice.
    #[default]
    Cow,
}

impl CacheKind {
    /// Makes a cache of this kind for `blocks`. It keeps `inhibitor` as long as it lives; if it cannot
    /// be made, the inhibitor is dropped and discard is as it was before.
    ///
    /// # Errors
    /// Those of [`MirrorCache::new`] or [`CowCache::new`].
    pub fn make(
        self,
        blocks: Vec<CacheBlockSpec>,
        inhibitor: DiscardInhibitor,
    ) -> Result<Box<dyn RamCache>, CacheError> {
        Ok(match self {
            Self::Mirror => Box::new(MirrorCache::new(blocks, inhibitor)?),
            Self::Cow => Box::new(CowCache::new(blocks, inhibitor)?),
        })
    }
}
