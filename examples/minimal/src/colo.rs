//! COLO: two machines in step, and a heartbeat that notices when one is gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use colo_core::driver::{
    ColoControl, DriverConfig, Hooks, PrimaryLink, SecondaryLink, run_primary, run_secondary,
};
use colo_core::{ColoObserver, ColoStore, FailoverHandle, Outcome, Role};
use colo_heartbeat::arbiter::Manual;
use colo_heartbeat::{Endpoint, Guest, Heartbeat, OnHeartbeatLoss, Rhythm, StopReason};
use migration_net::{Address, Listener, Route};
use migration_stream::precopy::{SourceEvent, SourceObserver, SourceStatus};
use migration_stream::{BoxError, KvmDirtyLog};
use ram_cache::{CacheKind, DiscardControl, FlushPool};

use crate::machine::{Control, Machine};
use crate::migrate;
use crate::vcpu::Vcpu;

const EVERY: Duration = Duration::from_millis(100);

impl ColoObserver for Control {}

// ANCHOR: observer
impl SourceObserver for Control {
    /// The devices are sent next: from then on the secondary may be in COLO.
    fn event(&mut self, event: SourceEvent) {
        if let (SourceEvent::Status(SourceStatus::Device), Some(beats)) = (event, &self.heartbeat) {
            beats.colo_begins();
        }
    }
}
// ANCHOR_END: observer

/// The guest, in the heartbeat's hands.
impl Guest for Vcpu {
    fn stop_for_good(&self, reason: StopReason) {
        self.pause();
        eprintln!("this guest stops: {reason}");
        std::process::exit(0);
    }

    // Only an arbiter suspends.
    fn suspend(&self) {}
    fn resume(&self) {}
}

// ANCHOR: heartbeat
/// The secondary goes on by itself when the primary is lost; a primary that has lost its secondary stops.
/// That is right where the two cannot lose each other and both live, as on one host; elsewhere an
/// arbiter decides.
fn heartbeat(
    machine: &Machine,
    endpoint: Endpoint,
) -> Result<(Arc<Heartbeat>, FailoverHandle), BoxError> {
    let (role, on_loss) = match endpoint {
        Endpoint::Connect(_) => (colo_heartbeat::Role::Primary, OnHeartbeatLoss::Stop),
        Endpoint::Listen(_) => (colo_heartbeat::Role::Secondary, OnHeartbeatLoss::TakeOver),
    };
    let rhythm = Rhythm::new(role, *b"a guest's uuid..", on_loss)?;
    let (failover, guest) = (FailoverHandle::new(), machine.vm.control.vcpu.clone());
    let beats = Heartbeat::start(rhythm, endpoint, failover.clone(), Box::new(Manual), guest)?;
    Ok((Arc::new(beats), failover))
}
// ANCHOR_END: heartbeat

/// What has become of the guest, and the heartbeat, which lasts as long as the guest.
pub type Ended = (Outcome, Arc<Heartbeat>);

// ANCHOR: primary
/// Protects the running guest by a secondary at `address`, whose heartbeat is at `beats`.
pub fn primary(
    route: &Route,
    mut machine: Machine,
    log: KvmDirtyLog,
    address: &Address,
    beats: Address,
) -> Result<Ended, BoxError> {
    let (heartbeat, failover) = heartbeat(&machine, Endpoint::Connect(beats))?;
    machine.vm.control.heartbeat = Some(Arc::clone(&heartbeat));
    let link = PrimaryLink::new(migrate::away(route, &mut machine, log, address)?)?;
    let control = ColoControl::new(Role::Primary, failover, EVERY, || {})?;
    let mut hooks = Hooks::alone(machine.vm);
    let outcome = run_primary(link, &mut hooks, &control, DriverConfig::default())?;
    heartbeat.colo_ended(outcome);
    Ok((outcome, heartbeat))
}
// ANCHOR_END: primary

// ANCHOR: secondary
/// Waits at `address` for a guest to protect, with a heartbeat at `beats`. The guest runs here afterwards if
/// this side took over.
pub fn secondary(
    route: &Route,
    mut machine: Machine,
    log: KvmDirtyLog,
    address: &Address,
    beats: Address,
) -> Result<Ended, BoxError> {
    let (heartbeat, failover) = heartbeat(&machine, Endpoint::Listen(beats))?;
    let discard = DiscardControl::new();
    let store = ColoStore::over(CacheKind::Cow, &machine.ram, discard.disable()?)?;
    let from = route.accept(Listener::bind(address)?)?;
    let arrived = route.receive(from, store, &mut machine.vm)?;
    let settled = arrived.settle_for_checkpoints(&mut machine.vm)?;
    let pool = FlushPool::for_this_host()?;
    let control = ColoControl::new(Role::Secondary, failover, EVERY, || {})?;
    heartbeat.colo_begins();
    let link = SecondaryLink::new(settled.confirm()?, log, pool);
    // The primary's guest is the one that is heard.
    let vcpu = Arc::clone(&machine.vm.control.vcpu);
    vcpu.silent.store(true, Ordering::Relaxed);
    let mut hooks = Hooks::alone(machine.vm);
    let outcome = run_secondary(link, &mut hooks, &control, DriverConfig::default())?;
    vcpu.silent.store(false, Ordering::Relaxed);
    heartbeat.colo_ended(outcome);
    Ok((outcome, heartbeat))
}
// ANCHOR_END: secondary
