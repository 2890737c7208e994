//! Looking for zero pages, in guest memory that is all zero and so has to be read to its end,
//! beside a plain read of the same memory.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::ram::zero_check;
use vm_memory::VolatileSlice;

const PAGE: usize = 4096;

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
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = zero_checks
}
criterion_main!(benches);
