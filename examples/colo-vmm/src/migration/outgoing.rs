//! The source: connect, migrate, and go on as the COLO primary.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use colo_core::driver::{PrimaryLink, run_primary};
use colo_core::{MigrationPlan, Outcome, Resume, Role};
use colo_heartbeat::{Endpoint, Heartbeat, Phase};
use migration_net::{Address, outgoing};
use migration_stream::io::{FdChannel, SendMode};
use migration_stream::precopy::{
    Control, HandOver, Progress, RamSetup, ReturnPathReader, Source, SourceConfig, SourceEvent,
    SourceObserver, SourceStatus, SwitchedOver,
};
use migration_stream::ram::InStream;
use migration_stream::{
    BoxError, DeviceSections, DeviceState, DirtyLog, GuestRam, PageTransport, Parsed,
    SectionHeader, StagedRam, StreamWriter, VmControl,
};
use multifd::{MultifdConfig, SendChannel, SendSet};
use qmp_types::{MigrationCapability, MigrationStatus, RunState};
use vmstate::{ResetDone, Staged};

use super::devices::{Devices, Section};
use super::plan::{throttling, zero_pages};
use super::{Cancel, Migration, colo, failed, uncertain};

/// How long the peer may take to accept the connections.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

type Transport = Box<dyn PageTransport>;
type Log = Box<dyn DirtyLog>;
type Switched = SwitchedOver<Transport, Log>;
/// The copy of RAM that a local-copy resume sends from.
type Copy = Option<Arc<StagedRam>>;

/// Migrates, and ends with a status that says how it went.
pub(super) fn run(
    migration: &Arc<Migration>,
    plan: &MigrationPlan,
    multifd: Option<&MultifdConfig>,
    address: &Address,
    cancel: &Cancel,
) {
    let heartbeat = migration.heartbeat().filter(|_| plan.migrate_colo());
    let mut vm = SourceSide {
        migration,
        heartbeat,
        cancel,
        peer_may_run: false,
    };
    let begun = heartbeat
        .map_or(Ok(()), |heartbeat| watch(heartbeat, cancel))
        .and_then(|()| begin(&mut vm, plan, multifd, address));
    let (outcome, copy) = match begun {
        Ok((source, copy)) => (source.run(&mut vm), copy),
        Err(error) => return give_up(&vm, &*error),
    };
    let outcome = match outcome {
        HandOver::Unknown(unresolved) => uncertain::decide(&mut vm, plan, unresolved),
        known => known,
    };
    match outcome {
        HandOver::Completed(switched) => switched_over(&vm, plan, switched, copy),
        HandOver::Failed(error) => give_up(&vm, &error),
        // The process ends, and the guest with it.
        HandOver::Unknown(_) => {}
    }
}

fn switched_over(vm: &SourceSide<'_>, plan: &MigrationPlan, switched: Switched, copy: Copy) {
    let migration = vm.migration;
    migration.options.boundaries.reach("target confirmed");
    migration.status.progress(&switched.progress);
    migration.status.downtime(switched.downtime);
    migration.status.clear_error();
    if plan.migrate_colo() {
        if let Err(error) = enter_colo(migration, switched, copy) {
            // The guest stands still, and the secondary has it too.
            if let Some(heartbeat) = vm.heartbeat {
                heartbeat.colo_ended(Outcome::Quit);
            }
            failed(migration, vm.cancel, &*error);
        }
    } else {
        drop(switched);
        migration.connections.clear();
        migration.vm.set_state(RunState::PostMigrate);
        migration.status.set(MigrationStatus::Completed);
    }
}

/// The guest is still this side's.
fn give_up(vm: &SourceSide<'_>, error: &(dyn std::error::Error + 'static)) {
    match vm.heartbeat {
        None => {}
        Some(heartbeat) if vm.peer_may_run => heartbeat.claim(),
        Some(heartbeat) => heartbeat.release(),
    }
    failed(vm.migration, vm.cancel, error);
}

/// Takes the lease for the pair that is to be.
fn watch(heartbeat: &Heartbeat, cancel: &Cancel) -> Result<(), BoxError> {
    let report = heartbeat.report();
    // A primary that has gone on alone tries again, with the same or another secondary in its place.
    if let (Phase::Alone, Endpoint::Connect(address)) = (report.phase, report.endpoint) {
        heartbeat.new_pair(address)?;
    }
    Ok(heartbeat.hold(CONNECT_TIMEOUT, Some(cancel.token()))?)
}

/// Connects, and begins the stream.
fn begin(
    vm: &mut SourceSide<'_>,
    plan: &MigrationPlan,
    multifd: Option<&MultifdConfig>,
    address: &Address,
) -> Result<(Source<Transport, Log>, Copy), BoxError> {
    let migration = vm.migration;
    let limit = migration.options.io_limit;
    let connected = outgoing::connect(
        address,
        multifd,
        CONNECT_TIMEOUT.min(limit),
        limit,
        Some(vm.cancel.token()),
    )?;
    migration.options.boundaries.reach("connected");
    migration.connections.add(&connected.main);
    connected
        .channels
        .iter()
        .for_each(|channel| migration.connections.add(channel));
    let ram: Arc<dyn GuestRam> = Arc::clone(migration.vm.memory().ram()) as _;
    let staged = if plan.migrate_colo() && migration.options.resume == Resume::OnLocalCopy {
        Some(Arc::new(StagedRam::new(Arc::clone(&ram))?))
    } else {
        None
    };
    let ram = staged.clone().map_or(ram, |staged| staged as _);
    let transport: Transport = match multifd {
        Some(config) => {
            let channels = connected
                .channels
                .into_iter()
                .map(SendChannel::from)
                .collect();
            Box::new(SendSet::start(Arc::clone(&ram), channels, config)?)
        }
        None => {
            let detection = zero_pages(migration.settings().parameters());
            let pages = InStream::new(Arc::clone(&ram), detection);
            if plan.xbzrle() {
                let size = migration.settings().parameters().xbzrle_cache_size;
                Box::new(pages.with_xbzrle(size)?)
            } else {
                Box::new(pages)
            }
        }
    };
    let main: FdChannel = connected.main;
    migration.status.set(MigrationStatus::Active);
    let (validates_uuid, pauses) = {
        let settings = migration.settings();
        (
            settings.has(MigrationCapability::ValidateUuid),
            settings.has(MigrationCapability::PauseBeforeSwitchover),
        )
    };
    let mut out = StreamWriter::new(main.share());
    out.set_cancel(vm.cancel.token());
    // Over anything but a unix socket pages are copied.
    if multifd.is_none()
        && migration.options.send_mode == SendMode::Splice
        && let Err(error) = out.set_send_mode(SendMode::Splice)
    {
        tracing::debug!(%error, "pages are copied");
    }
    let mut source = Source::start(
        SourceConfig::new(migration.configuration(validates_uuid)?).confirm_timeout(limit),
        Arc::clone(&migration.limits),
        out,
        plan.return_path()
            .then(|| ReturnPathReader::new(main.share())),
        RamSetup {
            log: migration.vm.with_machine(|machine| machine.dirty_log()),
            transport,
        },
        vm,
    )?;
    migration.options.boundaries.reach("ram announced");
    if pauses {
        source = source.pausing_before_switchover();
    }
    let throttling = throttling(&migration.settings());
    if let Some(config) = throttling {
        let throttle = migration.vm.with_machine(|machine| machine.throttle());
        source = source.throttling_by(config, throttle)?;
    }
    Ok((source, staged))
}

fn enter_colo(
    migration: &Arc<Migration>,
    switched: Switched,
    staged: Copy,
) -> Result<(), BoxError> {
    let mut link = PrimaryLink::new(switched)?;
    if let Some(staged) = staged {
        link = link.resume_on_local_copy(staged)?;
    } else if migration.options.resume == Resume::OnReceived {
        link = link.resume_on_received();
    }
    let control = colo::control(migration, Role::Primary)?;
    migration.status.set(MigrationStatus::Colo);
    let mut parts = colo::parts(migration, Role::Primary);
    let outcome = run_primary(link, &mut parts, &control, colo::config(migration))?;
    colo::finish(migration, outcome);
    Ok(())
}

/// The VM as the source's driver sees it.
pub(super) struct SourceSide<'a> {
    pub(super) migration: &'a Arc<Migration>,
    /// That of the pair that is to be.
    pub(super) heartbeat: Option<&'a Heartbeat>,
    pub(super) cancel: &'a Cancel,
    /// The peer may have all that it needs to go on as a COLO secondary.
    peer_may_run: bool,
}

impl VmControl for SourceSide<'_> {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.migration.options.boundaries.reach("guest to stop");
        let before = self.migration.vm.stop_for_hand_over()?;
        self.migration.global_state.set(before);
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        Ok(self.migration.vm.take_back()?)
    }
}

/// Devices are saved here, and never loaded.
impl DeviceState for SourceSide<'_> {
    type Section = Section;
    type Staged = Staged;
    type Reset = ResetDone;

    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        Devices(&self.migration.vm).save_early(out)
    }

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        let boundaries = &self.migration.options.boundaries;
        boundaries.reach("devices to save");
        let saved = Devices(&self.migration.vm).save(out);
        boundaries.reach("devices saved");
        // They are sent next.
        self.peer_may_run = true;
        if let Some(heartbeat) = self.heartbeat {
            heartbeat.colo_begins();
        }
        saved
    }

    fn parse(&mut self, header: &SectionHeader, body: &[u8]) -> Result<Parsed<Section>, BoxError> {
        Devices(&self.migration.vm).parse(header, body)
    }

    fn stage(&mut self, sections: Vec<Section>) -> Result<Staged, BoxError> {
        Devices(&self.migration.vm).stage(sections)
    }

    fn reset(&mut self, staged: Staged) -> Result<ResetDone, BoxError> {
        Devices(&self.migration.vm).reset(staged)
    }

    fn install(&mut self, reset: ResetDone) -> Result<(), BoxError> {
        Devices(&self.migration.vm).install(reset)
    }
}

impl SourceObserver for SourceSide<'_> {
    fn progress(&mut self, progress: &Progress) -> Control {
        self.migration.status.progress(progress);
        if self.cancel.is_requested() {
            Control::Cancel
        } else if progress.status == SourceStatus::PreSwitchover
            && self.cancel.go_on.load(Ordering::Acquire)
        {
            Control::SwitchOver
        } else {
            Control::Continue
        }
    }

    fn event(&mut self, event: SourceEvent) {
        if let SourceEvent::Pass(_) = event {
            self.migration.options.boundaries.reach("pass");
        }
        if let SourceEvent::Status(status) = event {
            self.migration.status.set(match status {
                SourceStatus::Active => MigrationStatus::Active,
                SourceStatus::PreSwitchover => MigrationStatus::PreSwitchover,
                SourceStatus::Device => MigrationStatus::Device,
            });
        }
    }
}
