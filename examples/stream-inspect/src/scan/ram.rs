//! Pages in the stream, and the list of the blocks that they are of.

use migration_stream::PAGE_SIZE;
use migration_stream::ram::RamBlockTable;
use migration_stream::raw::decoder::{MAX_ITEM_LEN, RamItem};
use migration_stream::raw::ram::PageAddress;

use super::{Scan, ScanError};
use crate::inspection::{Block, Part};
use crate::pages::PageSet;

const PAGE_LEN: usize = 4096;

impl Scan<'_> {
    pub(super) fn ram_item(&mut self, item: RamItem, offset: u64) -> Result<(), ScanError> {
        match item {
            RamItem::BlockList(table) => self.announced(&table)?,
            RamItem::MappedBlock { block, area } => {
                self.meter.turn(Part::Pages, self.reader.offset());
                let end = area.end();
                let file = self.origin.file().ok_or(ScanError::NoFile)?;
                let size = file
                    .size()
                    .map_err(|source| ScanError::Stream { offset, source })?;
                if end > size {
                    return Err(ScanError::Truncated { end, size });
                }
                self.reader
                    .seek(end)
                    .map_err(|source| ScanError::Stream { offset, source })?;
                self.meter.turn(Part::Setup, end);
                // Looked at when all that stands before pages has come.
                self.areas.push((block, area));
            }
            RamItem::Page(page) => {
                self.count(page, offset, |block| &mut block.normal);
                if let Some(extract) = &mut self.extract {
                    while self.reader.buffered().len() < PAGE_LEN {
                        self.reader
                            .fill(MAX_ITEM_LEN)
                            .map_err(|source| ScanError::Stream { offset, source })?;
                    }
                    let bytes = self.reader.buffered().get(..PAGE_LEN);
                    extract.page(page, bytes.unwrap_or_default())?;
                }
                self.skip(PAGE_LEN)?;
            }
            RamItem::Zero(page) => {
                self.count(page, offset, |block| &mut block.zero);
                if let Some(extract) = &mut self.extract {
                    extract.zero(page)?;
                }
            }
            RamItem::Xbzrle { page, len } => {
                self.count(page, offset, |block| &mut block.xbzrle);
                let len = usize::from(len);
                while self.reader.buffered().len() < len {
                    self.fill()?;
                }
                let bytes = self.reader.buffered().get(..len).unwrap_or_default();
                if let Some(extract) = &mut self.extract {
                    extract.xbzrle(page, bytes)?;
                }
                self.skip(len)?;
            }
            RamItem::MultifdFlush => self.origin.flush()?,
            RamItem::EndOfSection if self.origin.flushes_each_section() => self.origin.flush()?,
            RamItem::EndOfSection => {}
        }
        Ok(())
    }

    fn count(&mut self, page: PageAddress, offset: u64, kind: impl Fn(&mut Block) -> &mut u64) {
        self.meter.turn(Part::Pages, offset);
        if let Some(block) = self.found.blocks.get_mut(page.block.index()) {
            *kind(block) += 1;
        }
        if let Some(unique) = self.unique.get_mut(page.block.index()) {
            unique.insert(page.offset / PAGE_SIZE, 1);
        }
    }

    fn announced(&mut self, table: &RamBlockTable) -> Result<(), ScanError> {
        self.found.blocks = table
            .iter()
            .map(|(id, block)| Block {
                block: block.clone(),
                is_ignored: table.is_ignored(id),
                normal: 0,
                zero: 0,
                xbzrle: 0,
                unique: 0,
            })
            .collect();
        self.unique.resize_with(table.len(), PageSet::default);
        if let Some(extract) = &mut self.extract {
            extract.begin(table)?;
        }
        self.origin
            .announced(self.found.configuration.as_ref(), table)
    }
}
