//! What an operator can ask of a held guest.

use std::sync::Arc;

use qmp_types::{
    Command, CommandInfo, CommandKind, CommandResult, Event, MigrationAddress, QmpError,
    ShutdownCause, StatusInfo, done, returns,
};

use stream_relay::endpoint::Endpoint;

use super::Standby;
use crate::migration::peer;
use crate::monitor::{colo_status, version};
use crate::operator::Operator;

/// Carries out commands for one guest.
pub(super) struct StandbyMonitor(pub(super) Arc<Standby>);

/// The commands there are.
pub(super) const COMMANDS: &[CommandKind] = &[
    CommandKind::QmpCapabilities,
    CommandKind::QueryVersion,
    CommandKind::QueryCommands,
    CommandKind::QueryStatus,
    CommandKind::Quit,
    CommandKind::QueryMigrate,
    CommandKind::XColoLostHeartbeat,
    CommandKind::Migrate,
    CommandKind::QueryColoStatus,
    CommandKind::XQueryColoFigures,
];

impl Operator for StandbyMonitor {
    fn execute(&self, command: Command) -> CommandResult {
        let standby = &self.0;
        match command {
            Command::QueryVersion => returns(&version()),
            Command::QueryCommands => returns(
                &COMMANDS
                    .iter()
                    .map(|kind| CommandInfo::from(*kind))
                    .collect::<Vec<_>>(),
            ),
            Command::QueryStatus => returns(&StatusInfo::from(standby.state())),
            Command::Quit => {
                let reason = ShutdownCause::HostQmpQuit;
                standby.events().publish(&Event::Shutdown {
                    guest: false,
                    reason,
                });
                standby.quit();
                done()
            }
            Command::QueryMigrate => returns(&standby.status().info()),
            Command::XColoLostHeartbeat => {
                standby.restore_requested()?;
                done()
            }
            Command::Migrate(migrate) if migrate.resume => Err(QmpError::generic(
                "Parameter 'resume' is not supported: there is no postcopy of a guest that is held",
            )),
            Command::Migrate(migrate) => {
                standby.restore_elsewhere(endpoint(&migrate.address)?)?;
                done()
            }
            Command::QueryColoStatus => returns(&colo_status(standby.failover().status())),
            Command::XQueryColoFigures => returns(&standby.observe().figures()),
            _ => Err(QmpError::generic(
                "a guest that is held has no such command",
            )),
        }
    }
}

/// Where `migrate` is to give a guest to.
fn endpoint(address: &MigrationAddress) -> Result<Endpoint, QmpError> {
    match address {
        MigrationAddress::File { filename, offset } => Ok(Endpoint::File {
            path: filename.into(),
            offset: *offset,
        }),
        other => Ok(Endpoint::Socket(peer(other)?)),
    }
}
