//! Device sections that stand before RAM, pauses between items, and commands that a precopy stream may
//! have and need not.

use std::thread;
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSink, ByteSource, Chunk};
use migration_stream::precopy::{SourceEvent, SourceStatus, Target, TargetConfig, TargetError};
use migration_stream::ram::NoMultifd;
use migration_stream::raw::command::{Command, PostcopyAdvice};
use migration_stream::raw::early::EarlySections;
use migration_stream::{
    BoxError, ConfigurationRule, GuestRamMmap, Parsed, SectionHeader, SectionId, StreamReader,
    Tail, TailLimits,
};

use crate::common::guest::memory;
use crate::common::loads::{Loads, load};
use crate::rig::{self, Devices, LIMIT, channels, send, source, target};
use crate::script::{Pieces, Script};

const BLOCKS: &[(&str, u64)] = &[("pc.ram", 4)];
/// A body that has the footer of its own section in it.
const FIRST: &[u8] = b"\0\0\0\x08\x7e\0\0\0\x25\0\0\0\x04";
const SECOND: &[u8] = &[9; 44];

fn config() -> TargetConfig {
    TargetConfig::new(ConfigurationRule::Any).max_devices(1 << 20)
}

fn script() -> Script {
    Script::begin()
        .section(0x25, "vm0/early", FIRST)
        .section(0x27, "vm1/early", SECOND)
        .ram(BLOCKS)
        .ram_end()
        .section(40, "thing", &[7; 100])
        .end(&[
            ("vm0/early", FIRST.len()),
            ("vm1/early", 44),
            ("thing", 100),
        ])
}

/// The same as QEMU 10 sends it.
fn script_of_qemu_10() -> Script {
    Script::begin()
        .ram(BLOCKS)
        .section(0x25, "vm0/early", FIRST)
        .section(0x27, "vm1/early", SECOND)
        .ram_end()
        .section(40, "thing", &[7; 100])
        .end(&[
            ("vm0/early", FIRST.len()),
            ("vm1/early", 44),
            ("thing", 100),
        ])
}

/// Takes a guest of which nothing is known beforehand.
fn learn(source: impl ByteSource + 'static) -> Result<(EarlySections, Tail), TargetError> {
    let reader = StreamReader::new(source, b"");
    let (target, blocks) = Target::from_announcement(config(), reader, None)?;
    let early = target.early_sections().clone();
    let ram = GuestRamMmap::anonymous(blocks).unwrap();
    let (_, tail) = target.load_opaque(&ram, &mut NoMultifd, TailLimits::default())?;
    Ok((early, tail))
}

#[test]
fn sections_before_ram_are_kept_apart_from_those_behind_it_and_encode_as_they_came() {
    let scripts = [script(), script_of_qemu_10()];
    let each = |script: &Script| [1, 7, 4096].map(|piece| (script.clone(), piece));
    for (script, piece) in scripts.iter().flat_map(each) {
        let (early, tail) = learn(Pieces::new(script, piece)).unwrap();
        let bodies: Vec<_> = early.sections().map(|s| s.body.to_vec()).collect();
        assert_eq!(bodies, [FIRST, SECOND]);
        assert_eq!(tail.sections().len(), 1);
        let (mut out, again) = (Vec::new(), Script(Vec::new()));
        early.encode(SectionId(2), &mut out);
        let again = again.section(2, "vm0/early", FIRST);
        assert_eq!(out, again.section(3, "vm1/early", SECOND).0);
    }
}

#[test]
fn a_section_before_ram_that_is_not_as_long_as_described_is_refused_by_name() {
    let wrong = Script::begin()
        .section(0x25, "vm0/early", FIRST)
        .ram(BLOCKS)
        .ram_end()
        .section(40, "thing", &[7; 100])
        .end(&[("vm0/early", FIRST.len() + 1), ("thing", 100)]);
    let error = learn(Pieces::new(wrong, 4096)).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, TargetError::Early(_)), "{text}");
    assert!(text.contains("'vm0/early' instance 0"), "{text}");
    assert!(
        text.contains("13 bytes") && text.contains("has 14"),
        "{text}"
    );
}

#[test]
fn a_section_before_ram_whose_end_is_not_found_is_refused_by_name() {
    let endless = Script::begin().device(0x25, "vm0/early", 0);
    for script in [
        endless.clone().bytes(&vec![0x7e; 2 << 20]),
        endless.bytes(b"cut off"),
    ] {
        let error = learn(Pieces::new(script, 4096)).unwrap_err();
        assert!(
            matches!(&error, TargetError::EarlyEnd { idstr, searched, .. }
                if idstr == "vm0/early" && *searched <= 1 << 20),
            "{error}"
        );
    }
    let mut parts = Script::begin().device(0x25, "vfio", 0).0;
    let head = parts.len() - (1 + 4 + 5 + 4 + 4);
    parts[head] = 1;
    let error = learn(Pieces::new(Script(parts), 4096)).unwrap_err();
    assert!(
        matches!(&error, TargetError::BeforeRam { idstr, .. } if idstr == "vfio"),
        "{error}"
    );
}

/// Knows how long each device's body is, and notes the order in which they come.
#[derive(Default)]
struct Known(Vec<String>);

impl Loads for Known {
    fn load_device(
        &mut self,
        section: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<()>, BoxError> {
        let len = match section.idstr.as_str() {
            "vm0/early" => FIRST.len(),
            "vm1/early" => SECOND.len(),
            "thing" => 100,
            other => return Err(format!("no {other}").into()),
        };
        if body.len() < len {
            return Ok(Parsed::NeedMore);
        }
        self.0.push(section.idstr.as_str().to_owned());
        Ok(Parsed::Section((), len))
    }
}

#[test]
fn a_vmm_that_knows_its_devices_sees_those_before_ram_first() {
    for script in [script(), script_of_qemu_10()] {
        sees_them_first(&script);
    }
}

fn sees_them_first(script: &Script) {
    let ram = memory(BLOCKS);
    let reader = || StreamReader::new(Pieces::new(script.clone(), 10), b"");
    let order = ["vm0/early", "vm1/early", "thing"];

    let mut vm = Known::default();
    let target = Target::new(config(), reader(), None, &*ram);
    load(target, &*ram, &mut vm).map(drop).unwrap();
    assert_eq!(vm.0, order);

    let mut vm = Known::default();
    let (target, _) = Target::from_announcement(config(), reader(), None).unwrap();
    load(target, &*ram, &mut vm).map(drop).unwrap();
    assert_eq!(vm.0, order);

    // Blocks are known, devices are not.
    let target = Target::new(config(), reader(), None, &*ram);
    let (_, tail) = target
        .load_opaque(&*ram, &mut NoMultifd, TailLimits::default())
        .unwrap();
    assert_eq!(tail.sections().len(), 1);
}

#[test]
fn a_source_that_advises_postcopy_and_does_not_begin_it_is_a_precopy_source() {
    let advice = PostcopyAdvice {
        ram_page_sizes: 4096,
        target_page_size: 4096,
    };
    for advice in [None, Some(advice)] {
        let script = Script::begin()
            .command(&Command::PostcopyAdvise(advice))
            .ram(BLOCKS)
            .ram_end()
            .section(40, "thing", &[7; 100])
            .end(&[("thing", 100)]);
        let (early, tail) = learn(Pieces::new(script, 4096)).unwrap();
        assert!(early.is_empty());
        assert_eq!(tail.sections().len(), 1);
    }
}

/// Sends `script` in two parts, of which the second begins at `at` and comes after longer than the
/// channel's limit.
fn paused(script: &Script, at: usize) -> Result<(), TargetError> {
    let ram = memory(BLOCKS);
    let (mut a, b) = channels();
    let (first, second) = script.0.split_at(at);
    thread::scope(|scope| {
        let loading = scope.spawn(|| {
            Target::new(config(), StreamReader::new(b, b""), None, &*ram)
                .allowing_pauses_of(20 * LIMIT)
                .load_opaque(&*ram, &mut NoMultifd, TailLimits::default())
                .map(drop)
        });
        a.write_all(&[Chunk::Bytes(first)]).unwrap();
        thread::sleep(LIMIT + Duration::from_millis(200));
        // A target that has given up has closed its end.
        let _ = a.write_all(&[Chunk::Bytes(second)]);
        loading.join().unwrap()
    })
}

#[test]
fn a_source_may_pause_between_two_items_and_not_within_one() {
    let until = Script::begin().ram(BLOCKS).ram_end();
    let whole = until
        .clone()
        .section(40, "thing", &[7; 100])
        .end(&[("thing", 100)]);
    // QEMU holds the footer of RAM's section back while it is paused.
    let (behind_ram, before_footer) = (until.0.len(), until.0.len() - 5);
    for at in [behind_ram, before_footer] {
        paused(&whole, at).unwrap();
    }
    let error = paused(&whole, behind_ram - 2).unwrap_err();
    assert!(matches!(error, TargetError::Stream { .. }), "{error}");
}

/// Takes its time, and then takes the section or refuses it.
struct Slow {
    takes: bool,
}

impl Loads for Slow {
    fn load_device(
        &mut self,
        section: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<()>, BoxError> {
        if section.idstr.as_str() != "cpu" {
            return Devices::default().load_device(section, body);
        }
        thread::sleep(Duration::from_millis(300));
        if !self.takes {
            return Err("unlike".into());
        }
        Ok(if body.len() < 3 {
            Parsed::NeedMore
        } else {
            Parsed::Section((), 3)
        })
    }
}

/// So small a guest would be stopped at once.
#[test]
fn a_guest_is_not_stopped_before_the_target_has_taken_what_comes_before_ram() {
    for takes in [false, true] {
        let (_, mut guest) = source();
        guest.early = Some(vec![1, 2, 3]);
        let landed = memory(rig::BLOCKS);
        let (a, b) = channels();
        let (begun, sent, loaded) = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let begun = Instant::now();
                let sent = send(&mut guest, &a);
                (begun.elapsed(), sent)
            });
            let mut vm = Slow { takes };
            let loaded = load(target(&b, &landed), &*landed, &mut vm);
            let loaded = loaded.and_then(|settled| settled.confirm());
            if loaded.is_err() {
                b.shutdown();
            }
            let (elapsed, sent) = sender.join().unwrap();
            (elapsed, sent, loaded)
        });
        let switched_over = guest
            .events
            .contains(&SourceEvent::Status(SourceStatus::Device));
        assert_eq!(switched_over, takes);
        assert_eq!(guest.running, !takes);
        if takes {
            assert!(begun >= Duration::from_millis(300), "{begun:?}");
            sent.unwrap();
            loaded.unwrap();
        } else {
            // The refusal, or the end of the connection behind it: which it meets first is a race.
            sent.unwrap_err();
            let error = loaded.unwrap_err();
            assert!(error.to_string().contains("cpu"), "{error}");
        }
    }
}
