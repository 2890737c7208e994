//! A pair of `colo-vmm` loses one side, at every kind of moment, and the guest goes on in the
//! other, where it was.

mod ended;
mod killed;
mod silent;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Connection, Pair, Side, Vmm, check_count};
use tests::{PATIENCE, Result};

use Side::{Primary, Secondary};

use self::ended::{by_request, guest_ends, quits, stopped_at_any_moment};
use self::killed::Moment::{Between, Within};
use self::killed::{
    committed, dies_receiving, early, equal_sides, failover, failover_of, mirror, new_secondary,
    one_side_only, take_over,
};
use self::silent::{
    lost_while_receiving, rare_checkpoints, request_while_sending, silent_peer, yank_while_sending,
};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run([
        kvm("plain_primary_goes_on_between_checkpoints", || {
            failover(PLAIN, Primary, Between)
        }),
        kvm(
            "plain_primary_goes_on_in_the_middle_of_a_checkpoint",
            || failover(PLAIN, Primary, Within),
        ),
        kvm("plain_secondary_goes_on_between_checkpoints", || {
            failover(PLAIN, Secondary, Between)
        }),
        kvm(
            "plain_secondary_goes_on_in_the_middle_of_a_checkpoint",
            || failover(PLAIN, Secondary, Within),
        ),
        kvm("multifd_primary_goes_on_between_checkpoints", || {
            failover(MULTIFD, Primary, Between)
        }),
        kvm(
            "multifd_primary_goes_on_in_the_middle_of_a_checkpoint",
            || failover(MULTIFD, Primary, Within),
        ),
        kvm("multifd_secondary_goes_on_between_checkpoints", || {
            failover(MULTIFD, Secondary, Between)
        }),
        kvm(
            "multifd_secondary_goes_on_in_the_middle_of_a_checkpoint",
            || failover(MULTIFD, Secondary, Within),
        ),
        kvm(
            "zstd_secondary_goes_on_in_the_middle_of_a_checkpoint",
            || {
                let zstd = Connection {
                    multifd: Some((2, "zstd")),
                    ..PLAIN
                };
                failover(zstd, Secondary, Within)
            },
        ),
        kvm("secondary_goes_on_over_unix_sockets", || {
            let unix = Connection {
                unix: true,
                ..MULTIFD
            };
            failover(unix, Secondary, Between)
        }),
        kvm(
            "secondary_of_a_primary_that_resumes_early_goes_on_between_checkpoints",
            || committed(&early(), Between),
        ),
        kvm(
            "secondary_of_a_primary_that_resumes_early_goes_on_in_the_middle_of_a_checkpoint",
            || committed(&early(), Within),
        ),
        Needs::NOTHING.test(
            "simulated_secondary_of_a_primary_that_resumes_early_goes_on",
            || committed(&early().simulated(), Within),
        ),
        kvm(
            "primary_that_has_resumed_goes_on_when_its_peer_dies_while_it_receives",
            || dies_receiving(&early()),
        ),
        Needs::NOTHING.test(
            "simulated_primary_that_has_resumed_goes_on_when_its_peer_dies",
            || dies_receiving(&early().simulated()),
        ),
        Needs::NOTHING.test("simulated_primary_goes_on", || {
            failover_of(&guest().simulated(), MULTIFD, Primary, Within)
        }),
        Needs::NOTHING.test("simulated_secondary_goes_on", || {
            failover_of(&guest().simulated(), MULTIFD, Secondary, Within)
        }),
        kvm(
            "secondary_with_a_mirror_goes_on_between_checkpoints",
            || failover_of(&mirror(), PLAIN, Secondary, Between),
        ),
        kvm(
            "secondary_with_a_mirror_goes_on_in_the_middle_of_a_checkpoint",
            || failover_of(&mirror(), MULTIFD, Secondary, Within),
        ),
        Needs::NOTHING.test("simulated_secondary_with_a_mirror_goes_on", || {
            failover_of(&mirror().simulated(), MULTIFD, Secondary, Within)
        }),
        kvm("both_sides_are_equal_at_every_checkpoint", || {
            equal_sides("cow")
        }),
        kvm(
            "both_sides_are_equal_at_every_checkpoint_with_a_mirror",
            || equal_sides("mirror"),
        ),
        kvm(
            "primary_told_to_go_on_while_its_peer_lives_exits_by_request",
            || by_request(Primary),
        ),
        kvm(
            "secondary_told_to_go_on_while_its_peer_lives_exits_by_request",
            || by_request(Secondary),
        ),
        kvm(
            "primary_of_a_silent_peer_ends_in_time_and_answers_meanwhile",
            || silent_peer(Primary),
        ),
        kvm(
            "secondary_of_a_silent_peer_ends_in_time_and_answers_meanwhile",
            || silent_peer(Secondary),
        ),
        kvm(
            "secondary_waits_for_a_primary_that_has_nothing_to_say",
            rare_checkpoints,
        ),
        kvm(
            "yank_frees_a_primary_that_is_stuck_sending_ram",
            yank_while_sending,
        ),
        kvm(
            "primary_that_is_stuck_sending_ram_can_be_told_to_go_on",
            request_while_sending,
        ),
        kvm(
            "secondary_falls_back_to_the_last_checkpoint_while_receiving_ram",
            lost_while_receiving,
        ),
        kvm(
            "secondary_that_may_takes_over_without_being_told",
            take_over,
        ),
        Needs::NOTHING.test(
            "guest_runs_once_when_only_one_side_knows_of_colo",
            one_side_only,
        ),
        kvm("survivor_can_be_given_a_new_secondary", new_secondary),
        kvm(
            "guest_that_is_stopped_at_any_moment_stays_stopped_until_cont",
            stopped_at_any_moment,
        ),
        kvm("primary_that_quits_leaves_the_guest_to_its_peer", || {
            quits(Primary)
        }),
        kvm("secondary_that_quits_leaves_the_guest_to_its_peer", || {
            quits(Secondary)
        }),
        kvm("guest_that_ends_takes_its_primary_with_it", guest_ends),
    ])
}

const PLAIN: Connection = Connection::PLAIN;
const MULTIFD: Connection = Connection::channels(2);

/// Between checkpoints, ms.
const DELAY: u32 = 100;
/// How long a side has to stay within a checkpoint to be stuck there.
const STUCK: Duration = Duration::from_millis(500);
/// Lines that show that the guest goes on.
const ENCORE: u64 = 20;

/// More dirty memory than sockets hold: a checkpoint of it cannot be on its way as a whole.
fn guest() -> ColoVmm {
    ColoVmm::new("colo-vmm").memory(32).dirty_pages(5000)
}

fn yank(side: &mut Vmm) -> Result<()> {
    let instances = json!([{"type": "migration"}]);
    assert_eq!(side.qmp.execute_oob("query-yank", Value::Null)?, instances);
    side.qmp
        .execute_oob("yank", json!({"instances": instances}))?;
    Ok(())
}

/// Stops taking checkpoints, and waits until the last one is complete on both sides.
fn rest(pair: &mut Pair) -> Result<()> {
    pair.primary
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 3_600_000}))?;
    let deadline = Instant::now() + PATIENCE;
    // That has asked for one, or for one after the one that is being taken.
    let mut taken = (0, Instant::now());
    loop {
        let ours = pair.primary.checkpoints()?.len();
        let theirs = pair.secondary.checkpoints()?.len();
        if taken.0 != ours {
            taken = (ours, Instant::now());
        }
        let run = pair.primary.status()? == "running" && pair.secondary.status()? == "running";
        if !run || ours != theirs {
            taken.1 = Instant::now();
        } else if taken.1.elapsed() > STUCK {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err("checkpoints are taken without end".into());
        }
    }
}

fn is_stuck(side: &mut Vmm) -> Result<bool> {
    let since = Instant::now();
    while since.elapsed() < STUCK {
        if side.status()? != "colo" {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The survivor has gone on alone, and says so: by somebody's `request`, or by itself because of an
/// `error`.
fn goes_on(side: &mut Vmm, survivor: Side, reason: &str) -> Result<()> {
    side.wait_migration("completed")?;
    side.wait_status("running")?;
    assert_eq!(
        side.qmp.execute("query-colo-status", Value::Null)?,
        json!({"mode": "none", "last-mode": survivor.name(), "reason": reason})
    );
    let refusal = side.qmp.refused("x-colo-lost-heartbeat", Value::Null)?;
    assert_eq!(refusal.desc, "VM is not in COLO mode");
    assert_eq!(side.qmp.execute("query-yank", Value::Null)?, json!([]));
    side.wait_lines(ENCORE)?;
    no_more_exits(side)
}

/// There was one COLO_EXIT, and it has been taken.
fn no_more_exits(side: &mut Vmm) -> Result<()> {
    side.status()?;
    let exits = side.qmp.events().filter(|e| e["event"] == "COLO_EXIT");
    assert_eq!(exits.count(), 0);
    Ok(())
}

/// What the guest printed across the failover has no gap, and its memory was always as it had left
/// it.
fn guest_lost_nothing(pair: &mut Pair, survivor: Side) -> Result<()> {
    let primary = pair.primary.output()?;
    let secondary = pair.secondary.output()?;
    check_count(0, &primary)?;
    if survivor == Primary {
        assert_eq!(secondary, b"", "the secondary is not to be heard");
        return Ok(());
    }
    let cut = cut(pair, &secondary)?;
    goes_on_at(cut, &primary, &secondary)
}

/// The secondary is heard from a byte on that the primary has let out too, or from the next one.
fn goes_on_at(cut: u64, primary: &[u8], secondary: &[u8]) -> Result<()> {
    assert!(
        cut <= primary.len() as u64,
        "the secondary is ahead of its primary"
    );
    check_count(cut, secondary)?;
    Ok(())
}

/// How much the guest had printed at the last checkpoint that the secondary has.
fn cut(pair: &mut Pair, secondary: &[u8]) -> Result<u64> {
    let last = pair.secondary.checkpoints()?.pop().ok_or("no checkpoint")?;
    let known = pair.primary.checkpoints()?;
    let same = known.iter().find(|c| c["checkpoint"] == last["checkpoint"]);
    let at = |c: &Value| c["serial-bytes"].as_u64().ok_or("no serial-bytes");
    match same {
        Some(same) => Ok(at(same)?),
        // The primary died, or was frozen, before it could tell of it.
        None => cut_by_line(pair, secondary),
    }
}

/// The same by the first whole line that the secondary lets out: for a checkpoint of which not both sides
/// have told.
fn cut_by_line(pair: &mut Pair, secondary: &[u8]) -> Result<u64> {
    let (cut, _) = tests::vmm::first_line(secondary)?;
    let known = pair.primary.checkpoints()?;
    let before = known.last().map_or(Some(0), |c| c["serial-bytes"].as_u64());
    let before = before.ok_or("no serial-bytes")?;
    assert!(cut >= before, "the secondary fell back behind a checkpoint");
    Ok(cut)
}
