//! An error as QMP has it: a class, by which programs decide, and a text, for people.
//!
//! The texts are QEMU 11.1's wherever QEMU has one for the cause, because management software
//! matches on some of them.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::text::escaped;

qapi_enum! {
    /// The class of an error (`QapiErrorClass`).
    pub enum ErrorClass {
        /// Anything without a class of its own.
        GenericError = "GenericError",
        /// The command does not exist, or may not be given now.
        CommandNotFound = "CommandNotFound",
        /// A device that is not active.
        DeviceNotActive = "DeviceNotActive",
        /// A device, or a yank instance, that is not there.
        DeviceNotFound = "DeviceNotFound",
        /// KVM lacks a capability.
        KvmMissingCap = "KVMMissingCap",
    }
}

/// Why a command was refused or failed; the `error` member of a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QmpError {
    /// By which a program decides.
    pub class: ErrorClass,
    /// For people.
    pub desc: String,
}

/// What a command comes to: the value of `return`, or an error.
pub type CommandResult = Result<Value, QmpError>;

/// The result of a command that has nothing to say: an empty object.
///
/// # Errors
/// None; the type is that of every command's result.
pub fn done() -> CommandResult {
    Ok(Value::Object(serde_json::Map::new()))
}

/// The result of a command that answers with `value`.
///
/// # Errors
/// The value has no JSON form. Those of this crate all have one.
pub fn returns<T: Serialize>(value: &T) -> CommandResult {
    serde_json::to_value(value).map_err(|error| QmpError::generic(error.to_string()))
}

impl QmpError {
    /// An error of a class. What `desc` repeats of a client's input is escaped, as all that could do harm on
    /// a terminal.
    #[must_use]
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self {
            class,
            desc: escaped(&desc.into()).into_owned(),
        }
    }

    /// An error without a class of its own.
    #[must_use]
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// The command does not exist.
    #[must_use]
    pub fn command_not_found(command: &str) -> Self {
        Self::new(
            ErrorClass::CommandNotFound,
            format!("The command {command} has not been found"),
        )
    }

    /// The command cannot overtake others.
    #[must_use]
    pub fn oob_not_supported(command: &str) -> Self {
        Self::generic(format!("The command {command} does not support OOB"))
    }

    /// An argument that the command does not have. `path` is that of the argument, such as
    /// `capabilities[0].foo`.
    #[must_use]
    pub fn unexpected(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is unexpected"))
    }

    /// An argument that is not optional and is not there.
    #[must_use]
    pub fn missing(path: &str) -> Self {
        Self::generic(format!("Parameter '{path}' is missing"))
    }

    /// An argument of another JSON type than `expected`.
    #[must_use]
    pub fn wrong_type(path: &str, expected: &str) -> Self {
        Self::generic(format!(
            "Invalid parameter type for '{path}', expected: {expected}"
        ))
    }

    /// A string that is none of the values of its enumeration.
    #[must_use]
    pub fn invalid_value(name: &str, value: &str) -> Self {
        Self::generic(format!(
            "Parameter '{name}' does not accept value '{value}'"
        ))
    }

    /// A value that does not fit what the argument `expects`.
    #[must_use]
    pub fn expects(name: &str, expects: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects {expects}"))
    }

    /// A migration parameter out of its range.
    #[must_use]
    pub fn option_expects(name: &str, expects: &str) -> Self {
        Self::generic(format!("Option {name} expects {expects}"))
    }

    /// Another migration is on its way, or the VM is in COLO.
    #[must_use]
    pub fn migration_in_progress() -> Self {
        Self::generic("There's a migration process in progress")
    }

    /// `x-colo-lost-heartbeat` outside COLO.
    #[must_use]
    pub fn not_in_colo() -> Self {
        Self::generic("VM is not in COLO mode")
    }

    /// `x-colo-lost-heartbeat` a second time.
    #[must_use]
    pub fn failover_already_activated() -> Self {
        Self::generic("COLO failover is already activated")
    }

    /// `cont` inside a checkpoint.
    #[must_use]
    pub fn colo_checkpoint_in_progress() -> Self {
        Self::generic("COLO checkpoint in progress")
    }

    /// A `migrate-continue` for another moment of the migration.
    #[must_use]
    pub fn unexpected_migration_state(now: &str) -> Self {
        Self::generic(format!("Migration not in expected state: {now}"))
    }

    /// `cont` while the source hands over.
    #[must_use]
    pub fn migration_not_finalized() -> Self {
        Self::generic("Migration is not finalized yet")
    }

    /// `cont` of a guest that has shut down or failed.
    #[must_use]
    pub fn reset_required() -> Self {
        Self::generic("Resetting the Virtual Machine is required")
    }

    /// `migrate-incoming` to a VM that was not started to be migrated to.
    #[must_use]
    pub fn incoming_not_specified() -> Self {
        Self::generic("'-incoming' was not specified on the command line")
    }

    /// `migrate-incoming` a second time.
    #[must_use]
    pub fn incoming_already_started() -> Self {
        Self::generic("The incoming migration has already been started")
    }

    /// `multifd` enabled after the incoming side began to listen.
    #[must_use]
    pub fn multifd_after_incoming() -> Self {
        Self::generic("Multifd must be set before incoming starts")
    }

    /// `yank` of something that is not there.
    #[must_use]
    pub fn yank_instance_not_found() -> Self {
        Self::new(ErrorClass::DeviceNotFound, "Instance not found")
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It may have come from a server.
        write!(f, "{}: {}", self.class, escaped(&self.desc))
    }
}

impl std::error::Error for QmpError {}
