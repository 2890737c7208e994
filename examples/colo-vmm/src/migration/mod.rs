//! Migration and COLO for this VMM: what an embedder writes around the crates.
//!
//! One [`Migration`] belongs to a VM for its life. A command starts a thread for the outgoing or the
//! incoming side (`outgoing.rs`, `incoming.rs`); with `x-colo` the same thread goes on as the primary
//! or the secondary (`colo.rs`). Commands never wait for it: they look at `status.rs`, cancel its token, or
//! shut the connections (`yank`).

mod address;
mod boundary;
mod cancel;
mod colo;
mod connections;
mod devices;
mod gap;
mod global_state;
mod incoming;
mod options;
mod outgoing;
mod plan;
mod status;
mod uncertain;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use colo_core::FailoverHandle;
use colo_core::driver::ColoControl;
use colo_heartbeat::{Endpoint, Failover, Heartbeat, Phase, TakeOverError};
use migration_stream::BoxError;
use migration_stream::Escaped;
use migration_stream::precopy::Limits;
use qmp_types::{
    MigrationAddress, MigrationCapability, MigrationStatus, QmpError, RunState, Settings,
    SocketAddress,
};
use ram_cache::DiscardControl;

use self::address::listening_address;
pub(crate) use self::address::{peer, qmp_addresses, socket_address};
pub use self::boundary::{Boundaries, Boundary, Halt};
use self::cancel::Cancel;
pub(crate) use self::colo::checkpoint_event;
pub(crate) use self::connections::Connections;
use self::global_state::GlobalState;
pub use self::options::MigrationOptions;
use self::plan::{SUPPORT, limits};
pub(crate) use self::status::Status;
use crate::console::Console;
use crate::error_chain::chain;
use crate::figures::{Figures, Observation};
use crate::monitor::colo_status;
use crate::vm::Vm;

/// Whether, and how, this VM was started to be migrated into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IncomingMode {
    /// It has a guest of its own.
    None,
    /// `--incoming`: it waits for `migrate-incoming`.
    Deferred,
    /// That has come.
    Started,
}

/// Migration of one VM.
pub struct Migration {
    vm: Arc<Vm>,
    console: Console,
    options: MigrationOptions,
    settings: Mutex<Settings>,
    status: Status,
    limits: Arc<Limits>,
    failover: FailoverHandle,
    discard: DiscardControl,
    connections: Connections,
    global_state: GlobalState,
    incoming: Mutex<IncomingMode>,
    figures: Figures,
    /// As a primary, the most that is sent between checkpoints if any pages are, bytes a second.
    gap_bandwidth: AtomicU64,
    job: Mutex<Job>,
    heartbeat: OnceLock<Heartbeat>,
    /// Called when an incoming migration failed that was to end the process with it.
    on_fatal: Box<dyn Fn() + Send + Sync>,
}

/// The thread of the present migration, and how to reach it.
#[derive(Default)]
struct Job {
    thread: Option<JoinHandle<()>>,
    cancel: Option<Arc<Cancel>>,
    colo: Option<ColoControl>,
}

impl Migration {
    /// Migration of `vm`, whose serial line is `console`. `on_fatal` is called, from any thread,
    /// when the process is to end because an incoming migration failed.
    ///
    /// # Errors
    /// The VM's device tree does not take the `globalstate` section.
    pub fn new(
        vm: Arc<Vm>,
        console: Console,
        incoming: IncomingMode,
        options: MigrationOptions,
        on_fatal: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<Self>, BoxError> {
        let global_state = GlobalState::running();
        vm.with_machine(|machine| -> Result<(), BoxError> {
            let state = global_state.clone();
            Ok(machine
                .devices()?
                .register("globalstate", 0, vmstate::Priority::Low, state)?)
        })?;
        let settings = Settings::new(SUPPORT);
        Ok(Arc::new(Self {
            status: Status::new(Arc::clone(vm.events()), Arc::clone(&options.boundaries)),
            limits: Arc::new(limits(&settings)),
            settings: Mutex::new(settings),
            vm,
            console,
            gap_bandwidth: AtomicU64::new(options.gap.unwrap_or(0)),
            options,
            failover: FailoverHandle::new(),
            discard: DiscardControl::new(),
            connections: Connections::default(),
            global_state,
            figures: Figures::default(),
            incoming: Mutex::new(incoming),
            job: Mutex::default(),
            heartbeat: OnceLock::new(),
            on_fatal: Box::new(on_fatal),
        }))
    }

    /// The VM.
    #[must_use]
    pub const fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// How the migration is going.
    #[must_use]
    pub const fn status(&self) -> &Status {
        &self.status
    }

    /// The failover request and COLO's status.
    #[must_use]
    pub const fn failover(&self) -> &FailoverHandle {
        &self.failover
    }

    /// The heartbeat, if there is one.
    #[must_use]
    pub fn heartbeat(&self) -> Option<&Heartbeat> {
        self.heartbeat.get()
    }

    /// The heartbeat of this VM's pair, once.
    pub fn set_heartbeat(&self, heartbeat: Heartbeat) {
        // A second one is dropped, which ends it.
        let _ = self.heartbeat.set(heartbeat);
    }

    /// This VM has survived its pair, and is to watch the secondary of a new one, whose heartbeat
    /// listens at `address`.
    ///
    /// # Errors
    /// It has no heartbeat, or is not a survivor without a peer.
    pub fn watch_new_secondary(&self, address: &MigrationAddress) -> Result<(), QmpError> {
        let heartbeat = self.heartbeat().ok_or_else(no_heartbeat)?;
        if self.status.is_busy() {
            return Err(QmpError::migration_in_progress());
        }
        if heartbeat.report().phase != Phase::Alone {
            return Err(QmpError::generic("This VM has not gone on alone"));
        }
        let renewed = heartbeat.new_pair(peer(address)?);
        renewed.map_err(|error| QmpError::generic(error.to_string()))
    }

    /// The guest is to stand still for good: COLO, if there is any, ends.
    pub fn fence(&self, reason: &str) {
        if let Err(error) = self.vm.fence() {
            tracing::error!(%error, "a guest that must not run");
        }
        let colo = lock(&self.job).colo.clone();
        if let Some(colo) = colo {
            colo.quit();
        }
        self.status.fail(
            MigrationStatus::Failed,
            format!("the guest was stopped for good: {}", Escaped(reason)),
        );
        let reason = reason.to_owned();
        self.vm
            .events()
            .publish(&qmp_types::Event::ColoStopped { reason });
    }

    /// The guest is to stand still until [`Migration::let_run`]. COLO goes on without it.
    pub fn suspend(&self) {
        if let Err(error) = self.vm.suspend() {
            tracing::error!(%error, "a guest that must not run");
        }
    }

    /// The guest may run again.
    pub fn let_run(&self) {
        if let Err(error) = self.vm.go_on() {
            tracing::error!(%error, "a guest that may run and does not");
        }
    }

    /// Whether RAM may be discarded (ballooning); COLO forbids it from `migrate-incoming` on.
    #[must_use]
    pub const fn discard(&self) -> &DiscardControl {
        &self.discard
    }

    /// Capabilities and parameters.
    pub fn settings(&self) -> MutexGuard<'_, Settings> {
        lock(&self.settings)
    }

    /// Is this VM waiting for its guest?
    #[must_use]
    pub fn is_incoming(&self) -> bool {
        self.vm.state() == RunState::InMigrate
    }

    /// Are there connections that `yank` could cut?
    #[must_use]
    pub fn is_yankable(&self) -> bool {
        self.status.is_busy()
    }

    /// Cuts every connection to the peer. Never waits.
    pub fn yank(&self) {
        self.connections.shut();
    }

    /// Parameters were changed: those that act at once do so.
    pub fn parameters_changed(&self, checkpoint_delay: bool) {
        let (new, delay) = {
            let settings = self.settings();
            let delay = settings.parameters().x_checkpoint_delay;
            (limits(&settings), Duration::from_millis(u64::from(delay)))
        };
        self.limits.set_max_bandwidth(new.max_bandwidth());
        self.limits.set_downtime(new.downtime());
        let control = lock(&self.job).colo.clone();
        if let (true, Some(control)) = (checkpoint_delay, control) {
            control.set_checkpoint_delay(delay);
        }
    }

    /// `migrate`: starts the migration and returns.
    ///
    /// # Errors
    /// It cannot be started, in QEMU's words where QEMU has some.
    pub fn start_outgoing(self: &Arc<Self>, address: &MigrationAddress) -> Result<(), QmpError> {
        let mut job = lock(&self.job);
        if self.status.is_busy() {
            return Err(QmpError::migration_in_progress());
        }
        if self.is_incoming() {
            return Err(QmpError::generic(
                "Guest is waiting for an incoming migration",
            ));
        }
        let (plan, multifd) = self.plan()?;
        let address = peer(address)?;
        if let Some(heartbeat) = self.heartbeat().filter(|_| plan.migrate_colo()) {
            let report = heartbeat.report();
            // Where its next secondary is to be heard it cannot know.
            if report.phase == Phase::Alone && matches!(report.endpoint, Endpoint::Listen(_)) {
                return Err(QmpError::generic(
                    "The heartbeat has to be set to the new secondary's first",
                ));
            }
        }
        let cancel = self.begin(&mut job, Vec::new())?;
        let this = Arc::clone(self);
        job.thread = Some(spawn("migration", move || {
            outgoing::run(&this, &plan, multifd.as_ref(), &address, &cancel);
        })?);
        Ok(())
    }

    /// `migrate-incoming`: listens, makes the RAM cache if there is to be one, and returns.
    ///
    /// # Errors
    /// As for [`Migration::start_outgoing`]; the address is busy, RAM discard is in use, or there is
    /// no memory for the cache. The command may then be tried again.
    pub fn start_incoming(
        self: &Arc<Self>,
        address: &MigrationAddress,
        exit_on_error: bool,
    ) -> Result<(), QmpError> {
        let mut job = lock(&self.job);
        let mut mode = lock(&self.incoming);
        match *mode {
            IncomingMode::None => return Err(QmpError::incoming_not_specified()),
            IncomingMode::Started => return Err(QmpError::incoming_already_started()),
            IncomingMode::Deferred => {}
        }
        let (plan, multifd) = self.plan()?;
        let address = listening_address(address)?;
        let prepared = incoming::prepare(self, &plan, multifd, &address)
            .map_err(|e| QmpError::generic(format!("migrate-incoming: {}", chain(&*e))))?;
        let cancel = self.begin(&mut job, prepared.listening().to_vec())?;
        *mode = IncomingMode::Started;
        let this = Arc::clone(self);
        job.thread = Some(spawn("incoming", move || {
            if incoming::run(&this, &plan, prepared, &cancel) {
                return;
            }
            if exit_on_error && !cancel.is_requested() {
                (this.on_fatal)();
            } else if this.is_incoming() {
                // Nothing of the guest has begun: another may be sent.
                *lock(&this.incoming) = IncomingMode::Deferred;
            }
        })?);
        Ok(())
    }

    /// `migrate_cancel`: gives the migration up. Nothing happens when there is none.
    ///
    /// # Errors
    /// The destination may run the guest: only an operator can know.
    pub fn cancel(&self) -> Result<(), QmpError> {
        let (cancel, colo) = {
            let job = lock(&self.job);
            (job.cancel.clone(), job.colo.is_some())
        };
        if cancel.as_ref().is_some_and(|cancel| cancel.is_unknown()) {
            return Err(QmpError::generic(
                "the destination may run the guest: if it is dead, 'cont' lets the guest run on \
                 here; if it runs the guest, 'quit'",
            ));
        }
        if let Some(cancel) = cancel {
            cancel.request();
            // COLO's machines see a peer that is lost, as QEMU's do.
            if colo {
                self.connections.shut();
            }
        }
        Ok(())
    }

    /// An operator says that the destination, which did not answer, does not run the guest: lets it
    /// run on here. Returns whether there was anything to decide.
    ///
    /// # Errors
    /// The destination has confirmed after all, or the guest does not resume.
    pub fn run_here(&self) -> Result<bool, QmpError> {
        let cancel = lock(&self.job).cancel.clone();
        match cancel.filter(|cancel| cancel.is_unknown()) {
            None => Ok(false),
            Some(cancel) => cancel.run_here().map(|()| true).map_err(QmpError::generic),
        }
    }

    /// `migrate-continue`: ends the pause before the switch-over.
    ///
    /// # Errors
    /// The migration is not at `state`.
    pub fn go_on(&self, state: MigrationStatus) -> Result<(), QmpError> {
        let cancel = lock(&self.job).cancel.clone();
        let now = self.status.get().unwrap_or(MigrationStatus::None);
        if now != state {
            return Err(QmpError::unexpected_migration_state(now.name()));
        }
        if let (MigrationStatus::PreSwitchover, Some(cancel)) = (now, cancel) {
            cancel.go_on.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// The process ends: leaves COLO, gives a migration up, and waits for its thread.
    pub fn end(&self) {
        let (thread, colo) = {
            let mut job = lock(&self.job);
            (job.thread.take(), job.colo.take())
        };
        if let Some(colo) = colo {
            colo.quit();
        }
        let cancel = lock(&self.job).cancel.clone();
        if let Some(cancel) = &cancel {
            cancel.end();
            cancel.request();
        }
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the migration thread panicked");
        }
    }

    fn begin(&self, job: &mut Job, listening: Vec<SocketAddress>) -> Result<Arc<Cancel>, QmpError> {
        if let Some(thread) = job.thread.take() {
            // The status says that it is at its end.
            let _ = thread.join();
        }
        let cancel = Cancel::new().map_err(|e| QmpError::generic(format!("no pipe: {e}")))?;
        job.cancel = Some(Arc::clone(&cancel));
        job.colo = None;
        self.connections.clear();
        let events = self.settings().has(MigrationCapability::Events);
        self.status.begin(events, listening);
        Ok(cancel)
    }

    /// All that is known of the guest now.
    pub(crate) fn observe(&self) -> Observation {
        Observation {
            guest: None,
            role: colo_status(self.failover.status()).mode,
            state: self.vm.state(),
            migration: self.status.info(),
            totals: self.figures.totals(),
            heartbeat: self.heartbeat().map(Heartbeat::report),
            serial: Some((self.console.said(), self.console.held())),
        }
    }

    /// `x-colo-lost-heartbeat`: an operator has this side go on alone, by the word of the arbiter if
    /// there is one that is asked; or, `x-colo-override-arbiter`, without it.
    ///
    /// # Errors
    /// It is not in COLO, or has been told already; the arbiter refuses, or cannot be asked.
    pub fn go_on_alone(&self, by_arbiter: bool) -> Result<(), QmpError> {
        // Between the last byte sent and COLO it is the same word.
        if self.run_here()? {
            return Ok(());
        }
        // Before, because the request may be carried out before it returns.
        self.figures.operator_asks(true);
        let result = match self.heartbeat() {
            Some(heartbeat) if by_arbiter => heartbeat.take_over(),
            Some(heartbeat) => heartbeat.override_fence(),
            None => Failover::request(&self.failover).map_err(TakeOverError::Refused),
        };
        result.map_err(|error| {
            self.figures.operator_asks(false);
            not_taken_over(&error)
        })
    }
}

impl std::fmt::Debug for Migration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Migration")
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

/// What is answered where a heartbeat is asked for.
pub(crate) fn no_heartbeat() -> QmpError {
    QmpError::generic("This VM has no heartbeat")
}

fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, QmpError> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(f);
    thread.map_err(|e| QmpError::generic(format!("no thread: {e}")))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a migration ends up when it failed.
fn failed(migration: &Migration, cancel: &Cancel, error: &dyn std::error::Error) {
    if cancel.is_requested() {
        migration.status.set(MigrationStatus::Cancelled);
    } else {
        let fault = migration.connections.fault();
        migration.status.fail(
            MigrationStatus::Failed,
            fault.unwrap_or_else(|| chain(error)),
        );
    }
    migration.connections.shut();
    migration.connections.clear();
}

/// What an operator may do about it is part of the answer.
fn not_taken_over(error: &TakeOverError) -> QmpError {
    let text = chain(error);
    match error {
        TakeOverError::Unreachable(_) => QmpError::generic(format!(
            "{text}; if the other side certainly does not run, x-colo-override-arbiter goes on \
             without it"
        )),
        _ => QmpError::generic(text),
    }
}
