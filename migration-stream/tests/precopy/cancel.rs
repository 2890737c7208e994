//! A target that is cancelled: at any byte of the stream, whatever the source does.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use migration_stream::io::{CancelToken, FdChannel};
use migration_stream::precopy::{SourceError, Target, TargetConfig, TargetError};
use migration_stream::ram::NoMultifd;
use migration_stream::raw::transport::PageBarrier;
use migration_stream::{ConfigurationRule, GuestRamMmap, StreamReader, StreamWriter};

use crate::common::guest::{configuration, memory};
use crate::common::loads::{Only, load as load_by};
use crate::rig::{BLOCKS, Devices, send, source};

/// How long each side waits for the other: far longer than a cancel takes.
const LONG: Duration = Duration::from_secs(20);

fn channels() -> (FdChannel, FdChannel) {
    let (a, b) = UnixStream::pair().unwrap();
    let long = |socket| FdChannel::new(socket, LONG).unwrap();
    (long(a), long(b))
}

fn config() -> TargetConfig {
    TargetConfig::new(ConfigurationRule::Matching(configuration("test"))).max_devices(1 << 20)
}

fn reader(channel: &FdChannel, token: &CancelToken) -> StreamReader {
    let mut reader = StreamReader::new(channel.share(), b"");
    reader.set_cancel(token);
    reader
}

fn load(channel: &FdChannel, ram: &GuestRamMmap, token: &CancelToken) -> Result<(), TargetError> {
    let answers = Some(Box::new(channel.share()) as _);
    let target = Target::new(config(), reader(channel, token), answers, ram);
    load_by(target, ram, &mut Devices::default()).map(drop)
}

/// Cancels `wait` after a moment, and checks that it was that which has ended it.
fn cancelled<T>(wait: impl FnOnce(&CancelToken) -> Result<T, TargetError>) {
    let token = CancelToken::new().unwrap();
    let other = token.clone();
    let canceller = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        other.cancel();
    });
    let begun = Instant::now();
    let error = wait(&token).err().unwrap();
    assert!(matches!(error, TargetError::Cancelled), "{error}");
    assert!(token.is_cancelled(), "it did not wait");
    assert!(begun.elapsed() < LONG / 2);
    canceller.join().unwrap();
}

/// What a source writes up to its first page.
fn beginning() -> Vec<u8> {
    let mut bytes = Vec::new();
    migration_stream::raw::header::encode(&mut bytes);
    configuration("test").encode(&mut bytes);
    bytes
}

#[test]
fn loading_from_a_source_that_says_nothing_more_is_cancelled() {
    let beginning = beginning();
    for len in [0, 5, beginning.len()] {
        let (a, b) = channels();
        let mut out = StreamWriter::new(a);
        out.write_bytes(&beginning[..len]).unwrap();
        let ram = memory(BLOCKS);
        cancelled(|token| load(&b, &ram, token));
        cancelled(|token| Target::from_announcement(config(), reader(&b, token), None));
    }
}

#[test]
fn a_source_that_never_lets_the_target_wait_does_not_keep_it_from_ending() {
    let mut stream = beginning();
    // Commands that say nothing, without end.
    let mut commands = bytes::BytesMut::new();
    migration_stream::raw::command::Command::OpenReturnPath.encode(&mut commands);
    stream.extend_from_slice(&commands);
    let repeated = commands.repeat(10_000);
    let (a, b) = channels();
    let flood = thread::spawn(move || {
        let mut out = StreamWriter::new(a);
        out.write_bytes(&stream).unwrap();
        while out.write_bytes(&repeated).is_ok() {}
    });
    let ram = memory(BLOCKS);
    cancelled(|token| load(&b, &ram, token));
    drop(b);
    flood.join().unwrap();
}

#[test]
fn a_guest_that_was_cancelled_when_it_was_loaded_is_not_confirmed() {
    for into_checkpoints in [false, true] {
        let (_, mut guest) = source();
        let landed = memory(BLOCKS);
        let (a, b) = channels();
        let token = CancelToken::new().unwrap();
        let error = thread::scope(|scope| {
            let sender = scope.spawn(|| send(&mut guest, &a));
            let answers = Some(Box::new(b.share()) as _);
            let target = Target::new(config(), reader(&b, &token), answers, &*landed);
            let mut devices = Devices::default();
            let mut devices = Only(&mut devices);
            let arrived = target.load((&*landed, NoMultifd), &mut devices).unwrap();
            let error = if into_checkpoints {
                let settled = arrived.settle_for_checkpoints(&mut devices).unwrap();
                token.cancel();
                settled.confirm().err()
            } else {
                let settled = arrived.settle(&mut devices).unwrap();
                token.cancel();
                settled.confirm().err()
            };
            b.shutdown();
            let sent = sender.join().unwrap().err().unwrap();
            assert!(
                matches!(sent, SourceError::OutcomeUnknown { .. }),
                "{sent:?}"
            );
            error
        });
        assert!(matches!(error, Some(TargetError::Cancelled)), "{error:?}");
    }
}

/// Notes the token that it is given.
#[derive(Default)]
struct Channels(Arc<OnceLock<CancelToken>>);

impl PageBarrier for Channels {
    fn flush(&mut self) -> Result<(), migration_stream::TransportError> {
        Ok(())
    }
    fn has_channels(&self) -> bool {
        true
    }
    fn hold(
        &mut self,
    ) -> Result<migration_stream::raw::transport::HeldChannels, migration_stream::TransportError>
    {
        Ok(migration_stream::raw::transport::HeldChannels::none())
    }
    fn set_deadline(&mut self, _: Option<Instant>) {}
    fn set_cancel(&mut self, token: &CancelToken) {
        let _ = self.0.set(token.clone());
    }
}

#[test]
fn the_channels_hear_of_the_same_token() {
    let (_a, b) = channels();
    let ram = memory(BLOCKS);
    let token = CancelToken::new().unwrap();
    token.cancel();
    let channels = Channels::default();
    let heard = Arc::clone(&channels.0);
    let target = Target::new(config(), reader(&b, &token), None, &*ram);
    let error = target
        .load((&*ram, channels), &mut ())
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, TargetError::Cancelled), "{error}");
    assert!(heard.get().is_some_and(CancelToken::is_cancelled));
}
