//! Pages that are written again are sent as differences (XBZRLE).

use std::sync::Arc;
use std::time::Duration;

use migration_stream::precopy::{SourceError, Target, TargetError};
use migration_stream::ram::{InStream, NoMultifd, ZeroPageDetection};
use migration_stream::{GuestRamMmap, PAGE_SIZE};

use crate::common::guest::{Pages, memory};
use crate::common::loads::{Only, load};
use crate::rig::{BLOCKS, Devices, Sent, channels, send_by, source, target_with};

/// A guest that writes its pages again, sent as differences; `settle` ends the target's side.
fn differences<R>(
    settle: impl FnOnce(Target, &GuestRamMmap) -> Result<R, TargetError>,
) -> (Sent, Result<R, TargetError>) {
    let (ram, mut guest) = source();
    guest.writes_left = 60;
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let transport = InStream::new(Arc::clone(&ram) as _, ZeroPageDetection::Multifd)
        .with_xbzrle(InStream::DEFAULT_CACHE)
        .unwrap();
    let ends = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            // Not before the guest has stopped writing.
            guest.downtime = Duration::ZERO;
            send_by(&mut guest, &a, transport)
        });
        let received = settle(target_with(&b, &landed, true), &landed);
        (sender.join().unwrap(), received)
    });
    ram.assert_equals(&landed);
    ends
}

#[test]
fn pages_written_again_arrive_as_differences() {
    let (sent, received) = differences(|target, landed| {
        let settled = load(target, landed, &mut Devices::default())?;
        let received = settled.received();
        settled.confirm().map(|_| received)
    });
    let sent = sent.unwrap().progress.counters.xbzrle;
    assert!(sent.pages > 0 && sent.cache_miss > 0, "{sent:?}");
    assert_eq!(sent.cache_size, InStream::DEFAULT_CACHE);
    assert!(sent.bytes < sent.pages * 100 && sent.encoding_rate() > 40.0);
    assert_eq!(received.unwrap().xbzrle_pages, sent.pages);
}

#[test]
fn no_checkpoints_follow_differences_and_the_guest_stays_at_its_source() {
    let (sent, received) = differences(|target, landed| {
        let mut devices = Devices::default();
        let mut devices = Only(&mut devices);
        let arrived = target.load((landed, NoMultifd), &mut devices)?;
        arrived.settle_for_checkpoints(&mut devices).map(drop)
    });
    let error = received.unwrap_err();
    assert!(error.to_string().contains("xbzrle"), "{error}");
    let error = sent.unwrap_err();
    assert!(
        matches!(error, SourceError::Refused { status: 1 }),
        "{error}"
    );
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
            .with_xbzrle(pages * PAGE_SIZE)
            .unwrap();
        let mut devices = Devices::default();
        let sent = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send_by(&mut guest, &a, transport).unwrap());
            let target = target_with(&b, &landed, true);
            let settled = load(target, &*landed, &mut devices).unwrap();
            settled.confirm().unwrap();
            sender.join().unwrap().progress.counters.xbzrle
        });
        assert!(
            sent.cache_miss > 0 && sent.cache_miss_rate() > 0.0,
            "{sent:?}"
        );
        ram.assert_equals(&landed);
    }
}
