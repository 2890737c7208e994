//! Options of precopy with real QEMU at both ends: QEMU migrates to our `Target` and, with the
//! devices it sent, our `Source` to another QEMU, where the guest goes on.

use std::fs::{self, File};
use std::num::NonZeroU8;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_net::incoming::{self, Acceptor};
use migration_net::{Listener, outgoing};
use migration_stream::io::{PositionedFile, open_direct};
use migration_stream::mapped_ram::FileWriter;
use migration_stream::precopy::{
    Control, Limits, Progress, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver,
    SourceStatus, SwitchoverAcks, Target, TargetConfig,
};
use migration_stream::ram::{
    BlockId, InStream, NoMultifd, RamBlock, RamBlockTable, ZeroPageDetection,
};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, DecoderConfig, GuestRam, GuestRamMmap, PAGE_SIZE,
    PageTransport, StreamReader, StreamWriter, Tail, TailLimits, TransportCounters, Vm, VmControl,
};
use serde_json::json;
use tests::guest::{self, Dirtier};
use tests::harness::{self, Needs, Tests};
use tests::qemu::{Binary, Machine, Qemu};
use tests::store;
use tests::written::Written;
use tests::{PATIENCE, Result};

/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// What the RAM block that a test's file stands behind is called.
const RAM: &str = "ram0";
/// A guest that changes a byte of each of its pages, over and over.
const GUEST: Dirtier = Dirtier {
    start: 4 << 20,
    pages: 1024,
};
const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";
const UUID_BYTES: [u8; 16] = [
    0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
];

fn main() -> ExitCode {
    let since = |version, name, test: fn(&Binary) -> Result<()>| {
        Needs::NOTHING.qemu(version).test_qemu(name, test)
    };
    harness::run(
        [
            since((7, 2), "a_guest_sent_as_differences_goes_on", |q| {
                relay(q, &newest(q), &["xbzrle"])
            }),
            since(
                (7, 2),
                "a_guest_paused_before_the_switchover_goes_on",
                |q| relay(q, &newest(q), &["pause-before-switchover"]),
            ),
            since((7, 2), "a_uuid_is_validated_by_both_ends", |q| {
                relay(q, &newest(q), &["validate-uuid"])
            }),
            since((8, 1), "a_switchover_is_acknowledged_by_both_ends", |q| {
                relay(q, &newest(q), &["switchover-ack"])
            }),
            since((10, 0), "an_older_machine_acknowledges_in_its_way", |q| {
                relay(q, "pc-q35-9.2", &["switchover-ack"])
            }),
            since((10, 0), "an_older_machine_is_sent_as_differences", |q| {
                relay(q, "pc-q35-9.2", &["xbzrle", "switchover-ack"])
            }),
            since((9, 0), "a_file_of_ours_is_loaded", |q| {
                relay(q, &newest(q), &["mapped-ram"])
            }),
            since((9, 0), "a_file_of_ours_is_loaded_by_channels", |q| {
                relay(q, &newest(q), &["mapped-ram", "multifd"])
            }),
            since(
                (9, 0),
                "a_file_of_ours_is_loaded_past_the_page_cache",
                |q| relay(q, &newest(q), &["mapped-ram", "multifd", "direct-io"]),
            ),
        ]
        .map(Tests::with_some_qemu),
    )
}

/// The newest q35 of this QEMU.
fn newest(qemu: &Binary) -> String {
    let (major, minor, _) = qemu.version();
    format!("pc-q35-{major}.{minor}")
}

/// The version of QEMU whose machine `pc-q35-X.Y` is.
fn machine_version(machine: &str) -> Result<(u32, u32)> {
    machine
        .strip_prefix("pc-q35-")
        .and_then(|version| version.split_once('.'))
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| format!("{machine} has no version").into())
}

/// A migration's options.
struct Options<'a> {
    version: (u32, u32),
    capabilities: &'a [&'a str],
}

impl Options<'_> {
    fn has(&self, capability: &str) -> bool {
        self.capabilities.contains(&capability)
    }

    /// How many acknowledgements come where no device wants to give one.
    fn acks(&self) -> u32 {
        u32::from(self.version < (11, 1))
    }

    /// What goes to a destination goes by a file, which nobody answers.
    fn is_mapped(&self) -> bool {
        self.has("mapped-ram")
    }

    fn configure_source(&self, vm: &mut Qemu) -> Result<()> {
        vm.qmp.enable(&["return-path"])?;
        if self.is_mapped() {
            return Ok(());
        }
        vm.qmp.enable(self.capabilities)
    }

    fn configure_destination(&self, vm: &mut Qemu) -> Result<()> {
        if !self.is_mapped() {
            return self.configure_source(vm);
        }
        for capability in self.capabilities {
            match *capability {
                "direct-io" => vm.qmp.set_parameters(json!({"direct-io": true}))?,
                capability => vm.qmp.enable(&[capability])?,
            }
        }
        Ok(())
    }
}

/// One running QEMU to us, and we to another.
fn relay(qemu: &Binary, machine: &str, capabilities: &[&str]) -> Result<()> {
    let options = Options {
        version: machine_version(machine)?,
        capabilities,
    };
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    GUEST.write_disk(&disk)?;
    let start = |memory: &Path| {
        Machine::new(machine, MEMORY)
            .boot(&disk)
            .memory_in(memory)
            .args(["-serial", "stdio", "-uuid", UUID])
    };
    let mut source = start(&dir.path().join("from")).running().start(qemu)?;
    let wrote = |vm: &Qemu| {
        let stdout = vm.process.stdout();
        stdout.wait_for("the guest", |b| (!b.is_empty()).then_some(()))
    };
    wrote(&source)?;
    options.configure_source(&mut source)?;
    let received = receive(&mut source, &options)?;
    drop(source);

    let memory = Arc::new(received.memory);
    let to = dir.path().join("to");
    let mut destination = start(&to).incoming().start(qemu)?;
    options.configure_destination(&mut destination)?;
    let counters = send(
        &mut destination,
        &options,
        &memory,
        received.configuration,
        &received.tail,
    )?;
    destination.wait_migration("completed")?;
    guest::compare(
        "RAM of the destination and ours",
        &store::bytes(&memory, RAM)?,
        &fs::read(&to)?,
    )?;
    assert_eq!(counters.xbzrle.pages > 0, options.has("xbzrle"));
    destination.qmp.execute("cont", serde_json::Value::Null)?;
    wrote(&destination)
}

struct Received {
    memory: GuestRamMmap,
    configuration: Configuration,
    tail: Tail,
}

/// Takes the migration of `source`.
fn receive(source: &mut Qemu, options: &Options<'_>) -> Result<Received> {
    let blocks = source
        .ram_blocks()?
        .into_iter()
        .map(|(name, len)| RamBlock::new(name, len))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let memory = store::memory(RamBlockTable::new(blocks)?)?;
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
    let uri = listener.address().to_string();
    let mut acceptor = Acceptor::new(listener, None, incoming::Limits::default())?;
    source.migrate(&uri)?;
    let incoming = acceptor.accept(None)?;
    let config =
        TargetConfig::new(DecoderConfig::new(ConfigurationRule::Any).xbzrle(options.has("xbzrle")))
            .max_devices(1 << 20);
    let mut target = Target::new(
        config,
        StreamReader::new(incoming.main.share(), &incoming.prefix),
        Some(Box::new(incoming.main.share())),
        &memory,
    );
    if options.has("switchover-ack") {
        let acks = if options.acks() == 1 {
            SwitchoverAcks::one_for_all(0)
        } else {
            SwitchoverAcks::each(0)
        };
        target = target.acknowledging(Arc::new(acks));
    }
    let (mut loaded, tail) = std::thread::scope(|scope| {
        let loading =
            scope.spawn(|| target.load_opaque(&memory, &mut NoMultifd, TailLimits::default()));
        if options.has("pause-before-switchover") {
            source.wait_migration("pre-switchover")?;
            let state = serde_json::json!({"state": "pre-switchover"});
            source.qmp.execute("migrate-continue", state)?;
        }
        let loaded = loading.join().map_err(|_| "our side panicked")?;
        Ok::<_, tests::Error>(loaded?)
    })?;
    loaded.confirm()?;
    source.wait_migration("completed")?;
    let configuration = loaded.configuration().ok_or("no configuration")?.clone();
    let uuid = options.has("validate-uuid").then_some(UUID_BYTES);
    assert_eq!(configuration.uuid, uuid);
    Ok(Received {
        memory,
        configuration,
        tail,
    })
}

/// Migrates what was received to `destination`.
fn send(
    destination: &mut Qemu,
    options: &Options<'_>,
    memory: &Arc<GuestRamMmap>,
    configuration: Configuration,
    tail: &Tail,
) -> Result<TransportCounters> {
    let ram: Arc<dyn GuestRam> = Arc::clone(memory) as _;
    // On a disk: not every file system in memory has direct I/O.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let path = dir.path().join("file");
    let (out, return_path, transport) = if options.is_mapped() {
        let (out, transport) = file_of_ours(&ram, &path, options)?;
        (out, None, transport)
    } else {
        let address = destination.listen("tcp:127.0.0.1:0")?.parse()?;
        let main = outgoing::connect(&address, None, PATIENCE, PATIENCE, None)?.main;
        let mut transport = InStream::new(Arc::clone(&ram), ZeroPageDetection::default());
        if options.has("xbzrle") {
            transport = transport.with_xbzrle(InStream::DEFAULT_CACHE)?;
        }
        let transport: Box<dyn PageTransport> = Box::new(transport);
        let return_path = ReturnPathReader::new(main.share());
        (StreamWriter::new(main), Some(return_path), transport)
    };
    let log = Written::default();
    let mut guest = Vm {
        control: Relayed {
            ram: Arc::clone(&ram),
            block: ram.blocks().find(RAM.as_bytes()).ok_or("no memory")?,
            log: log.clone(),
            pauses_left: if options.has("pause-before-switchover") {
                3
            } else {
                0
            },
        },
        devices: tail.clone(),
    };
    let mut source = Source::start(
        SourceConfig::new(configuration)
            .switchover_start(options.version >= (10, 0))
            .confirm_timeout(PATIENCE),
        Arc::new(Limits::new(0, Duration::ZERO)),
        out,
        return_path,
        RamSetup { log, transport },
        &mut guest,
    )?;
    if options.has("pause-before-switchover") {
        source = source.pausing_before_switchover();
    }
    if options.has("switchover-ack") {
        source = source.awaiting_switchover_acks(options.acks())?;
    }
    let switched = source.run(&mut guest).completed()?;
    assert_eq!(guest.control.pauses_left, 0);
    if options.is_mapped() {
        destination.listen(&format!("file:{}", path.display()))?;
        destination.wait_migration("completed")?;
    }
    Ok(switched.ram.counters())
}

/// A file with mapped-ram that our source is to write, by several threads where QEMU has channels.
fn file_of_ours(
    ram: &Arc<dyn GuestRam>,
    path: &Path,
    options: &Options<'_>,
) -> Result<(StreamWriter, Box<dyn PageTransport>)> {
    let file: Arc<dyn PositionedFile> = Arc::new(File::create_new(path)?);
    let detection = ZeroPageDetection::default();
    let mut transport = FileWriter::new(Arc::clone(ram), Arc::clone(&file), detection);
    if options.has("multifd") {
        transport = transport.with_threads(NonZeroU8::MIN.saturating_add(2));
    }
    if options.has("direct-io") {
        let direct = open_direct(path, File::options().write(true))?;
        transport = transport.with_pages_to(Arc::new(direct));
    }
    Ok((StreamWriter::to_file(file, 0), Box::new(transport)))
}

/// The guest whose devices were received; it writes its pages for five rounds as it would have
/// written them itself.
struct Relayed {
    ram: Arc<dyn GuestRam>,
    block: BlockId,
    log: Written,
    pauses_left: u32,
}

impl Relayed {
    fn write(&self) -> std::result::Result<(), BoxError> {
        for page in 0..u64::from(GUEST.pages) {
            let offset = u64::from(GUEST.start) + page * PAGE_SIZE;
            let byte = self.ram.slice(self.block, offset, 1)?;
            let mut value = [0_u8];
            byte.copy_to(&mut value);
            byte.copy_from(&[value[0].wrapping_add(1)]);
            self.log.note(self.block, offset / PAGE_SIZE);
        }
        Ok(())
    }
}

impl VmControl for Relayed {
    fn pause(&mut self) -> std::result::Result<(), BoxError> {
        // What it wrote last.
        self.write()
    }

    fn resume(&mut self) -> std::result::Result<Instant, BoxError> {
        Ok(Instant::now())
    }
}

impl SourceObserver for Relayed {
    fn progress(&mut self, progress: &Progress) -> Control {
        if progress.status == SourceStatus::PreSwitchover {
            self.pauses_left -= 1;
            return if self.pauses_left == 0 {
                Control::SwitchOver
            } else {
                Control::Continue
            };
        }
        if progress.pass < 5 && self.write().is_err() {
            return Control::Cancel;
        }
        Control::Continue
    }
}
