//! A model of everything around the two deciders: time, beats on their way, a register that both
//! reach or do not, guests that take a moment to stop, and an environment that breaks things.
//!
//! Time goes in ticks of 50 ms. In each, something may happen; then beats are sent and arrive, each
//! side's requests to the register are carried out, one or as many as there are, and each side does
//! what it has decided. A guest that is to stop runs for as long as is promised that it may.

use std::collections::VecDeque;
use std::fmt;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use colo_core::Role;
use colo_core::arbiter::register::{Entry, Next, Seat, Want};
use colo_core::arbiter::{Answer, ArbiterError, Grant, Owner};
use colo_core::heartbeat::{
    BEAT_LEN, Colo, Decider, OnHeartbeatLoss, Order, Peer, Phase, Requested, Rhythm, View,
};

const TICK: Duration = Duration::from_millis(50);
const INTERVAL: Duration = Duration::from_millis(100);
const MISSED: u32 = 3;
pub const TERM: Duration = Duration::from_millis(400);
/// For a right that is given up, and the first hold of a process.
const PATIENT: u16 = 100;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

fn at(tick: u16) -> Instant {
    *START + TICK * u32::from(tick)
}

/// The first tick at which `instant` has come.
fn tick_of(instant: Instant) -> u16 {
    let ticks = instant
        .saturating_duration_since(*START)
        .as_millis()
        .div_ceil(TICK.as_millis());
    u16::try_from(ticks).unwrap_or(u16::MAX)
}

/// What a way does with what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    Open,
    /// What is sent is lost.
    Cut,
    /// Of beats: they arrive when it is open again. Of requests: no answer comes, and they may take
    /// effect when it is open again, or later.
    Stuck,
}

/// What a side's arbiter is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Request {
    want: Want,
    /// The order it answers; none for the first hold and a release.
    order: Option<Order>,
    deadline: u16,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Read {
        sent: u16,
    },
    Replace {
        version: u64,
        entry: Entry,
        sent: u16,
    },
    /// It was carried out, and the answer is lost.
    Deaf,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Side {
    up: bool,
    peer: Peer,
    decider: Decider,
    seat: Seat,
    colo: Colo,
    /// It holds the right, or COLO does without.
    entitled: bool,
    runs: bool,
    /// Its guest runs until then, at the most.
    stops: Option<u16>,
    queue: VecDeque<Request>,
    way: Way,
    /// Beats to the other side.
    sent: Vec<[u8; BEAT_LEN]>,
    link: Way,
}

impl Side {
    fn new(role: Role, process: u64, now: u16) -> Self {
        let rhythm = Rhythm {
            role,
            session: [1; 16],
            process,
            interval: INTERVAL,
            missed: MISSED,
            on_loss: OnHeartbeatLoss::Ask,
            closed_is_loss: false,
        };
        Self {
            up: true,
            peer: Peer::new(rhythm, at(now)),
            decider: Decider::new(role, OnHeartbeatLoss::Ask, Some(TERM)),
            seat: Seat::new(Owner::new(process), TERM),
            colo: Colo::Outside,
            entitled: false,
            runs: false,
            stops: None,
            queue: VecDeque::new(),
            way: Way::Open,
            sent: Vec::new(),
            link: Way::Open,
        }
    }

    fn view(&self) -> View {
        View {
            colo: self.colo,
            peer: self.peer.state(),
            peer_phase: self.peer.phase(),
            hears_until: self.peer.hears_until(),
            relies_until: self.peer.relies_until(),
        }
    }

    /// Runs, or has not stood still yet.
    fn is_running(&self, now: u16) -> bool {
        self.up && (self.runs || self.stops.is_some_and(|at| now < at))
    }

    fn ask(&mut self, want: Want, order: Option<Order>, now: u16, deadline: u16) {
        self.queue.push_back(Request {
            want,
            order,
            deadline,
            step: Step::Read { sent: now },
        });
    }
}

/// How much may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// All of these together.
    pub mishaps: u8,
    /// Ways between the sides that are cut, stuck or opened again.
    pub links: u8,
    /// The same, between a side and the register.
    pub outages: u8,
    /// Processes that end, and begin again.
    pub deaths: u8,
    /// What operators want.
    pub wishes: u8,
    /// Answers of the register that are lost.
    pub losses: u8,
    /// No more happens from this tick on.
    pub until: u16,
}

/// What happens in a tick beside what the system does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Happens {
    Nothing,
    Link(Role, Way),
    Register(Role, Way),
    /// COLO's own connection ends, which both see.
    ColoBreaks,
    /// The process is killed. Its peer sees COLO's connection end, or does not.
    Dies(Role, bool),
    /// The process ends in good order.
    Quits(Role),
    /// A primary's process is started again.
    Restarts,
    /// An operator wants this side to go on alone.
    Wish(Role),
    /// An operator has killed the other side and lets this one go on without the arbiter.
    Override(Role),
    /// The register carries a side's request out, and the answer is lost.
    AnswerLost(Role),
    /// What a side has sent long ago takes effect.
    Late(usize),
}

/// A transition: what happens, and whose request comes first in this tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Label {
    pub happens: Happens,
    pub first: Role,
    /// A request that follows from an answer is carried out in the same tick.
    pub swift: bool,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?}; {} first, swift {}",
            self.happens, self.first, self.swift
        )
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    now: u16,
    primary: Side,
    secondary: Side,
    version: u64,
    entry: Option<Entry>,
    /// Replacements that nobody waits for any more.
    late: Vec<(u64, Entry)>,
    processes: u64,
    /// An operator has said that nothing else runs.
    overridden: bool,
    /// How many ticks longer a guest takes to stop than it may.
    dawdling: u16,
    pub budget: Budget,
}

/// What a world has come to that was left alone for a long time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    /// Both are one of two.
    Paired,
    /// This side's guest runs alone.
    Alone(Role),
    /// No guest runs, and a side still asks.
    Asking,
    /// No guest runs, for good.
    Nobody,
}

fn other(role: Role) -> Role {
    match role {
        Role::Primary => Role::Secondary,
        Role::Secondary => Role::Primary,
    }
}

const ROLES: [Role; 2] = [Role::Primary, Role::Secondary];

impl World {
    /// A pair in COLO that has beaten for a while.
    pub fn new(budget: Budget, dawdling: u16) -> Self {
        let mut world = Self {
            now: 0,
            primary: Side::new(Role::Primary, 1, 0),
            secondary: Side::new(Role::Secondary, 2, 0),
            version: 0,
            entry: None,
            late: Vec::new(),
            processes: 2,
            overridden: false,
            dawdling,
            budget: Budget {
                mishaps: 0,
                ..budget
            },
        };
        world.primary.runs = true;
        world.primary.ask(Want::Hold, None, 0, PATIENT);
        let quietly = Label {
            happens: Happens::Nothing,
            first: Role::Primary,
            swift: false,
        };
        for _ in 0..8 {
            world = world.step(quietly).expect("a pair that begins");
            if world.primary.entitled {
                world.primary.colo = Colo::Within;
                world.secondary.colo = Colo::Within;
            }
        }
        assert_eq!(world.end(), End::Paired);
        world.budget = Budget {
            until: world.now + budget.until,
            ..budget
        };
        world
    }

    pub const fn now(&self) -> u16 {
        self.now
    }

    fn side(&self, role: Role) -> &Side {
        match role {
            Role::Primary => &self.primary,
            Role::Secondary => &self.secondary,
        }
    }

    fn side_mut(&mut self, role: Role) -> &mut Side {
        match role {
            Role::Primary => &mut self.primary,
            Role::Secondary => &mut self.secondary,
        }
    }

    /// Everything that may happen in the next tick.
    pub fn labels(&self) -> Vec<Label> {
        let mut happens = vec![Happens::Nothing];
        happens.extend((0..self.late.len()).map(Happens::Late));
        if self.budget.mishaps > 0 && self.now < self.budget.until {
            self.mishaps(&mut happens);
        }
        // Which comes first matters only to those that change something.
        let both = ROLES.iter().all(|role| {
            let side = self.side(*role);
            side.up && side.way != Way::Cut && !side.queue.is_empty()
        });
        let changes = ROLES.iter().any(|role| self.changes(*role));
        let firsts = &ROLES[..if both && changes { 2 } else { 1 }];
        let paces = &[false, true][..if changes { 2 } else { 1 }];
        let mut labels = Vec::new();
        for happens in happens {
            for &first in firsts {
                labels.extend(paces.iter().map(|&swift| Label {
                    happens,
                    first,
                    swift,
                }));
            }
        }
        labels
    }

    /// Does the request that a side is at change the register, or lead to one that does?
    fn changes(&self, role: Role) -> bool {
        let side = self.side(role);
        let now = at(self.now + 1);
        side.queue
            .front()
            .is_some_and(|request| match request.step {
                Step::Replace { .. } => true,
                Step::Deaf => false,
                Step::Read { sent } => {
                    let mut seat = side.seat.clone();
                    let next = seat.judge(request.want, self.version, self.entry, at(sent), now);
                    matches!(next, Next::Replace(_))
                }
            })
    }

    fn mishaps(&self, out: &mut Vec<Happens>) {
        let budget = &self.budget;
        for role in ROLES {
            let side = self.side(role);
            for way in [Way::Open, Way::Cut, Way::Stuck] {
                if budget.links > 0 && way != side.link {
                    out.push(Happens::Link(role, way));
                }
                if budget.outages > 0 && way != side.way {
                    out.push(Happens::Register(role, way));
                }
            }
            if !side.up {
                continue;
            }
            if budget.deaths > 0 {
                out.push(Happens::Dies(role, false));
                out.push(Happens::Dies(role, true));
                out.push(Happens::Quits(role));
            }
            if budget.wishes > 0 {
                out.push(Happens::Wish(role));
                if side.colo != Colo::TookOver && side.decider.phase() != Phase::Stopped {
                    out.push(Happens::Override(role));
                }
            }
            let replaces = matches!(
                side.queue.front(),
                Some(Request {
                    step: Step::Replace { .. },
                    ..
                })
            );
            if budget.losses > 0 && replaces && side.way == Way::Open {
                out.push(Happens::AnswerLost(role));
            }
        }
        let colo = [self.primary.colo, self.secondary.colo];
        if budget.links > 0 && colo == [Colo::Within; 2] {
            out.push(Happens::ColoBreaks);
        }
        if budget.deaths > 0 && !self.primary.up && !self.overridden {
            out.push(Happens::Restarts);
        }
    }

    /// The next tick.
    pub fn step(&self, label: Label) -> Result<Self, String> {
        let mut next = self.clone();
        next.now += 1;
        let deaf = next.happen(label.happens);
        for role in ROLES {
            next.beat(role);
        }
        for role in ROLES {
            next.hear(role);
        }
        for role in [label.first, other(label.first)] {
            let mut requests = if label.swift { 3 } else { 1 };
            while requests > 0 && next.consult(role, deaf == Some(role)) {
                requests -= 1;
            }
        }
        for role in ROLES {
            next.decide(role)?;
        }
        next.check()?;
        next.forget();
        Ok(next)
    }

    fn happen(&mut self, happens: Happens) -> Option<Role> {
        let now = self.now;
        match happens {
            Happens::Nothing => return None,
            Happens::Late(index) => {
                let (version, entry) = self.late.remove(index);
                self.replace(version, entry);
                return None;
            }
            Happens::Link(..) | Happens::ColoBreaks => self.budget.links -= 1,
            Happens::Register(..) => self.budget.outages -= 1,
            Happens::Dies(..) | Happens::Quits(_) | Happens::Restarts => self.budget.deaths -= 1,
            Happens::Wish(_) | Happens::Override(_) => self.budget.wishes -= 1,
            Happens::AnswerLost(_) => self.budget.losses -= 1,
        }
        self.budget.mishaps -= 1;
        match happens {
            Happens::Link(role, way) => self.side_mut(role).link = way,
            Happens::Register(role, way) => self.side_mut(role).way = way,
            Happens::ColoBreaks => {
                self.primary.colo = Colo::Broken;
                self.secondary.colo = Colo::Broken;
            }
            Happens::Dies(role, seen) => self.die(role, seen),
            Happens::Quits(role) => {
                // It says so, and gives its right up if that can be done at once.
                let side = self.side_mut(role);
                let beat = side.peer.beat_now(Phase::Stopped, at(now));
                if side.link != Way::Cut {
                    side.sent.push(beat);
                }
                let (open, version, entry) = (side.way == Way::Open, self.version, self.entry);
                let seat = &mut self.side_mut(role).seat;
                let next = seat.judge(Want::Release, version, entry, at(now), at(now));
                if let Next::Replace(entry) = next
                    && open
                {
                    self.replace(version, entry);
                }
                self.die(role, true);
            }
            Happens::Restarts => {
                self.processes += 1;
                let (way, link) = (self.primary.way, self.primary.link);
                self.primary = Side {
                    way,
                    link,
                    ..Side::new(Role::Primary, self.processes, now)
                };
                self.primary.ask(Want::Hold, None, now, now + PATIENT);
            }
            Happens::Wish(role) => {
                let side = self.side_mut(role);
                let view = side.view();
                // Granted at once is only what was granted before.
                if side.decider.request(&view, at(now)) == Requested::Granted {
                    assert_ne!(side.decider.phase(), Phase::Paired);
                }
            }
            Happens::Override(role) => {
                self.die(other(role), true);
                self.overridden = true;
                let overruled = self.side_mut(role).decider.overrule();
                assert_eq!(overruled, Requested::Granted);
            }
            Happens::AnswerLost(role) => return Some(role),
            Happens::Nothing | Happens::Late(_) => {}
        }
        None
    }

    fn die(&mut self, role: Role, seen: bool) {
        let side = self.side_mut(role);
        side.up = false;
        side.runs = false;
        side.stops = None;
        // What it has sent may take effect yet.
        let sent = side.queue.drain(..).find_map(|request| match request.step {
            Step::Replace { version, entry, .. } => Some((version, entry)),
            _ => None,
        });
        if side.way != Way::Cut {
            self.late.extend(sent);
        }
        let peer = self.side_mut(other(role));
        if seen && peer.colo == Colo::Within {
            peer.colo = Colo::Broken;
        }
    }

    fn beat(&mut self, role: Role) {
        let now = at(self.now);
        let side = self.side_mut(role);
        if !side.up {
            return;
        }
        let phase = side.decider.phase();
        if let Some(beat) = side.peer.beat(phase, now)
            && side.link != Way::Cut
        {
            side.sent.push(beat);
        }
    }

    fn hear(&mut self, role: Role) {
        let now = at(self.now);
        self.side_mut(role).peer.look(now);
        let from = self.side_mut(other(role));
        if from.link == Way::Stuck {
            return;
        }
        let beats = std::mem::take(&mut from.sent);
        let side = self.side_mut(role);
        for beat in &beats {
            if side.up && side.peer.receive(beat, now).is_ok() && side.colo != Colo::Outside {
                side.peer.pin();
            }
        }
    }

    fn replace(&mut self, version: u64, entry: Entry) -> bool {
        let fits = self.version == version;
        if fits {
            self.version += 1;
            self.entry = Some(entry);
        }
        fits
    }

    /// One request of a side to the register; true if another follows from it.
    fn consult(&mut self, role: Role, deaf: bool) -> bool {
        let (tick, now) = (self.now, at(self.now));
        let (version, entry) = (self.version, self.entry);
        let side = self.side_mut(role);
        let (way, up) = (side.way, side.up);
        let Some(mut request) = side.queue.front().copied().filter(|_| up) else {
            return false;
        };
        let before = request.step;
        let outcome = match (way, request.step) {
            (Way::Cut, _) => Some(unreachable()),
            (Way::Stuck, _) | (Way::Open, Step::Deaf) => None,
            (Way::Open, Step::Read { sent }) => {
                let next = side.seat.judge(request.want, version, entry, at(sent), now);
                match next {
                    Next::Replace(entry) => {
                        request.step = Step::Replace {
                            version,
                            entry,
                            sent: tick,
                        };
                        None
                    }
                    next => self.settle(next, &mut request),
                }
            }
            (
                Way::Open,
                Step::Replace {
                    version,
                    entry,
                    sent,
                },
            ) => {
                let replaced = self.replace(version, entry);
                if deaf {
                    request.step = Step::Deaf;
                    None
                } else {
                    request.step = Step::Read { sent: tick };
                    let side = self.side_mut(role);
                    let next = replaced
                        .then(|| side.seat.replaced(entry, at(sent)))
                        .flatten();
                    next.and_then(|next| self.settle(next, &mut request))
                }
            }
        };
        let side = self.side_mut(role);
        let timed_out = tick >= request.deadline;
        let outcome = outcome.or_else(|| {
            timed_out.then(|| match side.seat.resigns(now) {
                Some(owner) if matches!(request.step, Step::Read { .. }) && way == Way::Open => {
                    Answer::Lost(owner)
                }
                _ => unreachable(),
            })
        });
        let Some(answer) = outcome else {
            let follows = way == Way::Open
                && (matches!(request.step, Step::Replace { .. })
                    || matches!(before, Step::Replace { .. }));
            if let Some(front) = side.queue.front_mut() {
                *front = request;
            }
            return follows;
        };
        side.queue.pop_front();
        if let Step::Replace { version, entry, .. } = request.step
            && way == Way::Stuck
        {
            self.late.push((version, entry));
        }
        self.answered(role, &request, &answer);
        false
    }

    /// What a request has come to, if it has.
    fn settle(&self, next: Next, request: &mut Request) -> Option<Answer> {
        match next {
            Next::Won(grant) => Some(Answer::Won(grant)),
            Next::Lost(owner) => Some(Answer::Lost(owner)),
            // Any answer will do: nobody hears it.
            Next::Released => Some(Answer::Won(Grant {
                generation: 0,
                until: None,
            })),
            Next::Replace(_) | Next::Wait => {
                request.step = Step::Read { sent: self.now };
                None
            }
        }
    }

    fn answered(&mut self, role: Role, request: &Request, answer: &Answer) {
        let (tick, now) = (self.now, at(self.now));
        let side = self.side_mut(role);
        match (request.order, request.want) {
            (Some(order), _) => side.decider.answer(order, answer, now),
            (None, Want::Hold) => match answer {
                Answer::Won(grant) => {
                    side.decider.held(grant.until, now);
                    side.entitled = true;
                    // A process that was started again runs a guest of its own from here on.
                    side.runs = true;
                    if tick > 8 {
                        side.colo = Colo::Within;
                    }
                }
                Answer::Lost(_) | Answer::Unreachable(_) => side.up = false,
            },
            (None, _) => {}
        }
        // The next request is sent now.
        if let Some(next) = side.queue.front_mut() {
            next.step = Step::Read { sent: tick };
            side.seat.begin();
        }
    }

    fn decide(&mut self, role: Role) -> Result<(), String> {
        let (tick, now, dawdling) = (self.now, at(self.now), self.dawdling);
        let side = self.side_mut(role);
        if !side.up {
            return Ok(());
        }
        if side.stops.is_some_and(|at| tick >= at) {
            side.stops = None;
            if side.decider.phase() == Phase::Stopped {
                side.ask(Want::Release, None, tick, tick + PATIENT);
            }
        }
        let before = side.decider.phase();
        for _ in 0..10 {
            let view = side.view();
            let Some(order) = side.decider.next(&view, now) else {
                if side.decider.phase() != before {
                    let beat = side.peer.beat_now(side.decider.phase(), now);
                    if side.link != Way::Cut {
                        side.sent.push(beat);
                    }
                }
                return Ok(());
            };
            match order {
                Order::Renew | Order::Claim => {
                    let deadline = tick_of(side.decider.patience(order, &view, now));
                    let want = if order == Order::Claim {
                        Want::Claim
                    } else {
                        Want::Hold
                    };
                    if side.queue.is_empty() {
                        side.seat.begin();
                    }
                    side.ask(want, Some(order), tick, deadline);
                }
                Order::TakeOver => {
                    side.colo = Colo::TookOver;
                    side.runs = true;
                }
                Order::GoOn => {
                    side.runs = true;
                    side.stops = None;
                }
                Order::Suspend | Order::Stop(_) => {
                    if side.runs {
                        // A quarter of the term is two ticks. One of the timeout is one and a half, and this
                        // decision half a tick late.
                        let heard = view.hears_until.map_or(0, tick_of);
                        let stopping = if heard + 1 >= tick { 1 } else { 2 };
                        side.stops = Some(tick + stopping + dawdling);
                    }
                    side.runs = false;
                    // Given up is what nobody runs by any more.
                    if side.stops.is_none() && order != Order::Suspend {
                        side.ask(Want::Release, None, tick, tick + PATIENT);
                    }
                }
            }
        }
        Err(format!("{role} has orders without end"))
    }

    fn check(&self) -> Result<(), String> {
        if self.primary.is_running(self.now) && self.secondary.is_running(self.now) {
            return Err("two guests run".into());
        }
        let alone = |side: &Side| side.up && side.decider.phase() == Phase::Alone;
        if alone(&self.primary) && alone(&self.secondary) {
            return Err("both sides have the right for good".into());
        }
        Ok(())
    }

    /// What would only make equal worlds look different.
    fn forget(&mut self) {
        let version = self.version;
        self.late.retain(|(of, _)| *of == version);
        for role in ROLES {
            if !self.side(role).up {
                let now = self.now;
                let (way, link, sent) = {
                    let side = self.side_mut(role);
                    (side.way, side.link, std::mem::take(&mut side.sent))
                };
                *self.side_mut(role) = Side {
                    up: false,
                    way,
                    link,
                    sent,
                    ..Side::new(role, 0, now)
                };
            }
        }
    }

    /// Has a process ended?
    pub const fn has_died(&self, budget: Budget) -> bool {
        // An operator who lets a side go on without the arbiter has killed the other.
        self.overridden || self.budget.deaths < budget.deaths
    }

    /// Nothing will ever change any more.
    pub fn is_settled(&self) -> bool {
        let over = self.budget.mishaps == 0 || self.now >= self.budget.until;
        over && self.late.is_empty()
            && ROLES.iter().all(|role| {
                let side = self.side(*role);
                let decided = matches!(side.decider.phase(), Phase::Alone | Phase::Stopped);
                !side.up || (decided && side.queue.is_empty() && side.stops.is_none())
            })
    }

    /// What it has come to.
    pub fn end(&self) -> End {
        for role in ROLES {
            let side = self.side(role);
            if side.up && side.runs && side.decider.phase() == Phase::Alone {
                return End::Alone(role);
            }
        }
        if self.primary.is_running(self.now) {
            return End::Paired;
        }
        let asking = [Phase::Asking, Phase::Suspended];
        let asks = |side: &Side| side.up && asking.contains(&side.decider.phase());
        if self.secondary.up && self.secondary.is_running(self.now) {
            return End::Alone(Role::Secondary);
        }
        if asks(&self.primary) || asks(&self.secondary) {
            End::Asking
        } else {
            End::Nobody
        }
    }

    /// A side that nobody has stopped could have gone on: it is up, and the register is open to it.
    pub fn could_go_on(&self) -> bool {
        ROLES.iter().any(|role| {
            let side = self.side(*role);
            side.up && side.way == Way::Open && side.decider.phase() != Phase::Stopped
        })
    }
}

fn unreachable() -> Answer {
    Answer::Unreachable(ArbiterError::new("no answer"))
}
