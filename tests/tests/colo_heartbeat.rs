//! A pair of `colo-vmm` with a heartbeat: who is lost is noticed, and one side goes on by itself.

use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::Result;
use tests::etcd::Etcd;
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Pair, Side, Vmm};

/// Of a pair that is simulated or not.
type Test = fn(bool) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 7] = [
        (
            "secondary_of_a_killed_primary_is_given_the_right_by_the_lock_file",
            |is_simulated| killed(is_simulated, Side::Secondary, Arbiter::File),
        ),
        (
            "primary_of_a_killed_secondary_goes_on_by_the_lock_file",
            |is_simulated| killed(is_simulated, Side::Primary, Arbiter::File),
        ),
        (
            "primary_that_was_frozen_finds_its_right_another_s_and_stops",
            |is_simulated| frozen(is_simulated, Arbiter::File),
        ),
        (
            "primary_of_a_frozen_secondary_goes_on_in_time_and_answers_meanwhile",
            frozen_secondary,
        ),
        (
            "operator_s_word_is_not_enough_against_the_arbiter_s_and_enough_with_it",
            operator,
        ),
        ("secondary_set_to_take_over_does", take_over),
        ("primary_set_to_take_over_does", primary_takes_over),
    ];
    let simulated = tests.map(|(name, test)| {
        let test = Needs::NOTHING.test(&format!("simulated_{name}"), move || test(true));
        test.sampled(&[name])
    });
    let kvm = tests.map(|(name, test)| {
        let needs = Needs::NOTHING.kvm();
        let test = needs.test(&format!("kvm_{name}"), move || test(false));
        test.sampled(&[name])
    });
    let by_etcd = [
        Needs::NOTHING.test_etcd(
            "secondary_of_a_killed_primary_is_given_the_right_by_etcd",
            |program| killed(true, Side::Secondary, Arbiter::Etcd(&Etcd::start(program)?)),
        ),
        Needs::NOTHING.test_etcd(
            "primary_of_a_killed_secondary_is_given_the_right_by_etcd",
            |program| killed(true, Side::Primary, Arbiter::Etcd(&Etcd::start(program)?)),
        ),
        Needs::NOTHING.test_etcd(
            "primary_that_was_frozen_finds_in_etcd_that_its_right_is_another_s_and_stops",
            |program| frozen(true, Arbiter::Etcd(&Etcd::start(program)?)),
        ),
        Needs::NOTHING.test_etcd(
            "etcd_that_is_silent_disturbs_no_pair_that_hears_each_other",
            silent_etcd,
        ),
        Needs::NOTHING.test_etcd(
            "primary_that_neither_etcd_nor_its_secondary_answers_stands_still_until_etcd_does",
            renewed_by_nobody,
        ),
        Needs::NOTHING.test_etcd(
            "claims_that_etcd_carries_out_late_leave_one_guest_running",
            late_claim,
        ),
        Needs::NOTHING.test_etcd(
            "operator_who_cannot_have_etcd_asked_has_to_say_that_it_is_not_to_be",
            unasked,
        ),
    ];
    harness::run_waiting(simulated.into_iter().chain(kvm).chain(by_etcd))
}

#[derive(Clone, Copy)]
enum Arbiter<'a> {
    None,
    File,
    Etcd(&'a Etcd),
}

/// How long COLO itself waits for a peer that a heartbeat has to lose before.
const QUIET: Duration = Duration::from_secs(60);
/// How long a lease lasts, ms.
const TERM: u32 = 2000;

/// A pair in COLO that beats slowly enough for a busy machine.
fn pair(
    is_simulated: bool,
    primary: &str,
    secondary: &str,
    arbiter: Arbiter,
) -> Result<(Pair, tempfile::TempDir)> {
    pair_with(&[], is_simulated, primary, secondary, arbiter)
}

/// As [`pair`], with more arguments for both sides.
fn pair_with(
    args: &[&str],
    is_simulated: bool,
    primary: &str,
    secondary: &str,
    arbiter: Arbiter,
) -> Result<(Pair, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let beat = format!("unix:{}", dir.path().join("beat").display());
    let arbiter = match arbiter {
        Arbiter::None => "none".to_owned(),
        Arbiter::File => format!("file:{}", dir.path().join("right").display()),
        Arbiter::Etcd(etcd) => format!("etcd:{}", etcd.endpoint()),
    };
    let vmm = |policy: &str| {
        let guest = ColoVmm::new("colo-vmm").memory(16);
        let guest = if is_simulated {
            guest.simulated()
        } else {
            guest
        };
        let guest = guest.args(args);
        guest.heartbeat(&beat, 300, policy).arbiter(&arbiter, TERM)
    };
    let mut pair = Pair::with_heartbeat(&vmm(primary), &vmm(secondary), 100)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        assert_eq!(side.heartbeat()?["state"], "paired");
    }
    Ok((pair, dir))
}

fn goes_on(side: &mut Vmm) -> Result<()> {
    side.poll("state alone", |vmm| {
        Ok((vmm.heartbeat()?["state"] == "alone").then_some(()))
    })?;
    side.wait_migration("completed")?;
    side.wait_status("running")?;
    side.wait_lines(3)
}

fn killed(is_simulated: bool, survivor: Side, arbiter: Arbiter) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "ask", "ask", arbiter)?;
    let (side, victim) = survivor.of(&mut pair);
    victim.process.kill()?;
    goes_on(side)?;
    // The holder of the right need not wait for the heartbeat when COLO's connection is gone.
    side.poll("lost peer", |vmm| {
        Ok((vmm.heartbeat()?["peer"] == "lost").then_some(()))
    })?;
    let beat = side.heartbeat()?;
    assert_eq!(beat["arbiter-state"], "won");
    let generation = match survivor {
        Side::Primary => 1,
        Side::Secondary => 2,
    };
    assert_eq!(beat["generation"], generation);
    pair.check_history(survivor)
}

/// The lease of a process that does not run is the other side's in the end, and what was frozen does
/// not go on beside it.
fn frozen(is_simulated: bool, arbiter: Arbiter) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "ask", "ask", arbiter)?;
    pair.primary.freeze()?;
    goes_on(&mut pair.secondary)?;
    pair.primary.thaw()?;
    pair.primary.qmp.wait_event("X_COLO_STOPPED")?;
    pair.primary.wait_status("internal-error")?;
    assert_eq!(pair.primary.heartbeat()?["state"], "stopped");
    pair.primary.qmp.refused("cont", Value::Null)?;
    pair.secondary.wait_lines(3)?;
    pair.check_history(Side::Secondary)
}

/// A process that does not run any more, at either end of whose connections nothing breaks.
fn frozen_secondary(is_simulated: bool) -> Result<()> {
    let quiet = QUIET.as_millis().to_string();
    let args = ["--peer-timeout", &quiet];
    let (mut pair, _dir) = pair_with(&args, is_simulated, "ask", "ask", Arbiter::File)?;
    let since = Instant::now();
    pair.secondary.freeze()?;
    let mut slowest = Duration::ZERO;
    pair.primary.poll("state alone", |vmm| {
        let asked = Instant::now();
        let beat = vmm.heartbeat()?;
        vmm.migration()?;
        slowest = slowest.max(asked.elapsed());
        Ok((beat["state"] == "alone").then_some(()))
    })?;
    // COLO's own deadlines, and whoever waits with them, take a minute.
    let took = since.elapsed();
    assert!(took < QUIET / 2, "it took {took:?}");
    assert!(slowest < QUIET / 4, "an answer took {slowest:?}");
    goes_on(&mut pair.primary)?;
    pair.secondary.thaw()?;
    pair.secondary.qmp.wait_event("X_COLO_STOPPED")?;
    pair.secondary.wait_status("internal-error")?;
    pair.secondary.qmp.refused("cont", Value::Null)?;
    pair.primary.wait_lines(3)?;
    pair.check_history(Side::Primary)
}

fn silent_etcd(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let (mut pair, _dir) = pair(true, "ask", "ask", Arbiter::Etcd(&etcd))?;
    etcd.freeze()?;
    thread::sleep(Duration::from_millis(u64::from(TERM) * 3));
    assert_eq!(pair.primary.heartbeat()?["state"], "paired");
    assert_eq!(pair.secondary.heartbeat()?["state"], "paired");
    let taken = pair.primary.checkpoints()?.len();
    pair.primary.wait_checkpoints(taken + 2)?;
    etcd.thaw()?;
    pair.primary.poll("renewed right", |vmm| {
        Ok((vmm.heartbeat()?["arbiter-state"] == "won").then_some(()))
    })?;
    pair.secondary.process.kill()?;
    goes_on(&mut pair.primary)
}

/// Its secondary may be alive, and may have been given the right.
fn renewed_by_nobody(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let (mut pair, _dir) = pair(true, "ask", "ask", Arbiter::Etcd(&etcd))?;
    etcd.freeze()?;
    pair.secondary.freeze()?;
    stands_still(&mut pair.primary)?;
    // Nobody but the arbiter lets it run.
    pair.primary.qmp.execute("cont", Value::Null)?;
    let said = pair.primary.output()?.len();
    thread::sleep(Duration::from_millis(u64::from(TERM)));
    assert_eq!(pair.primary.output()?.len(), said);
    // It answers again, and nobody else has asked.
    etcd.thaw()?;
    goes_on(&mut pair.primary)?;
    // The other is too late.
    pair.secondary.thaw()?;
    pair.secondary.qmp.wait_event("X_COLO_STOPPED")?;
    pair.secondary.wait_status("internal-error")
}

/// Waits until its right has run out.
fn stands_still(primary: &mut Vmm) -> Result<()> {
    primary.poll("right that has run out", |vmm| {
        let beat = vmm.heartbeat()?;
        let ran_out = beat["stop-reason"] == "the lease has expired";
        Ok((ran_out && beat["state"] == "suspended").then_some(()))
    })?;
    // In the middle of a checkpoint, or not.
    assert_ne!(primary.status()?, "running");
    Ok(())
}

/// The claim is in etcd's hands when its answer is given up, and the other's comes behind it.
fn late_claim(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let (mut pair, _dir) = pair(true, "ask", "ask", Arbiter::Etcd(&etcd))?;
    etcd.freeze()?;
    // The connection alone, at first: the primary claims when COLO is over, and both wait for etcd.
    for side in [&mut pair.primary, &mut pair.secondary] {
        let instances = side.qmp.execute_oob("query-yank", Value::Null)?;
        side.qmp
            .execute_oob("yank", json!({"instances": instances}))?;
    }
    pair.primary.poll("claim", |vmm| {
        Ok((vmm.heartbeat()?["state"] == "asking").then_some(()))
    })?;
    pair.secondary.freeze()?;
    stands_still(&mut pair.primary)?;
    pair.secondary.thaw()?;
    pair.secondary.poll("claim", |vmm| {
        Ok((vmm.heartbeat()?["state"] == "asking").then_some(()))
    })?;
    thread::sleep(Duration::from_millis(u64::from(TERM)));
    etcd.thaw()?;
    let both = [pair.primary, pair.secondary];
    one_goes_on(both)
}

/// Waits until one side goes on, and the other has stopped for good.
fn one_goes_on(mut sides: [Vmm; 2]) -> Result<()> {
    for side in &mut sides {
        side.poll("decision", |vmm| {
            let state = vmm.heartbeat()?["state"].take();
            Ok(["alone", "stopped"]
                .iter()
                .any(|s| state == *s)
                .then_some(()))
        })?;
    }
    let [a, b] = &mut sides;
    let (alone, stopped) = match a.heartbeat()?["state"].as_str() {
        Some("alone") => (a, b),
        _ => (b, a),
    };
    goes_on(alone)?;
    assert_eq!(stopped.heartbeat()?["state"], "stopped");
    stopped.wait_status("internal-error")
}

/// The primary lives and renews its right; then an operator asks for it to go on.
fn operator(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "ask", "ask", Arbiter::File)?;
    let refusal = pair
        .secondary
        .qmp
        .refused("x-colo-lost-heartbeat", Value::Null)?;
    assert!(
        refusal
            .desc
            .contains("the other side owns this guest, and is alive"),
        "{}",
        refusal.desc
    );
    // Nothing has happened.
    for side in [&mut pair.primary, &mut pair.secondary] {
        assert_eq!(side.heartbeat()?["state"], "paired");
        let taken = side.checkpoints()?.len();
        side.wait_checkpoints(taken + 2)?;
    }
    pair.primary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(&mut pair.primary)?;
    pair.secondary.qmp.wait_event("X_COLO_STOPPED")?;
    Ok(())
}

fn unasked(program: &Path) -> Result<()> {
    let mut etcd = Etcd::start(program)?;
    let (mut pair, _dir) = pair(true, "ask", "ask", Arbiter::Etcd(&etcd))?;
    etcd.kill()?;
    pair.primary.process.kill()?;
    pair.secondary.poll("lost peer", |vmm| {
        Ok((vmm.heartbeat()?["state"] == "asking").then_some(()))
    })?;
    let command = "x-colo-lost-heartbeat";
    let refusal = pair.secondary.qmp.refused(command, Value::Null)?;
    assert!(
        refusal.desc.contains("x-colo-override-arbiter"),
        "{}",
        refusal.desc
    );
    assert_eq!(pair.secondary.heartbeat()?["state"], "asking");
    pair.secondary
        .qmp
        .execute("x-colo-override-arbiter", Value::Null)?;
    goes_on(&mut pair.secondary)?;
    // And etcd hears of it.
    etcd.restart()?;
    pair.secondary.poll("right", |vmm| {
        Ok((vmm.heartbeat()?["arbiter-state"] == "won").then_some(()))
    })
}

fn take_over(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "stop", "take-over", Arbiter::None)?;
    pair.primary.process.kill()?;
    goes_on(&mut pair.secondary)?;
    pair.check_history(Side::Secondary)
}

fn primary_takes_over(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "take-over", "stop", Arbiter::None)?;
    pair.secondary.process.kill()?;
    goes_on(&mut pair.primary)?;
    pair.check_history(Side::Primary)
}
