//! Guests of real QEMU whose memory is huge pages (hugetlbfs). With `postcopy-ram` on, such a source
//! says the page size of each RAM block. They go through `stream-relay` into QEMUs with and without huge
//! pages, and `stream-inspect` reads them.

use std::fs::File;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use migration_stream::MachineVersion;
use migration_stream::ram::ZeroPageDetection;
use migration_stream::raw::command::CommandNumber;
use serde_json::{Value, json};
use stream_inspect::incoming::{ListenConfig, Listening};
use stream_inspect::inspection::Inspection;
use stream_inspect::scan::{FileOrigin, scan};
use stream_relay::Access;
use stream_relay::cli::chain;
use stream_relay::incoming::{Incoming, IncomingConfig};
use stream_relay::outgoing::OutgoingConfig;
use stream_relay::relay::{Origin, Relay};
use tests::guest::Dirtier;
use tests::harness::{self, Needs};
use tests::huge_pages::HugePages;
use tests::qemu::{Binary, Machine, Qemu};
use tests::{PATIENCE, Result, contents};

/// Guest memory, MiB.
const MEMORY: u32 = 64;
/// What the RAM block of huge pages is called.
const RAM: &str = "ram0";
const DIRTIER: Dirtier = Dirtier {
    start: 4 << 20,
    pages: 4096,
};
/// For the memory of two guests at a time, 2 MiB each.
const HUGE_PAGES: u64 = 2 * MEMORY as u64 / 2;

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (name, postcopy) in [
        ("guest_in_huge_pages_is_inspected_and_relayed", false),
        (
            "guest_in_huge_pages_that_could_begin_postcopy_is_inspected_and_relayed",
            true,
        ),
    ] {
        let needs = Needs::NOTHING.qemu((10, 0)).huge_pages(HUGE_PAGES);
        trials.push(needs.test_with(name, move |given| {
            crosses(given.qemu(), given.into_huge_pages(), postcopy)
        }));
    }
    harness::run(trials)
}

/// A machine whose main RAM block is `memfd` memory, of huge pages or not.
fn machine(is_huge: bool) -> Machine {
    let pages = if is_huge {
        ",hugetlb=on,hugetlbsize=2M"
    } else {
        ""
    };
    let memory = format!("memory-backend-memfd,id={RAM},size={MEMORY}M{pages}");
    Machine::new(format!("q35,memory-backend={RAM}"), MEMORY).args(["-object".to_owned(), memory])
}

fn crosses(qemu: &Binary, pages: HugePages, postcopy: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    DIRTIER.write_disk(&disk)?;
    let capabilities = ["return-path", "postcopy-ram"];
    let capabilities = capabilities.get(..1 + usize::from(postcopy));
    for is_huge in [true, false] {
        let mut source = machine(true)
            .boot(&disk)
            .running()
            .args(["-serial", "stdio"])
            .start(qemu)?;
        let stdout = source.process.stdout();
        stdout.wait_for("the guest", |b| (!b.is_empty()).then_some(()))?;
        source.qmp.enable(capabilities.unwrap_or_default())?;
        // It ends although the guest writes.
        let parameters = json!({"max-bandwidth": 0, "downtime-limit": 2000});
        source.qmp.set_parameters(parameters)?;

        let found = listened_to(&mut source)?;
        let block = found.blocks.iter().find(|b| b.block.name() == RAM);
        let block = block.ok_or("no block of huge pages")?;
        assert_eq!(block.block.used_length(), u64::from(MEMORY) << 20);
        assert_eq!(block.unique, block.block.pages());
        let is_advised = (found.commands.iter()).any(|c| c.number == CommandNumber::PostcopyAdvise);
        assert_eq!(is_advised, postcopy);
        assert!(found.devices().count() > 2);

        let mut next = machine(is_huge)
            .boot(&disk)
            .args(["-serial", "stdio"])
            .incoming()
            .start(qemu)?;
        relay(qemu, &mut source, &mut next)?;
        // Neither guest runs now.
        let expected = source.ram_contents()?.ok_or("no memory is told")?;
        let arrived = next.ram_contents()?.ok_or("no memory is told")?;
        contents::compare("behind the relay", &expected, &arrived)?;
        DIRTIER.check(&expected[RAM])?;

        let path = dir.path().join(format!("stream-{is_huge}"));
        next.qmp.execute("cont", Value::Null)?;
        let stdout = next.process.stdout();
        stdout.wait_for("the guest that went on", |b| (b.len() > 1).then_some(()))?;
        next.qmp.execute("stop", Value::Null)?;
        next.migrate(&format!("file:{}", path.display()))?;
        next.wait_migration("completed")?;
        let (mut origin, reader) = FileOrigin::open(Arc::new(File::open(&path)?), 0);
        let found = scan(reader, &mut origin, 64 << 20, None, &mut |_| ())?;
        assert!(found.blocks.iter().all(|b| b.unique == b.block.pages()));
    }
    Ok(pages.give_back()?)
}

/// What `stream-inspect --listen` finds in the stream of `source`, whose guest runs on.
fn listened_to(source: &mut Qemu) -> Result<Inspection> {
    let listening = Listening::open(ListenConfig {
        at: "tcp:127.0.0.1:0".parse()?,
        multifd: None,
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
    Ok(found)
}

fn relay(qemu: &Binary, source: &mut Qemu, next: &mut Qemu) -> Result<()> {
    let to = next.listen("tcp:127.0.0.1:0")?;
    let (major, minor, _) = qemu.version();
    let incoming = Incoming::open(IncomingConfig {
        from: "tcp:127.0.0.1:0".parse()?,
        channels: None,
        access: Access::default(),
        xbzrle: false,
        machine_version: Some(MachineVersion::new(major, minor)),
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
        store: None,
        to: Some(OutgoingConfig {
            to: to.parse()?,
            channels: None,
            mapped_ram: None,
            zero_pages: ZeroPageDetection::Legacy,
            max_bandwidth: 0,
            machine_version: None,
            uuid: [0; 16],
            timeout: PATIENCE,
        }),
        remove_store: false,
    };
    let relaying = thread::spawn(move || relay.run(&Arc::default()));
    source.migrate(&uri)?;
    let report = relaying.join().map_err(|_| "the relay panicked")?;
    report.map_err(|e| chain(&e))?;
    source.wait_migration("completed")?;
    next.wait_migration("completed")?;
    Ok(())
}
