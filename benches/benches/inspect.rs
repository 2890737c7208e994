//! A stream in a file, read to its end by `stream-inspect`, and one `memcpy` of as many bytes: the
//! project wants no less than half of its speed.

use std::fs::File;
use std::hint::black_box;
use std::io::{BufWriter, Write as _};
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::raw::header;
use migration_stream::raw::ram::{
    PageAddress, RAM_IDSTR, RAM_VERSION, RecordEncoder, encode_end_of_section, encode_setup_list,
};
use migration_stream::raw::section::{Announcement, encode_eof, encode_footer};
use migration_stream::{Configuration, IdStr, InstanceId, MachineName, SectionHeader, SectionId};
use stream_inspect::scan::{FileOrigin, scan};

const PAGES: u64 = (1 << 30) >> 12;
const PAGE: usize = 4096;

/// A stream whose RAM has nothing but pages with content.
fn stream() -> File {
    let block = RamBlock::new("pc.ram", PAGES << 12).expect("a block");
    let blocks = RamBlockTable::new(vec![block]).expect("a table");
    let machine = MachineName::new("pc-q35-11.1").expect("a machine");
    let section = SectionHeader {
        kind: Announcement::Start,
        id: SectionId(2),
        idstr: IdStr::new(RAM_IDSTR).expect("an idstr"),
        instance: InstanceId(0),
        version: RAM_VERSION,
    };
    let file = tempfile::tempfile().expect("a file");
    let mut out = BufWriter::new(&file);
    let mut bytes = Vec::new();
    header::encode(&mut bytes);
    Configuration::new(machine).encode(&mut bytes);
    section.encode(&mut bytes);
    encode_setup_list(&blocks, &mut bytes);
    let mut records = RecordEncoder::new();
    for page in 0..PAGES {
        let page = PageAddress {
            block: BlockId::new(0),
            offset: page << 12,
        };
        records.page(page, &blocks, &mut bytes).expect("a page");
        bytes.resize(bytes.len() + PAGE, 0xa5);
        out.write_all(&bytes).expect("room for the stream");
        bytes.clear();
    }
    encode_end_of_section(&mut bytes);
    encode_footer(section.id, &mut bytes);
    encode_eof(&mut bytes);
    out.write_all(&bytes).expect("room for the stream");
    out.flush().expect("room for the stream");
    drop(out);
    file
}

fn inspect(c: &mut Criterion) {
    let file = Arc::new(stream());
    let mut group = c.benchmark_group("inspect");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(PAGES << 12));
    group.bench_function("stream in a file", |b| {
        b.iter(|| {
            let (mut origin, reader) = FileOrigin::open(Arc::clone(&file) as _, 0);
            let found = scan(reader, &mut origin, 64 << 20, None, &mut |_| ()).expect("a stream");
            assert_eq!(found.blocks[0].unique, PAGES);
        });
    });
    let from = vec![0xa5_u8; PAGE << 18];
    let mut to = vec![0_u8; from.len()];
    group.bench_function("memcpy", |b| {
        b.iter(|| black_box(&mut to).copy_from_slice(black_box(&from)));
    });
    group.finish();
}

criterion_group!(benches, inspect);
criterion_main!(benches);
