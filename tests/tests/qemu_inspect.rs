//! `stream-inspect` on streams of real QEMU: what it says of their devices has to be what QEMU's own
//! `analyze-migration.py` says, byte for byte, and what it extracts what the guest's memory is.

use std::fs::{self, File};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::header;
use migration_stream::raw::ram::{
    RAM_IDSTR, RAM_VERSION, encode_end_of_section, encode_setup_list,
};
use migration_stream::raw::section::{
    Announcement, Continuation, encode_continuation, encode_eof, encode_footer,
    encode_vm_description,
};
use migration_stream::{
    Configuration, IdStr, InstanceId, MachineName, PAGE_SIZE, SectionHeader, SectionId,
};
use multifd::{ChannelCount, Compression, MultifdConfig, ZstdLevel};
use serde_json::json;
use stream_inspect::extract::Extract;
use stream_inspect::incoming::{ListenConfig, Listening};
use stream_inspect::inspection::{Inspection, Part};
use stream_inspect::report::Report;
use stream_inspect::scan::{FileOrigin, scan};
use stream_inspect::state;
use tests::capture::Tap;
use tests::guest::{self, Content, Dirtier};
use tests::harness::{self, Needs, Tests};
use tests::linux::{self, Linux};
use tests::qemu::{Binary, Machine, Qemu};
use tests::vmm::ColoVmm;
use tests::{PATIENCE, Result, scripts};
use vmstate::{CpuDouble, DeviceError, DeviceTree, Priority, Timer, Unused, VmState};

/// Of QEMU's sources.
const SCRIPT: &str = "analyze-migration.py";
/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// What the RAM block that a test's file stands behind is called.
const RAM: &str = "ram0";

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for machine in ["pc", "q35", "microvm"] {
        trials.push(Needs::NOTHING.script(SCRIPT).qemu((7, 2)).test_with(
            &format!("{machine}_is_described_as_by_qemus_script"),
            move |given| as_the_script(given.qemu(), given.script(), machine),
        ));
    }
    trials.push(
        Needs::NOTHING
            .script(SCRIPT)
            .qemu((7, 2))
            .test_with("state_that_comes_before_ram_is_described_too", |given| {
                early_state(given.qemu(), given.script())
            }),
    );
    for (name, channels) in [("mapped_ram", None), ("mapped_ram_by_channels", Some(2))] {
        trials.push(Needs::NOTHING.script(SCRIPT).qemu((9, 0)).test_with(
            &format!("a_file_with_{name}_has_what_a_plain_one_has"),
            move |given| mapped(given.qemu(), given.script(), channels),
        ));
    }
    let needs = Needs::NOTHING.linux().script(SCRIPT).qemu((10, 0));
    trials.push(needs.test_with(
        "linux_is_described_with_every_field_of_its_devices",
        |given| linux_is_described(given.qemu(), given.linux(), given.script()),
    ));
    for (name, channels) in [("plain", false), ("zstd_channels", true)] {
        trials.push(Needs::NOTHING.live_guests().qemu((7, 2)).test_qemu(
            &format!("a_source_that_is_listened_to_by_{name}_keeps_its_guest"),
            move |qemu: &Binary| listened_to(qemu, channels),
        ));
    }
    trials.push(Needs::NOTHING.qemu((7, 2)).test_qemu(
        "a_stream_without_description_is_told_as_far_as_it_goes",
        not_described,
    ));
    trials.push(
        Needs::NOTHING
            .script(SCRIPT)
            .test_with("what_colo_vmm_writes_is_read_by_qemus_script", |given| {
                by_colo_vmm(given.script())
            }),
    );
    trials.push(
        Needs::NOTHING
            .script(SCRIPT)
            .test_with("what_vmstate_writes_is_read_by_qemus_script", |given| {
                by_vmstate(given.script())
            }),
    );
    harness::run(trials.into_iter().map(Tests::with_some_qemu))
}

/// Migrates to the file, with every version.
fn to_file(source: &mut Qemu, path: &Path) -> Result<()> {
    source.migrate(&format!("exec:cat > {}", path.display()))?;
    source.wait_migration("completed")?;
    Ok(())
}

fn inspect(path: &Path, extract: Option<&Path>) -> Result<Inspection> {
    let (mut origin, reader) = FileOrigin::open(Arc::new(File::open(path)?), 0);
    let mut extract = extract.map(Extract::into).transpose()?;
    let found = scan(reader, &mut origin, 64 << 20, extract.as_mut(), &mut |_| ())?;
    if let Some(extract) = &extract {
        extract.write("desc.json", &state::text(&state::description(&found)?)?)?;
        extract.write("state.json", &state::text(&state::state(&found)?)?)?;
    }
    Ok(found)
}

fn text_of_state(found: &Inspection) -> Result<String> {
    Ok(state::text(&state::state(found)?)?)
}

/// The script's output ends with a newline.
fn assert_said(expected: &str, found: &str) {
    assert!(!found.is_empty());
    let difference = expected.lines().zip(found.lines()).find(|(a, b)| a != b);
    assert_eq!(difference, None);
    assert_eq!(expected.trim_end(), found);
}

/// Both directories have the same files with the same content.
fn assert_same(ours: &Path, theirs: &Path) -> Result<usize> {
    let mut files = 0;
    let names = |dir: &Path| -> Result<Vec<_>> {
        let mut names = fs::read_dir(dir)?
            .map(|entry| Ok(entry?.file_name()))
            .collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    assert_eq!(names(ours)?, names(theirs)?);
    for name in names(ours)? {
        let (a, b) = (ours.join(&name), theirs.join(&name));
        if a.is_dir() {
            files += assert_same(&a, &b)?;
        } else {
            guest::compare(&name.to_string_lossy(), &fs::read(b)?, &fs::read(a)?)?;
            files += 1;
        }
    }
    Ok(files)
}

fn as_the_script(qemu: &Binary, script: &Path, machine: &str) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (memory, path) = (dir.path().join("memory"), dir.path().join("stream"));
    guest::write_memory(&memory, u64::from(MEMORY) << 20, Content::Mixed)?;
    let mut source = Machine::new(machine, MEMORY)
        .memory_in(&memory)
        .start(qemu)?;
    to_file(&mut source, &path)?;
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    fs::create_dir(&theirs)?;
    let found = inspect(&path, Some(&ours))?;
    assert_said(
        &scripts::analyze(script, &path, &["-d", "state"], dir.path())?,
        &text_of_state(&found)?,
    );
    assert_said(
        &scripts::analyze(script, &path, &["-d", "desc"], dir.path())?,
        &state::text(&state::description(&found)?)?,
    );
    scripts::analyze(script, &path, &["-x"], &theirs)?;
    assert_eq!(assert_same(&ours, &theirs)?, found.blocks.len() + 2);
    guest::compare("RAM", &fs::read(&memory)?, &fs::read(ours.join(RAM))?)?;

    let pages = |found: &Inspection| -> Vec<(String, u64)> {
        let blocks = found.blocks.iter();
        blocks
            .map(|b| (b.block.name().to_owned(), b.block.used_length()))
            .collect()
    };
    let mut blocks = source.ram_blocks()?;
    let mut announced = pages(&found);
    blocks.sort();
    announced.sort();
    assert_eq!(announced, blocks);
    for block in &found.blocks {
        let all = block.block.pages();
        assert_eq!(block.unique, all, "{block:?}");
        assert_eq!(block.normal + block.zero, all, "{block:?}");
    }
    assert_eq!(found.total().bytes, fs::metadata(&path)?.len());
    let devices: u64 = found.devices().map(|d| d.extent.bytes).sum();
    assert_eq!(found.part(Part::Devices).bytes, devices + 1, "with EOF");
    let report = Report::new(&found).text(true)?;
    assert!(report.contains("globalstate") && report.contains("runstate = "));
    Ok(())
}

fn early_state(qemu: &Binary, script: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("stream");
    let mut source = Machine::new("q35", MEMORY)
        .args(["-m", "32M,maxmem=512M"])
        .args(["-object", "memory-backend-ram,id=more,size=256M"])
        .args(["-device", "virtio-mem-pci,memdev=more,requested-size=64M"])
        .start(qemu)?;
    to_file(&mut source, &path)?;
    let found = inspect(&path, None)?;
    if qemu.is_since((8, 0)) {
        let first = found.devices().next().ok_or("no device")?;
        assert!(
            first
                .header
                .idstr
                .as_str()
                .ends_with("virtio-mem-device-early")
        );
    }
    assert_eq!(found.total().bytes, fs::metadata(&path)?.len());
    assert_said(
        &scripts::analyze(script, &path, &["-d", "state"], dir.path())?,
        &text_of_state(&found)?,
    );
    Ok(())
}

fn mapped(qemu: &Binary, script: &Path, channels: Option<u8>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (memory, plain) = (dir.path().join("memory"), dir.path().join("plain"));
    guest::write_memory(&memory, u64::from(MEMORY) << 20, Content::Mixed)?;
    let mut source = Machine::new("q35", MEMORY).memory_in(&memory).start(qemu)?;
    to_file(&mut source, &plain)?;
    let mut source = Machine::new("q35", MEMORY).memory_in(&memory).start(qemu)?;
    source.qmp.enable(&["mapped-ram"])?;
    if let Some(count) = channels {
        source.qmp.enable(&["multifd"])?;
        source
            .qmp
            .set_parameters(json!({"multifd-channels": count}))?;
    }
    let path = dir.path().join("mapped");
    source.migrate(&format!("file:{}", path.display()))?;
    source.wait_migration("completed")?;
    let (ours, other) = (dir.path().join("ours"), dir.path().join("other"));
    let expected = inspect(&plain, Some(&ours))?;
    let found = inspect(&path, Some(&other))?;
    // Clocks went on between the two, so that the devices' values are not the same.
    for dir in [&ours, &other] {
        fs::remove_file(dir.join("desc.json"))?;
        fs::remove_file(dir.join("state.json"))?;
    }
    assert_eq!(assert_same(&other, &ours)?, found.blocks.len());
    let devices = |found: &Inspection| -> Vec<_> {
        let devices = found
            .devices()
            .map(|d| (d.header.idstr.clone(), d.body.len()));
        devices.collect()
    };
    assert_eq!(devices(&found), devices(&expected));
    if fs::read_to_string(script)?.contains("mapped_ram") {
        assert_said(
            &scripts::analyze(script, &path, &["-d", "state"], dir.path())?,
            &text_of_state(&found)?,
        );
    }
    assert_eq!(found.blocks, expected.blocks);
    assert!(found.part(Part::Pages).bytes > found.part(Part::Devices).bytes);
    // The file ends in the middle of memory.
    File::options().write(true).open(&path)?.set_len(4 << 20)?;
    let error = inspect(&path, None).map(drop).unwrap_err().to_string();
    assert!(error.starts_with("the file has 0x400000 bytes"), "{error}");
    Ok(())
}

fn linux_is_described(qemu: &Binary, guest: &Linux, script: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("stream");
    let mut source = guest
        .machine(dir.path(), &dir.path().join("port"))?
        .running()
        .start(qemu)?;
    linux::wait_for_beats(&[], &source, 3)?;
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    to_file(&mut source, &path)?;
    let found = inspect(&path, None)?;
    assert_said(
        &scripts::analyze(script, &path, &["-d", "state"], dir.path())?,
        &text_of_state(&found)?,
    );
    let layouts = state::Layouts::of(&found)?;
    for device in found.devices() {
        let fields = layouts.fields(device)?;
        let names = fields.state.as_object().ok_or("no object")?;
        assert!(!names.is_empty(), "{:?}", device.header);
        assert!(names.keys().all(|name| !name.is_empty()));
    }
    for wanted in [
        "virtio-net",
        "virtio-blk",
        "virtio-console",
        "e1000",
        "ahci",
        "xhci",
        "usb-storage",
        "usb-ptr",
    ] {
        let mut idstrs = found.devices().map(|d| d.header.idstr.as_str());
        assert!(idstrs.any(|idstr| idstr.ends_with(wanted)), "{wanted}");
    }
    Ok(())
}

fn listened_to(qemu: &Binary, channels: bool) -> Result<()> {
    let dirtier = Dirtier {
        start: 4 << 20,
        pages: 256,
    };
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    dirtier.write_disk(&disk)?;
    let mut source = Machine::new("pc", MEMORY)
        .accel(qemu.live_accel())
        .boot(&disk)
        .args(["-serial", "stdio"])
        .running()
        .start(qemu)?;
    let said = |source: &Qemu| source.process.stdout().bytes().len();
    let more = |source: &Qemu| {
        let before = said(source);
        source
            .process
            .stdout()
            .wait_for("output", |b| (b.len() > before).then_some(()))
    };
    more(&source)?;
    source.qmp.enable(&["return-path"])?;
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    let multifd = if channels {
        source.qmp.enable(&["multifd"])?;
        source
            .qmp
            .set_parameters(json!({"multifd-channels": 2, "multifd-compression": "zstd"}))?;
        Some(
            MultifdConfig::new(ChannelCount::new(2).ok_or("no count")?)
                .compression(Compression::Zstd(ZstdLevel::default()))
                .stall_limit(PATIENCE),
        )
    } else {
        None
    };
    let listening = Listening::open(ListenConfig {
        at: "tcp:127.0.0.1:0".parse()?,
        multifd,
        without_return_path: false,
        timeout: PATIENCE,
    })?;
    let to = listening.address().to_string();
    let inspector = thread::spawn(move || -> Result<Inspection> {
        let (mut origin, reader) = listening.accept()?;
        Ok(scan(reader, &mut origin, 64 << 20, None, &mut |_| ())?)
    });
    source.migrate(&to)?;
    let found = inspector.join().map_err(|_| "the inspector panicked")??;
    source.wait_migration("failed")?;
    source.wait_status("running")?;
    more(&source)?;

    for block in &found.blocks {
        assert_eq!(block.unique, block.block.pages(), "{block:?}");
    }
    assert!(found.part(Part::Pages).bytes > 0);
    assert!(found.part(Part::Pages).time > Duration::ZERO);
    assert!(found.commands.iter().any(|c| c.count > 0));
    assert!(text_of_state(&found)?.contains("globalstate"));
    Ok(())
}

fn not_described(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("stream");
    let mut source = Machine::new("microvm,suppress-vmdesc=on", MEMORY).start(qemu)?;
    to_file(&mut source, &path)?;
    let found = inspect(&path, None)?;
    assert_eq!(found.total().bytes, fs::metadata(&path)?.len());
    let report = Report::new(&found).text(false)?;
    assert!(report.contains("cannot be told apart"), "{report}");
    let error = text_of_state(&found).unwrap_err().to_string();
    assert!(error.contains("suppress-vmdesc"), "{error}");
    Ok(())
}

fn by_colo_vmm(script: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("stream");
    let vmm = ColoVmm::new("source");
    let is_simulated = harness::missing_kvm().is_some();
    let vmm = if is_simulated { vmm.simulated() } else { vmm };
    let mut source = vmm.start()?;
    source.wait_lines(3)?;
    let tap = Tap::sink()?;
    source.migrate(&tap.uri())?;
    source.wait_migration("completed")?;
    fs::write(&path, tap.finish()?.main)?;
    let found = inspect(&path, None)?;
    assert!(found.devices().count() > 2 || is_simulated);
    assert_said(
        &scripts::analyze(script, &path, &["-d", "state"], dir.path())?,
        &text_of_state(&found)?,
    );
    assert_said(
        &scripts::analyze(script, &path, &["-d", "desc"], dir.path())?,
        &state::text(&state::description(&found)?)?,
    );
    Ok(())
}

#[derive(VmState, Clone, Default)]
#[vmstate(name = "item", version = 1)]
struct Item {
    value: i16,
}

#[derive(VmState, Clone, Default)]
#[vmstate(name = "many/inner", version = 1)]
struct Inner {
    text: [u8; 4],
}

#[derive(VmState, Clone, Default)]
#[vmstate(name = "many/sub", version = 1)]
struct Sub {
    level: i32,
    #[vmstate(subsection)]
    inner: Option<SubSub>,
}

#[derive(VmState, Clone, Default)]
#[vmstate(name = "many/sub/sub", version = 1)]
struct SubSub {
    flag: bool,
}

/// One of each form.
#[derive(VmState, Clone)]
#[vmstate(name = "many", version = 3)]
struct Many {
    bytes: [u8; 3],
    numbers: [u64; 2],
    flags: [bool; 2],
    negative: i64,
    float: f64,
    timer: Timer,
    double: CpuDouble,
    #[vmstate(name = "unused")]
    gap: Unused<5>,
    #[vmstate(nested)]
    inner: Inner,
    #[vmstate(nested)]
    items: [Item; 3],
    count: u8,
    #[vmstate(len = count, max = 4)]
    counted: Vec<u32>,
    #[vmstate(pointers)]
    pointers: [Option<Item>; 3],
    #[vmstate(subsection)]
    sub: Option<Sub>,
}

struct Device(Many);

impl vmstate::Device for Device {
    type State = Many;

    fn save(&mut self) -> std::result::Result<Many, DeviceError> {
        Ok(self.0.clone())
    }

    fn reset(&mut self) -> std::result::Result<(), DeviceError> {
        Ok(())
    }

    fn install(&mut self, state: Many) -> std::result::Result<(), DeviceError> {
        self.0 = state;
        Ok(())
    }
}

/// A stream of no RAM and two devices.
fn by_vmstate(script: &Path) -> Result<()> {
    let many = |sub| {
        Device(Many {
            bytes: [1, 2, 0xff],
            numbers: [1, u64::MAX],
            flags: [true, false],
            negative: -2,
            float: -0.5,
            timer: Timer::default(),
            double: CpuDouble(7),
            gap: Unused,
            inner: Inner { text: *b"text" },
            items: [Item { value: -1 }, Item { value: 2 }, Item::default()],
            count: 2,
            counted: vec![3, 4],
            pointers: [Some(Item { value: 9 }), None, Some(Item::default())],
            sub,
        })
    };
    let mut tree = DeviceTree::new();
    tree.register("many", 0, Priority::Default, many(None))?;
    let sub = Sub {
        level: -7,
        inner: Some(SubSub { flag: true }),
    };
    tree.register("many", 1, Priority::Default, many(Some(sub)))?;
    let (sections, description) = tree.save_all_described()?;

    let mut bytes = Vec::new();
    header::encode(&mut bytes);
    Configuration::new(MachineName::new("none")?).encode(&mut bytes);
    let ram = SectionHeader {
        kind: Announcement::Start,
        id: SectionId(0),
        idstr: IdStr::new(RAM_IDSTR)?,
        instance: InstanceId(0),
        version: RAM_VERSION,
    };
    let blocks = RamBlockTable::new(vec![RamBlock::new("ram", 4096)?])?;
    ram.encode(&mut bytes);
    encode_setup_list(&blocks, &mut bytes);
    encode_end_of_section(&mut bytes);
    encode_footer(ram.id, &mut bytes);
    encode_continuation(Continuation::End, ram.id, &mut bytes);
    encode_end_of_section(&mut bytes);
    encode_footer(ram.id, &mut bytes);
    for (section, id) in sections.iter().zip(1..) {
        let header = SectionHeader {
            kind: Announcement::Full,
            id: SectionId(id),
            idstr: IdStr::new(section.idstr.clone())?,
            instance: InstanceId(section.instance_id),
            version: section.version,
        };
        header.encode(&mut bytes);
        bytes.extend(&section.body);
        encode_footer(header.id, &mut bytes);
    }
    encode_eof(&mut bytes);
    let json = description.to_json(PAGE_SIZE);
    encode_vm_description(u32::try_from(json.len())?, &mut bytes);
    bytes.extend(json.as_bytes());

    let dir = tempfile::tempdir()?;
    let path = dir.path().join("stream");
    fs::write(&path, bytes)?;
    let found = inspect(&path, None)?;
    let state = text_of_state(&found)?;
    assert_said(
        &scripts::analyze(script, &path, &["-d", "state"], dir.path())?,
        &state,
    );
    for part in [
        r#""negative": "0xfffffffffffffffe (-2)""#,
        r#""many/sub/sub": {"#,
        r#""text": "74 65 78 74""#,
    ] {
        assert!(state.contains(part), "{part}: {state}");
    }
    Ok(())
}
