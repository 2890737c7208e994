//! COLO: two machines in step, and a heartbeat that notices when one is gone.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use colo_core::driver::{
    ColoControl, DriverConfig, Hooks, PrimaryLink, SecondaryLink, run_primary, run_secondary,
};
use colo_core::{ColoObserver, ColoStore, FailoverHandle, NoGate, NoReplication, Outcome, Role};
use colo_heartbeat::arbiter::Manual;
use colo_heartbeat::{Endpoint, Guest, Heartbeat, OnHeartbeatLoss, Rhythm, StopReason};
use migration_net::Address;
use migration_stream::{BoxError, KvmDirtyLog};
use ram_cache::{CacheKind, DiscardControl, FlushPool};

use crate::machine::{Control, Machine};
use crate::migrate;

const EVERY: Duration = Duration::from_millis(100);

impl ColoObserver for Control {}

/// The heartbeat's hold on the guest.
struct Hold(Control);

impl Guest for Hold {
    fn stop_for_good(&self, reason: StopReason) {
        self.0.vcpu.pause();
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
    role: colo_heartbeat::Role,
    endpoint: Endpoint,
    failover: &FailoverHandle,
) -> Result<Arc<Heartbeat>, BoxError> {
    let on_loss = match role {
        colo_heartbeat::Role::Primary => OnHeartbeatLoss::Stop,
        colo_heartbeat::Role::Secondary => OnHeartbeatLoss::TakeOver,
    };
    let rhythm = Rhythm::new(role, *b"a guest's uuid..", on_loss)?;
    let hold = Arc::new(Hold(machine.vm.control.clone()));
    let manual = Box::new(Manual);
    let heartbeat = Heartbeat::start(rhythm, endpoint, failover.clone(), manual, hold)?;
    Ok(Arc::new(heartbeat))
}
// ANCHOR_END: heartbeat

/// What has become of the guest, and the heartbeat, which lasts as long as the guest.
pub type Ended = (Outcome, Arc<Heartbeat>);

// ANCHOR: primary
/// Protects the running guest by a secondary at `address`, whose heartbeat is at `beats`.
pub fn primary(
    mut machine: Machine,
    log: KvmDirtyLog,
    address: &Address,
    beats: Address,
    count: u8,
) -> Result<Ended, BoxError> {
    let failover = FailoverHandle::new();
    let endpoint = Endpoint::Connect(beats);
    let role = colo_heartbeat::Role::Primary;
    let heartbeat = heartbeat(&machine, role, endpoint, &failover)?;
    machine.vm.control.heartbeat = Some(Arc::clone(&heartbeat));
    let switched = migrate::away(&mut machine, log, address, count)?;
    let control = ColoControl::new(Role::Primary, failover, EVERY, || {})?;
    let mut hooks = Hooks {
        vm: machine.vm,
        replication: NoReplication,
        gate: NoGate,
    };
    let link = PrimaryLink::new(switched)?;
    let outcome = run_primary(link, &mut hooks, &control, DriverConfig::default())?;
    heartbeat.colo_ended(outcome);
    Ok((outcome, heartbeat))
}
// ANCHOR_END: primary

// ANCHOR: secondary
/// Waits at `address` for a guest to protect, with a heartbeat at `beats`. The guest runs here afterwards if
/// this side took over.
pub fn secondary(
    mut machine: Machine,
    log: KvmDirtyLog,
    address: &Address,
    beats: Address,
    count: u8,
) -> Result<Ended, BoxError> {
    let failover = FailoverHandle::new();
    let endpoint = Endpoint::Listen(beats);
    let role = colo_heartbeat::Role::Secondary;
    let heartbeat = heartbeat(&machine, role, endpoint, &failover)?;
    let discard = DiscardControl::new();
    let store = ColoStore::over(CacheKind::Cow, &machine.ram, discard.disable()?)?;
    let arrived = migrate::here(&mut machine, store, address, count)?;
    let settled = arrived.settle_for_checkpoints(&mut machine.vm)?;
    let pool = FlushPool::for_this_host()?;
    let control = ColoControl::new(Role::Secondary, failover, EVERY, || {})?;
    heartbeat.colo_begins();
    let (receiver, pages) = settled.confirm()?;
    let link = SecondaryLink {
        receiver,
        pages,
        log,
        pool,
    };
    // The primary's guest is the one that is heard.
    let vcpu = Arc::clone(&machine.vm.control.vcpu);
    vcpu.silent.store(true, Ordering::Relaxed);
    let mut hooks = Hooks {
        vm: machine.vm,
        replication: NoReplication,
        gate: NoGate,
    };
    let outcome = run_secondary(link, &mut hooks, &control, DriverConfig::default())?;
    vcpu.silent.store(false, Ordering::Relaxed);
    heartbeat.colo_ended(outcome);
    Ok((outcome, heartbeat))
}
// ANCHOR_END: secondary
