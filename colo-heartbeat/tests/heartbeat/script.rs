//! One side of a pair under a script of bytes: a peer that beats in and out of turn, an arbiter that says
//! anything, operators, a clock that the script moves. The tests run it on random scripts, and the
//! fuzz target on those that it finds.

use std::time::{Duration, Instant};

use colo_heartbeat::arbiter::{Answer, ArbiterError, Grant, Owner};
use colo_heartbeat::raw::{BEAT_LEN, Beat, Colo, Decider, Order, Peer, Requested, View};
use colo_heartbeat::{OnHeartbeatLoss, PeerState, Phase, Rhythm, Role};

const OURS: u64 = 1;
const SESSION: [u8; 16] = [3; 16];
const INTERVAL: Duration = Duration::from_millis(50);
const MISSED: u32 = 3;
const PHASES: [Phase; 5] = [
    Phase::Paired,
    Phase::Asking,
    Phase::Alone,
    Phase::Stopped,
    Phase::Suspended,
];
const POLICIES: [OnHeartbeatLoss; 3] = [
    OnHeartbeatLoss::TakeOver,
    OnHeartbeatLoss::Ask,
    OnHeartbeatLoss::Stop,
];

const fn other(role: Role) -> Role {
    match role {
        Role::Primary => Role::Secondary,
        Role::Secondary => Role::Primary,
    }
}

/// What a script has led to, to see that scripts lead everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Beats that were taken.
    pub heard: usize,
    /// Beats that were refused.
    pub refused: usize,
    /// Times that the peer was lost.
    pub lost: usize,
    /// Guests that went on alone.
    pub took_over: usize,
    /// Guests that stood still for a time.
    pub suspended: usize,
    /// Guests that were stopped for good.
    pub stopped: usize,
}

/// Runs a script.
///
/// # Panics
/// Something did not hold.
pub fn run(script: &[u8]) -> Outcome {
    let mut bytes = script.iter().copied();
    let mut next = move || bytes.next();
    let setting = next().unwrap_or(0);
    let role = [Role::Primary, Role::Secondary][usize::from(setting & 1)];
    let on_loss = POLICIES[usize::from(setting >> 1 & 3) % 3];
    let term = (setting & 8 != 0).then_some(Duration::from_secs(3));
    let mut rhythm = Rhythm::new(role, SESSION, on_loss).expect("random numbers");
    rhythm.process = OURS;
    rhythm.interval = INTERVAL;
    rhythm.missed = MISSED;
    rhythm.closed_is_loss = setting & 16 != 0;
    let now = Instant::now();
    let mut side = Side {
        rhythm,
        term,
        peer: Peer::new(rhythm, now),
        decider: Decider::new(role, on_loss, term),
        colo: Colo::Outside,
        now,
        pinned: false,
        closed: false,
        last: None,
        sequence: [0; 3],
        sent: 0,
        asked: Vec::new(),
        may_take_over: false,
        suspended: false,
        stopped: false,
        outcome: Outcome::default(),
    };
    while let Some(action) = next() {
        side.act(action, [next().unwrap_or(0), next().unwrap_or(0)]);
        side.decide();
    }
    side.outcome
}

struct Side {
    rhythm: Rhythm,
    term: Option<Duration>,
    peer: Peer,
    decider: Decider,
    colo: Colo,
    now: Instant,
    pinned: bool,
    closed: bool,
    /// The last beat that was taken, and when.
    last: Option<(Beat, Instant)>,
    /// The last number used by each process that beats.
    sequence: [u64; 3],
    /// The last of ours.
    sent: u64,
    /// What the arbiter was asked and has not answered.
    asked: Vec<Order>,
    /// A claim was won, or an operator has had his way.
    may_take_over: bool,
    suspended: bool,
    stopped: bool,
    outcome: Outcome,
}

impl Side {
    fn act(&mut self, action: u8, arguments: [u8; 2]) {
        let [first, second] = arguments;
        match action % 16 {
            0..=3 => self.pass(Duration::from_millis(u64::from(first) % 64)),
            4 => self.pass(Duration::from_millis(u64::from(first) * 40)),
            5..=7 => self.receive(self.ordinary(first), None),
            8 => self.receive(self.odd(first, second), None),
            9 => self.receive(self.ordinary(first), Some(second)),
            10 => {
                let mut garbage = [first; BEAT_LEN];
                garbage[usize::from(second) % BEAT_LEN] ^= 0x55;
                assert!(self.peer.receive(&garbage, self.now).is_err());
            }
            11 => self.answer(first, second),
            12 => self.colo_goes_on(first),
            13 => self.operator(first),
            14 => {
                self.peer.disconnected();
                self.closed = self.last.is_some();
            }
            _ => self.embedder(first),
        }
    }

    fn view(&self) -> View {
        View {
            colo: self.colo,
            peer: self.peer.state(),
            peer_phase: self.peer.phase(),
            liveness_until: self.peer.liveness_until(),
            peer_liveness_until: self.peer.peer_liveness_until(),
        }
    }

    /// Time goes by, and this side looks and beats when it wakes.
    fn pass(&mut self, time: Duration) {
        let was_lost = self.peer.state() == PeerState::Lost;
        self.now += time;
        let before = self.peer.lost_at();
        let late = self.peer.look(self.now);
        assert!(late <= time);
        // What it has overslept is not held against the peer.
        if let (Some(before), Some(after)) = (before, self.peer.lost_at()) {
            assert!(after >= before && after <= before + late);
        }
        if self.peer.beat(self.decider.phase(), self.now).is_some() {
            self.sent += 1;
            assert!(self.peer.beat(self.decider.phase(), self.now).is_none());
        }
        assert!(self.peer.due() > self.now && self.peer.due() <= self.now + INTERVAL);
        self.check_loss(was_lost);
    }

    /// The peer is lost only when it, or its answer, was missing for a timeout.
    fn check_loss(&mut self, was_lost: bool) {
        let state = self.peer.state();
        assert_eq!(state == PeerState::Unheard, self.last.is_none());
        if state != PeerState::Lost {
            return;
        }
        self.outcome.lost += usize::from(!was_lost);
        let silence = self.peer.silence(self.now);
        let missing = [silence.heard, silence.unanswered];
        let is_missing = missing.into_iter().flatten().max() >= Some(INTERVAL * MISSED);
        assert!(
            is_missing || (self.closed && self.rhythm.closed_is_loss),
            "{silence:?}"
        );
    }

    /// What a peer in step would send, from one of two processes.
    fn ordinary(&self, choice: u8) -> Beat {
        let process = usize::from(choice & 0x81 == 0x81);
        Beat {
            role: other(self.rhythm.role),
            phase: if choice & 0x70 == 0x70 {
                PHASES[usize::from(choice) % 5]
            } else {
                Phase::Paired
            },
            session: SESSION,
            process: [10, 11][process],
            sequence: self.sequence[process] + 1,
            seen: self.sent.saturating_sub(u64::from(choice & 2)),
            timeout: Duration::from_millis(150),
            on_loss: match self.rhythm.on_loss {
                OnHeartbeatLoss::TakeOver => OnHeartbeatLoss::Stop,
                other => other,
            },
        }
    }

    /// A beat with one field that may be out of order.
    fn odd(&self, which: u8, value: u8) -> Beat {
        let mut beat = self.ordinary(0);
        match which % 8 {
            0 => beat.role = self.rhythm.role,
            1 => beat.session = [value; 16],
            2 => beat.process = u64::from(value % 3),
            3 => beat.sequence = beat.sequence.saturating_sub(u64::from(value % 4)),
            4 => beat.sequence = u64::MAX - u64::from(value % 2),
            5 => beat.seen = self.sent + u64::from(value % 3),
            6 => beat.timeout = Duration::from_millis(u64::from(u32::MAX >> (value % 32)).max(1)),
            _ => beat.on_loss = POLICIES[usize::from(value) % 3],
        }
        beat
    }

    /// A beat arrives; `spoilt` is a bit of it that does not arrive as it was sent.
    fn receive(&mut self, beat: Beat, spoilt: Option<u8>) {
        let mut bytes = beat.encode();
        if let Some(bit) = spoilt {
            bytes[usize::from(bit) / 8 % BEAT_LEN] ^= 1 << (bit % 8);
        }
        let was_lost = self.peer.state() == PeerState::Lost;
        if self.peer.receive(&bytes, self.now).is_err() {
            self.outcome.refused += 1;
            return;
        }
        assert_eq!(spoilt, None, "a damaged beat was taken");
        assert_eq!(beat.session, SESSION);
        assert_ne!(beat.role, self.rhythm.role);
        assert_ne!(beat.process, OURS, "two sides with one number");
        assert!(beat.seen <= self.sent);
        if let Some((last, _)) = &self.last {
            if last.process == beat.process {
                assert!(beat.sequence > last.sequence, "a beat was taken twice");
            } else {
                assert!(!self.pinned, "another process is the peer");
            }
        }
        if let Some(process) = [10, 11].iter().position(|p| *p == beat.process) {
            self.sequence[process] = beat.sequence.min(u64::MAX - 1);
        }
        self.last = Some((beat, self.now));
        self.closed = false;
        self.outcome.heard += 1;
        self.peer.look(self.now);
        assert_eq!(self.peer.age(self.now), Some(Duration::ZERO));
        self.check_loss(was_lost);
    }

    fn answer(&mut self, what: u8, value: u8) {
        if self.asked.is_empty() {
            return;
        }
        let to = self.asked.remove(usize::from(value) % self.asked.len());
        let until = Some(self.now + Duration::from_millis(u64::from(value) * 16));
        let answer = match what % 4 {
            0 | 1 => Answer::Won(Grant {
                generation: 1,
                until: until.filter(|_| to == Order::Renew && what & 4 == 0),
            }),
            2 => Answer::Lost(Owner::new(9)),
            _ => Answer::Unreachable(ArbiterError::new("the script says so")),
        };
        self.may_take_over |= to == Order::Claim && matches!(answer, Answer::Won(_));
        self.decider.answer(to, &answer, self.now);
    }

    fn colo_goes_on(&mut self, what: u8) {
        self.colo = match (self.colo, what % 4) {
            (Colo::Outside, _) => Colo::Within,
            (Colo::Within, 0) => Colo::Broken,
            (Colo::Within | Colo::Broken, 1) if self.outcome.took_over > 0 => Colo::TookOver,
            (Colo::Within | Colo::Broken, 2) => Colo::Ended,
            (same, _) => same,
        };
        if self.colo != Colo::Outside && self.peer.state() != PeerState::Unheard {
            self.peer.pin();
            self.pinned = true;
        }
    }

    fn operator(&mut self, what: u8) {
        let view = self.view();
        let requested = if what.is_multiple_of(2) {
            self.decider.request(&view, self.now)
        } else if self.colo != Colo::Outside {
            self.decider.override_fence()
        } else {
            return;
        };
        match requested {
            Requested::Granted => {
                // The heartbeat's thread hands the wish on to COLO by itself.
                self.may_take_over = true;
                if self.colo != Colo::Outside {
                    self.colo = Colo::TookOver;
                }
            }
            Requested::Stopped(_) => assert!(self.stopped),
            Requested::Asked | Requested::PeerAlive => assert!(self.term.is_some()),
        }
    }

    fn embedder(&mut self, what: u8) {
        match what % 4 {
            0 => {
                self.peer.pin();
                self.pinned = true;
                self.decider.colo_begins();
            }
            1 => self.decider.claim_guest(),
            2 => self.decider.released(),
            _ => {
                let until = Duration::from_millis(u64::from(what) * 16);
                let until = (what & 4 == 0).then(|| self.now + until);
                if self.term.is_some() {
                    self.decider.held(until, self.now);
                }
            }
        }
    }

    /// Does what is to be done, and looks whether that may be.
    fn decide(&mut self) {
        for _ in 0..16 {
            let view = self.view();
            let Some(order) = self.decider.next(&view, self.now) else {
                // Whoever has nothing to do is not woken for it at once: that would be a loop.
                let deadline = self.decider.deadline(&view);
                assert!(
                    deadline.is_none_or(|at| at > self.now),
                    "it spins: {:?}",
                    self.decider
                );
                return;
            };
            assert!(
                !self.stopped,
                "{order:?} of a side that has stopped for good"
            );
            match order {
                Order::Renew | Order::Claim => {
                    assert!(!self.asked.contains(&order), "asked twice");
                    assert!(self.decider.answer_deadline(order, &view, self.now) > self.now);
                    self.asked.push(order);
                }
                Order::TakeOver => {
                    assert!(
                        !self.suspended,
                        "COLO goes on with a guest that stands still"
                    );
                    let asks = self.rhythm.on_loss == OnHeartbeatLoss::Ask;
                    let by_itself = self.rhythm.on_loss == OnHeartbeatLoss::TakeOver;
                    assert!(by_itself || self.may_take_over || !asks);
                    assert_ne!(
                        (self.rhythm.on_loss, self.may_take_over),
                        (OnHeartbeatLoss::Stop, false)
                    );
                    self.outcome.took_over += 1;
                    assert_eq!(self.outcome.took_over, 1, "it goes on twice");
                }
                Order::Suspend => {
                    assert!(!std::mem::replace(&mut self.suspended, true));
                    assert!(self.decider.holds());
                    self.outcome.suspended += 1;
                }
                Order::Resume => {
                    assert!(std::mem::replace(&mut self.suspended, false));
                    assert!(self.may_take_over, "this side does not own the guest");
                }
                Order::Stop(reason) => {
                    self.stopped = true;
                    self.outcome.stopped += 1;
                    assert_eq!(self.decider.phase(), Phase::Stopped);
                    assert_eq!(self.decider.stop_reason(), Some(reason));
                }
            }
        }
        panic!("orders without end: {:?}", self.decider);
    }
}
