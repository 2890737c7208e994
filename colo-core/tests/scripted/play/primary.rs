//! A primary whose secondary plays a script.

use std::sync::Arc;
use std::time::Duration;

use colo_core::driver::{BackgroundTransfer, ColoControl, Hooks, PrimaryLink, run_primary};
use colo_core::{FailoverHandle, Role};
use migration_stream::precopy::{Progress, RamSetup, ReturnPathReader, SourceStatus, SwitchedOver};
use migration_stream::ram::{InStream, ZeroPageDetection};
use migration_stream::{
    GuestRam, PageTransport, SectionId, StagedRam, StreamWriter, TransportCounters,
};
use multifd::{ChannelCount, MultifdConfig, SendChannel, SendSet};

use super::channel::{Read, Write, failure};
use super::script::{Ask, Input, Script};
use super::secondary::{assert_over, config_of};
use super::vm::{Fault, Guest, Outside};
use super::world::{Shared, World};

/// A migration without anything to tell.
fn over() -> Progress {
    Progress {
        status: SourceStatus::Device,
        pass: 1,
        remaining: 0,
        total: 0,
        transferred: 0,
        counters: TransportCounters::default(),
        dirty_pages_rate: 0,
        bandwidth: 0,
        throttle: 0,
        expected_downtime: None,
        elapsed: Duration::ZERO,
    }
}

/// Plays a script to a primary. Asserts that its driver makes no mistake, reports one end of COLO, and
/// refuses requests afterwards. Returns how many checkpoints were complete.
pub fn primary(data: &[u8]) -> u64 {
    let mut input = Input::new(data);
    let (how, more) = (input.byte(), input.byte());
    let channels = usize::from(how % 4).saturating_sub(2);
    let (fault, writes, then) = (input.byte() % 40, input.byte(), failure(input.byte()));
    let script = Script::of_secondary(&mut input, more & 64 == 0);
    let world: Shared = Arc::new(World::default());
    let fault = Fault::of(if fault < 14 { fault } else { 0 });
    let guest = Guest::new(&world, fault.clone(), Ask::of(how >> 5), false);
    let writes = if writes == 0 { 255 } else { writes };
    let sink = || Write {
        world: Arc::clone(&world),
        // The announcement's.
        writes: writes.saturating_add(4),
        then,
        promises: None,
    };

    let staged = Arc::new(StagedRam::new(Arc::clone(&guest.ram) as _).expect("memory"));
    let ram: Arc<dyn GuestRam> = Arc::clone(&staged) as _;
    let transport: Box<dyn PageTransport> =
        match ChannelCount::new(u8::try_from(channels).expect("few")) {
            None => Box::new(InStream::new(Arc::clone(&ram), ZeroPageDetection::Multifd)),
            Some(count) => {
                let config = MultifdConfig::new(count).stall_limit(Duration::from_secs(10));
                let closes = Arc::clone(&world);
                let channels = vec![SendChannel::new(sink(), move || closes.close())];
                Box::new(SendSet::start(Arc::clone(&ram), channels, &config).expect("threads"))
            }
        };
    let mut out = StreamWriter::new(sink());
    let setup = RamSetup {
        log: guest.log.clone(),
        transport,
    };
    // A connection that breaks here is the migration's.
    let Ok(ram) = setup.announce(SectionId(1), &mut out) else {
        return 0;
    };
    let replies = Read {
        pieces: script.main.into(),
        world: Arc::clone(&world),
    };
    let switched = SwitchedOver {
        out,
        return_path: Some(ReturnPathReader::new(replies)),
        ram,
        progress: over(),
        downtime: Duration::ZERO,
    };
    let mut link = PrimaryLink::new(switched).expect("a migration that COLO can follow");
    match more % 3 {
        0 => {}
        1 => link = link.resume_on_received(),
        _ => link = link.resume_on_local_copy(staged).expect("the same memory"),
    }

    let failover = FailoverHandle::new();
    let closes = Arc::clone(&world);
    let control = ColoControl::new(Role::Primary, failover.clone(), Duration::ZERO, move || {
        closes.close()
    })
    .expect("a pipe");
    world.set_control(Some(control.clone()));
    let mut parts = Hooks {
        vm: guest,
        replication: Outside(fault.clone()),
        gate: Outside(fault),
    };
    let mut config = config_of(how);
    if more & 8 != 0 {
        let transfer = BackgroundTransfer::default().interval(Duration::from_millis(1));
        config = config.background(transfer);
    }
    let outcome = run_primary(link, &mut parts, &control, config);
    world.set_control(None);
    assert_over(outcome.expect("no mistake"), &parts.vm, &failover);
    parts.vm.complete
}
