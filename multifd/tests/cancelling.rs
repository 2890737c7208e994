//! A cancel ends what waits for the channels, whatever the peer does.

#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use common::LIMIT;
use migration_stream::io::{CancelToken, FdChannel};
use migration_stream::raw::transport::PageBarrier;
use multifd::{ChannelCount, ChannelError, MultifdConfig, RecvSet};

/// Long enough that what is to be cancelled waits by then.
const SOON: Duration = Duration::from_millis(50);

fn config(channels: u8) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap())
}

/// Runs `wait` with a token that is cancelled while it waits, and checks that it ends then.
fn cancelled<T>(wait: impl FnOnce(&CancelToken) -> T) -> T {
    let token = CancelToken::new().unwrap();
    let other = token.clone();
    let canceller = thread::spawn(move || {
        thread::sleep(SOON);
        other.cancel();
    });
    let begun = Instant::now();
    let result = wait(&token);
    assert!(token.is_cancelled(), "it did not wait");
    assert!(begun.elapsed() < LIMIT / 2);
    canceller.join().unwrap();
    result
}

#[test]
fn a_flush_that_waits_for_a_channel_is_cancelled() {
    let (_peer, channel) = UnixStream::pair().unwrap();
    // Nothing but the barrier hears of it.
    let channel = FdChannel::new(channel, LIMIT).unwrap();
    let ram = common::memory(&[1]);
    let set = RecvSet::start(ram, vec![channel.into()], &config(1), |_| {}).unwrap();
    let mut barrier = set.barrier();
    let error = cancelled(|token| {
        barrier.set_cancel(token);
        barrier.flush().unwrap_err()
    });
    let cause = error.source.downcast_ref();
    assert!(matches!(cause, Some(ChannelError::Closed)), "{error:?}");
    let joined = set.join().unwrap();
    assert!(joined.outcome.is_err());
}
