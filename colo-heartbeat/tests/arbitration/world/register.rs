//! The register, and the requests of both sides on their way to it and back.

use colo_heartbeat::Role;
use colo_heartbeat::arbiter::{Answer, ArbiterError, Grant};
use colo_heartbeat::raw::{Colo, Entry, Next, Want};

use super::World;
use super::side::{Request, Step, Way};
use super::time::at;

/// For a lease that is given up, and the first hold of a process.
pub(super) const PATIENT: u16 = 100;

impl World {
    pub(super) fn replace(&mut self, version: u64, entry: Entry) -> bool {
        let fits = self.version == version;
        if fits {
            self.version += 1;
            self.entry = Some(entry);
        }
        fits
    }

    /// One request of a side to the register; true if another follows from it.
    pub(super) fn consult(&mut self, role: Role, deaf: bool) -> bool {
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
}

fn unreachable() -> Answer {
    Answer::Unreachable(ArbiterError::new("no answer"))
}
