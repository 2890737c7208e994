//! Targets that learn the guest from its stream: blocks that nobody has named, devices that nobody
//! knows.

use std::sync::Arc;

use bytes::BytesMut;
use migration_stream::io::{ByteSink, ByteSource, Chunk, FdChannel};
use migration_stream::precopy::{Loaded, SourceError, Target, TargetConfig, TargetError};
use migration_stream::ram::NoMultifd;
use migration_stream::raw::command::Command;
use migration_stream::raw::header;
use migration_stream::raw::section::encode_eof;
use migration_stream::{ConfigurationRule, GuestRamMmap, StreamReader, TailLimits};

use crate::common::guest::{Pages, configuration, memory};
use crate::rig::{BLOCKS, channels, send, source, target};

/// Takes what `channel` brings without knowing its blocks or its devices.
fn learn(channel: &FdChannel) -> Result<(Arc<GuestRamMmap>, Loaded), TargetError> {
    let config = TargetConfig::new(ConfigurationRule::Any).max_devices(1 << 20);
    let reader = StreamReader::new(channel.share(), b"");
    let (target, blocks) =
        Target::from_announcement(config, reader, Some(Box::new(channel.share())))?;
    assert!(target.has_return_path());
    assert_eq!(target.configuration(), Some(&configuration("test")));
    let blocks: Vec<_> = blocks.iter().map(|(_, b)| (b.name(), b.pages())).collect();
    let ram = memory(&blocks);
    let (loaded, tail) = target.load_opaque(&*ram, &mut NoMultifd, TailLimits::default())?;
    assert_eq!(tail.sections().len(), 1);
    Ok((ram, loaded))
}

#[test]
fn a_target_that_knows_no_blocks_learns_them_and_takes_everything() {
    let (ram, mut guest) = source();
    let (a, b) = channels();
    let (sent, landed) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        let (landed, mut loaded) = learn(&b).unwrap();
        loaded.confirm().unwrap();
        (sender.join().unwrap(), landed)
    });
    sent.unwrap();
    assert!(!guest.running);
    ram.assert_equals(&landed);
}

#[test]
fn a_guest_that_is_refused_after_it_was_loaded_runs_on_at_its_source() {
    let (_, mut guest) = source();
    let (a, b) = channels();
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a));
        learn(&b).unwrap().1.refuse();
        sender.join().unwrap()
    });
    assert!(matches!(sent, Err(SourceError::Refused { status: 1 })));
    assert!(guest.running);
}

#[test]
fn a_stream_without_ram_announces_nothing_and_its_source_is_told() {
    let (mut a, b) = channels();
    let mut stream = BytesMut::new();
    header::encode(&mut stream);
    configuration("test").encode(&mut stream);
    Command::OpenReturnPath.encode(&mut stream);
    encode_eof(&mut stream);
    a.write_all(&[Chunk::Bytes(&stream)]).unwrap();
    let error = learn(&b).unwrap_err();
    assert!(matches!(error, TargetError::Missing { .. }), "{error}");
    let mut answer = [0; 8];
    assert_eq!(a.read(&mut answer).unwrap(), 8);
    assert_eq!(answer, [0, 1, 0, 4, 0, 0, 0, 1]);
}

#[test]
fn devices_that_nobody_knows_are_split_by_their_description() {
    let (ram, mut guest) = source();
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| send(&mut guest, &a).map(|_| ()));
        let (mut loaded, tail) = target(&b, &landed)
            .load_opaque(&*landed, &mut NoMultifd, TailLimits::default())
            .unwrap();
        loaded.confirm().unwrap();
        let sections: Vec<_> = tail.sections().collect();
        assert_eq!(sections.len(), 1);
        assert_eq!(sections[0].body, [5; 100]);
        sender.join().unwrap().unwrap();
    });
    ram.assert_equals(&landed);
}
