//! Dirty bitmaps of real QEMU's disks: read out of a stream and written again, and handed from one
//! QEMU to another by our `Target` and `Source`.

use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::io::FdChannel;
use migration_stream::precopy::{
    Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target, TargetConfig,
};
use migration_stream::ram::{
    BlockId, InStream, NoMultifd, RamBlock, RamBlockTable, ZeroPageDetection,
};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::decoder::{Item, RamItem, Step, StreamDecoder};
use migration_stream::raw::dirty_bitmap::{
    BitmapSections, Chunk, ChunkKind, DIRTY_BITMAP_IDSTR, DirtyBitmapDecoder, DirtyBitmapEncoder,
    MigratedBitmap,
};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, DecoderConfig, DirtyLog, GuestRam, GuestRamMmap,
    MachineVersion, MemoryError, StreamReader, StreamWriter, Tail, TailLimits, Vm, VmControl,
};
use serde_json::{Value, json};
use stream_inspect::inspection::Part;
use stream_inspect::report::Report;
use stream_inspect::scan::{FileOrigin, scan};
use stream_relay::Access;
use stream_relay::guest::Devices;
use stream_relay::incoming::{Incoming, IncomingConfig};
use stream_relay::outgoing::OutgoingConfig;
use stream_relay::relay::{Origin, Relay};
use tests::capture::Tap;
use tests::harness::{self, Needs};
use tests::qemu::{Binary, Machine, Qemu};
use tests::store;
use tests::{PATIENCE, Result, guest};

/// Guest memory, MiB.
const MEMORY: u32 = 16;
/// Node names and bitmaps: the name, bytes that a bit is for, whether writes are recorded.
const BITMAPS: [(&str, &str, u32, bool); 3] = [
    ("disk0", "nightly", 65536, true),
    ("disk0", "since the last release", 512, true),
    ("disk1", "frozen", 1 << 20, false),
];

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING.qemu((7, 2)).test_qemu(
            "bitmaps_in_a_stream_have_their_names_and_are_written_again_byte_for_byte",
            in_a_stream,
        ),
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("bitmaps_with_aliases_have_those_as_names", with_aliases),
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("a_bitmap_that_is_kept_in_its_image_says_so", persistent),
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("bitmaps_are_handed_on_to_another_qemu", handed_on),
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("bitmaps_pass_through_the_relay", relayed),
    ])
}

/// A machine with two disks of no content.
fn machine() -> Machine {
    Machine::new("q35", MEMORY).args(["disk0", "disk1"].into_iter().flat_map(|node| {
        [
            "-blockdev".to_owned(),
            format!(
                "null-co,node-name={node},size={},read-zeroes=on",
                64_u64 << 20
            ),
        ]
    }))
}

/// Such a machine with bitmaps, of which the first two have recorded two writes.
fn source(qemu: &Binary) -> Result<Qemu> {
    let mut source = machine().start(qemu)?;
    for (node, name, granularity, enabled) in BITMAPS {
        source.qmp.execute(
            "block-dirty-bitmap-add",
            json!({
                "node": node, "name": name, "granularity": granularity, "disabled": !enabled,
            }),
        )?;
    }
    for write in ["write 1M 128k", "write 33M 512"] {
        let line = format!("qemu-io disk0 \"{write}\"");
        source
            .qmp
            .execute("human-monitor-command", json!({"command-line": line}))?;
    }
    source.qmp.enable(&["dirty-bitmaps"])?;
    Ok(source)
}

/// Node, name, granularity and bytes that are dirty, of each bitmap of a QEMU.
fn bitmaps(vm: &mut Qemu) -> Result<Vec<(String, String, u64, u64)>> {
    let nodes = vm.qmp.execute("query-named-block-nodes", Value::Null)?;
    let mut found = Vec::new();
    for node in nodes.as_array().ok_or("no nodes")? {
        let name = node["node-name"].as_str().unwrap_or_default();
        for bitmap in node["dirty-bitmaps"].as_array().into_iter().flatten() {
            found.push((
                name.to_owned(),
                bitmap["name"].as_str().unwrap_or_default().to_owned(),
                bitmap["granularity"].as_u64().unwrap_or_default(),
                bitmap["count"].as_u64().unwrap_or_default(),
            ));
        }
    }
    found.sort();
    Ok(found)
}

fn in_a_stream(qemu: &Binary) -> Result<()> {
    let mut source = source(qemu)?;
    let expected = bitmaps(&mut source)?;
    let counts: Vec<u64> = expected.iter().map(|b| b.3).collect();
    assert_eq!(counts, [65536 * 3, (128 << 10) + 512, 0]);
    let stream = capture(&mut source)?;
    inspected(&stream, source.dir())?;
    let sections = Sections::of(&stream)?;
    let as_queried = |b: &MigratedBitmap, dirty| {
        (
            b.node.as_str().to_owned(),
            b.name.as_str().to_owned(),
            u64::from(b.granularity),
            dirty,
        )
    };
    let mut found: Vec<_> = sections
        .bitmaps
        .iter()
        .zip(&sections.dirty)
        .map(|(bitmap, dirty)| as_queried(bitmap, *dirty))
        .collect();
    found.sort();
    assert_eq!(found, expected);
    for bitmap in &sections.bitmaps {
        let (.., enabled) = BITMAPS
            .into_iter()
            .find(|b| b.1 == bitmap.name.as_str())
            .ok_or("another bitmap")?;
        assert_eq!(bitmap.flags.enabled, enabled);
        assert!(!bitmap.flags.persistent && bitmap.is_complete);
    }
    Ok(())
}

/// `stream-inspect` finds them, and the devices behind them.
fn inspected(stream: &[u8], dir: &Path) -> Result<()> {
    let path = dir.join("inspected");
    fs::write(&path, stream)?;
    let (mut origin, reader) = FileOrigin::open(Arc::new(File::open(&path)?), 0);
    let found = scan(reader, &mut origin, 64 << 20, None, &mut |_| ())?;
    let mut names: Vec<_> = found.bitmaps.iter().map(|b| b.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["frozen", "nightly", "since the last release"]);
    assert!(found.bitmaps.iter().all(|b| b.is_complete));
    assert!(found.part(Part::Bitmaps).bytes > 100);
    assert_eq!(found.total().bytes, stream.len() as u64);
    let report = Report::new(&found).text(false)?;
    assert!(report.contains("nightly of disk0"), "{report}");
    Ok(())
}

fn with_aliases(qemu: &Binary) -> Result<()> {
    let mut source = source(qemu)?;
    source.qmp.set_parameters(json!({"block-bitmap-mapping": [
        {"node-name": "disk0", "alias": "root", "bitmaps": [{"name": "nightly", "alias": "n"}]},
    ]}))?;
    let stream = capture(&mut source)?;
    let sections = Sections::of(&stream)?;
    let names: Vec<_> = sections
        .bitmaps
        .iter()
        .map(|b| (b.node.as_str(), b.name.as_str()))
        .collect();
    assert_eq!(names, [("root", "n")]);
    Ok(())
}

/// Makes a file or an image.
fn create(vm: &mut Qemu, options: Value) -> Result<()> {
    let arguments = json!({"job-id": "create", "options": options});
    vm.qmp.execute("blockdev-create", arguments)?;
    vm.qmp
        .wait_event_if("JOB_STATUS_CHANGE", |data| data["status"] == "concluded")?;
    vm.qmp.execute("job-dismiss", json!({"id": "create"}))?;
    Ok(())
}

fn persistent(qemu: &Binary) -> Result<()> {
    let mut source = machine().start(qemu)?;
    let file = source.dir().join("image");
    let file = file.to_str().ok_or("no path")?;
    create(
        &mut source,
        json!({"driver": "file", "filename": file, "size": 0}),
    )?;
    source.qmp.execute(
        "blockdev-add",
        json!({"driver": "file", "filename": file, "node-name": "file"}),
    )?;
    create(
        &mut source,
        json!({"driver": "qcow2", "file": "file", "size": 64_u64 << 20}),
    )?;
    source.qmp.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "file": "file", "node-name": "image"}),
    )?;
    for (name, persistent) in [("kept", true), ("lost", false)] {
        source.qmp.execute(
            "block-dirty-bitmap-add",
            json!({"node": "image", "name": name, "persistent": persistent}),
        )?;
    }
    source.qmp.enable(&["dirty-bitmaps"])?;
    let sections = Sections::of(&capture(&mut source)?)?;
    let mut found: Vec<_> = sections
        .bitmaps
        .iter()
        .map(|b| (b.name.as_str(), b.flags.persistent, b.granularity))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [("kept", true, 65536), ("lost", false, 65536)]);
    Ok(())
}

/// What a migration sends on its main channel.
fn capture(source: &mut Qemu) -> Result<Vec<u8>> {
    let tap = Tap::sink()?;
    source.migrate(&tap.uri())?;
    source.wait_migration("completed")?;
    Ok(tap.finish()?.main)
}

/// What a stream's sections say.
struct Sections {
    bitmaps: Vec<MigratedBitmap>,
    /// Bytes that are dirty, of each.
    dirty: Vec<u64>,
}

impl Sections {
    /// Decodes a stream as far as its devices. Each chunk is encoded again, as it is and out of what
    /// it says.
    fn of(stream: &[u8]) -> Result<Self> {
        let mut decoder = StreamDecoder::new(DecoderConfig::new(ConfigurationRule::Any), None);
        let mut chunks = Chunks::default();
        let mut id = None;
        let mut at = 0;
        loop {
            let mut r = Reader::new(&stream[at..], at as u64);
            let Step::Item(item) = decoder.next(&mut r)? else {
                return Err("the stream ends".into());
            };
            at += r.consumed();
            match item {
                Item::Section(header) if header.idstr.as_str() == DIRTY_BITMAP_IDSTR => {
                    assert_eq!(
                        (header.instance.0, header.version),
                        (0, migration_stream::raw::dirty_bitmap::DIRTY_BITMAP_VERSION)
                    );
                    id = Some(header.id);
                    at += chunks.take(&stream[at..], at as u64)?;
                }
                Item::Continuation { id: of, .. } if Some(of) == id => {
                    at += chunks.take(&stream[at..], at as u64)?;
                }
                Item::Section(header) if header.idstr.as_str() != "ram" => break,
                Item::Ram(RamItem::Page(_)) => at += 4096,
                Item::Eof => break,
                _ => {}
            }
        }
        assert!(chunks.sections >= 2, "START and END");
        guest::compare("chunks", &chunks.bytes, &chunks.again)?;
        Ok(Self {
            bitmaps: chunks.decoder.bitmaps().to_vec(),
            dirty: chunks.dirty,
        })
    }
}

#[derive(Default)]
struct Chunks {
    decoder: DirtyBitmapDecoder,
    encoder: DirtyBitmapEncoder,
    sections: u32,
    bytes: Vec<u8>,
    again: Vec<u8>,
    dirty: Vec<u64>,
}

impl Chunks {
    fn take(&mut self, body: &[u8], offset: u64) -> Result<usize> {
        let skipped = self.decoder.clone().skip(body, offset)?;
        let mut r = Reader::new(body, offset);
        self.sections += 1;
        loop {
            let chunk = self.decoder.next(&mut r)?;
            self.encode(&chunk)?;
            if chunk.is_last {
                self.bytes.extend_from_slice(&body[..r.consumed()]);
                assert_eq!(skipped, Some(r.consumed()));
                return Ok(r.consumed());
            }
        }
    }

    fn encode(&mut self, chunk: &Chunk) -> Result<()> {
        let all = self.decoder.bitmaps();
        let current = self.decoder.current();
        let number = all.iter().position(|b| Some(b) == current);
        match (&chunk.kind, number) {
            (ChunkKind::Start { granularity, flags }, Some(number)) => {
                let MigratedBitmap { node, name, .. } = &all[number];
                let out = &mut self.again;
                self.encoder.start(node, name, *granularity, *flags, out)?;
                self.dirty.push(0);
            }
            (
                ChunkKind::Bits {
                    first_sector,
                    sectors,
                    bits,
                },
                Some(number),
            ) => {
                let zeroes = vec![0; bits_len(&all[number], *sectors)];
                let ones: u32 = bits.iter().flatten().map(|b| b.count_ones()).sum();
                self.dirty[number] += u64::from(ones) * u64::from(all[number].granularity);
                let (first, bits) = (*first_sector, bits.as_ref().unwrap_or(&zeroes));
                let out = &mut self.again;
                self.encoder.bits(number, first, *sectors, bits, out)?;
            }
            (ChunkKind::Complete, Some(number)) => {
                self.encoder.complete(number, &mut self.again)?;
            }
            _ => Chunk::end().encode(&mut self.again),
        }
        Ok(())
    }
}

fn bits_len(bitmap: &MigratedBitmap, sectors: u32) -> usize {
    let word = u64::from(bitmap.granularity) * 64;
    let words = (u64::from(sectors) * 512).div_ceil(word);
    usize::try_from(words * 8).unwrap_or(usize::MAX)
}

fn handed_on(qemu: &Binary) -> Result<()> {
    let mut from = source(qemu)?;
    let expected = bitmaps(&mut from)?;
    from.qmp.enable(&["return-path"])?;
    let blocks = from
        .ram_blocks()?
        .into_iter()
        .map(|(name, len)| RamBlock::new(name, len))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let memory = Arc::new(store::memory(RamBlockTable::new(blocks)?)?);

    let socket = from.dir().join("relay");
    let listener = UnixListener::bind(&socket)?;
    from.migrate(&format!("unix:{}", socket.display()))?;
    let (stream, _) = listener.accept()?;
    let channel = FdChannel::new(stream, PATIENCE)?;
    let config = TargetConfig::new(ConfigurationRule::Any).max_devices(1 << 20);
    let reader = StreamReader::new(channel.share(), b"");
    let sink = Box::new(channel.share());
    let (mut loaded, tail) = Target::new(config, reader, Some(sink), &*memory)
        .keeping_dirty_bitmaps()
        .load_opaque(&*memory, &mut NoMultifd, TailLimits::default())?;
    loaded.confirm()?;
    from.wait_migration("completed")?;
    let sections = loaded.dirty_bitmaps();
    assert_eq!(sections.bitmaps().len(), BITMAPS.len());

    let mut to = machine().incoming().start(qemu)?;
    to.qmp.enable(&["return-path", "dirty-bitmaps"])?;
    let socket = to.dir().join("relayed");
    to.listen(&format!("unix:{}", socket.display()))?;
    let channel = FdChannel::new(UnixStream::connect(&socket)?, PATIENCE)?;
    let configuration = loaded.configuration().cloned();
    send(channel, qemu, configuration, &memory, &tail, sections)?;
    to.wait_migration("completed")?;
    assert_eq!(bitmaps(&mut to)?, expected);
    Ok(())
}

/// Through `stream-relay`, by way of its store.
fn relayed(qemu: &Binary) -> Result<()> {
    let mut from = source(qemu)?;
    let expected = bitmaps(&mut from)?;
    from.qmp.enable(&["return-path"])?;
    let mut to = machine().incoming().start(qemu)?;
    to.qmp.enable(&["return-path", "dirty-bitmaps"])?;
    let (major, minor, _) = qemu.version();
    let machine_version = Some(MachineVersion::new(major, minor));
    let incoming = Incoming::open(IncomingConfig {
        from: "tcp:127.0.0.1:0".parse()?,
        channels: None,
        access: Access::default(),
        xbzrle: false,
        machine_version,
        uuid: [0; 16],
        max_memory: 1 << 30,
        max_device_state: 64 << 20,
        without_return_path: false,
        timeout: PATIENCE,
        pause_timeout: PATIENCE,
    })?;
    let uri = incoming.address().ok_or("no address")?.to_string();
    let relay = Relay {
        from: Origin::Source(Box::new(incoming)),
        store: Some(from.dir().join("store")),
        to: Some(OutgoingConfig {
            to: to.listen("tcp:127.0.0.1:0")?.parse()?,
            channels: None,
            mapped_ram: None,
            zero_pages: ZeroPageDetection::Legacy,
            max_bandwidth: 0,
            machine_version,
            uuid: [0; 16],
            timeout: PATIENCE,
        }),
        remove_store: false,
    };
    from.migrate(&uri)?;
    relay.run(&Arc::default())?;
    from.wait_migration("completed")?;
    to.wait_migration("completed")?;
    assert_eq!(bitmaps(&mut to)?, expected);
    Ok(())
}

/// Migrates what was received.
fn send(
    channel: FdChannel,
    qemu: &Binary,
    configuration: Option<Configuration>,
    memory: &Arc<GuestRamMmap>,
    tail: &Tail,
    bitmaps: &BitmapSections,
) -> Result<()> {
    let ram: Arc<dyn GuestRam> = Arc::clone(memory) as _;
    let return_path = ReturnPathReader::new(channel.share());
    let mut vm = Vm {
        control: Still,
        devices: Devices {
            tail: tail.clone(),
            bitmaps: bitmaps.clone(),
        },
    };
    Source::start(
        SourceConfig::new(configuration)
            .switchover_start(qemu.is_since((10, 0)))
            .confirm_timeout(PATIENCE),
        Arc::new(Limits::new(0, Duration::from_secs(1))),
        StreamWriter::new(channel),
        Some(return_path),
        RamSetup {
            log: NoLog,
            transport: InStream::new(ram, Default::default()),
        },
        &mut vm,
    )?
    .run(&mut vm)
    .completed()?;
    Ok(())
}

struct NoLog;

impl DirtyLog for NoLog {
    fn start(&mut self) -> std::result::Result<(), MemoryError> {
        Ok(())
    }
    fn sync(
        &mut self,
        _: &mut dyn FnMut(BlockId, u64, u64),
    ) -> std::result::Result<(), MemoryError> {
        Ok(())
    }
    fn stop(&mut self) -> std::result::Result<(), MemoryError> {
        Ok(())
    }
}

/// A guest that stands still.
struct Still;

impl VmControl for Still {
    fn pause(&mut self) -> std::result::Result<(), BoxError> {
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

impl SourceObserver for Still {}
