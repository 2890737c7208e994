//! The source of a live migration.
//!
//! [`iteration`] sends memory while the guest runs, [`switch_over`] pauses the guest and hands it over,
//! [`outcome`] is what comes of it; [`observer`] is who is told meanwhile.

mod iteration;
mod observer;
mod outcome;
mod switch_over;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;

pub use self::observer::{Control, Progress, SourceEvent, SourceObserver, SourceStatus};
pub use self::outcome::{HandOver, SwitchedOver, Unresolved};
use super::error::SourceError;
use super::handover::WHO_CONFIRMS;
use super::limits::{Bandwidth, Limits};
use super::ram::{RamSender, RamSetup};
use super::return_path::{EARLY_TAKEN, ReturnPathReader};
use super::throttle::{Throttle, ThrottleConfig, ThrottleConfigError, Throttling};
use crate::io::CancelToken;
use crate::raw::command::Command;
use crate::raw::configuration::IGNORE_SHARED;
use crate::raw::header;
use crate::{
    Configuration, DeviceSections, DeviceState, DirtyLog, PAGE_SIZE, PageTransport, SectionId,
    StreamWriter, VmControl,
};

/// The section id of RAM.
const RAM_SECTION: SectionId = SectionId(1);
/// The id of the first device section; the others count on from it.
pub const FIRST_DEVICE_SECTION: SectionId = SectionId(2);
/// The value of the one PING, as QEMU's source sends it.
const PING: u32 = 1;
/// What does not change during a migration.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    configuration: Option<Configuration>,
    switchover_start: bool,
    confirm_timeout: Duration,
}

impl SourceConfig {
    /// The time that a target has to confirm by default.
    const DEFAULT_CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

    /// Sends `configuration` as the configuration section, or none: a target refuses a stream whose section it
    /// does not expect. [`Source::start`] adds the capabilities that the memory and the transport stand for
    /// (`x-ignore-shared`, `mapped-ram`).
    #[must_use]
    pub fn new(configuration: impl Into<Option<Configuration>>) -> Self {
        Self {
            configuration: configuration.into(),
            switchover_start: true,
            confirm_timeout: Self::DEFAULT_CONFIRM_TIMEOUT,
        }
    }

    /// Sets whether SWITCHOVER_START announces the final phase. A QEMU before 10.0, and one whose machine type is
    /// older, refuses it. The default is `true`.
    #[must_use]
    pub const fn switchover_start(mut self, announced: bool) -> Self {
        self.switchover_start = announced;
        self
    }

    /// Sets how long the target may take to load its devices and confirm, once everything was sent. Then the
    /// outcome is [unknown](HandOver::Unknown), and the guest stays paused. The default is 30 s.
    #[must_use]
    pub const fn confirm_timeout(mut self, limit: Duration) -> Self {
        self.confirm_timeout = limit;
        self
    }
}

/// A live migration whose stream has begun.
pub struct Source<T, D: DirtyLog> {
    config: SourceConfig,
    pub(super) limits: Arc<Limits>,
    pub(super) out: StreamWriter,
    return_path: Option<ReturnPathReader>,
    pub(super) ram: RamSender<T, D>,
    bandwidth: Bandwidth,
    pub(super) begun: Instant,
    pass: u64,
    round: Round,
    dirty_pages_rate: u64,
    status: SourceStatus,
    pauses: bool,
    throttling: Option<Throttling>,
    pub(super) acks: Option<Acks>,
    early: Option<Early>,
    /// The id of the first device section behind RAM.
    next_section: SectionId,
    /// Ends every wait for the peer.
    pub(super) cancel: CancelToken,
    /// The VMM wants to switch over.
    pub(super) asked: bool,
}

/// Device sections were sent before RAM, and the destination has not said that it has taken them.
#[derive(Debug)]
struct Early {
    /// Since when only that is missing.
    waiting: Option<Instant>,
}

/// The acknowledgements that the switch-over waits for.
#[derive(Debug)]
pub(super) struct Acks {
    expected: u32,
    /// Since when only they are missing.
    waiting: Option<Instant>,
}

/// The current round over guest memory.
#[derive(Debug)]
struct Round {
    begun: Instant,
    bytes: u64,
    busy: Duration,
}

impl<T: PageTransport, D: DirtyLog> Source<T, D> {
    /// Begins the stream: header, configuration, return path, the devices that are
    /// [saved early](DeviceState::save_early), the announcement of RAM.
    ///
    /// With a return path the guest is not paused before the destination has taken the early devices: one
    /// that refuses them does so while the guest runs.
    ///
    /// # Errors
    /// The devices', the stream's, the transport's, the dirty log's.
    pub fn start(
        config: SourceConfig,
        limits: Arc<Limits>,
        mut out: StreamWriter,
        mut return_path: Option<ReturnPathReader>,
        mut setup: RamSetup<T, D>,
        devices: &mut impl DeviceState,
    ) -> Result<Self, SourceError> {
        let begun = Instant::now();
        // Every way out pays to one account.
        let limiter = limits.limiter();
        limiter.lift(false);
        out.set_limiter(limiter);
        setup.transport.set_limiter(limiter);
        let cancel = match out.cancel_token() {
            Some(token) => token.clone(),
            None => CancelToken::new()?,
        };
        out.set_cancel(&cancel);
        setup.transport.set_cancel(&cancel);
        if let Some(return_path) = &mut return_path {
            return_path.set_cancel(&cancel);
        }
        let mut bytes = BytesMut::new();
        header::encode(&mut bytes);
        if let Some(configuration) = &config.configuration {
            let mut configuration = configuration.clone();
            if let Some(capability) = setup.transport.capability() {
                configuration = configuration.with(capability);
            }
            if setup.transport.ram().blocks().ignores_shared() {
                configuration = configuration.with(IGNORE_SHARED);
            }
            configuration.encode(&mut bytes);
        }
        if return_path.is_some() {
            Command::OpenReturnPath.encode(&mut bytes);
            Command::Ping(PING).encode(&mut bytes);
            Command::Ping(WHO_CONFIRMS).encode(&mut bytes);
        }
        let mut early = Vec::new();
        let mut sections = DeviceSections::new(&mut early, FIRST_DEVICE_SECTION, false);
        devices
            .save_early(&mut sections)
            .map_err(|source| SourceError::Vm {
                what: "saving the devices that travel before ram",
                source,
            })?;
        let next_section = sections.next();
        bytes.extend_from_slice(&early);
        let early = (!early.is_empty() && return_path.is_some()).then_some(Early { waiting: None });
        if early.is_some() {
            Command::Ping(EARLY_TAKEN).encode(&mut bytes);
        }
        out.write_bytes(&bytes)?;
        let ram = setup.announce(RAM_SECTION, &mut out)?;
        let round = Round {
            begun: Instant::now(),
            bytes: ram.bytes(&out),
            busy: Duration::ZERO,
        };
        Ok(Self {
            config,
            limits,
            out,
            return_path,
            ram,
            bandwidth: Bandwidth::default(),
            begun,
            pass: 1,
            round,
            dirty_pages_rate: 0,
            status: SourceStatus::Active,
            pauses: false,
            throttling: None,
            acks: None,
            early,
            next_section,
            cancel,
            asked: false,
        })
    }

    /// Waits with the guest stopped until the VMM lets the switch-over go on (the capability
    /// `pause-before-switchover`; see [`SourceObserver::progress`]).
    #[must_use]
    pub const fn pausing_before_switchover(mut self) -> Self {
        self.pauses = true;
        self
    }

    /// Slows the guest down while it writes too much (the capability `auto-converge` or
    /// `dirty-limit`).
    ///
    /// # Errors
    /// A parameter is out of range.
    pub fn throttling_by(
        mut self,
        config: ThrottleConfig,
        throttle: Box<dyn Throttle>,
    ) -> Result<Self, ThrottleConfigError> {
        let sent = self.ram.bytes(&self.out);
        self.throttling = Some(Throttling::new(config, throttle, sent)?);
        Ok(self)
    }

    /// Does not stop the guest before `expected` SWITCHOVER_ACK messages have come (the capability
    /// `switchover-ack`): one from a destination that counts its devices (machine types before QEMU
    /// 11.1), else one for each device that wants to acknowledge. Memory goes on being sent while
    /// they are missing, for [`SourceConfig::confirm_timeout`] at most.
    ///
    /// # Errors
    /// There is no return path on which they could come.
    pub fn awaiting_switchover_acks(mut self, expected: u32) -> Result<Self, SourceError> {
        if self.return_path.is_none() {
            return Err(SourceError::SwitchoverAckWithoutReturnPath);
        }
        self.acks = Some(Acks {
            expected,
            waiting: None,
        });
        Ok(self)
    }

    /// Returns the token that cancels this migration from any thread, as [`Control::Cancel`] does. It is that of the
    /// stream's writer, if that had one ([`StreamWriter::set_cancel`]).
    #[must_use]
    pub const fn cancel_token(&self) -> &CancelToken {
        &self.cancel
    }

    /// Runs the migration to its end: sends memory until what is left fits the downtime limit at the
    /// measured bandwidth, pauses the guest, sends the rest, waits for the answer. `vm` is told
    /// meanwhile.
    ///
    /// `vm` is resumed for [`HandOver::Failed`] and never otherwise.
    pub fn run<V>(mut self, vm: &mut V) -> HandOver<T, D>
    where
        V: VmControl + DeviceState + SourceObserver,
    {
        vm.event(SourceEvent::Status(self.status));
        if let Err(error) = self.iterate(vm) {
            return HandOver::Failed(self.first_cause(error));
        }
        self.throttling = None;
        // The guest does not stand still for the sake of the limit.
        self.limits.limiter().lift(true);
        let paused = Instant::now();
        if let Err(source) = vm.pause() {
            return HandOver::Failed(SourceError::Vm {
                what: "pausing the guest",
                source,
            });
        }
        match self.switch_over(vm) {
            Ok(last) => match self.hand_over(vm, &last, paused) {
                HandOver::Failed(error) => HandOver::Failed(resumed(vm, error)),
                other => other,
            },
            Err(error) => {
                let error = self.first_cause(error);
                HandOver::Failed(resumed(vm, error))
            }
        }
    }

    /// What is behind a failure to send: the destination's refusal, or else the first channel that
    /// failed.
    fn first_cause(&mut self, error: SourceError) -> SourceError {
        if !matches!(error, SourceError::Stream(_) | SourceError::Transport(_)) {
            return error;
        }
        let heard = self
            .return_path
            .as_mut()
            .map(ReturnPathReader::check_progress);
        match heard {
            Some(Err(refused @ SourceError::Refused { .. })) => refused,
            _ => match self.ram.transport_failure() {
                Some(failure) => SourceError::Transport(failure),
                None => error,
            },
        }
    }

    /// How far the migration is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let remaining = self.ram.pending_pages() * PAGE_SIZE;
        Progress {
            status: self.status,
            pass: self.pass,
            remaining,
            total: self.ram.ram().blocks().migrated_bytes(),
            transferred: self.ram.bytes(&self.out),
            counters: self.ram.counters(),
            dirty_pages_rate: self.dirty_pages_rate,
            bandwidth: self.bandwidth.get().unwrap_or(0),
            throttle: self.throttling.as_ref().map_or(0, Throttling::percentage),
            expected_downtime: self.bandwidth.time_for(remaining),
            elapsed: self.begun.elapsed(),
        }
    }
}

/// Lets the guest run on here after `error`, which stays the cause that is told.
fn resumed(vm: &mut impl VmControl, error: SourceError) -> SourceError {
    match vm.resume() {
        Ok(_) => error,
        Err(source) => SourceError::NotResumed {
            cause: Box::new(error),
            source,
        },
    }
}

impl<T, D: DirtyLog> fmt::Debug for Source<T, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("pass", &self.pass)
            .finish_non_exhaustive()
    }
}
