//! Looking for pages that are as they were sent, beside copying the same pages to where they are sent
//! from, and beside looking for zero pages.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::ram::{BlockId, PageAddress, RamBlock, RamBlockTable, zero_check};
use migration_stream::unchanged::{ChangedPages, Unchanged, WhenToCompare};
use migration_stream::{GuestRam, MemoryError, PAGE_SIZE};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

const PAGE: usize = 4096;
/// As many as a multifd packet has.
const PACKET: usize = 128;
/// In the second-level cache, and far beyond any, MiB.
const SIZES: [usize; 2] = [1, 256];

const RAM: BlockId = BlockId::new(0);

struct Guest {
    table: RamBlockTable,
    memory: MmapRegion,
}

impl Guest {
    fn new(len: usize) -> Self {
        let block = RamBlock::new("ram", len as u64).expect("a block");
        Self {
            table: RamBlockTable::new(vec![block]).expect("a table"),
            // No page is zero, and none shows it before its end.
            memory: benches::memory(len, |index, page| {
                page[PAGE - 8..].copy_from_slice(&(index as u64 + 1).to_le_bytes());
            }),
        }
    }

    /// Offsets, a packet's at a time.
    fn packets(&self) -> impl Iterator<Item = impl Iterator<Item = u64>> {
        (0..self.memory.size()).step_by(PACKET * PAGE).map(|start| {
            let end = (start + PACKET * PAGE).min(self.memory.size());
            (start..end).step_by(PAGE).map(|offset| offset as u64)
        })
    }

    fn page(&self, offset: u64) -> VolatileSlice<'_> {
        self.slice(RAM, offset, PAGE).expect("a page of the memory")
    }
}

impl GuestRam for Guest {
    fn blocks(&self) -> &RamBlockTable {
        &self.table
    }

    fn slice(
        &self,
        block: BlockId,
        offset: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_>, MemoryError> {
        let at = usize::try_from(offset).map_err(|_| MemoryError::NoBlock(block))?;
        self.memory
            .get_slice(at, len)
            .map_err(|_| MemoryError::NoBlock(block))
    }
}

fn unchanged_pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("unchanged");
    for mib in SIZES {
        let guest = Guest::new(mib << 20);
        let size = format!("{mib} MiB");
        group.throughput(Throughput::Bytes((mib << 20) as u64));
        group.bench_function(BenchmarkId::new("zero check", &size), |b| {
            b.iter(|| {
                let offsets = guest.packets().flatten();
                offsets
                    .filter(|offset| zero_check(&guest.page(*offset)))
                    .count()
            });
        });
        let mut buffer = vec![1; PACKET * PAGE];
        group.bench_function(BenchmarkId::new("memcpy", &size), |b| {
            b.iter(|| {
                for packet in guest.packets() {
                    for (copy, offset) in buffer.chunks_exact_mut(PAGE).zip(packet) {
                        guest.page(offset).copy_to(copy);
                    }
                    black_box(&buffer);
                }
            });
        });
        let table = Unchanged::new(&guest.table, WhenToCompare::Always).expect("a table");
        let mut changed = ChangedPages::new();
        let mut left = || -> usize {
            guest
                .packets()
                .map(|packet| {
                    changed
                        .copy(&guest, &table, RAM, packet, true)
                        .expect("pages of the memory");
                    changed.normal().len()
                })
                .sum()
        };
        // The first time none is known.
        assert_eq!(left() as u64 * PAGE_SIZE, (mib << 20) as u64);
        group.bench_function(BenchmarkId::new("copy and compare, known", &size), |b| {
            b.iter(|| assert_eq!(left(), 0));
        });
    }
    let content = [0x5a; PAGE];
    let guest = Guest::new(PAGE);
    let table = Unchanged::new(&guest.table, WhenToCompare::Always).expect("a table");
    let page = PageAddress {
        block: RAM,
        offset: 0,
    };
    group.throughput(Throughput::Bytes(PAGE_SIZE));
    group.bench_function("fingerprint of one page", |b| {
        b.iter(|| table.is_known(page, black_box(&content)));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = unchanged_pages
}
criterion_main!(benches);
