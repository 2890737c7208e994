//! The dirty bitmap of a 16 GiB guest, scanned and emptied as a flush does, with few and with many
//! pages in it; and those of smaller guests with few, which is what guest RAM that nobody has written
//! costs in a checkpoint.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ram_cache::{DirtyBitmap, PAGES_PER_WORD};

const PAGES: u64 = (16 << 30) >> 12;

/// The words a guest leaves: every `step`-th word is `word`.
struct Pattern {
    name: &'static str,
    step: usize,
    word: u64,
}

const PATTERNS: [Pattern; 4] = [
    Pattern {
        name: "clean",
        step: 1,
        word: 0,
    },
    Pattern {
        name: "one page in 4096",
        step: 64,
        word: 1 << 17,
    },
    Pattern {
        name: "every other page",
        step: 1,
        word: 0x5555_5555_5555_5555,
    },
    Pattern {
        name: "every page",
        step: 1,
        word: u64::MAX,
    },
];

fn mark(bitmap: &DirtyBitmap, pattern: &Pattern) {
    for first in (0..PAGES).step_by(pattern.step << PAGES_PER_WORD.trailing_zeros()) {
        bitmap
            .or_word(first, pattern.word)
            .expect("a word of the bitmap");
    }
}

fn dirty_bitmap(c: &mut Criterion) {
    let bitmap = DirtyBitmap::new(PAGES).expect("memory for the bitmap");
    let mut group = c.benchmark_group("dirty_bitmap");
    group.throughput(Throughput::Elements(PAGES));
    for pattern in &PATTERNS {
        group.bench_function(format!("drain/{}", pattern.name), |b| {
            b.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    mark(&bitmap, pattern);
                    let begin = Instant::now();
                    black_box(bitmap.drain_runs().map(|run| run.pages).sum::<u64>());
                    spent += begin.elapsed();
                }
                spent
            });
        });
    }
    for mib in [256u64, 1024, 4096, 8192] {
        let bitmap = DirtyBitmap::new(mib << (20 - 12)).expect("memory for the bitmap");
        group.throughput(Throughput::Elements(mib << (20 - 12)));
        group.bench_function(format!("drain/256 pages of {mib} MiB"), |b| {
            b.iter_custom(|iterations| {
                let mut spent = Duration::ZERO;
                for _ in 0..iterations {
                    for word in 0..256 / PAGES_PER_WORD {
                        bitmap
                            .or_word(512 + word * PAGES_PER_WORD, u64::MAX)
                            .expect("a word of the bitmap");
                    }
                    let begin = Instant::now();
                    black_box(bitmap.drain_runs().map(|run| run.pages).sum::<u64>());
                    spent += begin.elapsed();
                }
                spent
            });
        });
    }
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("count", |b| b.iter(|| black_box(bitmap.count())));
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = dirty_bitmap
}
criterion_main!(benches);
