//! What each command of an operator does.

use std::sync::Arc;

use qmp_types::{
    ColoExitReason, ColoFigures, ColoMode, ColoStatus, Command, CommandInfo, CommandKind,
    CommandResult, Event, QmpError, RunState, ShutdownCause, VersionInfo, YankInstance, done,
    returns,
};

use crate::machine::MachineError;
use crate::migration::{Migration, no_heartbeat};
use crate::operator::Operator;
use crate::vm::ContError;

/// Carries out commands.
pub struct Monitor {
    migration: Arc<Migration>,
    /// Asks the main loop to end the process.
    quit: Box<dyn Fn() + Send + Sync>,
}

/// The commands there are.
pub const COMMANDS: &[CommandKind] = &[
    CommandKind::QmpCapabilities,
    CommandKind::QueryVersion,
    CommandKind::QueryCommands,
    CommandKind::QueryStatus,
    CommandKind::Stop,
    CommandKind::Cont,
    CommandKind::SystemReset,
    CommandKind::Quit,
    CommandKind::Migrate,
    CommandKind::MigrateIncoming,
    CommandKind::MigrateCancel,
    CommandKind::MigrateContinue,
    CommandKind::MigrateSetCapabilities,
    CommandKind::QueryMigrateCapabilities,
    CommandKind::MigrateSetParameters,
    CommandKind::QueryMigrateParameters,
    CommandKind::QueryMigrate,
    CommandKind::XColoLostHeartbeat,
    CommandKind::QueryColoStatus,
    CommandKind::XQueryColoFigures,
    CommandKind::XQueryColoHeartbeat,
    CommandKind::XSetColoHeartbeat,
    CommandKind::XSetColoGapBandwidth,
    CommandKind::XColoOverrideArbiter,
    CommandKind::Yank,
    CommandKind::QueryYank,
];

/// What `query-version` and the greeting say. The numbers are those of the QEMU whose protocol this
/// is; the package says who speaks it.
#[must_use]
pub fn version() -> VersionInfo {
    VersionInfo::new(11, 1, 0, concat!("colo-vmm ", env!("CARGO_PKG_VERSION")))
}

impl Monitor {
    /// A monitor of the VM that `migration` belongs to.
    pub fn new(migration: Arc<Migration>, quit: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            migration,
            quit: Box::new(quit),
        }
    }

    fn stop(&self) -> CommandResult {
        self.migration.vm().pause().map_err(refused)?;
        done()
    }

    fn cont(&self) -> CommandResult {
        if self.migration.run_here()? {
            return done();
        }
        match self.migration.vm().cont() {
            Ok(()) => done(),
            Err(ContError::Machine(error)) => Err(refused(error)),
            Err(ContError::State { state }) => Err(match state {
                RunState::Colo => QmpError::colo_checkpoint_in_progress(),
                RunState::FinishMigrate => QmpError::migration_not_finalized(),
                _ => QmpError::reset_required(),
            }),
        }
    }

    fn yank(&self, instances: &[YankInstance]) -> CommandResult {
        let known =
            |i: &YankInstance| *i == YankInstance::Migration && self.migration.is_yankable();
        if !instances.iter().all(known) {
            return Err(QmpError::yank_instance_not_found());
        }
        if !instances.is_empty() {
            self.migration.yank();
        }
        done()
    }
}

/// What `query-colo-status` answers.
pub(crate) const fn colo_status(status: colo_core::ColoStatus) -> ColoStatus {
    ColoStatus {
        mode: mode(status.mode),
        last_mode: mode(status.last_mode),
        reason: match status.reason {
            colo_core::StatusReason::None => ColoExitReason::None,
            colo_core::StatusReason::Request => ColoExitReason::Request,
            colo_core::StatusReason::Error => ColoExitReason::Error,
            colo_core::StatusReason::Processing => ColoExitReason::Processing,
        },
    }
}

const fn mode(mode: colo_core::ColoMode) -> ColoMode {
    match mode {
        colo_core::ColoMode::None => ColoMode::None,
        colo_core::ColoMode::Primary => ColoMode::Primary,
        colo_core::ColoMode::Secondary => ColoMode::Secondary,
    }
}

fn refused(error: MachineError) -> QmpError {
    QmpError::generic(error.to_string())
}

impl Operator for Monitor {
    fn execute(&self, command: Command) -> CommandResult {
        let migration = &self.migration;
        match command {
            Command::QmpCapabilities { .. } => Err(QmpError::generic(
                "Capabilities negotiation is the session's",
            )),
            Command::QueryVersion => returns(&version()),
            Command::QueryCommands => returns(
                &COMMANDS
                    .iter()
                    .map(|kind| CommandInfo::from(*kind))
                    .collect::<Vec<_>>(),
            ),
            Command::QueryStatus => returns(&migration.vm().status()),
            Command::Stop => self.stop(),
            Command::Cont => self.cont(),
            Command::SystemReset => {
                let reset = migration.vm().reset(false);
                reset.map_err(|e| QmpError::generic(e.to_string()))?;
                done()
            }
            Command::Quit => {
                let reason = ShutdownCause::HostQmpQuit;
                migration.vm().events().publish(&Event::Shutdown {
                    guest: false,
                    reason,
                });
                (self.quit)();
                done()
            }
            Command::Migrate(migrate) if migrate.resume => Err(QmpError::generic(
                "resuming a postcopy migration is not supported by this VMM",
            )),
            Command::Migrate(migrate) => migration
                .start_outgoing(&migrate.address)
                .and_then(|()| done()),
            Command::MigrateIncoming(incoming) => migration
                .start_incoming(&incoming.address, incoming.exit_on_error)
                .and_then(|()| done()),
            Command::MigrateCancel => {
                migration.cancel()?;
                done()
            }
            Command::MigrateContinue { state } => {
                migration.go_on(state)?;
                done()
            }
            Command::MigrateSetCapabilities { capabilities } => {
                if migration.status().is_busy() {
                    return Err(QmpError::migration_in_progress());
                }
                migration.settings().set_capabilities(&capabilities)?;
                done()
            }
            Command::QueryMigrateCapabilities => {
                returns(&migration.settings().capabilities().to_list())
            }
            Command::MigrateSetParameters(changes) => {
                migration.settings().set_parameters(&changes)?;
                migration.parameters_changed(changes.x_checkpoint_delay.is_some());
                done()
            }
            Command::QueryMigrateParameters => returns(migration.settings().parameters()),
            Command::QueryMigrate => returns(&migration.status().info()),
            Command::XColoLostHeartbeat => {
                migration.go_on_alone(true)?;
                done()
            }
            Command::XColoOverrideArbiter => {
                migration.go_on_alone(false)?;
                done()
            }
            Command::XQueryColoHeartbeat => match migration.heartbeat() {
                None => Err(no_heartbeat()),
                Some(heartbeat) => returns(&crate::heartbeat::describe(&heartbeat.report())),
            },
            Command::XSetColoHeartbeat { address } => {
                migration.watch_new_secondary(&address)?;
                done()
            }
            Command::QueryColoStatus => returns(&colo_status(migration.failover().status())),
            Command::XQueryColoFigures => returns(&ColoFigures {
                gap_bandwidth: migration.gap_bandwidth(),
                ..migration.observe().figures()
            }),
            Command::XSetColoGapBandwidth { bandwidth } => {
                migration.set_gap_bandwidth(bandwidth)?;
                done()
            }
            Command::Yank { instances } => self.yank(&instances),
            Command::QueryYank => {
                let instances: &[YankInstance] = if migration.is_yankable() {
                    &[YankInstance::Migration]
                } else {
                    &[]
                };
                returns(&instances)
            }
        }
    }
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor")
            .field("migration", &self.migration)
            .finish_non_exhaustive()
    }
}
