//! Headers of multifd packets: what 128 pages cost to announce and to check.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::PAGE_SIZE;
use multifd::packet::{
    HEADER_LEN, Method, PAGES_PER_PACKET, PacketFlags, PacketHeader, PacketView,
};

const BLOCK_BYTES: u64 = 1 << 30;

fn packets(c: &mut Criterion) {
    // A quarter of the pages is zero; their order in a packet is arbitrary.
    let mut offsets = [0; PAGES_PER_PACKET];
    for (offset, index) in offsets.iter_mut().zip(0..) {
        *offset = index * PAGE_SIZE;
    }
    let (normal, zero) = offsets.split_at(PAGES_PER_PACKET / 4 * 3);
    let header = PacketHeader {
        flags: PacketFlags {
            sync: false,
            method: Method::None,
        },
        number: 7,
        block: b"pc.ram",
        normal,
        zero,
        payload_len: 4096 * 96,
    };
    let mut bytes = [0; HEADER_LEN];
    let mut group = c.benchmark_group("packets");
    group.throughput(Throughput::Elements(PAGES_PER_PACKET as u64));
    group.bench_function("fill", |b| {
        b.iter(|| black_box(&header).fill(&mut bytes).expect("a valid header"));
    });
    header.fill(&mut bytes).expect("a valid header");
    group.bench_function("unfill", |b| {
        let mut read = [0; PAGES_PER_PACKET];
        b.iter(|| {
            let view = PacketView::unfill(black_box(&bytes), Method::None).expect("valid bytes");
            let pages = view.offsets(BLOCK_BYTES, &mut read).expect("valid offsets");
            black_box((view.block().expect("a name"), pages));
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = benches::criterion();
    targets = packets
}
criterion_main!(benches);
