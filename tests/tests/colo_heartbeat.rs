//! A pair of `colo-vmm` with a heartbeat: who is lost is noticed, and one side goes on by itself.

use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::etcd::Etcd;
use tests::vmm::{ColoVmm, Connection, Pair, Vmm, check_count, first_line};
use tests::{Result, harness};

/// Of a pair that is simulated or not.
type Test = fn(bool) -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 7] = [
        (
            "secondary_of_a_killed_primary_is_given_the_right_by_the_lock_file",
            |is_simulated| killed(is_simulated, false, Arbiter::File),
        ),
        (
            "primary_of_a_killed_secondary_goes_on_by_the_lock_file",
            |is_simulated| killed(is_simulated, true, Arbiter::File),
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
        harness::anywhere_with(&format!("simulated_{name}"), move || test(true))
    });
    let kvm =
        tests.map(|(name, test)| harness::on_kvm_with(&format!("kvm_{name}"), move || test(false)));
    let by_etcd = [
        harness::on_etcd(
            "secondary_of_a_killed_primary_is_given_the_right_by_etcd",
            |program| killed(true, false, Arbiter::Etcd(&Etcd::start(program)?)),
        ),
        harness::on_etcd(
            "primary_of_a_killed_secondary_is_given_the_right_by_etcd",
            |program| killed(true, true, Arbiter::Etcd(&Etcd::start(program)?)),
        ),
        harness::on_etcd(
            "primary_that_was_frozen_finds_in_etcd_that_its_right_is_another_s_and_stops",
            |program| frozen(true, Arbiter::Etcd(&Etcd::start(program)?)),
        ),
        harness::on_etcd(
            "etcd_that_is_silent_disturbs_no_pair_that_hears_each_other",
            silent_etcd,
        ),
        harness::on_etcd(
            "primary_that_neither_etcd_nor_its_secondary_answers_stops",
            renewed_by_nobody,
        ),
        harness::on_etcd(
            "operator_who_cannot_have_etcd_asked_has_to_say_that_it_is_not_to_be",
            unasked,
        ),
    ];
    harness::run(simulated.into_iter().chain(kvm).chain(by_etcd))
}

const CONNECTION: Connection = Connection {
    multifd: None,
    unix: false,
};

#[derive(Clone, Copy)]
enum Arbiter<'a> {
    None,
    File,
    Etcd(&'a Etcd),
}

/// How long a right to run lasts.
const TERM: Duration = Duration::from_millis(2000);

/// A pair in COLO that beats slowly enough for a busy machine.
fn pair(
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
        guest.args([
            "--uuid",
            "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a11",
            "--heartbeat",
            &beat,
            "--heartbeat-interval",
            "300",
            "--on-heartbeat-loss",
            policy,
            "--arbiter",
            &arbiter,
            "--arbiter-term",
            &TERM.as_millis().to_string(),
        ])
    };
    let mut pair = Pair {
        secondary: vmm(secondary).incoming().start()?,
        primary: vmm(primary).start()?,
    };
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.qmp.enable(&["events", "return-path", "x-colo"])?;
        side.qmp
            .set_parameters(json!({"x-checkpoint-delay": 100}))?;
    }
    pair.primary.wait_lines(1)?;
    pair.primary.poll("heard peer", |vmm| {
        Ok((heartbeat(vmm)?["peer"] == "alive").then_some(()))
    })?;
    pair.migrate(CONNECTION)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_checkpoints(3)?;
        assert_eq!(heartbeat(side)?["state"], "paired");
    }
    Ok((pair, dir))
}

fn heartbeat(vmm: &mut Vmm) -> Result<Value> {
    vmm.qmp.execute("x-query-colo-heartbeat", Value::Null)
}

fn goes_on(side: &mut Vmm) -> Result<()> {
    side.poll("state alone", |vmm| {
        Ok((heartbeat(vmm)?["state"] == "alone").then_some(()))
    })?;
    side.wait_migration("completed")?;
    side.wait_status("running")?;
    side.wait_lines(3)
}

fn killed(is_simulated: bool, survivor_is_primary: bool, arbiter: Arbiter) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "ask", "ask", arbiter)?;
    let (survivor, victim) = if survivor_is_primary {
        (&mut pair.primary, &mut pair.secondary)
    } else {
        (&mut pair.secondary, &mut pair.primary)
    };
    victim.process.kill()?;
    goes_on(survivor)?;
    // The holder of the right need not wait for the heartbeat when COLO's connection is gone.
    survivor.poll("lost peer", |vmm| {
        Ok((heartbeat(vmm)?["peer"] == "lost").then_some(()))
    })?;
    let beat = heartbeat(survivor)?;
    assert_eq!(beat["arbiter-state"], "won");
    let generation = if survivor_is_primary { 1 } else { 2 };
    assert_eq!(beat["generation"], generation);
    check_history(&mut pair, survivor_is_primary)
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
    assert_eq!(heartbeat(&mut pair.primary)?["state"], "stopped");
    pair.primary.qmp.refused("cont", Value::Null)?;
    pair.secondary.wait_lines(3)?;
    check_history(&mut pair, false)
}

/// A process that does not run any more, at either end of whose connections nothing breaks.
fn frozen_secondary(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "ask", "ask", Arbiter::File)?;
    let since = Instant::now();
    pair.secondary.freeze()?;
    let mut slowest = Duration::ZERO;
    pair.primary.poll("state alone", |vmm| {
        let asked = Instant::now();
        let beat = heartbeat(vmm)?;
        vmm.migration()?;
        slowest = slowest.max(asked.elapsed());
        Ok((beat["state"] == "alone").then_some(()))
    })?;
    // COLO's own deadlines are 5 s and more.
    let took = since.elapsed();
    assert!(took < Duration::from_secs(4), "it took {took:?}");
    assert!(
        slowest < Duration::from_secs(1),
        "an answer took {slowest:?}"
    );
    goes_on(&mut pair.primary)?;
    pair.secondary.thaw()?;
    pair.secondary.qmp.wait_event("X_COLO_STOPPED")?;
    pair.secondary.wait_status("internal-error")?;
    pair.secondary.qmp.refused("cont", Value::Null)?;
    pair.primary.wait_lines(3)?;
    check_history(&mut pair, true)
}

fn silent_etcd(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let (mut pair, _dir) = pair(true, "ask", "ask", Arbiter::Etcd(&etcd))?;
    etcd.freeze()?;
    thread::sleep(TERM * 3);
    assert_eq!(heartbeat(&mut pair.primary)?["state"], "paired");
    assert_eq!(heartbeat(&mut pair.secondary)?["state"], "paired");
    let taken = pair.primary.checkpoints()?.len();
    pair.primary.wait_checkpoints(taken + 2)?;
    etcd.thaw()?;
    pair.primary.poll("renewed right", |vmm| {
        Ok((heartbeat(vmm)?["arbiter-state"] == "won").then_some(()))
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
    pair.primary.qmp.wait_event("X_COLO_STOPPED")?;
    pair.primary.wait_status("internal-error")?;
    let beat = heartbeat(&mut pair.primary)?;
    assert_eq!(beat["state"], "stopped");
    assert_eq!(beat["stop-reason"], "the right to run has run out");
    // Both come back, and the secondary goes on.
    etcd.thaw()?;
    pair.secondary.thaw()?;
    goes_on(&mut pair.secondary)?;
    pair.primary.qmp.refused("cont", Value::Null)?;
    Ok(())
}

/// The primary lives and renews its right; then an operator asks for it to go on.
fn operator(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "ask", "ask", Arbiter::File)?;
    let refusal = pair
        .secondary
        .qmp
        .refused("x-colo-lost-heartbeat", Value::Null)?;
    assert!(
        refusal.desc.contains("the other side's, which is heard"),
        "{}",
        refusal.desc
    );
    // Nothing has happened.
    for side in [&mut pair.primary, &mut pair.secondary] {
        assert_eq!(heartbeat(side)?["state"], "paired");
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
        Ok((heartbeat(vmm)?["state"] == "asking").then_some(()))
    })?;
    let command = "x-colo-lost-heartbeat";
    let refusal = pair.secondary.qmp.refused(command, Value::Null)?;
    assert!(
        refusal.desc.contains("x-colo-override-arbiter"),
        "{}",
        refusal.desc
    );
    assert_eq!(heartbeat(&mut pair.secondary)?["state"], "asking");
    pair.secondary
        .qmp
        .execute("x-colo-override-arbiter", Value::Null)?;
    goes_on(&mut pair.secondary)?;
    // And etcd hears of it.
    etcd.restart()?;
    pair.secondary.poll("right", |vmm| {
        Ok((heartbeat(vmm)?["arbiter-state"] == "won").then_some(()))
    })
}

fn take_over(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "stop", "take-over", Arbiter::None)?;
    pair.primary.process.kill()?;
    goes_on(&mut pair.secondary)?;
    check_history(&mut pair, false)
}

fn primary_takes_over(is_simulated: bool) -> Result<()> {
    let (mut pair, _dir) = pair(is_simulated, "take-over", "stop", Arbiter::None)?;
    pair.secondary.process.kill()?;
    goes_on(&mut pair.primary)?;
    check_history(&mut pair, true)
}

/// What the guest has said has no gap, and its memory was always as it had left it.
fn check_history(pair: &mut Pair, survivor_is_primary: bool) -> Result<()> {
    let (said, heard) = (pair.primary.output()?, pair.secondary.output()?);
    check_count(0, &said)?;
    if survivor_is_primary {
        assert_eq!(heard, b"", "the secondary was heard");
        return Ok(());
    }
    let (begin, _) = first_line(&heard)?;
    check_count(begin, &heard)?;
    assert!(begin <= said.len() as u64, "the secondary is ahead");
    Ok(())
}
