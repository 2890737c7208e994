//! COLO's view of this VMM.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use colo_core::driver::{ColoControl, DriverConfig, Hooks};
use colo_core::{
    CheckpointReport, ColoExit, ColoObserver, ExitReason, NoReplication, OnPeerLoss, Outcome, Role,
    Step, StepPhase,
};
use migration_stream::raw::checkpoint::FIRST_DEVICE_SECTION;
use migration_stream::{BoxError, DeviceSections, DeviceState, Parsed, SectionHeader, VmControl};
use qmp_types::{ColoCheckpoint, ColoCheckpointStep, ColoExitReason, ColoMode, Event};
use qmp_types::{MigrationStatus, RunState};
use rayon::prelude::*;
use twox_hash::XxHash64;
use vm_memory::{MmapRegion, VolatileMemory};
use vmstate::{ResetDone, Staged};

use super::devices::{Devices, Section};
use super::{Migration, chain, lock};
use crate::console::ConsoleGate;
use crate::figures::{Decider, Failover};
use crate::memory::Memory;

/// A control that other threads reach through the migration's job.
pub(super) fn control(migration: &Arc<Migration>, role: Role) -> io::Result<ColoControl> {
    let connections = migration.connections.clone();
    let (failover, delay) = (migration.failover.clone(), migration.checkpoint_delay());
    let control = ColoControl::new(role, failover, delay, move || connections.shut())?;
    lock(&migration.job).colo = Some(control.clone());
    Ok(control)
}

pub(super) fn config(migration: &Migration) -> DriverConfig {
    let options = &migration.options;
    // A primary has nothing to say between two checkpoints.
    let deadlines = (options.deadlines).for_checkpoint_delay(migration.checkpoint_delay());
    DriverConfig::default()
        .deadlines(deadlines)
        .on_loss(options.on_peer_loss)
        .max_device_state(options.max_device_state)
        .background(migration.background())
        .elide_unchanged(options.skip_unchanged)
}

/// The VM, without disks, with its serial line as all the output there is.
pub(super) fn parts(
    migration: &Arc<Migration>,
    role: Role,
) -> Hooks<CheckpointedVm, NoReplication, ConsoleGate> {
    let console = migration.console.clone();
    Hooks {
        vm: CheckpointedVm {
            migration: Arc::clone(migration),
            role,
            said: 0,
            hashes: None,
        },
        replication: NoReplication,
        gate: match role {
            Role::Primary => ConsoleGate::primary(console, migration.options.output_commit),
            Role::Secondary => ConsoleGate::secondary(console),
        },
    }
}

/// COLO is over on this side.
pub(super) fn finish(migration: &Migration, outcome: Outcome) {
    lock(&migration.job).colo = None;
    migration.connections.clear();
    if let Some(heartbeat) = migration.heartbeat() {
        heartbeat.colo_ended(outcome);
    }
    match outcome {
        Outcome::TookOver => {
            let otherwise = match migration.options.on_peer_loss {
                OnPeerLoss::TakeOver => Decider::Policy,
                OnPeerLoss::Wait => Decider::Heartbeat,
            };
            let Failover { cause, decided_by } = migration.figures.went_on(otherwise);
            tracing::warn!(cause, decided_by, "this side goes on alone");
            migration.status.set(MigrationStatus::Completed);
        }
        Outcome::Quit => {}
        Outcome::Broken(cause) => {
            migration.vm.set_state(RunState::InternalError);
            let error = format!("the VM is in no state to run: {cause}");
            migration.status.fail(MigrationStatus::Failed, error);
        }
    }
}

/// The VM between two checkpoints.
pub(super) struct CheckpointedVm {
    migration: Arc<Migration>,
    role: Role,
    /// What the guest had put out when it stood still for the checkpoint.
    said: u64,
    /// RAM and devices at the checkpoint, with `--verify`.
    hashes: Option<(u64, u64)>,
}

impl CheckpointedVm {
    /// Hashes RAM as it is, and the state of the devices.
    fn hash(&mut self, devices: &[u8]) {
        let devices = XxHash64::oneshot(0, devices);
        self.hashes = Some((hash_memory(self.migration.vm.memory()), devices));
    }
}

/// What one thread hashes at a time, bytes.
const PIECE: usize = 1 << 20;

/// A hash of all RAM of a paused guest: that of the hashes of its pieces. All processors hash; only `--verify` asks.
fn hash_memory(memory: &Memory) -> u64 {
    let regions = memory.regions().iter().map(|region| &*region.mapping);
    let pieces: Vec<_> = regions
        .flat_map(|mapping| {
            let offsets = (0..mapping.size()).step_by(PIECE);
            offsets.map(move |at| (mapping, at, PIECE.min(mapping.size() - at)))
        })
        .collect();
    let hash = |copy: &mut Vec<u8>, &(mapping, at, len): &(&MmapRegion<()>, usize, usize)| {
        if let Ok(slice) = mapping.get_slice(at, len) {
            slice.copy_to(&mut copy[..len]);
        }
        XxHash64::oneshot(0, &copy[..len]).to_le_bytes()
    };
    let hashes: Vec<_> = pieces
        .par_iter()
        .map_init(|| vec![0; PIECE], hash)
        .collect();
    XxHash64::oneshot(0, hashes.as_flattened())
}

impl VmControl for CheckpointedVm {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.migration.vm.stop_for_checkpoint()?;
        self.said = self.migration.console.said();
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        Ok(self.migration.vm.resume_after_checkpoint()?)
    }
}

/// What both sides have in common was compared in the migration before.
impl DeviceState for CheckpointedVm {
    type Section = Section;
    type Staged = Staged;
    type Reset = ResetDone;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        Devices(&self.migration.vm).save(out)?;
        if self.migration.options.verify {
            self.hash(out.written());
        }
        Ok(())
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
        Devices(&self.migration.vm).install(reset)?;
        if self.migration.options.verify {
            // Read back from the devices, not remembered.
            let mut state = Vec::new();
            let mut sections = DeviceSections::new(&mut state, FIRST_DEVICE_SECTION, false);
            Devices(&self.migration.vm).save(&mut sections)?;
            self.hash(sections.written());
        }
        Ok(())
    }
}

impl ColoObserver for CheckpointedVm {
    fn on_step(&mut self, step: Step, phase: StepPhase) {
        let boundaries = &self.migration.options.boundaries;
        boundaries.reach(&format!("{step} {phase}"));
    }

    fn colo_exit(&mut self, exit: &ColoExit) {
        let reason = match exit.reason() {
            ExitReason::Request => ColoExitReason::Request,
            ExitReason::Error => ColoExitReason::Error,
        };
        if exit.reason() == ExitReason::Error {
            // Whatever happens next, a dead peer is not `colo` any more.
            let cause = match self.migration.connections.fault() {
                None => chain(&exit.cause),
                Some(fault) => format!("{}: {fault}", chain(&exit.cause)),
            };
            self.migration.status.fail(MigrationStatus::Failing, cause);
        }
        self.migration.figures.ended(&exit.cause);
        tracing::info!(
            role = %exit.role,
            reason = %exit.reason(),
            cause = %exit.cause,
            "colo has ended"
        );
        self.migration.vm.events().publish(&Event::ColoExit {
            mode: mode(self.role),
            reason,
        });
    }

    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        self.migration.figures.note(report);
        let hashes = self.hashes.take();
        let hex = |hash: u64| format!("{hash:016x}");
        let mut event = checkpoint_event(self.role, report);
        if self.role == Role::Primary {
            event.serial_bytes = self.said;
        }
        event.ram_hash = hashes.map(|(ram, _)| hex(ram));
        event.device_hash = hashes.map(|(_, devices)| hex(devices));
        let event = Event::ColoCheckpoint(Box::new(event));
        self.migration.vm.events().publish(&event);
    }
}

/// What is told of a checkpoint, without what only some VMs know.
pub(crate) fn checkpoint_event(role: Role, report: &CheckpointReport) -> ColoCheckpoint {
    let us = |d: std::time::Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
    ColoCheckpoint {
        mode: mode(role),
        checkpoint: report.number,
        pause_us: us(report.pause),
        transfer_us: us(report.transfer),
        loaded_us: us(report.until_loaded),
        ahead_pages: report.background_pages,
        compared_pages: report.compared_pages,
        unchanged_pages: report.unchanged_pages,
        ram_bytes: report.ram_bytes,
        dirty_pages: report.dirty_pages,
        flushed_pages: report.flushed_pages,
        device_bytes: report.device_bytes,
        serial_bytes: 0,
        ram_hash: None,
        device_hash: None,
        steps: report
            .steps
            .iter()
            .map(|(step, time)| ColoCheckpointStep {
                step: step.to_string(),
                us: us(*time),
            })
            .collect(),
    }
}

const fn mode(role: Role) -> ColoMode {
    match role {
        Role::Primary => ColoMode::Primary,
        Role::Secondary => ColoMode::Secondary,
    }
}
