//! Precopy live migration: the source iterates over guest memory while the guest runs, stops it and
//! switches over; the target loads.
//!
//! ```text
//! source                                     target
//! header, configuration,
//! OPEN_RETURN_PATH, PING          ->
//! START ram (block list)          ->
//!                                 <-         PONG
//! PART ram ... while the guest runs ->       pages into the store
//! [guest stops]
//! SWITCHOVER_START, END ram,
//! FULL devices, EOF, description  ->
//!                                 <-         SHUT(0): everything is loaded
//! ```
//!
//! Nothing here knows a socket, a thread or a hypervisor: see [`crate::io`], [`PageTransport`],
//! [`PageStore`], [`GuestRam`], [`DirtyLog`] for what is plugged in.
//!
//! [`PageTransport`]: crate::PageTransport
//! [`PageStore`]: crate::PageStore
//! [`GuestRam`]: crate::GuestRam
//! [`DirtyLog`]: crate::DirtyLog

mod error;
mod handover;
mod heat;
mod limits;
mod pending;
mod ram;
mod return_path;
mod source;
mod switchover_ack;
mod target;
mod throttle;
mod watch;

pub use error::{BoxError, SourceError, TargetError};
pub use limits::Limits;
#[cfg(feature = "staged")]
pub(crate) use pending::PageRun;
pub use ram::{Budget, RamSender, RamSetup};
pub use return_path::ReturnPathReader;
pub use source::{
    Control, FIRST_DEVICE_SECTION, HandOver, Progress, Source, SourceConfig, SourceEvent,
    SourceObserver, SourceStatus, SwitchedOver, Unresolved,
};
pub use switchover_ack::SwitchoverAcks;
pub use target::{
    Arrived, CheckpointComplete, CheckpointReceiver, Loaded, PageIntake, Received, Settled,
    SettledSecondary, Target, TargetConfig,
};
pub use throttle::{Throttle, ThrottleConfig, ThrottleConfigError, ThrottleMeans};
