//! A secondary whose primary plays a script.

use std::sync::Arc;
use std::time::Duration;

use colo_core::driver::{ColoControl, DriverConfig, Hooks, SecondaryLink, run_secondary};
use colo_core::{Cause, ColoMode, ColoStore, Deadlines, FailoverHandle, OnPeerLoss, Outcome, Role};
use migration_stream::precopy::{Target, TargetConfig};
use migration_stream::raw::command::Command;
use migration_stream::raw::header;
use migration_stream::raw::ram::{encode_end_of_section, encode_multifd_flush, encode_setup_list};
use migration_stream::raw::section::{
    Announcement, Continuation, encode_continuation, encode_eof, encode_footer,
    encode_vm_description,
};
use migration_stream::{
    ConfigurationRule, IdStr, InstanceId, SectionHeader, SectionId, StreamReader,
};
use multifd::{ChannelCount, IncomingPages, MultifdConfig, RecvChannel, RecvSet};
use ram_cache::{CacheKind, DiscardControl, FlushPool};

use super::channel::{Read, ReadChannel, Write, failure};
use super::script::{Ask, Input, Piece, Script, sync};
use super::vm::{Fault, Guest, Outside, memory};
use super::world::{Shared, World, lock};

/// The migration before: an empty guest.
fn precopy(channels: bool) -> Vec<u8> {
    let mut out = Vec::new();
    let id = SectionId(1);
    header::encode(&mut out);
    Command::OpenReturnPath.encode(&mut out);
    SectionHeader {
        kind: Announcement::Start,
        id,
        idstr: IdStr::new("ram").expect("a name"),
        instance: InstanceId(0),
        version: 4,
    }
    .encode(&mut out);
    encode_setup_list(memory().blocks(), &mut out);
    for end in [false, true] {
        if end {
            encode_continuation(Continuation::End, id, &mut out);
        }
        if channels {
            encode_multifd_flush(&mut out);
        }
        encode_end_of_section(&mut out);
        encode_footer(id, &mut out);
    }
    encode_eof(&mut out);
    encode_vm_description(2, &mut out);
    out.extend(b"{}");
    out
}

/// Plays a script to a secondary. Asserts that its driver makes no mistake, reports one end of COLO,
/// refuses requests afterwards, and commits nothing but whole checkpoints. Returns how many.
pub fn secondary(data: &[u8]) -> u64 {
    let mut input = Input::new(data);
    let how = input.byte();
    let channels = usize::from(how % 4).saturating_sub(1);
    let (fault, writes, then) = (input.byte() % 40, input.byte(), failure(input.byte()));
    let script = Script::of_primary(&mut input, channels);
    let world: Shared = Arc::new(World::default());
    let fault = Fault::of(if fault < 14 { fault } else { 0 });
    let decision = Ask::of(how >> 5);
    // Pages come on channels before COLO has begun: they are the migration's.
    let early = how & 4 != 0;
    let mut guest = Guest::new(&world, fault.clone(), decision, channels > 0);
    guest.fresh = early && channels > 0;

    let discard = DiscardControl::new();
    let kind = if how & 16 == 0 {
        CacheKind::Mirror
    } else {
        CacheKind::Cow
    };
    let store = ColoStore::over(kind, &guest.ram, discard.disable().expect("allowed"))
        .expect("memory for the cache");
    let pages = match ChannelCount::new(u8::try_from(channels).expect("few")) {
        None => IncomingPages::plain(store),
        Some(count) => IncomingPages::multifd(receive(store, count, &script, early, &world)),
    };

    let mut pieces = vec![Piece::Bytes(precopy(channels > 0))];
    pieces.extend(script.main);
    let source = Read {
        pieces: pieces.into(),
        world: Arc::clone(&world),
    };
    let writes = if writes == 0 { 255 } else { writes };
    let sink = Write {
        world: Arc::clone(&world),
        // The confirmation's.
        writes: writes.saturating_add(1),
        then,
        promises: Some(channels > 0),
    };
    let config = TargetConfig::new(ConfigurationRule::Absent).max_devices(0);
    // A guest without devices arrives.
    let target = Target::new(
        config,
        StreamReader::new(source, b""),
        Some(Box::new(sink)),
        pages.store(),
    );
    let arrived = target.load(pages, &mut ()).expect("a sound migration");
    lock(&world.delivered).clear();
    let settled = arrived.settle_for_checkpoints(&mut ()).expect("no devices");
    let Ok((receiver, pages)) = settled.confirm() else {
        // The primary was gone by then.
        return 0;
    };

    let failover = FailoverHandle::new();
    let closes = Arc::clone(&world);
    let control = ColoControl::new(
        Role::Secondary,
        failover.clone(),
        Duration::MAX,
        move || closes.close(),
    )
    .expect("a pipe");
    world.set_control(Some(control.clone()));
    let pool = FlushPool::new(1).expect("a pool");
    let link = SecondaryLink::new((receiver, pages), guest.log.clone(), pool);
    let mut parts = Hooks {
        vm: guest,
        replication: Outside(fault.clone()),
        gate: Outside(fault),
    };
    let outcome = run_secondary(link, &mut parts, &control, config_of(how));
    world.set_control(None);
    assert_over(outcome.expect("no mistake"), &parts.vm, &failover);
    // Behind a cow cache RAM is never discarded again.
    assert_eq!(
        discard.allowed(),
        kind == CacheKind::Mirror,
        "the cache was not given back"
    );
    parts.vm.installed
}

fn receive(
    store: ColoStore,
    channels: ChannelCount,
    script: &Script,
    early: bool,
    world: &Shared,
) -> RecvSet<ColoStore> {
    let config = MultifdConfig::new(channels)
        // Far longer than the driver's deadlines: a busy host is no mistake.
        .stall_limit(Duration::from_secs(10));
    let of = |script: &Vec<u8>| {
        let mut bytes = [sync(), sync()].concat();
        let mut then = script.clone();
        if early {
            bytes.append(&mut then);
        }
        let world = Arc::clone(world);
        let closes = Arc::clone(&world);
        RecvChannel::new(ReadChannel { bytes, then, world }, move || closes.close())
    };
    let closes = Arc::clone(world);
    let channels = script.channels.iter().map(of).collect();
    RecvSet::start(store, channels, &config, move |_| closes.close()).expect("threads")
}

/// A driver that waits for nothing for long.
pub fn config_of(how: u8) -> DriverConfig {
    let short = Duration::from_millis(10);
    DriverConfig::default()
        .deadlines(Deadlines::all(short).checkpoint(3 * short))
        .on_loss(if how & 8 == 0 {
            OnPeerLoss::Wait
        } else {
            OnPeerLoss::TakeOver
        })
        .max_device_state(500)
}

/// COLO has ended, and everybody knows.
pub fn assert_over(outcome: Outcome, vm: &Guest, failover: &FailoverHandle) {
    vm.check_end(outcome);
    assert_ne!(vm.exits[0].cause, Cause::Mistake);
    let status = failover.status();
    assert_eq!(status.mode, ColoMode::None);
    assert_ne!(status.last_mode, ColoMode::None);
    failover.request().expect_err("COLO is over");
}
