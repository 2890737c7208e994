//! Pages that the receiver has already, because nothing but their content was sent of them last.
//!
//! A dirty log says that a page was written, not that it has changed. [`Unchanged`] remembers a
//! fingerprint of what was sent of each page last, on the stream it belongs to, and says of a page that
//! is to be sent whether the receiver has just that. Such a page need not be sent, and nothing on the
//! wire says so: a COLO secondary keeps what it was sent last, and restores from there what its own guest
//! has written, whether a checkpoint names the page or not.
//!
//! What makes it right:
//!
//! - **What was looked at is what is sent.** A page is copied out of guest memory, and the copy is
//!   looked at and sent. So it does not matter whether the guest runs meanwhile.
//! - **What was sent last is what the receiver has.** Pages of one place land in the order in which they
//!   were sent ([`PageTransport`](crate::PageTransport)), and a receiver that loses one loses the stream. The
//!   table belongs to one stream, and goes with it: another receiver begins with an empty one.
//! - **Nobody can make two contents look the same.** A fingerprint is 128 bits of a message
//!   authentication code (AEGIS-128X2) under a key that is drawn at random for each table and that
//!   nothing tells of. Two contents chosen without the key are taken for one with a probability of
//!   2^-128, and a page is only ever compared with what was sent of it last.
//!
//! It costs 16 bytes for each page that was ever sent with it, a copy of each dirty page, and the
//! fingerprint. Whether it pays depends on the guest and on the connection, so it is measured: see
//! [`WhenToCompare`].

mod changed;
mod fingerprint;
mod policy;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vm_memory::{MmapRegion, VolatileMemory};

pub use changed::ChangedPages;
use fingerprint::Fingerprints;
pub use fingerprint::PageContent;
use policy::{Policy, Round};

use crate::PAGE_SIZE;
use crate::ram::RamBlockTable;
use crate::raw::ram::PageAddress;

/// [`PAGE_SIZE`] as a length in memory.
const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE_SIZE);

/// What is not known of a page: so it begins, and no fingerprint is like that.
const UNKNOWN: [u64; 2] = [0, 0];
/// All zero, which is seen without a fingerprint.
const ZERO: [u64; 2] = [0, 1];
/// Bytes of a page's fingerprint.
const SLOT: usize = 16;

/// When pages are compared with what was sent of them before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenToCompare {
    /// As long as it costs less time than it saves, by what both took last. It is tried again after
    /// some rounds, more of them each time that it did not pay.
    #[default]
    WhenItPays,
    /// In every round: where fewer bytes on the wire are worth more than the time.
    Always,
}

/// What was sent last of each page of one stream. The threads that send pages share it.
pub struct Unchanged {
    fingerprints: Fingerprints,
    /// Two words a page, for each block.
    blocks: Vec<MmapRegion<()>>,
    compares: AtomicBool,
    tally: Tally,
    policy: Option<Mutex<Policy>>,
}

/// What became of pages that were to be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages that were copied and compared.
    pub compared: u64,
    /// Those of them that were left out.
    pub unchanged: u64,
    /// Pages that were zero before, and were left out.
    pub still_zero: u64,
    /// How long looking at all of them took.
    pub compare_time: Duration,
    /// Pages that were sent with their content.
    pub sent: u64,
    /// How long sending took.
    pub send_time: Duration,
}

#[derive(Debug, Default)]
struct Tally {
    compared: AtomicU64,
    unchanged: AtomicU64,
    still_zero: AtomicU64,
    compare_ns: AtomicU64,
    sent: AtomicU64,
    send_ns: AtomicU64,
}

impl Unchanged {
    /// A table that knows of no page, with a key of its own. It takes up memory where pages are sent.
    ///
    /// # Errors
    /// There are no addresses for it, or no random numbers; [`io::ErrorKind::Unsupported`] without
    /// the feature `unchanged`.
    pub fn new(table: &RamBlockTable, when: WhenToCompare) -> io::Result<Self> {
        let blocks = table
            .iter()
            .map(|(_, block)| {
                let len = usize::try_from(block.pages())
                    .ok()
                    .and_then(|pages| pages.checked_mul(SLOT));
                MmapRegion::new(len.unwrap_or(usize::MAX)).map_err(io::Error::other)
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            fingerprints: Fingerprints::keyed()?,
            blocks,
            compares: AtomicBool::new(true),
            tally: Tally::default(),
            policy: match when {
                WhenToCompare::WhenItPays => Some(Mutex::default()),
                WhenToCompare::Always => None,
            },
        })
    }

    /// Another round over guest memory begins, a checkpoint: decides whether pages are compared in it.
    pub fn begin_round(&self) {
        if let Some(policy) = &self.policy {
            // Plain numbers, whole at every moment.
            let mut policy = policy.lock().unwrap_or_else(PoisonError::into_inner);
            let compares = policy.next(self.tally.total());
            self.compares.store(compares, Ordering::Relaxed);
        }
    }

    /// Whether pages are compared now. If not, each page that is sent is to be told to
    /// [`Unchanged::sent_unseen`]. Both are right whatever this says.
    #[must_use]
    pub fn compares(&self) -> bool {
        self.compares.load(Ordering::Relaxed)
    }

    /// Whether the receiver has this content of the page. If it has not, the caller sends just that next.
    ///
    /// One thread at a time may ask about a page, in the order in which it is sent.
    #[must_use]
    pub fn is_known(&self, page: PageAddress, content: &PageContent) -> bool {
        let fingerprint = match self.fingerprints.of(content) {
            // Those have a meaning of their own; the page is sent once in 2^64 times for nothing.
            [0, _] => UNKNOWN,
            other => other,
        };
        self.replace(page, fingerprint) == Some(fingerprint) && fingerprint != UNKNOWN
    }

    /// As [`Unchanged::is_known`], of a page that is all zero.
    #[must_use]
    pub fn is_known_zero(&self, page: PageAddress) -> bool {
        self.replace(page, ZERO) == Some(ZERO)
    }

    /// The page is sent, and nobody knows with what content.
    pub fn sent_unseen(&self, page: PageAddress) {
        self.replace(page, UNKNOWN);
    }

    /// What became of pages, for the figures and for the decision whether comparing pays.
    pub fn note(&self, sent: Sent) {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        for (total, more) in [
            (&self.tally.compared, sent.compared),
            (&self.tally.unchanged, sent.unchanged),
            (&self.tally.still_zero, sent.still_zero),
            (&self.tally.compare_ns, ns(sent.compare_time)),
            (&self.tally.sent, sent.sent),
            (&self.tally.send_ns, ns(sent.send_time)),
        ] {
            total.fetch_add(more, Ordering::Relaxed);
        }
    }

    /// Pages that were compared so far, and pages that were left out, zero pages included.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let total = self.tally.total();
        (total.compared, total.unchanged + total.still_zero)
    }

    /// Puts a page's words in the place of those before, which are returned; `None` of no page.
    ///
    /// Whoever asked about the page before happens before this: pages of one place are sent in order.
    fn replace(&self, page: PageAddress, new: [u64; 2]) -> Option<[u64; 2]> {
        let block = self.blocks.get(page.block.index())?;
        let index = usize::try_from(page.offset / PAGE_SIZE).ok()?;
        let at = index.checked_mul(SLOT)?;
        let mut old = UNKNOWN;
        for (i, (old, new)) in old.iter_mut().zip(new).enumerate() {
            let word = block.get_atomic_ref::<AtomicU64>(at + i * size_of::<u64>());
            let word = word.ok()?;
            // Two plain accesses: nobody else is at the word.
            *old = word.load(Ordering::Relaxed);
            if *old != new {
                word.store(new, Ordering::Relaxed);
            }
        }
        Some(old)
    }
}

impl Tally {
    fn total(&self) -> Round {
        let get = |total: &AtomicU64| total.load(Ordering::Relaxed);
        Round {
            compared: get(&self.compared),
            unchanged: get(&self.unchanged),
            still_zero: get(&self.still_zero),
            compare_ns: get(&self.compare_ns),
            sent: get(&self.sent),
            send_ns: get(&self.send_ns),
        }
    }
}

impl fmt::Debug for Unchanged {
    /// Without the key, and without what it was used for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unchanged")
            .field("compares", &self.compares)
            .field("tally", &self.tally)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(feature = "unchanged")]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::ram::{BlockId, RamBlock};

    const PAGES: u64 = 300;

    fn table() -> RamBlockTable {
        let block = |name| RamBlock::new(name, PAGES * PAGE_SIZE).unwrap();
        RamBlockTable::new(vec![block("a"), block("b")]).unwrap()
    }

    fn page(block: u32, index: u64) -> PageAddress {
        PageAddress {
            block: BlockId::new(block),
            offset: index * PAGE_SIZE,
        }
    }

    fn unchanged() -> Unchanged {
        Unchanged::new(&table(), WhenToCompare::Always).unwrap()
    }

    #[test]
    fn every_bit_of_a_page_counts() {
        let table = unchanged();
        let mut content = [0x5a; PAGE_LEN];
        assert!(!table.is_known(page(1, 7), &content));
        assert!(table.is_known(page(1, 7), &content));
        for i in 0..PAGE_LEN {
            content[i] ^= 1 << (i % 8);
            assert!(!table.is_known(page(1, 7), &content), "byte {i}");
        }
        assert!(!table.is_known(page(0, 7), &content), "another block");
        assert!(!table.is_known(page(1, 8), &content), "another page");
    }

    #[test]
    fn what_there_is_no_page_for_is_never_known() {
        let table = unchanged();
        for nowhere in [page(0, PAGES), page(2, 0), page(0, u64::MAX / PAGE_SIZE)] {
            for _ in 0..2 {
                assert!(!table.is_known(nowhere, &[1; PAGE_LEN]));
                assert!(!table.is_known_zero(nowhere));
            }
        }
    }

    #[test]
    fn no_two_tables_have_a_key_in_common() {
        let (a, b) = (unchanged(), unchanged());
        let content = [3; PAGE_LEN];
        assert_eq!(a.fingerprints.of(&content), a.fingerprints.of(&content));
        assert_ne!(a.fingerprints.of(&content), b.fingerprints.of(&content));
    }

    #[test]
    fn nothing_that_is_printed_tells_of_the_key() {
        let table = unchanged();
        assert!(!format!("{table:?}").contains("fingerprints"));
    }

    proptest! {
        #[test]
        fn a_page_is_known_if_just_that_was_sent_last(
            steps in prop::collection::vec((0..2u32, 0..4u64, 0..4u8), 0..300),
        ) {
            let table = unchanged();
            // What the receiver has of each page, as far as anybody looked.
            let mut model = HashMap::new();
            for (block, index, kind) in steps {
                let at = page(block, index);
                let before = model.insert((block, index), Some(kind));
                let expected = before == Some(Some(kind));
                match kind {
                    0 => prop_assert_eq!(table.is_known_zero(at), expected),
                    3 => {
                        table.sent_unseen(at);
                        model.insert((block, index), None);
                    }
                    byte => prop_assert_eq!(table.is_known(at, &[byte; PAGE_LEN]), expected),
                }
            }
        }
    }
}
