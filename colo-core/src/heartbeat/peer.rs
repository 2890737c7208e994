//! What is known of the peer: which beats were heard of it, and which of ours it has heard.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::OnHeartbeatLoss;
use super::beat::{BEAT_LEN, Beat, BeatError, Phase};
use crate::cause::Role;

/// Who beats, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rhythm {
    /// This side.
    pub role: Role,
    /// The pair: the guest's UUID.
    pub session: [u8; 16],
    /// This process: a random number.
    pub process: u64,
    /// Between two beats. Default 50 ms.
    pub interval: Duration,
    /// How many beats have to be missing in a row for the peer to be lost. Default 3.
    pub missed: u32,
    /// What this side does then.
    pub on_loss: OnHeartbeatLoss,
    /// Take the peer for lost as soon as the connection ends, not after the missed beats. For a
    /// link that does not break while both hosts live.
    pub closed_is_loss: bool,
}

impl Rhythm {
    /// How long after the last beat the peer is lost.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.interval.saturating_mul(self.missed.max(1))
    }
}

/// The peer as its beats show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PeerState {
    /// It was never heard.
    Unheard,
    /// It was heard in time, and hears this side.
    Alive,
    /// It was heard, and is not any more, or does not hear this side any more.
    Lost,
}

/// Beats that the peer has not answered yet are remembered, as many as these.
const UNANSWERED: usize = 64;

/// The heartbeat of a pair as one side sees it, without I/O: time comes in as an argument, from a
/// clock that never goes back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    rhythm: Rhythm,
    /// Number of the next beat, and when it is due.
    next: u64,
    due: Instant,
    /// When our beats were sent, those that the peer has not said to have seen.
    sent: VecDeque<(u64, Instant)>,
    /// The last beat heard, and when.
    heard: Option<(Beat, Instant)>,
    /// When the newest of our beats that it has heard was sent.
    answered: Option<Instant>,
    /// The same, of those that it has answered as one of two.
    relied_on: Option<Instant>,
    /// When it was first heard.
    since: Option<Instant>,
    closed: bool,
    /// No other process than the one that was heard is the peer any more.
    pinned: bool,
}

impl Peer {
    /// A peer that was not heard yet.
    #[must_use]
    pub fn new(rhythm: Rhythm, now: Instant) -> Self {
        Self {
            rhythm,
            next: 1,
            due: now,
            sent: VecDeque::new(),
            heard: None,
            answered: None,
            relied_on: None,
            since: None,
            closed: false,
            pinned: false,
        }
    }

    /// The same side, as the primary of a new pair: its peer was not heard yet.
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

    /// How this side beats.
    #[must_use]
    pub const fn rhythm(&self) -> &Rhythm {
        &self.rhythm
    }

    /// COLO begins: a peer that is started again from now on is not the peer.
    pub fn pin(&mut self) {
        self.pinned = true;
    }

    /// A beat has arrived.
    ///
    /// # Errors
    /// It is none, or not the peer's; the connection it came on is of no use.
    pub fn receive(&mut self, bytes: &[u8; BEAT_LEN], now: Instant) -> Result<(), BeatError> {
        let beat = Beat::decode(bytes)?;
        if beat.session != self.rhythm.session {
            return Err(BeatError::Session);
        }
        if beat.role == self.rhythm.role {
            return Err(BeatError::Role(beat.role));
        }
        if beat.on_loss == OnHeartbeatLoss::TakeOver
            && self.rhythm.on_loss == OnHeartbeatLoss::TakeOver
        {
            return Err(BeatError::BothTakeOver);
        }
        if (beat.on_loss == OnHeartbeatLoss::Ask) != (self.rhythm.on_loss == OnHeartbeatLoss::Ask) {
            return Err(BeatError::OneAsks);
        }
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
        if beat.seen >= self.next {
            return Err(BeatError::Field("number of a beat that was never sent"));
        }
        while let Some((sequence, at)) = self.sent.front() {
            if *sequence > beat.seen {
                break;
            }
            self.answered = Some(*at);
            self.sent.pop_front();
        }
        // From one that asks for the right, an answer says nothing of how long it will not have it.
        if beat.phase == Phase::Paired {
            self.relied_on = self.answered;
        }
        self.since.get_or_insert(now);
        self.heard = Some((beat, now));
        self.closed = false;
        Ok(())
    }

    /// The connection has ended.
    pub fn disconnected(&mut self) {
        self.closed = self.heard.is_some();
    }

    /// When a beat is due.
    #[must_use]
    pub const fn due(&self) -> Instant {
        self.due
    }

    /// The beat that is due now, if there is one. Beats that were missed are not made up for.
    pub fn beat(&mut self, phase: Phase, now: Instant) -> Option<[u8; BEAT_LEN]> {
        if now < self.due {
            return None;
        }
        self.due += self.rhythm.interval;
        if self.due <= now {
            self.due = now + self.rhythm.interval;
        }
        Some(self.beat_now(phase, now))
    }

    /// A beat out of turn: for a new connection, or a phase that the peer should know of.
    pub fn beat_now(&mut self, phase: Phase, now: Instant) -> [u8; BEAT_LEN] {
        let sequence = self.next;
        self.next += 1;
        if self.sent.len() == UNANSWERED {
            self.sent.pop_front();
        }
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

    /// When the peer is lost, if nothing is heard until then.
    #[must_use]
    pub fn lost_at(&self) -> Option<Instant> {
        let (beat, heard) = self.heard?;
        // An answer comes with the peer's next beat, and its beat may just have left.
        let deaf = self.answered.or(self.since)? + beat.timeout.max(self.rhythm.timeout());
        let deaf = deaf + self.rhythm.interval.saturating_mul(2);
        Some(deaf.min(heard + self.rhythm.timeout()))
    }

    /// What is known of the peer now.
    #[must_use]
    pub fn state(&self, now: Instant) -> PeerState {
        match self.lost_at() {
            None => PeerState::Unheard,
            Some(_) if self.closed && self.rhythm.closed_is_loss => PeerState::Lost,
            Some(at) if now >= at => PeerState::Lost,
            Some(_) => PeerState::Alive,
        }
    }

    /// How long ago it was heard.
    #[must_use]
    pub fn age(&self, now: Instant) -> Option<Duration> {
        self.heard
            .map(|(_, heard)| now.saturating_duration_since(heard))
    }

    /// What it has last said of itself.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        self.heard.map(|(beat, _)| beat.phase)
    }

    /// Until when it certainly does not ask for the right to go on alone: its own timeout after the
    /// newest beat was sent that it has answered as one of two, less a quarter to stop a guest in.
    #[must_use]
    pub fn hears_until(&self) -> Option<Instant> {
        let (beat, _) = self.heard?;
        Some(self.relied_on? + (beat.timeout - beat.timeout / 4))
    }

    /// Until when it may run its guest because this side has answered it: no earlier than what it
    /// takes for [`Peer::hears_until`] if this side answers as one of two no more. A side that asks
    /// for the right waits for that.
    #[must_use]
    pub fn relies_until(&self) -> Option<Instant> {
        let (beat, heard) = self.heard?;
        let gone = beat.phase == Phase::Stopped || (self.closed && self.rhythm.closed_is_loss);
        (!gone).then(|| heard + self.rhythm.timeout())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    fn peer(role: Role, start: Instant) -> Peer {
        let rhythm = Rhythm {
            role,
            session: [1; 16],
            process: if role == Role::Primary { 10 } else { 20 },
            interval: INTERVAL,
            missed: 3,
            on_loss: OnHeartbeatLoss::Ask,
            closed_is_loss: false,
        };
        Peer::new(rhythm, start)
    }

    fn pair(start: Instant) -> (Peer, Peer) {
        (peer(Role::Primary, start), peer(Role::Secondary, start))
    }

    #[test]
    fn a_peer_is_lost_when_three_beats_are_missing() {
        let start = Instant::now();
        let (mut a, mut b) = pair(start);
        assert_eq!(a.state(start + INTERVAL * 100), PeerState::Unheard);
        let mut now = start;
        for _ in 0..5 {
            let beat = b.beat(Phase::Paired, now).unwrap();
            assert_eq!(b.beat(Phase::Paired, now), None);
            a.receive(&beat, now).unwrap();
            let beat = a.beat(Phase::Paired, now).unwrap();
            b.receive(&beat, now).unwrap();
            now += INTERVAL;
        }
        let last = now - INTERVAL;
        let short = Duration::from_millis(1);
        assert_eq!(a.state(last + INTERVAL * 3 - short), PeerState::Alive);
        assert_eq!(a.state(last + INTERVAL * 3), PeerState::Lost);
        assert_eq!(a.age(now), Some(INTERVAL));
        // It may come back: what was decided meanwhile is not decided here.
        let beat = b.beat(Phase::Asking, last + INTERVAL * 4).unwrap();
        a.receive(&beat, last + INTERVAL * 4).unwrap();
        assert_eq!(a.state(last + INTERVAL * 4), PeerState::Alive);
        assert_eq!(a.phase(), Some(Phase::Asking));
    }

    #[test]
    fn a_peer_that_does_not_hear_this_side_is_lost_too() {
        let start = Instant::now();
        let (mut a, mut b) = pair(start);
        let mut now = start;
        let mut lost = None;
        for i in 0..20_u32 {
            let to_b = a.beat(Phase::Paired, now).unwrap();
            if i < 5 {
                b.receive(&to_b, now).unwrap();
            }
            let to_a = b.beat(Phase::Paired, now).unwrap();
            a.receive(&to_a, now).unwrap();
            if lost.is_none() && a.state(now) == PeerState::Lost {
                lost = Some(now);
            }
            // What a relies on ends before b may take it for lost.
            if b.state(now) == PeerState::Lost {
                assert!(a.hears_until().unwrap() < now);
            }
            now += INTERVAL;
        }
        // The last one it answered was the fifth.
        assert_eq!(lost, Some(start + INTERVAL * 9));
    }

    #[test]
    fn a_broken_connection_is_a_loss_only_where_that_is_wanted() {
        let start = Instant::now();
        let (mut a, mut b) = pair(start);
        a.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
        a.disconnected();
        assert_eq!(a.state(start), PeerState::Alive);
        a.rhythm.closed_is_loss = true;
        assert_eq!(a.state(start), PeerState::Lost);
        a.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
        assert_eq!(a.state(start), PeerState::Alive);
    }

    #[test]
    fn a_survivor_is_the_primary_of_its_next_pair() {
        let start = Instant::now();
        let (mut a, mut b) = pair(start);
        b.receive(&a.beat_now(Phase::Paired, start), start).unwrap();
        a.receive(&b.beat_now(Phase::Alone, start), start).unwrap();
        b.pin();
        let mut b = b.renewed(start);
        assert_eq!(b.state(start + INTERVAL * 100), PeerState::Unheard);
        assert_eq!(b.phase(), None);
        // The one that was pinned is nobody to it, and its role is the other one.
        let error = b.receive(&a.beat_now(Phase::Stopped, start), start);
        assert_eq!(error, Err(BeatError::Role(Role::Primary)));
        let mut c = peer(Role::Secondary, start);
        c.rhythm.process = 30;
        b.receive(&c.beat_now(Phase::Paired, start), start).unwrap();
        c.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
        assert_eq!(c.state(start), PeerState::Alive);
        // One that it had before goes on counting its beats.
        let mut b = b.renewed(start);
        c.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
    }

    #[test]
    fn nobody_else_is_taken_for_the_peer() {
        let start = Instant::now();
        let (mut a, mut b) = pair(start);
        let mut refused = |peer: &mut Peer| {
            a.receive(&peer.beat_now(Phase::Paired, start), start)
                .unwrap_err()
        };
        let mut other = b.clone();
        other.rhythm.session = [2; 16];
        assert_eq!(refused(&mut other), BeatError::Session);
        other = peer(Role::Primary, start);
        assert_eq!(refused(&mut other), BeatError::Role(Role::Primary));
        let beat = b.beat_now(Phase::Paired, start);
        a.receive(&beat, start).unwrap();
        let again = a.receive(&beat, start).unwrap_err();
        let (sequence, last) = (1, 1);
        assert_eq!(again, BeatError::Sequence { sequence, last });
        // A process that was started again is another one, once there is something to lose.
        let mut restarted = peer(Role::Secondary, start);
        restarted.rhythm.process = 21;
        a.receive(&restarted.beat_now(Phase::Paired, start), start)
            .unwrap();
        a.pin();
        let error = a.receive(&b.beat_now(Phase::Paired, start), start);
        assert_eq!(error, Err(BeatError::Process));
        restarted.rhythm.on_loss = OnHeartbeatLoss::Stop;
        let error = a.receive(&restarted.beat_now(Phase::Paired, start), start);
        assert_eq!(error, Err(BeatError::OneAsks));
        a.rhythm.on_loss = OnHeartbeatLoss::TakeOver;
        restarted.rhythm.on_loss = OnHeartbeatLoss::TakeOver;
        let error = a.receive(&restarted.beat_now(Phase::Paired, start), start);
        assert_eq!(error, Err(BeatError::BothTakeOver));
    }
}
