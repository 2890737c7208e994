//! The flush of a checkpoint into a 256 MiB guest, beside a copy of as many bytes in one piece.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ram_cache::{CacheBlockSpec, DiscardControl, FlushPool, GuestStopped, MirrorCache, PAGE_SIZE};
use vm_memory::{MmapRegion, VolatileMemory};

const GUEST_BYTES: usize = 256 << 20;

/// Dirty pages of a checkpoint, and how far apart they lie, in pages.
const CHECKPOINTS: [(u64, u64); 5] = [(256, 1), (2560, 1), (25_600, 1), (2560, 16), (25_600, 2)];

struct Secondary {
    guest: Arc<MmapRegion>,
    cache: MirrorCache,
}

impl Secondary {
    fn new() -> Self {
        let guest = Arc::new(benches::memory(GUEST_BYTES, |_, page| page.fill(1)));
        let block = CacheBlockSpec::whole_region("pc.ram", Arc::clone(&guest));
        let discard = DiscardControl::new()
            .disable()
            .expect("no discard required");
        let cache = MirrorCache::new(vec![block], discard).expect("memory for the cache");
        // Written once, so that no page fault is measured.
        let all = cache.cache_slice(0, 0, GUEST_BYTES).expect("the block");
        guest.as_volatile_slice().copy_to_volatile_slice(all);
        Self { guest, cache }
    }

    fn checkpoint(&self, pages: u64, stride: u64, pool: &FlushPool) -> Duration {
        for index in 0..pages {
            let offset = index * stride * PAGE_SIZE;
            self.cache
                .mark(0, offset, 4096)
                .expect("a page of the block");
        }
        let begin = Instant::now();
        let report = self
            .cache
            .flush(GuestStopped::witnessed_by(&self.guest), pool)
            .expect("the flush");
        let spent = begin.elapsed();
        assert_eq!(report.pages, pages);
        spent
    }

    fn copy(&self, len: usize) -> Duration {
        let from = self.cache.cache_slice(0, 0, len).expect("the block");
        let to = self.guest.as_volatile_slice();
        let begin = Instant::now();
        from.copy_to_volatile_slice(to);
        begin.elapsed()
    }
}

fn flush(c: &mut Criterion) {
    let secondary = Secondary::new();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut group = c.benchmark_group("flush");
    for (pages, stride) in CHECKPOINTS {
        let parameter = format!("{pages} pages, stride {stride}");
        group.throughput(Throughput::Bytes(pages * PAGE_SIZE));
        for threads in [1, cores] {
            let pool = FlushPool::new(threads).expect("threads");
            let id = BenchmarkId::new(format!("{threads} threads"), &parameter);
            group.bench_function(id, |b| {
                b.iter_custom(|n| {
                    (0..n)
                        .map(|_| secondary.checkpoint(pages, stride, &pool))
                        .sum()
                });
            });
        }
        if stride == 1 {
            let len = usize::try_from(pages * PAGE_SIZE).expect("fits in memory");
            group.bench_function(BenchmarkId::new("memcpy", &parameter), |b| {
                b.iter_custom(|n| (0..n).map(|_| secondary.copy(len)).sum());
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = flush
}
criterion_main!(benches);
