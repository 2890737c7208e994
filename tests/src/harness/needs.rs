//! What a test needs of the machine, and what it is given of it.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::result::Result as StdResult;

use libtest_mimic::{Failed, Trial};

use super::{OneTrial, Tests, missing, new_trial, qemu_summary};
use crate::etcd;
use crate::huge_pages::HugePages;
use crate::linux::Linux;
use crate::qemu::{self, Accel, Binary};
use crate::{Result, disk, netns, scripts};

/// A version of QEMU, major and minor.
type Version = (u32, u32);

const NEWEST: Version = (u32::MAX, 0);

/// What a test needs of the machine. Nothing, unless more is said.
///
/// ```no_run
/// use tests::harness::{self, Needs};
///
/// fn main() -> std::process::ExitCode {
///     harness::run([
///         Needs::NOTHING.test("one_and_one_are_two", || Ok(assert_eq!(1 + 1, 2))),
///         Needs::NOTHING.kvm().qemu((10, 0)).test_with("it_has_a_version", |given| {
///             assert!(given.qemu().version() >= (10, 0, 0));
///             Ok(())
///         }),
///     ])
/// }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// The versions that will do.
    qemu: Option<Range<Version>>,
    kvm: bool,
    live_guests: bool,
    network: bool,
    disk: bool,
    etcd: bool,
    linux: bool,
    script: Option<&'static str>,
    huge_pages: Option<u64>,
}

impl Needs {
    /// Any machine will do.
    pub const NOTHING: Self = Self {
        qemu: None,
        kvm: false,
        live_guests: false,
        network: false,
        disk: false,
        etcd: false,
        linux: false,
        script: None,
        huge_pages: None,
    };

    /// Needs a QEMU of at least version `since`: a trial for each that the machine has.
    #[must_use]
    pub const fn qemu(mut self, since: Version) -> Self {
        self.qemu = Some(since..NEWEST);
        self
    }

    /// As [`Needs::qemu`], for what QEMU does not do any more in version `before`.
    #[must_use]
    pub const fn qemu_before(mut self, since: Version, before: Version) -> Self {
        self.qemu = Some(since..before);
        self
    }

    /// Needs `/dev/kvm`.
    #[must_use]
    pub const fn kvm(self) -> Self {
        self.kvm_if(true)
    }

    /// Needs `/dev/kvm` if `kvm` says so.
    #[must_use]
    pub const fn kvm_if(mut self, kvm: bool) -> Self {
        self.kvm = kvm;
        self
    }

    /// Needs `/dev/kvm` for each QEMU whose [`Binary::live_accel`] is that.
    #[must_use]
    pub const fn live_guests(mut self) -> Self {
        self.live_guests = true;
        self
    }

    /// Needs [networks](netns::Network) of its own.
    #[must_use]
    pub const fn network(mut self) -> Self {
        self.network = true;
        self
    }

    /// Needs [disks](disk::Disk) of its own.
    #[must_use]
    pub const fn disk(mut self) -> Self {
        self.disk = true;
        self
    }

    const fn etcd(mut self) -> Self {
        self.etcd = true;
        self
    }

    /// Needs a [Linux guest](Linux), and is [given](Given::linux) it.
    #[must_use]
    pub const fn linux(mut self) -> Self {
        self.linux = true;
        self
    }

    /// Needs the file `script` of QEMU's scripts, and is [given](Given::script) its path.
    #[must_use]
    pub const fn script(mut self, script: &'static str) -> Self {
        self.script = Some(script);
        self
    }

    /// Needs so many huge pages, which are kept for the test.
    #[must_use]
    pub const fn huge_pages(mut self, count: u64) -> Self {
        self.huge_pages = Some(count);
        self
    }

    /// A test that uses nothing that it is given.
    pub fn test(
        &self,
        name: &str,
        test: impl Fn() -> Result<()> + Clone + Send + 'static,
    ) -> Tests {
        self.test_with(name, move |_| test())
    }

    /// A test of a QEMU.
    pub fn test_qemu(
        &self,
        name: &str,
        test: impl Fn(&Binary) -> Result<()> + Clone + Send + 'static,
    ) -> Tests {
        self.test_with(name, move |given| test(given.qemu()))
    }

    /// A test that needs an etcd too, of which it is given the program.
    pub fn test_etcd(
        &self,
        name: &str,
        test: impl Fn(&Path) -> Result<()> + Clone + Send + 'static,
    ) -> Tests {
        let needs = self.clone().etcd();
        needs.test_with(name, move |given| test(given.etcd()))
    }

    /// A test that uses what it is given.
    pub fn test_with(
        &self,
        name: &str,
        test: impl Fn(Given) -> Result<()> + Clone + Send + 'static,
    ) -> Tests {
        let trials = match &self.qemu {
            None => vec![self.trial(name, None, test)],
            Some(versions) => match fitting(versions) {
                // A wrong path was asked for by name: no reason to skip in silence.
                Err(Unfit::Wrong(e)) => {
                    vec![OneTrial {
                        trial: Trial::test(name, move || Err(Failed::from(e))),
                        lacks_kvm: false,
                    }]
                }
                Err(Unfit::Missing(reason)) => {
                    vec![OneTrial {
                        trial: Trial::ignorable_test(name, move || missing(reason)),
                        lacks_kvm: false,
                    }]
                }
                Ok(binaries) => {
                    let of = |binary| self.trial(name, Some(binary), test.clone());
                    binaries.into_iter().map(of).collect()
                }
            },
        };
        Tests { trials, axes: None }
    }

    fn trial(
        &self,
        name: &str,
        qemu: Option<&'static Binary>,
        test: impl FnOnce(Given) -> Result<()> + Send + 'static,
    ) -> OneTrial {
        let mut needs = self.clone();
        needs.kvm |= self.live_guests && qemu.is_some_and(|q| q.live_accel() == Accel::Kvm);
        let kind = needs.kind(qemu);
        OneTrial {
            lacks_kvm: needs.kvm && missing_kvm().is_some(),
            trial: new_trial(name, kind, move || needs.find(qemu), test),
        }
    }

    /// What the test's line in the output says that it runs with.
    fn kind(&self, qemu: Option<&Binary>) -> String {
        let mut parts: Vec<String> = qemu.iter().map(ToString::to_string).collect();
        let named = [
            (self.kvm, "KVM"),
            (self.network, "network"),
            (self.disk, "disk"),
            (self.etcd, "etcd"),
            (self.linux, "Linux"),
            (self.script.is_some(), "script"),
            (self.huge_pages.is_some(), "huge pages"),
        ];
        let needed = named.into_iter().filter(|(is_needed, _)| *is_needed);
        parts.extend(needed.map(|(_, name)| name.to_owned()));
        parts.join(", ")
    }

    /// All of it, or the reason why this machine lacks something.
    fn find(&self, qemu: Option<&'static Binary>) -> StdResult<Given, String> {
        let lacks = [
            (self.kvm, missing_kvm as fn() -> Option<String>),
            (self.network, || netns::missing().map(str::to_owned)),
            (self.disk, || disk::missing().map(str::to_owned)),
        ];
        for (is_needed, lacks) in lacks {
            if let Some(reason) = is_needed.then(lacks).flatten() {
                return Err(reason);
            }
        }
        Ok(Given {
            qemu,
            etcd: self.etcd.then(etcd::find).transpose()?,
            linux: self.linux.then(Linux::find).transpose()?,
            script: self.script.map(scripts::find).transpose()?,
            huge_pages: self.huge_pages.map(HugePages::reserve).transpose()?,
        })
    }
}

/// What a test is given of what it needs.
///
/// # Panics
/// A test that asks for something that its [`Needs`] did not name panics.
#[derive(Debug)]
pub struct Given {
    qemu: Option<&'static Binary>,
    etcd: Option<PathBuf>,
    linux: Option<Linux>,
    script: Option<PathBuf>,
    /// Kept until the test is over.
    huge_pages: Option<HugePages>,
}

impl Given {
    /// One of the QEMUs of this machine.
    #[must_use]
    pub fn qemu(&self) -> &'static Binary {
        self.qemu.expect("the test did not say that it needs QEMU")
    }

    fn etcd(&self) -> &Path {
        let etcd = self.etcd.as_deref();
        etcd.expect("the test did not say that it needs etcd")
    }

    /// The Linux guest.
    #[must_use]
    pub fn linux(&self) -> &Linux {
        let linux = self.linux.as_ref();
        linux.expect("the test did not say that it needs Linux")
    }

    /// The huge pages, for a test that wants to see them given back.
    #[must_use]
    pub fn into_huge_pages(self) -> HugePages {
        let pages = self.huge_pages;
        pages.expect("the test did not say that it needs huge pages")
    }

    /// The script of QEMU's.
    #[must_use]
    pub fn script(&self) -> &Path {
        let script = self.script.as_deref();
        script.expect("the test did not say that it needs a script")
    }
}

/// Why there is no QEMU for a test.
enum Unfit {
    /// A path that was named is no QEMU.
    Wrong(&'static str),
    /// This machine has none of these versions.
    Missing(String),
}

/// The QEMUs of this machine of one of these versions, at least one.
fn fitting(versions: &Range<Version>) -> StdResult<Vec<&'static Binary>, Unfit> {
    let all = qemu::binaries().map_err(Unfit::Wrong)?;
    let fits = |b: &&Binary| b.is_since(versions.start) && !b.is_since(versions.end);
    let fitting: Vec<&'static Binary> = all.iter().filter(fits).collect();
    if !fitting.is_empty() {
        return Ok(fitting);
    }
    let (major, minor) = versions.start;
    let newest = match versions.end {
        NEWEST => "or newer".to_owned(),
        (major, minor) => format!("up to {major}.{minor}"),
    };
    Err(Unfit::Missing(format!(
        "needs QEMU {major}.{minor} {newest} in {} or on PATH; found {}",
        qemu::VARIABLE,
        qemu_summary()
    )))
}

/// Why guests cannot run in KVM here, `None` if they can.
#[must_use]
pub fn missing_kvm() -> Option<String> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => None,
        Err(e) => Some(format!("needs /dev/kvm: {e}")),
    }
}
