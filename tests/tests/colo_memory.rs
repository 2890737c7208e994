//! What a secondary takes of memory, by what it keeps checkpoints in, and how a primary sends pages.

use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::guest::{Dirtier, Filler};
use tests::harness::{self, Needs};
use tests::resident::Resident;
use tests::vmm::{ColoVmm, Connection, Pair};
use tests::{PATIENCE, Result};

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING.kvm().test(
            "secondary_has_guest_memory_once_and_what_was_dirtied",
            || {
                let most = most_taken("cow")?;
                assert!(most <= 1.3, "{most:.3} times guest memory");
                Ok(())
            },
        ),
        Needs::NOTHING
            .kvm()
            .test("secondary_with_a_mirror_has_guest_memory_twice", || {
                let most = most_taken("mirror")?;
                assert!(most >= 1.9, "{most:.3} times guest memory");
                Ok(())
            }),
        Needs::NOTHING.test("pages_are_spliced_only_where_it_was_asked_for", splice_send),
    ])
}

/// Spliced pages take the way through a pipe of each channel, or of the main stream, over unix sockets.
fn splice_send() -> Result<()> {
    let over_unix = |connection| Connection {
        unix: true,
        ..connection
    };
    let channels = Connection::channels(2);
    for (connection, ends) in [
        (channels, 0),
        (over_unix(channels), 4),
        (Connection::PLAIN, 0),
        (over_unix(Connection::PLAIN), 2),
    ] {
        let more = |options: &[&'static str]| -> Result<i32> {
            let vmm = ColoVmm::new("colo-vmm")
                .simulated()
                .memory(16)
                .args(options.iter().copied());
            let pair = Pair::in_colo(&vmm, connection, DELAY)?;
            Ok(pipe_ends(pair.primary.process.id())? - pipe_ends(pair.secondary.process.id())?)
        };
        // What a primary has besides.
        let others = more(&[])?;
        let splices = more(&["--splice-send"])?;
        assert_eq!(splices - others, ends, "{connection:?}");
    }
    Ok(())
}

/// How many ends of pipes a process has.
fn pipe_ends(process: u32) -> Result<i32> {
    let mut ends = 0;
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let to = fs::read_link(entry?.path());
        ends += i32::from(to.is_ok_and(|to| to.to_string_lossy().starts_with("pipe:")));
    }
    Ok(ends)
}

/// Guest memory, MiB: much more than a process takes for itself.
const MEMORY: u32 = 256;
/// A tenth of it.
const DIRTIED_PAGES: u32 = (MEMORY << 8) / 10;
/// Between checkpoints, ms.
const DELAY: u32 = 200;

/// The most that a secondary takes while its guest uses all of its memory and dirties a tenth of it between
/// checkpoints, in parts of guest memory. The guest goes on in it afterwards.
fn most_taken(cache: &str) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let guest = Filler {
        end: MEMORY << 20,
        then: Dirtier {
            start: 16 << 20,
            pages: DIRTIED_PAGES,
        },
    };
    guest.write_disk(&disk)?;
    let vmm = ColoVmm::new("colo-vmm")
        .memory(MEMORY)
        .args(["--ram-cache", cache, "--guest"])
        .args([format!("boot:{}", disk.display())]);
    let mut pair = Pair::in_colo(&vmm, Connection::channels(2), DELAY)?;
    let mut most = 0;
    let wanted = pair.secondary.checkpoints()?.len() + 10;
    let dirty = |c: &Value| c["dirty-pages"].as_u64().unwrap_or_default();
    let deadline = Instant::now() + PATIENCE;
    loop {
        most = most.max(Resident::of(pair.secondary.process.id())?.total());
        let checkpoints = pair.primary.checkpoints()?;
        // All that the guest writes, as soon as it has had the time between two.
        let most_dirty = checkpoints.iter().map(dirty).max();
        let is_dirty = most_dirty >= Some(DIRTIED_PAGES.into());
        if is_dirty && pair.secondary.checkpoints()?.len() >= wanted {
            break;
        }
        assert!(Instant::now() < deadline, "{checkpoints:?}");
        thread::sleep(Duration::from_millis(5));
    }
    pair.primary.process.kill()?;
    pair.secondary.qmp.wait_event("COLO_EXIT")?;
    let go_on = "x-colo-lost-heartbeat";
    pair.secondary.qmp.execute(go_on, Value::Null)?;
    pair.secondary.wait_status("running")?;
    pair.secondary.wait_lines(2)?;
    Ok(most as f64 / f64::from(MEMORY << 20))
}
