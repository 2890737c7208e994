//! A disk that is full, or becomes it: under a serial line, under the arbiter's lock file, and under a
//! guest that is being written. Who writes one says which file had no room, somebody still has the guest,
//! and what was written of it is never taken for a whole one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::disk::Disk;
use tests::harness::{Needs, Tests};
use tests::process::{Process, workspace_program};
use tests::vmm::{ColoVmm, Pair, Side, Vmm, check_count, first_line};
use tests::{PATIENCE, Result};

use crate::{DELAY, PLAIN, answers_until, enter, goes_on, goes_on_alone, guest, watched};

type Test = fn() -> Result<()>;

pub fn trials() -> Vec<Tests> {
    let mut trials = Vec::new();
    for (guest, kvm) in [("kvm", true), ("simulated", false)] {
        let test = Needs::NOTHING.disk().kvm_if(kvm).test(
            &format!("{guest}_guest_does_not_notice_that_its_serial_line_ends_in_a_full_disk"),
            move || full_disk(kvm),
        );
        trials.push(test.sampled(&["full disk"]));
    }
    let simulated: [(&str, Test); 8] = [
        (
            "right_to_run_is_kept_and_claimed_on_a_full_disk",
            full_arbiter,
        ),
        (
            "colo_does_not_begin_when_the_right_cannot_be_written",
            no_room_for_the_right,
        ),
        (
            "guest_whose_copy_finds_no_room_in_a_store_runs_on",
            full_store,
        ),
        ("guest_whose_copy_finds_no_room_in_a_file_runs_on", || {
            full_file(&[])
        }),
        (
            "guest_whose_copy_finds_no_room_in_a_file_with_mapped_ram_runs_on",
            || full_file(&["--out-mapped-ram", "--out-threads", "2"]),
        ),
        (
            "store_is_whole_or_not_there_whatever_it_finds_no_room_for",
            every_room_for_a_store,
        ),
        (
            "file_is_whole_or_not_there_whatever_it_finds_no_room_for",
            every_room_for_a_file,
        ),
        (
            "standby_whose_guest_finds_no_room_holds_it_and_restores_it_elsewhere",
            full_standby,
        ),
    ];
    trials.extend(simulated.map(|(name, test)| Needs::NOTHING.disk().test(name, test)));
    trials
}

/// What a disk of a store or a file says that has no room.
const FULL: &str = "No space left on device";
/// What a side says whose guest's output has no room.
const UNHEARD: &str = "the serial line's reader takes nothing";
/// By which a disk's room is given away, bytes.
const PAGE: usize = 4096;
/// KiB by which one disk is larger than another.
const STEP: u32 = 4;
/// A disk on which everything has room, KiB.
const LARGE: u32 = 4096;

/// A side whose files, serial line included, are in `place`.
fn start_in(guest: &ColoVmm, name: &str, place: &Path) -> Result<Vmm> {
    let dir = tempfile::Builder::new().tempdir_in(place)?;
    let command = guest.command(dir.path())?;
    Vmm::start(name, command, dir)
}

fn full_disk(kvm: bool) -> Result<()> {
    let (disk, dir) = (Disk::new(256)?, tempfile::tempdir()?);
    let guest = watched(kvm, dir.path());
    let mut pair = Pair {
        secondary: guest.clone().incoming().start()?,
        primary: start_in(&guest, "primary", disk.path())?,
    };
    enter(&mut pair, PLAIN)?;
    disk.fill()?;
    // There is room for the rest of the page that the file ends in, and then for nothing.
    answers_until(&mut pair.primary, "full file", PATIENCE, |side| {
        let log = side.process.stderr().text();
        Ok(side.output()?.len() % PAGE == 0 && log.contains(UNHEARD))
    })?;
    let length = pair.primary.output()?.len();
    goes_on(&mut pair)?;
    let said = pair.primary.output()?;
    assert_eq!(said.len(), length, "the disk is not full");
    check_count(0, &said)?;
    let log = pair.primary.process.stderr().text();
    let warnings = log.matches(UNHEARD);
    assert_eq!(warnings.count(), 1, "{log}");
    // There is room again, and what the guest says now is heard.
    disk.free()?;
    pair.primary.wait_lines(3)?;
    pair.primary.process.kill()?;
    goes_on_alone(&mut pair.secondary)?;
    pair.secondary.wait_lines(3)?;
    let heard = pair.secondary.output()?;
    let (begin, _) = first_line(&heard)?;
    check_count(begin, &heard)?;
    assert!(begin > length as u64, "the guest stood still meanwhile");
    Ok(())
}

fn full_arbiter() -> Result<()> {
    let disk = Disk::new(64)?;
    let guest = watched(false, disk.path());
    let mut pair = Pair {
        secondary: guest.clone().incoming().start()?,
        primary: guest.start()?,
    };
    enter(&mut pair, PLAIN)?;
    disk.fill()?;
    // Longer than the right lasts that is not renewed.
    thread::sleep(Duration::from_secs(3));
    goes_on(&mut pair)?;
    assert_eq!(pair.primary.heartbeat()?["arbiter-state"], "won");
    pair.primary.process.kill()?;
    goes_on_alone(&mut pair.secondary)?;
    pair.secondary.wait_lines(3)
}

fn no_room_for_the_right() -> Result<()> {
    let disk = Disk::new(64)?;
    let guest = watched(false, disk.path());
    let mut pair = Pair {
        secondary: guest.clone().incoming().start()?,
        primary: guest.start()?,
    };
    disk.fill()?;
    pair.set_up(PLAIN, DELAY)?;
    pair.migrate(PLAIN)?;
    let reason = pair.primary.wait_failure()?;
    assert!(
        reason.contains("the arbiter does not grant this guest"),
        "{reason}"
    );
    assert!(reason.contains("No space left"), "{reason}");
    assert_eq!(pair.primary.status()?, "running");
    pair.primary.wait_lines(3)?;
    // With room for it, it goes on as if nothing had been.
    disk.free()?;
    let migration = pair.secondary.migration()?;
    let port = migration["socket-address"][0]["port"].as_str();
    let uri = format!("tcp:127.0.0.1:{}", port.ok_or("listens nowhere")?);
    pair.primary.migrate(&uri)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_checkpoints(3)?;
    }
    check_count(0, &pair.primary.output()?)?;
    Ok(())
}

/// `stream-relay` with these arguments.
fn relay(args: &[&str]) -> Result<Process> {
    let mut relay = Command::new(workspace_program("stream-relay", "stream-relay")?);
    Process::spawn("stream-relay", relay.args(args))
}

/// All that it says of what has gone wrong.
fn said(relay: &Process) -> Result<String> {
    Ok(String::from_utf8(relay.stderr().whole()?)?)
}

/// How it ends, and what it says.
fn relayed(args: &[&str]) -> Result<(ExitStatus, String)> {
    let mut relay = relay(args)?;
    let status = relay.wait()?;
    Ok((status, said(&relay)?))
}

/// Migrates a guest into a relay that has no room for it. Returns what the relay says.
fn source_runs_on(args: &[&str]) -> Result<String> {
    let dir = TempDir::new()?;
    let address = format!("unix:{}", dir.path().join("relay").display());
    let mut relay = relay(&[&["--incoming", &address], args].concat())?;
    let mut source = guest(false).start()?;
    source.qmp.enable(&["return-path"])?;
    let deadline = Instant::now() + PATIENCE;
    while !dir.path().join("relay").exists() {
        if Instant::now() > deadline {
            return Err(relay.failure("does not listen"));
        }
        thread::sleep(Duration::from_millis(5));
    }
    source.wait_lines(1)?;
    source.migrate(&address)?;
    let status = relay.wait()?;
    let said = said(&relay)?;
    assert!(!status.success(), "{said}");
    let reason = source.wait_failure()?;
    assert!(!reason.is_empty());
    source.wait_status("running")?;
    source.wait_lines(3)?;
    check_count(0, &source.output()?)?;
    Ok(said)
}

/// It says that `file` had no room, and nothing has become of what it had written.
fn left_nothing(disk: &Disk, file: &Path, said: &str) -> Result<()> {
    assert!(said.contains(FULL), "{said}");
    let name = file.to_str().ok_or("a path that is no text")?;
    assert!(said.contains(name), "{said}");
    let left: Vec<_> = fs::read_dir(disk.path())?.collect::<std::io::Result<_>>()?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    Ok(path.to_str().ok_or("a path that is no text")?)
}

/// The guest is on its way into a store that does not hold it.
fn full_store() -> Result<()> {
    let disk = Disk::new(64)?;
    let said = source_runs_on(&["--store", text(&disk.path().join("store"))?])?;
    // It is not yet called what it will be.
    left_nothing(&disk, &disk.path().join(".store."), &said)
}

/// The same into a file.
fn full_file(options: &[&str]) -> Result<()> {
    let disk = Disk::new(64)?;
    let file = disk.path().join("guest");
    let address = format!("file:{}", file.display());
    let said = source_runs_on(&[&["--outgoing", &address], options].concat())?;
    left_nothing(&disk, &file, &said)
}

/// A guest in a store of its own.
fn stored(dir: &Path) -> Result<PathBuf> {
    let store = dir.join("stored");
    let address = format!("unix:{}", dir.join("relay").display());
    let mut relay = relay(&["--incoming", &address, "--store", text(&store)?])?;
    let mut source = guest(false).start()?;
    source.qmp.enable(&["return-path"])?;
    source.wait_lines(1)?;
    relay.stdout().wait_for("address", |said| {
        said.starts_with(b"listening").then_some(())
    })?;
    source.migrate(&address)?;
    source.wait_migration("completed")?;
    assert!(relay.wait()?.success(), "{}", said(&relay)?);
    Ok(store)
}

/// Writes the guest to disks that are larger and larger, until one has room for it. `write` is given
/// the place on the disk.
fn every_room(write: impl Fn(&Path) -> Result<(ExitStatus, String)>) -> Result<()> {
    // What takes most is memory, and has room last; so the last pages are those of all else.
    for (failures, kib) in (STEP..LARGE).step_by(usize::try_from(STEP)?).enumerate() {
        let disk = Disk::new(kib)?;
        let place = disk.path().join("guest");
        let (status, said) = write(&place)?;
        if status.success() {
            assert!(place.exists());
            println!("{failures} disks were too small, one of {kib} KiB was not");
            // More than one for each of a store's files.
            assert!(failures > 20, "{failures}");
            return Ok(());
        }
        assert!(said.contains("still"), "who has the guest? {said}");
        assert!(said.contains(FULL), "{said}");
        assert!(said.contains(text(disk.path())?), "{said}");
        let left: Vec<_> = fs::read_dir(disk.path())?.collect::<std::io::Result<_>>()?;
        assert!(left.is_empty(), "{kib} KiB: {left:?}");
    }
    Err(format!("{LARGE} KiB were not enough").into())
}

fn every_room_for_a_store() -> Result<()> {
    let dir = TempDir::new()?;
    let store = stored(dir.path())?;
    let file = format!("file:{}", dir.path().join("saved").display());
    let (status, said) = relayed(&["--store", text(&store)?, "--outgoing", &file])?;
    assert!(status.success(), "{said}");
    every_room(|place| relayed(&["--incoming", &file, "--store", text(place)?]))
}

fn every_room_for_a_file() -> Result<()> {
    let dir = TempDir::new()?;
    let store = stored(dir.path())?;
    for options in [&[][..], &["--out-mapped-ram", "--out-threads", "2"]] {
        every_room(|place| {
            let file = format!("file:{}", place.display());
            relayed(&[&["--store", text(&store)?, "--outgoing", &file], options].concat())
        })?;
    }
    Ok(())
}

/// A standby that is to restore its guest into a file on a full disk.
fn full_standby() -> Result<()> {
    let (disk, dir) = (Disk::new(64)?, TempDir::new()?);
    let file = disk.path().join("guest");
    let address = format!("unix:{}", dir.path().join("standby").display());
    let standby = Vmm::standby([
        "--incoming",
        &address,
        "--on-peer-loss",
        "take-over",
        "--restore-into",
        &format!("file:{}", file.display()),
    ])?;
    let primary = guest(false).start()?;
    let mut pair = Pair {
        primary,
        secondary: standby,
    };
    pair.primary
        .qmp
        .enable(&["events", "return-path", "x-colo"])?;
    let parameters = json!({"x-checkpoint-delay": DELAY, "max-bandwidth": 0});
    pair.primary.qmp.set_parameters(parameters)?;
    pair.primary.wait_lines(1)?;
    let elsewhere = dir.path().join("guest");
    let elsewhere = format!("file:{}", elsewhere.display());
    let refusal = pair
        .secondary
        .qmp
        .refused("migrate", json!({"uri": elsewhere}))?;
    assert!(refusal.desc.contains("failed"), "{}", refusal.desc);
    pair.primary.migrate(&address)?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_checkpoints(3)?;
    }
    pair.primary.process.kill()?;
    let standby = &mut pair.secondary;
    for attempt in 0..3 {
        let reason = standby.wait_failure()?;
        left_nothing(&disk, &file, &reason)?;
        // It is held as before, and who holds it answers.
        assert_eq!(standby.status()?, "paused");
        let again = match attempt {
            0 | 1 => "x-colo-lost-heartbeat",
            _ => break,
        };
        standby.qmp.execute(again, Value::Null)?;
        standby.poll("another attempt", |standby| {
            let log = standby.process.stderr().text();
            let failures = log.matches("the guest was not restored").count();
            Ok((failures > attempt + 1).then_some(()))
        })?;
    }
    standby.migrate(&elsewhere)?;
    assert!(standby.process.wait()?.success());
    // All of it: it goes on from its last complete checkpoint.
    let mut next = ColoVmm::new("next").memory(16).dirty_pages(64).simulated();
    next = next.args(["--pass-delay", "2000000"]).incoming();
    let mut next = next.start()?;
    next.qmp.enable(&["return-path"])?;
    let uri = next.listen()?;
    let (status, said) = relayed(&["--incoming", &elsewhere, "--outgoing", &uri])?;
    assert!(status.success(), "{said}{}", next.migration()?);
    next.wait_status("running")?;
    next.wait_lines(3)?;
    pair.secondary = next;
    pair.check_history(Side::Secondary)
}
