//! However a driver ends, COLO has ended with it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use migration_stream::{BoxError, TransportError, Vm, VmControl};

use super::*;
use crate::cause::ExitReason;
use crate::secondary::Secondary;
use crate::{
    ColoExit, ColoMode, ColoObserver, FailoverHandle, Message, NoGate, NoReplication, RequestError,
    Role, StatusReason,
};

/// A VM that only counts, and panics where it is told to.
#[derive(Default)]
struct Counting {
    exits: Vec<ColoExit>,
    panics_at: Option<Step>,
}

impl VmControl for Counting {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

impl ColoObserver for Counting {
    fn on_step(&mut self, step: Step, _: StepPhase) {
        assert_ne!(Some(step), self.panics_at, "as it was told to");
    }
    fn colo_exit(&mut self, exit: &ColoExit) {
        self.exits.push(*exit);
    }
}

/// It has no devices.
type Bare = Vm<Counting, ()>;

/// A wire on which each step ends as `ends` says.
struct Scripted<F> {
    ends: F,
    disconnects: Arc<AtomicUsize>,
}

impl<F: FnMut(Step) -> Result<Event, StepError>, R, G> Wire<Bare, R, G> for Scripted<F> {
    fn perform(
        &mut self,
        step: Step,
        _: Option<Instant>,
        _: &mut Hooks<Bare, R, G>,
        _: &mut CheckpointMeter,
    ) -> Result<Performed, StepError> {
        (self.ends)(step).map(Performed::from)
    }
    fn disconnect(&mut self) {
        self.disconnects.fetch_add(1, Ordering::Relaxed);
    }
}

struct Run {
    outcome: std::thread::Result<Result<Outcome, ProtocolMisuse>>,
    exits: Vec<ColoExit>,
    disconnects: usize,
    failover: FailoverHandle,
}

/// Runs a secondary that takes over by itself.
fn run_with(
    panics_at: Option<Step>,
    failover: FailoverHandle,
    ends: impl FnMut(Step) -> Result<Event, StepError>,
) -> Run {
    let disconnects = Arc::new(AtomicUsize::new(0));
    let by_control = Arc::clone(&disconnects);
    let control = ColoControl::new(
        Role::Secondary,
        failover.clone(),
        Duration::MAX,
        move || {
            by_control.fetch_add(1, Ordering::Relaxed);
        },
    )
    .unwrap();
    let mut wire = Scripted {
        ends,
        disconnects: Arc::clone(&disconnects),
    };
    let mut hooks = Hooks {
        vm: Vm {
            control: Counting {
                panics_at,
                ..Counting::default()
            },
            devices: (),
        },
        replication: NoReplication,
        gate: NoGate,
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        run(
            Secondary::new(OnPeerLoss::TakeOver),
            &mut wire,
            &mut hooks,
            &control,
            DriverConfig::default(),
        )
    }));
    Run {
        outcome,
        exits: hooks.vm.control.exits,
        disconnects: disconnects.load(Ordering::Relaxed),
        failover,
    }
}

impl Run {
    fn assert_is_over(&self) {
        assert!(self.disconnects > 0, "the peer was not told");
        let status = self.failover.status();
        assert_eq!(status.mode, ColoMode::None);
        assert_eq!(status.last_mode, ColoMode::Secondary);
        let refused = self.failover.request();
        assert_eq!(refused, Err(RequestError::NotInColo));
    }
}

#[test]
fn a_mistake_of_the_driver_is_reported_as_the_end_of_colo() {
    let run = run_with(None, FailoverHandle::new(), |_| Ok(Event::Done));
    let mistake = run.outcome.as_ref().unwrap().unwrap_err();
    assert_eq!(
        mistake.action,
        Action::Perform(Step::Await(Wait::Message(Message::CheckpointRequest)))
    );
    let exit = ColoExit {
        role: Role::Secondary,
        cause: crate::Cause::Mistake,
    };
    assert_eq!(run.exits, [exit]);
    assert_eq!(run.failover.status().reason, StatusReason::Error);
    run.assert_is_over();
}

#[test]
fn a_vm_that_panics_leaves_no_handle_that_takes_requests() {
    for step in [Step::HoldOutput, Step::StartDirtyLog, Step::ResumeVm] {
        let run = run_with(Some(step), FailoverHandle::new(), |_| Ok(Event::Done));
        run.outcome.as_ref().unwrap_err();
        run.assert_is_over();
    }
}

#[test]
fn a_control_whose_driver_never_runs_leaves_colo() {
    let failover = FailoverHandle::new();
    let control = ColoControl::new(Role::Primary, failover.clone(), Duration::ZERO, || {}).unwrap();
    let clone = control.clone();
    assert_eq!(failover.status().mode, ColoMode::Primary);
    drop(control);
    assert_eq!(failover.status().mode, ColoMode::Primary);
    drop(clone);
    assert_eq!(failover.request(), Err(RequestError::NotInColo));
}

/// Every error that the steps of a driver can have.
fn errors() -> Vec<StepError> {
    let io = io::Error::from;
    let stalled = || {
        TransportError::main(ChannelError::Stalled {
            what: "the channels",
        })
    };
    vec![
        io(io::ErrorKind::TimedOut).into(),
        io(io::ErrorKind::WouldBlock).into(),
        io(io::ErrorKind::UnexpectedEof).into(),
        io(io::ErrorKind::BrokenPipe).into(),
        io(io::ErrorKind::InvalidData).into(),
        TargetError::Transport(stalled()).into(),
        TargetError::Transport(TransportError::main(ChannelError::Ended)).into(),
        SourceError::Transport(stalled()).into(),
        TargetError::ReturnPath(io(io::ErrorKind::ConnectionReset)).into(),
        VmError::new("a test", "an error").into(),
    ]
}

#[test]
fn whatever_error_any_step_has_is_no_mistake_of_the_driver() {
    let mut machine = Secondary::new(OnPeerLoss::TakeOver);
    // Each step of the secondary's script, each error.
    for at in 0..40 {
        let step = match machine.action() {
            Action::Perform(step) => step,
            other => panic!("{other}"),
        };
        for error in errors() {
            let event = error.event(step);
            if step.may_fail() {
                machine.clone().handle(event).unwrap();
            }
        }
        let event = match step {
            Step::Await(Wait::Message(message)) => Event::Message(message),
            _ => Event::Done,
        };
        machine.handle(event).unwrap();
        assert!(at < 40);
    }
    // The same by the driver: a stall of the channels while this side enters COLO.
    for failing in [Step::StartDirtyLog, Step::ReceiveRam, Step::Flush] {
        for index in 0..errors().len() {
            let run = run_with(None, FailoverHandle::new(), |step| match step {
                step if step == failing => Err(errors().swap_remove(index)),
                Step::Await(Wait::Message(message)) => Ok(Event::Message(message)),
                _ => Ok(Event::Done),
            });
            let outcome = run.outcome.as_ref().unwrap().unwrap();
            assert_eq!(run.exits.len(), 1);
            assert_eq!(run.exits[0].reason(), ExitReason::Error);
            if failing == Step::Flush {
                assert!(matches!(outcome, Outcome::Broken(_)), "{outcome}");
                assert_eq!(run.failover.request(), Err(RequestError::Unfit));
            } else {
                assert_eq!(outcome, Outcome::TookOver);
                run.assert_is_over();
            }
        }
    }
}

#[test]
fn a_side_that_was_stopped_for_good_ends_by_itself() {
    let failover = FailoverHandle::new();
    // Before the driver begins, and while it runs.
    failover.stop_for_good();
    let run = run_with(None, failover, |_| Ok(Event::Done));
    assert_eq!(run.outcome.unwrap().unwrap(), Outcome::Quit);
    assert_eq!(run.exits.len(), 1);
    let failover = FailoverHandle::new();
    let stops = failover.clone();
    let run = run_with(None, failover, |step| {
        if step == Step::Send(Message::CheckpointReady) {
            stops.stop_for_good();
        }
        Ok(Event::Done)
    });
    assert_eq!(run.outcome.unwrap().unwrap(), Outcome::Quit);
    assert_eq!(run.failover.request(), Err(RequestError::Stopped));
}
