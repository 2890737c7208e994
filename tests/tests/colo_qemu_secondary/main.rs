//! A real QEMU as the secondary of a primary that is made of our libraries: whatever the primary does to
//! send less or to stand still for less long, when it is lost QEMU has every page of the last complete
//! checkpoint, and its guest goes on from there.

mod primary;

use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use colo_core::Resume;
use serde_json::{Value, json};
use stream_relay::guest::Guest;
use tests::contents::{self, Contents};
use tests::guest::{self, Checker};
use tests::harness::{self, Needs};
use tests::qemu::{Accel, Binary, Machine, Qemu};
use tests::{PATIENCE, Result, stored};

use primary::{Pages, Primary, Way};

/// The first QEMU whose secondary takes multifd's pages.
const SINCE: (u32, u32) = (11, 0);
/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// The guest checks these pages as long as it runs, and writes all of them in each pass.
const CHECKER: Checker = Checker {
    start: 4 << 20,
    pages: 256,
};
/// Pages that the primary's guest changes: neither the checker's nor the firmware's.
const CHANGED: Range<u64> = 8 << 8..28 << 8;
/// Checkpoints at least; more until each option has been of use.
const CHECKPOINTS: u64 = 6;
/// How often a state that nobody tells of is looked at.
const POLL: Duration = Duration::from_millis(2);
/// Some rounds of pages; far more than QEMU needs to read what has arrived.
const A_WHILE: Duration = Duration::from_millis(100);
/// Batches of writes that take longer to send than the primary needs to die.
const BATCHES: usize = 30;

const PLAIN: Way = Way {
    channels: 0,
    ahead: false,
    skip: false,
    resume: Resume::OnLoaded,
};
const CHANNELS: Way = Way {
    channels: 2,
    ..PLAIN
};
const AHEAD: Way = Way {
    ahead: true,
    ..CHANNELS
};
const UNCHANGED: Way = Way {
    skip: true,
    ..PLAIN
};
const UNCHANGED_CHANNELS: Way = Way {
    skip: true,
    ..CHANNELS
};
const EARLY: Way = Way {
    resume: Resume::OnLocalCopy,
    ..PLAIN
};
const RECEIVED: Way = Way {
    resume: Resume::OnReceived,
    ..CHANNELS
};
/// All options there are with channels.
const ALL: Way = Way {
    skip: true,
    resume: Resume::OnLocalCopy,
    ..AHEAD
};
/// All options there are without.
const ALL_PLAIN: Way = Way {
    skip: true,
    resume: Resume::OnLocalCopy,
    ..PLAIN
};

fn main() -> ExitCode {
    let tcg =
        |name, test: fn(&Binary) -> Result<()>| Needs::NOTHING.qemu(SINCE).test_qemu(name, test);
    let kvm = |name, test: fn(&Binary) -> Result<()>| {
        Needs::NOTHING.kvm().qemu(SINCE).test_qemu(name, test)
    };
    harness::run([
        tcg("every_page_is_the_last_checkpoints", |q| {
            stands_still(q, "q35", PLAIN)
        }),
        tcg("every_page_is_the_last_checkpoints_multifd", |q| {
            stands_still(q, "pc", CHANNELS)
        }),
        tcg("every_page_is_the_last_checkpoints_sent_ahead", |q| {
            stands_still(q, "q35", AHEAD)
        }),
        tcg("every_page_is_the_last_checkpoints_left_out", |q| {
            stands_still(q, "pc", UNCHANGED)
        }),
        tcg("every_page_is_the_last_checkpoints_left_out_multifd", |q| {
            stands_still(q, "microvm", UNCHANGED_CHANNELS)
        }),
        tcg("every_page_is_the_last_checkpoints_early_resume", |q| {
            stands_still(q, "microvm", EARLY)
        }),
        tcg(
            "every_page_is_the_last_checkpoints_resumed_when_received",
            |q| stands_still(q, "q35", RECEIVED),
        ),
        tcg("every_page_is_the_last_checkpoints_all_options", |q| {
            stands_still(q, "q35", ALL_PLAIN)
        }),
        tcg(
            "every_page_is_the_last_checkpoints_all_options_multifd",
            |q| stands_still(q, "q35", ALL),
        ),
        tcg("pages_sent_ahead_do_not_outlive_a_yank", yanked),
        tcg("guest_goes_on", |q| {
            goes_on(q, "q35", Accel::Tcg, ALL_PLAIN)
        }),
        kvm("guest_goes_on_multifd", |q| {
            goes_on(q, "pc", Accel::Kvm, ALL)
        }),
    ])
}

fn machine(kind: &str, accel: Accel, disk: &Path) -> Machine {
    Machine::new(kind, MEMORY)
        .accel(accel)
        .boot(disk)
        .running()
        .args(["-serial", "stdio"])
}

/// The guest that `machine` boots, as it is some time after it has printed something.
fn captured(qemu: &Binary, machine: &Machine, wait: fn(&mut Qemu) -> Result<()>) -> Result<Guest> {
    let mut vm = machine.start(qemu)?;
    wait(&mut vm)?;
    let file = format!("file:{}", vm.dir().join("guest").display());
    vm.migrate(&file)?;
    vm.wait_migration("completed")?;
    stored::read(&file)
}

/// Waits until the guest has printed more than it has by now.
fn more_output(vm: &mut Qemu) -> Result<()> {
    let stdout = vm.process.stdout();
    let printed = stdout.bytes().len();
    stdout.wait_for("more", |bytes| (bytes.len() > printed).then_some(()))
}

/// Waits until the processor stands still.
fn halted(vm: &mut Qemu) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let command = json!({"command-line": "info registers"});
        let registers = vm.qmp.execute("human-monitor-command", command)?;
        let is_halted = registers.as_str().is_some_and(|r| r.contains("HLT=1"));
        if is_halted && !vm.process.stdout().bytes().is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(vm.process.failure("does not stand still"));
        }
        thread::sleep(POLL);
    }
}

/// A primary and its QEMU.
struct Pair {
    primary: Primary,
    secondary: Qemu,
}

impl Pair {
    /// A pair in COLO, whose guest is a [`Checker`].
    fn start(qemu: &Binary, kind: &str, accel: Accel, way: Way) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk");
        CHECKER.write_disk(&disk)?;
        let machine = machine(kind, accel, &disk);
        let guest = captured(qemu, &machine, more_output)?;
        let mut secondary = machine.incoming().start(qemu)?;
        secondary.qmp.enable(&["return-path", "x-colo"])?;
        let mut uri = "tcp:127.0.0.1:0".to_owned();
        if way.channels > 0 {
            secondary.qmp.enable(&["multifd"])?;
            let channels = json!({"multifd-channels": way.channels});
            secondary.qmp.set_parameters(channels)?;
            uri = format!("unix:{}", secondary.dir().join("incoming").display());
        }
        let to = secondary.listen(&uri)?;
        let first = u64::from(CHECKER.start >> 12);
        let pages = Pages {
            change: CHANGED,
            stay: first..first + u64::from(CHECKER.pages),
        };
        let primary = Primary::start(&guest, pages, &to, way)?;
        secondary.wait_migration("colo")?;
        Ok(Self { primary, secondary })
    }

    /// Takes checkpoints until every option has been of use. Between two of them the secondary's own guest
    /// writes.
    fn checkpoints(&mut self, way: Way) -> Result<()> {
        let began = Instant::now();
        let (mut ahead, mut within, mut unchanged) = (0, 0, 0);
        for number in 1.. {
            let is_of_use = (ahead > 0 || !way.ahead) && (unchanged > 0 || !way.skip);
            if number > CHECKPOINTS && within > 0 && is_of_use {
                break;
            }
            if began.elapsed() > PATIENCE {
                let text = format!("pages: {ahead} ahead, {within} within, {unchanged} unchanged");
                return Err(text.into());
            }
            more_output(&mut self.secondary)?;
            if way.ahead {
                self.primary.wait_read()?;
            }
            let (report, _) = self.primary.checkpoint()?;
            ahead += report.background_pages;
            within += report.dirty_pages;
            unchanged += report.unchanged_pages;
        }
        Ok(())
    }

    /// As [`Self::start`], but that the guest stands still from the last checkpoint on; and what memory was in
    /// that.
    fn standing_still(qemu: &Binary, kind: &str, way: Way) -> Result<(Self, Contents)> {
        let mut pair = Self::start(qemu, kind, Accel::Tcg, way)?;
        let dir = tempfile::tempdir()?;
        let disk = dir.path().join("disk");
        guest::write_halting_disk(&disk)?;
        let still = captured(qemu, &machine(kind, Accel::Tcg, &disk), halted)?;
        pair.checkpoints(way)?;
        // It has written since it was the checkpoint's.
        more_output(&mut pair.secondary)?;
        pair.primary.become_another(&still);
        let (_, expected) = pair.primary.checkpoint()?;
        assert_ne!(pair.primary.contents()?, expected);
        Ok((pair, expected))
    }
}

/// The secondary goes on alone, with a guest that has found its memory sound all the time.
fn fail_over(secondary: &mut Qemu) -> Result<()> {
    let exit = secondary.qmp.wait_event("COLO_EXIT")?;
    assert_eq!(exit["data"]["mode"], "secondary", "{exit}");
    // What its channels read from here on would be the guest's memory: they have to have read it all.
    thread::sleep(A_WHILE);
    secondary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    secondary.wait_migration("completed")?;
    secondary.wait_status("running")?;
    sound(&secondary.process.stdout().bytes())
}

/// The secondary's guest has found each page as it should be, also between checkpoints, at which it begins anew.
fn sound(printed: &[u8]) -> Result<()> {
    let wrong = printed.iter().filter(|byte| **byte & Checker::ERROR != 0);
    match wrong.count() {
        0 => Ok(()),
        wrong => Err(format!("the guest found {wrong} pages that were wrong").into()),
    }
}

/// The secondary has every page of the checkpoint, but for the files that QEMU gives to the firmware: it
/// writes them anew in the reset before each load, past its own dirty log, and the guest cannot write them.
fn compare(secondary: &mut Qemu, checkpoint: &Contents) -> Result<()> {
    let mut expected = checkpoint.clone();
    let mut found = secondary.ram_contents()?.ok_or("no memory")?;
    for contents in [&mut expected, &mut found] {
        contents.retain(|name, _| !name.starts_with("/rom@"));
    }
    assert!(expected.values().map(Vec::len).sum::<usize>() >= usize::try_from(MEMORY)? << 20);
    contents::compare("of the secondary and the checkpoint", &expected, &found)
}

/// The primary dies, and the secondary has the last checkpoint, of which its guest changes nothing.
fn stands_still(qemu: &Binary, kind: &str, way: Way) -> Result<()> {
    let (pair, expected) = Pair::standing_still(qemu, kind, way)?;
    if way.ahead {
        // Pages of a checkpoint that never comes are on their way when it dies.
        for _ in 0..BATCHES {
            pair.primary.write()?;
        }
        pair.primary.wait_read()?;
    }
    pair.primary.die()?;
    let mut secondary = pair.secondary;
    fail_over(&mut secondary)?;
    compare(&mut secondary, &expected)
}

/// The primary lives, goes on sending pages ahead, and is given up all the same.
fn yanked(qemu: &Binary) -> Result<()> {
    let (pair, expected) = Pair::standing_still(qemu, "q35", AHEAD)?;
    let Pair {
        primary,
        mut secondary,
    } = pair;
    thread::scope(|scope| {
        let failover = scope.spawn(|| {
            thread::sleep(A_WHILE);
            let instances = json!({"instances": [{"type": "migration"}]});
            secondary.qmp.execute_oob("yank", instances)?;
            fail_over(&mut secondary)
        });
        while !failover.is_finished() {
            primary.write()?;
        }
        failover.join().map_err(|_| "the failover panicked")?
    })?;
    compare(&mut secondary, &expected)?;
    primary.die()
}

/// The primary dies, and the guest goes on with sound memory.
fn goes_on(qemu: &Binary, kind: &str, accel: Accel, way: Way) -> Result<()> {
    let mut pair = Pair::start(qemu, kind, accel, way)?;
    pair.checkpoints(way)?;
    more_output(&mut pair.secondary)?;
    pair.primary.die()?;
    let mut secondary = pair.secondary;
    fail_over(&mut secondary)?;
    for _ in 0..3 {
        more_output(&mut secondary)?;
    }
    secondary.process.kill()?;
    sound(&secondary.process.stdout().whole()?)
}
