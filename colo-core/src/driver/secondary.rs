//! The secondary over its channels.

use std::time::Instant;

use migration_stream::io::Chunk;
use migration_stream::precopy::{PageIntake, TargetError};
use migration_stream::raw::checkpoint::{CheckpointComplete, CheckpointReceiver};
use migration_stream::raw::transport::HeldChannels;
use migration_stream::{BoxError, DirtyLog};
use multifd::{IncomingPages, RecvCounters};
use ram_cache::{FlushPool, GuestStopped};

use super::{ColoControl, DriverConfig, Hooks, Performed, StepError, Wire, message_event, run};
use crate::action::{Event, ProtocolMisuse};
use crate::message::{DEVICE_SIZE_LEN, MESSAGE_LEN, Message, decode_device_size, encode_message};
use crate::report::CheckpointMeter;
use crate::secondary::Secondary;
use crate::step::{Step, Wait};
use crate::store::{self, ColoStore, StoreError};
use crate::{ColoVm, Outcome, PacketGate, Replication, VmError};

/// The secondary's end of the connection, and its memory: what an incoming migration leaves behind
/// when it was confirmed.
#[derive(Debug)]
#[non_exhaustive]
pub struct SecondaryLink<D> {
    /// The main channel.
    pub receiver: CheckpointReceiver,
    /// The cache, and the threads that fill it.
    pub pages: IncomingPages<ColoStore>,
    /// What this side's own guest writes.
    pub log: D,
    /// Who copies a checkpoint into the guest.
    pub pool: FlushPool,
}

impl<D> SecondaryLink<D> {
    /// Joins what
    /// [`SettledSecondary::confirm`](migration_stream::precopy::SettledSecondary::confirm) returned with this
    /// side's dirty log and flush threads.
    #[must_use]
    pub fn new(
        confirmed: (CheckpointReceiver, impl Into<IncomingPages<ColoStore>>),
        log: D,
        pool: FlushPool,
    ) -> Self {
        let (receiver, pages) = confirmed;
        let pages = pages.into();
        Self {
            receiver,
            pages,
            log,
            pool,
        }
    }
}

/// Runs the secondary until COLO ends, in the calling thread. The cache is given back then, its
/// threads joined.
///
/// The VM stands still when this is called: the migration was confirmed
/// ([`SettledSecondary::confirm`](migration_stream::precopy::SettledSecondary::confirm)), and the guest
/// has not run. The driver starts the dirty log, has pages belong to checkpoints from then on,
/// and lets the guest run. It pauses, resets and resumes the VM for
/// every checkpoint; nobody else does meanwhile.
///
/// What ends COLO, what is waited for then, and what is true when this returns is as for
/// [`run_primary`](super::run_primary). After [`Outcome::Broken`] the VM must never run, and requests are refused
/// with [`RequestError::Unfit`](crate::RequestError::Unfit).
///
/// # Errors
/// [`ProtocolMisuse`] is a mistake of this crate, never the peer's. It was reported by [`ColoObserver::colo_exit`](crate::ColoObserver::colo_exit)
/// as [`Cause::Mistake`](crate::Cause::Mistake). The VM is left as it was.
pub fn run_secondary<D, V, R, G>(
    link: SecondaryLink<D>,
    hooks: &mut Hooks<V, R, G>,
    control: &ColoControl,
    config: DriverConfig,
) -> Result<Outcome, ProtocolMisuse>
where
    D: DirtyLog,
    V: ColoVm,
    R: Replication,
    G: PacketGate,
{
    let mut wire = SecondaryWire {
        link,
        control,
        devices: Vec::new(),
        staged: None,
        reset: None,
        counted: RecvCounters::default(),
        received: None,
        loading: None,
        is_flushed: false,
        max_device_state: config.max_device_state,
    };
    let outcome = run(
        Secondary::new(config.on_loss),
        &mut wire,
        hooks,
        control,
        config,
    );
    let SecondaryLink { pages, mut log, .. } = wire.link;
    if let Err(error) = log.stop() {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(error, "the dirty log goes on");
    }
    match pages.join() {
        Ok(store) => store.release(),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "the ram cache could not be released");
        }
    }
    outcome
}

struct SecondaryWire<'a, D, S, R> {
    link: SecondaryLink<D>,
    control: &'a ColoControl,
    /// Received device state. Kept from checkpoint to checkpoint for its memory.
    devices: Vec<u8>,
    staged: Option<S>,
    reset: Option<R>,
    /// What had come on the channels when the checkpoint before was complete.
    counted: RecvCounters,
    /// All of a checkpoint's RAM, from its receipt to its flush.
    received: Option<CheckpointComplete>,
    /// The channels, from the flush until the checkpoint is loaded.
    loading: Option<HeldChannels>,
    /// A checkpoint is in place from which the VM has not run yet.
    is_flushed: bool,
    max_device_state: usize,
}

impl<D: DirtyLog, V: ColoVm, R, G> Wire<V, R, G> for SecondaryWire<'_, D, V::Staged, V::Reset> {
    fn perform(
        &mut self,
        step: Step,
        deadline: Option<Instant>,
        hooks: &mut Hooks<V, R, G>,
        meter: &mut CheckpointMeter,
    ) -> Result<Performed, StepError> {
        let SecondaryLink {
            receiver,
            pages,
            log,
            pool,
        } = &mut self.link;
        if step.is_on_the_wire() {
            receiver.set_deadline(deadline);
        }
        match step {
            Step::StartDirtyLog => {
                log.start().map_err(StoreError::Log)?;
                // A channel that stays inside a packet has not ended the migration.
                pages
                    .between_packets(deadline, store::enter_colo)
                    .map_err(TargetError::Transport)??;
                self.counted = pages.counters();
            }
            Step::Send(message) => {
                if message == Message::VmstateLoaded {
                    // The channels may carry pages for the next checkpoint from here on.
                    self.loading = None;
                }
                receiver
                    .out()
                    .write_all(&[Chunk::Bytes(&encode_message(message))])?;
            }
            Step::Await(wait) => {
                if wait == Wait::Message(Message::VmstateSend) {
                    // The VM was stopped just now, and the primary is stopping its own.
                    let stopped = GuestStopped::witnessed_by(&hooks.vm);
                    store::guest_stopped(pages.store(), stopped, log)?;
                }
                let mut bytes = [0; MESSAGE_LEN];
                receiver.reader().read_exact(&mut bytes)?;
                return Ok(message_event(bytes).into());
            }
            Step::ReceiveRam => {
                let (store, barrier) = pages.parts();
                barrier.set_deadline(deadline);
                let complete = receiver.receive_ram(store, barrier)?;
                let (main, channels) = (complete.received(), pages.counters());
                meter.ram(
                    main.bytes + channels.bytes.saturating_sub(self.counted.bytes),
                    main.normal_pages
                        + main.zero_pages
                        + channels.pages().saturating_sub(self.counted.pages()),
                );
                self.counted = channels;
                self.received = Some(complete);
            }
            Step::ReceiveDevices => {
                let mut size = [0; DEVICE_SIZE_LEN];
                receiver.reader().read_exact(&mut size)?;
                let size = decode_device_size(size, self.max_device_state)?;
                self.devices.clear();
                self.devices.resize(size, 0);
                receiver.reader().read_exact(&mut self.devices)?;
                meter.devices(size as u64);
            }
            Step::StageDevices => {
                let staged = hooks.vm.stage_checkpoint(&self.devices);
                self.staged = Some(staged.map_err(vm_error("checking device state"))?);
            }
            Step::Reset => {
                let staged = self
                    .staged
                    .take()
                    .ok_or_else(|| out_of_order("device was", "staged"))?;
                let reset = hooks.vm.reset(staged);
                self.reset = Some(reset.map_err(vm_error("resetting the devices"))?);
            }
            Step::Flush => {
                let complete = self
                    .received
                    .take()
                    .ok_or_else(|| out_of_order("ram was", "received"))?;
                // The machine stopped the VM before.
                let stopped = GuestStopped::witnessed_by(&hooks.vm);
                let (report, held) = store::flush(pages.store(), stopped, log, pool, complete)?;
                self.loading = Some(held);
                tracing::trace!(
                    pages = report.pages,
                    runs = report.runs,
                    "ram cache flushed"
                );
                meter.flushed(report.pages);
                self.is_flushed = true;
            }
            Step::InstallDevices => {
                let reset = self
                    .reset
                    .take()
                    .ok_or_else(|| out_of_order("device was", "reset"))?;
                let installed = hooks.vm.install(reset);
                installed.map_err(vm_error("installing device state"))?;
            }
            // The others are not the secondary's.
            _ => return Ok(Event::Failed.into()),
        }
        Ok(Event::Done.into())
    }

    /// The primary does not wait for this any more.
    fn before_resume(&mut self, vm: &V) {
        if !std::mem::take(&mut self.is_flushed) {
            return;
        }
        let stopped = GuestStopped::witnessed_by(vm);
        if let Err(error) = store::reclaim(self.link.pages.store(), stopped) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the ram cache keeps memory that it does not need");
        }
    }

    fn disconnect(&mut self) {
        self.control.disconnect();
        // A checkpoint that was not loaded is dropped.
        self.received = None;
        self.loading = None;
    }
}

fn vm_error(what: &'static str) -> impl FnOnce(BoxError) -> VmError {
    move |source| VmError::new(what, source)
}

/// The machine orders the steps, so this is never seen.
fn out_of_order(what: &'static str, missing: &'static str) -> VmError {
    VmError::new(
        "installing a checkpoint",
        format!("no {what} {missing} for it"),
    )
}
