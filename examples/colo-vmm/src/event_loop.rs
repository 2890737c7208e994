//! The main thread: waits for the guest to end, for signals, for an operator's `quit`, and for what
//! the user types.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use colo_core::ColoMode;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::machine::{GuestExit, MachineError};
use crate::migration::Migration;
use crate::vm::{ResetError, Vm};

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The guest ended by itself.
    Guest(GuestExit),
    /// A signal asked this process to end.
    Signal(i32),
    /// An operator did, or something that cannot go on.
    Request(Request),
}

/// What is done when the guest ends by itself; without either, this process ends with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestEnds {
    /// A guest that resets the machine begins anew.
    pub reboot: bool,
    /// This process stays, in the state `shutdown`.
    pub no_shutdown: bool,
}

/// Who asked for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// An operator: `quit`.
    Quit,
    /// An incoming migration failed, and nothing else can come of this process.
    IncomingFailed,
}

/// Asks the loop to end, from any thread. Clones ask the same loop.
#[derive(Clone, Debug)]
pub struct Ender {
    asked: Arc<Mutex<Option<Request>>>,
    event: Arc<EventFd>,
}

impl Ender {
    /// For a loop to come.
    ///
    /// # Errors
    /// The host gives no descriptor.
    pub fn new() -> Result<Self, LoopError> {
        let event = EventFd::new(libc::EFD_NONBLOCK).map_err(host("make an event"))?;
        Ok(Self {
            asked: Arc::default(),
            event: Arc::new(event),
        })
    }

    /// Ends the loop. The first request counts.
    pub fn end(&self, request: Request) {
        lock(&self.asked).get_or_insert(request);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "the main loop cannot be woken");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why the loop could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoopError {
    /// The host's epoll refused.
    #[error("cannot wait for events")]
    Events(#[from] event_manager::Error),
    /// The host gave no descriptor.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The machine refused.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The machine could not be reset.
    #[error("resetting the machine")]
    Reset(#[from] ResetError),
}

type Outcome = Arc<Mutex<Option<Result<Ending, LoopError>>>>;

/// Blocks SIGINT and SIGTERM in this thread and those it starts from now on, and gives a
/// descriptor to wait for them with. Call it before any other thread exists.
///
/// # Errors
/// The host's.
pub fn ending_signals() -> Result<SignalFd, LoopError> {
    SignalFd::new(&[libc::SIGINT, libc::SIGTERM])
}

/// Has `command` start with no signal blocked: a child would inherit what [`ending_signals`] has
/// blocked, and could not be ended by SIGTERM.
pub(crate) fn unblock_signals(command: &mut Command) {
    let unblock = || {
        let mut none = MaybeUninit::uninit();
        // SAFETY: `sigemptyset` initialises the set, which `sigprocmask` only reads.
        let result = unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: both calls may be made between fork and exec, and nothing is allocated.
    unsafe { command.pre_exec(unblock) };
}

/// Waits until the guest ends, a signal comes or `ender` is used, and serves the serial line from
/// `input`, if there is one, meanwhile.
///
/// # Errors
/// See [`LoopError`].
pub fn run(
    migration: &Arc<Migration>,
    signals: SignalFd,
    ender: &Ender,
    input: Option<RawFd>,
    ends: GuestEnds,
) -> Result<Ending, LoopError> {
    let vm = migration.vm();
    let outcome = Outcome::default();
    let mut manager: EventManager<Box<dyn MutEventSubscriber>> = EventManager::new()?;
    let exit_event = vm
        .with_machine(|machine| machine.exit_event().try_clone())
        .map_err(host("watch the guest"))?;
    manager.add_subscriber(Box::new(GuestEnd {
        migration: Arc::clone(migration),
        exit_event,
        ends,
        outcome: Arc::clone(&outcome),
    }));
    manager.add_subscriber(Box::new(SignalEnd {
        signals,
        outcome: Arc::clone(&outcome),
    }));
    manager.add_subscriber(Box::new(RequestEnd {
        ender: ender.clone(),
        outcome: Arc::clone(&outcome),
    }));
    if let Some(fd) = input {
        manager.add_subscriber(Box::new(SerialInput::new(Arc::clone(vm), fd)?));
    }
    loop {
        manager.run()?;
        let ended = lock(&outcome).take();
        if let Some(ended) = ended {
            return ended;
        }
    }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> LoopError {
    move |source| LoopError::Host { what, source }
}

fn finish(outcome: &Outcome, with: Result<Ending, LoopError>) {
    *lock(outcome) = Some(with);
}

fn watch(ops: &mut EventOps, fd: &impl AsRawFd) {
    if let Err(error) = ops.add(Events::new(fd, EventSet::IN)) {
        tracing::error!(%error, "a descriptor cannot be watched");
    }
}

struct GuestEnd {
    migration: Arc<Migration>,
    exit_event: EventFd,
    ends: GuestEnds,
    outcome: Outcome,
}

impl MutEventSubscriber for GuestEnd {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.exit_event);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let vm = self.migration.vm();
        match vm.with_machine(|machine| machine.take_exit()) {
            // The primary's guest is the one that counts: the next checkpoint replaces this one.
            Ok(Some(exit)) if self.migration.failover().status().mode == ColoMode::Secondary => {
                tracing::warn!(%exit, "the secondary's guest has ended by itself");
            }
            Ok(Some(GuestExit::Shutdown | GuestExit::Reset)) if self.ends.reboot => {
                if let Err(error) = vm.reset(true) {
                    finish(&self.outcome, Err(error.into()));
                }
            }
            Ok(Some(exit)) => {
                vm.guest_ended();
                if !self.ends.no_shutdown {
                    finish(&self.outcome, Ok(Ending::Guest(exit)));
                }
            }
            Ok(None) => {}
            Err(error) => finish(&self.outcome, Err(error.into())),
        }
    }
}

struct RequestEnd {
    ender: Ender,
    outcome: Outcome,
}

impl MutEventSubscriber for RequestEnd {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &*self.ender.event);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        if let Some(request) = *lock(&self.ender.asked) {
            finish(&self.outcome, Ok(Ending::Request(request)));
        }
    }
}

struct SignalEnd {
    signals: SignalFd,
    outcome: Outcome,
}

impl MutEventSubscriber for SignalEnd {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.signals);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        match self.signals.read() {
            Ok(signal) => finish(&self.outcome, Ok(Ending::Signal(signal))),
            Err(source) => finish(&self.outcome, Err(host("read a signal")(source))),
        }
    }
}

/// How soon typed bytes are offered again that the port had no room for, or whose guest stood still.
const OFFER_AGAIN: Duration = Duration::from_millis(5);

/// What the user types goes to the guest. What its port does not take, the user's side keeps.
struct SerialInput {
    vm: Arc<Vm>,
    fd: RawFd,
    /// Read and not taken; nothing more is read meanwhile.
    typed: Vec<u8>,
    timer: TimerFd,
}

impl AsRawFd for SerialInput {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl SerialInput {
    fn new(vm: Arc<Vm>, fd: RawFd) -> Result<Self, LoopError> {
        let timer = TimerFd::new().map_err(|e| host("make a timer")(e.into()))?;
        Ok(Self {
            vm,
            fd,
            typed: Vec::new(),
            timer,
        })
    }

    /// Reads what was typed; false at its end.
    fn read(&mut self) -> bool {
        let mut typed = [0u8; 64];
        match read_fd(self.fd, &mut typed) {
            Ok(0) | Err(_) => false,
            Ok(count) => {
                self.typed.extend_from_slice(&typed[..count]);
                true
            }
        }
    }

    /// Gives the guest what it takes, and says whether that was all.
    fn offer(&mut self) -> bool {
        match self.vm.with_machine(|m| m.serial_input(&self.typed)) {
            Ok(taken) => drop(self.typed.drain(..taken)),
            Err(error) => {
                tracing::warn!(%error, bytes = self.typed.len(), "serial input lost");
                self.typed.clear();
            }
        }
        self.typed.is_empty()
    }

    fn watch_input(&self, ops: &mut EventOps) {
        // A regular file cannot be watched, and a closed input need not be.
        if let Err(error) = ops.add(Events::new(self, EventSet::IN)) {
            tracing::info!(%error, "the guest's serial line has no input");
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.timer);
        self.watch_input(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let again = events.fd() == self.timer.as_raw_fd();
        if again {
            // It was readable: this does not wait.
            let _ = self.timer.wait();
        } else if !self.read() {
            if let Err(error) = ops.remove(events) {
                tracing::debug!(%error, "serial input stays watched");
            }
            return;
        }
        match (self.offer(), again) {
            (true, true) => self.watch_input(ops),
            (true, false) => {}
            (false, _) => {
                // Not merely muted: a hang-up would be told of again and again.
                if !again && let Err(error) = ops.remove(events) {
                    tracing::debug!(%error, "serial input stays watched");
                }
                if let Err(error) = self.timer.reset(OFFER_AGAIN, None) {
                    tracing::warn!(%error, "serial input is not offered again");
                }
            }
        }
    }
}

fn read_fd(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is ours, and its length is the one given.
    let read = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Signals as a descriptor.
#[derive(Debug)]
pub struct SignalFd(std::os::fd::OwnedFd);

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl SignalFd {
    fn new(signals: &[i32]) -> Result<Self, LoopError> {
        use std::os::fd::FromRawFd;

        use vmm_sys_util::signal::{block_signal, create_sigset};

        for signal in signals {
            block_signal(*signal).map_err(|error| LoopError::Host {
                what: "block a signal",
                source: io::Error::other(format!("{error:?}")),
            })?;
        }
        let set =
            create_sigset(signals).map_err(|error| host("make a set of signals")(error.into()))?;
        // SAFETY: the set is initialised, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(host("make a signalfd")(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of a signal that has come; waits for one.
    pub(crate) fn read(&self) -> io::Result<i32> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        let read = read_fd(self.as_raw_fd(), &mut info)?;
        // `ssi_signo` comes first.
        match info.first_chunk::<4>() {
            Some(number) if read == info.len() => Ok(u32::from_ne_bytes(*number).cast_signed()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
