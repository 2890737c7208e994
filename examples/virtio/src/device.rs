//! A device in a VM: its registers, its queues, and the thread that serves them.
//!
//! Registers, queues and the model are behind one lock. The thread takes it for a bounded piece of
//! work, a vCPU for a register; interrupt registers and notifications take none. Guest memory is
//! accessed under the lock alone, so nothing writes into it after a driver's reset has returned.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;
use vmstate::{DeviceError, VmState};

use crate::ring::{Ring, RingError};
use crate::state::{StateError, TransportState};
use crate::transport::{Action, Identity, Transport, register};
use crate::{Interrupt, IrqLine};

/// Requests that a model takes from a queue before others get the lock.
pub const BATCH: usize = 64;
/// Bytes of data after which it lets others have it, too.
pub const BATCH_BYTES: u64 = 1 << 20;

/// Whether a model has done all that it can for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Until the driver or a source says that there is more.
    Done,
    /// No: it is to be called again.
    More,
}

/// A descriptor that a model waits for.
#[derive(Clone, Debug)]
pub struct Source {
    /// The descriptor.
    pub fd: Arc<OwnedFd>,
    /// Whether the model waits until it can be read.
    pub readable: bool,
    /// Whether the model waits until it can be written.
    pub writable: bool,
    /// By what the model knows it.
    pub token: u32,
}

/// What a model works with while it holds the device's lock.
#[derive(Debug)]
pub struct Context<'a, M> {
    /// Guest memory.
    pub memory: &'a M,
    /// The queues. One that the driver does not use, or does no longer, is `None`.
    pub rings: &'a mut [Option<Ring>],
    /// Whether requests may be taken from queues. While the device pauses, they may not.
    pub running: bool,
    /// Set by a model that has changed its configuration space.
    pub config_changed: bool,
}

/// What a kind of device does, without the registers that all kinds have.
pub trait Model: Send + 'static {
    /// The state that travels.
    type State: VmState + Send + 'static;

    /// Returns what the device is and offers.
    fn identity(&self) -> Identity;

    /// Returns the configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes a driver's write to the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Becomes live with these features.
    ///
    /// # Errors
    /// It cannot; the driver is told that the device needs a reset.
    fn activate(&mut self, features: u64) -> io::Result<()> {
        let _ = features;
        Ok(())
    }

    /// Forgets the driver. What is in flight ends without it.
    fn reset(&mut self);

    /// Takes requests from a queue, at most about [`BATCH`].
    ///
    /// # Errors
    /// The driver has broken the queue: the device needs a reset.
    fn process<M: GuestMemory>(
        &mut self,
        queue: usize,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError>;

    /// Returns what the model waits for. `live` says whether requests may be taken from queues.
    fn sources(&self, live: bool) -> Vec<Source> {
        let _ = live;
        Vec::new()
    }

    /// Does what a source has made possible, a bounded piece of it. All queues are processed after it.
    ///
    /// # Errors
    /// As [`Model::process`].
    fn ready<M: GuestMemory>(
        &mut self,
        token: u32,
        context: &mut Context<'_, M>,
    ) -> Result<Progress, RingError> {
        let _ = (token, context);
        Ok(Progress::Done)
    }

    /// Returns how many requests have been taken and not been ended.
    fn in_flight(&self) -> usize {
        0
    }

    /// Returns the state, with that of the registers.
    fn save(&self, transport: TransportState) -> Self::State;

    /// Returns the registers' part of a state.
    fn transport(state: &Self::State) -> &TransportState;

    /// Checks the model's own part of a state.
    ///
    /// # Errors
    /// It is not one of this device.
    fn check(&self, state: &Self::State) -> Result<(), StateError> {
        let _ = state;
        Ok(())
    }

    /// Takes on its own part of a state. It has been checked, and the model was reset before.
    fn install(&mut self, state: Self::State) {
        let _ = state;
    }
}

/// A device without its type, for a VMM's list of them.
pub trait MmioDevice: fmt::Debug + Send + Sync {
    /// Reads at an offset in the device's region.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at an offset in the device's region.
    fn write(&self, offset: u64, data: &[u8]);

    /// Returns one event for each queue. A VMM has the kernel write it when the driver writes the
    /// queue's number to [`register::QUEUE_NOTIFY`].
    fn queue_events(&self) -> &[EventFd];

    /// Takes no more requests, and waits until those in flight have ended.
    ///
    /// # Errors
    /// Some have not after `limit`. They will end, and the device takes no new ones before
    /// [`MmioDevice::resume`]; it may be called again to wait longer.
    fn pause(&self, limit: Duration) -> Result<(), PauseError>;

    /// Takes requests again.
    fn resume(&self);
}

/// Requests had not ended when a pause should have been reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{in_flight} requests had not ended {limit:?} after the device was to pause")]
pub struct PauseError {
    /// How many.
    pub in_flight: usize,
    /// How long they had.
    pub limit: Duration,
}

struct Core<D, M> {
    transport: Transport,
    model: D,
    rings: Vec<Option<Ring>>,
    memory: Arc<M>,
    running: bool,
    /// All queues are to be looked at, whether or not the driver has notified.
    revisit: bool,
    stop: bool,
    /// A driver's fault was told of in the log.
    told: bool,
}

struct Shared<D, M> {
    core: Mutex<Core<D, M>>,
    drained: Condvar,
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    wake: OwnedFd,
}

/// A device with its thread. Clones are the same device; the thread ends with the last of them.
pub struct Device<D: Model, M: GuestMemory + Send + Sync + 'static> {
    shared: Arc<Shared<D, M>>,
    // Dropped behind `shared` by the last clone.
    _thread: Arc<Thread<D, M>>,
}

struct Thread<D, M> {
    shared: Arc<Shared<D, M>>,
    handle: Option<JoinHandle<()>>,
}

impl<D: Model, M: GuestMemory + Send + Sync + 'static> Clone for Device<D, M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            _thread: Arc::clone(&self._thread),
        }
    }
}

impl<D: Model, M: GuestMemory + Send + Sync + 'static> fmt::Debug for Device<D, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = self.shared.lock();
        f.debug_struct("Device")
            .field("transport", &core.transport)
            .field("running", &core.running)
            .finish_non_exhaustive()
    }
}

impl<D, M> Drop for Thread<D, M> {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake();
        if let Some(handle) = self.handle.take()
            && handle.thread().id() != thread::current().id()
        {
            // It does one bounded piece of work at most.
            let _ = handle.join();
        }
    }
}

impl<D, M> Shared<D, M> {
    fn lock(&self) -> MutexGuard<'_, Core<D, M>> {
        // A panic in the thread leaves registers and queues that are checked at each use.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl<D: Model, M: GuestMemory + Send + Sync + 'static> Device<D, M> {
    /// Starts the thread of a device, which is paused.
    ///
    /// # Errors
    /// The host has no descriptor or thread for it.
    pub fn new(model: D, memory: Arc<M>, line: Box<dyn IrqLine>) -> io::Result<Self> {
        let interrupt = Arc::new(Interrupt::new(line));
        let transport = Transport::new(model.identity(), model.config(), Arc::clone(&interrupt));
        let queues = transport.queues().len();
        let kicks = (0..queues).map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
        let shared = Arc::new(Shared {
            core: Mutex::new(Core {
                rings: (0..queues).map(|_| None).collect(),
                transport,
                model,
                memory,
                running: false,
                revisit: false,
                stop: false,
                told: false,
            }),
            drained: Condvar::new(),
            interrupt,
            kicks: kicks.collect::<Result<_, _>>()?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        });
        let for_thread = Arc::clone(&shared);
        let handle = thread::Builder::new()
            .name("virtio".to_owned())
            .spawn(move || serve(&for_thread))?;
        let thread = Thread {
            shared: Arc::clone(&shared),
            handle: Some(handle),
        };
        Ok(Self {
            shared,
            _thread: Arc::new(thread),
        })
    }

    /// Calls `f` with the model, under the device's lock. The driver is told if the configuration
    /// space has changed.
    pub fn with_model<R>(&self, f: impl FnOnce(&mut D) -> R) -> R {
        let mut core = self.shared.lock();
        let result = f(&mut core.model);
        let config = core.model.config();
        core.transport.set_config(config);
        drop(core);
        self.shared.wake();
        result
    }

    /// Returns the status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.shared.lock().transport.status()
    }

    /// Returns whether no request is taken, and none in flight.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.shared.lock().is_paused()
    }

    fn paused(&self) -> Result<MutexGuard<'_, Core<D, M>>, StateError> {
        let core = self.shared.lock();
        if core.is_paused() {
            Ok(core)
        } else {
            Err(StateError::NotPaused)
        }
    }
}

impl<D: Model, M: GuestMemory + Send + Sync + 'static> MmioDevice for Device<D, M> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == register::INTERRUPT_STATUS
            && let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data)
        {
            *data = self.shared.interrupt.status().to_le_bytes();
            return;
        }
        self.shared.lock().transport.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(bytes) = <[u8; 4]>::try_from(data) {
            let value = u32::from_le_bytes(bytes);
            match offset {
                register::INTERRUPT_ACK => return self.shared.interrupt.acknowledge(value),
                register::QUEUE_NOTIFY => {
                    let index = usize::try_from(value).unwrap_or(usize::MAX);
                    if let Some(kick) = self.shared.kicks.get(index) {
                        // A full counter is a notification as well.
                        let _ = kick.write(1);
                    }
                    return;
                }
                _ => {}
            }
        }
        let mut core = self.shared.lock();
        core.write(offset, data);
        drop(core);
        self.shared.wake();
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn pause(&self, limit: Duration) -> Result<(), PauseError> {
        let begun = Instant::now();
        let mut core = self.shared.lock();
        core.running = false;
        self.shared.wake();
        while core.model.in_flight() > 0 {
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(PauseError {
                    in_flight: core.model.in_flight(),
                    limit,
                });
            }
            let waited = self.shared.drained.wait_timeout(core, left);
            core = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    fn resume(&self) {
        let mut core = self.shared.lock();
        if !core.running {
            core.running = true;
            core.revisit = true;
            self.shared.interrupt.raise_pending();
        }
        drop(core);
        self.shared.wake();
    }
}

impl<D: Model, M: GuestMemory + Send + Sync + 'static> vmstate::Device for Device<D, M> {
    type State = D::State;

    fn save(&mut self) -> Result<D::State, DeviceError> {
        let core = self.paused()?;
        let mut transport = core.transport.save();
        for (setup, ring) in transport.queues.iter_mut().zip(&core.rings) {
            if let Some(ring) = ring {
                (setup.next_avail, setup.next_used) = ring.positions();
            }
        }
        Ok(core.model.save(transport))
    }

    fn check(&self, state: &D::State) -> Result<(), DeviceError> {
        let core = self.shared.lock();
        let transport = D::transport(state);
        core.transport.check(transport)?;
        // Guest memory may not have been loaded yet: addresses are looked at, not what is there.
        transport.queues_lie_in(&*core.memory)?;
        Ok(core.model.check(state)?)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut core = self.paused()?;
        core.stop_queues();
        core.transport.power_on();
        let config = core.model.config();
        core.transport.set_config_silently(config);
        Ok(())
    }

    fn install(&mut self, state: D::State) -> Result<(), DeviceError> {
        let mut core = self.paused()?;
        let core = &mut *core;
        core.transport.install(D::transport(&state));
        core.model.install(state);
        let config = core.model.config();
        core.transport.set_config_silently(config);
        if core.transport.is_live() {
            core.open_rings()?;
            core.model.activate(core.transport.features())?;
        }
        Ok(())
    }
}

impl<D: Model, M: GuestMemory> Core<D, M> {
    fn is_paused(&self) -> bool {
        !self.running && self.model.in_flight() == 0
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match self.transport.write(offset, data) {
            Action::Activate => self.activate(),
            Action::Reset | Action::Fail => {
                self.stop_queues();
                let config = self.model.config();
                self.transport.set_config_silently(config);
            }
            Action::StopQueue(index) => {
                if let Some(ring) = self.rings.get_mut(usize::from(index)) {
                    *ring = None;
                }
            }
            Action::Config(at) => {
                self.model.write_config(at, data);
                let config = self.model.config();
                self.transport.set_config_silently(config);
            }
            // Notifications never come here.
            Action::None | Action::Notify(_) => {}
        }
    }

    fn activate(&mut self) {
        let opened = self.open_rings();
        let features = self.transport.features();
        match opened.map(|()| self.model.activate(features)) {
            Ok(Ok(())) => self.revisit = true,
            Ok(Err(error)) => self.give_up(&error),
            Err(error) => self.give_up(&error),
        }
    }

    fn open_rings(&mut self) -> Result<(), StateError> {
        let features = self.transport.features();
        for (ring, setup) in self.rings.iter_mut().zip(self.transport.queues()) {
            *ring = None;
            if setup.ready {
                *ring = Some(Ring::new(setup.open(features, &*self.memory)?));
            }
        }
        Ok(())
    }

    fn stop_queues(&mut self) {
        self.rings.fill_with(|| None);
        self.revisit = false;
        self.model.reset();
    }

    fn give_up(&mut self, error: &(dyn std::error::Error + 'static)) {
        // A guest must not be able to fill the log.
        if self.told {
            tracing::debug!(error, "the device needs a reset");
        } else {
            tracing::warn!(error, "the device needs a reset");
            self.told = true;
        }
        self.stop_queues();
        self.transport.needs_reset();
    }

    /// Lets the model work, and tells the driver what has come of it.
    fn step(
        &mut self,
        interrupt: &Interrupt,
        work: impl FnOnce(&mut D, &mut Context<'_, M>) -> Result<Progress, RingError>,
    ) -> Progress {
        let mut context = Context {
            memory: &*self.memory,
            rings: &mut self.rings,
            running: self.running,
            config_changed: false,
        };
        let done = work(&mut self.model, &mut context);
        if context.config_changed {
            let config = self.model.config();
            self.transport.set_config(config);
        }
        let told = tell(&mut self.rings, &*self.memory, interrupt);
        match done.and_then(|progress| told.map(|()| progress)) {
            Ok(progress) => progress,
            Err(error) => {
                self.give_up(&error);
                Progress::Done
            }
        }
    }
}

fn tell<M: GuestMemory>(
    rings: &mut [Option<Ring>],
    memory: &M,
    interrupt: &Interrupt,
) -> Result<(), RingError> {
    let mut wanted = false;
    for ring in rings.iter_mut().flatten() {
        wanted |= ring.wants_interrupt(memory)?;
    }
    if wanted {
        interrupt.queue_used();
    }
    Ok(())
}

/// The thread of a device.
fn serve<D: Model, M: GuestMemory>(shared: &Shared<D, M>) {
    let mut pending = vec![false; shared.kicks.len()];
    loop {
        let (running, sources) = {
            let mut core = shared.lock();
            if core.stop {
                return;
            }
            if std::mem::take(&mut core.revisit) {
                pending.fill(true);
            }
            let live = core.running && core.transport.is_live();
            (core.running, core.model.sources(live))
        };
        let busy = running && pending.iter().any(|pending| *pending);
        let ready = match wait(shared, running, &sources, busy) {
            Ok(ready) => ready,
            Err(error) => {
                tracing::error!(%error, "the device's thread cannot wait for events");
                let mut core = shared.lock();
                core.give_up(&error);
                return;
            }
        };
        if ready.woken {
            // Nothing but its being there counts.
            let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
        }
        for index in ready.kicks {
            let _ = shared.kicks[index].read();
            pending[index] = true;
        }
        for token in ready.tokens {
            let ready = || {
                let mut core = shared.lock();
                core.step(&shared.interrupt, |model, context| {
                    model.ready(token, context)
                })
            };
            while ready() == Progress::More {
                // A vCPU may wait for the lock.
                thread::yield_now();
            }
            pending.fill(true);
        }
        for (index, pending) in pending.iter_mut().enumerate() {
            let mut core = shared.lock();
            if !core.running || !*pending {
                continue;
            }
            *pending = core.rings[index].is_some()
                && core.step(&shared.interrupt, |model, context| {
                    model.process(index, context)
                }) == Progress::More;
        }
        if shared.lock().model.in_flight() == 0 {
            shared.drained.notify_all();
        }
    }
}

struct Ready {
    woken: bool,
    kicks: Vec<usize>,
    tokens: Vec<u32>,
}

/// Waits until there is something to do; not at all if `busy`.
fn wait<D, M>(
    shared: &Shared<D, M>,
    running: bool,
    sources: &[Source],
    busy: bool,
) -> io::Result<Ready> {
    let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
    // While the device pauses, a notification waits in its event.
    let kicks = if running { &shared.kicks[..] } else { &[] };
    for kick in kicks {
        // SAFETY: `shared` owns the event, and is borrowed for as long as `fds`.
        let fd = unsafe { BorrowedFd::borrow_raw(kick.as_raw_fd()) };
        fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
    }
    for source in sources {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, source.readable);
        flags.set(PollFlags::OUT, source.writable);
        fds.push(PollFd::new(&*source.fd, flags));
    }
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, busy.then_some(&now)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let set: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
    let (kicked, others) = set[1..].split_at(kicks.len());
    Ok(Ready {
        woken: set[0],
        kicks: (0..kicked.len()).filter(|index| kicked[*index]).collect(),
        tokens: (sources.iter().zip(others))
            .filter(|(_, set)| **set)
            .map(|(source, _)| source.token)
            .collect(),
    })
}
