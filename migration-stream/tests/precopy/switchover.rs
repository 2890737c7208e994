//! The switch-over waits: for a VMM that has asked for a pause, for devices at the target.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::io::ByteSource;
use migration_stream::precopy::{Control, SourceError, SourceEvent, SourceStatus, SwitchoverAcks};
use migration_stream::ram::{InStream, ZeroPageDetection};

use crate::rig::{LIMIT, begin, between, channels, source};

#[test]
fn a_pause_before_the_switchover_lasts_until_the_vmm_ends_it() {
    use SourceEvent::Status;
    let (_, mut guest) = source();
    guest.paused = vec![Control::SwitchOver, Control::Continue, Control::Continue];
    let (sent, received) = between(&mut guest, |s| Ok(s.pausing_before_switchover()), |t| t);
    assert_eq!(sent.unwrap().progress.status, SourceStatus::Device);
    received.unwrap();
    assert!(guest.paused.is_empty() && !guest.running);
    let statuses: Vec<_> = guest
        .events
        .iter()
        .filter(|e| matches!(e, Status(_)))
        .copied()
        .collect();
    assert_eq!(
        statuses,
        [
            SourceStatus::Active,
            SourceStatus::PreSwitchover,
            SourceStatus::Device
        ]
        .map(Status)
    );
    let passes = guest.events.iter().filter_map(|e| match e {
        SourceEvent::Pass(pass) => Some(*pass),
        _ => None,
    });
    assert!(passes.eq(2..=guest.passes.max(2)));
}

#[test]
fn a_migration_cancelled_in_the_pause_leaves_the_guest_running() {
    let (_, mut guest) = source();
    guest.paused = vec![Control::Cancel, Control::Continue];
    let (sent, received) = between(&mut guest, |s| Ok(s.pausing_before_switchover()), |t| t);
    assert!(matches!(sent, Err(SourceError::Cancelled)));
    received.unwrap_err();
    assert!(guest.running);
    let device = SourceEvent::Status(SourceStatus::Device);
    assert!(!guest.events.contains(&device), "nothing was switched over");
}

#[test]
fn a_destination_lost_in_the_pause_ends_it() {
    let (_, mut guest) = source();
    guest.paused = vec![Control::Continue; 10_000];
    let (a, b) = channels();
    let drain = std::thread::spawn(move || {
        let mut b = b;
        let begun = Instant::now();
        // A source that pauses goes on saying that it is there.
        let mut buf = [0; 4096];
        while begun.elapsed() < LIMIT && b.read(&mut buf).is_ok_and(|n| n > 0) {}
        b.shutdown();
    });
    let transport = InStream::new(Arc::clone(&guest.ram) as _, ZeroPageDetection::default());
    let error = begin(&mut guest, &a, transport)
        .unwrap()
        .pausing_before_switchover()
        .run(&mut guest)
        .completed()
        .unwrap_err();
    assert!(
        matches!(
            error,
            SourceError::Unconfirmed | SourceError::Stream(_) | SourceError::ReturnPath(_)
        ),
        "{error}"
    );
    assert!(guest.running);
    drain.join().unwrap();
}

#[test]
fn the_guest_stops_only_when_every_device_has_acknowledged() {
    let legacy = || SwitchoverAcks::one_for_all(2);
    let each = || SwitchoverAcks::each(2);
    for (acks, expected) in [
        (legacy(), 1),
        (each(), 2),
        (SwitchoverAcks::one_for_all(0), 1),
        (SwitchoverAcks::each(0), 0),
    ] {
        let (_, mut guest) = source();
        let acks = Arc::new(acks);
        let devices = Arc::clone(&acks);
        let ready = std::thread::spawn(move || {
            let mut count = 0;
            // Later than all memory is sent.
            std::thread::sleep(Duration::from_millis(150));
            while devices.device_is_ready() {
                count += 1;
            }
            count
        });
        let (sent, received) = between(
            &mut guest,
            |s| s.awaiting_switchover_acks(expected),
            |t| t.acknowledging(acks),
        );
        received.unwrap();
        let elapsed = sent.unwrap().progress.elapsed;
        let devices = ready.join().unwrap();
        assert!(devices == 0 || elapsed >= Duration::from_millis(150));
    }
}

#[test]
fn acknowledgements_too_few_or_too_many_fail_the_migration_and_the_guest_goes_on() {
    for (sent, expected) in [(0, 1), (1, 2), (2, 1)] {
        let (_, mut guest) = source();
        let acks = SwitchoverAcks::each(sent);
        while acks.device_is_ready() {}
        let (sent, received) = between(
            &mut guest,
            |s| s.awaiting_switchover_acks(expected),
            |t| t.acknowledging(Arc::new(acks)),
        );
        let error = sent.unwrap_err();
        assert!(
            matches!(
                error,
                SourceError::SwitchoverAckMissing { missing: 1, .. }
                    | SourceError::SurplusSwitchoverAck { expected: 1 }
            ),
            "{error}"
        );
        received.unwrap_err();
        assert!(guest.running);
    }
}
