//! Pages of the main stream, and where they go.

use vm_memory::VolatileSlice;

use super::link::Link;
use crate::precopy::TargetError;
use crate::ram::BlockId;
use crate::raw::decoder::{MAX_ITEM_LEN, RamItem};
use crate::raw::mapped_ram::MappedArea;
use crate::raw::ram::{PageAddress, RamError};
use crate::raw::transport::PageBarrier;
use crate::raw::xbzrle::{Run, Runs};
use crate::{DecodeError, MemoryError, PAGE_SIZE, PageStore};

/// [`PAGE_SIZE`] as a length in memory.
#[allow(clippy::cast_possible_truncation)] // 4096
const PAGE_LEN: usize = PAGE_SIZE as usize;

/// Memory that came in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Pages on the main stream that came with data.
    pub normal_pages: u64,
    /// Pages on the main stream that came as zero.
    pub zero_pages: u64,
    /// Pages on the main stream that came as differences.
    pub xbzrle_pages: u64,
    /// Times that the multifd channels were synchronised.
    pub flushes: u64,
    /// Bytes of the main stream.
    pub bytes: u64,
}

/// Where pages go.
pub(super) struct Pages<'a> {
    pub(super) store: &'a dyn PageStore,
    pub(super) barrier: &'a mut dyn PageBarrier,
}

impl Pages<'_> {
    pub(super) fn load_mapped(
        &mut self,
        block: BlockId,
        area: &MappedArea,
        received: &mut Received,
    ) -> Result<(), TargetError> {
        if !self.store.blocks().is_ignored(block) {
            let loaded = self.barrier.load_mapped(block, area, self.store)?;
            received.normal_pages += loaded.normal;
            received.zero_pages += loaded.zero;
        }
        Ok(())
    }
}

impl Link {
    pub(super) fn ram(
        &mut self,
        item: RamItem,
        pages: &mut Pages<'_>,
        received: &mut Received,
    ) -> Result<(), TargetError> {
        match item {
            RamItem::BlockList(_) | RamItem::EndOfSection => {}
            RamItem::MappedBlock { block, area } => {
                pages.load_mapped(block, &area, received)?;
                self.seek(area.end())?;
            }
            RamItem::Page(PageAddress { block, offset }) => {
                let page: VolatileSlice<'_> = pages.store.prepare(block, offset, PAGE_LEN)?;
                let read = self.reader.read_payload(&page);
                read.map_err(|e| self.broken(e))?;
                pages.store.landed(block, offset, PAGE_LEN)?;
                received.normal_pages += 1;
            }
            RamItem::Zero(PageAddress { block, offset }) => {
                pages.store.zero(block, offset, PAGE_LEN)?;
                received.zero_pages += 1;
            }
            RamItem::Xbzrle { page, len } => {
                let len = usize::from(len);
                while self.reader.buffered().len() < len {
                    self.fill(MAX_ITEM_LEN)?;
                }
                let offset = self.reader.offset();
                let encoded = self.reader.buffered().get(..len).unwrap_or_default();
                apply_xbzrle(encoded, page, pages.store, offset)?;
                self.reader.consume(len);
                received.xbzrle_pages += 1;
            }
            RamItem::MultifdFlush => {
                pages.barrier.flush()?;
                received.flushes += 1;
            }
        }
        Ok(())
    }
}

/// Writes into a page what changed in it; nothing, unless all of it is sound.
fn apply_xbzrle(
    encoded: &[u8],
    page: PageAddress,
    store: &dyn PageStore,
    offset: u64,
) -> Result<(), TargetError> {
    let runs = Runs::new(encoded);
    runs.check()
        .map_err(|e| DecodeError::new(offset, RamError::from(e)))?;
    let memory = store.prepare(page.block, page.offset, PAGE_LEN)?;
    for Run { offset, bytes } in runs.flatten() {
        let place = memory
            .subslice(offset, bytes.len())
            .map_err(|_| MemoryError::OutOfBlock {
                name: page.block.to_string(),
                offset: page.offset + offset as u64,
                len: bytes.len(),
                used_length: page.offset + PAGE_SIZE,
            })?;
        place.copy_from(bytes);
    }
    Ok(store.landed(page.block, page.offset, PAGE_LEN)?)
}
