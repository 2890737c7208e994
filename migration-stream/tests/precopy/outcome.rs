//! Completed, failed or unknown: who runs the guest when the answer is late or lost.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

use migration_stream::io::{ByteSink, Chunk, FdChannel};
use migration_stream::precopy::{
    HandOver, Limits, RamSetup, Settled, Source, SourceConfig, SourceError, TargetError, Unresolved,
};
use migration_stream::ram::{InStream, ZeroPageDetection};
use migration_stream::{GuestRamMmap, StreamWriter};

use crate::common::guest::{Guest, Log, configuration, memory};
use crate::common::loads::load;
use crate::rig::{BLOCKS, Devices, LIMIT, begin, channels, source, swallow, target};

type Outcome = HandOver<InStream, Log>;

/// A migration whose target has loaded everything and does `after` about it.
fn hand_over(
    guest: &mut Guest,
    confirms_first: bool,
    after: impl FnOnce(Settled<Arc<GuestRamMmap>>, &FdChannel) + Send,
) -> (Outcome, FdChannel) {
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let outcome = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let ram = Arc::clone(&guest.ram) as _;
            let transport = InStream::new(ram, ZeroPageDetection::Multifd);
            begin(guest, &a, transport).unwrap().run(guest)
        });
        let mut target = target(&b, &landed);
        if confirms_first {
            target = target.confirming_before_it_runs();
        }
        let loaded = load(target, landed, &mut Devices::default());
        after(loaded.unwrap(), &b);
        sender.join().unwrap()
    });
    (outcome, b)
}

fn unknown(outcome: Outcome) -> Unresolved<InStream, Log> {
    match outcome {
        HandOver::Unknown(unresolved) => unresolved,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_whose_target_says_nothing_stays_paused_and_a_late_answer_counts() {
    for confirms in [true, false] {
        let (_, mut guest) = source();
        let begun = Instant::now();
        let mut held = None;
        let (outcome, _b) = hand_over(&mut guest, true, |loaded, _| held = Some(loaded));
        assert!(begun.elapsed() >= LIMIT);
        assert!(!guest.running, "it may run at the target");
        let unresolved = unknown(outcome);
        let cause = unresolved.cause();
        assert!(matches!(cause, SourceError::ReturnPath(_)), "{cause}");
        assert!(unresolved.can_be_answered());
        // Nothing yet, and the cause stays the first.
        let unresolved = unknown(unresolved.wait(Duration::from_millis(10)));
        assert!(matches!(unresolved.cause(), SourceError::ReturnPath(_)));
        let loaded = held.unwrap();
        if confirms {
            loaded.confirm().unwrap();
            let switched = unresolved.wait(LIMIT).completed().unwrap();
            assert!(switched.return_path.is_some());
        } else {
            loaded.refuse();
            let refused = unresolved.wait(LIMIT);
            assert!(
                matches!(
                    refused,
                    HandOver::Failed(SourceError::Refused { status: 1 })
                ),
                "{refused:?}"
            );
        }
        assert!(!guest.running, "the VMM resumes it, not the library");
    }
}

#[test]
fn a_target_that_closes_unconfirmed_leaves_the_guest_only_if_it_said_that_it_confirms_first() {
    for confirms_first in [true, false] {
        let (_, mut guest) = source();
        let (outcome, _b) = hand_over(&mut guest, confirms_first, |loaded, channel| {
            drop(loaded);
            channel.shutdown();
        });
        if confirms_first {
            assert!(matches!(
                outcome,
                HandOver::Failed(SourceError::Unconfirmed)
            ));
        } else {
            let unresolved = unknown(outcome);
            assert!(!unresolved.can_be_answered(), "it has closed");
            let error = unresolved.wait(LIMIT).completed().unwrap_err();
            assert!(
                matches!(error, SourceError::OutcomeUnknown { .. }),
                "{error}"
            );
        }
        assert_eq!(guest.running, confirms_first);
    }
}

#[test]
fn a_target_does_not_run_a_guest_whose_source_has_given_up() {
    let (_, mut guest) = source();
    let mut held = None;
    let (outcome, _b) = hand_over(&mut guest, true, |loaded, _| held = Some(loaded));
    // An operator has the guest run on at the source.
    drop(unknown(outcome));
    let error = held.unwrap().confirm().unwrap_err();
    assert!(matches!(error, TargetError::SourceGone { .. }), "{error}");
}

#[test]
fn a_peer_that_takes_everything_and_answers_nothing_leaves_the_guest_paused() {
    let (_, mut guest) = source();
    let (a, mut b) = channels();
    let drain = thread::spawn(move || swallow(&mut b));
    let ram = Arc::clone(&guest.ram) as _;
    let transport = InStream::new(ram, ZeroPageDetection::Multifd);
    let outcome = begin(&mut guest, &a, transport).unwrap().run(&mut guest);
    drop(unknown(outcome));
    assert!(!guest.running);
    a.shutdown();
    drain.join().unwrap();
}

#[test]
fn a_connection_that_breaks_before_the_last_byte_leaves_the_guest_at_the_source() {
    let (_, mut guest) = source();
    let (a, b) = channels();
    let ram = Arc::clone(&guest.ram) as _;
    let transport = InStream::new(ram, ZeroPageDetection::Multifd);
    let begun = begin(&mut guest, &a, transport).unwrap();
    drop(b);
    let outcome = begun.run(&mut guest);
    assert!(matches!(outcome, HandOver::Failed(_)), "{outcome:?}");
    assert!(guest.running);
}

#[test]
fn a_connection_that_this_side_cut_says_nothing_of_the_target() {
    let (_, mut guest) = source();
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    let outcome = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let ram = Arc::clone(&guest.ram) as _;
            let transport = InStream::new(ram, ZeroPageDetection::Multifd);
            begin(&mut guest, &a, transport).unwrap().run(&mut guest)
        });
        let target = target(&b, &landed).confirming_before_it_runs();
        let loaded = load(target, &*landed, &mut Devices::default());
        // An operator's yank while the answer is waited for; the target could have confirmed by now.
        a.shutdown();
        let outcome = sender.join().unwrap();
        drop(loaded);
        outcome
    });
    let unresolved = unknown(outcome);
    let cause = unresolved.cause();
    assert!(matches!(cause, SourceError::ReturnPath(_)), "{cause}");
    assert!(!guest.running);
}

/// A channel that takes everything but the end of the device state.
struct Withholding {
    channel: FdChannel,
    /// It says how much it has taken.
    counts: bool,
}

impl ByteSink for Withholding {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        // EOF, and the description behind it.
        if let [Chunk::Bytes([0, 6, ..])] = chunks {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.channel.write_all(chunks)
    }
    fn set_write_deadline(&mut self, deadline: Option<Instant>) {
        self.channel.set_write_deadline(deadline);
    }
    fn taken(&self) -> Option<u64> {
        self.channel.taken().filter(|_| self.counts)
    }
}

#[test]
fn a_last_byte_that_certainly_did_not_leave_keeps_the_guest_at_the_source() {
    for counts in [true, false] {
        let (_, mut guest) = source();
        let (a, mut b) = channels();
        let drain = thread::spawn(move || swallow(&mut b));
        let config = SourceConfig::new(configuration("test")).confirm_timeout(LIMIT);
        let channel = a.share();
        let ram = Arc::clone(&guest.ram) as _;
        let outcome = Source::start(
            config,
            Arc::new(Limits::new(0, guest.downtime)),
            StreamWriter::new(Withholding { channel, counts }),
            None,
            RamSetup {
                log: guest.log.clone(),
                transport: InStream::new(ram, ZeroPageDetection::Multifd),
            },
            &mut guest,
        )
        .unwrap()
        .run(&mut guest);
        match outcome {
            HandOver::Failed(SourceError::Stream(_)) => assert!(counts && guest.running),
            HandOver::Unknown(_) => assert!(!counts && !guest.running),
            other => panic!("{other:?}"),
        }
        a.shutdown();
        drain.join().unwrap();
    }
}
