//! Precopy live migration: the source sends guest memory while the guest runs, pauses it and switches over;
//! the target loads.
//!
//! ```text
//! source                                     target
//! header, configuration,
//! OPEN_RETURN_PATH, PING          ->
//! devices saved early             ->         parsed
//! START ram (block list)          ->
//!                                 <-         PONG
//! PART ram ... while the guest runs ->       pages into the store
//! [guest pauses]
//! SWITCHOVER_START, END ram,
//! FULL devices, EOF, description  ->         parsed and staged
//!                                            [channels joined, devices installed]
//!                                 <-         SHUT(0): the guest is the target's
//! ```
//!
//! Both sides, over a connected socket:
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use migration_stream::io::FdChannel;
//! use migration_stream::precopy::{
//!     Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target, TargetConfig,
//! };
//! use migration_stream::ram::{InStream, NoMultifd, ZeroPageDetection};
//! use migration_stream::{
//!     BoxError, Configuration, ConfigurationRule, DecoderConfig, DeviceState, DirtyLog, GuestRamMmap,
//!     MachineName, StreamReader, StreamWriter, VmControl,
//! };
//!
//! fn machine() -> Result<Configuration, BoxError> {
//!     Ok(Configuration::new(MachineName::new("my-vmm-1")?))
//! }
//!
//! /// Sends the running guest. If this fails the guest runs on.
//! fn send<V: VmControl + DeviceState + SourceObserver>(
//!     vm: &mut V,
//!     ram: Arc<GuestRamMmap>,
//!     log: impl DirtyLog,
//!     socket: FdChannel,
//! ) -> Result<(), BoxError> {
//!     let config = SourceConfig::new(machine()?).confirm_timeout(Duration::from_secs(30));
//!     let out = StreamWriter::new(socket.share());
//!     let answers = ReturnPathReader::new(socket);
//!     let transport = InStream::new(ram, ZeroPageDetection::default());
//!     let setup = RamSetup { log, transport };
//!     let limits = Arc::new(Limits::default());
//!     let source = Source::start(config, limits, out, Some(answers), setup, vm)?;
//!     source.run(vm).completed()?;
//!     Ok(())
//! }
//!
//! /// Receives a guest, and resumes it.
//! fn receive<V: VmControl + DeviceState>(
//!     vm: &mut V,
//!     ram: Arc<GuestRamMmap>,
//!     socket: FdChannel,
//! ) -> Result<(), BoxError> {
//!     let config = TargetConfig::new(ConfigurationRule::Matching(machine()?)).max_devices(1 << 20);
//!     let reader = StreamReader::new(socket.share(), b"");
//!     let target = Target::new(config, reader, Some(Box::new(socket)), &*ram);
//!     let arrived = target.confirming_before_it_runs().load((ram, NoMultifd), vm)?;
//!     arrived.settle(vm)?.confirm()?;
//!     vm.resume()?;
//!     Ok(())
//! }
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

pub use error::{SourceError, TargetError};
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
