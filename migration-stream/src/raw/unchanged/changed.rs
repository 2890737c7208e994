//! Copies of the pages that are left to be sent.

use std::fmt;
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::{PAGE_LEN, Sent, Unchanged};
use crate::ram::BlockId;
use crate::raw::ram::{PageAddress, zero_check};
use crate::{GuestRam, MemoryError};

/// Of some pages of a block those that the receiver has not, copied out of guest memory: what a
/// transport sends in the place of guest memory where it [compares](Unchanged::compares).
#[derive(Default)]
pub struct ChangedPages {
    content: Vec<u8>,
    normal: Vec<u64>,
    zero: Vec<u64>,
}

impl ChangedPages {
    /// None yet. Memory is taken when pages are copied, and kept for the next.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the pages at `offsets` of `block`, in the place of those before: what the receiver has
    /// not is to be sent next. `finds_zero`: pages that are zero are told apart, and have no content.
    /// Returns what there is for [`Unchanged::note`], but for the time that sending takes.
    ///
    /// # Errors
    /// A page that does not lie in guest RAM.
    pub fn copy(
        &mut self,
        ram: &dyn GuestRam,
        unchanged: &Unchanged,
        block: BlockId,
        offsets: impl IntoIterator<Item = u64>,
        finds_zero: bool,
    ) -> Result<Sent, MemoryError> {
        let began = Instant::now();
        self.clear();
        let mut sent = Sent::default();
        for offset in offsets {
            let page = PageAddress { block, offset };
            let data = ram.slice(block, offset, PAGE_LEN)?;
            if finds_zero && zero_check(&data) {
                if unchanged.is_known_zero(page) {
                    sent.still_zero += 1;
                } else {
                    self.zero.push(offset);
                }
                continue;
            }
            let start = self.normal.len() * PAGE_LEN;
            if self.content.len() < start + PAGE_LEN {
                self.content.resize(start + PAGE_LEN, 0);
            }
            let Some(copy) = self
                .content
                .get_mut(start..)
                .and_then(|rest| rest.first_chunk_mut::<PAGE_LEN>())
            else {
                continue;
            };
            data.copy_to(&mut copy[..]);
            sent.compared += 1;
            if unchanged.is_known(page, copy) {
                sent.unchanged += 1;
            } else {
                self.normal.push(offset);
            }
        }
        sent.sent = self.normal.len() as u64;
        sent.compare_time = began.elapsed();
        Ok(sent)
    }

    /// No pages, for a transport that sends others.
    pub fn clear(&mut self) {
        self.normal.clear();
        self.zero.clear();
    }

    /// Offsets of the pages with content, in the order in which they were given.
    #[must_use]
    pub fn normal(&self) -> &[u64] {
        &self.normal
    }

    /// Offsets of the zero pages.
    #[must_use]
    pub fn zero(&self) -> &[u64] {
        &self.zero
    }

    /// The content of the pages with content, one after the other.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        let len = self.normal.len() * PAGE_LEN;
        self.content.get(..len).unwrap_or_default()
    }

    /// The same, as an encoder of guest memory wants it.
    pub fn volatile_content(&mut self) -> VolatileSlice<'_> {
        let len = self.normal.len() * PAGE_LEN;
        VolatileSlice::from(self.content.get_mut(..len).unwrap_or_default())
    }
}

impl fmt::Debug for ChangedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangedPages")
            .field("normal", &self.normal.len())
            .field("zero", &self.zero.len())
            .finish_non_exhaustive()
    }
}
