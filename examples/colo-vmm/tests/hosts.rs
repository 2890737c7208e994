//! What a guest sees of time and of the host's CPU, and what two hosts have to have in common. All of it
//! needs /dev/kvm; without it the tests are ignored and say so, with CI=true they fail.
//!
//! A host whose KVM is PVM masks not all of CPUID and offsets no TSC. What a test says of another KVM than
//! this host's is ignored, with the reason.

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, io, thread};

use colo_vmm::machine::{
    ClockPolicy, CpuMask, CpuOptions, GuestImage, KvmMachine, Machine, MachineConfig, Pause,
    kvm_unavailable,
};
use colo_vmm::memory::Memory;
use kvm_ioctls::{Cap, Kvm};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use vm_memory::{Bytes, GuestAddress};
use vmstate::SavedSection;

type Outcome = Result<(), Box<dyn Error>>;

const STANDS: ClockPolicy = ClockPolicy {
    kvmclock: Pause::Stands,
    tsc: Pause::Stands,
};
const FOLLOWS: ClockPolicy = ClockPolicy {
    kvmclock: Pause::Follows,
    tsc: Pause::Follows,
};
/// Long enough for a busy host.
const PATIENCE: Duration = Duration::from_secs(30);
/// For how long a guest stands still here.
const PAUSE: Duration = Duration::from_millis(200);
/// Where the guest of [`tsc_guest`] leaves what it reads.
const TSC_AT: GuestAddress = GuestAddress(0x2000);

fn is_pvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// 1: rdtsc; mov [0x2000], eax; mov [0x2004], edx; jmp 1
const TSC_GUEST: [u8; 13] = [
    0x0f, 0x31, 0x66, 0xa3, 0x00, 0x20, 0x66, 0x89, 0x16, 0x04, 0x20, 0xeb, 0xf3,
];

fn build(guest: Option<GuestImage>, cpu: CpuOptions) -> Result<KvmMachine, Box<dyn Error>> {
    Ok(KvmMachine::new(MachineConfig {
        memory: Arc::new(Memory::new(1 << 20)?),
        vcpus: 1,
        guest,
        serial: Box::new(io::sink()),
        cpu,
    })?)
}

/// A machine whose guest reads its TSC again and again.
fn tsc_guest(clocks: ClockPolicy) -> Result<KvmMachine, Box<dyn Error>> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&TSC_GUEST)?;
    let image = GuestImage::Flat {
        file: file.path().into(),
        address: 0x1000,
    };
    let options = CpuOptions {
        clocks,
        ..CpuOptions::default()
    };
    build(Some(image), options)
}

/// An empty machine, for a guest to come.
fn target(clocks: ClockPolicy) -> Result<KvmMachine, Box<dyn Error>> {
    build(
        None,
        CpuOptions {
            clocks,
            ..CpuOptions::default()
        },
    )
}

/// Lets the guest run until it has read its TSC anew, stops it, and returns what it read.
fn run_and_read(machine: &mut KvmMachine) -> Result<u64, Box<dyn Error>> {
    let memory = Arc::clone(machine.memory());
    memory.guest().write_obj(0u64, TSC_AT)?;
    machine.resume()?;
    let deadline = Instant::now() + PATIENCE;
    while memory.guest().read_obj::<u32>(GuestAddress(TSC_AT.0 + 4))? == 0
        && memory.guest().read_obj::<u32>(TSC_AT)? == 0
    {
        assert!(Instant::now() < deadline, "the guest does not run");
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(Duration::from_millis(2));
    machine.stop()?;
    Ok(memory.guest().read_obj(TSC_AT)?)
}

fn section<'a>(sections: &'a mut [SavedSection], name: &str) -> &'a mut Vec<u8> {
    let found = sections.iter_mut().find(|section| section.idstr == name);
    &mut found.expect("a section of that name").body
}

fn kvmclock(sections: &mut [SavedSection]) -> Result<u64, Box<dyn Error>> {
    let body = section(sections, "kvmclock");
    Ok(u64::from_be_bytes(body[..8].try_into()?))
}

/// Adds to the big-endian number at the end of a body.
fn add_to_the_end(body: &mut [u8], bytes: usize, change: i64) {
    let at = body.len() - bytes;
    let number = body[at..]
        .iter()
        .fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    let number = number.wrapping_add_signed(change).to_be_bytes();
    body[at..].copy_from_slice(&number[8 - bytes..]);
}

fn load(machine: &mut KvmMachine, sections: &[SavedSection]) -> Outcome {
    let tree = machine.devices()?;
    let mut parsed = Vec::new();
    for s in sections {
        let section = tree.parse_section(&s.idstr, s.instance_id, s.version, &s.body, true)?;
        parsed.push(section.section);
    }
    let staged = tree.stage(parsed)?;
    Ok(tree.reset_then_install(staged)?)
}

/// The whole error, causes included.
fn told(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

fn a_stopped_machine_saves_the_same_whatever_its_clocks_do() -> Outcome {
    for clocks in [STANDS, ClockPolicy::default(), FOLLOWS] {
        let mut machine = tsc_guest(clocks)?;
        run_and_read(&mut machine)?;
        let first = machine.devices()?.save_all()?;
        thread::sleep(Duration::from_millis(20));
        machine.stop()?;
        assert_eq!(machine.devices()?.save_all()?, first, "{clocks:?}");
    }
    Ok(())
}

fn kvmclock_stands_in_a_pause_or_goes_on() -> Outcome {
    for (clocks, goes_on) in [(STANDS, false), (ClockPolicy::default(), true)] {
        let mut machine = tsc_guest(clocks)?;
        run_and_read(&mut machine)?;
        let before = kvmclock(&mut machine.devices()?.save_all()?)?;
        thread::sleep(PAUSE);
        let since = Instant::now();
        machine.resume()?;
        machine.stop()?;
        let ran = since.elapsed();
        let after = kvmclock(&mut machine.devices()?.save_all()?)?;
        let passed = Duration::from_nanos(after.saturating_sub(before));
        if goes_on {
            assert!(passed >= PAUSE, "{passed:?} of {PAUSE:?}");
        } else {
            assert!(passed <= ran, "it went on for {passed:?} in {ran:?}");
        }
    }
    Ok(())
}

fn a_loaded_kvmclock_goes_on_by_the_time_since_it_was_read() -> Outcome {
    const AGO: Duration = Duration::from_secs(3);
    let mut source = tsc_guest(ClockPolicy::default())?;
    run_and_read(&mut source)?;
    let mut saved = source.devices()?.save_all()?;
    add_to_the_end(section(&mut saved, "kvmclock"), 8, -3_000_000_000);
    let before = kvmclock(&mut saved)?;
    for (clocks, goes_on) in [(ClockPolicy::default(), true), (STANDS, false)] {
        let mut machine = target(clocks)?;
        load(&mut machine, &saved)?;
        assert_eq!(machine.devices()?.save_all()?, saved, "read back");
        let since = Instant::now();
        machine.resume()?;
        machine.stop()?;
        let ran = since.elapsed();
        let passed = kvmclock(&mut machine.devices()?.save_all()?)?.saturating_sub(before);
        let passed = Duration::from_nanos(passed);
        if goes_on {
            assert!(passed >= AGO, "{passed:?} of {AGO:?}");
        } else {
            assert!(passed <= ran, "it went on for {passed:?} in {ran:?}");
        }
    }
    // A source whose clock is ahead of this host's cannot have the guest's go backwards.
    add_to_the_end(section(&mut saved, "kvmclock"), 8, 3_600_000_000_000);
    let mut machine = target(ClockPolicy::default())?;
    load(&mut machine, &saved)?;
    machine.resume()?;
    machine.stop()?;
    assert!(kvmclock(&mut machine.devices()?.save_all()?)? >= before);
    Ok(())
}

/// For how long the guest's TSC goes on in a pause, how long the pause is, and how long the guest runs
/// before and behind it.
fn tsc_in_a_pause(clocks: ClockPolicy) -> Result<[Duration; 3], Box<dyn Error>> {
    let mut machine = tsc_guest(clocks)?;
    let before = run_and_read(&mut machine)?;
    let since = Instant::now();
    thread::sleep(PAUSE * 2);
    let slept = since.elapsed();
    let after = run_and_read(&mut machine)?;
    let ran = since.elapsed() - slept;
    let khz = u128::from(tsc_khz(&mut machine)?);
    let nanos = u128::from(after.wrapping_sub(before)) * 1_000_000 / khz;
    Ok([Duration::from_nanos(u64::try_from(nanos)?), slept, ran])
}

fn the_tsc_goes_on_in_a_pause() -> Outcome {
    let [passed, slept, _] = tsc_in_a_pause(FOLLOWS)?;
    assert!(passed >= PAUSE, "{passed:?} of {slept:?}");
    Ok(())
}

fn the_tsc_stands_in_a_pause() -> Outcome {
    let [passed, _, ran] = tsc_in_a_pause(STANDS)?;
    assert!(passed <= ran, "it went on for {passed:?} in {ran:?}");
    Ok(())
}

fn the_tsc_of_a_kvm_without_offsets_goes_on_whatever_is_asked_for() -> Outcome {
    let [passed, slept, _] = tsc_in_a_pause(STANDS)?;
    assert!(passed >= PAUSE, "{passed:?} of {slept:?}");
    Ok(())
}

/// kHz, by what the machine saves.
fn tsc_khz(machine: &mut KvmMachine) -> Result<u32, Box<dyn Error>> {
    let mut saved = machine.devices()?.save_all()?;
    let body = section(&mut saved, "vcpu-msrs");
    Ok(u32::from_be_bytes(body[body.len() - 4..].try_into()?))
}

/// What a source saves whose TSC runs at this host's frequency and `change` kHz, and that frequency.
fn at_another_frequency(
    change: fn(u32) -> u32,
) -> Result<(Vec<SavedSection>, u32), Box<dyn Error>> {
    let mut source = tsc_guest(STANDS)?;
    let host = tsc_khz(&mut source)?;
    let mut saved = source.devices()?.save_all()?;
    let change = i64::from(change(host));
    add_to_the_end(section(&mut saved, "vcpu-msrs"), 4, change);
    Ok((saved, host))
}

fn a_tsc_frequency_as_good_as_the_same_is_taken() -> Outcome {
    // KVM takes a hundred in a million for none.
    let (near, _) = at_another_frequency(|host| host / 10_000)?;
    let mut machine = target(STANDS)?;
    load(&mut machine, &near)?;
    assert_eq!(machine.devices()?.save_all()?, near, "read back");
    machine.resume()?;
    machine.stop()?;
    Ok(())
}

fn another_tsc_frequency_is_scaled_to() -> Outcome {
    let (far, _) = at_another_frequency(|host| host / 5)?;
    let mut machine = target(STANDS)?;
    load(&mut machine, &far)?;
    assert_eq!(machine.devices()?.save_all()?, far, "read back");
    Ok(())
}

fn another_tsc_frequency_is_refused_with_both_values() -> Outcome {
    let (far, host) = at_another_frequency(|host| host / 5)?;
    let mut machine = target(STANDS)?;
    let before = machine.devices()?.save_all()?;
    let result = load(&mut machine, &far);
    let error = told(&*result.err().ok_or("another frequency is taken")?);
    for part in [
        format!("runs at {} kHz", host + host / 5),
        format!("this host's at {host} kHz"),
    ] {
        assert!(error.contains(&part), "{error}");
    }
    // Nothing was lost by it.
    assert_eq!(machine.devices()?.save_all()?, before);
    Ok(())
}

fn a_state_of_before_loads_without_frequency_and_real_time() -> Outcome {
    let mut source = tsc_guest(ClockPolicy::default())?;
    run_and_read(&mut source)?;
    let mut saved = source.devices()?.save_all()?;
    section(&mut saved, "kvmclock").truncate(8);
    let msrs = section(&mut saved, "vcpu-msrs");
    let subsection = 2 + "vcpu-msrs/tsc".len() + 4 + 4;
    msrs.truncate(msrs.len() - subsection);
    let mut machine = target(FOLLOWS)?;
    load(&mut machine, &saved)?;
    machine.resume()?;
    machine.stop()?;
    // And a machine that is not to compare has a state as it was before.
    let options = CpuOptions {
        clocks: STANDS,
        compare: false,
        ..CpuOptions::default()
    };
    let mut silent = build(None, options)?;
    load(&mut silent, &saved)?;
    assert_eq!(silent.devices()?.save_all()?, saved);
    assert_eq!(silent.common().save_early()?, []);
    // What it is told it does not mind.
    compare(&mut with(&[], &["7.0.ebx=1"])?, &mut silent)?;
    Ok(())
}

/// Compares what a source says with what this machine is, as a target does.
fn compare(source: &mut KvmMachine, here: &mut KvmMachine) -> Result<(), String> {
    let told = |error: &dyn Error| told(error);
    let sections = source.common().save_early().map_err(|e| told(&e))?;
    assert_eq!(sections.len(), 1);
    let tree = here.common();
    let mut parsed = Vec::new();
    for s in &sections {
        let section = tree.parse_section(&s.idstr, s.instance_id, s.version, &s.body, true);
        parsed.push(section.map_err(|e| told(&e))?.section);
    }
    tree.stage(parsed).map(drop).map_err(|e| told(&e))
}

fn with(masks: &[&str], pretend: &[&str]) -> Result<KvmMachine, Box<dyn Error>> {
    let parse = |masks: &[&str]| -> Result<Vec<CpuMask>, String> {
        masks.iter().map(|mask| mask.parse()).collect()
    };
    build(
        None,
        CpuOptions {
            masks: parse(masks)?,
            pretend: parse(pretend)?,
            ..CpuOptions::default()
        },
    )
}

fn an_unlike_cpu_is_refused_by_leaf_register_and_bit() -> Outcome {
    let mut here = with(&[], &[])?;
    compare(&mut with(&[], &[])?, &mut here)?;
    let mut other = with(&[], &["0x7.0.ebx=0x20", "0x80000001.0.ecx=0x40"])?;
    let error = compare(&mut other, &mut here).unwrap_err();
    for part in [
        "cpuid leaf 0x7 subleaf 0x0 ebx is 0x",
        ", bit 5 only",
        "cpuid leaf 0x80000001 subleaf 0x0 ecx",
        ", bit 6 only",
        "--cpu-mask 0x7.0x0.ebx=0xffffffdf,0x80000001.0x0.ecx=0xffffffbf on both sides",
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
    Ok(())
}

fn a_mask_on_both_sides_makes_them_alike() -> Outcome {
    // The power management leaf: nothing that the kernel here relies on.
    let masks = ["6.0.eax=0", "6.0.ecx=0"];
    let mut plain = with(&[], &[])?;
    let mut masked = with(&masks, &[])?;
    compare(&mut with(&masks, &[])?, &mut masked)?;
    let error = compare(&mut plain, &mut masked).unwrap_err();
    assert!(error.contains("leaf 0x6 subleaf 0x0 eax"), "{error}");
    assert!(error.contains("0x00000000 here"), "{error}");
    // A model-specific register, which the state then does not have.
    let mut saved = plain.devices()?.save_all()?;
    let body = section(&mut saved, "vcpu-msrs");
    let count = usize::try_from(u32::from_be_bytes(body[..4].try_into()?))?;
    let last = u32::from_be_bytes(body[4 * count..4 * count + 4].try_into()?);
    let mask = format!("msr:{last:#x}");
    let mut without = with(&[&mask], &[])?;
    let error = compare(&mut plain, &mut without).unwrap_err();
    let named = format!("only the source has model-specific register {last:#x}");
    assert!(error.contains(&named), "{error}");
    assert!(error.contains(&format!("--cpu-mask {mask}")), "{error}");
    let fewer = without.devices()?.save_all()?;
    assert_ne!(fewer, saved);
    load(&mut without, &fewer)
}

/// RDRAND and AVX, of which PVM shows the host's.
const LEAF_1: &str = "1.0.ecx=0x8fffffff";

fn a_mask_of_leaf_1_makes_both_sides_alike() -> Outcome {
    let mut masked = with(&[LEAF_1], &[])?;
    compare(&mut with(&[LEAF_1], &[])?, &mut masked)?;
    let error = compare(&mut with(&[], &[])?, &mut masked).unwrap_err();
    assert!(error.contains("leaf 0x1 subleaf 0x0 ecx"), "{error}");
    Ok(())
}

fn a_mask_that_kvm_does_not_apply_is_refused() -> Outcome {
    let result = with(&[LEAF_1], &[]);
    let error = result.err().ok_or("the mask is taken")?.to_string();
    assert!(error.contains("does not mask cpuid 0x1.0x0.ecx"), "{error}");
    Ok(())
}

/// What of a KVM a test is about.
#[derive(Clone, Copy)]
enum Need {
    /// Any.
    Kvm,
    /// One that runs guests in hardware: it offsets the TSC and masks all of CPUID.
    Hardware,
    /// PVM, which does neither.
    Pvm,
    /// One that scales the TSC.
    Scaling,
    /// One that does not.
    NoScaling,
}

impl Need {
    /// Why this host's KVM is another one.
    fn missing(self) -> Option<&'static str> {
        let scales = || Kvm::new().is_ok_and(|kvm| kvm.check_extension(Cap::TscControl));
        match self {
            Self::Hardware if is_pvm() => Some(
                "needs a KVM that runs guests in hardware: this one is PVM, which offsets no TSC and does not \
                 mask all of CPUID",
            ),
            Self::Pvm if !is_pvm() => Some("needs PVM: this KVM runs guests in hardware"),
            Self::Scaling if !scales() => Some(
                "needs a KVM that scales the TSC (KVM_CAP_TSC_CONTROL), which this one does not",
            ),
            Self::NoScaling if scales() => Some(
                "needs a KVM that does not scale the TSC (KVM_CAP_TSC_CONTROL), which this one does",
            ),
            _ => None,
        }
    }
}

/// Names a test by its function.
macro_rules! tests {
    ($($need:ident $test:ident,)*) => {
        [$((stringify!($test), Need::$need, $test as fn() -> Outcome)),*]
    };
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let unavailable = kvm_unavailable().map(|error| told(&error));
    let required = env::var_os("CI").is_some_and(|ci| ci == "true");
    let tests = tests![
        Kvm a_stopped_machine_saves_the_same_whatever_its_clocks_do,
        Kvm kvmclock_stands_in_a_pause_or_goes_on,
        Kvm a_loaded_kvmclock_goes_on_by_the_time_since_it_was_read,
        Kvm the_tsc_goes_on_in_a_pause,
        Hardware the_tsc_stands_in_a_pause,
        Pvm the_tsc_of_a_kvm_without_offsets_goes_on_whatever_is_asked_for,
        Kvm a_tsc_frequency_as_good_as_the_same_is_taken,
        Scaling another_tsc_frequency_is_scaled_to,
        NoScaling another_tsc_frequency_is_refused_with_both_values,
        Kvm a_state_of_before_loads_without_frequency_and_real_time,
        Kvm an_unlike_cpu_is_refused_by_leaf_register_and_bit,
        Kvm a_mask_on_both_sides_makes_them_alike,
        Hardware a_mask_of_leaf_1_makes_both_sides_alike,
        Pvm a_mask_that_kvm_does_not_apply_is_refused,
    ];
    let trials = tests.map(|(name, need, test)| {
        let unavailable = unavailable.clone();
        Trial::ignorable_test(name, move || match (unavailable, need.missing()) {
            (Some(why), _) if required => Err(Failed::from(why)),
            (Some(why), _) => Ok(Completion::ignored_with(why)),
            // No machine has every KVM.
            (None, Some(why)) => Ok(Completion::ignored_with(why)),
            (None, None) => match test() {
                Ok(()) => Ok(Completion::Completed),
                Err(error) => Err(Failed::from(error.to_string())),
            },
        })
    });
    libtest_mimic::run(&arguments, trials.into_iter().collect()).exit_code()
}
