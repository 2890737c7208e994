//! Looking for pages that are as they were sent, beside copying the same pages to where they are sent
//! from, and beside looking for zero pages.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::raw::ram::{PageAddress, zero_check};
use migration_stream::raw::unchanged::{ChangedPages, Unchanged};
use migration_stream::{GuestRam, GuestRamMmap, PAGE_SIZE, WhenToCompare};
use vm_memory::VolatileSlice;

const PAGE: usize = 4096;
/// As many as a multifd packet has.
const PACKET: usize = 128;
/// In the second-level cache, and far beyond any, MiB.
const SIZES: [usize; 2] = [1, 256];

const RAM: BlockId = BlockId::new(0);

fn guest(len: usize) -> GuestRamMmap {
    let block = RamBlock::new("ram", len as u64).expect("a block");
    let table = RamBlockTable::new(vec![block]).expect("a table");
    // No page is zero, and none shows it before its end.
    let memory = benches::memory(len, |index, page| {
        page[PAGE - 8..].copy_from_slice(&(index as u64 + 1).to_le_bytes());
    });
    GuestRamMmap::new(table, vec![Arc::new(memory)]).expect("memory of the block")
}

/// Offsets, a packet's at a time.
fn packets(len: usize) -> impl Iterator<Item = impl Iterator<Item = u64>> {
    (0..len).step_by(PACKET * PAGE).map(move |start| {
        let end = (start + PACKET * PAGE).min(len);
        (start..end).step_by(PAGE).map(|offset| offset as u64)
    })
}

fn page(guest: &GuestRamMmap, offset: u64) -> VolatileSlice<'_> {
    guest
        .slice(RAM, offset, PAGE)
        .expect("a page of the memory")
}

fn unchanged_pages(c: &mut Criterion) {
    let mut group = c.benchmark_group("unchanged");
    for mib in SIZES {
        let len = mib << 20;
        let guest = guest(len);
        let size = format!("{mib} MiB");
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("zero check", &size), |b| {
            b.iter(|| {
                let offsets = packets(len).flatten();
                offsets
                    .filter(|offset| zero_check(&page(&guest, *offset)))
                    .count()
            });
        });
        let mut buffer = vec![1; PACKET * PAGE];
        group.bench_function(BenchmarkId::new("memcpy", &size), |b| {
            b.iter(|| {
                for packet in packets(len) {
                    for (copy, offset) in buffer.chunks_exact_mut(PAGE).zip(packet) {
                        page(&guest, offset).copy_to(copy);
                    }
                    black_box(&buffer);
                }
            });
        });
        let table = Unchanged::new(guest.blocks(), WhenToCompare::Always).expect("a table");
        let mut changed = ChangedPages::new();
        let mut left = || -> usize {
            packets(len)
                .map(|packet| {
                    changed
                        .copy(&guest, &table, RAM, packet, true)
                        .expect("pages of the memory");
                    changed.normal().len()
                })
                .sum()
        };
        // The first time none is known.
        assert_eq!(left() as u64 * PAGE_SIZE, len as u64);
        group.bench_function(BenchmarkId::new("copy and compare, known", &size), |b| {
            b.iter(|| assert_eq!(left(), 0));
        });
    }
    let content = [0x5a; PAGE];
    let guest = guest(PAGE);
    let table = Unchanged::new(guest.blocks(), WhenToCompare::Always).expect("a table");
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
