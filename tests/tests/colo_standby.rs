//! Guests of a real QEMU that `colo-vmm standby` holds: what it holds is what QEMU has at that
//! checkpoint, byte for byte, and when QEMU is lost the guest goes on from there in another one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::gate::Gate;
use tests::harness::{self, Needs};
use tests::qemu::{Accel, Binary, Machine, Qemu};
use tests::vmm::{LINE, Vmm, check_count, program};
use tests::{PATIENCE, Result, contents, stored};

/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// Between checkpoints, ms.
const DELAY: u32 = 100;
/// How often a state that nobody tells of is looked at.
const POLL: Duration = Duration::from_millis(5);
const SINCE: (u32, u32) = (11, 0);

fn main() -> ExitCode {
    let tcg =
        |name, test: fn(&Binary) -> Result<()>| Needs::NOTHING.qemu(SINCE).test_qemu(name, test);
    let kvm = |name, test: fn(&Binary) -> Result<()>| {
        Needs::NOTHING.kvm().qemu(SINCE).test_qemu(name, test)
    };
    harness::run([
        tcg("pc_is_held_as_it_is_at_a_checkpoint", |q| {
            held(q, "pc", Accel::Tcg, PLAIN)
        }),
        tcg("microvm_is_held_as_it_is_at_a_checkpoint_multifd", |q| {
            held(q, "microvm", Accel::Tcg, CHANNELS)
        }),
        kvm("q35_is_held_as_it_is_at_a_checkpoint_zstd", |q| {
            held(q, "q35", Accel::Kvm, ZSTD)
        }),
        kvm("pc_is_held_as_it_is_at_a_checkpoint_multifd", |q| {
            held(q, "pc", Accel::Kvm, CHANNELS)
        }),
        tcg("guest_goes_on_in_a_qemu_that_waits", |q| {
            killed_between(q, "q35", Accel::Tcg, PLAIN)
        }),
        tcg("guest_with_virtio_mem_goes_on", |q| {
            killed_between(q, VIRTIO_MEM, Accel::Tcg, PLAIN)
        }),
        kvm("guest_goes_on_after_multifd", |q| {
            killed_between(q, "microvm", Accel::Kvm, CHANNELS)
        }),
        tcg(
            "guest_goes_on_from_the_checkpoint_before_a_broken_one",
            |q| killed_within(q, PLAIN),
        ),
        tcg(
            "guest_goes_on_from_the_checkpoint_before_a_broken_one_zstd",
            |q| killed_within(q, ZSTD),
        ),
        tcg("guest_goes_on_in_a_qemu_that_a_command_starts", started),
        tcg("silent_primary_is_lost_in_time", silent),
        tcg("one_of_two_guests_is_lost", two_guests),
        tcg("operator_decides_and_may_try_again", by_request),
        tcg("primary_goes_on_without_a_standby_that_quits", quits),
        tcg("migration_that_fails_may_be_tried_again", tried_again),
        tcg("primary_whose_packets_are_refused_is_not_lost", refused),
        tcg(
            "guest_that_is_migrated_without_colo_is_not_lost",
            without_colo,
        ),
        Needs::NOTHING
            .qemu_before((7, 2), SINCE)
            .test_qemu("primary_from_before_qemu_11_keeps_its_guest", old_primary),
    ])
}

/// Multifd's channels and their compression.
type Way = Option<(u8, &'static str)>;
const PLAIN: Way = None;
const CHANNELS: Way = Some((2, "none"));
const ZSTD: Way = Some((2, "zstd"));

/// The built-in guest of `colo-vmm`, which counts, checks its memory and prints its count, on a disk.
fn disk(dir: &Path, dirty_pages: u32) -> Result<PathBuf> {
    let file = dir.join("disk");
    let status = Command::new(program()?)
        .args(["guest", "--memory", &MEMORY.to_string()])
        .args(["--dirty-pages", &dirty_pages.to_string(), "--out"])
        .arg(&file)
        .status()?;
    assert!(status.success());
    // SeaBIOS boots no AHCI or virtio disk that is as small as one sector.
    File::options().write(true).open(&file)?.set_len(1 << 20)?;
    Ok(file)
}

/// A q35 with a device whose state goes before memory, in checkpoints, too.
const VIRTIO_MEM: &str = "q35 with virtio-mem";

fn machine(kind: &str, accel: Accel, disk: &Path) -> Machine {
    let has_virtio_mem = kind == VIRTIO_MEM;
    let machine = Machine::new(if has_virtio_mem { "q35" } else { kind }, MEMORY)
        .accel(accel)
        .boot(disk)
        .running()
        .args(["-serial", "stdio"]);
    if !has_virtio_mem {
        return machine;
    }
    let size = format!("{MEMORY}M,maxmem=512M,slots=2");
    let object = "memory-backend-ram,id=m0,size=64M";
    let device = "virtio-mem-pci,id=vm0,memdev=m0,requested-size=16M";
    machine.args(["-m", &size, "-object", object, "-device", device])
}

/// How many pages the guest dirties in a pass: as many as go at a pace.
const fn dirty_pages(accel: Accel) -> u32 {
    match accel {
        Accel::Tcg => 1024,
        Accel::Kvm => 256,
    }
}

/// A primary and its standby.
struct Held {
    primary: Qemu,
    standby: Vmm,
    /// Lives as long as they do.
    dir: TempDir,
    machine: Machine,
    way: Way,
}

impl Held {
    /// Starts both and waits for the guest's first lines.
    fn start(qemu: &Binary, kind: &str, accel: Accel, way: Way, args: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let machine = machine(kind, accel, &disk(dir.path(), dirty_pages(accel))?);
        let uri = uri(dir.path());
        let mut all: Vec<OsString> = vec!["--incoming".into(), uri.into()];
        all.extend(args.iter().map(Into::into));
        if let Some((count, compression)) = way {
            all.extend(["--multifd".into(), count.to_string().into()]);
            all.extend(["--multifd-compression".into(), compression.into()]);
        }
        let standby = Vmm::standby(all)?;
        let primary = machine.start(qemu)?;
        let mut held = Self {
            primary,
            standby,
            dir,
            machine,
            way,
        };
        wait_for_lines(&held.primary, 2)?;
        configure(&mut held.primary, way)?;
        Ok(held)
    }

    fn uri(&self) -> String {
        uri(self.dir.path())
    }

    /// Migrates to `uri`, and waits for so many checkpoints.
    fn checkpoints(&mut self, uri: &str, count: usize) -> Result<()> {
        self.primary.migrate(uri)?;
        self.primary.wait_migration("colo").map_err(|e| {
            format!(
                "{e}; the standby said: {}",
                self.standby.process.stderr().text()
            )
        })?;
        self.standby.wait_migration("colo")?;
        self.standby.wait_checkpoints(count)?;
        Ok(())
    }

    /// How much the guest had surely printed at the last checkpoint: what it has printed now, when
    /// two more are over.
    fn at_least(&mut self) -> Result<usize> {
        let printed = self.primary.process.stdout().bytes().len();
        let so_far = self.standby.checkpoints()?.len();
        self.standby.wait_checkpoints(so_far + 2)?;
        Ok(printed)
    }

    /// All that the guest printed at a primary that is gone.
    fn printed(&self) -> Result<Vec<u8>> {
        let printed = self.primary.process.stdout().whole()?;
        check_count(0, &printed)?;
        Ok(printed)
    }
}

fn uri(dir: &Path) -> String {
    format!("unix:{}", dir.join("incoming").display())
}

fn configure(primary: &mut Qemu, way: Way) -> Result<()> {
    primary.qmp.enable(&["return-path", "x-colo"])?;
    let mut parameters = json!({
        "x-checkpoint-delay": DELAY,
        "max-bandwidth": 0,
        "downtime-limit": 2000,
    });
    if let Some((count, compression)) = way {
        primary.qmp.enable(&["multifd"])?;
        parameters["multifd-channels"] = count.into();
        parameters["multifd-compression"] = compression.into();
    }
    primary.qmp.set_parameters(parameters)
}

fn wait_for_lines(vm: &Qemu, lines: usize) -> Result<()> {
    let wanted = lines * usize::try_from(LINE)?;
    let output = vm.process.stdout();
    output.wait_for("lines", |bytes| (bytes.len() >= wanted).then_some(()))
}

/// The guest goes on with `after`, having printed `before` at its primary: from a point of it that is
/// not before its `least`-th byte, and with nothing but what it would have printed there.
fn goes_on(before: &[u8], least: usize, after: &[u8]) -> Result<()> {
    let (cut, rest) = after
        .iter()
        .position(|b| *b == b'\n')
        .map(|at| (at + 1, &after[at + 1..]))
        .ok_or("not a line after the restore")?;
    let number = rest.get(..8).ok_or("not two lines after the restore")?;
    let number = u64::from_str_radix(std::str::from_utf8(number)?, 16)?;
    let from = ((number - 1) * LINE)
        .checked_sub(cut as u64)
        .ok_or("the guest began anew")?;
    check_count(from, after)?;
    let range = least as u64..=before.len() as u64;
    if range.contains(&from) {
        Ok(())
    } else {
        Err(format!("the guest went on at byte {from} of its output, not in {range:?}").into())
    }
}

/// A QEMU of the same machine that waits, and where.
fn waiting(held: &str, machine: &Machine, qemu: &Binary, dir: &Path) -> Result<(Qemu, String)> {
    let mut vm = machine.clone().incoming().start(qemu)?;
    let uri = vm.listen(&format!("unix:{}", dir.join(held).display()))?;
    Ok((vm, uri))
}

/// What is held is what the primary has: each byte of each block, and each device's.
fn held(qemu: &Binary, kind: &str, accel: Accel, way: Way) -> Result<()> {
    let files = tempfile::tempdir()?;
    let file = files.path().join("checkpoint");
    let into = format!("file:{}", file.display());
    let args = ["--on-peer-loss", "take-over", "--restore-into", &into];
    let mut held = Held::start(qemu, kind, accel, way, &args)?;
    let gate = Gate::to(&held.uri())?;
    held.checkpoints(&gate.uri(), 5)?;
    let blob = gate.hold()?;
    let memory = held.primary.ram_contents()?.ok_or("no memory")?;
    let status = held.primary.qmp.execute("query-status", Value::Null)?;
    assert_eq!(status["status"], "colo");
    held.primary.process.kill()?;
    let printed = held.printed()?;
    assert!(held.standby.process.wait()?.success());

    let guest = stored::read(&into)?;
    let stored = contents::of(&*guest.memory)?;
    contents::compare("of the primary", &memory, &stored)?;
    let own = guest.devices.tail.followed_by(&blob)?;
    let sections = |tail: &migration_stream::Tail| {
        let sections = tail.sections();
        let sections = sections.map(|s| (s.header.idstr, s.header.instance, s.body.to_vec()));
        sections.collect::<Vec<_>>()
    };
    assert_eq!(sections(&own).len(), sections(&guest.devices.tail).len());
    for (own, held) in sections(&own).iter().zip(&sections(&guest.devices.tail)) {
        assert_eq!(own, held);
    }

    // QEMU takes it, memory and all, and gives it away as it was.
    let mut restored = held.machine.clone().incoming().start(qemu)?;
    restored.qmp.execute("stop", Value::Null)?;
    restored.listen(&into)?;
    restored.wait_migration("completed")?;
    // KVM renews the page of its clock, which the firmware uses, as soon as it is told of it.
    if accel == Accel::Tcg {
        let memory = restored.ram_contents()?.ok_or("no memory")?;
        contents::compare("of the restored QEMU", &stored, &memory)?;
    }
    restored.qmp.execute("cont", Value::Null)?;
    wait_for_lines(&restored, 3)?;
    restored.process.kill()?;
    goes_on(&printed, printed.len(), &restored.process.stdout().whole()?)
}

/// Its primary dies, and the guest goes on in a QEMU that waited for it.
fn killed_between(qemu: &Binary, kind: &str, accel: Accel, way: Way) -> Result<()> {
    let files = tempfile::tempdir()?;
    let disk = disk(files.path(), dirty_pages(accel))?;
    let machine = machine(kind, accel, &disk);
    let (mut next, into) = waiting("next", &machine, qemu, files.path())?;
    let args = ["--on-peer-loss", "take-over", "--restore-into", &into];
    let mut held = Held::start(qemu, kind, accel, way, &args)?;
    let uri = held.uri();
    held.checkpoints(&uri, 5)?;
    let least = held.at_least()?;
    held.primary.process.kill()?;
    assert!(held.standby.process.wait()?.success());
    next.wait_status("running")?;
    wait_for_lines(&next, 3)?;
    next.process.kill()?;
    goes_on(&held.printed()?, least, &next.process.stdout().whole()?)
}

/// Its primary dies with half of a checkpoint's memory sent.
fn killed_within(qemu: &Binary, way: Way) -> Result<()> {
    let files = tempfile::tempdir()?;
    let into = format!("unix:{}", files.path().join("next").display());
    let args = ["--on-peer-loss", "take-over", "--restore-into", &into];
    let mut held = Held::start(qemu, "q35", Accel::Tcg, way, &args)?;
    let (mut next, _) = waiting("next", &held.machine, qemu, files.path())?;
    let gate = Gate::to(&held.uri())?;
    held.checkpoints(&gate.uri(), 5)?;
    let least = held.at_least()?;
    gate.cut()?;
    let complete = held.standby.checkpoints()?.len();
    held.primary.process.kill()?;
    drop(gate);
    let exit = held.standby.qmp.wait_event("COLO_EXIT")?;
    let data = json!({"mode": "secondary", "reason": "error"});
    assert_eq!(exit["data"], data);
    assert!(held.standby.process.wait()?.success());
    assert_eq!(held.standby.checkpoints()?.len(), complete);
    next.wait_status("running")?;
    wait_for_lines(&next, 3)?;
    next.process.kill()?;
    goes_on(&held.printed()?, least, &next.process.stdout().whole()?)
}

/// A QEMU that somebody else has started; dropping this kills it.
struct Stray(PathBuf);

impl Drop for Stray {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(&self.0) {
            // It may have ended, or never begun.
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

/// The standby starts the QEMU that the guest goes on in.
fn started(qemu: &Binary) -> Result<()> {
    let files = tempfile::tempdir()?;
    let (serial, pid) = (files.path().join("serial"), files.path().join("pid"));
    let disk = disk(files.path(), dirty_pages(Accel::Tcg))?;
    let line = Machine::new("pc", MEMORY)
        .boot(&disk)
        .running()
        .args([
            "-serial".to_owned(),
            format!("file:{}", serial.display()),
            "-pidfile".to_owned(),
            pid.display().to_string(),
        ])
        .restore_line(qemu)?;
    let args = ["--on-peer-loss", "take-over", "--restore-command", &line];
    let mut held = Held::start(qemu, "pc", Accel::Tcg, PLAIN, &args)?;
    let uri = held.uri();
    held.checkpoints(&uri, 5)?;
    let least = held.at_least()?;
    let _stray = Stray(pid.clone());
    held.primary.process.kill()?;
    assert!(held.standby.process.wait()?.success());
    let after = poll("lines of the restored guest", || {
        let printed = fs::read(&serial).unwrap_or_default();
        Ok((printed.len() >= 27).then_some(printed))
    })?;
    goes_on(&held.printed()?, least, &after)?;
    // It ends as any other QEMU does, although the standby that started it keeps signals to itself.
    let id = fs::read_to_string(&pid)?;
    let killed = Command::new("kill").args(["-TERM", id.trim()]).status()?;
    assert!(killed.success());
    poll("end of the restored QEMU", || {
        // QEMU removes the file on its way out.
        Ok((!pid.exists()).then_some(()))
    })
}

fn poll<T>(what: &str, mut found: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = found()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            return Err(format!("no {what}").into());
        }
        thread::sleep(POLL);
    }
}

/// A primary whose process is stopped says nothing, and its connection stays.
fn silent(qemu: &Binary) -> Result<()> {
    let files = tempfile::tempdir()?;
    let into = format!("unix:{}", files.path().join("next").display());
    let mut args = vec!["--on-peer-loss", "take-over", "--restore-into", &into];
    args.extend(["--peer-timeout", "1500", "--checkpoint-delay", "100"]);
    let mut held = Held::start(qemu, "q35", Accel::Tcg, PLAIN, &args)?;
    let (mut next, _) = waiting("next", &held.machine, qemu, files.path())?;
    let uri = held.uri();
    held.checkpoints(&uri, 5)?;
    let least = held.at_least()?;
    held.primary.process.freeze()?;
    // Not before its time, and far before a person takes it for a hang.
    held.standby.qmp.wait_event("COLO_EXIT")?;
    assert!(held.standby.process.wait()?.success());
    next.wait_status("running")?;
    wait_for_lines(&next, 3)?;
    held.primary.process.kill()?;
    next.process.kill()?;
    goes_on(&held.printed()?, least, &next.process.stdout().whole()?)
}

/// One process holds two guests, of which one loses its primary.
fn two_guests(qemu: &Binary) -> Result<()> {
    let files = tempfile::tempdir()?;
    let at = |name: &str| format!("unix:{}", files.path().join(name).display());
    let disk = disk(files.path(), dirty_pages(Accel::Tcg))?;
    let machines = ["pc", "q35"].map(|kind| machine(kind, Accel::Tcg, &disk));
    let (mut next, _) = waiting("next", &machines[0], qemu, files.path())?;
    let one = format!(
        "name=one,incoming={},restore-into={}",
        at("one"),
        at("next")
    );
    let mut standby = Vmm::standby([
        "--incoming",
        &at("two"),
        "--restore-into",
        &at("nobody"),
        "--guest",
        &one,
        "--on-peer-loss",
        "take-over",
    ])?;
    let mut primaries = Vec::new();
    for (machine, name) in machines.iter().zip(["one", "two"]) {
        let mut primary = machine.start(qemu)?;
        wait_for_lines(&primary, 2)?;
        configure(&mut primary, PLAIN)?;
        primary.migrate(&at(name))?;
        primary.wait_migration("colo")?;
        primaries.push(primary);
    }
    standby.wait_checkpoints(3)?;
    primaries[0].process.kill()?;
    next.wait_migration("completed")?;
    wait_for_lines(&next, 3)?;
    next.process.kill()?;
    let before = primaries[0].process.stdout().whole()?;
    goes_on(&before, 0, &next.process.stdout().whole()?)?;
    // The other one has not noticed.
    let so_far = standby.checkpoints()?.len();
    standby.wait_checkpoints(so_far + 2)?;
    assert_eq!(standby.status()?, "paused");
    primaries[1].wait_migration("colo")?;
    check_count(0, &primaries[1].process.stdout().bytes())?;
    Ok(())
}

/// Without take-over nothing happens before somebody says so; and a restore that fails costs nothing.
fn by_request(qemu: &Binary) -> Result<()> {
    let files = tempfile::tempdir()?;
    let into = format!("unix:{}", files.path().join("next").display());
    let args = ["--restore-into", &into, "--restore-timeout", "1"];
    let mut held = Held::start(qemu, "pc", Accel::Tcg, PLAIN, &args)?;
    let refusal = held
        .standby
        .qmp
        .refused("x-colo-lost-heartbeat", Value::Null)?;
    assert_eq!(refusal.desc, "VM is not in COLO mode");
    assert_eq!(held.standby.status()?, "inmigrate");
    let uri = held.uri();
    held.checkpoints(&uri, 3)?;
    let status = held.standby.qmp.execute("query-colo-status", Value::Null)?;
    assert_eq!(status["mode"], "secondary");
    let figures = held
        .standby
        .qmp
        .execute("x-query-colo-figures", Value::Null)?;
    assert!(figures["checkpoints"].as_u64() >= Some(3), "{figures}");
    let least = held.at_least()?;
    held.primary.process.kill()?;
    held.standby.qmp.wait_event("COLO_EXIT")?;
    held.standby.wait_migration("failing")?;
    assert_eq!(held.standby.status()?, "paused");
    held.standby
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    let reason = held.standby.wait_failure()?;
    assert!(reason.contains("nobody listens"), "{reason}");
    let (mut next, _) = waiting("next", &held.machine, qemu, files.path())?;
    held.standby
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    assert!(held.standby.process.wait()?.success());
    next.wait_status("running")?;
    wait_for_lines(&next, 3)?;
    next.process.kill()?;
    goes_on(&held.printed()?, least, &next.process.stdout().whole()?)
}

/// The primary of a standby that ends keeps its guest.
fn quits(qemu: &Binary) -> Result<()> {
    let mut held = Held::start(
        qemu,
        "q35",
        Accel::Tcg,
        CHANNELS,
        &[
            "--on-peer-loss",
            "take-over",
            "--restore-command",
            "false {}",
        ],
    )?;
    let uri = held.uri();
    held.checkpoints(&uri, 3)?;
    held.standby.qmp.execute("quit", Value::Null)?;
    assert!(held.standby.process.wait()?.success());
    held.primary.qmp.wait_event("COLO_EXIT")?;
    held.primary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    held.primary.wait_status("running")?;
    let lines = held.primary.process.stdout().bytes().len() / 9;
    wait_for_lines(&held.primary, lines + 3)?;
    held.primary.process.kill()?;
    held.printed()?;
    Ok(())
}

/// What breaks before COLO leaves the guest to its primary, which may try again.
fn tried_again(qemu: &Binary) -> Result<()> {
    let args = ["--restore-command", "false {}"];
    let mut held = Held::start(qemu, "pc", Accel::Tcg, PLAIN, &args)?;
    let uri = held.uri();
    held.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 1 << 20, "downtime-limit": 1}))?;
    held.primary.migrate(&uri)?;
    held.standby.wait_migration("active")?;
    held.primary.qmp.execute("migrate_cancel", Value::Null)?;
    // It has failed, and waits again.
    let standby = &mut held.standby;
    poll("standby that waits again", || {
        Ok((standby.migration()?["status"] == "setup").then_some(()))
    })?;
    poll("end of the migration", || {
        let migration = held.primary.qmp.execute("query-migrate", Value::Null)?;
        Ok((migration["status"] == "cancelled").then_some(()))
    })?;
    configure(&mut held.primary, held.way)?;
    held.checkpoints(&uri, 3)?;
    held.primary.process.kill()?;
    held.printed()?;
    Ok(())
}

/// What a channel brings is nonsense: that is no sign of a dead primary, and it is not.
fn refused(qemu: &Binary) -> Result<()> {
    let args = [
        "--on-peer-loss",
        "take-over",
        "--restore-command",
        "false {}",
    ];
    let mut held = Held::start(qemu, "pc", Accel::Tcg, CHANNELS, &args)?;
    let gate = Gate::to(&held.uri())?;
    held.checkpoints(&gate.uri(), 3)?;
    gate.spoil();
    held.standby.qmp.wait_event("COLO_EXIT")?;
    let migration = held.standby.wait_migration("failing")?;
    let reason = migration["error-desc"].as_str().unwrap_or_default();
    assert!(reason.contains("is refused"), "{reason}");
    assert_eq!(held.standby.status()?, "paused");
    held.primary.qmp.wait_event("COLO_EXIT")?;
    held.primary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    held.primary.wait_status("running")?;
    let lines = held.primary.process.stdout().bytes().len() / 9;
    wait_for_lines(&held.primary, lines + 2)?;
    held.primary.process.kill()?;
    held.printed()?;
    // The operator has not said otherwise: it is still held, not restored.
    held.standby.wait_migration("failing")?;
    Ok(())
}

/// A primary that does not know of COLO lets go of its guest, which goes on all the same.
fn without_colo(qemu: &Binary) -> Result<()> {
    let files = tempfile::tempdir()?;
    let into = format!("unix:{}", files.path().join("next").display());
    let args = ["--on-peer-loss", "take-over", "--restore-into", &into];
    let mut held = Held::start(qemu, "pc", Accel::Tcg, PLAIN, &args)?;
    let (mut next, _) = waiting("next", &held.machine, qemu, files.path())?;
    held.primary.qmp.set_capabilities(&["x-colo"], false)?;
    held.primary.migrate(&held.uri())?;
    held.primary.wait_migration("completed")?;
    held.primary.process.kill()?;
    let printed = held.printed()?;
    assert!(held.standby.process.wait()?.success());
    next.wait_status("running")?;
    wait_for_lines(&next, 3)?;
    next.process.kill()?;
    goes_on(&printed, printed.len(), &next.process.stdout().whole()?)
}

/// COLO as it was before QEMU 11 is refused before the guest has left.
fn old_primary(qemu: &Binary) -> Result<()> {
    let args = ["--restore-command", "false {}"];
    let mut held = Held::start(qemu, "pc", Accel::Tcg, PLAIN, &args)?;
    held.primary.migrate(&held.uri())?;
    let failed = held.primary.wait_migration("failed")?;
    assert_eq!(failed["status"], "failed");
    held.standby.process.stderr().wait_for("reason", |said| {
        String::from_utf8_lossy(said)
            .contains("ENABLE_COLO")
            .then_some(())
    })?;
    let lines = held.primary.process.stdout().bytes().len() / 9;
    wait_for_lines(&held.primary, lines + 2)?;
    held.primary.process.kill()?;
    held.printed()?;
    Ok(())
}
