//! Fault tolerance for guests of QEMU without a running twin: COLO's secondary, that holds the guest
//! and does not run it.
//!
//! ```text
//!   QEMU, x-colo                    Standby                              a fresh QEMU
//!   precopy          ------------>  memory, devices as they are
//!   checkpoint       ------------>  into the cache, checked
//!                    <------------  vmstate-received; committed: memory and devices together
//!   ...
//!   dies                            lost: the last complete checkpoint
//!                                   precopy                 ---------->  -incoming: goes on
//! ```
//!
//! What it promises: when the primary is lost the guest goes on from its last *complete* checkpoint,
//! memory and devices of that one and of no other. What the guest did after it is undone, although
//! others may have seen its output: a reply on the network, a block on a shared disk. Full COLO, a
//! secondary that runs the guest too and whose output is compared with the primary's, lets nothing
//! out that the survivor would contradict; this does not.
//!
//! The other side of a broken connection may be alive. QEMU's primary goes on running its guest when
//! its secondary is gone, so **whoever restores a guest has to see to it that the primary is dead**
//! (fencing): with [`OnPeerLoss::Wait`] an operator does and says `x-colo-lost-heartbeat`, with
//! [`OnPeerLoss::TakeOver`] the restore command does or nobody. It is never taken for lost because of
//! something that went wrong on this side, or that it said: then an operator decides.
//!
//! Each guest is a [`Standby`] with a thread, an address, memory and a QMP server of its own. They
//! share the process and nothing else.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | a guest's way: waiting, held, restored |
//! | `incoming.rs` | from the primary's connection to the beginning of COLO |
//! | `held.rs` | what COLO sees of a guest that does not run |
//! | `restore.rs` | into a fresh QEMU |
//! | `monitor.rs`, `args.rs` | what an operator can say, by QMP and on the command line |

mod args;
mod held;
mod incoming;
mod monitor;
mod restore;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use colo_core::driver::{ColoControl, DriverConfig, Hooks, SecondaryLink, run_secondary};
use colo_core::{
    Cause, CheckpointReport, ColoExit, Deadlines, ExitReason, FailoverHandle, NoGate,
    NoReplication, OnPeerLoss, Outcome, ProtocolMisuse, Role,
};
use migration_net::incoming::{Acceptor, IncomingError, Limits};
use migration_net::{Address, AddressError, Listener};
use migration_stream::io::CancelToken;
use multifd::MultifdConfig;
use qmp_types::{
    ColoExitReason, ColoMode, Event, MigrationStatus, QmpError, RunState, SocketAddress,
};
use ram_cache::FlushPool;
use stream_relay::endpoint::Endpoint;
use stream_relay::guest::Guest;

pub use self::args::{StandbyArgs, run};
use self::held::{HeldVm, Untouched};
pub use self::incoming::TakeError;
use self::incoming::{Arrived, take};
pub use self::restore::{Destination, RestoreConfig, RestoreError};
use crate::error_chain::chain;
use crate::figures::{Decider, Failover, Figures, Observation};
use crate::migration::{Connections, Status, checkpoint_event, qmp_addresses};
use crate::monitor::colo_status;
use crate::operator::EventBus;

/// How one guest is held.
#[derive(Clone, Debug)]
pub struct StandbyConfig {
    /// What it is called in messages.
    pub name: String,
    /// Where its primary migrates to.
    pub incoming: Address,
    /// The primary's multifd channels, if it has the capability.
    pub multifd: Option<MultifdConfig>,
    /// How much memory it may have, bytes. The cache takes as much again of what is used.
    pub max_memory: u64,
    /// How much device state it may have, bytes.
    pub max_device_state: usize,
    /// How long the primary may be silent.
    pub deadlines: Deadlines,
    /// The same before COLO begins.
    pub io_limit: Duration,
    /// How long the primary may say nothing between two items of its stream before COLO begins, where
    /// its operator may let its guest stand still (`pause-before-switchover`).
    pub pause_limit: Duration,
    /// What to do when the primary is lost.
    pub on_loss: OnPeerLoss,
    /// Into what it is restored.
    pub restore: RestoreConfig,
}

/// One guest: waited for, held, restored.
pub struct Standby {
    config: StandbyConfig,
    /// Where it listens; taken by the thread that runs it.
    door: Mutex<Option<Acceptor>>,
    address: Address,
    /// All addresses that it listens at, in numbers.
    listening: Vec<SocketAddress>,
    events: Arc<EventBus>,
    status: Status,
    figures: Figures,
    failover: FailoverHandle,
    connections: Connections,
    /// The connections were cut on this side, for something that came on them.
    is_refused: Arc<AtomicBool>,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Cancelled when the guest is not wanted any more, with `inner` locked.
    quit: CancelToken,
}

struct Inner {
    state: RunState,
    colo: Option<ColoControl>,
    /// An operator wants a restore tried again that has failed.
    retry: Option<Retry>,
    /// Whether one has failed and is waited with.
    has_failed: bool,
}

/// Where a guest is to be restored that was not.
enum Retry {
    /// Where it was not.
    There,
    /// Somewhere else.
    Elsewhere(Endpoint),
}

/// What became of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It goes on in a fresh QEMU.
    Restored,
    /// An operator ended this.
    Quit,
    /// It was lost: what is here is no state of it.
    Lost,
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Restored => "restored",
            Self::Quit => "quit",
            Self::Lost => "lost",
        })
    }
}

impl Standby {
    /// Listens for the guest's primary.
    ///
    /// # Errors
    /// The address cannot be had, or the host has no descriptors.
    pub fn open(config: StandbyConfig) -> Result<Arc<Self>, OpenError> {
        let listener = Listener::bind(&config.incoming)?;
        let address = listener.address().clone();
        let listening = qmp_addresses(&listener);
        let limits = Limits::default()
            .complete(config.io_limit)
            .channel(config.io_limit);
        let name = config.name.clone();
        let acceptor = Acceptor::new(listener, config.multifd.as_ref(), limits)?.on_refused(
            move |refusal| tracing::warn!(guest = name, %refusal, "connection refused"),
        );
        let quit = CancelToken::new()?;
        let events = Arc::new(EventBus::new());
        Ok(Arc::new(Self {
            door: Mutex::new(Some(acceptor)),
            address,
            listening,
            status: Status::new(Arc::clone(&events), Arc::default()),
            events,
            figures: Figures::default(),
            failover: FailoverHandle::new(),
            connections: Connections::default(),
            is_refused: Arc::default(),
            inner: Mutex::new(Inner {
                state: RunState::InMigrate,
                colo: None,
                retry: None,
                has_failed: false,
            }),
            changed: Condvar::new(),
            quit,
            config,
        }))
    }

    /// What the guest is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Where the primary is to migrate to, with the port that the system chose if none was asked
    /// for.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// Where its events go.
    #[must_use]
    pub const fn events(&self) -> &Arc<EventBus> {
        &self.events
    }

    /// `inmigrate` until COLO begins, `paused` while the guest is held, `postmigrate` once it was
    /// restored, `internal-error` if it was lost.
    #[must_use]
    pub fn state(&self) -> RunState {
        self.lock().state
    }

    /// Waits for the guest, holds it and restores it. Returns when there is nothing left to do for
    /// it.
    pub fn run(self: &Arc<Self>) -> Ending {
        let mut door = lock(&self.door).take();
        loop {
            self.status.begin(true, self.listening.clone());
            let held = self
                .arrive(&mut door)
                .and_then(|arrived| self.hold(arrived, &mut door));
            match held {
                Ok((_, Ok(Outcome::Quit))) => return self.unwanted(),
                Ok((guest, Ok(Outcome::TookOver))) => return self.restore(&guest),
                Ok((_, Ok(Outcome::Broken(cause)))) => return self.lost(&cause),
                Ok((_, Err(error))) => return self.lost(&error),
                Err(_) if self.is_unwanted() => return self.unwanted(),
                Err(error) => {
                    // The guest runs on at its primary, which may try again.
                    let fault = self.connections.fault();
                    let error = fault.unwrap_or_else(|| chain(&error));
                    tracing::warn!(guest = self.name(), error, "no guest was taken");
                    self.status.fail(MigrationStatus::Failed, error);
                    self.connections.shut();
                    self.connections.clear();
                    self.is_refused.store(false, Ordering::Release);
                    if door.is_none() {
                        return Ending::Lost;
                    }
                }
            }
        }
    }

    /// The guest is not wanted any more: what is held of it is dropped. Its primary, if it lives,
    /// goes on without a secondary.
    pub fn quit(&self) {
        let inner = self.lock();
        // First: COLO is not to take the cancel of its connections for a lost primary.
        if let Some(colo) = &inner.colo {
            colo.quit();
        }
        self.quit.cancel();
        drop(inner);
        self.changed.notify_all();
    }

    fn is_unwanted(&self) -> bool {
        self.quit.is_cancelled()
    }

    fn unwanted(&self) -> Ending {
        self.connections.shut();
        self.connections.clear();
        self.status.set(MigrationStatus::Cancelled);
        Ending::Quit
    }

    /// A commit broke off half way, or worse. What is held is a mixture, and never restored.
    fn lost(&self, error: &dyn std::error::Error) -> Ending {
        let error = chain(error);
        tracing::error!(guest = self.name(), error, "the guest is lost");
        self.set_state(RunState::InternalError);
        self.status.fail(MigrationStatus::Failed, error);
        self.connections.shut();
        Ending::Lost
    }

    /// A guest that was taken, and not confirmed.
    fn arrive(&self, door: &mut Option<Acceptor>) -> Result<Arrived, TakeError> {
        let Some(door) = door else {
            return Err(TakeError::Accept(IncomingError::Cancelled));
        };
        let connected = loop {
            match door.accept(Some(&self.quit)) {
                Err(error) if error.is_of_the_source() => {
                    self.status.note_error(chain(&error));
                }
                other => break other?,
            }
        };
        self.connections.add(&connected.main);
        for channel in &connected.channels {
            self.connections.add(channel);
        }
        self.status.set(MigrationStatus::Active);
        take(
            connected,
            &self.config,
            &self.connections,
            &self.is_refused,
            &self.quit,
        )
    }

    /// COLO, from its first message to its end. An error leaves the guest to its primary; afterwards
    /// it is what COLO has made of it.
    fn hold(
        self: &Arc<Self>,
        arrived: Arrived,
        door: &mut Option<Acceptor>,
    ) -> Result<(Guest, Result<Outcome, ProtocolMisuse>), TakeError> {
        let Arrived {
            guest,
            loaded,
            pages,
        } = arrived;
        let pool = FlushPool::for_this_host()?;
        let connections = self.connections.clone();
        let control = ColoControl::new(
            Role::Secondary,
            self.failover.clone(),
            // It is the primary that counts it.
            Duration::MAX,
            move || connections.shut(),
        )?;
        // From here on nothing ends this but COLO's own end.
        let receiver = loaded.confirm_into_checkpoints()?;
        // Nobody else is let in.
        *door = None;
        {
            let mut inner = self.lock();
            inner.state = RunState::Paused;
            inner.colo = Some(control.clone());
            if self.is_unwanted() {
                control.quit();
            }
        }
        self.status.set(MigrationStatus::Colo);
        let link = SecondaryLink::new((receiver, pages), Untouched, pool);
        let mut parts = Hooks {
            vm: HeldVm::new(Arc::clone(self), guest),
            replication: NoReplication,
            gate: NoGate,
        };
        let config = DriverConfig::default()
            .deadlines(self.config.deadlines)
            // Whether a loss is one is decided when it is known what it is: see `colo_exit`.
            .on_loss(OnPeerLoss::Wait)
            .max_device_state(self.config.max_device_state);
        let outcome = run_secondary(link, &mut parts, &control, config);
        self.lock().colo = None;
        self.connections.clear();
        Ok((parts.vm.into_guest(), outcome))
    }

    /// COLO has ended, and what becomes of the guest is not decided yet unless somebody asked for
    /// it.
    fn colo_exit(&self, exit: &ColoExit) {
        let name = self.name();
        let reason = match exit.reason() {
            ExitReason::Request => ColoExitReason::Request,
            ExitReason::Error => ColoExitReason::Error,
        };
        if exit.reason() == ExitReason::Error {
            let cause = match self.connections.fault() {
                None => chain(&exit.cause),
                Some(fault) => format!("{}: {fault}", chain(&exit.cause)),
            };
            self.status.fail(MigrationStatus::Failing, cause);
        }
        self.figures.ended(&exit.cause);
        tracing::info!(
            guest = name,
            role = %exit.role,
            reason = %exit.reason(),
            cause = %exit.cause,
            "colo has ended"
        );
        self.events.publish(&Event::ColoExit {
            mode: ColoMode::Secondary,
            reason,
        });
        let is_lost = matches!(
            exit.cause,
            Cause::PeerLost { .. } | Cause::DeadlineExpired { .. }
        ) && !self.is_refused.load(Ordering::Acquire);
        if is_lost && self.config.on_loss == OnPeerLoss::TakeOver {
            // It is refused when an operator was faster.
            let _ = self.failover.request();
        } else if exit.reason() == ExitReason::Error {
            tracing::warn!(
                guest = name,
                "the guest is held until x-colo-lost-heartbeat says that its primary is dead"
            );
        }
    }

    fn checkpoint_done(&self, report: &CheckpointReport) {
        self.figures.note(report);
        let event = checkpoint_event(Role::Secondary, report);
        self.events.publish(&Event::ColoCheckpoint(Box::new(event)));
    }

    /// Restores the guest, as often as an operator wants it tried.
    fn restore(&self, guest: &Guest) -> Ending {
        let (name, mut config) = (self.name(), self.config.restore.clone());
        loop {
            tracing::info!(guest = name, into = %config.into, "restoring the guest");
            match config.restore(guest, name) {
                Ok(figures) => {
                    let Failover { cause, decided_by } = self.figures.went_on(Decider::Policy);
                    tracing::warn!(
                        guest = name,
                        cause,
                        decided_by,
                        ?figures,
                        "the guest goes on"
                    );
                    self.set_state(RunState::PostMigrate);
                    self.status.set(MigrationStatus::Completed);
                    return Ending::Restored;
                }
                Err(error) => {
                    let uncertain = error.is_uncertain();
                    let error = chain(&error);
                    if uncertain {
                        tracing::error!(
                            guest = name,
                            error,
                            "the fresh QEMU may run the guest or not; it is still held. If the fresh \
                             QEMU is dead, x-colo-lost-heartbeat tries again, migrate elsewhere"
                        );
                    } else {
                        tracing::error!(
                            guest = name,
                            error,
                            "the guest was not restored and is still held; x-colo-lost-heartbeat \
                             tries again, migrate elsewhere"
                        );
                    }
                    // Who hears of the failure may answer at once.
                    self.lock().has_failed = true;
                    self.status.fail(MigrationStatus::Failed, error);
                }
            }
            match self.wait_for_retry() {
                None => return Ending::Quit,
                Some(Retry::There) => {}
                Some(Retry::Elsewhere(endpoint)) => {
                    if matches!(endpoint, Endpoint::File { .. }) {
                        config.channels = None;
                    }
                    config.into = Destination::Waiting(endpoint);
                }
            }
            self.status.set(MigrationStatus::Failing);
        }
    }

    /// Waits until an operator wants another attempt; `None` if none is wanted.
    fn wait_for_retry(&self) -> Option<Retry> {
        let mut inner = self
            .changed
            .wait_while(self.lock(), |inner| {
                !self.is_unwanted() && inner.retry.is_none()
            })
            .unwrap_or_else(PoisonError::into_inner);
        inner.has_failed = false;
        let retry = inner.retry.take();
        retry.filter(|_| !self.is_unwanted())
    }

    /// `x-colo-lost-heartbeat`: the primary is dead, and the guest is to go on.
    fn restore_requested(&self) -> Result<(), QmpError> {
        if self.retry(Retry::There) {
            return Ok(());
        }
        // Before, because the request may be carried out before it returns.
        self.figures.operator_asks(true);
        self.failover.request().map_err(|error| {
            self.figures.operator_asks(false);
            QmpError::generic(error.to_string())
        })
    }

    /// `migrate`: the guest, which was not restored where it was to be, is to go elsewhere.
    fn restore_elsewhere(&self, endpoint: Endpoint) -> Result<(), QmpError> {
        if self.retry(Retry::Elsewhere(endpoint)) {
            return Ok(());
        }
        Err(QmpError::generic(
            "only a guest whose restore has failed goes elsewhere",
        ))
    }

    /// Has a restore that has failed tried again; false if none has.
    fn retry(&self, retry: Retry) -> bool {
        let mut inner = self.lock();
        if inner.has_failed {
            inner.retry = Some(retry);
            self.changed.notify_all();
        }
        inner.has_failed
    }

    /// All that is known of the guest now.
    fn observe(&self) -> Observation {
        Observation {
            guest: Some(self.name().to_owned()),
            role: colo_status(self.failover.status()).mode,
            state: self.state(),
            migration: self.status.info(),
            totals: self.figures.totals(),
            heartbeat: None,
            serial: None,
        }
    }

    const fn status(&self) -> &Status {
        &self.status
    }

    const fn failover(&self) -> &FailoverHandle {
        &self.failover
    }

    fn set_state(&self, state: RunState) {
        self.lock().state = state;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Standby {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Standby")
            .field("config", &self.config)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// Why a guest cannot be waited for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Nobody can listen there.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The listening socket cannot be used.
    #[error(transparent)]
    Listen(#[from] IncomingError),
    /// The host has no descriptors.
    #[error("the host")]
    Host(#[from] io::Error),
}
