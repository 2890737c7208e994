//! Multifd with real QEMU at both ends: QEMU migrates to our `Target` and, with the devices it sent,
//! our `Source` to another QEMU, by every compression, kind of zero page and way of synchronising.
//! Memory has to be the same at all three.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_net::incoming::{self, Acceptor};
use migration_net::{Listener, outgoing};
use migration_stream::io::SendMode;
use migration_stream::precopy::{
    Limits, RamSetup, ReturnPathReader, Source, SourceConfig, SourceObserver, Target, TargetConfig,
};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable, ZeroPageDetection};
use migration_stream::{
    BoxError, Configuration, ConfigurationRule, DecoderConfig, DirtyLog, GuestRam, GuestRamMmap,
    MachineName, MemoryError, StreamReader, StreamWriter, Tail, TailLimits, TransportCounters, Vm,
    VmControl,
};
use multifd::{
    ChannelCount, Compression, Flush, LevelWatch, MultifdConfig, RecvSet, SendSet, ZlibLevel,
    ZstdLevel, ZstdRange,
};
use serde_json::{Value, json};
use tests::guest::{self, Checker, Content};
use tests::harness::{self, Needs, Tests};
use tests::narrow::Narrow;
use tests::qemu::{Binary, Machine, Qemu};
use tests::store;
use tests::{PATIENCE, Result};

/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// What the RAM block that a test's file stands behind is called.
const RAM: &str = "ram0";

const ZLIB: fn() -> Compression = || Compression::Zlib(ZlibLevel::default());
const ZSTD: fn() -> Compression = || Compression::Zstd(ZstdLevel::default());
const PLAIN: fn() -> Compression = || Compression::None;

fn main() -> ExitCode {
    use ZeroPageDetection::{Legacy, Multifd, None};
    let since = |version, name, test: fn(&Binary) -> Result<()>| {
        Needs::NOTHING.qemu(version).test_qemu(name, test)
    };
    harness::run(
        [
            since((9, 0), "zero_pages_in_packets", |q| {
                relay(q, &newest(q), 2, PLAIN(), Multifd)
            }),
            since((9, 0), "zero_pages_in_packets_with_zlib", |q| {
                relay(q, &newest(q), 2, ZLIB(), Multifd)
            }),
            since((9, 0), "zero_pages_in_packets_with_zstd", |q| {
                relay(q, &newest(q), 3, ZSTD(), Multifd)
            }),
            since((7, 2), "zero_pages_on_the_main_stream", |q| {
                relay(q, &newest(q), 2, PLAIN(), Legacy)
            }),
            since((7, 2), "zero_pages_on_the_main_stream_with_zlib", |q| {
                relay(q, &newest(q), 3, ZLIB(), Legacy)
            }),
            since((7, 2), "zero_pages_on_the_main_stream_with_zstd", |q| {
                relay(q, &newest(q), 1, ZSTD(), Legacy)
            }),
            since((9, 0), "zero_pages_as_any_other", |q| {
                relay(q, &newest(q), 4, PLAIN(), None)
            }),
            since((9, 0), "zero_pages_as_any_other_with_zlib", |q| {
                relay(q, &newest(q), 1, ZLIB(), None)
            }),
            since((10, 0), "a_machine_of_8_2_syncs_each_round", |q| {
                relay(q, "pc-q35-8.2", 2, ZLIB(), Legacy)
            }),
            since((10, 0), "a_machine_of_8_0_syncs_with_each_section", |q| {
                relay(q, "pc-q35-8.0", 2, PLAIN(), Legacy)
            }),
            since((10, 0), "a_machine_of_8_0_with_zlib", |q| {
                relay(q, "pc-q35-8.0", 3, ZLIB(), Legacy)
            }),
            since(
                (10, 0),
                "a_machine_of_8_0_with_zstd_and_zero_pages_in_packets",
                |q| relay(q, "pc-q35-8.0", 2, ZSTD(), Multifd),
            ),
            since((7, 2), "zstd_at_levels_that_follow_a_thin_line", adaptive),
            since((9, 0), "pages_without_a_copy_on_their_way_out", |q| {
                relay_with(
                    q,
                    &newest(q),
                    (config(2, PLAIN(), Multifd)).send_mode(SendMode::ZeroCopy),
                )
            }),
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

/// One QEMU to us, and we to another.
fn relay(
    qemu: &Binary,
    machine: &str,
    channels: u8,
    compression: Compression,
    zero_pages: ZeroPageDetection,
) -> Result<()> {
    relay_with(qemu, machine, config(channels, compression, zero_pages))
}

fn config(channels: u8, compression: Compression, zero_pages: ZeroPageDetection) -> MultifdConfig {
    MultifdConfig::new(ChannelCount::new(channels).unwrap_or_default())
        .compression(compression)
        .zero_pages(zero_pages)
        .stall_limit(PATIENCE)
}

fn flush(machine: &str) -> Result<Flush> {
    Ok(if machine_version(machine)? < (8, 1) {
        Flush::EachSection
    } else {
        Flush::EachRound
    })
}

fn relay_with(qemu: &Binary, machine: &str, mut config: MultifdConfig) -> Result<()> {
    config.flush = flush(machine)?;
    let zero_pages = config.zero_pages;
    let dir = tempfile::tempdir()?;
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    guest::write_memory(&from, u64::from(MEMORY) << 20, Content::Mixed)?;

    let mut source = Machine::new(machine, MEMORY).memory_in(&from).start(qemu)?;
    configure(&mut source, qemu, &config)?;
    let (memory, tail) = receive(&mut source, &config)?;
    guest::compare(
        "RAM of the source and ours",
        &fs::read(&from)?,
        &store::bytes(&memory, RAM)?,
    )?;

    let mut destination = Machine::new(machine, MEMORY)
        .memory_in(&to)
        .incoming()
        .start(qemu)?;
    configure(&mut destination, qemu, &config)?;
    let to_destination = destination.listen("tcp:127.0.0.1:0")?;
    let (sent, _) = send(&to_destination, machine, memory, &tail, &config)?;
    destination.wait_migration("completed")?;
    compare_files(&from, &to)?;
    assert_eq!(sent.zero_pages > 0, zero_pages != ZeroPageDetection::None);
    // Over loopback there is always a copy, which only zero-copy counts.
    assert_eq!(
        sent.missed_zero_copy > 0,
        config.send_mode == SendMode::ZeroCopy
    );
    Ok(())
}

/// Bytes a second, of which a guest of [`MEMORY`] is some seconds full.
const THIN: u64 = 2_000_000;

/// A guest that checks its memory goes to QEMU over a line so thin that levels go up, each with a frame
/// of its own, and goes on there.
fn adaptive(qemu: &Binary) -> Result<()> {
    let machine = newest(qemu);
    let levels = Compression::ZstdAdaptive(ZstdRange::default());
    let config = config(2, levels, ZeroPageDetection::Legacy).flush(flush(&machine)?);
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let checker = Checker {
        start: 4 << 20,
        pages: 1024,
    };
    checker.write_disk(&disk)?;
    let start = |memory: &Path| {
        Machine::new(&machine, MEMORY)
            .boot(&disk)
            .memory_in(memory)
            .args(["-serial", "stdio"])
    };
    let memory = dir.path().join("from");
    guest::write_memory(&memory, u64::from(MEMORY) << 20, Content::Mixed)?;
    let mut source = start(&memory).running().start(qemu)?;
    configure(&mut source, qemu, &config)?;
    let checked = |vm: &Qemu| {
        let stdout = vm.process.stdout();
        stdout.wait_for("the guest", |passes| (passes.len() >= 2).then_some(()))
    };
    checked(&source)?;
    let (memory, tail) = receive(&mut source, &config)?;
    source.process.kill()?;
    let mut passes = source.process.stdout().whole()?;

    let expected = store::bytes(&memory, RAM)?;
    let landed = dir.path().join("to");
    let mut destination = start(&landed).incoming().start(qemu)?;
    configure(&mut destination, qemu, &config)?;
    let uri = format!("unix:{}", dir.path().join("migration").display());
    let line = Narrow::to(&destination.listen(&uri)?, THIN)?;
    let (_, level) = send(&line.uri(), &machine, memory, &tail, &config)?;
    destination.wait_migration("completed")?;
    let level = level.ok_or("a level that does not adapt")?;
    assert!(level.level() > 1 && level.changes() >= 3, "{level:?}");
    guest::compare(
        "RAM of ours and the destination",
        &expected,
        &fs::read(&landed)?,
    )?;
    destination.qmp.execute("cont", json!({}))?;
    checked(&destination)?;
    destination.process.kill()?;
    passes.extend(destination.process.stdout().whole()?);
    assert!(Checker::passes(&passes)? >= 4);
    Ok(())
}

fn compare_files(from: &Path, to: &Path) -> Result<()> {
    guest::compare(
        "RAM of source and destination",
        &fs::read(from)?,
        &fs::read(to)?,
    )
}

fn configure(vm: &mut Qemu, qemu: &Binary, config: &MultifdConfig) -> Result<()> {
    vm.qmp.enable(&["return-path", "multifd"])?;
    if config.send_mode == SendMode::ZeroCopy {
        vm.qmp.enable(&["zero-copy-send"])?;
    }
    let compression = match config.compression {
        Compression::Zlib(_) => "zlib",
        Compression::Zstd(_) | Compression::ZstdAdaptive(_) => "zstd",
        _ => "none",
    };
    let mut parameters = json!({
        "multifd-channels": config.channels.get(),
        "multifd-compression": compression,
    });
    if qemu.is_since((9, 0)) {
        parameters["zero-page-detection"] = Value::from(match config.zero_pages {
            ZeroPageDetection::None => "none",
            ZeroPageDetection::Legacy => "legacy",
            ZeroPageDetection::Multifd => "multifd",
        });
    }
    vm.qmp.set_parameters(parameters)
}

/// Takes the migration of `source`.
fn receive(source: &mut Qemu, config: &MultifdConfig) -> Result<(GuestRamMmap, Tail)> {
    let blocks = source
        .ram_blocks()?
        .into_iter()
        .map(|(name, len)| RamBlock::new(name, len))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    let memory = store::memory(RamBlockTable::new(blocks)?)?;
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
    let uri = listener.address().to_string();
    let mut acceptor = Acceptor::new(listener, Some(config), incoming::Limits::default())?;
    source.migrate(&uri)?;
    let incoming = acceptor.accept(None)?;
    let waker = incoming.main.share();
    let channels = incoming.channels.into_iter().map(Into::into).collect();
    let set = RecvSet::start(memory, channels, config, move |_| waker.shutdown())?;
    let target_config = TargetConfig::new(
        DecoderConfig::new(ConfigurationRule::Any)
            .flush_each_section(config.flush == Flush::EachSection),
    )
    .max_devices(1 << 20);
    let target = Target::new(
        target_config,
        StreamReader::new(incoming.main.share(), &incoming.prefix),
        Some(Box::new(incoming.main.share())),
        set.store(),
    );
    let loaded = target.load_opaque(set.store(), &mut set.barrier(), TailLimits::default());
    let loaded = loaded.and_then(|(mut loaded, tail)| {
        loaded.confirm()?;
        Ok((loaded, tail))
    });
    let (loaded, tail) = match loaded {
        Ok(loaded) => loaded,
        // The channel that broke knows more than the main stream that was shut for it.
        Err(e) => return Err(format!("{e}; channels: {:?}", set.join()?.outcome).into()),
    };
    assert!(loaded.received().flushes > 0);
    source.wait_migration("completed")?;
    let joined = set.join()?;
    joined.outcome?;
    Ok((joined.store, tail))
}

/// Migrates what was received to the destination that listens there.
fn send(
    to: &str,
    machine: &str,
    memory: GuestRamMmap,
    tail: &Tail,
    config: &MultifdConfig,
) -> Result<(TransportCounters, Option<LevelWatch>)> {
    let address = to.parse()?;
    let connected = outgoing::connect(&address, Some(config), PATIENCE, PATIENCE, None)?;
    let ram: Arc<dyn GuestRam> = Arc::new(memory);
    let channels = connected.channels.into_iter().map(Into::into).collect();
    let transport = SendSet::start(Arc::clone(&ram), channels, config)?;
    let level = transport.level();
    let source_config = SourceConfig::new(Configuration::new(MachineName::new(machine)?))
        .switchover_start(machine_version(machine)? >= (10, 0))
        .confirm_timeout(PATIENCE);
    let mut vm = Vm {
        control: Still,
        devices: tail.clone(),
    };
    let source = Source::start(
        source_config,
        Arc::new(Limits::new(0, Duration::from_millis(300))),
        StreamWriter::new(connected.main.share()),
        Some(ReturnPathReader::new(connected.main.share())),
        RamSetup {
            log: SomeAgain(RamBlockTable::clone(ram.blocks())),
            transport,
        },
        &mut vm,
    )?;
    let switched = source.run(&mut vm).completed()?;
    Ok((switched.ram.counters(), level))
}

/// Every 64th word of pages is dirty whenever it is asked for, so that there is more than a round.
struct SomeAgain(RamBlockTable);

impl DirtyLog for SomeAgain {
    fn start(&mut self) -> std::result::Result<(), MemoryError> {
        Ok(())
    }

    fn sync(
        &mut self,
        sink: &mut dyn FnMut(BlockId, u64, u64),
    ) -> std::result::Result<(), MemoryError> {
        for (id, block) in self.0.iter() {
            for first in (0..block.pages() / 64 * 64).step_by(64 * 64) {
                sink(id, first, 0xff00_ff00_0000_0001);
            }
        }
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
