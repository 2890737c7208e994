//! XBZRLE: a page's difference found and applied, beside copying the page.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::raw::xbzrle::{Encoded, PageBytes, Runs, encode};

const PAGE: usize = 4096;

/// Two versions of a page that differ in one byte of each `step`.
fn pages(step: usize) -> (PageBytes, PageBytes) {
    let mut old = [0; PAGE];
    for (byte, value) in old.iter_mut().zip((0..=u8::MAX).cycle()) {
        *byte = value;
    }
    let mut new = old;
    for byte in new.iter_mut().step_by(step) {
        *byte ^= 0x80;
    }
    (old, new)
}

fn xbzrle(c: &mut Criterion) {
    let mut group = c.benchmark_group("xbzrle");
    group.throughput(Throughput::Bytes(PAGE as u64));
    let (old, _) = pages(PAGE);
    let mut copy = [0; PAGE];
    group.bench_function("copy", |b| {
        b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&old)));
    });
    let mut out = Vec::with_capacity(2 * PAGE);
    group.bench_function("encode/unchanged", |b| {
        b.iter(|| encode(black_box(&old), black_box(&old), &mut out));
    });
    for (name, step) in [("1_byte", PAGE), ("64_bytes", 64), ("512_bytes", 8)] {
        let (old, new) = pages(step);
        group.bench_function(format!("encode/{name}"), |b| {
            b.iter(|| {
                out.clear();
                encode(black_box(&old), black_box(&new), &mut out)
            });
        });
        assert!(matches!(
            encode(&old, &new, &mut Vec::new()),
            Encoded::Bytes(_)
        ));
        group.bench_function(format!("apply/{name}"), |b| {
            b.iter(|| {
                let runs = Runs::new(black_box(&out));
                runs.check().expect("what was encoded");
                for run in runs.flatten() {
                    copy[run.offset..][..run.bytes.len()].copy_from_slice(run.bytes);
                }
                black_box(&mut copy);
            });
        });
    }
    let (old, new) = pages(1);
    group.bench_function("encode/overflow", |b| {
        b.iter(|| encode(black_box(&old), black_box(&new), &mut out));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = xbzrle
}
criterion_main!(benches);
