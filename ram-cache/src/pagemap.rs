//! Which pages of a private mapping are its own, as the kernel has it.
//!
//! A dirty log is not enough to know that: a write that the hypervisor has prepared, and the guest has
//! not carried out before it was stopped, leaves a copy and no trace in the log.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::PAGE_BYTES;

/// A page's word in `/proc/self/pagemap` (Linux, `Documentation/admin-guide/mm/pagemap.rst`).
const ENTRY: usize = size_of::<u64>();
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file, or of shared memory.
const FILE: u64 = 1 << 61;

/// Words read at once.
const AT_ONCE: usize = 512;

/// This process's page map.
#[derive(Debug)]
pub(crate) struct Pagemap(File);

impl Pagemap {
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Calls `own` with the index, from the first on, of each of the `pages` pages at `address` that is
    /// the mapping's own: in memory or swapped out, and not of a file.
    pub(crate) fn own_pages(
        &self,
        address: usize,
        pages: usize,
        mut own: impl FnMut(usize),
    ) -> io::Result<()> {
        let mut buffer = [0; AT_ONCE * ENTRY];
        let mut done = 0;
        while done < pages {
            let count = (pages - done).min(AT_ONCE);
            let words = &mut buffer[..count * ENTRY];
            let at = (address / PAGE_BYTES + done) * ENTRY;
            self.0.read_exact_at(words, at as u64)?;
            for (index, word) in words.chunks_exact(ENTRY).enumerate() {
                let word = u64::from_ne_bytes(word.try_into().unwrap_or_default());
                if word & (PRESENT | SWAPPED) != 0 && word & FILE == 0 {
                    own(done + index);
                }
            }
            done += count;
        }
        Ok(())
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;
    use crate::mapping;

    #[test]
    fn pages_written_through_a_private_mapping_are_its_own_until_they_are_dropped() {
        const PAGES: usize = 1200;
        let len = PAGES * PAGE_BYTES;
        let file = mapping::memory_file(len).unwrap();
        let region = mapping::anonymous(len).unwrap();
        mapping::replace_by_private(&region, 0, len, &file).unwrap();
        let base = mapping::shared(file, len).unwrap();
        let pagemap = Pagemap::open().unwrap();
        let own = || {
            let mut found = Vec::new();
            let address = region.as_ptr().addr();
            pagemap
                .own_pages(address, PAGES, |page| found.push(page))
                .unwrap();
            found
        };
        let memory = region.as_volatile_slice();
        for page in 0..PAGES {
            base.as_volatile_slice()
                .write_obj(7u8, page * PAGE_BYTES)
                .unwrap();
            assert_eq!(memory.read_obj::<u8>(page * PAGE_BYTES).unwrap(), 7);
        }
        assert!(own().is_empty());
        for page in [0, 511, 512, 1199] {
            memory.write_obj(8u8, page * PAGE_BYTES).unwrap();
        }
        assert_eq!(own(), [0, 511, 512, 1199]);
        mapping::drop_own_pages(&region, 511 * PAGE_BYTES, 2 * PAGE_BYTES).unwrap();
        assert_eq!(own(), [0, 1199]);
        assert_eq!(memory.read_obj::<u8>(511 * PAGE_BYTES).unwrap(), 7);
    }
}
