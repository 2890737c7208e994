//! Guests of real QEMU that are not like most: with devices whose state goes before memory, with
//! postcopy switched on, and with an operator who lets them stand still before the switch-over. Each
//! goes through `stream-relay` from one QEMU into another.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use migration_stream::MachineVersion;
use migration_stream::ram::ZeroPageDetection;
use multifd::{ChannelCount, Compression};
use serde_json::{Value, json};
use stream_inspect::scan::{FileOrigin, scan};
use stream_relay::cli::chain;
use stream_relay::incoming::{Incoming, IncomingConfig};
use stream_relay::outgoing::OutgoingConfig;
use stream_relay::progress::Progress;
use stream_relay::relay::{Origin, Relay, Report};
use stream_relay::{Access, Channels};
use tests::harness::{self, Needs};
use tests::qemu::{Binary, Machine, Qemu};
use tests::{PATIENCE, Result};

/// Guest memory besides that which is hot-plugged, MiB.
const MEMORY: u32 = 16;

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING
            .qemu((10, 0))
            .test_qemu("guest_with_virtio_mem_is_relayed_and_kept", virtio_mem),
        Needs::NOTHING.qemu((7, 2)).test_qemu(
            "source_that_could_begin_postcopy_is_a_precopy_source",
            postcopy_advised,
        ),
        Needs::NOTHING.qemu((11, 0)).test_qemu(
            "postcopy_that_begins_is_refused_with_what_to_switch_off",
            postcopy_begun,
        ),
        Needs::NOTHING.qemu((10, 0)).test_qemu(
            "pause_before_the_switchover_may_be_longer_than_the_timeout",
            paused,
        ),
    ])
}

fn machine() -> Machine {
    Machine::new("q35", MEMORY)
}

/// Two devices that plug and unplug memory, whose first parts QEMU sends before memory.
fn with_virtio_mem() -> Machine {
    let size = format!("{MEMORY}M,maxmem=512M,slots=2");
    machine().args(["-m", &size]).args([
        "-object",
        "memory-backend-ram,id=m0,size=64M",
        "-device",
        "virtio-mem-pci,id=vm0,memdev=m0,requested-size=16M",
        "-object",
        "memory-backend-ram,id=m1,size=64M",
        "-device",
        "virtio-mem-pci,id=vm1,memdev=m1",
    ])
}

fn channels(wanted: bool) -> Option<Channels> {
    wanted.then(|| Channels {
        count: ChannelCount::default(),
        compression: Compression::None,
    })
}

fn incoming(qemu: &Binary, from: &str, multifd: bool, timeout: Duration) -> Result<Incoming> {
    let (major, minor, _) = qemu.version();
    Ok(Incoming::open(IncomingConfig {
        from: from.parse()?,
        channels: channels(multifd),
        access: Access::default(),
        xbzrle: false,
        machine_version: Some(MachineVersion::new(major, minor)),
        uuid: [0; 16],
        max_memory: 1 << 30,
        max_device_state: 64 << 20,
        without_return_path: false,
        timeout,
        pause_timeout: PATIENCE,
    })?)
}

fn outgoing(to: &str) -> Result<OutgoingConfig> {
    Ok(OutgoingConfig {
        to: to.parse()?,
        channels: None,
        mapped_ram: None,
        zero_pages: ZeroPageDetection::Legacy,
        max_bandwidth: 0,
        machine_version: None,
        uuid: [0; 16],
        timeout: PATIENCE,
    })
}

/// Relays the guest of `source`, or of the file, to where a QEMU waits; `meanwhile` drives the source.
fn relay(
    incoming: Incoming,
    to: &str,
    meanwhile: impl FnOnce(&str) -> Result<()>,
) -> Result<Report> {
    let uri = incoming.address().map(ToString::to_string);
    let relay = Relay {
        from: Origin::Source(Box::new(incoming)),
        store: None,
        to: Some(outgoing(to)?),
        remove_store: false,
    };
    let progress = Arc::<Progress>::default();
    thread::scope(|scope| {
        let relaying = scope.spawn(|| relay.run(&progress));
        let driven = meanwhile(uri.as_deref().unwrap_or_default());
        let report = relaying.join().map_err(|_| "the relay panicked")?;
        driven?;
        report.map_err(|e| chain(&e).into())
    })
}

fn memory_devices(vm: &mut Qemu) -> Result<Value> {
    vm.qmp.execute("query-memory-devices", Value::Null)
}

fn virtio_mem(qemu: &Binary) -> Result<()> {
    let mut source = with_virtio_mem().start(qemu)?;
    let expected = memory_devices(&mut source)?;
    assert_eq!(expected.as_array().map(Vec::len), Some(2));
    let mut next = with_virtio_mem().incoming().start(qemu)?;
    let to = next.listen("tcp:127.0.0.1:0")?;
    source.qmp.enable(&["return-path"])?;
    let from = incoming(qemu, "tcp:127.0.0.1:0", false, PATIENCE)?;
    relay(from, &to, |uri| source.migrate(uri))?;
    source.wait_migration("completed")?;
    next.wait_migration("completed")?;
    assert_eq!(memory_devices(&mut next)?, expected);

    // On from there into a file, through a store into another, and on into a QEMU.
    let file = source.dir().join("first");
    let file_uri = format!("file:{}", file.display());
    next.qmp.execute("cont", json!({}))?;
    next.qmp.execute("stop", json!({}))?;
    next.migrate(&file_uri)?;
    next.wait_migration("completed")?;
    let store = source.dir().join("store");
    let second = source.dir().join("second");
    let relay = |from, to: Option<&str>| -> Result<()> {
        let relay = Relay {
            from,
            store: Some(store.clone()),
            to: to.map(outgoing).transpose()?,
            remove_store: to.is_some(),
        };
        relay.run(&Arc::default()).map_err(|e| chain(&e))?;
        Ok(())
    };
    let from = incoming(qemu, &file_uri, false, PATIENCE)?;
    relay(Origin::Source(Box::new(from)), None)?;
    let second_uri = format!("file:{}", second.display());
    let from = Origin::Store {
        max_memory: 1 << 30,
        max_device_state: 64 << 20,
    };
    relay(from, Some(&second_uri))?;
    let names = |path: &Path| -> Result<Vec<String>> {
        let (mut origin, reader) = FileOrigin::open(Arc::new(File::open(path)?), 0);
        let found = scan(reader, &mut origin, 64 << 20, None, &mut |_| ())?;
        let names = found.devices().map(|d| d.header.idstr.as_str().to_owned());
        Ok(names.collect())
    };
    let found = names(&second)?;
    assert_eq!(found, names(&file)?);
    let early = |name: &&String| name.ends_with("virtio-mem-device-early");
    assert_eq!(found.iter().take_while(early).count(), 2, "{found:?}");
    let mut last = with_virtio_mem().incoming().start(qemu)?;
    last.listen(&second_uri)?;
    last.wait_migration("completed")?;
    assert_eq!(memory_devices(&mut last)?, expected);
    Ok(())
}

fn postcopy_advised(qemu: &Binary) -> Result<()> {
    // The destination may have the capability or not: it is told nothing of postcopy.
    for theirs in [&["return-path"][..], &["return-path", "postcopy-ram"]] {
        let mut source = machine().start(qemu)?;
        source.qmp.enable(&["return-path", "postcopy-ram"])?;
        let mut next = machine().incoming().start(qemu)?;
        next.qmp.enable(theirs)?;
        let to = next.listen("tcp:127.0.0.1:0")?;
        let from = incoming(qemu, "tcp:127.0.0.1:0", false, PATIENCE)?;
        relay(from, &to, |uri| source.migrate(uri))?;
        source.wait_migration("completed")?;
        next.wait_migration("completed")?;
    }
    Ok(())
}

fn postcopy_begun(qemu: &Binary) -> Result<()> {
    let mut source = machine().start(qemu)?;
    source.qmp.enable(&["return-path", "postcopy-ram"])?;
    // It must not be over before postcopy begins.
    source.qmp.set_parameters(json!({"max-bandwidth": 4096}))?;
    let mut next = machine().incoming().start(qemu)?;
    let to = next.listen("tcp:127.0.0.1:0")?;
    let from = incoming(qemu, "tcp:127.0.0.1:0", false, PATIENCE)?;
    let error = relay(from, &to, |uri| {
        source.migrate(uri)?;
        source.wait_migration("active")?;
        source.qmp.execute("migrate-start-postcopy", Value::Null)?;
        Ok(())
    });
    let error = error.err().ok_or("postcopy was taken")?.to_string();
    let said = [
        "the source goes over to postcopy",
        "postcopy-ram",
        "migrate-start-postcopy",
    ];
    assert!(said.iter().all(|text| error.contains(text)), "{error}");
    Ok(())
}

fn paused(qemu: &Binary) -> Result<()> {
    const TIMEOUT: Duration = Duration::from_millis(700);
    for multifd in [false, true] {
        let mut source = machine().start(qemu)?;
        let capabilities = ["return-path", "pause-before-switchover", "multifd"];
        let capabilities = capabilities.get(..2 + usize::from(multifd));
        source.qmp.enable(capabilities.unwrap_or_default())?;
        let mut next = machine().incoming().start(qemu)?;
        let to = next.listen("tcp:127.0.0.1:0")?;
        let from = incoming(qemu, "tcp:127.0.0.1:0", multifd, TIMEOUT)?;
        relay(from, &to, |uri| {
            source.migrate(uri)?;
            source.wait_migration("pre-switchover")?;
            thread::sleep(2 * TIMEOUT);
            let state = json!({"state": "pre-switchover"});
            source.qmp.execute("migrate-continue", state)?;
            Ok(())
        })?;
        source.wait_migration("completed")?;
        next.wait_migration("completed")?;
    }
    Ok(())
}
