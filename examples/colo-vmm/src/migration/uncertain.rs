//! A hand-over whose outcome is unknown: the guest stays paused until the answer comes, or an arbiter, a policy or
//! an operator decides.
//!
//! The arbiter decides where there is one: the source claims ownership, and the heartbeat stops its
//! guest if the claim is refused. `--on-peer-loss take-over` and a heartbeat that is to take over
//! decide for this side as they do in COLO. Otherwise the operator decides: `cont` says that the
//! destination is dead, `quit` that it runs the guest.

use std::sync::mpsc::Sender;
use std::time::Duration;

use colo_core::{MigrationPlan, OnPeerLoss};
use colo_heartbeat::{Heartbeat, OnHeartbeatLoss, PeerState};
use migration_stream::precopy::{HandOver, SourceError, Unresolved};
use migration_stream::{DirtyLog, PageTransport, VmControl};
use qmp_types::{Event, MigrationStatus, RunState};

use super::outgoing::SourceSide;
use super::{Migration, chain};

/// How often the operator and the heartbeat are looked at while the answer is waited for.
const POLL: Duration = Duration::from_millis(50);

/// What an operator is told who lets the guest run here, when the answer has come after all.
const CONFIRMED: &str = "the destination has confirmed that it has the guest";

/// Where `cont` waits for its result.
pub(super) type Reply = Sender<Result<(), String>>;

/// Waits for the answer or a decision. Returns [`HandOver::Unknown`] only when the process ends.
pub(super) fn decide<T: PageTransport, D: DirtyLog>(
    vm: &mut SourceSide<'_>,
    plan: &MigrationPlan,
    unresolved: Unresolved<T, D>,
) -> HandOver<T, D> {
    let (migration, cancel) = (vm.migration, vm.cancel);
    if cancel.is_requested() {
        // Nobody waits for the answer any more: a destination that has not confirmed yet is not to.
        migration.connections.shut();
    }
    if let Some(heartbeat) = vm.heartbeat.filter(|heartbeat| is_arbitrated(heartbeat)) {
        // Before the guest runs: a refused claim stops it.
        heartbeat.claim();
        return run_here(vm, unresolved, "the arbiter is asked who runs the guest");
    }
    let policy = plan.migrate_colo() && vm.heartbeat.is_none();
    if policy && migration.options.on_peer_loss == OnPeerLoss::TakeOver {
        return run_here(vm, unresolved, "this side is to take over");
    }
    cancel.ask();
    tell(migration, &unresolved);
    let mut outcome = HandOver::Unknown(unresolved);
    loop {
        let HandOver::Unknown(unresolved) = outcome else {
            cancel.known();
            return resumed_if_failed(vm, outcome);
        };
        if cancel.is_ending() {
            return HandOver::Unknown(unresolved);
        }
        if vm.heartbeat.is_some_and(takes_over) {
            cancel.known();
            return run_here(vm, unresolved, "the heartbeat has lost the other side");
        }
        if let Some(reply) = cancel.asked_to_run() {
            // An answer that has arrived counts.
            match unresolved.wait(Duration::ZERO) {
                HandOver::Unknown(unresolved) => {
                    cancel.known();
                    let outcome = run_here(vm, unresolved, "an operator has it run on here");
                    let _ = reply.send(match &outcome {
                        HandOver::Failed(error @ SourceError::NotResumed { .. }) => {
                            Err(chain(error))
                        }
                        _ => Ok(()),
                    });
                    return outcome;
                }
                HandOver::Completed(switched) => {
                    let _ = reply.send(Err(CONFIRMED.to_owned()));
                    outcome = HandOver::Completed(switched);
                }
                refused @ HandOver::Failed(_) => {
                    let _ = reply.send(Ok(()));
                    outcome = refused;
                }
            }
            continue;
        }
        outcome = if unresolved.can_be_answered() {
            unresolved.wait(POLL)
        } else {
            std::thread::sleep(POLL);
            HandOver::Unknown(unresolved)
        };
    }
}

/// Does an arbiter say who runs the guest?
fn is_arbitrated(heartbeat: &Heartbeat) -> bool {
    let report = heartbeat.report();
    report.rhythm.on_loss == OnHeartbeatLoss::Ask && report.term.is_some()
}

/// Is this side to go on without the other, which is lost?
fn takes_over(heartbeat: &Heartbeat) -> bool {
    let report = heartbeat.report();
    report.rhythm.on_loss == OnHeartbeatLoss::TakeOver && report.peer == PeerState::Lost
}

/// Says in plain words what the operator has to decide.
fn tell<T: PageTransport, D: DirtyLog>(migration: &Migration, unresolved: &Unresolved<T, D>) {
    migration.vm.set_state(RunState::Paused);
    let error = format!(
        "the outcome is unknown: everything was sent, and the destination did not say whether it has \
         the guest ({}). The guest stays paused here. If the destination is dead, 'cont' lets the \
         guest run on here; if it runs the guest, 'quit'",
        chain(unresolved.cause())
    );
    migration
        .status
        .fail(MigrationStatus::Failing, error.clone());
    let event = Event::MigrationUnknown { reason: error };
    migration.vm.events().publish(&event);
}

/// Lets the guest run on here, after the destination can no longer be told anything.
fn run_here<T: PageTransport, D: DirtyLog>(
    vm: &mut SourceSide<'_>,
    unresolved: Unresolved<T, D>,
    why: &'static str,
) -> HandOver<T, D> {
    let cause = chain(unresolved.cause());
    tracing::warn!(%cause, why, "the outcome of the migration is unknown; the guest runs on here");
    vm.migration.connections.shut();
    resumed_if_failed(vm, HandOver::Failed(unresolved.into_error()))
}

fn resumed_if_failed<T: PageTransport, D: DirtyLog>(
    vm: &mut SourceSide<'_>,
    outcome: HandOver<T, D>,
) -> HandOver<T, D> {
    match outcome {
        HandOver::Failed(cause) => HandOver::Failed(match vm.resume() {
            Ok(_) => cause,
            Err(source) => SourceError::NotResumed {
                cause: Box::new(cause),
                source,
            },
        }),
        other => other,
    }
}
