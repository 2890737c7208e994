//! How the tests that need something of the machine are run: what is missing makes a test ignored,
//! with the reason in the output, and failed where the environment says `CI=true`.
//!
//! A test file sets `harness = false` in `Cargo.toml` and calls [`run`] with its trials.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::{env, fmt};

use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::Result;
use crate::etcd;
use crate::huge_pages::HugePages;
use crate::linux::Linux;
use crate::qemu::{self, Accel, Binary};
use crate::{disk, netns, scripts};

/// Runs the trials as `cargo test` expects, after a line on what they run against.
pub fn run(trials: impl IntoIterator<Item = Trial>) -> ExitCode {
    let arguments = Arguments::from_args();
    if !arguments.list {
        println!("\nrunning against: {}; {}", qemu_summary(), kvm_summary());
    }
    libtest_mimic::run(&arguments, trials.into_iter().collect()).exit_code()
}

/// A test that runs anywhere.
pub fn anywhere(name: &str, test: fn() -> Result<()>) -> Trial {
    anywhere_with(name, test)
}

/// As [`anywhere`], for a test with parameters.
pub fn anywhere_with(name: &str, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || Ok(test()?))
}

/// A test that needs `/dev/kvm`.
pub fn on_kvm(name: &str, test: fn() -> Result<()>) -> Trial {
    on_kvm_with(name, test)
}

/// As [`on_kvm`], for a test with parameters.
pub fn on_kvm_with(name: &str, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || match missing_kvm() {
        None => Ok(test().map(|()| Completion::Completed)?),
        Some(reason) => missing(reason),
    })
    .with_kind("KVM")
}

/// A test that needs [networks](netns::Network) of its own, and `/dev/kvm` too if `kvm` says so.
pub fn on_network(
    name: &str,
    kvm: bool,
    test: impl FnOnce() -> Result<()> + Send + 'static,
) -> Trial {
    on_host(name, "network", netns::missing, kvm, test)
}

/// As [`on_network`], for a test that needs [disks](disk::Disk) of its own.
pub fn on_disk(name: &str, kvm: bool, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    on_host(name, "disk", disk::missing, kvm, test)
}

/// As [`on_network`], for a test that needs an etcd too, of which it is given the program.
pub fn on_network_with_etcd(
    name: &str,
    kvm: bool,
    test: impl FnOnce(&Path) -> Result<()> + Send + 'static,
) -> Trial {
    static LACKS: OnceLock<Option<String>> = OnceLock::new();
    let lacks = || {
        let lacks = LACKS.get_or_init(|| etcd::find().err()).as_deref();
        netns::missing().or(lacks)
    };
    on_host(name, "network, etcd", lacks, kvm, || test(&etcd::find()?))
}

fn on_host(
    name: &str,
    what: &str,
    lacks: fn() -> Option<&'static str>,
    kvm: bool,
    test: impl FnOnce() -> Result<()> + Send + 'static,
) -> Trial {
    let kind = if kvm {
        format!("KVM, {what}")
    } else {
        what.to_owned()
    };
    let reason = move || {
        let kvm = missing_kvm().filter(|_| kvm);
        kvm.or_else(|| lacks().map(str::to_owned))
    };
    Trial::ignorable_test(name, move || match reason() {
        None => Ok(test().map(|()| Completion::Completed)?),
        Some(reason) => missing(reason),
    })
    .with_kind(kind)
}

/// A test that needs an etcd, of which it is given the program.
pub fn on_etcd(name: &str, test: fn(&Path) -> Result<()>) -> Trial {
    Trial::ignorable_test(name, move || match etcd::find() {
        Ok(program) => Ok(test(&program).map(|()| Completion::Completed)?),
        Err(reason) => missing(reason),
    })
    .with_kind("etcd")
}

/// A version of QEMU, major and minor.
type Version = (u32, u32);

/// A test for each QEMU of at least version `since` that the machine has.
pub fn on_each_qemu(name: &str, since: Version, test: fn(&Binary) -> Result<()>) -> Vec<Trial> {
    each_qemu(name, &(since..NEWEST), |_| Need::Nothing, test)
}

/// As [`on_each_qemu`], for what QEMU does not do any more in version `before`.
pub fn on_each_qemu_before(
    name: &str,
    since: Version,
    before: Version,
    test: fn(&Binary) -> Result<()>,
) -> Vec<Trial> {
    each_qemu(name, &(since..before), |_| Need::Nothing, test)
}

/// As [`on_each_qemu`], for a test that needs `/dev/kvm` too.
pub fn on_each_qemu_with_kvm(
    name: &str,
    since: Version,
    test: fn(&Binary) -> Result<()>,
) -> Vec<Trial> {
    each_qemu(name, &(since..NEWEST), |_| Need::Kvm, test)
}

/// As [`on_each_qemu`], for a test of guests that run on [`Binary::live_accel`].
pub fn on_each_qemu_with_live_guests(
    name: &str,
    since: Version,
    test: impl Fn(&Binary) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let need = |binary: &Binary| match binary.live_accel() {
        Accel::Tcg => Need::Nothing,
        Accel::Kvm => Need::Kvm,
    };
    each_qemu(name, &(since..NEWEST), need, test)
}

/// As [`on_each_qemu`], for a test that needs a [`Linux`] guest too.
pub fn on_each_qemu_with_linux(
    name: &str,
    since: Version,
    test: fn(&Binary, &Linux) -> Result<()>,
) -> Vec<Trial> {
    let test = move |binary: &Binary| test(binary, &Linux::find()?);
    each_qemu(name, &(since..NEWEST), |_| Need::Linux, test)
}

/// As [`on_each_qemu`], for a test that needs the file `script` of QEMU's scripts too, of which it
/// is given the path.
pub fn on_each_qemu_with_script(
    name: &str,
    since: Version,
    script: &'static str,
    test: impl Fn(&Binary, &Path) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let test = move |binary: &Binary| test(binary, &scripts::find(script)?);
    each_qemu(name, &(since..NEWEST), |_| Need::Script(script), test)
}

/// As [`on_each_qemu`], for a test that needs `count` huge pages too, which it is given.
pub fn on_each_qemu_with_huge_pages(
    name: &str,
    since: Version,
    count: u64,
    test: impl Fn(&Binary, HugePages) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let test = move |binary: &Binary| test(binary, HugePages::reserve(count)?);
    each_qemu(name, &(since..NEWEST), |_| Need::HugePages(count), test)
}

/// A trial of the file `script` of QEMU's scripts, which needs no QEMU.
pub fn on_script(name: &str, script: &'static str, test: fn(&Path) -> Result<()>) -> Trial {
    Trial::ignorable_test(name, move || match scripts::find(script) {
        Ok(path) => Ok(test(&path).map(|()| Completion::Completed)?),
        Err(reason) => missing(reason),
    })
    .with_kind("script")
}

/// As [`on_each_qemu_with_linux`] and [`on_each_qemu_with_script`].
pub fn on_each_qemu_with_linux_and_script(
    name: &str,
    since: Version,
    script: &'static str,
    test: fn(&Binary, &Linux, &Path) -> Result<()>,
) -> Vec<Trial> {
    let test = move |binary: &Binary| test(binary, &Linux::find()?, &scripts::find(script)?);
    each_qemu(
        name,
        &(since..NEWEST),
        |_| Need::LinuxAndScript(script),
        test,
    )
}

const NEWEST: Version = (u32::MAX, 0);

/// What a test needs beside QEMU.
#[derive(Clone, Copy)]
enum Need {
    Nothing,
    Kvm,
    Linux,
    /// A script of QEMU's, by its file name.
    Script(&'static str),
    /// Both.
    LinuxAndScript(&'static str),
    /// So many huge pages.
    HugePages(u64),
}

impl Need {
    const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "",
            Self::Kvm => ", KVM",
            Self::Linux => ", Linux",
            Self::Script(_) => ", script",
            Self::LinuxAndScript(_) => ", Linux, script",
            Self::HugePages(_) => ", huge pages",
        }
    }

    /// Why this machine does not have it, `None` if it has.
    fn missing(self) -> Option<String> {
        match self {
            Self::Nothing => None,
            Self::Kvm => missing_kvm(),
            Self::Linux => Linux::find().err(),
            Self::Script(name) => scripts::find(name).err(),
            Self::LinuxAndScript(name) => Linux::find().err().or_else(|| scripts::find(name).err()),
            Self::HugePages(count) => HugePages::reserve(count).err(),
        }
    }
}

fn each_qemu(
    name: &str,
    versions: &Range<Version>,
    need: impl Fn(&Binary) -> Need,
    test: impl Fn(&Binary) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let all = match qemu::binaries() {
        Ok(all) => all,
        // A wrong path was asked for by name: no reason to skip in silence.
        Err(e) => return vec![Trial::test(name, move || Err(Failed::from(e)))],
    };
    let fits = |b: &&Binary| b.is_since(versions.start) && !b.is_since(versions.end);
    let fitting: Vec<&'static Binary> = all.iter().filter(fits).collect();
    if fitting.is_empty() {
        let (major, minor) = versions.start;
        let newest = match versions.end {
            NEWEST => "or newer".to_owned(),
            (major, minor) => format!("up to {major}.{minor}"),
        };
        let reason = format!(
            "needs QEMU {major}.{minor} {newest} in {} or on PATH; found {}",
            qemu::VARIABLE,
            qemu_summary()
        );
        return vec![Trial::ignorable_test(name, move || missing(reason))];
    }
    fitting
        .into_iter()
        .map(|binary| {
            let need = need(binary);
            Trial::ignorable_test(name, move || match need.missing() {
                None => Ok(test(binary).map(|()| Completion::Completed)?),
                Some(reason) => missing(reason),
            })
            .with_kind(format!("{binary}{}", need.name()))
        })
        .collect()
}

/// Ignored with the reason; failed in CI, where the machine has to have everything.
fn missing(reason: impl fmt::Display) -> std::result::Result<Completion, Failed> {
    if env::var("CI").is_ok_and(|ci| ci == "true") {
        Err(Failed::from(format!("missing in CI: {reason}")))
    } else {
        Ok(Completion::ignored_with(reason))
    }
}

/// Why guests cannot run in KVM here, `None` if they can.
#[must_use]
pub fn missing_kvm() -> Option<String> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => None,
        Err(e) => Some(format!("needs /dev/kvm: {e}")),
    }
}

fn qemu_summary() -> String {
    match qemu::binaries() {
        Ok([]) => "no QEMU".to_owned(),
        Ok(all) => {
            let names: Vec<String> = all.iter().map(ToString::to_string).collect();
            names.join(", ")
        }
        Err(e) => e.to_owned(),
    }
}

fn kvm_summary() -> &'static str {
    if missing_kvm().is_none() {
        "KVM"
    } else {
        "no KVM"
    }
}
