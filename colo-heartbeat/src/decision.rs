//! What a side does: keeps its lease, and decides when the peer is lost.
//!
//! ```text
//!                 COLO begins        peer lost: ask           won
//! idle -------------------> paired ----------------> asking -------> alone
//!                              |  \                     |             ^
//!                              |   \__ peer lost: take over __________|
//!                              |                        |
//!                              +--> stopped <-----------+
//!     peer lost: stop; the peer goes on alone; refused
//! ```
//! A primary whose lease has expired suspends its guest, unless its peer proves that it still receives
//! beats, and goes on asking ([`Order::Suspend`]): a claim whose answer it does not know may have been
//! carried out, or may be yet. Only the arbiter's next answer says who owns the guest, and the owner
//! goes on.
//!
//! To a primary COLO begins when it is about to send the last of what its secondary needs to begin: from
//! then on it cannot know whether the other guest runs ([`Decider::colo_begins`]).
//!
//! An operator who wants a side to go on ([`Decider::request`]) makes it ask as well. It is one of two
//! again when the arbiter refuses or cannot be asked, unless the peer was lost meanwhile. An operator who
//! knows that the peer cannot run overrides the fence ([`Decider::override_fence`]): the side goes on
//! without the arbiter, which is told when it can be.
//!
//! A primary may run its guest as long as its lease is valid, **or** as long as its peer's liveness is
//! proven, because a peer that receives beats does not claim: an arbiter that cannot be reached does not
//! disturb a pair whose sides receive each other's beats.

use std::time::{Duration, Instant};

use migration_stream::io::deadline_from;

use super::beat::Phase;
use super::peer::PeerState;
use crate::arbiter::Answer;
use crate::failover::Role;
use crate::policy::OnHeartbeatLoss;

/// Why a side has stopped its guest for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum StopReason {
    /// The peer is lost, and that is what this side does then.
    #[error("the peer is lost")]
    PeerLost,
    /// The peer goes on alone.
    #[error("the peer goes on alone")]
    PeerGoesOn,
    /// The arbiter says that another side owns the guest.
    #[error("another side owns the guest")]
    Refused,
    /// The lease could not be renewed in time, and the peer may own the guest. The guest goes on when
    /// the arbiter says that it does not.
    #[error("the lease has expired")]
    LeaseExpired,
    /// COLO has ended with a guest that cannot run.
    #[error("the guest cannot run")]
    Unfit,
}

/// Where COLO is on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Colo {
    /// It has not begun.
    Outside,
    /// It goes on, or its end is being carried out.
    Within,
    /// It has ended by an error, and a decision is waited for.
    Broken,
    /// This side has gone on alone: by an order of this module's, or somebody else's.
    TookOver,
    /// This side's guest does not run any more.
    Ended,
}

/// What the decider looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// COLO on this side.
    pub colo: Colo,
    /// The heartbeat.
    pub peer: PeerState,
    /// What the peer has last said of itself.
    pub peer_phase: Option<Phase>,
    /// Until when the peer certainly does not claim the guest.
    pub liveness_until: Option<Instant>,
    /// Until when the peer may run its guest because of what this side has answered.
    pub peer_liveness_until: Option<Instant>,
}

/// What becomes of an operator's wish that this side go on alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Requested {
    /// No arbiter has to be asked, or has been.
    Granted,
    /// The arbiter is asked: the answer to the next [`Order::Claim`] decides.
    Asked,
    /// The peer is alive and holds the lease: the arbiter need not be asked. To ask it would take the
    /// lease from a primary that does not reach the arbiter.
    PeerAlive,
    /// This side's guest was stopped for good.
    Stopped(StopReason),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Have the arbiter renew the lease, and hand in its answer.
    Renew,
    /// Claim the guest for good, and hand in the answer.
    Claim,
    /// Request failover of this side's COLO.
    TakeOver,
    /// Have the guest stand still, whatever COLO or an operator does, until [`Order::Resume`]. At once:
    /// the other side may run soon.
    Suspend,
    /// This side owns the guest: a suspended guest runs as before.
    Resume,
    /// Stop the guest for good. At once: the other side may run soon.
    Stop(StopReason),
}

/// The longest that an arbiter without a term is waited for.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The state machine of one side. It is asked for orders whenever something has happened or
/// [`Decider::deadline`] has come.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Decider {
    role: Role,
    on_loss: OnHeartbeatLoss,
    /// Of the arbiter's rights; `None` if it gives none.
    term: Option<Duration>,
    state: State,
    /// Until when the lease is valid.
    until: Option<Instant>,
    /// An order whose answer is awaited.
    pending: Option<Order>,
    /// When the arbiter is to be asked next.
    ask_at: Option<Instant>,
    stop: Option<StopReason>,
    /// The guest is suspended because its lease has expired.
    suspended: bool,
    /// This side goes on by an operator's word, of which the arbiter has not heard.
    untold: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Idle,
    Paired,
    Asking(Because),
    /// `told`: COLO has been told, or need not be.
    Alone {
        told: bool,
    },
    Stopped,
}

/// Why a side claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Because {
    /// It has lost its peer.
    Lost,
    /// An operator wants to know.
    Requested,
    /// Somebody has let it go on already.
    Runs,
}

impl Decider {
    /// A decider before COLO. `term` is the [`Arbiter`](crate::arbiter::Arbiter)'s.
    #[must_use]
    pub const fn new(role: Role, on_loss: OnHeartbeatLoss, term: Option<Duration>) -> Self {
        Self {
            role,
            on_loss,
            term,
            state: State::Idle,
            until: None,
            pending: None,
            ask_at: None,
            stop: None,
            suspended: false,
            untold: false,
        }
    }

    /// What the peer is told.
    #[must_use]
    pub const fn phase(&self) -> Phase {
        match self.state {
            State::Idle | State::Paired => Phase::Paired,
            State::Asking(_) if self.suspended => Phase::Suspended,
            State::Asking(_) => Phase::Asking,
            State::Alone { .. } => Phase::Alone,
            State::Stopped => Phase::Stopped,
        }
    }

    /// Why this side has stopped.
    #[must_use]
    pub const fn stop_reason(&self) -> Option<StopReason> {
        self.stop
    }

    /// Is its guest suspended until the arbiter has said who owns it?
    #[must_use]
    pub const fn is_suspended(&self) -> bool {
        self.suspended
    }

    /// Does this side need the arbiter's lease as long as it is one of two?
    #[must_use]
    pub fn holds(&self) -> bool {
        self.role == Role::Primary && self.on_loss == OnHeartbeatLoss::Ask && self.term.is_some()
    }

    /// How long before a lease expires it is renewed, and how long after a vain attempt the arbiter
    /// is asked again.
    fn pause(&self) -> Duration {
        self.term
            .map_or(Duration::from_millis(250), |term| term / 4)
    }

    /// The embedder has taken the lease before COLO: it is renewed from now on.
    pub fn held(&mut self, until: Option<Instant>, now: Instant) {
        self.until = until;
        self.ask_at = Some(deadline_from(now, self.pause()));
    }

    /// The peer is about to get all that it needs to be in COLO.
    pub fn colo_begins(&mut self) {
        if self.state == State::Idle {
            self.state = State::Paired;
        }
    }

    /// COLO does not begin here after all, and the guest goes on. Where an arbiter is asked the guest is
    /// claimed for good: the peer may have begun.
    pub fn claim_guest(&mut self) {
        let asks = self.on_loss == OnHeartbeatLoss::Ask && self.term.is_some();
        if asks && matches!(self.state, State::Idle | State::Paired) {
            self.state = State::Asking(Because::Runs);
            self.ask_at = None;
        }
    }

    /// The lease was given up before COLO.
    pub fn released(&mut self) {
        if self.state == State::Idle {
            self.until = None;
            self.ask_at = None;
        }
    }

    /// An operator wants this side to go on alone, and believes that the other does not.
    pub fn request(&mut self, view: &View, now: Instant) -> Requested {
        let leases = self.on_loss == OnHeartbeatLoss::Ask && self.term.is_some();
        let heard = view.peer == PeerState::Alive && view.peer_phase == Some(Phase::Paired);
        if view.colo != Colo::Outside {
            self.colo_begins();
        }
        match self.state {
            State::Paired if leases && heard && !self.holds() => Requested::PeerAlive,
            State::Paired if leases => {
                self.state = State::Asking(Because::Requested);
                self.ask_from(view, now);
                Requested::Asked
            }
            State::Asking(Because::Lost | Because::Requested) if leases => Requested::Asked,
            State::Stopped => Requested::Stopped(self.stop.unwrap_or(StopReason::Unfit)),
            _ => Requested::Granted,
        }
    }

    /// An operator takes it upon himself that the peer does not run, and wants this side, which is in
    /// COLO, to go on whatever the arbiter says.
    pub fn override_fence(&mut self) -> Requested {
        match self.state {
            State::Idle | State::Paired | State::Asking(_) => {
                self.untold = self.on_loss == OnHeartbeatLoss::Ask && self.term.is_some();
                self.until = None;
                self.ask_at = None;
                self.state = State::Alone { told: false };
                Requested::Granted
            }
            State::Stopped => Requested::Stopped(self.stop.unwrap_or(StopReason::Unfit)),
            State::Alone { .. } => Requested::Granted,
        }
    }

    /// When the guest may be claimed: what the peer relies on has ended by then.
    fn ask_from(&mut self, view: &View, now: Instant) {
        self.ask_at = view
            .peer_liveness_until
            .filter(|until| *until > now && !self.holds());
    }

    /// The arbiter's answer to an order.
    pub fn answer(&mut self, to: Order, answer: &Answer, now: Instant) {
        if self.pending == Some(to) {
            self.pending = None;
        }
        match (answer, to) {
            (Answer::Won(grant), Order::Renew) => {
                self.until = grant.until;
                self.ask_at = Some(deadline_from(now, self.pause()));
            }
            (Answer::Won(_), Order::Claim) => {
                self.untold = false;
                if let State::Asking(because) = self.state {
                    self.until = None;
                    self.ask_at = None;
                    let told = because == Because::Runs;
                    self.state = State::Alone { told };
                }
            }
            (Answer::Lost(_), Order::Renew | Order::Claim) => match self.state {
                // The one who has it is most likely the peer, of whom this side is still one of two.
                State::Asking(Because::Requested) if !self.holds() => self.be_paired(now),
                State::Paired | State::Asking(_) => self.stop = Some(StopReason::Refused),
                State::Idle | State::Alone { .. } | State::Stopped => {
                    self.untold &= to == Order::Renew;
                    self.until = None;
                    self.ask_at = None;
                }
            },
            (Answer::Unreachable(_), Order::Claim)
                if self.state == State::Asking(Because::Requested) =>
            {
                self.be_paired(now);
            }
            (Answer::Unreachable(_), _) => self.ask_at = Some(deadline_from(now, self.pause())),
            _ => {}
        }
    }

    /// What an operator wished was not granted.
    fn be_paired(&mut self, now: Instant) {
        self.state = State::Paired;
        self.ask_at = Some(deadline_from(now, self.pause()));
    }

    /// When the guest has to be suspended, which runs by a lease or by the peer's liveness.
    fn guard(&self, view: &View) -> Option<Instant> {
        match self.state {
            // An operator who has let this side go on has seen to the other: see `has_expired`.
            _ if view.colo == Colo::TookOver => None,
            State::Paired | State::Asking(_) if self.holds() && !self.suspended => {
                self.until.max(view.liveness_until)
            }
            _ => None,
        }
    }

    /// When it has something to do by itself.
    #[must_use]
    pub fn deadline(&self, view: &View) -> Option<Instant> {
        let guard = self.guard(view);
        let ask = match self.state {
            State::Idle | State::Paired if !self.holds() => None,
            // A lease that does not expire is not renewed before COLO.
            State::Idle if self.until.is_none() => None,
            State::Alone { .. } if !self.untold => None,
            State::Stopped => None,
            _ => self.ask_at.filter(|_| self.pending.is_none()),
        };
        [guard, ask].into_iter().flatten().min()
    }

    /// Until when the answer to an order is of use.
    #[must_use]
    pub fn answer_deadline(&self, order: Order, view: &View, now: Instant) -> Instant {
        let limit = match (self.term, order) {
            (None, _) => ANSWER_LIMIT,
            (Some(term), Order::Claim) => term.saturating_mul(3),
            (Some(term), _) => term / 2,
        };
        let limit = deadline_from(now, limit);
        // A lease that comes when the guest has been stopped helps nobody.
        match self.guard(view) {
            Some(guard) if guard > now => limit.min(guard),
            _ => limit,
        }
    }

    /// The next thing to be done now; to be asked until there is nothing.
    pub fn next(&mut self, view: &View, now: Instant) -> Option<Order> {
        if self.state == State::Idle && view.colo != Colo::Outside {
            self.state = State::Paired;
        }
        if self.suspended && matches!(self.state, State::Alone { .. }) {
            self.suspended = false;
            return Some(Order::Resume);
        }
        match self.state {
            State::Idle if self.until.is_some() => return self.renewal(now),
            State::Alone { told: true } if self.untold => return self.claim(now),
            State::Idle | State::Stopped | State::Alone { told: true } => return None,
            State::Paired | State::Asking(_) | State::Alone { told: false } => {}
        }
        // What was won is not looked at again: `answer` comes before this.
        let decided = matches!(self.state, State::Alone { .. });
        if let Some(reason) = self.reason_to_stop(view).filter(|_| !decided) {
            self.stop = Some(reason);
            self.state = State::Stopped;
            self.suspended = false;
            return Some(Order::Stop(reason));
        }
        if !decided && self.has_expired(view, now) {
            self.suspend();
            return Some(Order::Suspend);
        }
        self.go_on(view, now);
        match self.state {
            State::Paired if self.holds() => self.renewal(now),
            State::Asking(_) => self.claim(now),
            // COLO may still begin, and is told then.
            State::Alone { told: false } if view.colo != Colo::Outside => {
                self.state = State::Alone { told: true };
                Some(Order::TakeOver)
            }
            _ => None,
        }
    }

    fn reason_to_stop(&self, view: &View) -> Option<StopReason> {
        if self.stop.is_some() {
            return self.stop;
        }
        if view.colo == Colo::Ended {
            return Some(StopReason::Unfit);
        }
        if view.peer_phase == Some(Phase::Alone) {
            return Some(StopReason::PeerGoesOn);
        }
        let lost = self.is_lost(view) && view.colo != Colo::TookOver;
        (lost && self.on_loss == OnHeartbeatLoss::Stop).then_some(StopReason::PeerLost)
    }

    /// May the guest not run any more, neither by the lease nor by the peer's liveness?
    fn has_expired(&self, view: &View, now: Instant) -> bool {
        let covered = [self.until, view.liveness_until];
        // An operator who has let this side go on has seen to the other.
        let own = view.colo != Colo::TookOver;
        own && self.holds()
            && !self.suspended
            && !covered.into_iter().flatten().any(|until| now < until)
    }

    /// What the peer has done meanwhile is asked of the arbiter, at once and for as long as it takes.
    fn suspend(&mut self) {
        self.suspended = true;
        self.until = None;
        self.ask_at = None;
        if !matches!(self.state, State::Asking(Because::Runs)) {
            self.state = State::Asking(Because::Lost);
        }
    }

    fn is_lost(&self, view: &View) -> bool {
        let stands = [Phase::Stopped, Phase::Suspended].map(Some);
        view.peer == PeerState::Lost || stands.contains(&view.peer_phase)
    }

    fn go_on(&mut self, view: &View, now: Instant) {
        let asks = self.on_loss == OnHeartbeatLoss::Ask;
        let takes_over = self.on_loss == OnHeartbeatLoss::TakeOver;
        // The owner of the guest needs not wait for the heartbeat when COLO is over.
        let lost = self.is_lost(view) || (self.holds() && view.colo == Colo::Broken);
        let took_over = view.colo == Colo::TookOver;
        match self.state {
            // Somebody else has decided. An arbiter has to know, and may refuse.
            State::Paired | State::Asking(Because::Lost | Because::Requested)
                if took_over && asks =>
            {
                self.state = match self.term {
                    Some(_) => State::Asking(Because::Runs),
                    None => State::Alone { told: true },
                };
                self.ask_at = None;
            }
            State::Paired if took_over => self.state = State::Alone { told: true },
            State::Paired if lost && asks => {
                self.state = State::Asking(Because::Lost);
                self.ask_from(view, now);
            }
            // What was asked already decides this too.
            State::Asking(Because::Requested) if lost => {
                self.state = State::Asking(Because::Lost);
            }
            State::Paired if lost && takes_over => self.state = State::Alone { told: false },
            _ => {}
        }
    }

    fn renewal(&mut self, now: Instant) -> Option<Order> {
        let due = self.ask_at.is_none_or(|at| now >= at);
        self.order(Order::Renew, due)
    }

    fn claim(&mut self, now: Instant) -> Option<Order> {
        let due = self.ask_at.is_none_or(|at| now >= at);
        self.order(Order::Claim, due)
    }

    fn order(&mut self, order: Order, due: bool) -> Option<Order> {
        // A renewal on its way does not hold a claim up: the arbiter is asked in this order.
        let free = self.pending.is_none() || (order == Order::Claim && self.pending != Some(order));
        if due && free {
            self.pending = Some(order);
            return Some(order);
        }
        None
    }
}

#[cfg(test)]
mod tests;
