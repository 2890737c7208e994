//! A pair of `colo-vmm` with a heartbeat: who is lost is noticed, and one side goes on by itself.

use std::process::ExitCode;

use serde_json::{Value, json};
use tests::vmm::{ColoVmm, Connection, Pair, Vmm};
use tests::{Result, harness};

fn main() -> ExitCode {
    harness::run([
        harness::anywhere(
            "secondary_of_a_killed_primary_is_given_the_right_by_the_lock_file",
            || killed(false),
        ),
        harness::anywhere(
            "primary_of_a_killed_secondary_goes_on_by_the_lock_file",
            || killed(true),
        ),
        harness::anywhere(
            "primary_that_was_frozen_finds_its_right_another_s_and_stops",
            frozen,
        ),
        harness::anywhere("secondary_set_to_take_over_does", take_over),
    ])
}

const CONNECTION: Connection = Connection {
    multifd: None,
    unix: false,
};

/// A pair in COLO that beats slowly enough for a busy machine.
fn pair(primary: &str, secondary: &str, arbiter: bool) -> Result<(Pair, tempfile::TempDir)> {
    let dir = tempfile::tempdir()?;
    let beat = format!("unix:{}", dir.path().join("beat").display());
    let file = format!("file:{}", dir.path().join("right").display());
    let vmm = |policy: &str| {
        let arbiter = if arbiter { file.as_str() } else { "none" };
        ColoVmm::new("colo-vmm").memory(16).simulated().args([
            "--uuid",
            "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a11",
            "--heartbeat",
            &beat,
            "--heartbeat-interval",
            "300",
            "--on-heartbeat-loss",
            policy,
            "--arbiter",
            arbiter,
            "--arbiter-term",
            "2000",
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

fn killed(survivor_is_primary: bool) -> Result<()> {
    let (mut pair, _dir) = pair("ask", "ask", true)?;
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
    Ok(())
}

/// The lease of a process that does not run is the other side's in the end, and what was frozen does
/// not go on beside it.
fn frozen() -> Result<()> {
    let (mut pair, _dir) = pair("ask", "ask", true)?;
    pair.primary.freeze()?;
    goes_on(&mut pair.secondary)?;
    pair.primary.thaw()?;
    pair.primary.qmp.wait_event("X_COLO_STOPPED")?;
    pair.primary.wait_status("internal-error")?;
    assert_eq!(heartbeat(&mut pair.primary)?["state"], "stopped");
    pair.primary.qmp.refused("cont", Value::Null)?;
    pair.secondary.wait_lines(3)
}

fn take_over() -> Result<()> {
    let (mut pair, _dir) = pair("stop", "take-over", false)?;
    pair.primary.process.kill()?;
    goes_on(&mut pair.secondary)
}
