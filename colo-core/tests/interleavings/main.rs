//! Both machines together, over every order of events.
//!
//! From the state in which precopy ends, every transition of every reachable state of the
//! [`World`] is tried, breadth first: messages delivered or lost, steps done, done in part, failed
//! or late, the link cut, a side killed or told to quit, and an operator who kills one side and
//! fails the other over. What must always hold is in [`World::check`], what must be true when
//! nothing more happens in [`World::check_quiet`].

mod world;

use std::collections::HashMap;
use std::fmt::Write;
use std::rc::Rc;

use colo_core::{OnPeerLoss, Resume, Role};

use crate::world::{Ahead, Budget, By, Label, Quiet, Setting, Transition, World};

/// What an exploration has seen.
#[derive(Debug, Default)]
struct Explored {
    states: usize,
    deepest_in_step: u8,
    alone: HashMap<Role, usize>,
    undecided: usize,
    lost: usize,
}

struct Visit {
    world: Rc<World>,
    /// How it was first reached.
    from: Option<(usize, Label)>,
}

/// Explores everything, or returns the shortest way to a violation.
fn explore(setting: Setting, budget: Budget) -> Result<Explored, String> {
    let start = Rc::new(World::new(setting, budget));
    let mut known = HashMap::from([(start.clone(), 0)]);
    let mut visits = vec![Visit {
        world: start,
        from: None,
    }];
    // The system's own transitions, to see that they always come to an end.
    let mut system: Vec<(usize, usize)> = Vec::new();
    let mut explored = Explored::default();
    let mut at = 0;
    while at < visits.len() {
        let world = visits[at].world.clone();
        world.check().map_err(|what| trace(&visits, at, &what))?;
        let mut is_quiet = true;
        for Transition { by, label, next } in world.transitions() {
            let next =
                Rc::new(next.map_err(|what| trace(&visits, at, &format!("{label}: {what}")))?);
            let index = *known.entry(next.clone()).or_insert(visits.len());
            if index == visits.len() {
                visits.push(Visit {
                    world: next,
                    from: Some((at, label)),
                });
            }
            if by == By::System {
                is_quiet = false;
                system.push((at, index));
            }
        }
        if is_quiet {
            match world
                .check_quiet()
                .map_err(|what| trace(&visits, at, &what))?
            {
                Quiet::InStep(checkpoints) => {
                    explored.deepest_in_step = explored.deepest_in_step.max(checkpoints);
                }
                Quiet::Alone(role) => *explored.alone.entry(role).or_default() += 1,
                Quiet::Undecided if world.is_decided() => {
                    return Err(trace(&visits, at, "a failover request changed nothing"));
                }
                Quiet::Undecided => explored.undecided += 1,
                Quiet::Lost if world.faults(budget) < 2 => {
                    return Err(trace(&visits, at, "both sides are lost by one fault"));
                }
                Quiet::Lost => explored.lost += 1,
            }
        }
        at += 1;
    }
    if let Some(state) = on_a_cycle(visits.len(), &system) {
        return Err(trace(&visits, state, "may go round for ever"));
    }
    explored.states = visits.len();
    Ok(explored)
}

/// A state that is not left behind by sorting topologically, if there is one.
fn on_a_cycle(states: usize, edges: &[(usize, usize)]) -> Option<usize> {
    let mut incoming = vec![0_usize; states];
    let mut outgoing = vec![Vec::new(); states];
    for &(from, to) in edges {
        incoming[to] += 1;
        outgoing[from].push(to);
    }
    let mut free: Vec<usize> = (0..states).filter(|&state| incoming[state] == 0).collect();
    while let Some(state) = free.pop() {
        for &next in &outgoing[state] {
            incoming[next] -= 1;
            if incoming[next] == 0 {
                free.push(next);
            }
        }
    }
    incoming.iter().position(|&left| left > 0)
}

/// The way to a state, for whoever has to mend it.
fn trace(visits: &[Visit], mut at: usize, what: &str) -> String {
    let mut labels = vec![];
    let world = &visits[at].world;
    while let Some((from, label)) = &visits[at].from {
        labels.push(label);
        at = *from;
    }
    let mut text = format!("{what}\n");
    for label in labels.iter().rev() {
        let _ = writeln!(text, "  {label}");
    }
    let _ = writeln!(text, "{world:#?}");
    text
}

const RESUMES: [Resume; 3] = [Resume::OnLoaded, Resume::OnReceived, Resume::OnLocalCopy];

const BUDGET: Budget = Budget {
    checkpoints: 3,
    deaths: 1,
    failures: 1,
    deadlines: 1,
    cuts: 1,
    requests: 1,
    ahead: 0,
    writes: 0,
    mishaps: 2,
};

/// With pages that are sent between checkpoints, of which the guest writes some again.
const AHEAD: Budget = Budget {
    checkpoints: 2,
    ahead: 2,
    writes: 1,
    mishaps: 1,
    ..BUDGET
};

fn setting(primary: OnPeerLoss, secondary: OnPeerLoss, resume: Resume) -> Setting {
    Setting {
        primary,
        secondary,
        resume,
        marks: true,
        ahead: Ahead::Never,
    }
}

fn holds_for(primary: OnPeerLoss, secondary: OnPeerLoss, at_least: usize) {
    for resume in RESUMES {
        let explored = explore(setting(primary, secondary, resume), BUDGET)
            .unwrap_or_else(|trace| panic!("{trace}"));
        println!("{primary:?}/{secondary:?}, {resume:?}: {explored:?}");
        // The exploration is worth nothing if it has not been everywhere.
        assert!(explored.states >= at_least, "{explored:?}");
        assert_eq!(explored.deepest_in_step, BUDGET.checkpoints);
        assert!(explored.alone[&Role::Primary] > 0);
        assert!(explored.alone[&Role::Secondary] > 0);
        assert!(explored.undecided > 0);
        assert!(explored.lost > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_an_operator_who_decides_one_vm_goes_on_or_both_are_in_step() {
        holds_for(OnPeerLoss::Wait, OnPeerLoss::Wait, 100_000);
    }

    #[test]
    fn a_primary_that_takes_over_by_itself_is_never_one_of_two() {
        holds_for(OnPeerLoss::TakeOver, OnPeerLoss::Wait, 100_000);
    }

    #[test]
    fn a_secondary_that_takes_over_by_itself_is_never_one_of_two() {
        holds_for(OnPeerLoss::Wait, OnPeerLoss::TakeOver, 100_000);
    }

    /// Why output is marked, and proof that the exploration finds it.
    #[test]
    fn a_gate_without_marks_lets_out_too_much_when_the_vm_resumes_early() {
        for resume in RESUMES {
            let holds = resume != Resume::OnLocalCopy;
            let unmarked = Setting {
                marks: false,
                ..setting(OnPeerLoss::Wait, OnPeerLoss::Wait, resume)
            };
            match explore(unmarked, BUDGET) {
                Ok(_) => assert!(holds, "{resume:?}"),
                Err(trace) => {
                    assert!(!holds, "{trace}");
                    assert!(trace.starts_with("output of checkpoint"), "{trace}");
                }
            }
        }
    }

    #[test]
    fn pages_that_are_sent_in_the_gap_become_part_of_a_whole_checkpoint_or_of_nothing() {
        for (resume, secondary) in [
            (Resume::OnLoaded, OnPeerLoss::Wait),
            (Resume::OnReceived, OnPeerLoss::Wait),
            (Resume::OnLocalCopy, OnPeerLoss::TakeOver),
        ] {
            let ahead = Setting {
                ahead: Ahead::InGap,
                ..setting(OnPeerLoss::Wait, secondary, resume)
            };
            let explored = explore(ahead, AHEAD).unwrap_or_else(|trace| panic!("{trace}"));
            println!("{secondary:?}, {resume:?}, ahead: {explored:?}");
            assert!(explored.states >= 100_000, "{explored:?}");
            assert_eq!(explored.deepest_in_step, AHEAD.checkpoints);
            assert!(explored.alone[&Role::Secondary] > 0);
        }
    }

    /// Why a page keeps its channel, and why nothing is sent but in the gap; and proof that the
    /// exploration finds it.
    #[test]
    fn pages_sent_ahead_out_of_order_or_out_of_the_gap_spoil_a_checkpoint() {
        let quiet = Budget {
            mishaps: 0,
            requests: 0,
            ..AHEAD
        };
        for ahead in [Ahead::InGapUnordered, Ahead::Always] {
            let setting = Setting {
                ahead,
                ..setting(OnPeerLoss::Wait, OnPeerLoss::Wait, Resume::OnLocalCopy)
            };
            let spoilt = explore(setting, quiet).unwrap_err();
            assert!(spoilt.contains("the secondary runs (Spoilt"), "{spoilt}");
        }
    }

    /// Why at most one side may be set to take over, and proof that the exploration finds it.
    #[test]
    fn two_sides_that_take_over_by_themselves_split_the_brain_when_the_link_breaks() {
        for resume in RESUMES {
            let both = setting(OnPeerLoss::TakeOver, OnPeerLoss::TakeOver, resume);
            let cut = Budget {
                deaths: 0,
                failures: 0,
                deadlines: 0,
                requests: 0,
                ..BUDGET
            };
            let split = explore(both, cut).unwrap_err();
            assert!(split.starts_with("both sides own the output"), "{split}");
            // A death is the one loss that both may answer by taking over: one of them cannot.
            let death = Budget {
                deaths: 1,
                cuts: 0,
                ..cut
            };
            let explored = explore(both, death).unwrap();
            assert_eq!((explored.undecided, explored.lost), (0, 0));
        }
    }
}
