//! Both sides' heartbeats and decisions, and ownership in a register, over every order of events.
//!
//! From a pair that beats, every course of a limited number of mishaps is followed, tick by tick:
//! beats that are lost or late in either direction, a register that one side or both do not reach,
//! whose answers are lost and to which requests get late, processes that are killed, quit and are
//! started again, and operators who want a side to go on, by the arbiter's word or without it. What
//! must hold in each state is in [`World::step`], what must be true when the world was left alone for
//! long enough in [`follow`].

mod world;

use std::collections::HashMap;
use std::fmt::Write;

use colo_heartbeat::Role;

use crate::world::{Budget, End, Label, World};

/// Long enough for whatever was begun to come to its end: losing a peer, a claim against an owner that
/// lives, the owner's own.
const REST: u16 = 60;

/// What an exploration has seen.
#[derive(Debug, Default)]
struct Explored {
    states: usize,
    ends: HashMap<(End, u8), usize>,
}

impl Explored {
    fn count(&self, wanted: End) -> usize {
        let ends = self.ends.iter().filter(|((end, _), _)| *end == wanted);
        ends.map(|(_, count)| count).sum()
    }
}

/// How each state of a tick was first reached: the state of the tick before, and what happened.
type Layer = Vec<(usize, Label)>;

/// Follows every course, or returns a shortest way to a violation. `dawdling` is how many ticks longer
/// a guest takes to stop than it may.
fn follow(budget: Budget, dawdling: u16) -> Result<Explored, String> {
    let start = World::new(budget, dawdling);
    let last = start.budget.until + REST;
    let mut explored = Explored::default();
    let mut layers: Vec<Layer> = Vec::new();
    let mut worlds = vec![start];
    while !worlds.is_empty() {
        let mut known: HashMap<World, ()> = HashMap::new();
        let mut layer = Layer::new();
        let mut next = Vec::new();
        for (from, world) in worlds.iter().enumerate() {
            for label in world.labels() {
                let fails = |what: &str| trace(&layers, (from, label), what);
                let after = world.step(label).map_err(|what| fails(&what))?;
                if known.contains_key(&after) {
                    continue;
                }
                known.insert(after.clone(), ());
                explored.states += 1;
                if !after.is_settled() && after.now() < last {
                    layer.push((from, label));
                    next.push(after);
                    continue;
                }
                let end = after.end();
                if end == End::Asking && after.could_go_on() {
                    return Err(fails("a side that could go on does not"));
                }
                let spent = budget.mishaps - after.budget.mishaps;
                // By one mishap never, and never as long as both processes live.
                if end == End::Nobody && (spent < 2 || !after.has_died(budget)) {
                    return Err(fails("no guest runs any more"));
                }
                *explored.ends.entry((end, spent)).or_default() += 1;
            }
        }
        worlds = next;
        layers.push(layer);
    }
    Ok(explored)
}

/// What has led to a step, for whoever has to mend it.
fn trace(layers: &[Layer], (mut at, label): (usize, Label), what: &str) -> String {
    let mut labels = vec![label];
    for layer in layers.iter().rev() {
        let (from, label) = layer[at];
        labels.push(label);
        at = from;
    }
    let mut text = format!("{what}\n");
    for (tick, label) in labels.iter().rev().enumerate() {
        let _ = writeln!(text, "  {tick}: {label}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Budget = Budget {
        mishaps: 0,
        links: 0,
        outages: 0,
        deaths: 0,
        wishes: 0,
        losses: 0,
        until: 8,
    };

    fn holds(budget: Budget, at_least: usize) -> Explored {
        let explored = follow(budget, 0).unwrap_or_else(|trace| panic!("{trace}"));
        println!("{budget:?}: {explored:?}");
        // The exploration is worth nothing if it has not been everywhere.
        assert!(explored.states >= at_least, "{explored:?}");
        assert!(explored.count(End::Paired) > 0);
        for role in [Role::Primary, Role::Secondary] {
            assert!(explored.count(End::Alone(role)) > 0, "{role}");
        }
        explored
    }

    #[test]
    fn whatever_happens_between_the_two_one_guest_runs_on() {
        let explored = holds(
            Budget {
                mishaps: 3,
                links: 3,
                wishes: 1,
                until: 6,
                ..NONE
            },
            30_000,
        );
        assert_eq!(explored.count(End::Nobody) + explored.count(End::Asking), 0);
    }

    #[test]
    fn of_any_two_mishaps_none_makes_two_guests_and_neither_alone_makes_none() {
        let explored = holds(
            Budget {
                mishaps: 2,
                links: 2,
                outages: 2,
                deaths: 2,
                wishes: 2,
                losses: 1,
                ..NONE
            },
            40_000,
        );
        assert!(explored.count(End::Asking) > 0);
    }

    #[test]
    fn of_any_three_mishaps_none_makes_two_guests() {
        holds(
            Budget {
                mishaps: 3,
                links: 2,
                outages: 2,
                deaths: 1,
                wishes: 2,
                losses: 1,
                until: 4,
            },
            150_000,
        );
    }

    /// What is assumed, and proof that the exploration finds it.
    #[test]
    fn a_guest_that_takes_longer_to_stop_than_the_quarters_may_be_one_of_two() {
        let budget = Budget {
            mishaps: 2,
            links: 1,
            outages: 1,
            until: 14,
            ..NONE
        };
        assert!(follow(budget, 0).is_ok());
        let split = follow(budget, 1).unwrap_err();
        assert!(split.starts_with("two guests run"), "{split}");
    }
}
