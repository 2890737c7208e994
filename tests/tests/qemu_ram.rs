//! Real QEMU migrates to our `Target` over TCP: every page has to be what QEMU's own `pmemsave`
//! and the file behind its RAM say.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::{self, JoinHandle};

use migration_net::Listener;
use migration_net::incoming::{Acceptor, Limits};
use migration_stream::precopy::{Loaded, Received, Target, TargetConfig};
use migration_stream::ram::{NoMultifd, RamBlock, RamBlockTable};
use migration_stream::{ConfigurationRule, DecoderConfig, GuestRamMmap, StreamReader, TailLimits};
use multifd::{ChannelCount, Compression, MultifdConfig, RecvSet, ZlibLevel};
use serde_json::json;
use tempfile::TempDir;
use tests::Result;
use tests::guest::{self, Content, Dirtier};
use tests::harness::{self, Needs, Tests};
use tests::qemu::{Binary, Machine, Qemu};
use tests::store;

/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// What the RAM block that a test's file stands behind is called.
const RAM: &str = "ram0";

fn main() -> ExitCode {
    let since = (7, 2);
    let trial =
        |name, test: fn(&Binary) -> Result<()>| Needs::NOTHING.qemu(since).test_qemu(name, test);
    let live = |name, test: fn(&Binary) -> Result<()>| {
        Needs::NOTHING
            .live_guests()
            .qemu(since)
            .test_qemu(name, test)
    };
    harness::run(
        [
            trial("ram_of_a_stopped_guest_arrives_plain", |q| {
                stopped_guest(q, How::Plain)
            }),
            trial("ram_of_a_stopped_guest_arrives_by_one_channel", |q| {
                stopped_guest(q, How::Multifd(1, Compression::None))
            }),
            trial("ram_of_a_stopped_guest_arrives_by_four_channels", |q| {
                stopped_guest(q, How::Multifd(4, Compression::None))
            }),
            trial("ram_of_a_stopped_guest_arrives_by_zstd_channels", |q| {
                stopped_guest(q, How::Multifd(2, zstd()))
            }),
            trial("ram_of_a_stopped_guest_arrives_by_zlib_channels", |q| {
                stopped_guest(q, How::Multifd(2, Compression::Zlib(ZlibLevel::default())))
            }),
            live("ram_of_a_running_guest_arrives_plain", |q| {
                running_guest(q, How::Plain)
            }),
            live("ram_of_a_running_guest_arrives_as_differences", |q| {
                running_guest(q, How::Xbzrle)
            }),
            live("ram_of_a_running_guest_arrives_by_two_channels", |q| {
                running_guest(q, How::Multifd(2, Compression::None))
            }),
            live("ram_of_a_running_guest_arrives_by_zlib_channels", |q| {
                running_guest(q, How::Multifd(2, Compression::Zlib(ZlibLevel::default())))
            }),
            live("ram_of_a_running_guest_arrives_by_zstd_channels", |q| {
                running_guest(q, How::Multifd(2, zstd()))
            }),
        ]
        .map(Tests::with_some_qemu),
    )
}

/// How pages cross.
#[derive(Clone, Copy)]
enum How {
    Plain,
    Xbzrle,
    Multifd(u8, Compression),
}

fn zstd() -> Compression {
    Compression::Zstd(multifd::ZstdLevel::default())
}

fn stopped_guest(qemu: &Binary, how: How) -> Result<()> {
    for machine in ["q35", "microvm"] {
        let files = Files::new()?;
        guest::write_memory(&files.memory, u64::from(MEMORY) << 20, Content::Mixed)?;
        let mut source = Machine::new(machine, MEMORY)
            .memory_in(&files.memory)
            .start(qemu)?;
        let destination = Destination::listen(qemu, &mut source, how)?;
        configure(&mut source, how)?;
        source.migrate(&destination.uri)?;
        let received = check(destination, &mut source, &files)?;
        assert_eq!(received.flushes > 0, matches!(how, How::Multifd(..)));
    }
    Ok(())
}

fn running_guest(qemu: &Binary, how: How) -> Result<()> {
    for machine in ["pc", "microvm"] {
        let files = Files::new()?;
        let guest = Dirtier {
            start: 4 << 20,
            pages: 1024,
        };
        guest.write_disk(&files.disk)?;
        let mut source = Machine::new(machine, MEMORY)
            .accel(qemu.live_accel())
            .boot(&files.disk)
            .memory_in(&files.memory)
            .running()
            .args(["-serial", "stdio"])
            .start(qemu)?;
        source
            .process
            .stdout()
            .wait_for("first round", |b| (!b.is_empty()).then_some(()))?;
        let destination = Destination::listen(qemu, &mut source, how)?;
        configure(&mut source, how)?;
        source.qmp.enable(&["events"])?;
        // Not before the guest has dirtied again what was sent, and for differences what was sent
        // again: more than a page must be left for another pass.
        let bandwidth = match how {
            How::Xbzrle => 4 << 20,
            _ => 32 << 20,
        };
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": bandwidth, "downtime-limit": 1}))?;
        source.migrate(&destination.uri)?;
        source
            .qmp
            .wait_event_if("MIGRATION_PASS", |d| d["pass"] == 2)?;
        if let How::Xbzrle = how {
            source.wait_differences()?;
        }
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        let received = check(destination, &mut source, &files)?;
        assert_eq!(received.xbzrle_pages > 0, matches!(how, How::Xbzrle));
    }
    Ok(())
}

struct Files {
    _dir: TempDir,
    memory: PathBuf,
    disk: PathBuf,
}

impl Files {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            memory: dir.path().join("memory"),
            disk: dir.path().join("disk"),
            _dir: dir,
        })
    }
}

fn configure(source: &mut Qemu, how: How) -> Result<()> {
    source.qmp.enable(&["return-path"])?;
    if let How::Xbzrle = how {
        source.qmp.enable(&["xbzrle"])?;
    }
    if let How::Multifd(count, compression) = how {
        source.qmp.enable(&["multifd"])?;
        let method = match compression {
            Compression::None => "none",
            Compression::Zlib(_) => "zlib",
            _ => "zstd",
        };
        source
            .qmp
            .set_parameters(json!({"multifd-channels": count, "multifd-compression": method}))?;
    }
    Ok(())
}

/// Our side, in a thread of its own, until everything is loaded and confirmed.
struct Destination {
    uri: String,
    thread: JoinHandle<Result<(GuestRamMmap, Received)>>,
}

impl Destination {
    fn listen(qemu: &Binary, source: &mut Qemu, how: How) -> Result<Self> {
        let blocks = source
            .ram_blocks()?
            .into_iter()
            .map(|(name, len)| RamBlock::new(name, len))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let memory = store::memory(RamBlockTable::new(blocks)?)?;
        let multifd = match how {
            How::Plain | How::Xbzrle => None,
            How::Multifd(count, compression) => Some(
                MultifdConfig::new(ChannelCount::new(count).unwrap_or_default())
                    .compression(compression),
            ),
        };
        let decoder = DecoderConfig::new(ConfigurationRule::Any)
            .xbzrle(matches!(how, How::Xbzrle))
            .flush_each_section(multifd.is_some() && !qemu.is_since((8, 1)));
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?)?;
        let uri = listener.address().to_string();
        let acceptor = Acceptor::new(listener, multifd.as_ref(), Limits::default())?;
        let thread = thread::spawn(move || receive(acceptor, decoder, multifd.as_ref(), memory));
        Ok(Self { uri, thread })
    }
}

fn receive(
    mut acceptor: Acceptor,
    decoder: DecoderConfig,
    multifd: Option<&MultifdConfig>,
    memory: GuestRamMmap,
) -> Result<(GuestRamMmap, Received)> {
    let incoming = acceptor.accept(None)?;
    let config = TargetConfig::new(decoder).max_devices(1 << 20);
    let reader = StreamReader::new(incoming.main.share(), &incoming.prefix);
    let target = |store: &GuestRamMmap| {
        Target::new(config, reader, Some(Box::new(incoming.main.share())), store)
    };
    let limits = TailLimits::default();
    let confirm = |loaded: &mut Loaded| -> Result<Received> {
        loaded.confirm()?;
        Ok(loaded.received())
    };
    let Some(multifd) = multifd else {
        let (mut loaded, tail) = target(&memory).load_opaque(&memory, &mut NoMultifd, limits)?;
        assert!(tail.sections().len() > 10);
        let received = confirm(&mut loaded)?;
        return Ok((memory, received));
    };
    let waker = incoming.main.share();
    let channels = incoming.channels.into_iter().map(Into::into).collect();
    let set = RecvSet::start(memory, channels, multifd, move |_| waker.shutdown())?;
    let (mut loaded, tail) =
        target(set.store()).load_opaque(set.store(), &mut set.barrier(), limits)?;
    assert!(tail.sections().len() > 10);
    let received = confirm(&mut loaded)?;
    let joined = set.join()?;
    joined.outcome?;
    Ok((joined.store, received))
}

/// Waits for both ends and compares the memory that arrived with the source's, which stands still.
fn check(destination: Destination, source: &mut Qemu, files: &Files) -> Result<Received> {
    let arrived = destination.thread.join();
    let (memory, received) = arrived.map_err(|_| "our side panicked")??;
    source.wait_migration("completed")?;
    let ram = store::bytes(&memory, RAM)?;
    guest::compare("RAM and its file", &fs::read(&files.memory)?, &ram)?;
    for range in guest::plain_ram(MEMORY) {
        let expected = source.pmemsave(range.start, range.end - range.start)?;
        let slice = usize::try_from(range.start)?..usize::try_from(range.end)?;
        guest::compare("RAM and pmemsave", &expected, &ram[slice])?;
    }
    // Firmware ends where the 32-bit address space does.
    let firmware = store::bytes(&memory, "pc.bios")?;
    let expected = source.pmemsave((1 << 32) - firmware.len() as u64, firmware.len() as u64)?;
    guest::compare("firmware and pmemsave", &expected, &firmware)?;
    Ok(received)
}
