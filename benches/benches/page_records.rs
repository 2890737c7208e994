//! Page records of the main stream: what the codec costs per page, the page's bytes apart.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::PAGE_SIZE;
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::ram::{PageAddress, Record, RecordDecoder, RecordEncoder};

const PAGES: u64 = 4096;

fn blocks() -> RamBlockTable {
    let block = RamBlock::new("pc.ram", PAGES * PAGE_SIZE).expect("a valid block");
    RamBlockTable::new(vec![block]).expect("a valid table")
}

fn page(index: u64) -> PageAddress {
    PageAddress {
        block: BlockId::new(0),
        offset: index * PAGE_SIZE,
    }
}

fn encode(blocks: &RamBlockTable, is_zero: bool, out: &mut Vec<u8>) {
    let mut encoder = RecordEncoder::new();
    for index in 0..PAGES {
        let record = if is_zero {
            encoder.zero(page(index), blocks, out)
        } else {
            encoder.page(page(index), blocks, out)
        };
        record.expect("a page of the block");
    }
}

fn page_records(c: &mut Criterion) {
    let blocks = blocks();
    let mut group = c.benchmark_group("page_records");
    group.throughput(Throughput::Elements(PAGES));
    for (kind, is_zero) in [("page", false), ("zero", true)] {
        let mut bytes = Vec::with_capacity(16 * 4096);
        group.bench_function(format!("encode/{kind}"), |b| {
            b.iter(|| {
                bytes.clear();
                encode(&blocks, is_zero, &mut bytes);
                black_box(&bytes);
            });
        });
        bytes.clear();
        encode(&blocks, is_zero, &mut bytes);
        group.bench_function(format!("decode/{kind}"), |b| {
            b.iter(|| {
                let mut reader = Reader::new(&bytes, 0);
                let mut decoder = RecordDecoder::new();
                let mut offsets = 0u64;
                while !reader.rest().is_empty() {
                    match decoder.decode(&mut reader, &blocks).expect("valid bytes") {
                        Record::Page(page) | Record::Zero(page) | Record::Xbzrle { page, .. } => {
                            offsets ^= page.offset
                        }
                        other => panic!("a page record, not {other:?}"),
                    }
                }
                black_box(offsets)
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = page_records
}
criterion_main!(benches);
