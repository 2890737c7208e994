//! What a client can ask for.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::address::{MigrationAddress, MigrationChannel, MigrationChannelType, main_address};
use crate::capability::MigrationCapabilityStatus;
use crate::error::QmpError;
use crate::migration::MigrationStatus;
use crate::parameters::MigrateSetParameters;
use crate::visit::Members;
use crate::yank::YankInstance;

qapi_enum! {
    /// The commands of this crate, without their arguments.
    pub enum CommandKind {
        /// Whether the other side lives. Not part of QEMU's schema.
        XQueryColoHeartbeat = "x-query-colo-heartbeat",
        /// Watch the secondary of a new pair. Not part of QEMU's schema.
        XSetColoHeartbeat = "x-set-colo-heartbeat",
        /// How much is sent between checkpoints. Not part of QEMU's schema.
        XSetColoGapBandwidth = "x-set-colo-gap-bandwidth",
        /// Failover without the arbiter's word; an extension of this project.
        XColoOverrideArbiter = "x-colo-override-arbiter",
        /// Ends the negotiation.
        QmpCapabilities = "qmp_capabilities",
        /// What the server is.
        QueryVersion = "query-version",
        /// What it can be asked.
        QueryCommands = "query-commands",
        /// What the VM is doing.
        QueryStatus = "query-status",
        /// Stop the vCPUs.
        Stop = "stop",
        /// Let them run.
        Cont = "cont",
        /// Reset the VM.
        SystemReset = "system_reset",
        /// End the VMM.
        Quit = "quit",
        /// Migrate the VM away.
        Migrate = "migrate",
        /// Wait for a VM to be migrated here.
        MigrateIncoming = "migrate-incoming",
        /// Give the migration up.
        MigrateCancel = "migrate_cancel",
        /// End the pause before the switch-over.
        MigrateContinue = "migrate-continue",
        /// Switch capabilities.
        MigrateSetCapabilities = "migrate-set-capabilities",
        /// Which are on.
        QueryMigrateCapabilities = "query-migrate-capabilities",
        /// Change parameters.
        MigrateSetParameters = "migrate-set-parameters",
        /// Their values.
        QueryMigrateParameters = "query-migrate-parameters",
        /// How the migration is going.
        QueryMigrate = "query-migrate",
        /// Failover: the other side is gone.
        XColoLostHeartbeat = "x-colo-lost-heartbeat",
        /// Which side of a COLO pair the VM is.
        QueryColoStatus = "query-colo-status",
        /// What its checkpoints cost; an extension of this project.
        XQueryColoFigures = "x-query-colo-figures",
        /// Cut connections that hang.
        Yank = "yank",
        /// Which there are.
        QueryYank = "query-yank",
    }
}

impl CommandKind {
    /// Whether the command may overtake those that were given before it (`exec-oob`). It must then
    /// be one that never waits.
    #[must_use]
    pub const fn supports_oob(self) -> bool {
        matches!(self, Self::Yank | Self::QueryYank)
    }
}

/// An element of the answer to `query-commands`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandInfo {
    /// The command's name.
    pub name: String,
}

impl From<CommandKind> for CommandInfo {
    fn from(kind: CommandKind) -> Self {
        Self {
            name: kind.name().to_owned(),
        }
    }
}

qapi_enum! {
    /// What a session can do beyond the basics (`QMPCapability`).
    pub enum QmpCapability {
        /// Commands out of band.
        Oob = "oob",
    }
}

/// The arguments of `migrate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migrate {
    /// Where to.
    pub address: MigrationAddress,
    /// Whether to go on with a postcopy that has lost its connection.
    pub resume: bool,
}

/// The arguments of `migrate-incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateIncoming {
    /// Where from.
    pub address: MigrationAddress,
    /// Whether the VMM ends when the migration fails. True if the client does not say.
    pub exit_on_error: bool,
}

/// A command with its arguments, all of which have been checked.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// `qmp_capabilities`. A server's session answers it and does not hand it on.
    QmpCapabilities {
        /// What to switch on.
        enable: Vec<QmpCapability>,
    },
    /// `query-version`: a [`VersionInfo`](crate::VersionInfo).
    QueryVersion,
    /// `query-commands`: a list of [`CommandInfo`].
    QueryCommands,
    /// `query-status`: a [`StatusInfo`](crate::StatusInfo).
    QueryStatus,
    /// `stop`. Stopping a VM that is stopped is no error and no event.
    Stop,
    /// `cont`. In run state `inmigrate` it says that the VM is to run after the migration.
    Cont,
    /// `system_reset`.
    SystemReset,
    /// `quit`. The event SHUTDOWN precedes the reply, then the connection ends.
    Quit,
    /// `migrate`. The reply says that it has begun; how it goes is in events and `query-migrate`.
    Migrate(Migrate),
    /// `migrate-incoming`.
    MigrateIncoming(MigrateIncoming),
    /// `migrate_cancel`. No error when there is nothing to cancel.
    MigrateCancel,
    /// `migrate-continue`.
    MigrateContinue {
        /// Where the client takes the migration to be: the server refuses it anywhere else.
        state: MigrationStatus,
    },
    /// `migrate-set-capabilities`.
    MigrateSetCapabilities {
        /// What to switch on and off.
        capabilities: Vec<MigrationCapabilityStatus>,
    },
    /// `query-migrate-capabilities`: a list of [`MigrationCapabilityStatus`].
    QueryMigrateCapabilities,
    /// `migrate-set-parameters`.
    MigrateSetParameters(Box<MigrateSetParameters>),
    /// `query-migrate-parameters`: [`Parameters`](crate::Parameters).
    QueryMigrateParameters,
    /// `query-migrate`: a [`MigrationInfo`](crate::MigrationInfo).
    QueryMigrate,
    /// `x-colo-lost-heartbeat`.
    XColoLostHeartbeat,
    /// `query-colo-status`: a [`ColoStatus`](crate::ColoStatus).
    QueryColoStatus,
    /// `x-query-colo-figures`, which QEMU does not have: a [`ColoFigures`](crate::ColoFigures).
    XQueryColoFigures,
    /// `x-colo-override-arbiter`: as `x-colo-lost-heartbeat`, without asking the arbiter first, by who
    /// knows that the other side cannot run. An extension.
    XColoOverrideArbiter,
    /// `x-query-colo-heartbeat`: a [`ColoHeartbeat`](crate::ColoHeartbeat), an extension.
    XQueryColoHeartbeat,
    /// `x-set-colo-heartbeat`, an extension: the survivor of a pair is to watch a new secondary.
    XSetColoHeartbeat {
        /// Where the secondary's heartbeat listens: `uri` on the wire.
        address: MigrationAddress,
    },
    /// `x-set-colo-gap-bandwidth`, an extension: the most that a primary sends between checkpoints.
    XSetColoGapBandwidth {
        /// Bytes a second, 0 for no limit.
        bandwidth: u64,
    },
    /// `yank`. All instances are looked for before any is yanked.
    Yank {
        /// Which.
        instances: Vec<YankInstance>,
    },
    /// `query-yank`: a list of [`YankInstance`].
    QueryYank,
}

impl Command {
    /// A command out of its kind and arguments.
    ///
    /// # Errors
    /// An argument that is missing, not one of the command's, or not of its type: in QEMU's words.
    pub fn parse(kind: CommandKind, arguments: Map<String, Value>) -> Result<Self, QmpError> {
        let mut members = Members::arguments(arguments);
        let this = match kind {
            CommandKind::QmpCapabilities => {
                let enable: Option<_> = members.take("enable")?;
                Self::QmpCapabilities {
                    enable: enable.unwrap_or_default(),
                }
            }
            CommandKind::QueryVersion => Self::QueryVersion,
            CommandKind::QueryCommands => Self::QueryCommands,
            CommandKind::QueryStatus => Self::QueryStatus,
            CommandKind::Stop => Self::Stop,
            CommandKind::Cont => Self::Cont,
            CommandKind::SystemReset => Self::SystemReset,
            CommandKind::Quit => Self::Quit,
            CommandKind::Migrate => {
                let (uri, channels) = (members.take("uri")?, members.take("channels")?);
                let resume: Option<bool> = members.take("resume")?;
                members.finish()?;
                return Ok(Self::Migrate(Migrate {
                    address: main_address(uri, channels)?,
                    resume: resume.unwrap_or(false),
                }));
            }
            CommandKind::MigrateIncoming => {
                let (uri, channels) = (members.take("uri")?, members.take("channels")?);
                let exit_on_error: Option<bool> = members.take("exit-on-error")?;
                members.finish()?;
                return Ok(Self::MigrateIncoming(MigrateIncoming {
                    address: main_address(uri, channels)?,
                    exit_on_error: exit_on_error.unwrap_or(true),
                }));
            }
            CommandKind::MigrateCancel => Self::MigrateCancel,
            CommandKind::MigrateContinue => Self::MigrateContinue {
                state: members.take("state")?,
            },
            CommandKind::MigrateSetCapabilities => Self::MigrateSetCapabilities {
                capabilities: members.take("capabilities")?,
            },
            CommandKind::QueryMigrateCapabilities => Self::QueryMigrateCapabilities,
            CommandKind::MigrateSetParameters => {
                return MigrateSetParameters::take(members)
                    .map(|changes| Self::MigrateSetParameters(Box::new(changes)));
            }
            CommandKind::QueryMigrateParameters => Self::QueryMigrateParameters,
            CommandKind::QueryMigrate => Self::QueryMigrate,
            CommandKind::XColoLostHeartbeat => Self::XColoLostHeartbeat,
            CommandKind::QueryColoStatus => Self::QueryColoStatus,
            CommandKind::XQueryColoFigures => Self::XQueryColoFigures,
            CommandKind::XColoOverrideArbiter => Self::XColoOverrideArbiter,
            CommandKind::XQueryColoHeartbeat => Self::XQueryColoHeartbeat,
            CommandKind::XSetColoHeartbeat => {
                let uri: String = members.take("uri")?;
                members.finish()?;
                let address = uri.parse()?;
                return Ok(Self::XSetColoHeartbeat { address });
            }
            CommandKind::XSetColoGapBandwidth => Self::XSetColoGapBandwidth {
                bandwidth: members.take("bandwidth")?,
            },
            CommandKind::Yank => Self::Yank {
                instances: members.take("instances")?,
            },
            CommandKind::QueryYank => Self::QueryYank,
        };
        members.finish()?;
        Ok(this)
    }

    /// Which command it is.
    #[must_use]
    pub fn kind(&self) -> CommandKind {
        match self {
            Self::QmpCapabilities { .. } => CommandKind::QmpCapabilities,
            Self::QueryVersion => CommandKind::QueryVersion,
            Self::QueryCommands => CommandKind::QueryCommands,
            Self::QueryStatus => CommandKind::QueryStatus,
            Self::Stop => CommandKind::Stop,
            Self::Cont => CommandKind::Cont,
            Self::SystemReset => CommandKind::SystemReset,
            Self::Quit => CommandKind::Quit,
            Self::Migrate(_) => CommandKind::Migrate,
            Self::MigrateIncoming(_) => CommandKind::MigrateIncoming,
            Self::MigrateCancel => CommandKind::MigrateCancel,
            Self::MigrateContinue { .. } => CommandKind::MigrateContinue,
            Self::MigrateSetCapabilities { .. } => CommandKind::MigrateSetCapabilities,
            Self::QueryMigrateCapabilities => CommandKind::QueryMigrateCapabilities,
            Self::MigrateSetParameters(_) => CommandKind::MigrateSetParameters,
            Self::QueryMigrateParameters => CommandKind::QueryMigrateParameters,
            Self::QueryMigrate => CommandKind::QueryMigrate,
            Self::XColoLostHeartbeat => CommandKind::XColoLostHeartbeat,
            Self::QueryColoStatus => CommandKind::QueryColoStatus,
            Self::XQueryColoFigures => CommandKind::XQueryColoFigures,
            Self::XColoOverrideArbiter => CommandKind::XColoOverrideArbiter,
            Self::XQueryColoHeartbeat => CommandKind::XQueryColoHeartbeat,
            Self::XSetColoHeartbeat { .. } => CommandKind::XSetColoHeartbeat,
            Self::XSetColoGapBandwidth { .. } => CommandKind::XSetColoGapBandwidth,
            Self::Yank { .. } => CommandKind::Yank,
            Self::QueryYank => CommandKind::QueryYank,
        }
    }

    /// The arguments as they go over the wire; `None` if there are none.
    #[must_use]
    pub fn arguments(&self) -> Option<Value> {
        match self {
            Self::QmpCapabilities { enable } if enable.is_empty() => None,
            Self::QmpCapabilities { enable } => Some(json!({ "enable": enable })),
            Self::Migrate(migrate) => {
                let mut arguments = address(&migrate.address);
                if migrate.resume {
                    arguments["resume"] = true.into();
                }
                Some(arguments)
            }
            Self::MigrateIncoming(incoming) => {
                let mut arguments = address(&incoming.address);
                if !incoming.exit_on_error {
                    arguments["exit-on-error"] = false.into();
                }
                Some(arguments)
            }
            Self::MigrateContinue { state } => Some(json!({ "state": state })),
            Self::MigrateSetCapabilities { capabilities } => {
                Some(json!({ "capabilities": capabilities }))
            }
            Self::MigrateSetParameters(changes) => Some(json!(changes)),
            Self::XSetColoGapBandwidth { bandwidth } => Some(json!({ "bandwidth": bandwidth })),
            Self::Yank { instances } => Some(json!({ "instances": instances })),
            Self::XSetColoHeartbeat { address } => Some(json!({ "uri": address.uri() })),
            Self::QueryVersion
            | Self::QueryCommands
            | Self::QueryStatus
            | Self::Stop
            | Self::Cont
            | Self::SystemReset
            | Self::Quit
            | Self::MigrateCancel
            | Self::QueryMigrateCapabilities
            | Self::QueryMigrateParameters
            | Self::QueryMigrate
            | Self::XColoLostHeartbeat
            | Self::QueryColoStatus
            | Self::XQueryColoFigures
            | Self::XColoOverrideArbiter
            | Self::XQueryColoHeartbeat
            | Self::QueryYank => None,
        }
    }
}

/// An address as an argument: the URI if there is one, which every QEMU understands, otherwise
/// `channels`, which are there since QEMU 8.2.
fn address(address: &MigrationAddress) -> Value {
    if address.has_uri() {
        return json!({ "uri": address.uri() });
    }
    json!({ "channels": [MigrationChannel {
        channel_type: MigrationChannelType::Main,
        addr: address.clone(),
    }] })
}
