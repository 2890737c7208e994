//! A side that is told to go on, to stop or to end, and a guest that ends by itself.

use std::time::Instant;

use serde_json::{Value, json};
use tests::vmm::{ColoVmm, Pair, Side, Vmm, check_count};
use tests::{PATIENCE, Result};

use Side::Primary;

use crate::{
    DELAY, ENCORE, MULTIFD, PLAIN, cut_by_line, goes_on, goes_on_at, guest, guest_lost_nothing,
    no_more_exits,
};

/// In QEMU the reason that is given in this case depends on who is faster.
pub fn by_request(survivor: Side) -> Result<()> {
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

/// `stop` and `cont` while checkpoints are taken one after the other, so that most of them come in the
/// middle of one.
pub fn stopped_at_any_moment() -> Result<()> {
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
pub fn quits(leaver: Side) -> Result<()> {
    let survivor = leaver.other();
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
pub fn guest_ends() -> Result<()> {
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
    // All the while: who does not listen to many checkpoints is told no more.
    pair.primary.qmp.hear_out()?;
    let status = pair.primary.process.wait()?;
    assert_eq!(status.code(), Some(7), "3 on the port is 7");
    let said: Vec<&Value> = pair.primary.qmp.events().map(|e| &e["event"]).collect();
    for event in ["SHUTDOWN", "COLO_EXIT"] {
        assert!(said.contains(&&json!(event)), "no {event} in {said:?}");
    }
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
