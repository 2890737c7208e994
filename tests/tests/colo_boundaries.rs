//! Each side of a pair of `colo-vmm` is killed wherever something begins or ends on it: at every
//! change of status and step of precopy, and at every step and message of the first checkpoint and of
//! a later one. The moments are those that a pair notes which nobody kills. Each is tried in one of the
//! ways to connect a pair, another one by the seed of the run, and with `COLO_ALL=1` in all of them.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::harness::{self, Needs};
use tests::moments::noted;
use tests::vmm::{ColoVmm, Connection, Pair, Side, Vmm, check_count};
use tests::{PATIENCE, Result, moments, sample};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (index, way) in WAYS.iter().enumerate() {
        for victim in Side::BOTH {
            trials.push(Needs::NOTHING.kvm().test(
                &format!("{}_{victim}_may_die_at_any_moment", way.name),
                move || everywhere(index, victim),
            ));
        }
    }
    harness::run(trials)
}

/// How the pair is connected, and what both sides are told.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    connection: Connection,
    args: &'static [&'static str],
    /// The primary's output is held until the secondary has what it came from.
    commits_output: bool,
}

const WAYS: [Way; 4] = [PLAIN, MULTIFD, RECEIVED, EARLY];

const PLAIN: Way = Way {
    name: "plain",
    connection: Connection::PLAIN,
    args: &[],
    commits_output: false,
};

const MULTIFD: Way = Way {
    name: "multifd",
    connection: Connection::channels(2),
    ..PLAIN
};

/// The primary's guest runs on while the secondary loads a checkpoint.
const RECEIVED: Way = Way {
    name: "received",
    args: &["--output-commit", "--resume", "received"],
    commits_output: true,
    ..MULTIFD
};

/// Pages are sent between checkpoints, and the primary's guest runs on before one is complete.
const EARLY: Way = Way {
    name: "early",
    args: &[
        "--output-commit",
        "--resume",
        "copied",
        "--gap-bandwidth",
        "0",
    ],
    commits_output: true,
    ..MULTIFD
};

/// Between checkpoints, ms.
const DELAY: u32 = 20;
/// Checkpoints of which every moment is tried: the first, and one that the others are like.
const CHECKPOINTS: [u32; 2] = [1, 3];
/// Lines that show that the guest goes on.
const ENCORE: u64 = 3;
/// How long nothing has to happen at a side that may not have heard of the other at all.
const SETTLED: Duration = Duration::from_secs(2);
/// Pairs at a time.
const AT_ONCE: usize = 4;

fn guest() -> ColoVmm {
    ColoVmm::new("colo-vmm").memory(16).dirty_pages(64)
}

/// A pair that is on its way into COLO. `args` are the victim's.
fn start(way: Way, victim: Side, args: &[&str]) -> Result<Pair> {
    let (ours, theirs): (&[&str], &[&str]) = match victim {
        Side::Primary => (args, &[]),
        Side::Secondary => (&[], args),
    };
    let mut pair = Pair {
        primary: guest().args(way.args).args(ours).start()?,
        secondary: guest().incoming().args(way.args).args(theirs).start()?,
    };
    // What dies meanwhile answers nothing.
    let _ = pair
        .set_up(way.connection, DELAY)
        .and_then(|()| pair.primary.wait_lines(1))
        .and_then(|()| pair.migrate(way.connection));
    Ok(pair)
}

/// The moments of the victim's life, of precopy and of the checkpoints that are tried.
fn moments_of(way: Way, victim: Side) -> Result<BTreeSet<String>> {
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("boundaries");
    let path = log.to_str().ok_or("a path that is no text")?;
    let mut pair = start(way, victim, &["--boundaries", path])?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_checkpoints(5)?;
    }
    let moments = noted(&log, &CHECKPOINTS)?;
    // A checkpoint has more steps than that on either side, and is there twice.
    assert!(moments.len() > 40, "{moments:?}");
    Ok(moments)
}

/// The moments of the victim that are tried in each way.
fn dealt(victim: Side) -> Result<Vec<BTreeSet<String>>> {
    /// Those of the primary and of the secondary, once they are known.
    static DEALT: [Mutex<Option<Vec<BTreeSet<String>>>>; 2] = [Mutex::new(None), Mutex::new(None)];
    let [primary, secondary] = &DEALT;
    let known = match victim {
        Side::Primary => primary,
        Side::Secondary => secondary,
    };
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(dealt) = &*known {
        return Ok(dealt.clone());
    }
    let of_ways: Result<Vec<_>> = WAYS.iter().map(|&way| moments_of(way, victim)).collect();
    let dealt = sample::deal(victim.name(), &of_ways?)?;
    Ok(known.insert(dealt).clone())
}

/// Kills the victim at each moment that is tried in this way, some pairs at a time.
fn everywhere(way: usize, victim: Side) -> Result<()> {
    let moments: Vec<String> = dealt(victim)?.swap_remove(way).into_iter().collect();
    let way = WAYS[way];
    assert!(moments.len() > 10, "{moments:?}");
    let (survivors, failures) =
        moments::each(&moments, AT_ONCE, |moment| dies_at(way, victim, moment));
    let lost = survivors.iter().filter(|s| **s == Survivor::Nobody);
    let unprotected = lost.count();
    let (all, failed) = (moments.len(), failures.len());
    println!(
        "{victim} killed at {all} moments, {failed} failures, {unprotected} before the guest was protected"
    );
    // Before the secondary has all of the guest, its host takes it along.
    if victim == Side::Secondary {
        assert_eq!(unprotected, 0, "guests lost");
    } else if sample::is_everything() {
        assert!(
            unprotected > 0,
            "no moment was before the guest was protected"
        );
    }
    if failures.is_empty() {
        Ok(())
    } else {
        Err(format!("seed {}:\n{}", sample::seed()?, failures.join("\n")).into())
    }
}

/// What is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Survivor {
    /// The guest.
    Guest,
    /// No guest: its host died before there was a second copy of it.
    Nobody,
}

fn dies_at(way: Way, victim: Side, moment: &str) -> Result<Survivor> {
    let mut pair = start(way, victim, &["--die-at", moment])?;
    let (side, _) = victim.of(&mut pair);
    let deadline = Instant::now() + PATIENCE;
    while side.process.is_running()? {
        if Instant::now() > deadline {
            return Err("it did not die".into());
        }
        thread::sleep(Duration::from_millis(2));
    }
    let survivor = survive(victim.other().of(&mut pair).0)?;
    if survivor == Survivor::Nobody {
        assert_eq!(victim, Side::Primary);
        check_count(0, &pair.primary.output()?)?;
        let heard = pair.secondary.output()?;
        assert_eq!(heard, b"", "a guest that did not arrive was heard");
    } else if victim == Side::Primary && way.commits_output {
        // What was about to be let out is lost. Nothing is contradicted that was.
        let begin = pair.secondary_begins()?;
        let said = pair.primary.output()?.len() as u64;
        assert!(begin >= said, "byte {begin}, the primary had said {said}");
    } else {
        pair.check_history(victim.other())?;
    }
    Ok(survivor)
}

/// Does what an operator does, by what the survivor says of itself, until its guest runs or it is
/// clear that it has none.
fn survive(side: &mut Vmm) -> Result<Survivor> {
    let since = Instant::now();
    let status = side.poll("the end of the migration", |vmm| {
        let migration = vmm.migration()?;
        let status = migration["status"].as_str().unwrap_or("none").to_owned();
        let is_over = match status.as_str() {
            "failed" | "failing" | "completed" => true,
            // Nothing had begun, or a target goes on waiting for a source.
            "none" | "setup" => since.elapsed() > SETTLED,
            _ => false,
        };
        Ok(is_over.then_some(status))
    })?;
    let told = side.migration()?["error-desc"].as_str().map(str::to_owned);
    if told.is_some_and(|told| told.contains("the outcome is unknown")) {
        // The target died with everything in its hands: who sees that it is dead says so.
        side.qmp.execute("cont", Value::Null)?;
        side.wait_migration("failed")?;
    } else if status == "failing" {
        side.qmp.wait_event("COLO_EXIT")?;
        side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
        side.wait_migration("completed")?;
    }
    if side.status()? == "inmigrate" {
        // `exit-on-error` is off: it waits for another guest.
        return Ok(Survivor::Nobody);
    }
    side.wait_status("running")?;
    side.wait_lines(ENCORE)?;
    let exits = side.qmp.events().filter(|e| e["event"] == "COLO_EXIT");
    assert_eq!(exits.count(), 0, "COLO_EXIT comes once");
    Ok(Survivor::Guest)
}
