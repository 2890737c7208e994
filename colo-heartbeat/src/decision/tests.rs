//! What operators want; the rest is in `tests/arbitration`, in every order.

use super::*;
use crate::arbiter::{ArbiterError, Grant, Owner};

const TERM: Duration = Duration::from_millis(400);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A side of a pair, or one that has not heard of the other yet, at `now`.
fn paired(role: Role, now: Instant) -> (Decider, View) {
    let view = View {
        colo: Colo::Within,
        peer: PeerState::Unheard,
        peer_phase: None,
        liveness_until: Some(now + ms(100)),
        peer_liveness_until: Some(now + ms(150)),
    };
    let mut decider = Decider::new(role, OnHeartbeatLoss::Ask, Some(TERM));
    if role == Role::Primary {
        decider.held(Some(now + ms(300)), now);
    }
    assert_eq!(decider.next(&view, now), None);
    (decider, view)
}

fn won() -> Answer {
    Answer::Won(Grant {
        generation: 2,
        until: None,
    })
}

fn lost() -> Answer {
    Answer::Lost(Owner::new(9))
}

fn unreachable() -> Answer {
    Answer::Unreachable(ArbiterError::new("no answer"))
}

#[test]
fn a_secondary_claims_for_an_operator_when_its_primary_relies_on_it_no_more() {
    let now = Instant::now();
    let (mut secondary, view) = paired(Role::Secondary, now);
    assert_eq!(secondary.request(&view, now), Requested::Asked);
    assert_eq!(secondary.phase(), Phase::Asking);
    assert_eq!(secondary.next(&view, now + ms(149)), None);
    assert_eq!(secondary.deadline(&view), Some(now + ms(150)));
    assert_eq!(secondary.next(&view, now + ms(150)), Some(Order::Claim));
    // A second operator waits for the same answer.
    assert_eq!(secondary.request(&view, now + ms(160)), Requested::Asked);
    assert_eq!(secondary.next(&view, now + ms(160)), None);
    secondary.answer(Order::Claim, &won(), now + ms(170));
    assert_eq!(secondary.next(&view, now + ms(170)), Some(Order::TakeOver));
    assert_eq!(secondary.phase(), Phase::Alone);
}

#[test]
fn a_secondary_that_hears_its_primary_does_not_ask_for_its_right() {
    let now = Instant::now();
    let (mut secondary, mut view) = paired(Role::Secondary, now);
    view.peer = PeerState::Alive;
    view.peer_phase = Some(Phase::Paired);
    assert_eq!(secondary.request(&view, now), Requested::PeerAlive);
    assert_eq!(secondary.phase(), Phase::Paired);
    assert_eq!(secondary.next(&view, now + ms(500)), None);
}

#[test]
fn a_primary_claims_for_an_operator_at_once() {
    let now = Instant::now();
    let (mut primary, view) = paired(Role::Primary, now);
    assert_eq!(primary.request(&view, now), Requested::Asked);
    assert_eq!(primary.next(&view, now), Some(Order::Claim));
    primary.answer(Order::Claim, &won(), now);
    assert_eq!(primary.next(&view, now), Some(Order::TakeOver));
}

#[test]
fn a_secondary_that_is_refused_for_an_operator_is_one_of_two_again() {
    let now = Instant::now();
    for refusal in [lost(), unreachable()] {
        let (mut secondary, view) = paired(Role::Secondary, now);
        secondary.request(&view, now);
        let later = now + ms(150);
        assert_eq!(secondary.next(&view, later), Some(Order::Claim));
        secondary.answer(Order::Claim, &refusal, later);
        assert_eq!(secondary.phase(), Phase::Paired);
        assert_eq!(secondary.next(&view, later), None);
        // It may be asked again.
        assert_eq!(secondary.request(&view, later), Requested::Asked);
    }
}

#[test]
fn a_refusal_for_an_operator_counts_when_the_peer_was_lost_meanwhile() {
    let now = Instant::now();
    let (mut secondary, mut view) = paired(Role::Secondary, now);
    secondary.request(&view, now);
    assert_eq!(secondary.next(&view, now + ms(150)), Some(Order::Claim));
    view.peer = PeerState::Lost;
    assert_eq!(secondary.next(&view, now + ms(160)), None);
    secondary.answer(Order::Claim, &lost(), now + ms(170));
    let stop = Order::Stop(StopReason::Refused);
    assert_eq!(secondary.next(&view, now + ms(170)), Some(stop));
    let stopped = Requested::Stopped(StopReason::Refused);
    assert_eq!(secondary.request(&view, now + ms(180)), stopped);
    assert_eq!(secondary.override_fence(), stopped);
}

#[test]
fn a_primary_whose_right_is_found_to_be_another_s_stops_for_an_operator_too() {
    let now = Instant::now();
    let (mut primary, view) = paired(Role::Primary, now);
    primary.request(&view, now);
    assert_eq!(primary.next(&view, now), Some(Order::Claim));
    primary.answer(Order::Claim, &lost(), now);
    let stop = Order::Stop(StopReason::Refused);
    assert_eq!(primary.next(&view, now), Some(stop));
}

#[test]
fn an_operator_s_own_word_outweighs_the_arbiter_s_which_is_told_when_it_can_be() {
    let now = Instant::now();
    for role in [Role::Primary, Role::Secondary] {
        let (mut side, mut view) = paired(role, now);
        assert_eq!(side.override_fence(), Requested::Granted);
        assert_eq!(side.phase(), Phase::Alone);
        assert_eq!(side.next(&view, now), Some(Order::TakeOver));
        view.colo = Colo::TookOver;
        assert_eq!(side.next(&view, now), Some(Order::Claim));
        side.answer(Order::Claim, &unreachable(), now);
        assert_eq!(side.next(&view, now), None);
        let again = now + TERM / 4;
        assert_eq!(side.deadline(&view), Some(again));
        assert_eq!(side.next(&view, again), Some(Order::Claim));
        side.answer(Order::Claim, &lost(), again);
        assert_eq!(side.next(&view, now + ms(5000)), None);
        assert_eq!((side.phase(), side.deadline(&view)), (Phase::Alone, None));
    }
}

#[test]
fn without_leases_an_operator_s_word_is_enough() {
    let now = Instant::now();
    let (_, view) = paired(Role::Secondary, now);
    for (on_loss, term) in [
        (OnHeartbeatLoss::Ask, None),
        (OnHeartbeatLoss::Stop, Some(TERM)),
    ] {
        let mut decider = Decider::new(Role::Secondary, on_loss, term);
        assert_eq!(decider.request(&view, now), Requested::Granted);
        assert_eq!(decider.next(&view, now), None);
        assert_eq!(decider.request(&view, now), Requested::Granted);
    }
}

/// Before COLO, and on its way into it.
mod beginning {
    use super::*;

    const TERM: Duration = Duration::from_secs(1);

    fn holder(now: Instant) -> Decider {
        let mut decider = Decider::new(Role::Primary, OnHeartbeatLoss::Ask, Some(TERM));
        decider.held(Some(now + TERM), now);
        decider
    }

    /// Before COLO, with a peer that was lost.
    const fn before() -> View {
        View {
            colo: Colo::Outside,
            peer: PeerState::Lost,
            peer_phase: Some(Phase::Paired),
            liveness_until: None,
            peer_liveness_until: None,
        }
    }

    fn won() -> Answer {
        Answer::Won(Grant {
            generation: 1,
            until: None,
        })
    }

    #[test]
    fn a_primary_is_one_of_two_before_it_knows_that_the_other_has_begun() {
        let now = Instant::now();
        let mut decider = holder(now);
        assert_eq!(decider.next(&before(), now), None);
        decider.colo_begins();
        assert_eq!(decider.next(&before(), now), Some(Order::Claim));
        // The other has begun, has lost this side too, and was faster.
        let lost = Answer::Lost(Owner::new(2));
        decider.answer(Order::Claim, &lost, now);
        let refused = Order::Stop(StopReason::Refused);
        assert_eq!(decider.next(&before(), now), Some(refused));

        let mut decider = holder(now);
        decider.colo_begins();
        assert_eq!(decider.next(&before(), now + TERM), Some(Order::Suspend));
        for (on_loss, order) in [
            (
                OnHeartbeatLoss::Stop,
                Some(Order::Stop(StopReason::PeerLost)),
            ),
            (OnHeartbeatLoss::TakeOver, None),
        ] {
            let mut decider = Decider::new(Role::Primary, on_loss, None);
            decider.colo_begins();
            assert_eq!(decider.next(&before(), now), order);
        }
    }

    #[test]
    fn a_guest_that_stays_where_it_was_has_the_right_to_for_good() {
        let now = Instant::now();
        let mut decider = holder(now);
        decider.colo_begins();
        let heard = View {
            peer: PeerState::Alive,
            ..before()
        };
        assert_eq!(decider.next(&heard, now), None);
        decider.claim_guest();
        assert_eq!(decider.next(&heard, now), Some(Order::Claim));
        decider.answer(Order::Claim, &won(), now);
        assert_eq!(decider.phase(), Phase::Alone);
        assert_eq!(decider.next(&heard, now + TERM * 2), None);
    }

    #[test]
    fn colo_that_begins_after_the_decision_is_told_of_it() {
        let now = Instant::now();
        let mut decider = holder(now);
        decider.colo_begins();
        assert_eq!(decider.next(&before(), now), Some(Order::Claim));
        decider.answer(Order::Claim, &won(), now);
        assert_eq!(decider.next(&before(), now), None);
        let within = View {
            colo: Colo::Within,
            ..before()
        };
        assert_eq!(decider.next(&within, now), Some(Order::TakeOver));
        assert_eq!(decider.next(&within, now), None);
    }
}

#[test]
fn a_primary_that_an_operator_resumed_is_not_woken_while_the_arbiter_is_asked() {
    let now = Instant::now();
    let (mut primary, view) = paired(Role::Primary, now);
    primary.held(Some(now + ms(100)), now);
    let view = View {
        colo: Colo::TookOver,
        liveness_until: Some(now + ms(100)),
        ..view
    };
    // The arbiter does not answer, and what the guest ran by is over.
    let later = now + ms(1000);
    while primary.next(&view, later).is_some() {}
    assert!(primary.deadline(&view).is_none_or(|at| at > later));
}

#[test]
fn a_right_for_good_before_colo_leaves_nothing_to_be_woken_for() {
    let now = Instant::now();
    let mut primary = Decider::new(Role::Primary, OnHeartbeatLoss::Ask, Some(ms(400)));
    let view = View {
        colo: Colo::Outside,
        peer: PeerState::Unheard,
        peer_phase: None,
        liveness_until: None,
        peer_liveness_until: None,
    };
    primary.held(None, now);
    let later = now + ms(1000);
    assert_eq!(primary.next(&view, later), None);
    assert_eq!(primary.deadline(&view), None);
}
