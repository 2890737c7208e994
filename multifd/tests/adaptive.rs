//! A level of zstd that adapts, over a line whose bandwidth changes.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{LIMIT, PAGE, Pages, memory, receiver, text};
use migration_stream::io::FdChannel;
use migration_stream::ram::BlockId;
use migration_stream::raw::transport::{PageBarrier, SendPages};
use migration_stream::{GuestRamMmap, StreamWriter};
use multifd::{ChannelCount, Compression, MultifdConfig, SendChannel, SendSet, ZstdRange};

/// 8 MiB.
const PAGES: u64 = 2048;
/// Far longer than levels take here, with a libzstd that was not optimised, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn config(range: ZstdRange) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(2).unwrap())
        .compression(Compression::ZstdAdaptive(range))
        .stall_limit(LIMIT)
}

/// Passes bytes on, no more than so many a second.
fn line(mut from: UnixStream, mut to: UnixStream, bandwidth: &AtomicU64) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let begun = Instant::now();
        if to.write_all(&buffer[..n]).is_err() {
            return;
        }
        let nanos = n as u64 * 1_000_000_000 / bandwidth.load(Ordering::Relaxed);
        thread::sleep(Duration::from_nanos(nanos).saturating_sub(begun.elapsed()));
    }
}

/// Writes pages of words, as text has them, which any level of zstd makes smaller.
fn write_text(ram: &GuestRamMmap) {
    let mut x = 1_u64;
    for page in 0..PAGES {
        let words = (0..PAGE / 8).flat_map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x % 512).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
        });
        ram.put(0, page, &words.collect::<Vec<_>>());
    }
}

#[test]
fn level_follows_the_bandwidth_and_every_page_arrives() {
    let config = config(ZstdRange::new(-2, 9).unwrap());
    let mut receiver = receiver(&config, &[PAGES]);
    let bandwidth = Arc::new(AtomicU64::new(400_000));
    let channels = std::mem::take(&mut receiver.peers).into_iter().map(|peer| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bandwidth = Arc::clone(&bandwidth);
        thread::spawn(move || line(theirs, peer, &bandwidth));
        SendChannel::from(FdChannel::new(ours, LIMIT).unwrap())
    });
    let ram = Arc::new(memory(&[PAGES]));
    write_text(&ram);
    let mut send = SendSet::start(ram.clone(), channels.collect(), &config).unwrap();
    let level = send.level().unwrap();
    assert_eq!(level.level(), 1);

    let (main, mut peer) = UnixStream::pair().unwrap();
    let mut main = StreamWriter::new(FdChannel::new(main, LIMIT).unwrap());
    let begun = Instant::now();
    let mut round = |is_there: &dyn Fn() -> bool, what: &str| {
        while !is_there() {
            assert!(begun.elapsed() < PATIENCE, "no {what}: {}", level.level());
            send.send(&mut main, BlockId::new(0), 0, PAGES).unwrap();
            send.sync(&mut main).unwrap();
            let mut record = [0; 8];
            peer.read_exact(&mut record).unwrap();
            receiver.set.barrier().flush().unwrap();
            assert_eq!(ram.differing_pages(receiver.set.store()), []);
        }
    };
    round(&|| level.level() >= 4, "higher level over a thin line");
    bandwidth.store(100_000_000_000, Ordering::Relaxed);
    round(&|| level.level() <= 1, "lower level over a wide line");
    assert!(level.changes() >= 6, "{}", level.changes());

    send.join().unwrap();
    receiver
        .set
        .join()
        .unwrap()
        .outcome
        .unwrap_or_else(|e| panic!("{}", text(&e)));
}

#[test]
fn a_level_that_does_not_adapt_is_not_told() {
    let config = (config(ZstdRange::default()))
        .compression(Compression::Zstd(multifd::ZstdLevel::default()));
    let channels = [0; 2].map(|_| {
        let (ours, _) = UnixStream::pair().unwrap();
        SendChannel::from(FdChannel::new(ours, LIMIT).unwrap())
    });
    let set = SendSet::start(Arc::new(memory(&[1])), channels.into(), &config).unwrap();
    assert!(set.level().is_none());
}
