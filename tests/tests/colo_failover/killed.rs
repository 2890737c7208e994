//! A side is killed, between checkpoints or in the middle of one.

use std::time::Instant;

use serde_json::{Value, json};
use tests::vmm::{ColoVmm, Connection, Pair, Side, check_count};
use tests::{PATIENCE, Result};

use Moment::{Between, Within};
use Side::{Primary, Secondary};

use crate::{
    DELAY, ENCORE, MULTIFD, PLAIN, cut, goes_on, guest, guest_lost_nothing, is_stuck, rest, yank,
};

/// When the victim is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// No checkpoint is being taken.
    Between,
    /// The survivor is stopped for a checkpoint that cannot be completed any more.
    Within,
}

/// The same whose secondary holds guest memory twice.
pub fn mirror() -> ColoVmm {
    guest().args(["--ram-cache", "mirror"])
}

pub fn failover(connection: Connection, survivor: Side, moment: Moment) -> Result<()> {
    failover_of(&guest(), connection, survivor, moment)
}

/// The procedure of QEMU's COLO document, with every claim about its outcome.
pub fn failover_of(
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
pub fn early() -> ColoVmm {
    guest().args([
        "--output-commit",
        "--resume",
        "copied",
        "--gap-bandwidth",
        "0",
    ])
}

/// The primary dies, and the secondary goes on from where nothing is that the world has heard
/// otherwise.
pub fn committed(guest: &ColoVmm, moment: Moment) -> Result<()> {
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
pub fn dies_receiving(guest: &ColoVmm) -> Result<()> {
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

pub fn equal_sides(cache: &str) -> Result<()> {
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

pub fn take_over() -> Result<()> {
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
pub fn new_secondary() -> Result<()> {
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

pub fn one_side_only() -> Result<()> {
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
