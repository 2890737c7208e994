//! XBZRLE: a page as its difference to what was sent before (`migration/xbzrle.c`,
//! `migration/page_cache.c`, QEMU 11.1).
//!
//! The source keeps a copy of pages that it has sent ([`PageCache`]) and sends of a page that the
//! guest has written again only what differs ([`encode`]). The target writes those bytes into the
//! page that it has ([`Runs`]). Both therefore have to agree on what the page was before: what goes
//! into the cache is the very copy that was sent, never a second look at a running guest's memory.
//!
//! It does not go together with COLO, where the page on the other side is a cached one and not the
//! guest's. QEMU accepts the combination and corrupts the secondary's memory; here a decoder that
//! takes XBZRLE records does not become one of checkpoints.

mod cache;
mod codec;

pub use cache::{CacheSizeError, Lookup, PageCache};
pub use codec::{Encoded, Run, Runs, XbzrleError, encode};

#[allow(clippy::cast_possible_truncation)] // 4096
pub(crate) const PAGE: usize = crate::PAGE_SIZE as usize;

/// A page's bytes, in a copy of our own.
pub type PageBytes = [u8; PAGE];

/// What XBZRLE did so far; QEMU's `xbzrle-cache` in `query-migrate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XbzrleCounters {
    /// Bytes of the cache when it is full; 0 where XBZRLE is not in use.
    pub cache_size: u64,
    /// Bytes of encoded pages, their records' heads included.
    pub bytes: u64,
    /// Pages sent as a difference.
    pub pages: u64,
    /// Pages written again with the bytes that they had: nothing was sent.
    pub unchanged: u64,
    /// Pages that were not in the cache.
    pub cache_miss: u64,
    /// Pages whose difference would have been longer than the page.
    pub overflow: u64,
}

impl XbzrleCounters {
    /// How many of the pages written again were not in the cache, 0 to 1.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // a figure for people
    pub fn cache_miss_rate(&self) -> f64 {
        let all = self.pages + self.unchanged + self.overflow + self.cache_miss;
        if all == 0 {
            return 0.0;
        }
        self.cache_miss as f64 / all as f64
    }

    /// How many times smaller the encoded pages are than the pages were; 0 before the first.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // a figure for people
    pub fn encoding_rate(&self) -> f64 {
        if self.bytes == 0 {
            return 0.0;
        }
        (self.pages * crate::PAGE_SIZE) as f64 / self.bytes as f64
    }
}
