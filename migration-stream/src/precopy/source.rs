//! The source of a live migration: iterate while the guest runs, stop it, switch over.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::error::{BoxError, SourceError};
use super::handover::{Offer, Verdict, WHO_CONFIRMS, verdict};
use super::limits::{Bandwidth, Limits};
use super::ram::{Budget, RamSender, RamSetup};
use super::return_path::{EARLY_TAKEN, Heard, ReturnPathReader};
use super::throttle::{Throttle, ThrottleConfig, ThrottleConfigError, Throttling};
use super::watch::WATCH;
use crate::command::Command;
use crate::configuration::{Configuration, IGNORE_SHARED};
use crate::early::EarlySections;
use crate::io::{CancelToken, deadline_after, deadline_from};
use crate::section::{SectionId, SectionType};
use crate::{DirtyLog, PAGE_SIZE, PageTransport, StreamWriter, TransportCounters, header, section};

/// The section id of RAM.
const RAM_SECTION: SectionId = SectionId(1);
/// The id of the first device section; the others count on from it.
pub const FIRST_DEVICE_SECTION: SectionId = SectionId(2);
/// The value of the one PING, as QEMU's source sends it.
const PING: u32 = 1;
/// A PART ends after this long, so that the log, the return path and cancellation are looked at.
const PART_TIME: Duration = Duration::from_millis(50);
/// How often a source that pauses before the switch-over sends a PING, so that its target does not take it for
/// dead.
const SIGN_OF_LIFE: Duration = Duration::from_millis(100);
/// How often a stopped guest's VMM is asked whether to go on.
const PAUSE_POLL: Duration = Duration::from_millis(10);

/// What a source asks of its VMM.
pub trait SourceVm {
    /// Stops the vCPUs; when it returns the guest writes no memory any more.
    ///
    /// # Errors
    /// The VMM's; the migration then fails and the guest runs on.
    fn stop(&mut self) -> Result<(), BoxError>;

    /// Puts the guest back as it was before [`SourceVm::stop`]. Called only for [`HandOver::Failed`]:
    /// the destination does not run the guest.
    ///
    /// # Errors
    /// The VMM's.
    fn resume(&mut self) -> Result<(), BoxError>;

    /// Appends the state of every device of the stopped VM to `out`, FULL sections from id
    /// [`FIRST_DEVICE_SECTION`] on and EOF (see [`crate::device_blob`]), and returns the JSON text
    /// that describes them (QEMU's vmdesc), empty for one that says nothing.
    ///
    /// # Errors
    /// The VMM's; the migration then fails and the guest runs on.
    fn save_devices(&mut self, out: &mut Vec<u8>) -> Result<String, BoxError>;

    /// Called at least every 50 ms, whatever the peer does: between steps, and beside a step that waits; and while it is paused
    /// before the switch-over ([`SourceStatus::PreSwitchover`]), where [`Control::Continue`] goes on
    /// waiting and [`Control::SwitchOver`] ends the pause (`migrate-continue`).
    fn progress(&mut self, progress: &Progress) -> Control;

    /// Something that an observer may want to hear of (the capability `events`). Nobody needs to.
    fn event(&mut self, event: SourceEvent) {
        let _ = event;
    }
}

/// Where a migration is, as `query-migrate` calls it. What comes before is `setup`, what comes after
/// is the result of [`Source::run`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceStatus {
    /// Memory is sent while the guest runs: `active`.
    Active,
    /// The guest stands still until the VMM lets the switch-over go on: `pre-switchover`.
    PreSwitchover,
    /// The rest of memory and the devices are sent: `device`.
    Device,
}

/// What happens in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// The status is another one (event `MIGRATION`).
    Status(SourceStatus),
    /// A round over guest memory has ended and this one begins, 2 the first time (event
    /// `MIGRATION_PASS`, QEMU 11.1).
    Pass(u64),
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Switch over now, whatever is still pending.
    SwitchOver,
    /// Give up; the guest runs on here.
    Cancel,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Where the migration is.
    pub status: SourceStatus,
    /// Rounds over guest memory so far, from 1; QEMU's dirty-sync-count.
    pub pass: u64,
    /// Bytes of guest memory still to be sent, as far as the dirty log was read.
    pub remaining: u64,
    /// Bytes of guest memory in all.
    pub total: u64,
    /// Bytes on every channel.
    pub transferred: u64,
    /// Pages by kind, and the channels' share of the bytes.
    pub counters: TransportCounters,
    /// Pages that became dirty in the last round, a second.
    pub dirty_pages_rate: u64,
    /// Bytes a second while sending, 0 before the first measurement.
    pub bandwidth: u64,
    /// How much of their time the vCPUs lose (`cpu-throttle-percentage`), percent.
    pub throttle: u8,
    /// How long the guest would stand still if it were switched over now.
    pub expected_downtime: Option<Duration>,
    /// Since the migration began.
    pub elapsed: Duration,
}

/// What does not change during a migration.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// The configuration section, `None` for a stream without one. `x-ignore-shared` is put
    /// into it where the block table says so, `mapped-ram` where the transport does.
    pub configuration: Option<Configuration>,
    /// Whether SWITCHOVER_START announces the final phase (machine types of QEMU 10.0 on).
    pub switchover_start: bool,
    /// How long the destination may take to confirm, once everything was sent.
    pub confirm_timeout: Duration,
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

/// How a migration ended.
///
/// The library resumes the guest for [`HandOver::Failed`] and never otherwise.
#[derive(Debug)]
#[must_use = "only the VMM can decide what becomes of a guest whose hand-over is unknown"]
pub enum HandOver<T, D: DirtyLog> {
    /// The destination has the guest.
    Completed(SwitchedOver<T, D>),
    /// The destination does not have the guest and cannot come to run it. The guest is still the
    /// source's: it runs on, if it ran before.
    Failed(SourceError),
    /// Everything that lets the destination run the guest was sent, and no answer came. The guest
    /// stays paused here, because it may run there.
    Unknown(Unresolved<T, D>),
}

impl<T: PageTransport, D: DirtyLog> HandOver<T, D> {
    /// Returns what was handed over, for callers to whom an unknown outcome is an error like others.
    ///
    /// # Errors
    /// The cause of a failure, or [`SourceError::OutcomeUnknown`]; the guest then stays paused.
    pub fn completed(self) -> Result<SwitchedOver<T, D>, SourceError> {
        match self {
            Self::Completed(switched) => Ok(switched),
            Self::Failed(error) => Err(error),
            Self::Unknown(unresolved) => Err(unresolved.into_error()),
        }
    }
}

/// A guest that was sent completely, without an answer whether the destination has it.
///
/// The answer may still come: see [`Unresolved::wait`]. Dropping this closes the connection, by which a
/// destination that confirms before it runs the guest, and has not yet, learns that it must not.
#[derive(Debug)]
pub struct Unresolved<T, D: DirtyLog> {
    cause: SourceError,
    offer: Offer,
    /// The return path has ended: nothing more can come.
    silent: bool,
    switched: SwitchedOver<T, D>,
}

impl<T: PageTransport, D: DirtyLog> Unresolved<T, D> {
    /// Returns why no answer is known.
    #[must_use]
    pub const fn cause(&self) -> &SourceError {
        &self.cause
    }

    /// Returns whether an answer can still come on this connection.
    #[must_use]
    pub const fn can_be_answered(&self) -> bool {
        !self.silent && self.switched.return_path.is_some()
    }

    /// Closes the connection, and returns an error that says what is not known.
    #[must_use]
    pub fn into_error(self) -> SourceError {
        SourceError::OutcomeUnknown {
            cause: Box::new(self.cause),
        }
    }

    /// Waits for the answer for at most `limit`. The guest is not resumed here for a refusal: the
    /// VMM does that for [`HandOver::Failed`].
    pub fn wait(mut self, limit: Duration) -> HandOver<T, D> {
        let Some(return_path) = self.switched.return_path.as_mut().filter(|_| !self.silent) else {
            return HandOver::Unknown(self);
        };
        let heard = return_path.wait_for_answer(deadline_after(limit));
        match verdict(self.offer, heard.answer, heard.confirms_first) {
            Verdict::Completed => HandOver::Completed(self.switched),
            Verdict::Failed => HandOver::Failed(heard.error.unwrap_or(self.cause)),
            Verdict::Unknown => {
                self.silent = heard.is_over;
                HandOver::Unknown(self)
            }
        }
    }
}

/// A guest that has been handed over: everything it had was sent and, with a return path,
/// confirmed. It stands still here. Dropping this ends the migration; COLO goes on from it.
#[derive(Debug)]
pub struct SwitchedOver<T, D: DirtyLog> {
    /// The main stream.
    pub out: StreamWriter,
    /// The return path, if there is one. It carries no more return-path messages.
    pub return_path: Option<ReturnPathReader>,
    /// Guest memory: it can send dirty pages, it cannot be announced again.
    pub ram: RamSender<T, D>,
    /// The last figures.
    pub progress: Progress,
    /// From the stop of the guest to the confirmation.
    pub downtime: Duration,
}

impl<T: PageTransport, D: DirtyLog> Source<T, D> {
    /// Begins the stream: header, configuration, return path, the announcement of RAM.
    ///
    /// # Errors
    /// The stream's, the transport's, the dirty log's.
    pub fn start(
        config: SourceConfig,
        limits: Arc<Limits>,
        out: StreamWriter,
        return_path: Option<ReturnPathReader>,
        setup: RamSetup<T, D>,
    ) -> Result<Self, SourceError> {
        Self::start_after(
            &EarlySections::new(),
            config,
            limits,
            out,
            return_path,
            setup,
        )
    }

    /// As [`Source::start`], with `early` before RAM, numbered from [`FIRST_DEVICE_SECTION`] on. The
    /// sections that [`SourceVm::save_devices`] appends go on behind these numbers, and the description
    /// names `early` first.
    ///
    /// With a return path the guest is not stopped before the destination has taken these sections: one
    /// that refuses them does so while the guest runs.
    ///
    /// # Errors
    /// As there.
    pub fn start_after(
        early: &EarlySections,
        config: SourceConfig,
        limits: Arc<Limits>,
        mut out: StreamWriter,
        mut return_path: Option<ReturnPathReader>,
        mut setup: RamSetup<T, D>,
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
        early.encode(FIRST_DEVICE_SECTION, &mut bytes);
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
            cancel,
            asked: false,
        })
    }

    /// Waits with the guest stopped until the VMM lets the switch-over go on (the capability
    /// `pause-before-switchover`; see [`SourceVm::progress`]).
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

    /// Runs the migration to its end: iterates until what is left fits the downtime limit at the
    /// measured bandwidth, stops the guest, sends the rest, waits for the answer.
    pub fn run(mut self, vm: &mut impl SourceVm) -> HandOver<T, D> {
        vm.event(SourceEvent::Status(self.status));
        if let Err(error) = self.iterate(vm) {
            return HandOver::Failed(self.first_cause(error));
        }
        self.throttling = None;
        // The guest does not stand still for the sake of the limit.
        self.limits.limiter().lift(true);
        let stopped = Instant::now();
        let stop = vm.stop().map_err(|source| SourceError::Vm {
            what: "stopping the guest",
            source,
        });
        if let Err(error) = stop {
            return HandOver::Failed(error);
        }
        match self.switch_over(vm) {
            Ok(last) => match self.hand_over(vm, &last, stopped) {
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

    fn iterate(&mut self, vm: &mut impl SourceVm) -> Result<(), SourceError> {
        loop {
            let control = vm.progress(&self.progress());
            self.check_return_path()?;
            match control {
                Control::SwitchOver => self.asked = true,
                Control::Continue => {}
                Control::Cancel => return Err(SourceError::Cancelled),
            }
            if self.asked && self.is_acknowledged()? {
                return Ok(());
            }
            if self.ram.pending_pages() == 0 {
                self.next_round(vm)?;
                vm.event(SourceEvent::Pass(self.pass));
                let left = self.ram.pending_pages() * PAGE_SIZE;
                // Before the first measurement there is nothing to estimate with, but an idle guest
                // has nothing left to send either.
                if left == 0
                    || self
                        .bandwidth
                        .time_for(left)
                        .is_some_and(|t| t <= self.limits.downtime())
                {
                    if self.is_acknowledged()? {
                        return Ok(());
                    }
                    if left == 0 {
                        std::thread::sleep(WATCH);
                    }
                }
            }
            self.part(vm)?;
        }
    }

    fn check_return_path(&mut self) -> Result<(), SourceError> {
        if let Some(return_path) = &mut self.return_path {
            return_path.check_progress()?;
        }
        self.check_surplus()
    }

    /// No more acknowledgements than devices that give one.
    fn check_surplus(&self) -> Result<(), SourceError> {
        match (&self.acks, &self.return_path) {
            (Some(Acks { expected, .. }), Some(return_path))
                if return_path.switchover_acks() > *expected =>
            {
                Err(SourceError::SurplusSwitchoverAck {
                    expected: *expected,
                })
            }
            _ => Ok(()),
        }
    }

    /// Whether the destination has taken the device sections before RAM.
    fn is_early_taken(&mut self) -> Result<bool, SourceError> {
        let (Some(early), Some(return_path)) = (&mut self.early, &self.return_path) else {
            return Ok(true);
        };
        if return_path.has_taken_early_sections() {
            self.early = None;
            return Ok(true);
        }
        let since = *early.waiting.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.config.confirm_timeout {
            return Err(SourceError::EarlySectionsUnanswered);
        }
        Ok(false)
    }

    /// Whether all that the switch-over waits for has come.
    fn is_acknowledged(&mut self) -> Result<bool, SourceError> {
        if !self.is_early_taken()? {
            return Ok(false);
        }
        let (Some(acks), Some(return_path)) = (&mut self.acks, &self.return_path) else {
            return Ok(true);
        };
        let missing = acks.expected.saturating_sub(return_path.switchover_acks());
        let since = *acks.waiting.get_or_insert_with(Instant::now);
        if missing > 0 && since.elapsed() >= self.config.confirm_timeout {
            let expected = acks.expected;
            return Err(SourceError::SwitchoverAckMissing { missing, expected });
        }
        Ok(missing == 0)
    }

    /// Waits, with the guest stopped, for the VMM.
    fn pause(&mut self, vm: &mut impl SourceVm) -> Result<(), SourceError> {
        self.set_status(SourceStatus::PreSwitchover, vm);
        let mut said = Instant::now();
        loop {
            match vm.progress(&self.progress()) {
                Control::Continue => {}
                Control::SwitchOver => return Ok(()),
                Control::Cancel => return Err(SourceError::Cancelled),
            }
            self.check_return_path()?;
            if self.return_path.is_some() && said.elapsed() >= SIGN_OF_LIFE {
                let mut bytes = BytesMut::new();
                Command::Ping(PING).encode(&mut bytes);
                self.watched(vm, |_, out| Ok(out.write_bytes(&bytes)?))?;
                said = Instant::now();
            }
            std::thread::sleep(PAUSE_POLL);
        }
    }

    fn set_status(&mut self, status: SourceStatus, vm: &mut impl SourceVm) {
        self.status = status;
        vm.event(SourceEvent::Status(status));
    }

    /// All that was known to be dirty has been sent: reads the log again.
    fn next_round(&mut self, vm: &mut impl SourceVm) -> Result<(), SourceError> {
        let dirtied = self.watched(vm, |ram, _| ram.sync_dirty())?;
        if let Some(throttling) = &mut self.throttling {
            throttling.synced(dirtied * PAGE_SIZE, self.ram.bytes(&self.out));
        }
        let elapsed = self.round.begun.elapsed().max(Duration::from_micros(1));
        self.dirty_pages_rate = (u128::from(dirtied) * 1_000_000 / elapsed.as_micros())
            .try_into()
            .unwrap_or(u64::MAX);
        self.pass += 1;
        self.round = Round {
            begun: Instant::now(),
            bytes: self.ram.bytes(&self.out),
            busy: Duration::ZERO,
        };
        Ok(())
    }

    fn part(&mut self, vm: &mut impl SourceVm) -> Result<(), SourceError> {
        let limiter = Arc::clone(self.limits.limiter());
        let (begun, idle) = (Instant::now(), limiter.idle());
        let budget = Budget {
            bytes: u64::MAX,
            until: deadline_from(begun, PART_TIME),
        };
        self.watched(vm, |ram, out| ram.part(out, budget))?;
        // The switch-over is not limited: what the limit takes says nothing about it.
        let idle = limiter.idle().saturating_sub(idle);
        self.round.busy += begun.elapsed().saturating_sub(idle);
        self.bandwidth.sample(
            self.ram.bytes(&self.out) - self.round.bytes,
            self.round.busy,
        );
        Ok(())
    }

    /// Sends all but the end of the device state, and returns that: the destination cannot run the
    /// guest without it.
    fn switch_over(&mut self, vm: &mut impl SourceVm) -> Result<Vec<u8>, SourceError> {
        if self.pauses {
            self.pause(vm)?;
        }
        self.set_status(SourceStatus::Device, vm);
        let mut devices = Vec::new();
        let description = vm
            .save_devices(&mut devices)
            .map_err(|source| SourceError::Vm {
                what: "saving the devices",
                source,
            })?;
        if devices.pop() != Some(SectionType::Eof.byte()) {
            return Err(SourceError::DevicesWithoutEnd);
        }
        let mut start = BytesMut::new();
        if self.config.switchover_start {
            Command::SwitchoverStart.encode(&mut start);
        }
        self.watched(vm, |ram, out| {
            out.write_bytes(&start)?;
            ram.end(out)?;
            Ok(out.write_bytes(&devices)?)
        })?;
        self.check_return_path()?;
        // A receiver waits for the description: one that cannot be sent is replaced, not left out.
        let description = if description.is_empty() {
            "{}"
        } else {
            &description
        };
        let (len, text) =
            u32::try_from(description.len()).map_or((2, "{}"), |len| (len, description));
        let mut last = Vec::new();
        section::encode_eof(&mut last);
        section::encode_vm_description(len, &mut last);
        last.extend_from_slice(text.as_bytes());
        Ok(last)
    }

    /// Sends `last`, with which the destination can run the guest, and waits for its answer.
    fn hand_over(
        mut self,
        vm: &mut impl SourceVm,
        last: &[u8],
        stopped: Instant,
    ) -> HandOver<T, D> {
        let mut return_path = self.return_path.take();
        let deadline = deadline_after(self.config.confirm_timeout);
        let told = self.beside(vm, |_, out| {
            let before = out.taken();
            let written = out.write_bytes(last).map_err(SourceError::from);
            let offer = match &written {
                Ok(()) => Offer::Made,
                // Nobody runs a guest from a file that was not written to its end.
                Err(_) if out.is_file() => Offer::Withheld,
                Err(_) if before.is_some() && out.taken() == before => Offer::Withheld,
                Err(_) => Offer::Attempted,
            };
            let heard = match &mut return_path {
                Some(return_path) if offer != Offer::Withheld => {
                    return_path.wait_for_answer(deadline)
                }
                _ => Heard::nothing(),
            };
            Ok((offer, written, heard))
        });
        self.return_path = return_path;
        let (offer, written, heard) = match told {
            // The step was not begun.
            Err(error) => return HandOver::Failed(error),
            Ok((Offer::Withheld, Err(error), _)) => {
                return HandOver::Failed(self.first_cause(error));
            }
            Ok(told) => told,
        };
        let cause = written
            .err()
            .or(heard.error)
            .unwrap_or(SourceError::Unconfirmed);
        match verdict(offer, heard.answer, heard.confirms_first) {
            Verdict::Completed => HandOver::Completed(self.into_switched(stopped)),
            Verdict::Failed => HandOver::Failed(cause),
            Verdict::Unknown => HandOver::Unknown(Unresolved {
                cause,
                offer,
                silent: heard.is_over,
                switched: self.into_switched(stopped),
            }),
        }
    }

    fn into_switched(self, stopped: Instant) -> SwitchedOver<T, D> {
        SwitchedOver {
            progress: self.progress(),
            downtime: stopped.elapsed(),
            out: self.out,
            return_path: self.return_path,
            ram: self.ram,
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
fn resumed(vm: &mut impl SourceVm, error: SourceError) -> SourceError {
    match vm.resume() {
        Ok(()) => error,
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
