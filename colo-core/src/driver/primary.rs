//! The primary over its channels.

use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSource, Chunk, Readiness};
use migration_stream::precopy::SwitchedOver;
use migration_stream::raw::checkpoint::{FIRST_DEVICE_SECTION, RamSender};
use migration_stream::raw::section::encode_eof;
use migration_stream::{
    DeviceSections, DeviceState, DirtyLog, PAGE_SIZE, PageTransport, StagedRam, StreamWriter,
    WhenToCompare,
};

use super::background::Background;
use super::{ColoControl, DriverConfig, Hooks, Performed, StepError, Wire, message_event, run};
use crate::action::{Event, ProtocolMisuse};
use crate::message::{MESSAGE_LEN, encode_message, encode_vmstate_size};
use crate::primary::Primary;
use crate::report::CheckpointMeter;
use crate::step::Step;
use crate::{ColoVm, Outcome, PacketGate, Replication, Resume, VmError};

/// The primary's end of the connection: what a migration leaves behind when it has switched over.
pub struct PrimaryLink<T, D: DirtyLog> {
    out: StreamWriter,
    replies: Box<dyn ByteSource>,
    ram: RamSender<T, D>,
    resume: ResumeBy,
}

/// When the VM runs again in a checkpoint, and by what.
enum ResumeBy {
    Loaded,
    Received,
    /// Where RAM is copied to.
    Copied(Arc<StagedRam>),
}

impl ResumeBy {
    fn when(&self) -> Resume {
        match self {
            Self::Loaded => Resume::OnLoaded,
            Self::Received => Resume::OnReceived,
            Self::Copied(_) => Resume::OnLocalCopy,
        }
    }

    fn staged(&self) -> Option<&StagedRam> {
        match self {
            Self::Loaded | Self::Received => None,
            Self::Copied(staged) => Some(staged),
        }
    }
}

impl<T: PageTransport, D: DirtyLog> PrimaryLink<T, D> {
    /// Goes on where a migration has switched over.
    ///
    /// # Errors
    /// [`LinkError`]: the migration was one that no checkpoint can follow. A
    /// [`MigrationPlan`](crate::MigrationPlan) refuses it before it begins.
    pub fn new(switched: SwitchedOver<T, D>) -> Result<Self, LinkError> {
        if switched.ram.sends_differences() {
            return Err(LinkError::Xbzrle);
        }
        let return_path = switched.return_path.ok_or(LinkError::NoReturnPath)?;
        Ok(Self {
            replies: return_path.into_source(),
            out: switched.out,
            ram: switched.ram,
            resume: ResumeBy::Loaded,
        })
    }

    /// Resumes the VM in every checkpoint as soon as the secondary has received it
    /// ([`Resume::OnReceived`]), not when the secondary has loaded it, which is the default.
    ///
    /// A secondary of this crate has checked by then all that can be wrong with a checkpoint; QEMU's
    /// has its bytes. One that fails to load it is lost either way, and its primary goes on alone. Disk
    /// replication has to keep apart what the guest writes after [`Replication::checkpoint`] until the
    /// checkpoint is complete.
    #[must_use]
    pub fn resume_on_received(mut self) -> Self {
        self.resume = ResumeBy::Received;
        self
    }

    /// Resumes the VM in every checkpoint as soon as its memory was copied on this side
    /// ([`Resume::OnLocalCopy`]), into `staged`, which the migration and its transport were made with.
    ///
    /// The guest's output is to be held by a [`PacketGate`] that lets it out when the secondary has
    /// the checkpoint. With [`NoGate`](crate::NoGate) what the world has heard since the last
    /// complete checkpoint may be contradicted after a failover, as it may be without local-copy
    /// resume. Disk replication has to keep apart what the guest writes after
    /// [`Replication::checkpoint`] until the checkpoint is complete.
    ///
    /// # Errors
    /// [`LinkError::OtherRam`].
    pub fn resume_on_local_copy(mut self, staged: Arc<StagedRam>) -> Result<Self, LinkError> {
        if !std::ptr::addr_eq(Arc::as_ptr(self.ram.ram()), Arc::as_ptr(&staged)) {
            return Err(LinkError::OtherRam);
        }
        self.resume = ResumeBy::Copied(staged);
        Ok(self)
    }
}

/// Why COLO cannot follow a migration. The guest has been taken over by the destination then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The secondary answers on the return path.
    #[error("colo after a migration without a return path")]
    NoReturnPath,
    /// A checkpoint's differences could be to pages that the secondary does not have. QEMU accepts
    /// the combination and corrupts the secondary's memory.
    #[error("colo after a migration with xbzrle")]
    Xbzrle,
    /// What was copied would not be what is sent.
    #[error("local-copy resume with memory that the migration was not made with")]
    OtherRam,
}

impl<T, D: DirtyLog> std::fmt::Debug for PrimaryLink<T, D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrimaryLink")
            .field("out", &self.out)
            .field("ram", &self.ram)
            .finish_non_exhaustive()
    }
}

/// Runs the primary until COLO ends, in the calling thread.
///
/// The VM stands still when this is called: the migration has switched over, and nobody has let
/// the guest run since. The driver lets it run when the secondary is ready, and stops and resumes it
/// for every checkpoint; nobody else does meanwhile. It holds the guest's output by `hooks.gate` and
/// starts replication itself.
///
/// What ends COLO is reported once by [`ColoObserver::colo_exit`](crate::ColoObserver::colo_exit). With
/// [`OnPeerLoss::Wait`](crate::OnPeerLoss::Wait) the driver then waits until somebody decides:
/// [`FailoverHandle::request`](crate::FailoverHandle::request), [`ColoControl::quit`], or
/// [`FailoverHandle::stop_for_good`](crate::FailoverHandle::stop_for_good), which a heartbeat calls.
/// When this returns, the failover handle has left COLO and refuses requests; the outcome says
/// whether the VM runs, which is what a heartbeat has to be told (`colo_heartbeat::Heartbeat::colo_ended`).
///
/// # Errors
/// [`ProtocolMisuse`] is a mistake of this crate, never the peer's. It was reported by [`ColoObserver::colo_exit`](crate::ColoObserver::colo_exit)
/// as [`Cause::Mistake`](crate::Cause::Mistake). The VM is left as it was.
pub fn run_primary<T, D, V, R, G>(
    mut link: PrimaryLink<T, D>,
    hooks: &mut Hooks<V, R, G>,
    control: &ColoControl,
    config: DriverConfig,
) -> Result<Outcome, ProtocolMisuse>
where
    T: PageTransport,
    D: DirtyLog,
    V: ColoVm,
    R: Replication,
    G: PacketGate,
{
    let resume = link.resume.when();
    if let Some(when) = config.elide_unchanged {
        elide_unchanged(&mut link.ram, when);
    }
    let background = config
        .background
        .and_then(|config| Background::begin(config, &mut link.ram, control));
    let mut wire = PrimaryWire {
        link,
        background,
        patience: config.deadlines.of_message(),
        control,
        devices: Vec::new(),
    };
    run(
        Primary::resuming(resume, config.on_loss),
        &mut wire,
        hooks,
        control,
        config,
    )
}

/// From the first checkpoint on: nothing is known of what precopy has sent, whose pages need not be looked
/// at for that. COLO does not depend on it.
fn elide_unchanged<T: PageTransport, D: DirtyLog>(ram: &mut RamSender<T, D>, when: WhenToCompare) {
    match ram.leave_out_unchanged(when) {
        Ok(true) => {}
        Ok(false) => tracing::info!("all dirty pages are sent: the transport leaves out none"),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "all dirty pages are sent");
        }
    }
}

struct PrimaryWire<'a, T, D: DirtyLog> {
    link: PrimaryLink<T, D>,
    control: &'a ColoControl,
    background: Option<Background>,
    /// How long a channel may block in the background transfer.
    patience: Duration,
    /// Saved device state. Kept from checkpoint to checkpoint for its memory.
    devices: Vec<u8>,
}

impl<T: PageTransport, D: DirtyLog, V: ColoVm, R, G> Wire<V, R, G> for PrimaryWire<'_, T, D> {
    fn perform(
        &mut self,
        step: Step,
        deadline: Option<Instant>,
        hooks: &mut Hooks<V, R, G>,
        meter: &mut CheckpointMeter,
    ) -> Result<Performed, StepError> {
        if step.is_background() {
            return self.wait_until_due(meter);
        }
        let PrimaryLink {
            out,
            replies,
            ram,
            resume,
        } = &mut self.link;
        let staged = resume.staged();
        match step {
            Step::Send(message) => {
                out.set_deadline(deadline);
                out.write_bytes(&encode_message(message))?;
            }
            Step::Await(_) => {
                replies.set_read_deadline(deadline);
                return Ok(read_message(&mut **replies)?.into());
            }
            Step::SaveDevices => {
                self.devices.clear();
                save_devices(&mut hooks.vm, &mut self.devices)?;
            }
            Step::CopyRam => copy_running(ram, staged.ok_or_else(not_staged)?)?,
            Step::FreezeRam => meter.kept(ram.keep(staged.ok_or_else(not_staged)?)?),
            Step::SendRam => {
                out.set_deadline(deadline);
                ram.set_deadline(deadline);
                let before = out.offset() + ram.counters().channel_bytes;
                let pages = match staged {
                    None => ram.end(out)?,
                    Some(staged) => ram.end_kept(out, staged)?,
                };
                let mut eof = Vec::with_capacity(1);
                encode_eof(&mut eof);
                out.write_bytes(&eof)?;
                let counters = ram.counters();
                meter.ram(out.offset() + counters.channel_bytes - before, pages);
                meter.elided(counters.compared_pages, counters.unchanged_pages);
                tracing::trace!(pages, bytes = pages * PAGE_SIZE, "checkpoint ram sent");
            }
            Step::SendDevices => {
                out.set_deadline(deadline);
                let size = encode_vmstate_size(self.devices.len() as u64);
                out.write(&[Chunk::Bytes(&size), Chunk::Bytes(&self.devices)])?;
                meter.devices(self.devices.len() as u64);
            }
            // The others are not the primary's.
            _ => return Ok(Event::Failed.into()),
        }
        Ok(Event::Done.into())
    }

    fn disconnect(&mut self) {
        self.control.disconnect();
    }
}

impl<T: PageTransport, D: DirtyLog> PrimaryWire<'_, T, D> {
    /// Waits for the schedule, and notices meanwhile what the peer does: it may go away, and it has
    /// nothing to say. The background transfer goes on.
    fn wait_until_due(&mut self, meter: &mut CheckpointMeter) -> Result<Performed, StepError> {
        let PrimaryLink { replies, ram, .. } = &mut self.link;
        loop {
            let due = self.control.next_due();
            if due.is_some_and(|due| due <= Instant::now()) {
                return Ok(Event::CheckpointDue.into());
            }
            let wake = match &self.background {
                None => due,
                Some(background) => {
                    Some(due.map_or(background.next(), |due| due.min(background.next())))
                }
            };
            match replies.wait(Some(self.control.wake_fd()), wake)? {
                Readiness::TimedOut => {
                    if let Some(background) = &mut self.background {
                        let deadline = Instant::now().checked_add(self.patience);
                        let bandwidth = self.control.background_bandwidth().unwrap_or(0);
                        meter.background(background.send(ram, bandwidth, due, deadline)?);
                    }
                }
                Readiness::Channel => {
                    // Bytes are there, or the end: a read does not block.
                    replies.set_read_deadline(Some(Instant::now()));
                    return Ok(read_message(&mut **replies)?.into());
                }
                Readiness::Other => {
                    self.control.drain()?;
                    return Ok(Performed::Woken);
                }
            }
        }
    }
}

/// A copy of the running guest is good enough when so few pages were written meanwhile: they take a
/// tenth of a millisecond.
const FEW_PAGES: u64 = 128;
/// It is given up after so many rounds; a guest that writes as fast as it is copied gains nothing.
const COPY_ROUNDS: u32 = 5;

/// Copies what the guest has written, and what it wrote meanwhile, as long as that becomes less.
fn copy_running<T: PageTransport, D: DirtyLog>(
    ram: &mut RamSender<T, D>,
    staged: &StagedRam,
) -> Result<(), StepError> {
    let mut before = u64::MAX;
    for _ in 0..COPY_ROUNDS {
        let copied = ram.copy(staged)?;
        if copied <= FEW_PAGES || copied > before / 2 {
            break;
        }
        before = copied;
    }
    Ok(())
}

/// Saves all devices as a checkpoint carries them: those of before RAM first, and EOF.
fn save_devices(vm: &mut impl DeviceState, out: &mut Vec<u8>) -> Result<(), VmError> {
    let mut sections = DeviceSections::new(out, FIRST_DEVICE_SECTION, false);
    let saved = vm.save_early(&mut sections);
    saved
        .and_then(|()| vm.save(&mut sections))
        .map_err(|e| VmError::new("saving the devices", e))?;
    encode_eof(out);
    Ok(())
}

/// The machine has these steps only with local-copy resume, so this is never seen.
fn not_staged() -> VmError {
    VmError::new("copying ram", "there is no room for copies")
}

fn read_message(source: &mut dyn ByteSource) -> Result<Event, StepError> {
    let mut bytes = [0; MESSAGE_LEN];
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match source.read(rest)? {
            0 => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            n => have += n,
        }
    }
    Ok(message_event(bytes))
}
