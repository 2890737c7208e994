//! A peer that is there and says nothing, or takes nothing.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tests::relay::Relay;
use tests::vmm::{ColoVmm, Pair, Side, has_run_out};
use tests::{PATIENCE, Result};

use Side::{Primary, Secondary};

use crate::{
    DELAY, MULTIFD, PLAIN, goes_on, guest, guest_lost_nothing, is_stuck, no_more_exits, rest, yank,
};

/// A peer that is there and says nothing: its deadlines end COLO, and nothing waits with it.
pub fn silent_peer(survivor: Side) -> Result<()> {
    // Of a whole checkpoint, too: with room for a slow machine.
    let guest = ColoVmm::new("colo-vmm").args(["--peer-timeout", "4000"]);
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
        assert!(since.elapsed() < PATIENCE, "nothing ends the wait");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(
        slowest < Duration::from_secs(3),
        "an answer took {slowest:?}"
    );
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(
        exit["data"],
        json!({"mode": survivor.name(), "reason": "error"})
    );
    let migration = side.migration()?;
    let reason = migration["error-desc"].as_str().unwrap_or_default();
    assert!(has_run_out(reason), "{reason}");
    silent.process.kill()?;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    goes_on(side, survivor, "request")?;
    guest_lost_nothing(&mut pair, survivor)
}

/// A checkpoint every minute, and a peer that has to answer within half a second.
pub fn rare_checkpoints() -> Result<()> {
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

pub fn yank_while_sending() -> Result<()> {
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
pub fn request_while_sending() -> Result<()> {
    let (mut pair, _relay) = stalled_in_ram()?;
    let side = &mut pair.primary;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    let exit = side.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["reason"], "request");
    goes_on(side, Primary, "request")?;
    guest_lost_nothing(&mut pair, Primary)
}

pub fn lost_while_receiving() -> Result<()> {
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
