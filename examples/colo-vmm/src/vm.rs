//! The VM as an operator sees it: a machine and its run state.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use qmp_types::{Event, RunState, ShutdownCause, StatusInfo};

use crate::machine::{GuestImage, Machine, MachineError};
use crate::memory::Memory;
use crate::operator::EventBus;

/// A machine, the run state that operators are told, and the events that go with its changes.
pub struct Vm {
    inner: Mutex<Inner>,
    memory: Arc<Memory>,
    events: Arc<EventBus>,
}

struct Inner {
    /// Another VM has this one's place: see [`Vm::fence`].
    fenced: bool,
    /// The guest stands still whatever `state` says: see [`Vm::suspend`].
    suspended: bool,
    machine: Box<dyn Machine>,
    state: RunState,
    /// What it is when the checkpoint or the hand-over is over that is under way, or that comes.
    after: RunState,
    /// A guest that arrives is to run, if it ran where it comes from.
    autostart: bool,
    /// It is to be reset then; whether the guest wants it.
    reset: Option<bool>,
    /// What a reset loads.
    image: Option<GuestImage>,
}

impl Vm {
    /// A stopped machine in `state`.
    #[must_use]
    pub fn new(machine: Box<dyn Machine>, state: RunState, events: Arc<EventBus>) -> Self {
        let memory = Arc::clone(machine.memory());
        Self {
            inner: Mutex::new(Inner {
                fenced: false,
                suspended: false,
                machine,
                state,
                after: RunState::Running,
                autostart: true,
                reset: None,
                image: None,
            }),
            memory,
            events,
        }
    }

    /// The same with a guest that a reset loads.
    #[must_use]
    pub fn resetting_to(self, image: GuestImage) -> Self {
        self.lock().image = Some(image);
        self
    }

    /// Guest RAM.
    #[must_use]
    pub const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Where its events go.
    #[must_use]
    pub const fn events(&self) -> &Arc<EventBus> {
        &self.events
    }

    /// The run state.
    #[must_use]
    pub fn state(&self) -> RunState {
        self.lock().state
    }

    /// What `query-status` answers.
    #[must_use]
    pub fn status(&self) -> StatusInfo {
        let state = match self.lock() {
            inner if inner.suspended && inner.state == RunState::Running => RunState::Paused,
            inner => inner.state,
        };
        StatusInfo {
            status: state,
            running: state == RunState::Running,
        }
    }

    /// Stops the guest, if it runs, and takes the run state `to`.
    ///
    /// # Errors
    /// The machine's; the run state is as before.
    pub fn stop(&self, to: RunState) -> Result<(), MachineError> {
        let mut inner = self.lock();
        let ran = inner.state == RunState::Running;
        inner.machine.stop()?;
        if !inner.fenced {
            inner.state = to;
        }
        if ran {
            self.events.publish(&Event::Stop);
        }
        Ok(())
    }

    /// Stops the guest for a checkpoint. Until [`Vm::resume_after_checkpoint`] nobody lets it run, and
    /// who had stopped it, or stops it meanwhile, keeps it stopped.
    ///
    /// # Errors
    /// As for [`Vm::stop`].
    pub fn stop_for_checkpoint(&self) -> Result<(), MachineError> {
        let mut inner = self.lock();
        inner.machine.stop()?;
        if inner.fenced {
            return Err(MachineError::Fenced);
        }
        match inner.state {
            RunState::Running => {
                inner.after = RunState::Running;
                self.events.publish(&Event::Stop);
            }
            state @ (RunState::Paused | RunState::Shutdown) => inner.after = state,
            _ => {}
        }
        inner.state = RunState::Colo;
        Ok(())
    }

    /// Stops the guest for a hand-over to another VM, and returns the state before. Until
    /// [`Vm::take_back`] nobody lets it run, and who stops it meanwhile keeps it stopped.
    ///
    /// # Errors
    /// As for [`Vm::stop`].
    pub fn stop_for_hand_over(&self) -> Result<RunState, MachineError> {
        let mut inner = self.lock();
        inner.machine.stop()?;
        let before = inner.state;
        if inner.fenced {
            return Err(MachineError::Fenced);
        }
        inner.after = before;
        inner.state = RunState::FinishMigrate;
        if before == RunState::Running {
            self.events.publish(&Event::Stop);
        }
        Ok(before)
    }

    /// The hand-over has failed: the guest does what it would do without.
    ///
    /// # Errors
    /// As for [`Vm::resume`].
    pub fn take_back(&self) -> Result<Instant, MachineError> {
        let mut inner = self.lock();
        if inner.after == RunState::Running {
            return self.resume_locked(&mut inner);
        }
        if !inner.fenced {
            inner.state = inner.after;
        }
        Ok(Instant::now())
    }

    /// Sets whether a guest that arrives is to run, if it ran where it comes from.
    pub fn set_autostart(&self, autostart: bool) {
        self.lock().autostart = autostart;
    }

    /// A guest has arrived, which `ran` where it comes from. It runs, if it is to.
    ///
    /// # Errors
    /// As for [`Vm::resume`]; it is paused then.
    pub fn arrived(&self, ran: bool) -> Result<(), MachineError> {
        let mut inner = self.lock();
        if !inner.fenced {
            inner.state = RunState::Paused;
        }
        if inner.autostart && ran {
            self.resume_locked(&mut inner)?;
        }
        Ok(())
    }

    /// A guest has arrived that is checkpointed, and which `ran` where it comes from: whether it is to run
    /// from the first checkpoint on.
    pub fn arrived_for_checkpoints(&self, ran: bool) {
        let mut inner = self.lock();
        inner.after = if inner.autostart && ran {
            RunState::Running
        } else {
            RunState::Paused
        };
    }

    /// The checkpoint is over: lets the guest run, unless an operator has stopped it, or it has ended.
    ///
    /// # Errors
    /// As for [`Vm::resume`].
    pub fn resume_after_checkpoint(&self) -> Result<Instant, MachineError> {
        let mut inner = self.lock();
        if let Some(guest) = inner.reset.take() {
            self.reset_machine(&mut inner, guest)?;
        }
        if inner.after == RunState::Running {
            return self.resume_locked(&mut inner);
        }
        inner.state = inner.after;
        Ok(Instant::now())
    }

    /// Resets the machine: its guest begins anew. Within a checkpoint that is done when it is over.
    /// `guest`: the guest wants it.
    ///
    /// # Errors
    /// The guest is on its way from or to another VM, or the machine's.
    pub fn reset(&self, guest: bool) -> Result<(), ResetError> {
        let mut inner = self.lock();
        match inner.state {
            RunState::Colo => inner.reset = Some(guest),
            RunState::Running => {
                self.reset_machine(&mut inner, guest)?;
                if !inner.suspended {
                    inner.machine.resume()?;
                }
            }
            RunState::Shutdown => {
                self.reset_machine(&mut inner, guest)?;
                inner.state = RunState::Paused;
            }
            RunState::Paused | RunState::PreLaunch => self.reset_machine(&mut inner, guest)?,
            state => return Err(ResetError::State { state }),
        }
        Ok(())
    }

    fn reset_machine(&self, inner: &mut Inner, guest: bool) -> Result<(), MachineError> {
        let Inner { machine, image, .. } = inner;
        machine.reset(image.as_ref().ok_or(MachineError::NoImage)?)?;
        let reason = if guest {
            ShutdownCause::GuestReset
        } else {
            ShutdownCause::HostQmpSystemReset
        };
        self.events.publish(&Event::Reset { guest, reason });
        Ok(())
    }

    /// An operator stops the guest, whatever it is doing: it runs, or would run when the checkpoint or the
    /// hand-over is over, or when it has arrived.
    ///
    /// # Errors
    /// As for [`Vm::stop`].
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut inner = self.lock();
        match inner.state {
            RunState::Running => {
                inner.machine.stop()?;
                inner.state = RunState::Paused;
                self.events.publish(&Event::Stop);
            }
            RunState::InMigrate => {
                inner.autostart = false;
                inner.after = RunState::Paused;
            }
            RunState::Colo | RunState::FinishMigrate if inner.after == RunState::Running => {
                inner.after = RunState::Paused;
            }
            _ => {}
        }
        Ok(())
    }

    /// An operator lets the guest run, or has it run when it has arrived.
    ///
    /// # Errors
    /// The guest cannot run in this state; the machine's.
    pub fn cont(&self) -> Result<(), ContError> {
        // The state may not change between this look at it and the resume: what reads the machine of a guest
        // that stands still has set it.
        let mut inner = self.lock();
        match inner.state {
            RunState::InMigrate => {
                inner.autostart = true;
                inner.after = RunState::Running;
            }
            state @ (RunState::Colo
            | RunState::FinishMigrate
            | RunState::Shutdown
            | RunState::InternalError) => return Err(ContError::State { state }),
            _ => {
                self.resume_locked(&mut inner)?;
            }
        }
        Ok(())
    }

    /// Lets the guest run, if it does not. Returns when it was resumed.
    ///
    /// # Errors
    /// The machine's; the run state is as before.
    pub fn resume(&self) -> Result<Instant, MachineError> {
        self.resume_locked(&mut self.lock())
    }

    fn resume_locked(&self, inner: &mut Inner) -> Result<Instant, MachineError> {
        if inner.fenced {
            return Err(MachineError::Fenced);
        }
        let ran = inner.state == RunState::Running;
        let resumed = if inner.suspended {
            Instant::now()
        } else {
            inner.machine.resume()?
        };
        inner.state = RunState::Running;
        if !ran && !inner.suspended {
            self.events.publish(&Event::Resume);
        }
        Ok(resumed)
    }

    /// The guest has ended by itself, and its machine is stopped.
    pub fn guest_ended(&self) {
        let mut inner = self.lock();
        match inner.state {
            // It is being copied as it ended.
            RunState::Colo => inner.after = RunState::Shutdown,
            _ => inner.state = RunState::Shutdown,
        }
        drop(inner);
        let reason = ShutdownCause::GuestShutdown;
        self.events.publish(&Event::Shutdown {
            guest: true,
            reason,
        });
    }

    /// Takes another run state without touching the guest, which is stopped.
    pub fn set_state(&self, state: RunState) {
        let mut inner = self.lock();
        if !inner.fenced {
            inner.state = state;
        }
    }

    /// Stops the guest for good: another VM has its place. Nobody lets it run again.
    ///
    /// # Errors
    /// The machine's; it is not let run again even so.
    pub fn fence(&self) -> Result<(), MachineError> {
        let mut inner = self.lock();
        let ran = inner.state == RunState::Running;
        inner.fenced = true;
        inner.after = RunState::InternalError;
        inner.state = RunState::InternalError;
        inner.machine.stop()?;
        if ran {
            self.events.publish(&Event::Stop);
        }
        Ok(())
    }

    /// Has the guest stand still until [`Vm::go_on`], whoever stops it and lets it run meanwhile: they
    /// are not told that it does not run.
    ///
    /// # Errors
    /// The machine's; it is not let run even so.
    pub fn suspend(&self) -> Result<(), MachineError> {
        let mut inner = self.lock();
        inner.suspended = true;
        inner.machine.stop()?;
        if inner.state == RunState::Running {
            self.events.publish(&Event::Stop);
        }
        Ok(())
    }

    /// Ends [`Vm::suspend`]: the guest runs if it would have without.
    ///
    /// # Errors
    /// The machine's.
    pub fn go_on(&self) -> Result<(), MachineError> {
        let mut inner = self.lock();
        let was = std::mem::take(&mut inner.suspended);
        if was && inner.state == RunState::Running {
            inner.machine.resume()?;
            self.events.publish(&Event::Resume);
        }
        Ok(())
    }

    /// Does something with the machine. Its run state is not to be changed by it.
    pub fn with_machine<R>(&self, f: impl FnOnce(&mut dyn Machine) -> R) -> R {
        f(&mut *self.lock().machine)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A thread that panicked in a KVM call has left the machine as that call did; the process
        // goes on to report it.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why an operator cannot let a guest run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContError {
    /// It is being copied, is on its way to another VM, or has ended.
    #[error("the guest cannot run in the state '{state}'")]
    State {
        /// The state.
        state: RunState,
    },
    /// The machine's.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

/// Why a VM was not reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResetError {
    /// Its guest is on its way from or to another VM.
    #[error("the VM cannot be reset in the state '{state}'")]
    State {
        /// The state.
        state: RunState,
    },
    /// The machine's.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::guest::WorkloadConfig;
    use crate::machine::{CpuOptions, MachineConfig, RunState as Machine, SimMachine};

    fn vm(state: RunState) -> Vm {
        let machine = SimMachine::new(MachineConfig {
            memory: Arc::new(Memory::new(16 << 20).unwrap()),
            vcpus: 1,
            guest: Some(GuestImage::Workload(WorkloadConfig {
                memory_mib: 16,
                ..WorkloadConfig::default()
            })),
            serial: Box::new(std::io::sink()),
            cpu: CpuOptions::default(),
        });
        Vm::new(Box::new(machine.unwrap()), state, Arc::new(EventBus::new()))
    }

    /// Sets it, also when a test fails: another thread waits for it.
    struct WhenDropped<'a>(&'a AtomicBool);

    impl Drop for WhenDropped<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn is_running(vm: &Vm) -> bool {
        vm.with_machine(|machine| machine.state()) == Machine::Running
    }

    #[test]
    fn an_operator_who_stops_and_lets_go_on_disturbs_no_checkpoint_and_no_hand_over() {
        let vm = vm(RunState::Paused);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    vm.pause().unwrap();
                    match vm.cont() {
                        Ok(()) | Err(ContError::State { .. }) => {}
                        Err(ContError::Machine(error)) => panic!("{error}"),
                    }
                }
            });
            let _done = WhenDropped(&done);
            for round in 0..2000 {
                let is_checkpoint = round % 2 == 0;
                if is_checkpoint {
                    vm.stop_for_checkpoint().unwrap();
                } else {
                    vm.stop_for_hand_over().unwrap();
                }
                for _ in 0..10 {
                    assert!(!is_running(&vm), "round {round}");
                    thread::yield_now();
                }
                if is_checkpoint {
                    vm.resume_after_checkpoint().unwrap();
                } else {
                    vm.take_back().unwrap();
                }
            }
        });
    }

    #[test]
    fn a_stop_while_the_guest_is_handed_over_holds_when_it_comes_back() {
        let vm = vm(RunState::Paused);
        vm.resume().unwrap();
        assert_eq!(vm.stop_for_hand_over().unwrap(), RunState::Running);
        vm.pause().unwrap();
        assert!(matches!(vm.cont(), Err(ContError::State { .. })));
        vm.take_back().unwrap();
        assert_eq!(vm.state(), RunState::Paused);
        assert!(!is_running(&vm));
        vm.cont().unwrap();
        assert!(is_running(&vm));
    }

    #[test]
    fn the_last_word_of_an_operator_counts_when_a_guest_arrives() {
        for (stop, ran, runs) in [
            (false, true, true),
            (true, true, false),
            (false, false, false),
        ] {
            let vm = vm(RunState::InMigrate);
            vm.pause().unwrap();
            vm.cont().unwrap();
            if stop {
                vm.pause().unwrap();
            }
            vm.arrived(ran).unwrap();
            assert_eq!(is_running(&vm), runs, "stop {stop}, ran {ran}");
        }
    }
}
