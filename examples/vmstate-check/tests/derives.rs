//! States that derive `VmState`, as they were and as they have become: the verdict on their dumps is
//! what their bytes do.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use vmstate::{VmState, from_bytes, to_bytes};
use vmstate_check::{Difference, Dump, check, is_compatible};

/// A form of the state: what it declares, a stream of it, and its loader.
struct Form {
    name: &'static str,
    dump: Dump,
    version: u32,
    bytes: Vec<u8>,
    loads: fn(&[u8], u32) -> bool,
}

impl Form {
    fn of<T: VmState>(name: &'static str, value: &T) -> Self {
        let declared = vmstate::Dump::new("board").section::<T>("pit");
        Self {
            name,
            dump: Dump::try_from(&declared).unwrap(),
            version: T::VERSION,
            bytes: to_bytes(value).unwrap(),
            loads: |bytes, version| from_bytes::<T>(bytes, version).is_ok(),
        }
    }
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct First {
    count: u32,
    mode: u8,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 2, minimum_version = 1)]
struct Appended {
    count: u32,
    mode: u8,
    #[vmstate(since = 2)]
    latch: u16,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 2, minimum_version = 1)]
struct Inserted {
    count: u32,
    #[vmstate(since = 2)]
    gate: u32,
    mode: u8,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct AppendedWithoutVersion {
    count: u32,
    mode: u8,
    latch: u16,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct WithSubsection {
    count: u32,
    mode: u8,
    #[vmstate(subsection)]
    more: Option<More>,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit/more", version = 1)]
struct More {
    level: u8,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct Wider {
    count: u64,
    mode: u8,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 2, minimum_version = 2)]
struct WithoutOldVersions {
    count: u32,
    mode: u8,
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct WithArray<const N: usize>
where
    [u16; N]: Default,
{
    count: u32,
    mode: u8,
    regs: [u16; N],
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct WithStructure {
    count: u32,
    mode: u8,
    #[vmstate(nested)]
    channel: Channel,
}

#[derive(VmState, Default)]
#[vmstate(name = "channel", version = 1)]
struct Channel {
    state: [u8; 20],
}

#[derive(VmState, Default)]
#[vmstate(name = "pit", version = 1)]
struct WithNewerStructure {
    count: u32,
    mode: u8,
    #[vmstate(nested)]
    channel: NewerChannel,
}

#[derive(VmState, Default)]
#[vmstate(name = "channel", version = 2, minimum_version = 1)]
struct NewerChannel {
    state: [u8; 20],
    #[vmstate(since = 2)]
    gate: u16,
}

fn forms() -> Vec<Form> {
    let more = Some(More::default());
    vec![
        Form::of("first", &First::default()),
        Form::of("appended", &Appended::default()),
        Form::of("inserted", &Inserted::default()),
        Form::of(
            "appended without version",
            &AppendedWithoutVersion::default(),
        ),
        Form::of(
            "subsection",
            &WithSubsection {
                more,
                ..WithSubsection::default()
            },
        ),
        Form::of("wider", &Wider::default()),
        Form::of("without old versions", &WithoutOldVersions::default()),
        Form::of("array of 4", &WithArray::<4>::default()),
        Form::of("array of 5", &WithArray::<5>::default()),
        Form::of("structure", &WithStructure::default()),
        Form::of("newer structure", &WithNewerStructure::default()),
    ]
}

#[test]
fn the_verdict_on_the_dumps_is_what_the_bytes_do() {
    let forms = forms();
    let mut compatible = Vec::new();
    for source in &forms {
        for destination in &forms {
            let findings = check(&source.dump, &destination.dump);
            let loads = (destination.loads)(&source.bytes, source.version);
            assert_eq!(
                is_compatible(&findings),
                loads,
                "{} in {}: {findings:?}",
                source.name,
                destination.name
            );
            if loads && source.name != destination.name {
                compatible.push((source.name, destination.name));
            }
        }
    }
    assert_eq!(
        compatible,
        [
            ("first", "appended"),
            ("first", "inserted"),
            ("first", "subsection"),
        ]
    );
}

#[test]
fn a_finding_says_what_to_do_about_it() {
    let difference = |source: Form, destination: Form| {
        let findings = check(&source.dump, &destination.dump);
        findings.into_iter().map(|f| f.difference).next().unwrap()
    };
    let first = || Form::of("", &First::default());
    assert_eq!(
        difference(Form::of("", &Appended::default()), first()),
        Difference::VersionTooNew {
            source: 2,
            destination: 1
        }
    );
    assert_eq!(
        difference(first(), Form::of("", &AppendedWithoutVersion::default())),
        Difference::FieldNotSent
    );
    assert_eq!(
        difference(Form::of("", &WithSubsection::default()), first()),
        Difference::SubsectionMissing
    );
    assert_eq!(
        difference(first(), Form::of("", &Wider::default())),
        Difference::FieldSize {
            source: 4,
            destination: 8
        }
    );
    assert_eq!(
        difference(
            Form::of("", &WithArray::<4>::default()),
            Form::of("", &WithArray::<5>::default())
        ),
        Difference::FieldSize {
            source: 8,
            destination: 10
        }
    );
}
