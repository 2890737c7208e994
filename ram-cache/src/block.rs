//! The RAM blocks of a cache: where they lie in the guest's memory.

use std::ops::Range;

use vm_memory::VolatileSlice;

use crate::bitmap::{BitmapError, DirtyBitmap};
use crate::error::CacheError;
use crate::mapping::GuestMapping;
use crate::{PAGE_BYTES, PAGE_SIZE};

/// A RAM block of a cache: where it lies in the guest's memory.
#[derive(Clone, Debug)]
pub struct CacheBlockSpec {
    /// The block's name, for messages.
    pub name: String,
    /// The mapping of guest memory that the block lies in.
    pub guest: GuestMapping,
    /// Where in the mapping the block starts, bytes, a multiple of [`PAGE_SIZE`].
    pub offset_in_region: usize,
    /// The block's length in bytes, a non-zero multiple of [`PAGE_SIZE`]. For a block that can be
    /// resized this is the length it can grow to, not the length in use: a page that comes into use
    /// later must have its place in the cache.
    pub len: usize,
}

impl CacheBlockSpec {
    /// A block that is a whole mapping of guest memory.
    #[must_use]
    pub fn whole_region(name: impl Into<String>, guest: impl Into<GuestMapping>) -> Self {
        let guest = guest.into();
        Self {
            name: name.into(),
            offset_in_region: 0,
            len: guest.size(),
            guest,
        }
    }

    /// Number of pages.
    pub(crate) const fn pages(&self) -> usize {
        self.len / PAGE_BYTES
    }

    /// A bitmap with a bit for each page.
    pub(crate) fn bitmap(&self) -> Result<DirtyBitmap, CacheError> {
        DirtyBitmap::new(self.pages() as u64).map_err(|source| self.bitmap_error(source))
    }

    /// The guest's own memory for a range of the block.
    pub(crate) fn guest_slice(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<VolatileSlice<'_>, CacheError> {
        self.guest
            .slice(self.offset_in_region + offset, len)
            .ok_or_else(|| self.out_of_block(offset as u64, len))
    }

    pub(crate) fn out_of_block(&self, offset: u64, len: usize) -> CacheError {
        CacheError::OutOfBlock {
            name: self.name.clone(),
            offset,
            len,
            block_len: self.len,
        }
    }

    pub(crate) fn bitmap_error(&self, source: BitmapError) -> CacheError {
        CacheError::Bitmap {
            name: self.name.clone(),
            source,
        }
    }

    /// Whether the block is whole pages within its mapping.
    fn check(&self) -> Result<(), CacheError> {
        if self.len == 0
            || !self.len.is_multiple_of(PAGE_BYTES)
            || !self.offset_in_region.is_multiple_of(PAGE_BYTES)
        {
            return Err(CacheError::NotWholePages {
                name: self.name.clone(),
                offset_in_region: self.offset_in_region,
                len: self.len,
            });
        }
        match self.offset_in_region.checked_add(self.len) {
            Some(end) if end <= self.guest.size() => Ok(()),
            _ => Err(CacheError::OutsideRegion {
                name: self.name.clone(),
                offset_in_region: self.offset_in_region,
                len: self.len,
                region_len: self.guest.size(),
            }),
        }
    }

    /// The addresses the block has in this process.
    pub(crate) fn addresses(&self) -> Range<usize> {
        let start = self.guest.address() + self.offset_in_region;
        start..start + self.len
    }
}

/// Whether all of the blocks are whole pages of their mappings and none is on top of another.
pub(crate) fn check(blocks: &[CacheBlockSpec]) -> Result<(), CacheError> {
    for (index, spec) in blocks.iter().enumerate() {
        spec.check()?;
        let addresses = spec.addresses();
        for other in &blocks[..index] {
            let taken = other.addresses();
            if addresses.start < taken.end && taken.start < addresses.end {
                return Err(CacheError::Overlap {
                    first: other.name.clone(),
                    second: spec.name.clone(),
                });
            }
        }
    }
    Ok(())
}

/// The block of that index.
pub(crate) fn find<B>(blocks: &[B], index: usize) -> Result<&B, CacheError> {
    blocks.get(index).ok_or(CacheError::NoBlock {
        block: index,
        blocks: blocks.len(),
    })
}

/// The block of that index and the offset in it, when the range lies there.
pub(crate) fn locate<B: AsRef<CacheBlockSpec>>(
    blocks: &[B],
    index: usize,
    offset: u64,
    len: usize,
) -> Result<(&B, usize), CacheError> {
    let block = find(blocks, index)?;
    let spec = block.as_ref();
    match usize::try_from(offset).map(|start| (start, start.checked_add(len))) {
        Ok((start, Some(end))) if end <= spec.len => Ok((block, start)),
        _ => Err(spec.out_of_block(offset, len)),
    }
}

/// The pages that a range of a block touches.
pub(crate) const fn pages_of(offset: usize, len: usize) -> Range<usize> {
    let first = offset / PAGE_BYTES;
    if len == 0 {
        return first..first;
    }
    first..(offset + len - 1) / PAGE_BYTES + 1
}

/// A range of pages in bytes.
pub(crate) const fn bytes_of(pages: &Range<usize>) -> (usize, usize) {
    (
        pages.start * PAGE_BYTES,
        (pages.end - pages.start) * PAGE_BYTES,
    )
}

const _: () = assert!(PAGE_SIZE == PAGE_BYTES as u64);
