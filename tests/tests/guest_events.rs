//! Guests of `colo-vmm` that are reset, reset themselves, and shut down, alone and in COLO.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use tests::Result;
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Connection, Pair, Vmm, check_count};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run([
        kvm("guest_that_is_reset_begins_anew", || is_reset(&guest())),
        Needs::NOTHING.test("simulated_guest_that_is_reset_begins_anew", || {
            is_reset(&guest().simulated())
        }),
        kvm("guest_that_is_reset_in_colo_is_protected_anew", || {
            is_reset_in_colo(&guest())
        }),
        Needs::NOTHING.test(
            "simulated_guest_that_is_reset_in_colo_is_protected_anew",
            || is_reset_in_colo(&guest().simulated()),
        ),
        kvm("guest_that_has_moved_can_be_reset_where_it_is", has_moved),
        kvm(
            "guest_that_resets_the_machine_boots_again_where_that_is_wanted",
            reboots,
        ),
        kvm("guest_that_shuts_down_can_leave_its_process_behind", stays),
        kvm(
            "guest_that_shuts_down_in_colo_is_not_run_again",
            stays_in_colo,
        ),
    ])
}

const PLAIN: Connection = Connection::PLAIN;
const DELAY: u32 = 50;

fn guest() -> ColoVmm {
    ColoVmm::new("colo-vmm").memory(16)
}

fn reset(side: &mut Vmm) -> Result<()> {
    side.qmp.execute("system_reset", Value::Null)?;
    let event = side.qmp.wait_event("RESET")?;
    assert_eq!(
        event["data"],
        json!({"guest": false, "reason": "host-qmp-system-reset"})
    );
    Ok(())
}

/// What the guest has printed since its last first line. It counts from 1 each time, and may be cut off
/// in the middle of a line by the reset.
fn since_reset(text: &[u8]) -> Result<usize> {
    let first = b"00000001\n";
    let at = text.windows(first.len()).rposition(|w| w == first);
    let at = at.ok_or("no first line")?;
    check_count(0, text.get(at..).unwrap_or_default())
}

/// How often the guest has begun to count.
fn beginnings(text: &[u8]) -> usize {
    text.windows(9).filter(|w| w == b"00000001\n").count()
}

fn wait_beginnings(side: &mut Vmm, count: usize) -> Result<()> {
    side.poll("another first line", |vmm| {
        let text = vmm.output()?;
        let is_there = beginnings(&text) >= count && since_reset(&text)? > 3;
        Ok(is_there.then_some(()))
    })
}

fn is_reset(guest: &ColoVmm) -> Result<()> {
    let mut vmm = guest.start()?;
    vmm.wait_lines(3)?;
    reset(&mut vmm)?;
    wait_beginnings(&mut vmm, 2)?;
    assert_eq!(vmm.status()?, "running");
    // One that is stopped stays so.
    vmm.qmp.execute("stop", Value::Null)?;
    reset(&mut vmm)?;
    assert_eq!(vmm.status()?, "paused");
    let said = vmm.output()?.len();
    vmm.qmp.execute("cont", Value::Null)?;
    wait_beginnings(&mut vmm, 3)?;
    assert!(vmm.output()?.len() > said);
    Ok(())
}

fn is_reset_in_colo(guest: &ColoVmm) -> Result<()> {
    let mut pair = Pair::in_colo(guest, PLAIN, DELAY)?;
    for round in 2..5 {
        reset(&mut pair.primary)?;
        wait_beginnings(&mut pair.primary, round)?;
        let taken = pair.primary.checkpoints()?.len();
        pair.primary.wait_checkpoints(taken + 2)?;
    }
    let resets = |side: &Vmm| side.qmp.events().filter(|e| e["event"] == "RESET").count();
    // Each was taken when it was waited for; the resets of checkpoints are not told.
    assert_eq!((resets(&pair.primary), resets(&pair.secondary)), (0, 0));

    pair.primary.process.kill()?;
    let side = &mut pair.secondary;
    side.qmp.wait_event("COLO_EXIT")?;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    side.wait_migration("completed")?;
    side.wait_lines(20)?;
    // It goes on with the guest as it is since its last reset, and can be reset as well.
    let said = pair.primary.output()?;
    assert_eq!(beginnings(&said), 4);
    let lines = since_reset(&said)?;
    let heard = side.output()?;
    let (_, number) = tests::vmm::first_line(&heard)?;
    assert!(number <= lines as u64 + 2, "line {number} after {lines}");
    reset(side)?;
    wait_beginnings(side, 1)?;
    Ok(())
}

fn has_moved() -> Result<()> {
    let mut pair = Pair::start(&guest(), PLAIN, &["return-path"])?;
    pair.migrate(PLAIN)?;
    pair.primary.wait_migration("completed")?;
    pair.secondary.wait_lines(3)?;
    let refusal = pair.primary.qmp.refused("system_reset", Value::Null)?;
    assert!(refusal.desc.contains("postmigrate"), "{}", refusal.desc);
    reset(&mut pair.secondary)?;
    wait_beginnings(&mut pair.secondary, 1)
}

/// Real-mode code that prints an R, takes some time, and resets the machine.
const RESET: &[u8] = &[
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'R', // mov al, 'R'
    0xee, // out dx, al
    0xb9, 0x40, 0x00, // mov cx, 64
    0xba, 0x00, 0x10, // outer: mov dx, 4096
    0x4a, // inner: dec dx
    0x75, 0xfd, // jnz inner
    0xe2, 0xf8, // loop outer
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
];
/// Code that takes some time and writes 3 to the debug-exit port.
const EXIT: &[u8] = &[
    0xb9, 0x80, 0x00, // mov cx, 128
    0xba, 0x00, 0x10, // outer: mov dx, 4096
    0x4a, // inner: dec dx
    0x75, 0xfd, // jnz inner
    0xe2, 0xf8, // loop outer
    0xb0, 0x03, // mov al, 3
    0xe6, 0xf4, // out 0xf4, al
    0xf4, // hlt
];

fn runs(code: &[u8], dir: &Path) -> Result<ColoVmm> {
    let path = dir.join("code");
    fs::write(&path, code)?;
    let spec = format!("flat:{}@0x8000", path.display());
    Ok(guest().args(["--guest", &spec]))
}

fn reboots() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let code = runs(RESET, dir.path())?;
    let mut vmm = code.clone().args(["--reboot"]).start()?;
    for _ in 0..3 {
        let event = vmm.qmp.wait_event("RESET")?;
        assert_eq!(
            event["data"],
            json!({"guest": true, "reason": "guest-reset"})
        );
    }
    vmm.poll("three times R", |vmm| {
        Ok(vmm.output()?.starts_with(b"RRR").then_some(()))
    })?;
    assert_eq!(vmm.status()?, "running");
    // Without that it ends the process, and well.
    let mut vmm = code.start()?;
    assert!(vmm.process.wait()?.success());
    assert_eq!(vmm.output()?, b"R");
    Ok(())
}

fn stays() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut vmm = runs(EXIT, dir.path())?.args(["--no-shutdown"]).start()?;
    for _ in 0..2 {
        let event = vmm.qmp.wait_event("SHUTDOWN")?;
        assert_eq!(
            event["data"],
            json!({"guest": true, "reason": "guest-shutdown"})
        );
        assert_eq!(vmm.status()?, "shutdown");
        let refusal = vmm.qmp.refused("cont", Value::Null)?;
        assert_eq!(refusal.desc, "Resetting the Virtual Machine is required");
        reset(&mut vmm)?;
        assert_eq!(vmm.status()?, "paused");
        vmm.qmp.execute("cont", Value::Null)?;
    }
    Ok(())
}

fn stays_in_colo() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let code = runs(EXIT, dir.path())?;
    let mut pair = Pair {
        primary: code.args(["--no-shutdown", "--paused"]).start()?,
        secondary: guest().incoming().start()?,
    };
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.qmp.enable(&["events", "return-path", "x-colo"])?;
        side.qmp
            .set_parameters(json!({"x-checkpoint-delay": DELAY}))?;
    }
    pair.migrate(PLAIN)?;
    let side = &mut pair.primary;
    side.wait_checkpoints(2)?;
    side.poll("a moment between two checkpoints", |vmm| {
        Ok(vmm.qmp.execute("cont", Value::Null).ok())
    })?;
    side.qmp.wait_event("SHUTDOWN")?;
    let taken = side.checkpoints()?.len();
    side.wait_checkpoints(taken + 3)?;
    side.wait_status("shutdown")?;
    // It is the same guest when it is reset.
    reset(side)?;
    Ok(())
}
