//! The liveness of the peer: which of its beats were received, and which of ours it has answered.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use migration_stream::io::deadline_from;

use super::beat::{BEAT_LEN, Beat, BeatError, Phase};
use crate::failover::Role;
use crate::policy::OnHeartbeatLoss;

/// Who beats, and how. Made by [`Rhythm::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rhythm {
    /// This side.
    pub role: Role,
    /// The pair: the guest's UUID.
    pub session: [u8; 16],
    /// This process, by a number that no other process has. [`Rhythm::new`] draws it at random.
    ///
    /// It tells a peer that was started again from the one before, and it is the name under which
    /// this side asks an arbiter ([`Owner`](crate::arbiter::Owner)). A side refuses the beats of a peer
    /// with its own number ([`BeatError::SameProcess`](crate::raw::BeatError::SameProcess)): an arbiter
    /// could not tell the two apart, and would let both run. A peer that is started again with the number
    /// of the one before is refused until its beats have overtaken the old ones
    /// ([`BeatError::Sequence`](crate::raw::BeatError::Sequence)).
    pub process: u64,
    /// Between two beats. See [`Rhythm::interval`].
    pub interval: Duration,
    /// How many beats may be missing. See [`Rhythm::missed`].
    pub missed: u32,
    /// What this side does when the peer is lost.
    pub on_loss: OnHeartbeatLoss,
    /// Whether the peer is lost as soon as the connection ends, not after the missed beats; `false` by default. For
    /// a link that does not break while both hosts live: on any other it ends a pair that is well.
    pub closed_is_loss: bool,
}

impl Rhythm {
    /// Returns a rhythm of 50 ms that takes a peer for lost after 3 missing beats, for a process whose
    /// number is drawn at random. `session` is the guest's UUID.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new(role: Role, session: [u8; 16], on_loss: OnHeartbeatLoss) -> io::Result<Self> {
        Ok(Self {
            role,
            session,
            process: getrandom::u64().map_err(io::Error::other)?,
            interval: Duration::from_millis(50),
            missed: 3,
            on_loss,
            closed_is_loss: false,
        })
    }

    /// Sends a beat every `interval`; the default is 50 ms. A shorter one notices a loss sooner, and takes a
    /// busy host for a lost one sooner.
    #[must_use]
    pub const fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Takes the peer for lost when `beats` in a row are missing; the default is 3.
    #[must_use]
    pub const fn missed(mut self, beats: u32) -> Self {
        self.missed = beats;
        self
    }

    /// How long after the last beat the peer is lost.
    pub(crate) fn timeout(&self) -> Duration {
        self.interval.saturating_mul(self.missed.max(1))
    }
}

/// The liveness of the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// No beat was ever received.
    Unheard,
    /// Its beats arrive in time, and answer this side's.
    Alive,
    /// Its beats do not arrive any more, or do not answer this side's.
    Lost,
}

/// The figures behind a loss, for logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Silence {
    /// The age of the last beat; `None` if there was none.
    pub heard: Option<Duration>,
    /// The age of the first unanswered beat of this side; `None` if all were answered.
    pub unanswered: Option<Duration>,
    /// The part of `heard` in which this side was not scheduled. It does not count against the peer.
    pub overslept: Duration,
}

/// How many unanswered beats are remembered.
const UNANSWERED: usize = 64;

/// A moment, and for how long this side had not been scheduled until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Moment {
    at: Instant,
    overslept: Duration,
}

/// The peer's liveness on one side, without I/O. Time is an argument, from a monotonic clock.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    rhythm: Rhythm,
    /// Number of the next beat, and when it is due.
    next: u64,
    due: Instant,
    /// When the unanswered beats of this side were sent.
    sent: VecDeque<(u64, Moment)>,
    /// The first unanswered beat. It may be older than those in `sent`.
    unanswered: Option<Moment>,
    /// The last beat received, and when.
    heard: Option<(Beat, Moment)>,
    /// When the newest answered beat was sent.
    answered: Option<Instant>,
    /// The same, of the beats that the peer answered in the phase `Paired`.
    relied_on: Option<Instant>,
    /// When its first beat was received.
    since: Option<Moment>,
    /// When this side last read beats.
    looked: Instant,
    /// For how long this side was not scheduled, in all.
    overslept: Duration,
    closed: bool,
    /// The peer is the process that was received, and no other.
    pinned: bool,
}

impl Peer {
    /// Returns a peer of which no beat was received yet.
    #[must_use]
    pub fn new(rhythm: Rhythm, now: Instant) -> Self {
        Self {
            rhythm,
            next: 1,
            due: now,
            sent: VecDeque::new(),
            unanswered: None,
            heard: None,
            answered: None,
            relied_on: None,
            since: None,
            looked: now,
            overslept: Duration::ZERO,
            closed: false,
            pinned: false,
        }
    }

    /// Returns this side as the primary of a new pair. No beat of its peer was received yet.
    #[must_use]
    pub fn renewed(&self, now: Instant) -> Self {
        let rhythm = Rhythm {
            role: Role::Primary,
            ..self.rhythm
        };
        Self {
            // It may be the same process as before, which knows our numbers.
            next: self.next,
            ..Self::new(rhythm, now)
        }
    }

    /// Returns how this side beats.
    #[must_use]
    pub const fn rhythm(&self) -> &Rhythm {
        &self.rhythm
    }

    /// Pins the peer's process: COLO begins, and a process that is started later is not the peer.
    pub fn pin(&mut self) {
        self.pinned = true;
    }

    /// Notes that this side is about to read all beats that have arrived. It does so at least every
    /// [`Rhythm::interval`]. Returns by how much it is late beyond a second interval: that time says nothing of
    /// the peer.
    pub fn look(&mut self, now: Instant) -> Duration {
        let gap = now.saturating_duration_since(self.looked);
        let late = gap.saturating_sub(self.rhythm.interval.saturating_mul(2));
        self.overslept = self.overslept.saturating_add(late);
        self.looked = now;
        late
    }

    /// Returns when beats were last read.
    #[must_use]
    pub const fn looked(&self) -> Instant {
        self.looked
    }

    const fn moment(&self, at: Instant) -> Moment {
        Moment {
            at,
            overslept: self.overslept,
        }
    }

    /// Returns `moment`, moved later by the time in which this side was not scheduled since.
    fn awake_since(&self, moment: Moment) -> Instant {
        deadline_from(moment.at, self.overslept.saturating_sub(moment.overslept))
    }

    /// Takes a beat that has arrived.
    ///
    /// # Errors
    /// The bytes are no beat, or not the peer's: the connection is to be closed.
    pub fn receive(&mut self, bytes: &[u8; BEAT_LEN], now: Instant) -> Result<(), BeatError> {
        let beat = Beat::decode(bytes)?;
        if beat.session != self.rhythm.session {
            return Err(BeatError::Session);
        }
        if beat.role == self.rhythm.role {
            return Err(BeatError::Role(beat.role));
        }
        if beat.process == self.rhythm.process {
            return Err(BeatError::SameProcess);
        }
        if beat.on_loss == OnHeartbeatLoss::TakeOver
            && self.rhythm.on_loss == OnHeartbeatLoss::TakeOver
        {
            return Err(BeatError::BothTakeOver);
        }
        if (beat.on_loss == OnHeartbeatLoss::Ask) != (self.rhythm.on_loss == OnHeartbeatLoss::Ask) {
            return Err(BeatError::OneAsks);
        }
        if beat.seen >= self.next {
            return Err(BeatError::Field("number of a beat that was never sent"));
        }
        // Nothing is changed by a beat that is refused.
        match &self.heard {
            Some((last, _)) if last.process != beat.process => {
                if self.pinned {
                    return Err(BeatError::Process);
                }
                self.answered = None;
                self.relied_on = None;
                self.since = None;
            }
            Some((last, _)) if beat.sequence <= last.sequence => {
                return Err(BeatError::Sequence {
                    sequence: beat.sequence,
                    last: last.sequence,
                });
            }
            _ => {}
        }
        while let Some((sequence, sent)) = self.sent.front() {
            if *sequence > beat.seen {
                break;
            }
            self.answered = Some(sent.at);
            self.sent.pop_front();
            self.unanswered = self.sent.front().map(|(_, sent)| *sent);
        }
        // An answer of one that claims says nothing of how long it will not own the guest.
        if beat.phase == Phase::Paired {
            self.relied_on = self.answered;
        }
        let now = self.moment(now);
        self.since.get_or_insert(now);
        self.heard = Some((beat, now));
        self.closed = false;
        Ok(())
    }

    /// Notes that the connection has ended.
    pub fn disconnected(&mut self) {
        self.closed = self.heard.is_some();
    }

    /// Returns when a beat is due.
    #[must_use]
    pub const fn due(&self) -> Instant {
        self.due
    }

    /// Returns the beat that is due now. Missed beats are not made up for.
    pub fn beat(&mut self, phase: Phase, now: Instant) -> Option<[u8; BEAT_LEN]> {
        if now < self.due {
            return None;
        }
        self.due = deadline_from(self.due, self.rhythm.interval);
        if self.due <= now {
            self.due = deadline_from(now, self.rhythm.interval);
        }
        Some(self.beat_now(phase, now))
    }

    /// Returns a beat out of turn: for a new connection, or a new phase.
    pub fn beat_now(&mut self, phase: Phase, now: Instant) -> [u8; BEAT_LEN] {
        let sequence = self.next;
        self.next += 1;
        if self.sent.len() == UNANSWERED {
            self.sent.pop_front();
        }
        let now = self.moment(now);
        self.unanswered.get_or_insert(now);
        self.sent.push_back((sequence, now));
        let (role, on_loss) = (self.rhythm.role, self.rhythm.on_loss);
        Beat {
            role,
            phase,
            session: self.rhythm.session,
            process: self.rhythm.process,
            sequence,
            seen: self.heard.map_or(0, |(beat, _)| beat.sequence),
            timeout: self.rhythm.timeout(),
            on_loss,
        }
        .encode()
    }

    /// Returns when the peer is lost, if no beat arrives until then.
    #[must_use]
    pub fn lost_at(&self) -> Option<Instant> {
        let (beat, heard) = self.heard?;
        let timeout = self.rhythm.timeout();
        let silent = deadline_from(self.awake_since(heard), timeout);
        // An answer comes with the peer's next beat, and its beat may just have left. A side that has
        // sent nothing has nothing to be answered.
        let interval = self.rhythm.interval;
        let asked = self.unanswered.map(|sent| self.awake_since(sent));
        let known = deadline_from(self.awake_since(self.since?), interval);
        let answer = beat.timeout.max(timeout).saturating_add(interval);
        let deaf = asked.map(|asked| deadline_from(asked.max(known), answer));
        Some(deaf.map_or(silent, |deaf| deaf.min(silent)))
    }

    /// Returns the peer's liveness as of the last [look](Peer::look). Time since then does not count against
    /// it: beats may have arrived.
    #[must_use]
    pub fn state(&self) -> PeerState {
        match self.lost_at() {
            None => PeerState::Unheard,
            Some(_) if self.closed && self.rhythm.closed_is_loss => PeerState::Lost,
            Some(at) if self.looked >= at => PeerState::Lost,
            Some(_) => PeerState::Alive,
        }
    }

    /// Returns the age of the last beat.
    #[must_use]
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.heard
            .map(|(_, heard)| now.saturating_duration_since(heard.at))
    }

    /// Returns the figures behind a loss.
    #[must_use]
    pub fn silence(&self, now: Instant) -> Silence {
        let since = |moment: Moment| now.saturating_duration_since(moment.at);
        Silence {
            heard: self.age(now),
            unanswered: self.unanswered.map(since),
            overslept: self.heard.map_or(Duration::ZERO, |(_, heard)| {
                self.overslept.saturating_sub(heard.overslept)
            }),
        }
    }

    /// Returns the phase in its last beat.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.heard.map(|(beat, _)| beat.phase)
    }

    /// Returns until when its liveness is proven. It does not claim the guest before. That is its own timeout
    /// after the newest beat that it answered in the phase `Paired` was sent, less a quarter to stop a guest in.
    #[must_use]
    pub fn liveness_until(&self) -> Option<Instant> {
        let (beat, _) = self.heard?;
        Some(deadline_from(
            self.relied_on?,
            beat.timeout - beat.timeout / 4,
        ))
    }

    /// Returns until when the peer may run its guest because this side has answered it: no earlier than the
    /// peer's own [`Peer::liveness_until`] if this side leaves the phase `Paired`. A claim waits for that.
    #[must_use]
    pub fn peer_liveness_until(&self) -> Option<Instant> {
        let (beat, heard) = self.heard?;
        let stands = matches!(beat.phase, Phase::Stopped | Phase::Suspended);
        let gone = stands || (self.closed && self.rhythm.closed_is_loss);
        (!gone).then(|| deadline_from(heard.at, self.rhythm.timeout()))
    }
}

#[cfg(test)]
mod tests;
