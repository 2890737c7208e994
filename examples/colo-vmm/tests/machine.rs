//! What a machine promises, on KVM and simulated.
//!
//! Without /dev/kvm the tests that need it are ignored and say so; with CI=true they fail.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use std::{env, thread};

use colo_vmm::guest::WorkloadConfig;
use colo_vmm::machine::{
    CpuOptions, GuestExit, GuestImage, KvmMachine, Machine, MachineConfig, MachineError, Pause,
    RunState, SimMachine, kvm_unavailable,
};
use colo_vmm::memory::Memory;
use libtest_mimic::{Arguments, Failed, Trial};
use migration_stream::ram::BlockId;
use migration_stream::{GuestRam, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};
use vmstate::SavedSection;

type Outcome = Result<(), Box<dyn Error>>;

const MIB: u64 = 1 << 20;
/// Pages of each CPU's region.
const PAGES: u32 = 61;
/// Long enough for a busy host.
const PATIENCE: Duration = Duration::from_secs(30);

/// A serial sink that can be read.
#[derive(Clone, Default)]
struct Line(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().extend(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Line {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    /// The counters printed so far, in full lines.
    fn counters(&self) -> Result<Vec<u32>, Box<dyn Error>> {
        let text = self.text();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole
            .lines()
            .map(|line| {
                u32::from_str_radix(line, 16).map_err(|_| format!("the guest said: {line}").into())
            })
            .collect()
    }

    fn wait_for(&self, lines: usize) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = self.0.0.lock().unwrap();
        while bytes.iter().filter(|byte| **byte == b'\n').count() < lines {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let said = String::from_utf8_lossy(&bytes);
                return Err(format!("no {lines} lines from the guest in time, but: {said}").into());
            }
            bytes = self.0.1.wait_timeout(bytes, left).unwrap().0;
        }
        Ok(())
    }
}

fn consecutive(counters: &[u32]) -> Outcome {
    match counters.windows(2).find(|pair| pair[1] != pair[0] + 1) {
        Some(pair) => Err(format!("the guest counted {pair:x?}").into()),
        None => Ok(()),
    }
}

/// KVM or simulated, with one or more vCPUs.
#[derive(Clone, Copy)]
enum Kind {
    Kvm { vcpus: u8 },
    Sim,
}

impl Kind {
    const fn vcpus(self) -> u8 {
        match self {
            Self::Kvm { vcpus } => vcpus,
            Self::Sim => 1,
        }
    }

    fn build(
        self,
        memory: u64,
        guest: Option<WorkloadConfig>,
        line: &Line,
    ) -> Result<Box<dyn Machine>, Box<dyn Error>> {
        self.build_image(memory, guest.map(GuestImage::Workload), line)
    }

    fn build_image(
        self,
        memory: u64,
        guest: Option<GuestImage>,
        line: &Line,
    ) -> Result<Box<dyn Machine>, Box<dyn Error>> {
        self.build_with(memory, guest, line, CpuOptions::default())
    }

    fn build_with(
        self,
        memory: u64,
        guest: Option<GuestImage>,
        line: &Line,
        cpu: CpuOptions,
    ) -> Result<Box<dyn Machine>, Box<dyn Error>> {
        let config = MachineConfig {
            memory: Arc::new(Memory::new(memory)?),
            vcpus: self.vcpus(),
            guest,
            serial: Box::new(line.clone()),
            cpu,
        };
        Ok(match self {
            Self::Kvm { .. } => Box::new(KvmMachine::new(config)?),
            Self::Sim => Box::new(SimMachine::new(config)?),
        })
    }

    fn workload(self) -> WorkloadConfig {
        WorkloadConfig {
            memory_mib: 16,
            // No multiple of what one turn of the guest's loop visits.
            dirty_pages: PAGES,
            cpus: self.vcpus(),
            ..WorkloadConfig::default()
        }
    }
}

fn load(machine: &mut dyn Machine, sections: &[SavedSection]) -> Outcome {
    let devices = machine.devices()?;
    let staged = sections
        .iter()
        .map(|section| {
            let parsed = devices.parse_section(
                &section.idstr,
                section.instance_id,
                section.version,
                &section.body,
                true,
            )?;
            Ok(parsed.section)
        })
        .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
    let staged = devices.stage(staged)?;
    devices.reset_then_install(staged)?;
    Ok(())
}

fn differing(left: &[SavedSection], right: &[SavedSection]) -> Vec<String> {
    left.iter()
        .zip(right)
        .filter(|(left, right)| left != right)
        .map(|(left, right)| {
            let bytes: Vec<_> = left
                .body
                .iter()
                .zip(&right.body)
                .enumerate()
                .filter(|(_, (left, right))| left != right)
                .map(|(at, (left, right))| format!("{at}: {left:02x} {right:02x}"))
                .collect();
            format!("{} {}: {bytes:?}", left.idstr, left.instance_id)
        })
        .collect()
}

fn same(what: &str, left: &[SavedSection], right: &[SavedSection]) -> Outcome {
    let differing = differing(left, right);
    if left.len() == right.len() && differing.is_empty() {
        Ok(())
    } else {
        Err(format!("{what}: {differing:#?}").into())
    }
}

fn copy_ram(from: &Memory, to: &Memory) -> Outcome {
    let (from, to) = (from.ram(), to.ram());
    for (block, info) in from.blocks().iter() {
        let len = usize::try_from(info.used_length())?;
        from.slice(block, 0, len)?
            .copy_to_volatile_slice(to.slice(block, 0, len)?);
    }
    Ok(())
}

fn the_workload_counts_and_finds_its_memory_intact(kind: Kind) -> Outcome {
    let line = Line::default();
    let mut machine = kind.build(16 * MIB, Some(kind.workload()), &line)?;
    assert_eq!(machine.state(), RunState::Stopped);
    machine.resume()?;
    assert_eq!(machine.state(), RunState::Running);
    line.wait_for(20)?;
    machine.stop()?;
    let counters = line.counters()?;
    consecutive(&counters)?;
    assert_eq!(counters[0], 1);
    assert_eq!(machine.take_exit()?, None);

    // Every CPU did its part: its pages hold its own number of passes.
    for cpu in 0..u64::from(kind.vcpus()) {
        let start = 2 * MIB + cpu * u64::from(PAGES) * PAGE_SIZE;
        let word: u32 = machine.memory().guest().read_obj(GuestAddress(start))?;
        let passes = u64::from(word)
            .checked_sub(start)
            .ok_or_else(|| format!("cpu {cpu} has {word:#x} at {start:#x}"))?;
        assert!(passes > 0, "cpu {cpu} has not run");
    }
    Ok(())
}

fn a_stopped_machine_does_nothing_and_saves_the_same_bytes(kind: Kind) -> Outcome {
    let line = Line::default();
    let mut machine = kind.build(16 * MIB, Some(kind.workload()), &line)?;
    machine.resume()?;
    for round in 1..=10 {
        line.wait_for(round * 3)?;
        assert!(matches!(machine.devices(), Err(MachineError::Running)));
        machine.stop()?;
        let (text, first) = (line.text(), machine.devices()?.save_all()?);
        thread::sleep(Duration::from_millis(20));
        same("second save", &first, &machine.devices()?.save_all()?)?;
        machine.stop()?;
        same("third save", &first, &machine.devices()?.save_all()?)?;
        assert_eq!(line.text(), text);
        assert_eq!(machine.state(), RunState::Stopped);
        machine.resume()?;
    }
    machine.stop()?;
    consecutive(&line.counters()?)
}

fn a_loaded_machine_has_what_was_saved_and_counts_on(kind: Kind) -> Outcome {
    let (here, there) = (Line::default(), Line::default());
    let mut source = kind.build(16 * MIB, Some(kind.workload()), &here)?;
    let mut target = kind.build(16 * MIB, None, &there)?;
    source.resume()?;
    for round in 1..=10 {
        here.wait_for(round * 5)?;
        source.stop()?;
        target.stop()?;
        copy_ram(source.memory(), target.memory())?;
        let saved = source.devices()?.save_all()?;
        load(&mut *target, &saved)?;
        same("read back", &saved, &target.devices()?.save_all()?)?;
        let before = (here.text() + &there.text()).len();

        // The target goes on from here; the next round takes it back to where the source is.
        let printed = there.text().matches('\n').count();
        target.resume()?;
        there.wait_for(printed + 3)?;
        assert!((here.text() + &there.text()).len() > before);
        source.resume()?;
    }
    source.stop()?;
    target.stop()?;
    consecutive(&here.counters()?)?;

    // The last load: what the source had printed by then and what the target printed since
    // are one sequence.
    let text = here.text();
    there.0.0.lock().unwrap().clear();
    copy_ram(source.memory(), target.memory())?;
    let saved = source.devices()?.save_all()?;
    load(&mut *target, &saved)?;
    drop(source);
    target.resume()?;
    there.wait_for(5)?;
    target.stop()?;
    let all = Line::default();
    all.clone().write_all((text + &there.text()).as_bytes())?;
    consecutive(&all.counters()?)?;
    assert_eq!(target.take_exit()?, None);
    Ok(())
}

fn the_dirty_log_finds_what_the_guest_wrote_and_no_more(kind: Kind) -> Outcome {
    let line = Line::default();
    let mut machine = kind.build(16 * MIB, Some(kind.workload()), &line)?;
    machine.resume()?;
    line.wait_for(2)?;
    machine.stop()?;
    let pages = |log: &mut dyn migration_stream::DirtyLog| {
        let mut pages = Vec::new();
        log.sync(&mut |block, first, word| {
            assert_eq!(block, BlockId::new(0));
            pages.extend(
                (0..64)
                    .filter(|bit| word >> bit & 1 == 1)
                    .map(|bit| first + bit),
            );
        })
        .map(|()| pages)
    };

    let mut log = machine.dirty_log();
    log.start()?;
    assert!(pages(&mut *log)?.is_empty());
    let before = snapshot(machine.memory())?;
    let passes = line.text().matches('\n').count();
    machine.resume()?;
    line.wait_for(passes + 3)?;
    machine.stop()?;
    let dirty = pages(&mut *log)?;
    let after = snapshot(machine.memory())?;
    for (page, (before, after)) in before.iter().zip(&after).enumerate() {
        if before != after {
            assert!(dirty.contains(&(page as u64)), "page {page} was missed");
        }
    }
    // The regions, and the stacks: one page below the boot sector.
    let first = 2 * MIB / PAGE_SIZE;
    let region = first..first + u64::from(PAGES) * u64::from(kind.vcpus());
    for page in first..first + u64::from(PAGES) {
        assert!(dirty.contains(&page), "page {page} was missed");
    }
    for page in &dirty {
        let stack = matches!(kind, Kind::Kvm { .. }) && *page == 7;
        assert!(
            region.contains(page) || stack,
            "page {page} was not written"
        );
    }
    assert!(pages(&mut *log)?.is_empty());
    log.stop()?;
    Ok(())
}

fn snapshot(memory: &Memory) -> Result<Vec<Vec<u8>>, Box<dyn Error>> {
    let len = usize::try_from(memory.bytes())?;
    let mut bytes = vec![0; len];
    memory
        .ram()
        .slice(BlockId::new(0), 0, len)?
        .copy_to(&mut bytes[..]);
    Ok(bytes.chunks(4096).map(<[u8]>::to_vec).collect())
}

fn a_guest_that_is_slowed_down_is_stopped_as_before_and_loses_nothing(kind: Kind) -> Outcome {
    let line = Line::default();
    let mut machine = kind.build(16 * MIB, Some(kind.workload()), &line)?;
    let mut throttle = machine.throttle();
    machine.resume()?;
    for (round, percentage) in (1..).zip([20, 99, 99, 0, 50]) {
        throttle.set(percentage);
        line.wait_for(round * 2)?;
        machine.stop()?;
        let text = line.text();
        thread::sleep(Duration::from_millis(20));
        assert_eq!(line.text(), text, "it runs while it is stopped");
        machine.resume()?;
    }
    // Its thread is gone with it, and the guest runs as fast as before.
    drop(throttle);
    line.wait_for(line.counters()?.len() + 5)?;
    let rest = machine.throttle();
    machine.stop()?;
    consecutive(&line.counters()?)?;
    drop(machine);
    drop(rest);
    Ok(())
}

fn a_page_that_lost_its_value_ends_the_guest(kind: Kind) -> Outcome {
    let line = Line::default();
    let mut machine = kind.build(16 * MIB, Some(kind.workload()), &line)?;
    machine.resume()?;
    line.wait_for(3)?;
    machine.stop()?;
    let victim = GuestAddress(2 * MIB + 5 * PAGE_SIZE);
    machine.memory().guest().write_obj(0xbadu32, victim)?;
    machine.resume()?;
    let deadline = Instant::now() + PATIENCE;
    while machine.state() != RunState::Ended {
        assert!(Instant::now() < deadline, "the guest did not notice");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(machine.exit_event().read()?, 1);
    assert!(matches!(machine.resume(), Err(MachineError::Ended)));
    assert_eq!(machine.take_exit()?, Some(GuestExit::DebugExit(1)));
    assert_eq!(machine.state(), RunState::Stopped);
    let last = line.text().lines().last().unwrap_or_default().to_owned();
    // The stop may have come between the check of that word and its increment: then the guest adds
    // one to what it should have found, and finds that in the next pass.
    let told = ["bad", "bae"].map(|found| format!("E00205000 00000{found} "));
    assert!(
        told.iter().any(|told| last.contains(told)),
        "the guest said {last}"
    );
    Ok(())
}

fn code(bytes: &[u8]) -> Result<tempfile::NamedTempFile, Box<dyn Error>> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(bytes)?;
    Ok(file)
}

fn run_flat(bytes: &[u8]) -> Result<GuestExit, Box<dyn Error>> {
    let file = code(bytes)?;
    let image = GuestImage::Flat {
        file: file.path().into(),
        address: 0x1000,
    };
    let line = Line::default();
    let mut machine = Kind::Kvm { vcpus: 1 }.build_image(MIB, Some(image), &line)?;
    machine.resume()?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(exit) = machine.take_exit()? {
            return Ok(exit);
        }
        assert!(Instant::now() < deadline, "the guest did not end");
        thread::sleep(Duration::from_millis(1));
    }
}

/// mov al, 5; out 0xf4, al
fn the_debug_exit_port_ends_the_guest() -> Outcome {
    let exit = run_flat(&[0xb0, 5, 0xe6, 0xf4])?;
    assert_eq!(exit, GuestExit::DebugExit(5));
    assert_eq!(exit.status(), 11);
    Ok(())
}

/// fwait, which PVM does not emulate; then the debug-exit port, for a KVM that runs it.
fn an_instruction_that_kvm_cannot_emulate_is_named() -> Outcome {
    match run_flat(&[0x9b, 0xb0, 1, 0xe6, 0xf4])? {
        GuestExit::DebugExit(1) => Ok(()),
        GuestExit::Unemulated(what) => {
            let message = what.to_string();
            if what.rip == Some(0) && message.contains("9b b0 01 e6 f4") {
                Ok(())
            } else {
                Err(message.into())
            }
        }
        other => Err(other.to_string().into()),
    }
}

fn clocks_stand_while_the_machine_is_stopped() -> Outcome {
    let line = Line::default();
    let kind = Kind::Kvm { vcpus: 1 };
    let guest = GuestImage::Workload(kind.workload());
    let mut cpu = CpuOptions::default();
    cpu.clocks.kvmclock = Pause::Stands;
    let mut machine = kind.build_with(16 * MIB, Some(guest), &line, cpu)?;
    let clock = |machine: &mut dyn Machine| -> Result<u64, Box<dyn Error>> {
        let sections = machine.devices()?.save_all()?;
        let body = &sections
            .iter()
            .find(|section| section.idstr == "kvmclock")
            .ok_or("no kvmclock")?
            .body;
        Ok(u64::from_be_bytes(body[..8].try_into()?))
    };
    machine.resume()?;
    line.wait_for(2)?;
    machine.stop()?;
    let stopped = clock(&mut *machine)?;
    thread::sleep(Duration::from_millis(300));
    let since = Instant::now();
    machine.resume()?;
    machine.stop()?;
    let ran = Duration::from_nanos(clock(&mut *machine)?.saturating_sub(stopped));
    assert!(ran <= since.elapsed(), "the clock went on for {ran:?}");
    Ok(())
}

fn a_guest_that_fills_ram_leaves_no_page_zero() -> Outcome {
    for vcpus in [1, 2] {
        let kind = Kind::Kvm { vcpus };
        let line = Line::default();
        let workload = WorkloadConfig {
            fills_ram: true,
            ..kind.workload()
        };
        let mut machine = kind.build(16 * MIB, Some(workload), &line)?;
        machine.resume()?;
        line.wait_for(3)?;
        machine.stop()?;
        consecutive(&line.counters()?)?;
        // Behind the regions every page holds its address.
        let regions = u64::from(vcpus) * u64::from(PAGES);
        for address in (2 * MIB..16 * MIB)
            .step_by(4096)
            .skip(usize::try_from(regions)?)
        {
            let word: u32 = machine.memory().guest().read_obj(GuestAddress(address))?;
            assert_eq!(u64::from(word), address);
        }
    }
    Ok(())
}

fn a_machine_refuses_what_it_cannot_run() -> Outcome {
    let line = Line::default();
    let filling = WorkloadConfig {
        fills_ram: true,
        ..Kind::Sim.workload()
    };
    let error = Kind::Sim.build(MIB * 16, Some(filling), &line).err();
    assert!(error.is_some_and(|error| error.to_string().contains("does not fill ram")));
    let image = GuestImage::BootSector("/nonexistent".into());
    let error = Kind::Sim.build_image(MIB, Some(image), &line).err();
    assert!(error.is_some_and(|error| error.to_string().contains("only the built-in workload")));
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each test has vCPUs of its own: more at a time than CPUs only makes them slow.
    arguments.test_threads.get_or_insert(2);
    let unavailable = kvm_unavailable().map(|error| {
        let cause = error.source().map(ToString::to_string).unwrap_or_default();
        format!("{error}: {cause}")
    });
    if let Some(why) = &unavailable {
        eprintln!("tests on kvm are left out: {why}");
    }
    let required = env::var_os("CI").is_some_and(|ci| ci == "true");

    type OnKind = fn(Kind) -> Outcome;
    type OnKvm = fn() -> Outcome;
    let on_every_kind: [(&str, OnKind); 6] = [
        (
            "a_guest_that_is_slowed_down_is_stopped_as_before_and_loses_nothing",
            a_guest_that_is_slowed_down_is_stopped_as_before_and_loses_nothing,
        ),
        (
            "the_workload_counts_and_finds_its_memory_intact",
            the_workload_counts_and_finds_its_memory_intact,
        ),
        (
            "a_stopped_machine_does_nothing_and_saves_the_same_bytes",
            a_stopped_machine_does_nothing_and_saves_the_same_bytes,
        ),
        (
            "a_loaded_machine_has_what_was_saved_and_counts_on",
            a_loaded_machine_has_what_was_saved_and_counts_on,
        ),
        (
            "the_dirty_log_finds_what_the_guest_wrote_and_no_more",
            the_dirty_log_finds_what_the_guest_wrote_and_no_more,
        ),
        (
            "a_page_that_lost_its_value_ends_the_guest",
            a_page_that_lost_its_value_ends_the_guest,
        ),
    ];
    let on_kvm: [(&str, OnKvm); 4] = [
        (
            "a_guest_that_fills_ram_leaves_no_page_zero",
            a_guest_that_fills_ram_leaves_no_page_zero,
        ),
        (
            "the_debug_exit_port_ends_the_guest",
            the_debug_exit_port_ends_the_guest,
        ),
        (
            "an_instruction_that_kvm_cannot_emulate_is_named",
            an_instruction_that_kvm_cannot_emulate_is_named,
        ),
        (
            "clocks_stand_while_the_machine_is_stopped",
            clocks_stand_while_the_machine_is_stopped,
        ),
    ];

    let failed = |error: Box<dyn Error>| Failed::from(error.to_string());
    let kvm_trial = |name: String, test: Box<dyn FnOnce() -> Outcome + Send>| {
        let missing = unavailable.clone();
        Trial::test(name, move || match missing {
            Some(why) => Err(Failed::from(why)),
            None => test().map_err(failed),
        })
        .with_ignored_flag(unavailable.is_some() && !required)
    };
    let mut trials = vec![Trial::test(
        "sim::a_machine_refuses_what_it_cannot_run",
        move || a_machine_refuses_what_it_cannot_run().map_err(failed),
    )];
    for (name, test) in on_every_kind {
        trials.push(Trial::test(format!("sim::{name}"), move || {
            test(Kind::Sim).map_err(failed)
        }));
        for vcpus in [1, 2] {
            trials.push(kvm_trial(
                format!("kvm::{vcpus}_vcpus::{name}"),
                Box::new(move || test(Kind::Kvm { vcpus })),
            ));
        }
    }
    for (name, test) in on_kvm {
        trials.push(kvm_trial(format!("kvm::{name}"), Box::new(test)));
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}
