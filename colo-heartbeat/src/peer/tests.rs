//! Who is lost when.

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

/// Looks as often as it should, from the last look to `now`.
fn state_at(peer: &mut Peer, now: Instant) -> PeerState {
    while peer.looked() + INTERVAL < now {
        let late = peer.look(peer.looked() + INTERVAL);
        assert_eq!(late, Duration::ZERO);
    }
    peer.look(now);
    peer.state()
}

fn pair(start: Instant) -> (Peer, Peer) {
    (peer(Role::Primary, start), peer(Role::Secondary, start))
}

#[test]
fn a_peer_is_lost_when_three_beats_are_missing() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    assert_eq!(state_at(&mut a, start), PeerState::Unheard);
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
    let lost_at = last + INTERVAL * 3;
    assert_eq!(state_at(&mut a, lost_at - short), PeerState::Alive);
    assert_eq!(state_at(&mut a, lost_at), PeerState::Lost);
    assert_eq!(a.age(now), Some(INTERVAL));
    // It may come back: what was decided meanwhile is not decided here.
    let beat = b.beat(Phase::Asking, last + INTERVAL * 4).unwrap();
    a.receive(&beat, last + INTERVAL * 4).unwrap();
    assert_eq!(state_at(&mut a, last + INTERVAL * 4), PeerState::Alive);
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
        if lost.is_none() && state_at(&mut a, now) == PeerState::Lost {
            lost = Some(now);
        }
        // What a relies on ends before b may take it for lost.
        if state_at(&mut b, now) == PeerState::Lost {
            assert!(a.liveness_until().unwrap() < now);
        }
        now += INTERVAL;
    }
    // The last one it answered was the fifth.
    assert_eq!(lost, Some(start + INTERVAL * 9));
}

/// Both beat and look until the moment that is returned.
fn beating(a: &mut Peer, b: &mut Peer, start: Instant) -> Instant {
    let mut now = start;
    for _ in 0..10 {
        now += INTERVAL;
        let beats = [a.beat(Phase::Paired, now), b.beat(Phase::Paired, now)];
        for (peer, beat) in [&mut *b, &mut *a].into_iter().zip(beats) {
            peer.look(now);
            peer.receive(&beat.unwrap(), now).unwrap();
        }
    }
    now
}

#[test]
fn a_side_that_was_not_scheduled_takes_what_has_come_before_it_judges() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    let stopped = beating(&mut a, &mut b, start);
    // What b has sent lies in a's socket. Of a, b has heard nothing, and asks.
    let beats: Vec<_> = (1..20)
        .map(|n| b.beat(Phase::Paired, stopped + INTERVAL * n).unwrap())
        .collect();
    let now = stopped + INTERVAL * 20;
    // However late it has become, a judges by its last look.
    assert_eq!(a.state(), PeerState::Alive);
    assert_eq!(a.look(now), INTERVAL * 18);
    for beat in &beats {
        a.receive(beat, now).unwrap();
    }
    // b answers what it was sent: a has sent nothing since.
    assert_eq!(a.state(), PeerState::Alive);
    // The guest may not run by what was heard in time and was not read.
    assert!(a.liveness_until().unwrap() < now);
}

#[test]
fn sides_that_were_stopped_together_do_not_lose_each_other() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    let stopped = beating(&mut a, &mut b, start);
    let mut now = stopped + INTERVAL * 100;
    // a is the first to go on, and finds nothing: b was stopped as well.
    a.look(now);
    assert_eq!(a.state(), PeerState::Alive);
    now += INTERVAL / 2;
    b.look(now);
    b.receive(&a.beat(Phase::Paired, now).unwrap(), now)
        .unwrap();
    assert_eq!(b.state(), PeerState::Alive);
    // b does not go on after all: two intervals of silence were counted, the third is seen.
    assert_eq!(state_at(&mut a, now), PeerState::Alive);
    assert_eq!(state_at(&mut a, now + INTERVAL), PeerState::Lost);
}

#[test]
fn a_peer_that_answers_none_of_many_beats_is_lost_however_long_that_takes() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    for peer in [&mut a, &mut b] {
        peer.rhythm.missed = 1000;
    }
    let mut now = beating(&mut a, &mut b, start);
    let mut beats = 0;
    while state_at(&mut a, now) == PeerState::Alive {
        now += INTERVAL;
        a.beat(Phase::Paired, now).unwrap();
        a.receive(&b.beat(Phase::Paired, now).unwrap(), now)
            .unwrap();
        beats += 1;
    }
    // Sent one interval after the last that was answered, and waited for one longer.
    assert_eq!(beats, 1002);
}

#[test]
fn a_broken_connection_is_a_loss_only_where_that_is_wanted() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    a.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
    a.disconnected();
    assert_eq!(state_at(&mut a, start), PeerState::Alive);
    a.rhythm.closed_is_loss = true;
    assert_eq!(state_at(&mut a, start), PeerState::Lost);
    a.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
    assert_eq!(state_at(&mut a, start), PeerState::Alive);
}

#[test]
fn a_survivor_is_the_primary_of_its_next_pair() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    b.receive(&a.beat_now(Phase::Paired, start), start).unwrap();
    a.receive(&b.beat_now(Phase::Alone, start), start).unwrap();
    b.pin();
    let mut b = b.renewed(start);
    assert_eq!(state_at(&mut b, start + INTERVAL * 100), PeerState::Unheard);
    assert_eq!(b.phase(), None);
    // The one that was pinned is nobody to it, and its role is the other one.
    let error = b.receive(&a.beat_now(Phase::Stopped, start), start);
    assert_eq!(error, Err(BeatError::Role(Role::Primary)));
    let mut c = peer(Role::Secondary, start);
    c.rhythm.process = 30;
    b.receive(&c.beat_now(Phase::Paired, start), start).unwrap();
    c.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
    assert_eq!(state_at(&mut c, start), PeerState::Alive);
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

#[test]
fn a_rhythm_has_the_usual_values_and_a_number_of_its_own() {
    let new = || Rhythm::new(Role::Primary, [1; 16], OnHeartbeatLoss::Ask).unwrap();
    let (one, other) = (new(), new());
    assert_ne!(one.process, other.process);
    assert_eq!((one.interval, one.missed), (INTERVAL, 3));
    assert_eq!(one.timeout(), Duration::from_millis(150));
    assert!(!one.closed_is_loss);
}

#[test]
fn a_peer_with_this_sides_number_is_refused() {
    let start = Instant::now();
    let (mut a, b) = pair(start);
    let mut rhythm = *b.rhythm();
    rhythm.process = a.rhythm().process;
    let beat = Peer::new(rhythm, start).beat_now(Phase::Paired, start);
    assert_eq!(a.receive(&beat, start), Err(BeatError::SameProcess));
    assert_eq!(a.state(), PeerState::Unheard);
}

#[test]
fn a_rhythm_without_end_never_loses_anybody_and_does_not_panic() {
    let start = Instant::now();
    let (a, mut b) = pair(start);
    let mut rhythm = *a.rhythm();
    rhythm.interval = Duration::MAX;
    let mut endless = Peer::new(rhythm, start);
    let beat = endless.beat(Phase::Paired, start).unwrap();
    b.receive(&beat, start).unwrap();
    let answer = b.beat(Phase::Paired, start).unwrap();
    endless.receive(&answer, start).unwrap();
    let later = start + Duration::from_secs(24 * 3600);
    assert_eq!(endless.look(later), Duration::ZERO);
    assert_eq!(endless.state(), PeerState::Alive);
    assert!(endless.due() > later);
    assert!(endless.peer_liveness_until() > Some(later));
    assert!(endless.beat(Phase::Paired, later).is_none());
    let moments = [b.lost_at(), b.liveness_until(), b.peer_liveness_until()];
    assert!(moments[0].is_some() && moments[2].is_some(), "{moments:?}");
}

#[test]
fn a_beat_that_is_refused_changes_nothing() {
    let start = Instant::now();
    let (mut a, mut b) = pair(start);
    a.receive(&b.beat_now(Phase::Paired, start), start).unwrap();
    let before = a.clone();
    // Another process, which has seen beats that were never sent.
    let beat = Beat {
        role: Role::Secondary,
        phase: Phase::Paired,
        session: [1; 16],
        process: 21,
        sequence: 1,
        seen: 7,
        timeout: INTERVAL * 3,
        on_loss: OnHeartbeatLoss::Ask,
    };
    assert!(a.receive(&beat.encode(), start).is_err());
    assert_eq!(a, before);
}
