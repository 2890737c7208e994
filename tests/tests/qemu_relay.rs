//! Running guests of real QEMU through `stream-relay`: from every version by every transport, each
//! byte of their memory as the source had it, and on into another QEMU of that version by another
//! transport, where they go on.

use std::fs;
use std::num::NonZeroU8;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use migration_stream::ram::ZeroPageDetection;
use migration_stream::{GuestRam, MachineVersion};
use multifd::{ChannelCount, Compression, ZlibLevel, ZstdLevel};
use serde_json::{Value, json};
use stream_relay::cli::chain;
use stream_relay::guest::Guest;
use stream_relay::incoming::{Incoming, IncomingConfig, Received};
use stream_relay::outgoing::{self, OutgoingConfig};
use stream_relay::progress::Progress;
use stream_relay::relay::{Origin, Relay};
use stream_relay::{Access, Channels};
use tests::guest::{self, Checker, Dirtier};
use tests::harness::{self, Needs};
use tests::linux::{self, Linux};
use tests::qemu::{Accel, Binary, Machine, Qemu};
use tests::{PATIENCE, Result};

/// Guest memory, MiB.
const MEMORY: u32 = 32;
/// What the RAM block that a test's file stands behind is called.
const RAM: &str = "ram0";
const DIRTIER: Dirtier = Dirtier {
    start: 4 << 20,
    pages: 1024,
};
/// How often a state that nobody tells of is looked at.
const POLL: Duration = Duration::from_millis(10);

/// A guest that checks its memory, as much of it as goes at a pace: string instructions are emulated
/// by a KVM that is itself a guest's.
fn checker(accel: Accel) -> Checker {
    Checker {
        start: 4 << 20,
        pages: match accel {
            Accel::Tcg => 2048,
            Accel::Kvm => 128,
        },
    }
}

/// How a guest crosses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Plain,
    Xbzrle,
    Multifd(Compression),
    File { channels: bool },
}

use Transport::{File, Multifd, Plain, Xbzrle};

const UNCOMPRESSED: Transport = Multifd(Compression::None);

fn zlib() -> Transport {
    Multifd(Compression::Zlib(ZlibLevel::default()))
}

fn zstd() -> Transport {
    Multifd(Compression::Zstd(ZstdLevel::default()))
}

fn main() -> ExitCode {
    // Each way in, and by which way on.
    let ways = [
        ("plain", (7, 2), Plain, zstd()),
        ("xbzrle", (7, 2), Xbzrle, zlib()),
        ("multifd", (7, 2), UNCOMPRESSED, Plain),
        ("multifd_zlib", (7, 2), zlib(), UNCOMPRESSED),
        ("multifd_zstd", (7, 2), zstd(), zlib()),
        (
            "mapped_ram",
            (9, 0),
            File { channels: false },
            File { channels: true },
        ),
        (
            "mapped_ram_by_channels",
            (9, 0),
            File { channels: true },
            File { channels: false },
        ),
    ];
    let mut trials = Vec::new();
    for machine in ["pc", "q35", "microvm"] {
        for (name, since, from, on) in ways {
            let needs = Needs::NOTHING.live_guests().qemu(since);
            let test = needs.test_qemu(
                &format!("running_{machine}_by_{name}"),
                move |qemu: &Binary| relay(qemu, machine, from, on),
            );
            trials.push(test.sampled(&[machine, name]));
        }
    }
    trials.push(Needs::NOTHING.qemu((11, 1)).test_qemu(
        "guest_that_checks_its_memory_finds_no_error_after_ten_relays",
        ten_relays,
    ));
    trials.push(
        Needs::NOTHING
            .live_guests()
            .qemu((7, 2))
            .test_qemu("guest_is_passed_on_while_it_runs_at_its_source", passed_on),
    );
    trials.push(Needs::NOTHING.live_guests().qemu((7, 2)).test_qemu(
        "guest_that_no_destination_takes_runs_on_at_its_source",
        refused,
    ));
    trials.push(
        Needs::NOTHING
            .linux()
            .qemu((10, 0))
            .test_with("linux_goes_on_with_all_its_devices", |given| {
                linux_goes_on(given.qemu(), given.linux())
            }),
    );
    trials.push(Needs::NOTHING.qemu_before((10, 0), (11, 0)).test_qemu(
        "checkpoints_of_an_older_qemu_are_refused_and_its_guest_runs_on",
        old_checkpoints,
    ));
    harness::run(trials)
}

/// Takes a running guest from one QEMU, compares, and gives it to another.
fn relay(qemu: &Binary, machine: &str, from: Transport, on: Transport) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    DIRTIER.write_disk(&disk)?;
    let start = |memory: &Path| {
        let machine = Machine::new(machine, MEMORY)
            .accel(qemu.live_accel())
            .boot(&disk)
            .memory_in(memory)
            .args(["-serial", "stdio"]);
        match qemu.live_accel() {
            Accel::Tcg => machine,
            // KVM writes the guest's clock into its memory as soon as it has a vCPU.
            Accel::Kvm => machine.args(["-cpu", "qemu64,-kvmclock"]),
        }
    };
    let memory = dir.path().join("from");
    let mut source = start(&memory).running().start(qemu)?;
    wait_for_output(&source, 1)?;
    let received = receive(qemu, &mut source, from, dir.path())?;

    compare(&mut source, &received.guest, &memory)?;
    let guest = received.guest.clone();
    if received.is_awaited() {
        received.confirm()?;
    }
    let info = source.wait_migration("completed")?;
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    assert_eq!(count(&info["xbzrle-cache"]["pages"]) > 0, from == Xbzrle);
    let has_channels = matches!(from, Multifd(_) | File { channels: true });
    assert_eq!(count(&info["ram"]["multifd-bytes"]) > 0, has_channels);
    source.process.kill()?;
    let before = source.process.stdout().whole()?;

    let memory = dir.path().join("to");
    let mut destination = start(&memory).incoming().start(qemu)?;
    configure(&mut destination, on)?;
    let give = |to: &str| -> Result<()> {
        let config = outgoing_config(qemu, to, on)?;
        outgoing::send(&guest, &config, &Progress::default())?;
        Ok(())
    };
    if let File { .. } = on {
        let uri = format!("file:{}", dir.path().join("on").display());
        give(&uri)?;
        destination.listen(&uri)?;
    } else {
        give(&destination.listen("tcp:127.0.0.1:0")?)?;
    }
    destination.wait_migration("completed")?;
    compare(&mut destination, &guest, &memory)?;
    destination.qmp.execute("cont", json!({}))?;
    wait_for_output(&destination, 3)?;
    destination.process.kill()?;
    let after = destination.process.stdout().whole()?;
    let rounds = [before, after].concat();
    match rounds.windows(2).position(|r| r[0].wrapping_add(1) != r[1]) {
        None => Ok(()),
        Some(at) => Err(format!("round {at} is not followed by the next: {rounds:?}").into()),
    }
}

fn wait_for_output(vm: &Qemu, bytes: usize) -> Result<()> {
    let stdout = vm.process.stdout();
    stdout.wait_for("the guest", |b| (b.len() >= bytes).then_some(()))
}

/// Takes the guest of `source`, which writes memory until it is stopped.
fn receive(qemu: &Binary, source: &mut Qemu, by: Transport, dir: &Path) -> Result<Received> {
    configure(source, by)?;
    if let File { .. } = by {
        let uri = format!("file:{}", dir.join("stream").display());
        source.migrate(&uri)?;
        source.wait_migration("completed")?;
        let incoming = Incoming::open(incoming_config(qemu, &uri, by)?)?;
        return Ok(incoming.receive(&Arc::default())?);
    }
    let incoming = Incoming::open(incoming_config(qemu, "tcp:127.0.0.1:0", by)?)?;
    let uri = incoming.address().ok_or("no address")?.to_string();
    source.qmp.enable(&["events"])?;
    // Not before the guest has dirtied again what was sent, and for differences what was sent again:
    // more than a page must be left for another pass.
    let bandwidth = if by == Xbzrle { 4 << 20 } else { 32 << 20 };
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": bandwidth, "downtime-limit": 1}))?;
    source.migrate(&uri)?;
    thread::scope(|scope| {
        let receiving = scope.spawn(|| incoming.receive(&Arc::default()));
        source
            .qmp
            .wait_event_if("MIGRATION_PASS", |d| d["pass"] == 2)?;
        if by == Xbzrle {
            source.wait_differences()?;
        }
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        let received = receiving.join().map_err(|_| "the relay panicked")?;
        Ok(received?)
    })
}

/// The memory of `vm`, which stands still and whose main block is the file `memory`, with the guest's.
fn compare(vm: &mut Qemu, guest: &Guest, memory: &Path) -> Result<()> {
    let held = |name: &str| -> Result<Vec<u8>> {
        let id = guest.memory.blocks().find(name.as_bytes());
        let id = id.ok_or_else(|| format!("no block {name}"))?;
        let block = guest.memory.blocks().get(id).ok_or("no block")?;
        let mut bytes = vec![0; usize::try_from(block.used_length())?];
        guest.memory.slice(id, 0, bytes.len())?.copy_to(&mut bytes);
        Ok(bytes)
    };
    guest::compare("RAM and its file", &fs::read(memory)?, &held(RAM)?)?;
    let firmware = held("pc.bios")?;
    let expected = vm.pmemsave((1 << 32) - firmware.len() as u64, firmware.len() as u64)?;
    guest::compare("firmware and pmemsave", &expected, &firmware)?;
    let blocks = vm.ram_blocks()?;
    assert_eq!(blocks.len(), guest.memory.blocks().len());
    for (name, bytes) in vm.ram_contents()?.unwrap_or_default() {
        guest::compare(&name, &bytes, &held(&name)?)?;
    }
    Ok(())
}

fn configure(vm: &mut Qemu, by: Transport) -> Result<()> {
    let channels = |compression| {
        let method = match compression {
            Compression::Zlib(_) => "zlib",
            Compression::Zstd(_) => "zstd",
            _ => "none",
        };
        json!({"multifd-channels": 2, "multifd-compression": method})
    };
    // What the other side of it was told.
    vm.qmp.set_capabilities(&["multifd", "xbzrle"], false)?;
    match by {
        Plain => vm.qmp.enable(&["return-path"]),
        Xbzrle => vm.qmp.enable(&["return-path", "xbzrle"]),
        Multifd(compression) => {
            vm.qmp.enable(&["return-path", "multifd"])?;
            vm.qmp.set_parameters(channels(compression))
        }
        File { channels: false } => vm.qmp.enable(&["mapped-ram"]),
        File { channels: true } => {
            vm.qmp.enable(&["mapped-ram", "multifd"])?;
            vm.qmp.set_parameters(channels(Compression::None))
        }
    }
}

fn channels(by: Transport) -> Option<Channels> {
    match by {
        Multifd(compression) => Some(Channels {
            count: ChannelCount::default(),
            compression,
        }),
        Plain | Xbzrle | File { .. } => None,
    }
}

/// Several threads where QEMU has channels.
fn access(by: Transport) -> Option<Access> {
    match by {
        File { channels } => Some(Access {
            threads: NonZeroU8::new(if channels { 4 } else { 1 })?,
            direct: false,
        }),
        Plain | Xbzrle | Multifd(_) => None,
    }
}

fn machine_version(qemu: &Binary) -> Option<MachineVersion> {
    let (major, minor, _) = qemu.version();
    Some(MachineVersion::new(major, minor))
}

fn incoming_config(qemu: &Binary, from: &str, by: Transport) -> Result<IncomingConfig> {
    Ok(IncomingConfig {
        from: from.parse()?,
        channels: channels(by),
        access: access(by).unwrap_or_default(),
        xbzrle: by == Xbzrle,
        machine_version: machine_version(qemu),
        uuid: [0; 16],
        max_memory: 1 << 30,
        max_device_state: 64 << 20,
        without_return_path: false,
        timeout: PATIENCE,
        pause_timeout: PATIENCE,
    })
}

fn outgoing_config(qemu: &Binary, to: &str, by: Transport) -> Result<OutgoingConfig> {
    Ok(OutgoingConfig {
        to: to.parse()?,
        channels: channels(by),
        mapped_ram: access(by),
        zero_pages: ZeroPageDetection::Legacy,
        max_bandwidth: 0,
        machine_version: machine_version(qemu),
        uuid: [0; 16],
        timeout: PATIENCE,
    })
}

/// A chain of eleven QEMU with a relay between each two, through which a guest wanders while it
/// checks its memory.
fn ten_relays(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    checker(Accel::Tcg).write_disk(&disk)?;
    let machine = Machine::new("q35", MEMORY)
        .boot(&disk)
        .running()
        .args(["-serial", "stdio"]);
    let ways = [Plain, zstd(), Xbzrle, UNCOMPRESSED, zlib()];
    let mut output = Vec::new();
    let mut source = machine.start(qemu)?;
    for number in 0..10 {
        // A pass that only checks and one that writes what was checked.
        wait_for_output(&source, 2)?;
        let (from, on) = (ways[number % 5], ways[(number * 2 + 1) % 5]);
        let on = if on == Xbzrle { Plain } else { on };
        let mut destination = machine.clone().incoming().start(qemu)?;
        configure(&mut source, from)?;
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        configure(&mut destination, on)?;
        let to = destination.listen("tcp:127.0.0.1:0")?;
        let incoming = Incoming::open(incoming_config(qemu, "tcp:127.0.0.1:0", from)?)?;
        let uri = incoming.address().ok_or("no address")?.to_string();
        let relay = Relay {
            from: Origin::Source(Box::new(incoming)),
            store: (number % 3 == 2).then(|| dir.path().join("kept")),
            to: Some(outgoing_config(qemu, &to, on)?),
            remove_store: true,
        };
        source.migrate(&uri)?;
        let report = relay.run(&Arc::default())?;
        assert!(report.received.is_some() && report.sent.is_some());
        source.wait_migration("completed")?;
        destination.wait_migration("completed")?;
        source.process.kill()?;
        output.extend(source.process.stdout().whole()?);
        source = destination;
    }
    wait_for_output(&source, 2)?;
    source.process.kill()?;
    output.extend(source.process.stdout().whole()?);
    assert!(Checker::passes(&output)? >= 22);
    Ok(())
}

/// What the source sends is at the destination while the guest still runs and writes.
fn passed_on(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    checker(qemu.live_accel()).write_disk(&disk)?;
    let machine = Machine::new("pc", MEMORY)
        .accel(qemu.live_accel())
        .boot(&disk)
        .running()
        .args(["-serial", "stdio"]);
    let mut source = machine.start(qemu)?;
    wait_for_output(&source, 2)?;
    let mut destination = machine.clone().incoming().start(qemu)?;
    let (from, on) = (zlib(), UNCOMPRESSED);
    configure(&mut source, from)?;
    configure(&mut destination, on)?;
    source.qmp.enable(&["events"])?;
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 16 << 20, "downtime-limit": 1}))?;
    let to = destination.listen("tcp:127.0.0.1:0")?;
    let incoming = Incoming::open(incoming_config(qemu, "tcp:127.0.0.1:0", from)?)?;
    let uri = incoming.address().ok_or("no address")?.to_string();
    let relay = Relay {
        from: Origin::Source(Box::new(incoming)),
        store: None,
        to: Some(outgoing_config(qemu, &to, on)?),
        remove_store: false,
    };
    source.migrate(&uri)?;
    let progress = Arc::<Progress>::default();
    let report = thread::scope(|scope| {
        let relaying = scope.spawn(|| relay.run(&progress));
        source
            .qmp
            .wait_event_if("MIGRATION_PASS", |d| d["pass"] == 2)?;
        destination.wait_migration("active")?;
        // More than a description of the guest.
        let deadline = Instant::now() + PATIENCE;
        while progress.outgoing.pages() == 0 {
            assert!(Instant::now() < deadline, "nothing is passed on");
            thread::sleep(POLL);
        }
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        let report = relaying.join().map_err(|_| "the relay panicked")??;
        Ok::<_, tests::Error>(report)
    })?;
    source.wait_migration("completed")?;
    destination.wait_migration("completed")?;
    let received = report.received.ok_or("no figures")?;
    // Some pages came more than once.
    assert!(received.pages + received.zero_pages > (u64::from(MEMORY) << 20) / 4096);
    source.process.kill()?;
    wait_for_output(&destination, 2)?;
    destination.process.kill()?;
    let output = [
        source.process.stdout().whole()?,
        destination.process.stdout().whole()?,
    ];
    assert!(Checker::passes(&output.concat())? >= 4);
    Ok(())
}

/// There is no destination: the relay gives the guest back.
fn refused(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    checker(qemu.live_accel()).write_disk(&disk)?;
    let mut source = Machine::new("q35", MEMORY)
        .accel(qemu.live_accel())
        .boot(&disk)
        .running()
        .args(["-serial", "stdio"])
        .start(qemu)?;
    wait_for_output(&source, 2)?;
    configure(&mut source, Plain)?;
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    let incoming = Incoming::open(incoming_config(qemu, "tcp:127.0.0.1:0", Plain)?)?;
    let uri = incoming.address().ok_or("no address")?.to_string();
    let nobody = format!("unix:{}", dir.path().join("nobody").display());
    let relay = Relay {
        from: Origin::Source(Box::new(incoming)),
        store: None,
        to: Some(outgoing_config(qemu, &nobody, Plain)?),
        remove_store: false,
    };
    source.migrate(&uri)?;
    let error = relay.run(&Arc::default()).err().ok_or("nobody took it")?;
    assert!(error.to_string().contains("still at its source"), "{error}");
    source.wait_status("running")?;
    let passes = source.process.stdout().bytes().len();
    wait_for_output(&source, passes + 2)?;
    Checker::passes(&source.process.stdout().bytes())?;
    Ok(())
}

/// COLO as it was before QEMU 11: command 8 stands at the beginning of the stream.
fn old_checkpoints(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    checker(Accel::Tcg).write_disk(&disk)?;
    let mut source = Machine::new("q35", MEMORY)
        .boot(&disk)
        .running()
        .args(["-serial", "stdio"])
        .start(qemu)?;
    wait_for_output(&source, 2)?;
    source.qmp.enable(&["return-path", "x-colo"])?;
    let incoming = Incoming::open(incoming_config(qemu, "tcp:127.0.0.1:0", Plain)?)?;
    let uri = incoming.address().ok_or("no address")?.to_string();
    source.migrate(&uri)?;
    let error = incoming.receive(&Arc::default()).err().ok_or("taken")?;
    let text = chain(&error);
    let reason = "deprecated command 0x8 (length 0x0); before QEMU 11.0: ENABLE_COLO";
    assert!(text.ends_with(reason), "{text}");
    let failed = source.wait_migration("failed")?;
    assert_eq!(failed["status"], "failed");
    source.wait_status("running")?;
    let passes = source.process.stdout().bytes().len();
    wait_for_output(&source, passes + 2)?;
    Checker::passes(&source.process.stdout().bytes())?;
    Ok(())
}

/// Linux, which uses disks, networks and a port all the time, comes out as it went in.
fn linux_goes_on(qemu: &Binary, guest: &Linux) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let ports = [dir.path().join("port0"), dir.path().join("port1")];
    let mut source = guest
        .machine(dir.path(), &ports[0])?
        .running()
        .start(qemu)?;
    linux::wait_for_beats(&[], &source, 3)?;
    let mut destination = guest
        .machine(dir.path(), &ports[1])?
        .running()
        .incoming()
        .start(qemu)?;
    let (from, on) = (UNCOMPRESSED, zstd());
    configure(&mut source, from)?;
    source
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    configure(&mut destination, on)?;
    let to = destination.listen("tcp:127.0.0.1:0")?;
    let incoming = Incoming::open(incoming_config(qemu, "tcp:127.0.0.1:0", from)?)?;
    let uri = incoming.address().ok_or("no address")?.to_string();
    let relay = Relay {
        from: Origin::Source(Box::new(incoming)),
        store: None,
        to: Some(outgoing_config(qemu, &to, on)?),
        remove_store: false,
    };
    source.migrate(&uri)?;
    relay.run(&Arc::default())?;
    source.wait_migration("completed")?;
    destination.wait_migration("completed")?;
    source.process.kill()?;
    let before = source.process.stdout().whole()?;
    let beats = linux::beats(&before)?;
    linux::wait_for_beats(&before, &destination, beats + 3)?;
    assert!(linux::port_beats(&ports)? >= beats + 3);
    Ok(())
}
