//! What an operator says, in its order: the procedures of QEMU's COLO document.

use std::time::{Duration, Instant};

use migration_net::Address;
use qmp_types::{
    ColoHeartbeat, ColoMode, ColoStatus, Command, Event, InetSocketAddress, Migrate,
    MigrateIncoming, MigrateSetParameters, MigrationAddress, MigrationCapability,
    MigrationCapabilityStatus, MigrationInfo, MigrationStatus, MultiFdCompression, RunState,
    SocketAddress, StatusInfo,
};

use super::progress::Precopy;
use super::remote::{Remote, RemoteError};
use crate::lossy_writer::print_error;
use crate::migration::socket_address;

/// How two sides are connected.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    pub(super) address: Address,
    pub(super) multifd: u8,
    pub(super) compression: MultiFdCompression,
    pub(super) delay: u32,
    pub(super) max_bandwidth: u64,
    /// How long the guest may stand still at the end of precopy, ms.
    pub(super) downtime_limit: u64,
    pub(super) auto_converge: bool,
    /// How long until the first checkpoint, if that is bounded.
    pub(super) limit: Option<Duration>,
}

/// Brings `primary`, whose guest runs, and `secondary`, which has none, into COLO, and waits for the
/// first checkpoint. Returns how long that took. Says on standard error how precopy is getting on if it
/// takes longer than a second.
pub(super) fn replicate(
    primary: &mut Remote,
    secondary: &mut Remote,
    connection: &Connection,
) -> Result<Duration, RemoteError> {
    let begun = Instant::now();
    for side in [&mut *secondary, &mut *primary] {
        prepare(side, connection)?;
    }
    secondary.execute(&Command::MigrateIncoming(MigrateIncoming {
        address: migration_address(&connection.address),
        exit_on_error: false,
    }))?;
    let listening: MigrationInfo = secondary.query(&Command::QueryMigrate)?;
    let address = reachable(&connection.address, listening);
    primary.execute(&Command::Migrate(Migrate {
        address,
        resume: false,
    }))?;
    // One that is later than an `Instant` can be is none.
    let deadline = connection.limit.and_then(|limit| begun.checked_add(limit));
    let mut progress = Progress {
        begun,
        precopy: Precopy::default(),
        auto_converge: connection.auto_converge,
    };
    let mut result = Ok(());
    for side in [&mut *primary, &mut *secondary] {
        result = wait_for_checkpoint(side, deadline, &mut progress);
        if result.is_err() {
            break;
        }
    }
    match result {
        Ok(()) => Ok(begun.elapsed()),
        Err(RemoteError::Deadline { name, what, .. }) => {
            // Nobody waits for it any more. That it has failed meanwhile, or its side is gone, changes
            // nothing. A pair that has come into COLO is left alone.
            if let Ok(MigrationInfo { status, .. }) = primary.query(&Command::QueryMigrate)
                && status != Some(MigrationStatus::Colo)
            {
                let _ = primary.execute(&Command::MigrateCancel);
            }
            Err(RemoteError::TooLate {
                name,
                what,
                seconds: connection.limit.unwrap_or_default().as_secs(),
                advice: (progress.precopy.advice(connection.auto_converge))
                    .unwrap_or_else(|| progress.precopy.to_string()),
            })
        }
        Err(RemoteError::State { name, what }) => Err(RemoteError::State {
            name,
            what: with_the_other(what, name, primary, secondary),
        }),
        Err(error) => Err(error),
    }
}

/// What went wrong at the side `name`, and what the other side says went wrong: one of them knows
/// more, as a rule.
fn with_the_other(
    mut what: String,
    name: &str,
    primary: &mut Remote,
    secondary: &mut Remote,
) -> String {
    let other = if name == primary.name() {
        secondary
    } else {
        primary
    };
    if let Ok(MigrationInfo {
        error_desc: Some(said),
        ..
    }) = other.query(&Command::QueryMigrate)
    {
        what.push_str(&format!("; the {}: {said}", other.name()));
    }
    what
}

/// What is said while the first checkpoint is waited for.
struct Progress {
    begun: Instant,
    precopy: Precopy,
    auto_converge: bool,
}

impl Progress {
    fn read(&mut self, info: &MigrationInfo) {
        if !self.precopy.read(self.begun.elapsed(), info) {
            return;
        }
        print_error(&self.precopy);
        if self.precopy.gets_stuck()
            && let Some(advice) = self.precopy.advice(self.auto_converge)
        {
            print_error(advice);
        }
    }
}

fn prepare(side: &mut Remote, connection: &Connection) -> Result<(), RemoteError> {
    let has_channels = connection.multifd > 0;
    let capabilities = [
        (MigrationCapability::Events, true),
        (MigrationCapability::ReturnPath, true),
        (MigrationCapability::XColo, true),
        (MigrationCapability::Multifd, has_channels),
        (MigrationCapability::AutoConverge, connection.auto_converge),
    ];
    side.execute(&Command::MigrateSetCapabilities {
        capabilities: capabilities
            .into_iter()
            // One that it does not know is only said where it is wanted.
            .filter(|(capability, state)| {
                *capability != MigrationCapability::AutoConverge || *state
            })
            .map(|(capability, state)| MigrationCapabilityStatus { capability, state })
            .collect(),
    })?;
    let parameters = MigrateSetParameters {
        x_checkpoint_delay: Some(connection.delay),
        max_bandwidth: Some(connection.max_bandwidth),
        downtime_limit: Some(connection.downtime_limit),
        multifd_channels: has_channels.then_some(connection.multifd),
        multifd_compression: has_channels.then_some(connection.compression),
        ..MigrateSetParameters::default()
    };
    side.execute(&Command::MigrateSetParameters(Box::new(parameters)))?;
    Ok(())
}

/// Where the secondary is to be found: as it was asked for, with the port that it got.
fn reachable(asked: &Address, info: MigrationInfo) -> MigrationAddress {
    let listening = info.socket_address.unwrap_or_default().into_iter().next();
    MigrationAddress::Socket(match (socket_address(asked), listening) {
        (SocketAddress::Inet(asked), Some(SocketAddress::Inet(found))) => {
            SocketAddress::Inet(InetSocketAddress {
                port: found.port,
                to: None,
                ..asked
            })
        }
        (asked, _) => asked,
    })
}

fn migration_address(address: &Address) -> MigrationAddress {
    MigrationAddress::Socket(socket_address(address))
}

fn wait_for_checkpoint(
    side: &mut Remote,
    deadline: Option<Instant>,
    progress: &mut Progress,
) -> Result<(), RemoteError> {
    side.wait_until("first checkpoint", deadline, |side| {
        let mut is_there = false;
        let mut has_left = false;
        for event in side.take_events() {
            match event {
                Event::ColoCheckpoint(_) => is_there = true,
                Event::ColoExit { .. } => has_left = true,
                _ => {}
            }
        }
        if is_there {
            return Ok(Some(()));
        }
        let info: MigrationInfo = side.query(&Command::QueryMigrate)?;
        progress.read(&info);
        let failed = [
            MigrationStatus::Failed,
            MigrationStatus::Failing,
            MigrationStatus::Cancelled,
        ];
        if has_left || info.status.is_some_and(|status| failed.contains(&status)) {
            let why = info.error_desc.unwrap_or_else(|| "COLO has ended".into());
            return Err(RemoteError::State {
                name: side.name(),
                what: format!("did not come into COLO: {why}"),
            });
        }
        Ok(None)
    })
}

/// Has `survivor` go on alone: tells it, and waits until its guest runs, or stands still because
/// somebody had stopped it. A side that is refused by its arbiter stays what it was.
pub(super) fn go_on_alone(
    survivor: &mut Remote,
    override_arbiter: bool,
) -> Result<Duration, RemoteError> {
    let begun = Instant::now();
    let colo: ColoStatus = survivor.query(&Command::QueryColoStatus)?;
    if colo.mode == ColoMode::None {
        return Err(RemoteError::State {
            name: survivor.name(),
            what: "is not in COLO".into(),
        });
    }
    // It frees itself from a peer that hangs.
    survivor.execute(if override_arbiter {
        &Command::XColoOverrideArbiter
    } else {
        &Command::XColoLostHeartbeat
    })?;
    survivor.wait("end of COLO", |side| {
        let info: MigrationInfo = side.query(&Command::QueryMigrate)?;
        if info.status == Some(MigrationStatus::Failed) {
            return Err(RemoteError::State {
                name: side.name(),
                what: format!("cannot go on: {}", info.error_desc.unwrap_or_default()),
            });
        }
        let status: StatusInfo = side.query(&Command::QueryStatus)?;
        let rests = matches!(
            status.status,
            RunState::Running | RunState::Paused | RunState::Shutdown
        );
        Ok((info.status == Some(MigrationStatus::Completed) && rests).then_some(()))
    })?;
    Ok(begun.elapsed())
}

/// Has `survivor` watch the heartbeat of `secondary`, and waits until it hears it. Either both have one
/// or neither has.
pub(super) fn watch(
    survivor: &mut Remote,
    secondary: &mut Remote,
    connection: &Connection,
) -> Result<(), RemoteError> {
    let lacks = |side: &Remote, other: &Remote| RemoteError::State {
        name: side.name(),
        what: format!("has no heartbeat, and the {} has one", other.name()),
    };
    let theirs = match (heartbeat(survivor)?, heartbeat(secondary)?) {
        (None, None) => return Ok(()),
        (Some(_), None) => return Err(lacks(secondary, survivor)),
        (None, Some(_)) => return Err(lacks(survivor, secondary)),
        (Some(_), Some(theirs)) => theirs,
    };
    let address: Address = theirs.address.parse().map_err(|_| RemoteError::State {
        name: secondary.name(),
        what: format!("has a heartbeat at {}, which is no address", theirs.address),
    })?;
    let address = migration_address(&from_outside(address, &connection.address));
    survivor.execute(&Command::XSetColoHeartbeat { address })?;
    survivor.wait("beat of the new secondary", |side| {
        let report: ColoHeartbeat = side.query(&Command::XQueryColoHeartbeat)?;
        match report.refused {
            Some(why) => Err(RemoteError::State {
                name: side.name(),
                what: format!("does not take the new secondary's heartbeat: {why}"),
            }),
            None => Ok((report.peer == "alive").then_some(())),
        }
    })
}

fn heartbeat(side: &mut Remote) -> Result<Option<ColoHeartbeat>, RemoteError> {
    match side.query(&Command::XQueryColoHeartbeat) {
        Ok(report) => Ok(Some(report)),
        Err(RemoteError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where somebody else finds what listens at `address`: one that is every address of its host is that
/// of `host`.
fn from_outside(address: Address, host: &Address) -> Address {
    match (address, host) {
        (Address::Tcp { host, port, .. }, Address::Tcp { host: known, .. })
            if ["", "0.0.0.0", "::"].contains(&host.as_str()) =>
        {
            Address::tcp(known.clone(), port)
        }
        (address, _) => address,
    }
}

/// Fails if `survivor` has a peer, or no guest.
pub(super) fn check_alone(survivor: &mut Remote) -> Result<(), RemoteError> {
    let refused = |what: String| RemoteError::State {
        name: "survivor",
        what,
    };
    let colo: ColoStatus = survivor.query(&Command::QueryColoStatus)?;
    if colo.mode != ColoMode::None {
        return Err(refused("has a peer; failover comes first".into()));
    }
    let status: StatusInfo = survivor.query(&Command::QueryStatus)?;
    match status.status {
        RunState::Running | RunState::Paused => Ok(()),
        other => Err(refused(format!("has no guest to replicate: it is {other}"))),
    }
}
