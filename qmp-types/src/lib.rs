//! The QMP commands, events and session that steer migration and COLO.
//!
//! QMP is the JSON protocol through which libvirt, scripts and people talk to QEMU. This crate has
//! the part of it that a VMM needs to be migrated and made fault tolerant by the same tools: the
//! types, spelled as in QEMU 11.1's QAPI schema, the checks with QEMU's error texts, and both ends
//! of a session as machines without I/O. It opens no socket, starts no thread, and runs no command.
//!
//! ```
//! use qmp_types::{Command, CommandKind, Event, RunState, Session, SessionConfig, StatusInfo};
//! use qmp_types::{Timestamp, VersionInfo, returns};
//! use serde_json::{Value, json};
//!
//! let mut session = Session::new(SessionConfig {
//!     version: VersionInfo::new(11, 1, 3, "my-vmm"),
//!     oob: true,
//!     commands: CommandKind::ALL,
//! });
//! assert!(session.take_output().unwrap().starts_with(br#"{"QMP": "#)); // the greeting
//!
//! // Bytes in, in pieces of any size.
//! session.feed(br#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#);
//! session.feed(br#"{"execute": "query-status", "id": 7}"#);
//!
//! // Requests out; the caller runs them and says what came of it.
//! while let Some(request) = session.poll_request() {
//!     let result = match request.command {
//!         Command::QueryStatus => returns(&StatusInfo::from(RunState::Running)),
//!         _ => unreachable!("not sent above"),
//!     };
//!     session.reply(request.id, result);
//! }
//! session.emit(&Event::Stop, Timestamp::default()).unwrap();
//!
//! // Bytes out, a line for each.
//! let output = session.take_output().unwrap();
//! let lines: Vec<Value> = output
//!     .split(|b| *b == b'\n')
//!     .filter(|line| !line.is_empty())
//!     .map(|line| serde_json::from_slice(line).unwrap())
//!     .collect();
//! assert_eq!(lines, [
//!     json!({"return": {}}),
//!     json!({"return": {"running": true, "status": "running"}, "id": 7}),
//!     json!({"timestamp": {"seconds": 0, "microseconds": 0}, "event": "STOP"}),
//! ]);
//! ```
//!
//! # Modules
//! * [`session`]: the server's end: negotiation, `id`, out-of-band commands, flow control.
//! * [`client`]: the other end, for tests and tools.
//! * [`command`], [`event`]: what is said.
//! * [`capability`], [`parameters`], [`settings`]: what a migration is told to do, with the rules
//!   about what goes together.
//! * [`address`]: where a migration goes or comes from.
//! * [`migration`], [`status`], [`yank`]: answers.
//! * [`error`]: an error as QMP has it: a class and a text.
//! * [`json`]: the JSON reader: in pieces, bounded, with positions.
#![forbid(unsafe_code)]

#[macro_use]
mod visit;

pub mod address;
pub mod capability;
pub mod client;
pub mod command;
pub mod error;
pub mod event;
pub mod heartbeat;
pub mod json;
pub mod migration;
pub mod parameters;
pub mod session;
pub mod settings;
pub mod status;
mod text;
pub mod yank;

pub use address::{InetSocketAddress, MigrationAddress, SocketAddress};
pub use capability::{Capabilities, MigrationCapability, MigrationCapabilityStatus};
pub use client::{Client, ClientError, EventMessage, Greeting, ServerMessage};
pub use command::{Command, CommandInfo, CommandKind, Migrate, MigrateIncoming, QmpCapability};
pub use error::{CommandResult, ErrorClass, QmpError, done, returns};
pub use event::{ColoCheckpoint, ColoCheckpointStep, Event, ShutdownCause, Timestamp};
pub use heartbeat::ColoHeartbeat;
pub use migration::{
    ColoExitReason, ColoFigures, ColoMode, ColoStatus, LastCheckpoint, MigrationInfo,
    MigrationRamInfo, MigrationStatus, XbzrleCacheInfo,
};
pub use parameters::{
    MigMode, MigrateSetParameters, MultiFdCompression, Parameters, ZeroPageDetection,
};
pub use session::{OutputFull, Request, RequestId, Session, SessionConfig};
pub use settings::{Settings, Support};
pub use status::{QemuVersion, RunState, StatusInfo, VersionInfo};
pub use yank::YankInstance;

/// Keeps the README's example compiling.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
