//! Both sides of a hand-over in every order: messages that are lost or late, either process killed.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::{Answer, Offer, Verdict, verdict};

/// What is on its way to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Down {
    /// All but the end of device state, and the question who confirms.
    Body,
    /// The end of device state and its description.
    Last,
    /// The end of device state, with its description cut off.
    LastCut,
    Fin,
}

/// What is on its way to the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Up {
    ConfirmsFirst,
    Shut(bool),
    Fin,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    Waiting,
    /// It has the body.
    Begun,
    /// It has everything; `true` if the description was cut off.
    Whole(bool),
    /// Ours, between its look at the source and its confirmation.
    Looked,
    Confirmed,
    /// It has given up.
    Refused,
    Runs(bool),
    Over,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// The target is ours: it confirms before it runs the guest.
    ours: bool,
    offer: Option<Offer>,
    confirms_first: bool,
    answer: Answer,
    decided: bool,
    source_lives: bool,
    down: Vec<Down>,
    up: Vec<Up>,
    target: Target,
    ran: bool,
    /// Nothing crosses any more.
    cut: bool,
}

impl World {
    fn new(ours: bool) -> Self {
        Self {
            ours,
            offer: None,
            confirms_first: false,
            answer: Answer::None,
            decided: false,
            source_lives: true,
            down: Vec::new(),
            up: Vec::new(),
            target: Target::Waiting,
            ran: false,
            cut: false,
        }
    }

    fn with(&self, f: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        f(&mut next);
        next
    }

    fn verdict(&self) -> Option<Verdict> {
        self.decided.then(|| {
            let offer = self.offer.unwrap_or(Offer::Withheld);
            verdict(offer, self.answer, self.confirms_first)
        })
    }

    /// The guest runs at the source.
    fn runs_here(&self) -> bool {
        self.source_lives && self.verdict() == Some(Verdict::Failed)
    }

    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        self.source(&mut next);
        self.target(&mut next);
        if self.source_lives {
            // A kill: what was sent before arrives in order, or not at all.
            next.push(self.with(|w| {
                w.source_lives = false;
                w.decided = false;
                w.send_down(Down::Fin);
            }));
        }
        if self.target != Target::Over {
            next.push(self.with(|w| {
                w.target = Target::Over;
                w.send_up(Up::Fin);
            }));
        }
        if !self.cut {
            for down in 0..=self.down.len() {
                for up in 0..=self.up.len() {
                    next.push(self.with(|w| {
                        w.cut = true;
                        w.down.truncate(down);
                        w.up.truncate(up);
                        // A write that the kernel took may arrive in part.
                        if let Some(last @ Down::Last) = w.down.last_mut() {
                            *last = Down::LastCut;
                        }
                    }));
                }
            }
        }
        next
    }

    fn send_down(&mut self, message: Down) {
        if !self.cut {
            self.down.push(message);
        }
    }

    fn send_up(&mut self, message: Up) {
        if !self.cut {
            self.up.push(message);
        }
    }

    fn source(&self, next: &mut Vec<Self>) {
        if !self.source_lives || self.decided {
            return;
        }
        match self.offer {
            None => {
                next.push(self.with(|w| {
                    w.offer = Some(Offer::Withheld);
                    w.send_down(Down::Body);
                }));
            }
            Some(Offer::Withheld) => {
                // It gives up: an error, a cancellation.
                next.push(self.with(Self::decide));
                for offer in [Offer::Made, Offer::Attempted] {
                    let arrive = [None, Some(Down::Last), Some(Down::LastCut)];
                    for message in arrive {
                        // A write that succeeded was taken whole.
                        if offer == Offer::Made && message != Some(Down::Last) {
                            continue;
                        }
                        next.push(self.with(|w| {
                            w.offer = Some(offer);
                            if let Some(message) = message {
                                w.send_down(message);
                            }
                        }));
                    }
                }
            }
            Some(_) => next.push(self.with(Self::decide)),
        }
        if let Some(&message) = self.up.first() {
            next.push(self.with(|w| {
                w.up.remove(0);
                match message {
                    Up::ConfirmsFirst => w.confirms_first = true,
                    Up::Shut(true) => w.hear(Answer::Confirmed),
                    Up::Shut(false) => w.hear(Answer::Refused),
                    Up::Fin => w.hear(Answer::Closed),
                }
            }));
        }
    }

    fn hear(&mut self, answer: Answer) {
        self.answer = answer;
        self.decide();
    }

    /// The source closes the connection unless it goes on with the target.
    fn decide(&mut self) {
        self.decided = true;
        self.send_down(Down::Fin);
    }

    fn target(&self, next: &mut Vec<Self>) {
        let readable = matches!(self.target, Target::Waiting | Target::Begun);
        if readable && let Some(&message) = self.down.first() {
            next.push(self.with(|w| {
                w.down.remove(0);
                match (w.target, message) {
                    (Target::Waiting, Down::Body) => {
                        w.target = Target::Begun;
                        if w.ours {
                            w.send_up(Up::ConfirmsFirst);
                        }
                    }
                    (Target::Begun, Down::Last) => w.target = Target::Whole(false),
                    (Target::Begun, Down::LastCut) => w.target = Target::Whole(true),
                    _ => w.target = Target::Refused,
                }
            }));
        }
        match self.target {
            Target::Whole(cut) => {
                // Its devices do not load.
                next.push(self.with(|w| w.target = Target::Refused));
                match (self.ours, cut) {
                    (true, true) => {}
                    // The source's end is behind all that it has sent.
                    (true, false) if self.down.is_empty() => {
                        next.push(self.with(|w| w.target = Target::Looked));
                    }
                    (true, false) => next.push(self.with(|w| w.target = Target::Refused)),
                    (false, cut) => next.push(self.with(|w| {
                        w.target = Target::Runs(cut);
                        w.ran = true;
                    })),
                }
            }
            Target::Looked => next.push(self.with(|w| {
                w.target = Target::Confirmed;
                w.send_up(Up::Shut(true));
            })),
            Target::Confirmed => next.push(self.with(|w| {
                w.target = Target::Runs(false);
                w.ran = true;
            })),
            Target::Refused => next.push(self.with(|w| {
                w.target = Target::Over;
                w.send_up(Up::Shut(false));
                w.send_up(Up::Fin);
            })),
            // QEMU's confirms while its guest runs already.
            Target::Runs(cut) if !self.ours && !self.up.contains(&Up::Shut(!cut)) => {
                next.push(self.with(|w| w.send_up(Up::Shut(!cut))));
            }
            _ => {}
        }
    }
}

fn explore(ours: bool) -> HashSet<World> {
    let mut seen = HashSet::new();
    let mut open = vec![World::new(ours)];
    while let Some(world) = open.pop() {
        if seen.insert(world.clone()) {
            // More answers of a QEMU that runs tell nothing new.
            open.extend(world.next().into_iter().filter(|w| w.up.len() <= 3));
        }
    }
    seen
}

#[test]
fn there_are_never_two_guests_whatever_is_lost_or_killed() {
    for ours in [true, false] {
        let worlds = explore(ours);
        assert!(worlds.len() > 500, "{}", worlds.len());
        for world in &worlds {
            assert!(
                !(world.runs_here() && matches!(world.target, Target::Runs(_))),
                "{world:?}"
            );
            // One that ran and was killed has put something out all the same.
            assert!(!(world.runs_here() && world.ran), "{world:?}");
        }
        for verdict in [Verdict::Completed, Verdict::Failed, Verdict::Unknown] {
            assert!(worlds.iter().any(|w| w.verdict() == Some(verdict)));
        }
    }
}

#[test]
fn an_outcome_is_unknown_only_where_the_source_cannot_know_better() {
    let mut seen: HashMap<_, (Verdict, BTreeSet<bool>)> = HashMap::new();
    for ours in [true, false] {
        for world in explore(ours) {
            if let Some(verdict) = world.verdict() {
                // What the source has seen, and what may have become of the guest.
                let observed = (world.offer, world.answer, world.confirms_first);
                let entry = seen.entry(observed).or_insert((verdict, BTreeSet::new()));
                entry.1.insert(world.ran);
            }
        }
    }
    for (observed, (verdict, ran)) in &seen {
        match verdict {
            Verdict::Unknown => assert_eq!(ran.len(), 2, "{observed:?}: known after all"),
            Verdict::Failed => assert!(!ran.contains(&true), "{observed:?}"),
            Verdict::Completed => assert!(ran.contains(&true), "{observed:?}"),
        }
    }
    assert!(seen.values().any(|(v, _)| *v == Verdict::Unknown));
}

#[test]
fn without_a_return_path_what_was_sent_whole_is_handed_over() {
    let answer = Answer::Impossible;
    assert_eq!(verdict(Offer::Made, answer, false), Verdict::Completed);
    assert_eq!(verdict(Offer::Attempted, answer, false), Verdict::Unknown);
    assert_eq!(verdict(Offer::Withheld, answer, false), Verdict::Failed);
}
