//! A guest that writes what is there already: its pages are dirty, and have not to cross.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{Checker, Rewriter};
use tests::harness::{self, Needs};
use tests::vmm::{ColoVmm, Connection, Pair};
use tests::{PATIENCE, Result};

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING
            .kvm()
            .test("pages_cross_as_often_as_they_change", || {
                rewritten(Connection::channels(2), &["--ram-cache", "cow"])
            }),
        Needs::NOTHING.kvm().test(
            "pages_cross_as_often_as_they_change_on_the_main_stream",
            || rewritten(Connection::default(), &["--ram-cache", "mirror"]),
        ),
        Needs::NOTHING.kvm().test(
            "pages_cross_as_often_as_they_change_with_an_early_resume_and_ahead",
            || {
                let early = [
                    "--output-commit",
                    "--resume",
                    "copied",
                    "--gap-bandwidth",
                    "0",
                ];
                rewritten(Connection::channels(2), &early)
            },
        ),
    ])
}

/// What the guest writes in each pass.
const PAGES: u32 = 2560;
/// The logarithm of the number of passes in which that is the same.
const LOG_PASSES: u8 = 6;
/// Between checkpoints, ms.
const DELAY: u32 = 50;
/// Pages besides, by checkpoint: what devices and firmware write.
const OTHERS: u64 = 8;

/// Pages cross as often as they change, not as often as they are written; then the primary dies, and its
/// guest finds every page as it was.
fn rewritten(connection: Connection, args: &[&str]) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let guest = Rewriter {
        start: 4 << 20,
        pages: PAGES,
        log_passes: LOG_PASSES,
    };
    guest.write_disk(&disk)?;
    let vmm = ColoVmm::new("colo-vmm")
        .args(["--skip-unchanged", "always"])
        .args(args)
        .args(["--guest".to_owned(), format!("boot:{}", disk.display())]);
    let mut pair = Pair::in_colo(&vmm, connection, DELAY)?;

    let began = Instant::now();
    let pages = u64::from(PAGES);
    loop {
        let checkpoints = pair.primary.checkpoints()?;
        let sum = |of: fn(&Value) -> u64| checkpoints.iter().map(of).sum::<u64>();
        let (crossed, unchanged) = (sum(crossed), sum(unchanged));
        // The guest prints a byte in each pass.
        let changes = |c: Option<&Value>| c.map_or(0, |c| number(c, "serial-bytes") >> LOG_PASSES);
        let (first, last) = (changes(checkpoints.first()), changes(checkpoints.last()));
        let of_others = OTHERS * checkpoints.len() as u64;
        let told = format!("{crossed} crossed, {unchanged} did not, {first} to {last} changes");
        // All of the first checkpoint, what changed since, and what is changing when it is asked.
        assert!(crossed <= (last - first + 2) * pages + of_others, "{told}");
        if last >= first + 2 && unchanged >= pages {
            assert!(crossed >= 2 * pages, "{told}");
            break;
        }
        if began.elapsed() > PATIENCE {
            return Err(told.into());
        }
        thread::sleep(Duration::from_millis(20));
    }

    pair.primary.process.kill()?;
    let side = &mut pair.secondary;
    side.qmp.wait_event("COLO_EXIT")?;
    side.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
    side.wait_status("running")?;
    let wanted = side.output()?.len() + 200;
    let began = Instant::now();
    while side.output()?.len() < wanted {
        if began.elapsed() > PATIENCE {
            return Err("the survivor does not go on".into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Checker::passes(&side.output()?)?;
    Ok(())
}

fn number(checkpoint: &Value, key: &str) -> u64 {
    checkpoint[key].as_u64().unwrap_or_default()
}

fn unchanged(checkpoint: &Value) -> u64 {
    number(checkpoint, "unchanged-pages")
}

/// Pages that crossed for a checkpoint, within it or ahead of it.
fn crossed(checkpoint: &Value) -> u64 {
    let dirty = number(checkpoint, "dirty-pages") + number(checkpoint, "ahead-pages");
    dirty - unchanged(checkpoint)
}
