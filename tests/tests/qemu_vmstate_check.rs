//! What `vmstate-check` finds between the device states of real QEMUs, beside what QEMU's own
//! `vmstate-static-checker.py` says of them: the same, but for what [`Reason`] lists.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;
use tempfile::TempDir;
use tests::harness::{self, Needs};
use tests::qemu::{self, Binary, Machine};
use tests::{Result, scripts};
use vmstate_check::dump::{Description, Field};
use vmstate_check::finding::Step;
use vmstate_check::{Difference, Dump, Finding, Severity, check, is_compatible};

const SCRIPT: &str = "vmstate-static-checker.py";

/// A machine type that each of the versions has.
const MACHINE: &str = "pc-i440fx-7.2";

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING
            .script(SCRIPT)
            .qemu((7, 2))
            .test_with("differs_from_each_version_as_qemus_script_says", |given| {
                differs_as_qemus_script_says(given.qemu(), given.script())
            }),
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("is_compatible_with_itself", is_compatible_with_itself),
        Needs::NOTHING.qemu((11, 1)).test_qemu(
            "what_stands_against_its_own_streams_is_true",
            rpmb_does_not_load,
        ),
        Needs::NOTHING
            .qemu((10, 0))
            .test_qemu("loads_in_another_version_as_it_says", loads_as_it_says),
    ])
}

/// A dump and the file that it is in.
struct Dumped {
    dump: Dump,
    file: PathBuf,
}

impl Dumped {
    fn of(qemu: &Binary, machine: &str, dir: &TempDir) -> Result<Self> {
        let file = dir.path().join(format!("{machine} of {qemu}"));
        qemu.dump_vmstate(machine, &file)?;
        let dump = Dump::read(&file)?;
        Ok(Self { dump, file })
    }
}

/// Streams load in the same build, whatever the machine type; 11.1's eMMC is the exception of
/// [`rpmb_does_not_load`].
fn is_compatible_with_itself(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let pc = Dumped::of(qemu, MACHINE, &dir)?.dump;
    let q35 = Dumped::of(qemu, "pc-q35-7.2", &dir)?.dump;
    assert!(pc.devices().count() > 200, "{}", pc.devices().count());
    assert_eq!(pc.counts_elements(), qemu.is_since((10, 0)));

    let itself = without_rpmb(check(&pc, &pc));
    assert_eq!(itself, []);
    let other = without_rpmb(check(&pc, &q35));
    let machines = Difference::Machine {
        source: MACHINE.into(),
        destination: "pc-q35-7.2".into(),
    };
    assert!(is_compatible(&other));
    assert_eq!(
        other.into_iter().map(|f| f.difference).collect::<Vec<_>>(),
        [machines]
    );
    Ok(())
}

/// Without what is found in the subsection that 11.1 has twice.
fn without_rpmb(mut findings: Vec<Finding>) -> Vec<Finding> {
    let twice = Step::Subsection("sd-card/ext_csd_modes-state".into());
    findings.retain(|f| !f.path.contains(&twice));
    findings
}

/// 11.1 gives two subsections of its SD cards one name, and its loader takes the first. An eMMC with
/// an RPMB partition sends both, and the finding against its own streams is borne out.
fn rpmb_does_not_load(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dump = Dumped::of(qemu, MACHINE, &dir)?.dump;
    let findings = check(&dump, &dump);
    let finding = findings
        .iter()
        .find(|f| f.device.as_deref() == Some("emmc"));
    let Some(finding) = finding else {
        return Err("the loader finds both subsections".into());
    };
    assert_eq!(
        finding.to_string(),
        "error: emmc > sd-card > subsection sd-card/ext_csd_modes-state > field \
         rpmb.result.key_mac: the destination reads ext_csd_rw here; the rest is not compared"
    );
    cross_with_emmc(qemu, 0, "completed")?;
    let said = cross_with_emmc(qemu, 2 << 20, "failed")?;
    assert!(said.to_string().contains("section_id"), "{said}");
    Ok(())
}

/// Migrates a machine that has an eMMC with an RPMB partition of so many bytes, which ends as
/// `status`. What the destination says of it.
fn cross_with_emmc(qemu: &Binary, rpmb: u64, status: &str) -> Result<Value> {
    const LENGTH: u64 = 64 << 20;
    let dir = tempfile::tempdir()?;
    let machine = |name: &str| -> Result<Machine> {
        let disk = dir.path().join(name);
        File::create(&disk)?.set_len(LENGTH + rpmb)?;
        Ok(Machine::new("q35", 16).args([
            "-device".to_owned(),
            "sdhci-pci".to_owned(),
            "-drive".to_owned(),
            format!("if=none,id=emmc,format=raw,file={}", disk.display()),
            "-device".to_owned(),
            format!("emmc,drive=emmc,rpmb-partition-size={rpmb}"),
        ]))
    };
    let mut source = machine("source")?.start(qemu)?;
    let mut destination = machine("destination")?.incoming().start(qemu)?;
    let uri = destination.listen("tcp:127.0.0.1:0")?;
    source.migrate(&uri)?;
    destination.wait_migration(status)
}

/// Machines of one version that another one takes over, or refuses: what the script counts among the
/// errors and we do not (`hpet`, `mc146818rtc`, `pvscsi` of 11.1) does load.
fn loads_as_it_says(source: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let s = Dumped::of(source, MACHINE, &dir)?.dump;
    let is_other = |q: &&Binary| q.is_since((10, 0)) && q.version() != source.version();
    for destination in qemu::binaries()?.iter().filter(is_other) {
        let d = Dumped::of(destination, MACHINE, &dir)?.dump;
        for (added, kinds) in [
            (None, ["hpet", "mc146818rtc"].as_slice()),
            (Some("pvscsi"), &["pvscsi"]),
            (Some("am53c974"), &["am53c974"]),
            (Some("isa-vga"), &["isa-vga"]),
        ] {
            let mut s = s.clone();
            s.retain(|kind| kinds.contains(&kind));
            let findings = check(&s, &d);
            let machine = Machine::new(MACHINE, 16);
            let machine = machine.args(added.into_iter().flat_map(|kind| ["-device", kind]));
            let mut from = machine.start(source)?;
            let mut to = machine.incoming().start(destination)?;
            let uri = to.listen("tcp:127.0.0.1:0")?;
            from.migrate(&uri)?;
            let end = to.wait_migration("completed");
            // Only machine types of before 2.6 send what stands against this one.
            let is_sent = kinds != ["pvscsi"] || source.is_since((11, 1));
            assert_eq!(
                end.is_ok(),
                is_compatible(&findings) || !is_sent,
                "{source} in {destination}: {findings:#?}, {end:?}"
            );
        }
    }
    Ok(())
}

fn differs_as_qemus_script_says(source: &Binary, script: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let s = Dumped::of(source, MACHINE, &dir)?;
    for destination in qemu::binaries()? {
        let d = Dumped::of(destination, MACHINE, &dir)?;
        let findings = check(&s.dump, &d.dump);
        let arguments = [Path::new("-s"), &s.file, Path::new("-d"), &d.file];
        let (text, errors) = scripts::run(script, &arguments)?;
        let pair = format!("{source} in {destination}");
        assert_eq!(is_compatible(&findings), errors == 0, "{pair}: {text}");

        let ours: BTreeSet<Said> = findings
            .iter()
            .filter(|f| f.severity() == Severity::Error)
            .map(Said::by_us)
            .collect::<Result<_>>()?;
        let theirs = said_by_script(&text, &s.dump)?;
        let pair_of_dumps = Pair {
            source: &s.dump,
            destination: &d.dump,
            findings: &findings,
        };
        let mut reasons = Vec::new();
        let mut is_current = true;
        for said in theirs.difference(&ours) {
            let reason = pair_of_dumps.why_only_script(said);
            let reason = reason.ok_or_else(|| format!("{pair}: only the script says {said}"))?;
            is_current &= reason != Reason::Renamed;
            reasons.push(format!("script: {said}: {reason:?}"));
        }
        for said in ours.difference(&theirs) {
            let reason = pair_of_dumps.why_only_us(said);
            let reason = reason.ok_or_else(|| format!("{pair}: only we say {said}"))?;
            reasons.push(format!("we: {said}: {reason:?}"));
        }
        let both = ours.intersection(&theirs).count();
        let is_known = |known: &&Known| known.versions == (source.version(), destination.version());
        match KNOWN.iter().find(is_known) {
            Some(known) if is_current => {
                assert_eq!(reasons, known.reasons, "{pair}");
                assert_eq!(both, known.both, "{pair}");
            }
            _ => println!("{pair}: both say {both}; {reasons:#?}"),
        }
    }
    Ok(())
}

/// A finding as far as both say it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Said {
    device: String,
    /// The innermost description or subsection.
    description: String,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    /// The device is not there.
    Device,
    /// The device has no description.
    Description,
    /// The description has another name.
    Name,
    Version,
    Field(String),
    Subsection(String),
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = format!("{} > {}", self.device, self.description);
        match &self.what {
            What::Field(name) => write!(f, "{place} > {name}"),
            What::Subsection(name) => write!(f, "{place} > subsection {name}"),
            what => write!(f, "{place}: {what:?}"),
        }
    }
}

impl Said {
    fn by_us(finding: &Finding) -> Result<Self> {
        let mut path = finding.path.as_slice();
        let what = match (&finding.difference, path) {
            (Difference::DeviceMissing, _) => What::Device,
            (Difference::DescriptionMissing, _) => What::Description,
            (Difference::DescriptionName { .. }, _) => What::Name,
            (Difference::VersionTooNew { .. } | Difference::VersionTooOld { .. }, _) => {
                What::Version
            }
            (Difference::SubsectionMissing, [rest @ .., Step::Subsection(name)]) => {
                path = rest;
                What::Subsection(name.clone())
            }
            (_, [rest @ .., Step::Field(name)]) => {
                path = rest;
                What::Field(name.clone())
            }
            _ => return Err(format!("a place is missing: {finding}").into()),
        };
        let description = match path.last() {
            Some(Step::Description(name) | Step::Subsection(name)) => name.clone(),
            _ => String::new(),
        };
        Ok(Self {
            device: finding.device.clone().unwrap_or_default(),
            description,
            what,
        })
    }
}

/// The lines of the script. Where it says that the destination has no fields or no subsections at all,
/// that is the first field, and each subsection.
fn said_by_script(text: &str, source: &Dump) -> Result<BTreeSet<Said>> {
    let mut said = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with("Warning: ")) {
        // Text, a name, text, a name, ... text.
        let parts: Vec<&str> = line.split('"').collect();
        let name = |before: &str| {
            let is_it = |pair: &&[&str]| pair[0].trim_end().ends_with(before);
            let pairs: Vec<&[&str]> = parts.chunks_exact(2).collect();
            pairs
                .iter()
                .copied()
                .rfind(is_it)
                .map(|pair| pair[1].to_owned())
        };
        let ends = |end: &str| line.trim_end().ends_with(end);
        let Some(device) = name("Section") else {
            return Err(format!("the script says '{line}'").into());
        };
        let outermost = source.device(&device).and_then(|d| d.description());
        let outermost_name = outermost.map_or("", Description::name).to_owned();
        let description = name("Description");
        let described = description
            .clone()
            .unwrap_or_else(|| outermost_name.clone());
        let missing = name("Entry").filter(|_| ends("missing"));
        let whats = if ends("does not exist in dest") {
            said.insert(Said {
                device,
                description: String::new(),
                what: What::Device,
            });
            continue;
        } else if line.contains("version error: ") {
            vec![What::Version]
        } else if line.contains(" missing, got ") {
            vec![What::Name]
        } else if let Some(field) = name("expected field").or_else(|| name("Field")) {
            vec![What::Field(field)]
        } else if let Some(subsection) = name("Subsection") {
            vec![What::Subsection(subsection)]
        } else if missing.as_deref() == Some("Description") {
            vec![What::Description]
        } else if let Some(entry) = missing {
            let mut whats = Vec::new();
            for_each_description(source, &device, &mut |d| {
                if d.name() == described && entry == "Fields" {
                    whats.extend(d.fields().first().map(|f| What::Field(f.name().to_owned())));
                } else if d.name() == described && entry == "Subsections" {
                    let names = d.subsections().iter().map(|s| s.name().to_owned());
                    whats.extend(names.map(What::Subsection));
                }
            });
            whats
        } else {
            return Err(format!("the script says '{line}'").into());
        };
        said.extend(whats.into_iter().map(|what| Said {
            device: device.clone(),
            description: described.clone(),
            what,
        }));
    }
    Ok(said)
}

/// Why one of the two says what the other does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// The script compares versions that are in no stream: those of fields, and of structures within
    /// others.
    VersionNotInStream,
    /// The script compares all subsections of a name, the loader takes the first.
    SubsectionTwice,
    /// The script takes a conditional field that only the destination has for an error; it is a
    /// warning here.
    Conditional,
    /// The script takes a field for one byte or word where a dump does not say how many elements it
    /// has, and so finds no end of unused bytes.
    NotCounted,
    /// A script of before QEMU 11 does not know all that was renamed.
    Renamed,
    /// The script ends with the source's fields and does not see that the destination reads on.
    ReadOn,
}

type Version = (u32, u32, u32);

/// How many findings both have for two versions, and what only one of them has, with the script of
/// QEMU 11.
struct Known {
    versions: (Version, Version),
    both: usize,
    reasons: &'static [&'static str],
}

const V11: Version = (11, 1, 3);
const V10: Version = (10, 0, 2);
const V7: Version = (7, 2, 22);

const KNOWN: &[Known] = &[
    Known {
        versions: (V11, V11),
        both: 4,
        reasons: &[
            "script: emmc > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "script: sd-card > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "script: sd-card-spi > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "script: sdmmc-common > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
        ],
    },
    Known {
        versions: (V11, V10),
        both: 33,
        reasons: &[
            "script: am53c974 > esp: Version: VersionNotInStream",
            "script: dc390 > esp: Version: VersionNotInStream",
            "script: pvscsi > pvscsi > msi_used: Conditional",
            "script: sysbus-esp > esp: Version: VersionNotInStream",
        ],
    },
    Known {
        versions: (V11, V7),
        both: 56,
        reasons: &[
            "script: am53c974 > esp: Version: VersionNotInStream",
            "script: dc390 > esp: Version: VersionNotInStream",
            "script: e1000e > e1000e > core.itr_guest_value: NotCounted",
            "script: pvscsi > pvscsi > msi_used: Conditional",
            "script: sysbus-esp > esp: Version: VersionNotInStream",
            "we: e1000e > e1000e > core.timadj: NotCounted",
        ],
    },
    Known {
        versions: (V10, V11),
        both: 6,
        reasons: &[
            "script: emmc > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "script: hpet > hpet: Version: VersionNotInStream",
            "script: mc146818rtc > mc146818rtc: Version: VersionNotInStream",
            "script: sd-card > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "script: sd-card-spi > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "script: sdmmc-common > sd-card/ext_csd_modes-state > ext_csd_rw: SubsectionTwice",
            "we: nvme > nvme > parent_obj: ReadOn",
        ],
    },
    Known {
        versions: (V10, V10),
        both: 0,
        reasons: &[],
    },
    Known {
        versions: (V10, V7),
        both: 33,
        reasons: &[
            "script: am53c974 > esp: Version: VersionNotInStream",
            "script: dc390 > esp: Version: VersionNotInStream",
            "script: e1000e > e1000e > core.itr_guest_value: NotCounted",
            "script: sysbus-esp > esp: Version: VersionNotInStream",
            "we: e1000e > e1000e > core.timadj: NotCounted",
        ],
    },
    Known {
        versions: (V7, V11),
        both: 21,
        reasons: &[
            "script: e1000e > e1000e > core.eitr_guest_value: NotCounted",
            "script: hpet > hpet: Version: VersionNotInStream",
            "script: mc146818rtc > mc146818rtc: Version: VersionNotInStream",
            "we: nvme > nvme > parent_obj: ReadOn",
            "we: vhost-user-fs-device > vhost-user-fs > virtio: ReadOn",
        ],
    },
    Known {
        versions: (V7, V10),
        both: 16,
        reasons: &[
            "script: e1000e > e1000e > core.eitr_guest_value: NotCounted",
            "we: vhost-user-fs-device > vhost-user-fs > virtio: ReadOn",
        ],
    },
    Known {
        versions: (V7, V7),
        both: 0,
        reasons: &[],
    },
];

/// What is compared, for the reasons.
struct Pair<'a> {
    source: &'a Dump,
    destination: &'a Dump,
    findings: &'a [Finding],
}

impl Pair<'_> {
    fn why_only_script(&self, said: &Said) -> Option<Reason> {
        match &said.what {
            What::Version if !self.has_version_in_stream(said) => Some(Reason::VersionNotInStream),
            What::Field(name) if is_renamed_lately(&said.description, name) => {
                Some(Reason::Renamed)
            }
            What::Field(_) if self.is_twice(said) => Some(Reason::SubsectionTwice),
            What::Field(_) if self.is_not_counted(said) => Some(Reason::NotCounted),
            What::Field(_) if self.is_conditional(said) => Some(Reason::Conditional),
            _ => None,
        }
    }

    fn why_only_us(&self, said: &Said) -> Option<Reason> {
        let is_said = |f: &&Finding| Said::by_us(f).is_ok_and(|by_us| by_us == *said);
        let finding = self.findings.iter().find(is_said)?;
        match (&said.what, &finding.difference) {
            (_, Difference::FieldNotSent) => Some(Reason::ReadOn),
            (What::Field(_), _) if self.is_not_counted(said) => Some(Reason::NotCounted),
            _ => None,
        }
    }

    /// Whether the description is a device's outermost one or a subsection whose version differs so
    /// that streams are refused.
    fn has_version_in_stream(&self, said: &Said) -> bool {
        let versions = |dump: &Dump| {
            let mut found = Vec::new();
            let description = dump.device(&said.device).and_then(|d| d.description());
            let mut add = |d: &Description| found.push((d.version(), d.minimum_version()));
            if let Some(description) = description {
                if description.name() == said.description {
                    add(description);
                }
                description
                    .subsections()
                    .iter()
                    .filter(|s| s.name() == said.description)
                    .for_each(add);
            }
            found
        };
        let (source, destination) = (versions(self.source), versions(self.destination));
        source.iter().any(|(version, _)| {
            destination
                .iter()
                .any(|(newest, oldest)| version > newest || version < oldest)
        })
    }

    fn is_twice(&self, said: &Said) -> bool {
        [self.source, self.destination].iter().any(|dump| {
            let mut count = 0;
            for_each_description(dump, &said.device, &mut |d| {
                count += usize::from(d.name() == said.description);
            });
            count > 1
        })
    }

    fn is_conditional(&self, said: &Said) -> bool {
        self.findings.iter().any(|f| {
            f.difference == Difference::FieldMayBeRead
                && Said::by_us(f).is_ok_and(|warned| {
                    (&warned.device, &warned.description) == (&said.device, &said.description)
                })
        })
    }

    /// Whether the description has unused bytes, and a dump does not count the elements of arrays.
    fn is_not_counted(&self, said: &Said) -> bool {
        let dumps = [self.source, self.destination];
        dumps.iter().any(|dump| !dump.counts_elements())
            && dumps.iter().any(|dump| {
                let mut has_unused = false;
                for_each_description(dump, &said.device, &mut |d| {
                    let is_unused = |f: &Field| f.name() == "unused";
                    has_unused |= d.name() == said.description && d.fields().iter().any(is_unused);
                });
                has_unused
            })
    }
}

/// Whether the field has two names that the script of QEMU 10.0 does not know as one.
fn is_renamed_lately(description: &str, field: &str) -> bool {
    let names: &[&str] = match description {
        "acpi-ghes" => &["ghes_addr_le", "hw_error_le"],
        "hpet" => &["num_timers", "num_timers_save"],
        _ => &[],
    };
    names.contains(&field)
}

fn for_each_description(dump: &Dump, device: &str, visit: &mut impl FnMut(&Description)) {
    let mut rest: Vec<&Description> = Vec::new();
    rest.extend(dump.device(device).and_then(|d| d.description()));
    while let Some(description) = rest.pop() {
        visit(description);
        rest.extend(description.fields().iter().filter_map(Field::structure));
        rest.extend(description.subsections());
    }
}
