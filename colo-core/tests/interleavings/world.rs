//! A model of everything around the two machines: guests, RAM cache, connections, and an
//! environment that breaks things.
//!
//! Guest state is a version: `n` is the state of the primary when it stopped for checkpoint `n`
//! (0: the end of precopy). RAM and device state are kept apart, and RAM in two halves that the guest
//! writes by itself, so that a mixture would show.

use std::fmt;

use colo_core::primary::PrimaryScript;
use colo_core::secondary::SecondaryScript;
use colo_core::{
    Action, Cause, Event, ExitReason, Machine, Message, OnPeerLoss, Outcome, PeerLoss, Primary,
    Resume, Role, Script, Secondary, Step, Wait,
};

/// The content of the secondary's RAM or devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Content {
    /// Exactly this checkpoint.
    Checkpoint(u8),
    /// What its own guest has made of this checkpoint.
    Own(u8),
    /// Nothing that may run.
    Spoilt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Item {
    Message(Message),
    HalfOfRam(usize, Written),
    EndOfRam,
    Devices(u8),
}

/// What the primary's guest has made of half of its RAM: in which epoch it wrote there, counted by the
/// checkpoint that contains it, and how often since.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Written {
    epoch: u8,
    again: u8,
}

/// Whether pages are sent between checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ahead {
    /// No.
    Never,
    /// When [`Step::is_gap`] says so, each half on a channel of its own.
    InGap,
    /// The same, on whichever channel is free.
    InGapUnordered,
    /// Whenever the guest runs.
    Always,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Request {
    None,
    Stored,
    Taken,
    /// Taken when the exit was being reported already.
    Late,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Side<S> {
    machine: Machine<S>,
    alive: bool,
    connected: bool,
    vm_runs: bool,
    output_open: bool,
    exits: u8,
    request: Request,
    /// The last checkpoint reported.
    completed: u8,
}

impl<S: Script> Side<S> {
    fn new(machine: Machine<S>) -> Self {
        Self {
            machine,
            alive: true,
            connected: true,
            vm_runs: false,
            output_open: false,
            exits: 0,
            request: Request::None,
            completed: 0,
        }
    }

    fn dead() -> Self {
        Self {
            alive: false,
            connected: false,
            ..Self::new(Machine::new(OnPeerLoss::Wait))
        }
    }

    fn reachable(&self) -> bool {
        self.alive && self.connected
    }

    fn waits_for(&self, wait: Wait) -> bool {
        self.alive && self.machine.action() == Action::Perform(Step::Await(wait))
    }

    fn outcome(&self) -> Option<Outcome> {
        match self.machine.action() {
            Action::Finish(outcome) => Some(outcome),
            _ => None,
        }
    }

    fn carries_on(&self) -> bool {
        self.alive && self.outcome() == Some(Outcome::TookOver) && self.vm_runs && self.output_open
    }

    /// Neither running nor able to be told to.
    fn is_lost(&self) -> bool {
        !self.alive || matches!(self.outcome(), Some(Outcome::Broken(_) | Outcome::Quit))
    }

    /// The signs that both sides show to a state check.
    fn check(&self) -> Result<(), String> {
        let over = self.outcome().is_some() || self.waits_for(Wait::Decision);
        if self.exits > 1 || (over && self.exits != 1) {
            return Err(format!(
                "{} reported {} exits",
                self.machine.role(),
                self.exits
            ));
        }
        let broken = matches!(self.outcome(), Some(Outcome::Broken(_)));
        if broken && self.vm_runs && self.output_open {
            return Err("a broken vm carries on".into());
        }
        Ok(())
    }
}

/// What is explored.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// What the primary does without its peer.
    pub primary: OnPeerLoss,
    /// What the secondary does.
    pub secondary: OnPeerLoss,
    /// When the primary's VM runs again.
    pub resume: Resume,
    /// The primary's gate tells output before a checkpoint from output after it.
    pub marks: bool,
    /// Whether pages are sent between checkpoints.
    pub ahead: Ahead,
}

/// How often the environment may still interfere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Checkpoints that become due.
    pub checkpoints: u8,
    /// Processes that are killed or told to quit.
    pub deaths: u8,
    /// Steps that fail on their own side.
    pub failures: u8,
    /// Deadlines that pass although the peer is there.
    pub deadlines: u8,
    /// Links that break.
    pub cuts: u8,
    /// Requests of an operator, who kills the other side first.
    pub requests: u8,
    /// Halves of RAM that are sent between checkpoints.
    pub ahead: u8,
    /// Halves that the guest writes again after that.
    pub writes: u8,
    /// All of these together, checkpoints, requests and what the guest does apart.
    pub mishaps: u8,
}

impl Budget {
    fn may(&self, kind: fn(&Self) -> u8) -> bool {
        kind(self) > 0 && self.mishaps > 0
    }

    fn spend(&mut self, kind: fn(&mut Self) -> &mut u8) {
        *kind(self) -= 1;
        self.mishaps -= 1;
    }
}

/// Who brings a transition about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The system itself: it goes on like this if nothing else happens.
    System,
    /// The environment, which may do it or not.
    Environment,
}

/// What happens in a transition.
#[derive(Clone, Copy)]
pub enum What {
    /// An action took effect in this way and ended with this event.
    Ends(Action, Way, Event),
    Happens(&'static str),
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ends(action, Way::Whole, event) => write!(f, "{action}: {event:?}"),
            Self::Ends(action, way, event) => write!(f, "{action} ({way:?}): {event:?}"),
            Self::Happens(what) => f.write_str(what),
        }
    }
}

/// To which side, and what.
#[derive(Clone, Copy)]
pub struct Label(Option<Role>, What);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(role) => write!(f, "{role}: {}", self.1),
            None => self.1.fmt(f),
        }
    }
}

/// A transition: who brings it about, what happens, and where it leads.
pub struct Transition {
    pub by: By,
    pub label: Label,
    pub next: Result<World, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    primary: Side<PrimaryScript>,
    secondary: Side<SecondaryScript>,
    to_secondary: Vec<Item>,
    to_primary: Vec<Item>,
    link_up: bool,
    budget: Budget,
    // The primary's guest.
    captured: u8,
    saved: u8,
    guest: [Written; 2],
    dirty: [bool; 2],
    /// Its RAM at the last checkpoint.
    taken: [Written; 2],
    /// What of it is still to be sent, if the guest runs.
    kept: Option<[Option<Written>; 2]>,
    /// On the way beside the main channel.
    beside: [Vec<Written>; 2],
    ahead: Ahead,
    // Its output, by the checkpoint that contains what the newest of it came from.
    said: u8,
    cut: u8,
    released: u8,
    marks: bool,
    // The secondary's guest.
    ram: Content,
    devices: Content,
    cache: [Written; 2],
    buffer: u8,
    staged: u8,
}

/// Shows which of a step's ways to end is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// All of it took effect.
    Whole,
    /// As much took effect as can without the step being done.
    Part,
    /// Nothing did.
    Not,
}

/// What a quiet world, one that does nothing by itself, has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiet {
    /// Both run, in step after this many checkpoints.
    InStep(u8),
    /// This side carries on alone.
    Alone(Role),
    /// A decision is waited for.
    Undecided,
    /// Both sides are lost, by one fault on each.
    Lost,
}

impl World {
    pub fn new(setting: Setting, budget: Budget) -> Self {
        let Setting {
            primary,
            secondary,
            resume,
            marks,
            ahead,
        } = setting;
        Self {
            primary: Side::new(Primary::resuming(resume, primary)),
            secondary: Side::new(Secondary::new(secondary)),
            to_secondary: Vec::new(),
            to_primary: Vec::new(),
            link_up: true,
            budget,
            captured: 0,
            saved: 0,
            guest: [Written::default(); 2],
            dirty: [false; 2],
            taken: [Written::default(); 2],
            kept: None,
            beside: [Vec::new(), Vec::new()],
            ahead,
            said: 0,
            cut: 0,
            released: 0,
            marks,
            ram: Content::Checkpoint(0),
            devices: Content::Checkpoint(0),
            cache: [Written::default(); 2],
            buffer: 0,
            staged: 0,
        }
    }

    /// What must hold in every state.
    pub fn check(&self) -> Result<(), String> {
        self.primary.check()?;
        self.secondary.check()?;
        let owns_output = |alive: bool, open: bool| alive && open;
        if owns_output(self.primary.alive, self.primary.output_open)
            && owns_output(self.secondary.alive, self.secondary.output_open)
        {
            return Err("both sides own the output".into());
        }
        if self.secondary.output_open {
            match self.ram {
                Content::Checkpoint(base) | Content::Own(base) if base >= self.released => {}
                other => {
                    return Err(format!(
                        "output of checkpoint {} is out, the survivor has {other:?}",
                        self.released
                    ));
                }
            }
        }
        Ok(())
    }

    /// What a world has come to in which the system has nothing left to do.
    pub fn check_quiet(&self) -> Result<Quiet, String> {
        let (p, s) = (&self.primary, &self.secondary);
        let idle = p.waits_for(Wait::CheckpointDue)
            && s.waits_for(Wait::Message(Message::CheckpointRequest));
        if idle {
            let same = p.completed == s.completed && self.ram == Content::Own(p.completed);
            return if same && p.vm_runs && s.vm_runs {
                Ok(Quiet::InStep(p.completed))
            } else {
                Err("both idle, but not in step".into())
            };
        }
        for (waits, lost, done) in [
            (p.waits_for(Wait::Decision), p.is_lost(), p.carries_on()),
            (s.waits_for(Wait::Decision), s.is_lost(), s.carries_on()),
        ] {
            if !(waits || lost || done) {
                return Err("stuck".into());
            }
        }
        match (p.carries_on(), s.carries_on()) {
            (true, true) => Err("both sides carry on".into()),
            (true, false) => Ok(Quiet::Alone(Role::Primary)),
            (false, true) => Ok(Quiet::Alone(Role::Secondary)),
            (false, false) if p.is_lost() && s.is_lost() => Ok(Quiet::Lost),
            (false, false) => Ok(Quiet::Undecided),
        }
    }

    /// How many of the environment's grave interferences have come about, given how many could.
    pub fn faults(&self, budget: Budget) -> u8 {
        let spent = |all: fn(&Budget) -> u8| all(&budget) - all(&self.budget);
        spent(|budget| budget.deaths)
            + spent(|budget| budget.failures)
            + spent(|budget| budget.requests)
    }

    /// Has the operator failed a side over?
    pub fn is_decided(&self) -> bool {
        self.primary.request != Request::None || self.secondary.request != Request::None
    }

    pub fn transitions(&self) -> Vec<Transition> {
        let mut out = Vec::new();
        for role in [Role::Primary, Role::Secondary] {
            self.of_side(role, &mut out);
            self.of_environment(role, &mut out);
        }
        self.of_guest(&mut out);
        if self.budget.may(|budget| budget.cuts) && self.link_up {
            let mut next = self.clone();
            next.budget.spend(|budget| &mut budget.cuts);
            next.link_up = false;
            out.push(Transition {
                by: By::Environment,
                label: Label(None, What::Happens("link cut")),
                next: Ok(next),
            });
        }
        out
    }

    /// What the primary's guest writes again, and what of it is sent ahead and lands.
    fn of_guest(&self, out: &mut Vec<Transition>) {
        let mut add = |by, role, what, next| {
            out.push(Transition {
                by,
                label: Label(Some(role), What::Happens(what)),
                next: Ok(next),
            });
        };
        let is_open = match (self.ahead, self.primary.machine.action()) {
            (Ahead::Never, _) => false,
            (Ahead::Always, _) => true,
            (_, Action::Perform(step)) => step.is_gap(),
            _ => false,
        };
        for half in [0, 1] {
            let runs = self.primary.alive && self.primary.vm_runs;
            if runs && is_open && self.dirty[half] && self.budget.ahead > 0 {
                let mut next = self.clone();
                next.budget.ahead -= 1;
                next.dirty[half] = false;
                if next.link_up && !next.is_cut_off(Role::Primary) {
                    next.beside[half].push(next.guest[half]);
                }
                let what = "sends half of ram ahead";
                add(By::Environment, Role::Primary, what, next);
            }
            // Before that nobody can tell the difference.
            if runs && !self.dirty[half] && self.budget.writes > 0 {
                let mut next = self.clone();
                next.budget.writes -= 1;
                next.dirty[half] = true;
                next.guest[half] = Written {
                    epoch: self.captured + 1,
                    again: self.guest[half].again + 1,
                };
                add(By::Environment, Role::Primary, "writes again", next);
            }
            if self.secondary.alive && self.secondary.connected && !self.beside[half].is_empty() {
                let mut next = self.clone();
                next.cache[half] = next.beside[half].remove(0);
                let what = "receives half of ram ahead";
                add(By::System, Role::Secondary, what, next);
            }
        }
    }

    /// Kills, quits and operators.
    fn of_environment(&self, role: Role, out: &mut Vec<Transition>) {
        let mut add = |what, next: Result<Self, String>| {
            out.push(Transition {
                by: By::Environment,
                label: Label(Some(role), What::Happens(what)),
                next,
            });
        };
        if self.is_alive(role) && self.budget.may(|budget| budget.deaths) {
            let mut killed = self.clone();
            killed.budget.spend(|budget| &mut budget.deaths);
            killed.kill(role);
            add("killed", Ok(killed));
            if self.request_of(role) != Request::Stored && !self.is_finished(role) {
                let mut quits = self.clone();
                quits.budget.spend(|budget| &mut budget.deaths);
                let handled = quits.hand(role, Event::Quit);
                add("quits", handled.map(|_| quits));
            }
        }
        if self.is_alive(role)
            && self.budget.requests > 0
            && !self.is_finished(role)
            && self.request_of(role) == Request::None
        {
            let mut asked = self.clone();
            asked.budget.requests -= 1;
            asked.kill(other(role));
            asked.store_request(role);
            add("the other is killed, failover requested", Ok(asked));
        }
    }

    /// What a live side can do next.
    fn of_side(&self, role: Role, out: &mut Vec<Transition>) {
        if !self.is_alive(role) || self.is_finished(role) {
            return;
        }
        if self.request_of(role) == Request::Stored {
            let mut next = self.clone();
            next.take_request(role);
            let handled = next.hand(role, Event::FailoverRequested);
            out.push(Transition {
                by: By::System,
                label: Label(Some(role), What::Happens("takes the request")),
                next: handled.map(|_| next),
            });
            return;
        }
        let action = self.action_of(role);
        let mut add = |by, way, event: Event, pay: fn(&mut Budget)| {
            let mut next = self.clone();
            pay(&mut next.budget);
            let result = next
                .take_effect(role, action, way)
                .and_then(|()| next.hand(role, event));
            out.push(Transition {
                by,
                label: Label(Some(role), What::Ends(action, way, event)),
                next: result.map(|_| next),
            });
        };
        let free: fn(&mut Budget) = |_| {};
        let step = match action {
            Action::EmitExit(_) => return add(By::System, Way::Whole, Event::Done, free),
            Action::Finish(_) => return,
            Action::Perform(step) => step,
        };
        if step.is_on_the_wire() && self.is_cut_off(role) && step != Step::Await(Wait::Decision) {
            let lost = Event::PeerLost(PeerLoss::Closed);
            add(By::System, Way::Not, lost, free);
            add(By::System, Way::Part, lost, free);
        }
        let timed = step.is_on_the_wire()
            && !matches!(step, Step::Await(Wait::CheckpointDue | Wait::Decision));
        if timed && self.budget.may(|budget| budget.deadlines) {
            let pay: fn(&mut Budget) = |budget| budget.spend(|budget| &mut budget.deadlines);
            add(By::Environment, Way::Not, Event::DeadlineExpired, pay);
            add(By::Environment, Way::Part, Event::DeadlineExpired, pay);
        }
        if self.budget.may(|budget| budget.failures) && step.may_fail() && !action.is_wait() {
            let pay: fn(&mut Budget) = |budget| budget.spend(|budget| &mut budget.failures);
            add(By::Environment, Way::Not, Event::Failed, pay);
            add(By::Environment, Way::Part, Event::Failed, pay);
        }
        let inbox = match role {
            Role::Primary => &self.to_primary,
            Role::Secondary => &self.to_secondary,
        };
        let readable = inbox.first().filter(|_| self.is_connected(role));
        match (step, readable) {
            (Step::Await(Wait::Decision), _) => {}
            (Step::Await(wait), Some(Item::Message(message)))
                if wait == Wait::Message(*message) =>
            {
                add(By::System, Way::Whole, Event::Message(*message), free);
            }
            (Step::Await(Wait::CheckpointDue), None) if self.budget.checkpoints > 0 => {
                let pay: fn(&mut Budget) = |budget| budget.checkpoints -= 1;
                add(By::Environment, Way::Whole, Event::CheckpointDue, pay);
            }
            // In order with what was sent ahead, which is not looked at here.
            (Step::ReceiveRam, Some(&Item::HalfOfRam(half, _)))
                if self.ahead != Ahead::InGapUnordered && !self.beside[half].is_empty() => {}
            (Step::ReceiveRam, Some(Item::EndOfRam)) if self.beside != [[], []] => {}
            (Step::ReceiveRam, Some(&Item::HalfOfRam(half, written))) => {
                let mut next = self.clone();
                next.cache[half] = written;
                next.to_secondary.remove(0);
                out.push(Transition {
                    by: By::System,
                    label: Label(Some(role), What::Happens("receives half of ram")),
                    next: Ok(next),
                });
            }
            (Step::ReceiveRam, Some(Item::EndOfRam))
            | (Step::ReceiveDevices, Some(Item::Devices(_))) => {
                add(By::System, Way::Whole, Event::Done, free);
            }
            (Step::Await(_) | Step::ReceiveRam | Step::ReceiveDevices, None) => {}
            (Step::Await(_) | Step::ReceiveRam | Step::ReceiveDevices, Some(item)) => {
                out.push(Transition {
                    by: By::System,
                    label: Label(Some(role), What::Happens("reads")),
                    next: Err(format!("{item:?} while {step}")),
                });
            }
            // What is sent into a broken link may vanish without an error.
            _ if !step.is_on_the_wire() || self.is_connected(role) => {
                add(By::System, Way::Whole, Event::Done, free);
            }
            _ => {}
        }
    }

    /// Carries an action out, as far as `way` says.
    fn take_effect(&mut self, role: Role, action: Action, way: Way) -> Result<(), String> {
        let step = match action {
            Action::EmitExit(exit) => {
                // Only a commit that broke off outweighs a request.
                let broke = matches!(
                    exit.cause,
                    Cause::StepFailed(
                        Step::Reset
                            | Step::Flush
                            | Step::InstallDevices
                            | Step::CheckpointReplication
                            | Step::DiscardOutput
                    )
                ) && role == Role::Secondary;
                let told = self.request_of(role) == Request::Taken;
                if told && exit.reason() != ExitReason::Request && !broke {
                    return Err(format!("a request was made, but {exit}"));
                }
                match role {
                    Role::Primary => self.primary.exits += 1,
                    Role::Secondary => self.secondary.exits += 1,
                }
                return Ok(());
            }
            Action::Perform(step) => step,
            Action::Finish(_) => return Ok(()),
        };
        if way == Way::Not {
            return Ok(());
        }
        match role {
            Role::Primary => self.effect_on_primary(step, way),
            Role::Secondary => self.effect_on_secondary(step, way),
        }
    }

    fn effect_on_primary(&mut self, step: Step, way: Way) -> Result<(), String> {
        let whole = way == Way::Whole;
        match step {
            Step::Await(Wait::Message(_)) if whole => {
                self.to_primary.remove(0);
            }
            Step::StopVm if whole => self.primary.vm_runs = false,
            Step::ResumeVm if whole => {
                self.primary.vm_runs = true;
                self.said = self.captured + 1;
                self.guest = [Written {
                    epoch: self.captured + 1,
                    again: 0,
                }; 2];
                self.dirty = [true; 2];
            }
            Step::CutOutput if self.primary.vm_runs => {
                return Err(format!("{step} with the vm running"));
            }
            Step::CutOutput if whole && self.marks => self.cut = self.said,
            Step::OpenOutput if whole => self.primary.output_open = true,
            Step::Disconnect => {
                self.primary.connected = false;
                self.to_primary.clear();
            }
            Step::ReportCheckpoint if whole => self.primary.completed = self.captured,
            Step::SaveDevices | Step::KeepRam if self.primary.vm_runs => {
                return Err(format!("{step} with the vm running"));
            }
            Step::SendRam if self.primary.vm_runs && self.kept.is_none() => {
                return Err(format!("{step} of a running vm that was not kept"));
            }
            Step::KeepRam if whole => self.kept = Some(self.take_dirty()),
            Step::SaveDevices if whole => {
                self.captured += 1;
                self.saved = self.captured;
                self.taken = self.guest;
            }
            Step::ReleaseOutput if self.marks => self.released = self.cut,
            Step::ReleaseOutput => self.released = self.said,
            Step::Send(message) => self.send(Role::Primary, &[Item::Message(message)]),
            Step::SendRam => {
                let dirty = self.kept.take().unwrap_or_else(|| self.take_dirty());
                let mut items: Vec<Item> = (0..)
                    .zip(dirty)
                    .filter_map(|(half, dirty)| Some(Item::HalfOfRam(half, dirty?)))
                    .collect();
                items.push(Item::EndOfRam);
                self.send(
                    Role::Primary,
                    &items[..if whole {
                        items.len()
                    } else {
                        items.len().min(2) - 1
                    }],
                );
            }
            Step::SendDevices => {
                let items = [
                    Item::Message(Message::VmstateSize),
                    Item::Devices(self.saved),
                ];
                self.send(Role::Primary, &items[..if whole { 2 } else { 1 }]);
            }
            _ => {}
        }
        Ok(())
    }

    /// The content of what is dirty, which is clean then.
    fn take_dirty(&mut self) -> [Option<Written>; 2] {
        let guest = self.guest;
        let dirty = std::mem::take(&mut self.dirty);
        [0, 1].map(|half| dirty[half].then_some(guest[half]))
    }

    fn effect_on_secondary(&mut self, step: Step, way: Way) -> Result<(), String> {
        let whole = way == Way::Whole;
        let replaces = matches!(step, Step::Reset | Step::Flush | Step::InstallDevices);
        if replaces && self.secondary.vm_runs {
            return Err(format!("{step} with the vm running"));
        }
        match step {
            Step::Await(Wait::Message(_)) if whole => {
                self.to_secondary.remove(0);
            }
            Step::ReceiveRam if whole => {
                self.to_secondary.remove(0);
            }
            Step::ReceiveDevices if whole => {
                if let Item::Devices(version) = self.to_secondary.remove(0) {
                    self.buffer = version;
                }
            }
            Step::StopVm if whole => self.secondary.vm_runs = false,
            Step::ResumeVm if whole => {
                match (self.ram, self.devices) {
                    (Content::Checkpoint(ram), Content::Checkpoint(devices))
                    | (Content::Own(ram), Content::Own(devices))
                        if ram == devices =>
                    {
                        self.ram = Content::Own(ram);
                        self.devices = Content::Own(ram);
                    }
                    mixed => return Err(format!("the secondary runs {mixed:?}")),
                }
                self.secondary.vm_runs = true;
            }
            Step::OpenOutput if whole => self.secondary.output_open = true,
            Step::Disconnect => {
                self.secondary.connected = false;
                self.to_secondary.clear();
                self.beside = Default::default();
            }
            Step::ReportCheckpoint if whole => {
                if let Content::Own(version) = self.ram {
                    self.secondary.completed = version;
                }
            }
            Step::StageDevices if whole => self.staged = self.buffer,
            Step::Reset => self.devices = Content::Spoilt,
            Step::Flush => {
                self.ram = if whole && self.cache == self.taken {
                    Content::Checkpoint(self.staged)
                } else {
                    Content::Spoilt
                };
            }
            Step::InstallDevices => {
                self.devices = if whole && self.devices == Content::Spoilt {
                    Content::Checkpoint(self.staged)
                } else {
                    Content::Spoilt
                };
            }
            Step::Send(message) => self.send(Role::Secondary, &[Item::Message(message)]),
            _ => {}
        }
        Ok(())
    }

    fn send(&mut self, from: Role, items: &[Item]) {
        if !self.link_up || self.is_cut_off(from) {
            return;
        }
        match from {
            Role::Primary => self.to_secondary.extend_from_slice(items),
            Role::Secondary => self.to_primary.extend_from_slice(items),
        }
    }

    /// Hands an event to a machine; what it refuses is the driver's mistake and fails the test.
    fn hand(&mut self, role: Role, event: Event) -> Result<Option<Action>, String> {
        match role {
            Role::Primary => self.primary.machine.handle(event),
            Role::Secondary => self.secondary.machine.handle(event),
        }
        .map_err(|error| error.to_string())
    }

    fn action_of(&self, role: Role) -> Action {
        match role {
            Role::Primary => self.primary.machine.action(),
            Role::Secondary => self.secondary.machine.action(),
        }
    }

    fn is_finished(&self, role: Role) -> bool {
        matches!(self.action_of(role), Action::Finish(_))
    }

    fn is_alive(&self, role: Role) -> bool {
        match role {
            Role::Primary => self.primary.alive,
            Role::Secondary => self.secondary.alive,
        }
    }

    fn is_connected(&self, role: Role) -> bool {
        match role {
            Role::Primary => self.primary.connected,
            Role::Secondary => self.secondary.connected,
        }
    }

    fn is_cut_off(&self, role: Role) -> bool {
        let peer_gone = match role {
            Role::Primary => !self.secondary.reachable(),
            Role::Secondary => !self.primary.reachable(),
        };
        !self.is_connected(role) || peer_gone || !self.link_up
    }

    fn request_of(&self, role: Role) -> Request {
        match role {
            Role::Primary => self.primary.request,
            Role::Secondary => self.secondary.request,
        }
    }

    fn take_request(&mut self, role: Role) {
        let taken = match self.action_of(role) {
            Action::EmitExit(_) => Request::Late,
            _ => Request::Taken,
        };
        match role {
            Role::Primary => self.primary.request = taken,
            Role::Secondary => self.secondary.request = taken,
        }
    }

    /// The request is stored, and its hook shuts the connections.
    fn store_request(&mut self, role: Role) {
        match role {
            Role::Primary => {
                self.primary.request = Request::Stored;
                self.primary.connected = false;
            }
            Role::Secondary => {
                self.secondary.request = Request::Stored;
                self.secondary.connected = false;
            }
        }
    }

    /// The process is gone, and with it all that would only make equal worlds look different.
    fn kill(&mut self, role: Role) {
        self.budget.checkpoints = 0;
        match role {
            Role::Primary => {
                self.primary = Side::dead();
                self.to_primary.clear();
                (self.said, self.cut) = (0, 0);
                (self.guest, self.dirty, self.kept) = Default::default();
                (self.budget.ahead, self.budget.writes) = (0, 0);
            }
            Role::Secondary => {
                self.secondary = Side::dead();
                self.to_secondary.clear();
                (self.ram, self.devices) = (Content::Spoilt, Content::Spoilt);
                (self.cache, self.buffer, self.staged) = Default::default();
                self.beside = Default::default();
                self.budget.ahead = 0;
            }
        }
    }
}

fn other(role: Role) -> Role {
    match role {
        Role::Primary => Role::Secondary,
        Role::Secondary => Role::Primary,
    }
}
