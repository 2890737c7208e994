//! A pair of `colo-vmm` loses one side, at every kind of moment, and the guest goes on in the
//! other, where it was.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::relay::Relay;
use tests::vmm::{ColoVmm, Connection, Pair, Vmm, check_count};
use tests::{PATIENCE, Result, harness};

use Moment::{Between, Within};
use Side::{Primary, Secondary};

fn main() -> ExitCode {
    let kvm = harness::on_kvm;
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
        harness::anywhere(
            "simulated_secondary_of_a_primary_that_resumes_early_goes_on",
            || committed(&early().simulated(), Within),
        ),
        kvm(
            "primary_that_has_resumed_goes_on_when_its_peer_dies_while_it_receives",
            || dies_receiving(&early()),
        ),
        harness::anywhere(
            "simulated_primary_that_has_resumed_goes_on_when_its_peer_dies",
            || dies_receiving(&early().simulated()),
        ),
        harness::anywhere("simulated_primary_goes_on", || {
            failover_of(&guest().simulated(), MULTIFD, Primary, Within)
        }),
        harness::anywhere("simulated_secondary_goes_on", || {
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
        harness::anywhere("simulated_secondary_with_a_mirror_goes_on", || {
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
        harness::anywhere(
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Primary,
    Secondary,
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Primary => "primary",
            Secondary => "secondary",
        }
    }

    /// This side and the other.
    fn of(self, pair: &mut Pair) -> (&mut Vmm, &mut Vmm) {
        match self {
            Primary => (&mut pair.primary, &mut pair.secondary),
            Secondary => (&mut pair.secondary, &mut pair.primary),
        }
    }
}

/// When the victim is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    /// No checkpoint is being taken.
    Between,
    /// The survivor is stopped for a checkpoint that cannot be completed any more.
    Within,
}

/// More dirty memory than sockets hold: a checkpoint of it cannot be on its way as a whole.
fn guest() -> ColoVmm {
    ColoVmm::new("colo-vmm").memory(32).dirty_pages(5000)
}

/// The same whose secondary holds guest memory twice.
fn mirror() -> ColoVmm {
    guest().args(["--ram-cache", "mirror"])
}

fn failover(connection: Connection, survivor: Side, moment: Moment) -> Result<()> {
    failover_of(&guest(), connection, survivor, moment)
}

/// The procedure of QEMU's COLO document, with every claim about its outcome.
fn failover_of(
    guest: &ColoVmm,
    connection: Connection,
    survivor: Side,
    moment: Moment,
) -> Result<()> {
    let mut pair = Pair::in_colo(guest, connection, DELAY)?;
    match moment {
        Between => rest(&mut pair)?,
        Within => freeze_within(&mut pair, survivor)?,
    }
    let (side, victim) = survivor.of(&mut pair);
    victim.process.kill()?;
    assert!(!victim.process.is_running()?);

    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(
        exit["data"],
        json!({"mode": survivor.name(), "reason": "error"})
    );
    // Nobody has decided yet who goes on, and a dead peer is not `colo`.
    let migration = side.migration()?;
    assert_eq!(migration["status"], "failing", "{migration}");
    assert!(migration["error-desc"].is_string(), "{migration}");
    let state = match moment {
        Between => "running",
        Within => "colo",
    };
    assert_eq!(side.status()?, state);

    yank(side)?;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, survivor, "request")?;
    guest_lost_nothing(&mut pair, survivor)
}

/// Its guest runs on before a checkpoint is complete, and pages are sent between two.
fn early() -> ColoVmm {
    guest().args(["--output-commit", "--early-resume", "--gap-bandwidth", "0"])
}

/// The primary dies, and the secondary goes on from where nothing is that the world has heard
/// otherwise.
fn committed(guest: &ColoVmm, moment: Moment) -> Result<()> {
    let mut pair = Pair::in_colo(guest, MULTIFD, DELAY)?;
    match moment {
        Between => rest(&mut pair)?,
        Within => freeze_within(&mut pair, Secondary)?,
    }
    pair.primary.process.kill()?;
    let side = &mut pair.secondary;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "error");
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, Secondary, "request")?;
    let said = pair.primary.output()?;
    check_count(0, &said)?;
    let secondary = pair.secondary.output()?;
    let cut = cut(&mut pair, &secondary)?;
    assert!(
        cut >= said.len() as u64,
        "from byte {cut} on, the primary had said {}",
        said.len()
    );
    check_count(cut, &secondary)?;
    Ok(())
}

/// The secondary dies in the middle of a checkpoint, in which the primary's guest runs already.
fn dies_receiving(guest: &ColoVmm) -> Result<()> {
    let moment = "receiving ram begins#4";
    let named = |args: &[&str]| guest.clone().args(args);
    let mut pair = Pair::start_both(
        &named(&[]),
        &named(&["--die-at", moment]),
        MULTIFD,
        &["return-path", "x-colo"],
    )?;
    pair.primary
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": DELAY}))?;
    pair.migrate(MULTIFD)?;
    let side = &mut pair.primary;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"], json!({"mode": "primary", "reason": "error"}));
    // It is not decided who goes on, but the guest does not stand still for it.
    assert_eq!(side.migration()?["status"], "failing");
    assert_eq!(side.status()?, "running");
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, Primary, "request")?;
    guest_lost_nothing(&mut pair, Primary)
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

/// Takes one checkpoint after the other, and freezes the survivor's peer so that the survivor is
/// stuck in one.
fn freeze_within(pair: &mut Pair, survivor: Side) -> Result<()> {
    pair.primary
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 0}))?;
    let (side, victim) = survivor.of(pair);
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        side.wait_status("running")?;
        side.wait_status("colo")?;
        victim.freeze()?;
        if is_stuck(side)? {
            return Ok(());
        }
        // It had all it needed, or had not begun.
        victim.thaw()?;
    }
    Err("no checkpoint was caught".into())
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

fn equal_sides(cache: &str) -> Result<()> {
    let guest = ColoVmm::new("colo-vmm")
        .memory(16)
        .args(["--verify", "--ram-cache", cache]);
    let mut pair = Pair::in_colo(&guest, MULTIFD, DELAY)?;
    rest(&mut pair)?;
    let theirs = pair.secondary.checkpoints()?;
    let ours = pair.primary.checkpoints()?;
    assert!(ours.len() >= 3 && ours.len() == theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        for hash in ["ram-hash", "device-hash"] {
            assert!(ours[hash].is_string(), "{ours}");
            assert_eq!(ours[hash], theirs[hash], "{hash} of {}", ours["checkpoint"]);
        }
    }
    Ok(())
}

/// In QEMU the reason that is given in this case depends on who is faster.
fn by_request(survivor: Side) -> Result<()> {
    let mut pair = Pair::in_colo(&guest(), MULTIFD, DELAY)?;
    let (side, other) = survivor.of(&mut pair);
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(
        exit["data"],
        json!({"mode": survivor.name(), "reason": "request"})
    );
    goes_on(side, survivor, "request")?;
    // To the other side this one is lost. Whether it goes on is not for it to say.
    let exit = other.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "error");
    no_more_exits(other)?;
    assert_eq!(other.migration()?["status"], "failing");
    other.qmp.execute("quit", Value::Null)?;
    assert!(other.process.wait()?.success());
    if survivor == Primary {
        return guest_lost_nothing(&mut pair, Primary);
    }
    // Told in the middle of a commit it goes on after it, and nobody tells of that checkpoint.
    let (primary, secondary) = (pair.primary.output()?, pair.secondary.output()?);
    check_count(0, &primary)?;
    let cut = cut_by_line(&mut pair, &secondary)?;
    goes_on_at(cut, &primary, &secondary)
}

/// A peer that is there and says nothing: its deadlines end COLO, and nothing waits with it.
fn silent_peer(survivor: Side) -> Result<()> {
    // Of a whole checkpoint, too: with room for a slow machine.
    let guest = ColoVmm::new("colo-vmm").args(["--peer-timeout", "2000"]);
    let mut pair = Pair::in_colo(&guest, MULTIFD, DELAY)?;
    let (side, silent) = survivor.of(&mut pair);
    silent.freeze()?;
    let since = Instant::now();
    let mut slowest = Duration::ZERO;
    while !side.qmp.events().any(|e| e["event"] == "COLO_EXIT") {
        let asked = Instant::now();
        side.qmp.execute("query-migrate", Value::Null)?;
        side.status()?;
        slowest = slowest.max(asked.elapsed());
        assert!(
            since.elapsed() < Duration::from_secs(10),
            "nothing ends the wait"
        );
        thread::sleep(Duration::from_millis(1));
    }
    assert!(
        slowest < Duration::from_secs(1),
        "an answer took {slowest:?}"
    );
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(
        exit["data"],
        json!({"mode": survivor.name(), "reason": "error"})
    );
    let migration = side.migration()?;
    let reason = migration["error-desc"].as_str().unwrap_or_default();
    assert!(reason.contains("deadline"), "{reason}");
    silent.process.kill()?;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, survivor, "request")?;
    guest_lost_nothing(&mut pair, survivor)
}

/// A checkpoint every minute, and a peer that has to answer within half a second.
fn rare_checkpoints() -> Result<()> {
    let guest = ColoVmm::new("colo-vmm").args(["--peer-timeout", "500"]);
    let mut pair = Pair::start(&guest, MULTIFD, &["return-path", "x-colo"])?;
    let minute = json!({"x-checkpoint-delay": 60_000});
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.qmp.set_parameters(minute.clone())?;
    }
    pair.migrate(MULTIFD)?;
    pair.secondary.wait_migration("colo")?;
    thread::sleep(Duration::from_millis(1500));
    for side in [&mut pair.secondary, &mut pair.primary] {
        no_more_exits(side)?;
        assert_eq!(side.status()?, "running");
    }
    // As in QEMU, this asks for one at once.
    pair.primary.qmp.set_parameters(minute)?;
    pair.primary.wait_checkpoints(1)?;
    pair.secondary.wait_checkpoints(1)
}

/// A pair whose link has stalled within the memory of a checkpoint, with default deadlines.
fn stalled_in_ram() -> Result<(Pair, Relay)> {
    let mut pair = Pair::start(&guest(), PLAIN, &["return-path", "x-colo"])?;
    pair.primary
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": DELAY}))?;
    let path = pair.secondary.dir().join("migration");
    let uri = pair
        .secondary
        .listen_on(&format!("unix:{}", path.display()))?;
    let relay = Relay::to(&uri)?;
    pair.primary.migrate(&relay.uri())?;
    pair.primary.wait_checkpoints(3)?;
    pair.secondary.wait_checkpoints(3)?;
    rest(&mut pair)?;
    // Until the guest has dirtied all that it works on.
    pair.primary.wait_lines(2)?;
    relay.stall();
    pair.primary
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": 0}))?;
    relay.wait_stalled()?;
    assert_eq!(pair.secondary.status()?, "colo");
    pair.primary.wait_status("colo")?;
    assert!(is_stuck(&mut pair.primary)?);
    Ok((pair, relay))
}

fn yank_while_sending() -> Result<()> {
    let (mut pair, _relay) = stalled_in_ram()?;
    let side = &mut pair.primary;
    yank(side)?;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "error");
    let migration = side.migration()?;
    let reason = migration["error-desc"].as_str().unwrap_or_default();
    assert!(reason.contains("sending ram"), "{reason}");
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, Primary, "request")?;
    guest_lost_nothing(&mut pair, Primary)
}

/// QEMU's main loop is stuck then, and takes the command only after a `yank` out of band.
fn request_while_sending() -> Result<()> {
    let (mut pair, _relay) = stalled_in_ram()?;
    let side = &mut pair.primary;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "request");
    goes_on(side, Primary, "request")?;
    guest_lost_nothing(&mut pair, Primary)
}

fn lost_while_receiving() -> Result<()> {
    let (mut pair, relay) = stalled_in_ram()?;
    pair.primary.process.kill()?;
    drop(relay);
    let side = &mut pair.secondary;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "error");
    let migration = side.migration()?;
    let reason = migration["error-desc"].as_str().unwrap_or_default();
    assert!(reason.contains("receiving ram"), "{reason}");
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, Secondary, "request")?;
    guest_lost_nothing(&mut pair, Secondary)
}

fn take_over() -> Result<()> {
    let mut pair = Pair::start(&guest(), MULTIFD, &["return-path", "x-colo"])?;
    let alert = guest().incoming().args(["--on-peer-loss", "take-over"]);
    pair.secondary = alert.start()?;
    pair.secondary
        .qmp
        .enable(&["events", "return-path", "x-colo", "multifd"])?;
    pair.primary
        .qmp
        .set_parameters(json!({"x-checkpoint-delay": DELAY}))?;
    pair.migrate(MULTIFD)?;
    pair.secondary.wait_checkpoints(3)?;
    pair.primary.process.kill()?;
    let exit = pair.secondary.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "error");
    goes_on(&mut pair.secondary, Secondary, "error")?;
    guest_lost_nothing(&mut pair, Secondary)
}

/// What all of this is for: after a failover the guest is protected again.
fn new_secondary() -> Result<()> {
    let mut pair = Pair::in_colo(&guest(), MULTIFD, DELAY)?;
    pair.primary.process.kill()?;
    pair.secondary.qmp.wait_event("COLO_EXIT")?;
    pair.secondary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(&mut pair.secondary, Secondary, "request")?;
    guest_lost_nothing(&mut pair, Secondary)?;

    let heard = pair.secondary.output()?.len();
    let mut third = guest().incoming().start()?;
    third
        .qmp
        .enable(&["events", "return-path", "x-colo", "multifd"])?;
    let uri = third.listen()?;
    let mut survivor = pair.secondary;
    survivor
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    survivor.migrate(&uri)?;
    third.wait_checkpoints(3)?;
    survivor.process.kill()?;
    third.qmp.wait_event("COLO_EXIT")?;
    third.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(&mut third, Secondary, "request")?;
    assert!(survivor.output()?.len() > heard);
    assert!(third.output()?.len() > 20);
    Ok(())
}

fn one_side_only() -> Result<()> {
    let guest = guest().simulated();
    // The target has all of the guest, and waits for an operator's word on a peer that has gone.
    let mut pair = Pair::start(&guest, PLAIN, &["return-path"])?;
    pair.secondary.qmp.enable(&["x-colo"])?;
    pair.migrate(PLAIN)?;
    pair.primary.wait_migration("completed")?;
    assert_eq!(pair.primary.status()?, "postmigrate");
    pair.secondary.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(pair.secondary.migration()?["status"], "failing");
    pair.secondary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(&mut pair.secondary, Secondary, "request")?;

    // The target has gone on with the guest. The source has not.
    let mut pair = Pair::start(&guest, PLAIN, &["return-path"])?;
    pair.primary.qmp.enable(&["x-colo"])?;
    pair.migrate(PLAIN)?;
    pair.secondary.wait_migration("completed")?;
    pair.secondary.wait_lines(ENCORE)?;
    pair.primary.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(pair.primary.migration()?["status"], "failing");
    assert_ne!(pair.primary.status()?, "running");
    Ok(())
}

/// `stop` and `cont` while checkpoints are taken one after the other, so that most of them come in the
/// middle of one.
fn stopped_at_any_moment() -> Result<()> {
    let mut pair = Pair::in_colo(&guest(), MULTIFD, 0)?;
    for round in 0..20 {
        pair.primary.qmp.execute("stop", Value::Null)?;
        let checkpoints = pair.primary.checkpoints()?.len();
        pair.primary.wait_checkpoints(checkpoints + 2)?;
        // A checkpoint of a guest that stands still is one all the same.
        let said = pair.primary.output()?.len();
        pair.primary.wait_checkpoints(checkpoints + 4)?;
        assert_eq!(pair.primary.output()?.len(), said, "round {round}");
        cont(&mut pair.primary)?;
        pair.primary.wait_lines(2)?;
    }
    pair.primary.qmp.execute("stop", Value::Null)?;
    pair.primary.wait_status("paused")?;
    // What the operator stopped does not run because its peer is lost.
    pair.secondary.process.kill()?;
    pair.primary.qmp.wait_event("COLO_EXIT")?;
    pair.primary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    pair.primary.wait_migration("completed")?;
    pair.primary.wait_status("paused")?;
    cont(&mut pair.primary)?;
    pair.primary.wait_lines(ENCORE)?;
    guest_lost_nothing(&mut pair, Primary)
}

/// Lets the guest run; within a checkpoint that is refused, as QEMU does.
fn cont(side: &mut Vmm) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match side.qmp.execute("cont", Value::Null) {
            Ok(_) => return Ok(()),
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(e) => assert!(e.to_string().contains("COLO"), "{e}"),
        }
    }
}

/// `quit` ends one side, without error; to the other it is lost.
fn quits(leaver: Side) -> Result<()> {
    let survivor = match leaver {
        Primary => Secondary,
        Secondary => Primary,
    };
    let mut pair = Pair::in_colo(&guest(), MULTIFD, DELAY)?;
    let (side, other) = survivor.of(&mut pair);
    other.qmp.execute("quit", Value::Null)?;
    assert!(other.process.wait()?.success());
    side.qmp.wait_event("COLO_EXIT")?;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, survivor, "request")?;
    guest_lost_nothing(&mut pair, survivor)
}

/// A guest that shuts down ends the process it runs in. The secondary cannot tell that from a host that
/// was lost: it is for whoever watches the process that ended well not to fail over.
fn guest_ends() -> Result<()> {
    let dir = tempfile::tempdir()?;
    // A second of counting down, then a word to the debug-exit port.
    let code = dir.path().join("code");
    std::fs::write(&code, countdown())?;
    let guest = ColoVmm::new("colo-vmm").memory(16);
    let spec = format!("flat:{}@0x8000", code.display());
    let mut pair = Pair {
        primary: guest.clone().args(["--guest", &spec, "--paused"]).start()?,
        secondary: guest.incoming().start()?,
    };
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.qmp.enable(&["events", "return-path", "x-colo"])?;
        side.qmp
            .set_parameters(json!({"x-checkpoint-delay": DELAY}))?;
    }
    pair.migrate(PLAIN)?;
    pair.primary.wait_checkpoints(2)?;
    cont(&mut pair.primary)?;
    let status = pair.primary.process.wait()?;
    assert_eq!(status.code(), Some(7), "3 on the port is 7");
    pair.primary.qmp.hear_out()?;
    let said = |name: &str| pair.primary.qmp.events().any(|e| e["event"] == name);
    assert!(said("SHUTDOWN") && said("COLO_EXIT"));
    pair.secondary.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(pair.secondary.migration()?["status"], "failing");
    assert_ne!(pair.secondary.status()?, "shutdown");
    Ok(())
}

/// Real-mode code that takes some time and then writes 3 to the debug-exit port.
fn countdown() -> Vec<u8> {
    vec![
        0xb9, 0x00, 0x01, // mov cx, 256
        0xba, 0x00, 0x10, // outer: mov dx, 4096
        0x4a, // inner: dec dx
        0x75, 0xfd, // jnz inner
        0xe2, 0xf8, // loop outer
        0xb0, 0x03, // mov al, 3
        0xe6, 0xf4, // out 0xf4, al
        0xf4, // hlt
    ]
}
