//! Pages that are written again are sent as differences (XBZRLE).

use std::sync::Arc;
use std::time::Duration;

use migration_stream::PAGE_SIZE;
use migration_stream::ram::{InStream, NoMultifd, ZeroPageDetection};
use migration_stream::xbzrle::PageCache;

use crate::common::guest::{Pages, memory};
use crate::rig::{BLOCKS, Devices, channels, send_by, source, target_with};

#[test]
fn pages_written_again_arrive_as_differences_and_no_checkpoints_follow_them() {
    let (ram, mut guest) = source();
    guest.writes_left = 60;
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let transport = InStream::new(Arc::clone(&ram) as _, ZeroPageDetection::Multifd)
        .with_xbzrle(PageCache::new(PageCache::DEFAULT_SIZE).unwrap());
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            // Not before the guest has stopped writing.
            guest.downtime = Duration::ZERO;
            send_by(&mut guest, &a, transport).unwrap()
        });
        let mut devices = Devices::default();
        let target = target_with(&b, &landed, true);
        let mut loaded = target.load(&*landed, &mut NoMultifd, &mut devices).unwrap();
        loaded.confirm().unwrap();
        let sent = sender.join().unwrap().progress.counters.xbzrle;
        assert!(sent.pages > 0 && sent.cache_miss > 0, "{sent:?}");
        assert_eq!(sent.cache_size, PageCache::DEFAULT_SIZE);
        assert!(sent.bytes < sent.pages * 100 && sent.encoding_rate() > 40.0);
        assert_eq!(loaded.received().xbzrle_pages, sent.pages);
        let error = loaded.into_checkpoints().unwrap_err();
        assert!(error.to_string().contains("xbzrle"), "{error}");
    });
    ram.assert_equals(&landed);
}

#[test]
fn a_cache_smaller_than_what_the_guest_writes_costs_differences_and_never_memory() {
    for pages in [1, 2, 16] {
        let (ram, mut guest) = source();
        guest.writes_left = 150;
        guest.downtime = Duration::ZERO;
        let landed = memory(BLOCKS);
        let (a, b) = channels();
        let transport = InStream::new(Arc::clone(&ram) as _, ZeroPageDetection::default())
            .with_xbzrle(PageCache::new(pages * PAGE_SIZE).unwrap());
        let mut devices = Devices::default();
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send_by(&mut guest, &a, transport).unwrap());
            let target = target_with(&b, &landed, true);
            let mut loaded = target.load(&*landed, &mut NoMultifd, &mut devices).unwrap();
            loaded.confirm().unwrap();
            sender.join().unwrap().progress.counters.xbzrle
        });
        assert!(
            sent.cache_miss > 0 && sent.cache_miss_rate() > 0.0,
            "{sent:?}"
        );
        ram.assert_equals(&landed);
    }
}
