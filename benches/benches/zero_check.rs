//! Looking for zero pages: in guest memory that is all zero and so has to be read to its end, beside a
//! plain read of the same memory, and in memory of which every page shows at once that it is not.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::raw::ram::{fetch_for_zero_check, zero_check};
use vm_memory::VolatileSlice;

const PAGE: usize = 4096;
const PACKET: usize = 128 * PAGE;

/// In the second-level cache, at the edge of a shared one, and far beyond any, MiB.
const SIZES: [usize; 4] = [1, 64, 256, 1024];

/// Adds up every word: the least that a loop which looks at all of memory can do.
fn plain_read(memory: &[u8]) -> u64 {
    memory
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")))
        .fold(0, u64::wrapping_add)
}

fn zero_pages(memory: &VolatileSlice<'_>) -> usize {
    (0..memory.len() / PAGE)
        .filter(|i| {
            zero_check(
                &memory
                    .subslice(i * PAGE, PAGE)
                    .expect("a page of the memory"),
            )
        })
        .count()
}

/// As a channel of multifd does: those of a packet are fetched before.
fn zero_pages_by_packets(memory: &VolatileSlice<'_>) -> usize {
    (0..memory.len())
        .step_by(PACKET)
        .map(|start| {
            let packet = memory.subslice(start, PACKET.min(memory.len() - start));
            let packet = packet.expect("a packet of the memory");
            fetch_for_zero_check(&packet);
            zero_pages(&packet)
        })
        .sum()
}

fn zero_checks(c: &mut Criterion) {
    let mut group = c.benchmark_group("zero_check");
    for mib in SIZES {
        // Written before it is zeroed, and seen to be, so that no page of it is the kernel's zero
        // page, which would be read from the cache.
        let mut bytes = black_box(vec![1; (mib << 20) + PAGE]);
        bytes.fill(0);
        // From a page's boundary on, as guest memory is.
        let start = bytes.as_ptr().align_offset(PAGE);
        let bytes = &mut bytes[start..start + (mib << 20)];
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("plain read", format!("{mib} MiB")), |b| {
            b.iter(|| black_box(plain_read(black_box(&*bytes))));
        });
        let memory = VolatileSlice::from(bytes);
        group.bench_function(BenchmarkId::new("zero check", format!("{mib} MiB")), |b| {
            b.iter(|| black_box(zero_pages(&memory)));
        });
        group.bench_function(
            BenchmarkId::new("zero check, fetched before", format!("{mib} MiB")),
            |b| {
                b.iter(|| black_box(zero_pages_by_packets(&memory)));
            },
        );
        for page in 0..memory.len() / PAGE {
            let first = memory
                .subslice(page * PAGE, 1)
                .expect("a page of the memory");
            first.copy_from(&[1u8]);
        }
        group.bench_function(
            BenchmarkId::new("pages that are not", format!("{mib} MiB")),
            |b| {
                b.iter(|| black_box(zero_pages(&memory)));
            },
        );
        group.bench_function(
            BenchmarkId::new("pages that are not, fetched before", format!("{mib} MiB")),
            |b| {
                b.iter(|| black_box(zero_pages_by_packets(&memory)));
            },
        );
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = zero_checks
}
criterion_main!(benches);
