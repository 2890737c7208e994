//! How long the peer may take.

use std::time::{Duration, Instant};

use crate::step::{Bound, Step};

/// How long the peer may take. A limit that passes ends COLO on this side with a
/// [`Cause::DeadlineExpired`](crate::Cause::DeadlineExpired) that names the wait.
///
/// The death of the peer's process is noticed at once, by its closed connection. The limits are for a silent peer:
/// its host lost power, a cable was pulled, its process is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    message: Duration,
    checkpoint: Duration,
    idle: Duration,
}

impl Default for Deadlines {
    /// 5 s for a message, 30 s for a checkpoint, 60 s for the next request. 5 s covers two scheduling delays of an
    /// overloaded host and a few lost segments, and most clients of the guest wait longer.
    fn default() -> Self {
        Self {
            message: Duration::from_secs(5),
            checkpoint: Duration::from_secs(30),
            idle: Duration::from_secs(60),
        }
    }
}

impl Deadlines {
    /// Returns deadlines that limit every wait for the peer to `limit`: the sending of a message, one that the
    /// peer owes at once, and what [`Deadlines::checkpoint`] and [`Deadlines::idle`] change.
    #[must_use]
    pub const fn all(limit: Duration) -> Self {
        Self {
            message: limit,
            checkpoint: limit,
            idle: limit,
        }
    }

    /// Limits a whole checkpoint, from the request until the VM runs again, and everything that moves
    /// RAM. The default is 30 s: 3 GiB of dirty pages on a 1 Gbit/s link.
    #[must_use]
    pub const fn checkpoint(mut self, limit: Duration) -> Self {
        self.checkpoint = limit;
        self
    }

    /// Limits a secondary's wait for the next checkpoint request; a primary does not look at it. The
    /// default is 60 s, three times QEMU's default of `x-checkpoint-delay`. A primary sends nothing
    /// between checkpoints, so the limit has to be longer than its delay: see
    /// [`Deadlines::for_checkpoint_delay`].
    #[must_use]
    pub const fn idle(mut self, limit: Duration) -> Self {
        self.idle = limit;
        self
    }

    /// Raises the limit for the next request to three times `delay`, if it is lower: for a primary
    /// that takes a checkpoint every `delay`.
    #[must_use]
    pub fn for_checkpoint_delay(mut self, delay: Duration) -> Self {
        self.idle = self.idle.max(delay.saturating_mul(3));
        self
    }

    /// How long a channel may block outside a checkpoint.
    pub(crate) const fn of_message(&self) -> Duration {
        self.message
    }
}

/// Turns the bounds of steps into instants, and knows since when a checkpoint has been going on.
#[derive(Clone, Debug)]
pub struct Timekeeper {
    deadlines: Deadlines,
    checkpoint_began: Option<Instant>,
}

impl Timekeeper {
    /// A timekeeper outside any checkpoint.
    #[must_use]
    pub const fn new(deadlines: Deadlines) -> Self {
        Self {
            deadlines,
            checkpoint_began: None,
        }
    }

    /// Until when the step that begins `now` may go on. `None` for a local step, and for waits that
    /// are not for the peer: for the next checkpoint, and for an operator's decision.
    ///
    /// To be asked once for each step, in order: the steps that begin and end a checkpoint are
    /// noted.
    pub fn begin(&mut self, step: Step, now: Instant) -> Option<Instant> {
        match step {
            first if first.begins_checkpoint() => self.checkpoint_began = Some(now),
            Step::ReportCheckpoint => self.checkpoint_began = None,
            _ => {}
        }
        let checkpoint = || {
            self.checkpoint_began
                .unwrap_or(now)
                .checked_add(self.deadlines.checkpoint)
        };
        match step.bound()? {
            Bound::Message => [now.checked_add(self.deadlines.message), checkpoint()]
                .into_iter()
                .flatten()
                .min(),
            Bound::Checkpoint => checkpoint(),
            Bound::Idle => now.checked_add(self.deadlines.idle),
            Bound::Schedule | Bound::Operator => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::{Action, Event};
    use crate::machine::{Machine, Script};
    use crate::message::Message;
    use crate::primary::Primary;
    use crate::secondary::Secondary;
    use crate::step::Wait;
    use crate::{OnPeerLoss, Resume};

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn all_of_a_checkpoint_shares_one_deadline_and_the_next_has_its_own() {
        let mut time = Timekeeper::new(Deadlines::default());
        let start = Instant::now();
        let request = Step::Send(Message::CheckpointRequest);
        assert_eq!(time.begin(request, start), Some(start + 5 * S));
        assert_eq!(time.begin(Step::SendRam, start + S), Some(start + 30 * S));
        let received = Step::Await(Wait::Message(Message::VmstateReceived));
        assert_eq!(time.begin(received, start + 20 * S), Some(start + 30 * S));
        let loaded = Step::Send(Message::VmstateLoaded);
        assert_eq!(time.begin(loaded, start + 28 * S), Some(start + 30 * S));
        assert_eq!(time.begin(Step::ReportCheckpoint, start + 29 * S), None);
        let again = start + 60 * S;
        assert_eq!(time.begin(request, again), Some(again + 5 * S));
        assert_eq!(time.begin(Step::SendRam, again), Some(again + 30 * S));
    }

    #[test]
    fn the_secondary_is_as_patient_as_the_primaries_delay_asks() {
        let deadlines = Deadlines::default().for_checkpoint_delay(100 * S);
        let mut time = Timekeeper::new(deadlines);
        let start = Instant::now();
        let idle = Step::Await(Wait::Message(Message::CheckpointRequest));
        assert_eq!(time.begin(idle, start), Some(start + 300 * S));
    }

    /// Walks a script once round and checks that each step on the wire has a deadline.
    fn every_wire_step_has_a_deadline<S: Script>(mut machine: Machine<S>, but: &[Step]) {
        let mut time = Timekeeper::new(Deadlines::default());
        for _ in 0..64 {
            let Action::Perform(step) = machine.action() else {
                panic!("{}", machine.action());
            };
            let deadline = time.begin(step, Instant::now());
            assert_eq!(
                deadline.is_some(),
                step.is_on_the_wire() && !but.contains(&step),
                "{step}"
            );
            let event = match step {
                Step::Await(Wait::Message(message)) => Event::Message(message),
                Step::Await(_) => Event::CheckpointDue,
                _ => Event::Done,
            };
            machine.handle(event).unwrap();
        }
    }

    #[test]
    fn no_wait_for_the_peer_is_without_a_deadline() {
        for resume in [Resume::OnLoaded, Resume::OnReceived, Resume::OnLocalCopy] {
            every_wire_step_has_a_deadline(
                Primary::resuming(resume, OnPeerLoss::Wait),
                &[Step::Await(Wait::CheckpointDue)],
            );
        }
        every_wire_step_has_a_deadline(Secondary::new(OnPeerLoss::Wait), &[]);
    }
}
