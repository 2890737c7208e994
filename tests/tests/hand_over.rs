//! The end of a migration without COLO: whatever becomes of the answer, one guest runs at most, and
//! nobody runs it where it cannot be known.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use tests::Result;
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Connection, Vmm, check_count};

fn main() -> ExitCode {
    let kvm = |name, test: fn() -> Result<()>| Needs::NOTHING.kvm().test(name, test);
    harness::run_waiting([
        kvm("late_answer_completes_a_hand_over_that_was_unknown", late),
        kvm("late_answer_completes_by_channels_too", late_by_channels),
        kvm("target_does_not_run_what_an_operator_let_run_on", cont),
        kvm("unknown_hand_over_is_not_cancelled", cancel),
        kvm(
            "guest_whose_migration_was_cancelled_too_late_waits_for_its_operator",
            cancelled_too_late,
        ),
        kvm(
            "guest_is_kept_by_a_source_whose_target_dies_unconfirmed",
            || {
                for moment in ["stream loaded#1", "to confirm#1"] {
                    dies_at(moment)?;
                }
                Ok(())
            },
        ),
        kvm(
            "second_guest_is_taken_after_a_failed_one_and_nothing_is_left_of_the_error",
            second_attempt,
        ),
        kvm(
            "source_may_pause_for_longer_than_its_target_waits",
            long_pause,
        ),
        kvm(
            "return_path_that_only_the_source_wants_is_answered",
            return_path_of_the_source,
        ),
        kvm(
            "guest_of_a_target_that_dies_confirmed_stays_handed_over",
            || {
                let (mut source, mut target) = pair(PLAIN, &["--die-at", "confirmed#1"])?;
                target.process.wait()?;
                source.wait_migration("completed")?;
                assert_eq!(source.status()?, "postmigrate");
                Ok(())
            },
        ),
    ])
}

const PLAIN: Connection = Connection::PLAIN;
/// How long the source waits for its target.
const SHORT: [&str; 2] = ["--peer-timeout", "1500"];

/// A source that hands its guest over, and its target, which was frozen before it could answer or has
/// the arguments `target`.
fn pair(connection: Connection, target: &[&str]) -> Result<(Vmm, Vmm)> {
    pair_of(&SHORT, connection, target)
}

/// The same with the arguments `source`.
fn pair_of(source: &[&str], connection: Connection, target: &[&str]) -> Result<(Vmm, Vmm)> {
    // So few that what is left at the switch-over fits into the sockets of a frozen target.
    let guest = ColoVmm::new("colo-vmm").dirty_pages(20);
    let mut source = guest
        .clone()
        .args(source.iter().copied())
        .named("source")
        .start()?;
    let is_frozen = target.is_empty();
    let mut target = guest
        .args(target.iter().copied())
        .named("target")
        .incoming()
        .start()?;
    let capabilities = ["return-path", "events", "pause-before-switchover"];
    connection.prepare(&mut source, &capabilities)?;
    connection.prepare(&mut target, &["return-path"])?;
    source.wait_lines(5)?;
    let uri = connection.listen(&mut target)?;
    source.migrate(&uri)?;
    source.wait_migration("pre-switchover")?;
    if is_frozen {
        target.freeze()?;
    }
    source
        .qmp
        .execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    Ok((source, target))
}

/// A source whose frozen target has everything and did not answer in time.
fn unknown(connection: Connection) -> Result<(Vmm, Vmm)> {
    let (mut source, target) = pair(connection, &[])?;
    let migration = source.wait_migration("failing")?;
    let told = migration["error-desc"].as_str().unwrap_or_default();
    assert!(told.contains("the outcome is unknown"), "{told}");
    assert!(told.contains("'cont'") && told.contains("'quit'"), "{told}");
    let event = source.qmp.wait_event("X_MIGRATION_UNKNOWN")?;
    assert_eq!(event["data"]["reason"], migration["error-desc"]);
    assert_eq!(source.status()?, "paused");
    Ok((source, target))
}

fn completes(connection: Connection) -> Result<()> {
    let (mut source, mut target) = unknown(connection)?;
    target.thaw()?;
    let migration = source.wait_migration("completed")?;
    assert_eq!(migration["error-desc"], Value::Null);
    target.wait_migration("completed")?;
    assert_eq!(source.status()?, "postmigrate");
    target.wait_lines(5)?;
    // The guest goes on with the next byte.
    let said = [source.output()?, target.output()?].concat();
    check_count(0, &said)?;
    Ok(())
}

fn late() -> Result<()> {
    completes(PLAIN)
}

fn late_by_channels() -> Result<()> {
    completes(Connection::channels(2))
}

fn cont() -> Result<()> {
    let (mut source, mut target) = unknown(PLAIN)?;
    source.qmp.execute("cont", Value::Null)?;
    assert_eq!(source.status()?, "running");
    let reason = source.wait_failure()?;
    assert!(reason.contains("did not say whether"), "{reason}");
    source.wait_lines(5)?;
    target.thaw()?;
    let reason = target.wait_failure()?;
    assert!(
        reason.contains("before it was told that the guest"),
        "{reason}"
    );
    assert_ne!(target.status()?, "running");
    assert_eq!(target.output()?, b"");
    source.wait_lines(5)?;
    check_count(0, &source.output()?)?;
    Ok(())
}

fn cancel() -> Result<()> {
    let (mut source, mut target) = unknown(PLAIN)?;
    let refusal = source.qmp.refused("migrate_cancel", Value::Null)?;
    assert!(refusal.desc.contains("may run the guest"), "{refusal:?}");
    assert_eq!(source.status()?, "paused");
    // The other side is not dead: its guest runs, and this one's must not.
    target.thaw()?;
    target.wait_migration("completed")?;
    source.wait_migration("completed")?;
    Ok(())
}

/// Cancelled when everything was sent and the answer is waited for.
fn cancelled_too_late() -> Result<()> {
    let (mut source, mut target) = pair_of(&["--peer-timeout", "60000"], PLAIN, &[])?;
    source.wait_migration("device")?;
    // What is left is sent in far less than that.
    std::thread::sleep(Duration::from_secs(2));
    source.qmp.execute("migrate_cancel", Value::Null)?;
    let migration = source.wait_migration("failing")?;
    let told = migration["error-desc"].as_str().unwrap_or_default();
    assert!(told.contains("the outcome is unknown"), "{told}");
    assert_eq!(source.status()?, "paused");
    source.qmp.execute("cont", Value::Null)?;
    assert_eq!(source.status()?, "running");
    target.thaw()?;
    target.wait_failure()?;
    source.wait_lines(5)?;
    check_count(0, &source.output()?)?;
    Ok(())
}

fn long_pause() -> Result<()> {
    let guest = ColoVmm::new("colo-vmm").dirty_pages(20);
    let mut source = guest.clone().named("source").start()?;
    let mut target = guest.args(SHORT).named("target").incoming().start()?;
    PLAIN.prepare(&mut source, &["return-path", "pause-before-switchover"])?;
    PLAIN.prepare(&mut target, &["return-path"])?;
    source.wait_lines(5)?;
    let uri = target.listen()?;
    source.migrate(&uri)?;
    source.wait_migration("pre-switchover")?;
    // Twice as long as the target waits for a silent source.
    std::thread::sleep(Duration::from_secs(3));
    source
        .qmp
        .execute("migrate-continue", json!({"state": "pre-switchover"}))?;
    source.wait_migration("completed")?;
    target.wait_migration("completed")?;
    target.wait_lines(5)?;
    Ok(())
}

fn dies_at(moment: &str) -> Result<()> {
    let (mut source, mut target) = pair(PLAIN, &["--die-at", moment])?;
    target.process.wait()?;
    let reason = source.wait_failure()?;
    assert!(reason.contains("without confirming"), "{moment}: {reason}");
    assert_eq!(source.status()?, "running", "{moment}");
    source.wait_lines(5)?;
    check_count(0, &source.output()?)?;
    Ok(())
}

/// A guest of another UUID is refused, with `exit-on-error` false; the right one comes afterwards.
fn second_attempt() -> Result<()> {
    let guest = ColoVmm::new("colo-vmm").dirty_pages(20);
    let (one, other) = (
        "00112233-4455-6677-8899-aabbccddeeff",
        "00112233-4455-6677-8899-aabbccddee00",
    );
    let start = |uuid| guest.clone().args(["--uuid", uuid]);
    let mut wrong = start(other).named("wrong").start()?;
    let mut source = start(one).named("source").start()?;
    let mut target = start(one).named("target").incoming().start()?;
    let capabilities = ["return-path", "validate-uuid"];
    for vmm in [&mut wrong, &mut source, &mut target] {
        PLAIN.prepare(vmm, &capabilities)?;
    }
    source.wait_lines(5)?;
    let uri = target.listen()?;
    wrong.migrate(&uri)?;
    let reason = target.wait_failure()?;
    assert!(reason.contains("uuid"), "{reason}");
    wrong.wait_failure()?;
    assert_eq!(wrong.status()?, "running");
    // The first attempt's thread may not have ended yet.
    let uri = target.poll("a second migrate-incoming", |target| {
        Ok(target.listen().ok())
    })?;
    source.migrate(&uri)?;
    source.wait_migration("completed")?;
    let migration = target.wait_migration("completed")?;
    assert_eq!(migration["error-desc"], Value::Null, "{migration}");
    target.wait_lines(5)?;
    check_count(0, &[source.output()?, target.output()?].concat())?;
    // The one that failed goes to another target, and says nothing of it any more.
    let mut another = start(other).named("another").incoming().start()?;
    PLAIN.prepare(&mut another, &capabilities)?;
    let uri = another.listen()?;
    wrong.migrate(&uri)?;
    let migration = wrong.wait_migration("completed")?;
    assert_eq!(migration["error-desc"], Value::Null, "{migration}");
    Ok(())
}

fn return_path_of_the_source() -> Result<()> {
    let guest = ColoVmm::new("colo-vmm").dirty_pages(20);
    let mut source = guest.clone().named("source").start()?;
    let mut target = guest.named("target").incoming().start()?;
    PLAIN.prepare(&mut source, &["return-path"])?;
    source.wait_lines(5)?;
    let uri = target.listen()?;
    source.migrate(&uri)?;
    source.wait_migration("completed")?;
    target.wait_migration("completed")?;
    target.wait_lines(5)?;
    Ok(())
}
