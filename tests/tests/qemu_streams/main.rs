//! Streams captured from real QEMU, decoded whole and encoded again byte for byte; and the helpers
//! they rest on.

mod whole;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::Command;
use migration_stream::raw::decoder::{Item, RamItem};
use migration_stream::raw::return_path::ReturnPathMessage;
use serde_json::{Value, json};
use tests::Result;
use tests::capture::{self, Tap};
use tests::guest::{self, Content, Dirtier};
use tests::harness::{self, Needs};
use tests::qemu::{Binary, Machine};

use crate::whole::Whole;

/// Guest memory, MiB.
const MEMORY: u32 = 16;
const MACHINES: [&str; 3] = ["q35", "pc", "microvm"];

fn main() -> ExitCode {
    harness::run([
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("prepared_ram_is_what_pmemsave_shows", prepared_ram),
        Needs::NOTHING
            .qemu((7, 2))
            .test_qemu("the_boot_sector_dirties_its_pages", boot_sector),
        Needs::NOTHING.qemu((11, 1)).test_qemu(
            "a_stream_to_a_file_is_decoded_whole_and_encoded_byte_for_byte",
            stream_to_file,
        ),
        Needs::NOTHING.qemu((11, 1)).test_qemu(
            "a_running_guest_with_return_path_is_decoded_whole_and_encoded_byte_for_byte",
            running_guest,
        ),
        Needs::NOTHING.qemu((11, 1)).test_qemu(
            "the_main_stream_beside_multifd_is_decoded_whole_and_encoded_byte_for_byte",
            beside_multifd,
        ),
    ])
}

fn prepared_ram(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (file, content) = prepare(dir.path())?;
    for machine in MACHINES {
        let mut vm = Machine::new(machine, MEMORY)
            .memory_from(&file)
            .start(qemu)?;
        for range in guest::plain_ram(MEMORY) {
            let seen = vm.pmemsave(range.start, range.end - range.start)?;
            let slice = usize::try_from(range.start)?..usize::try_from(range.end)?;
            guest::compare(machine, &content[slice], &seen)?;
        }
    }
    Ok(())
}

fn boot_sector(qemu: &Binary) -> Result<()> {
    const PAGES: u32 = 64;
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let guest = Dirtier {
        start: 4 << 20,
        pages: PAGES,
    };
    guest.write_disk(&disk)?;
    for machine in MACHINES {
        let mut vm = Machine::new(machine, MEMORY)
            .boot(&disk)
            .running()
            .args(["-serial", "stdio"])
            .start(qemu)?;
        vm.process
            .stdout()
            .wait_for("second round", |b| b.starts_with(&[1, 2]).then_some(()))?;
        vm.qmp.execute("stop", Value::Null)?;
        let pages = vm.pmemsave(u64::from(guest.start), u64::from(PAGES + 1) << 12)?;
        let mut counts: Vec<u8> = pages.chunks(guest::PAGE_SIZE).map(|p| p[0]).collect();
        assert_eq!(
            counts.pop(),
            Some(0),
            "{machine}: the page behind the region"
        );
        // It was stopped somewhere in a round: pages before that place are one ahead.
        let last = counts[counts.len() - 1];
        let ahead = counts.iter().take_while(|c| **c != last).count();
        assert!(
            counts[..ahead].iter().all(|c| *c == last.wrapping_add(1))
                && counts[ahead..].iter().all(|c| *c == last),
            "{machine}: {counts:?}"
        );
    }
    Ok(())
}

fn stream_to_file(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (file, content) = prepare(dir.path())?;
    for machine in MACHINES {
        let mut vm = Machine::new(machine, MEMORY)
            .memory_from(&file)
            .start(qemu)?;
        let bytes = capture::to_file(&mut vm)?;
        let stream = check_round_trip(&bytes)?;
        assert_eq!(stream.memory(RAM)?, content, "{machine}");
        assert!(stream.configuration().is_some_and(|c| {
            let name = c.machine.as_str();
            name.starts_with("pc-") || name == "microvm"
        }));
        // A stopped guest dirties nothing: each page goes once.
        assert!(stream.sendings().values().all(|n| *n == 1), "{machine}");
        let is_command = |item: &&Item| matches!(item, Item::Command(_));
        let commands: Vec<_> = stream.items().filter(is_command).collect();
        assert_eq!(commands, [&Item::Command(Command::SwitchoverStart)]);
    }
    Ok(())
}

fn running_guest(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let disk = dir.path().join("disk");
    let guest = Dirtier {
        start: 4 << 20,
        pages: 512,
    };
    guest.write_disk(&disk)?;
    for machine in MACHINES {
        let memory = dir.path().join(format!("ram-{machine}"));
        let machine = Machine::new(machine, MEMORY)
            .boot(&disk)
            .memory_in(&memory)
            .args(["-serial", "stdio"]);
        let mut source = machine.clone().running().start(qemu)?;
        source
            .process
            .stdout()
            .wait_for("first round", |b| (!b.is_empty()).then_some(()))?;

        // The destination's RAM must not be the same file.
        let landed = dir.path().join("landed");
        let mut destination = machine.clone().memory_in(&landed).incoming().start(qemu)?;
        destination.qmp.enable(&["return-path", "events"])?;
        source.qmp.enable(&["return-path", "events"])?;
        // Slow enough for the guest to dirty what was sent, and never switching over by itself.
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 16 << 20, "downtime-limit": 0}))?;
        let socket = destination.dir().join("incoming");
        destination.listen(&format!("unix:{}", socket.display()))?;
        let tap = Tap::before(&socket)?;
        source.migrate(&tap.uri())?;
        source
            .qmp
            .wait_event_if("MIGRATION_PASS", |d| d["pass"] == 3)?;
        source
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        source.wait_migration("completed")?;
        destination.wait_migration("completed")?;

        let capture = tap.finish()?;
        let stream = check_round_trip(&capture.main)?;
        guest::compare("source RAM", &fs::read(&memory)?, &stream.memory(RAM)?)?;
        let most = stream.sendings().into_values().max();
        assert!(most >= Some(3), "pages were sent up to {most:?} times");
        let commands: Vec<_> = stream
            .items()
            .filter_map(|item| match item {
                Item::Command(command) => Some(command.clone()),
                _ => None,
            })
            .collect();
        let expected = [
            Command::OpenReturnPath,
            Command::Ping(1),
            Command::SwitchoverStart,
        ];
        assert_eq!(commands, expected);
        check_return_path(&capture.return_path)?;
    }
    Ok(())
}

fn beside_multifd(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (file, _) = prepare(dir.path())?;
    for machine in MACHINES {
        let tap = Tap::sink()?;
        let mut vm = Machine::new(machine, MEMORY)
            .memory_from(&file)
            .start(qemu)?;
        vm.qmp.enable(&["multifd"])?;
        vm.qmp.set_parameters(json!({"multifd-channels": 3}))?;
        vm.migrate(&tap.uri())?;
        vm.wait_migration("completed")?;
        let capture = tap.finish()?;
        let stream = check_round_trip(&capture.main)?;
        // All pages are on the channels; the main stream has the synchronisations.
        assert!(stream.sendings().is_empty());
        let is_flush = |item: &&Item| matches!(item, Item::Ram(RamItem::MultifdFlush));
        assert!(stream.items().filter(is_flush).count() >= 2);
        let channels: Vec<u8> = capture.multifd.into_keys().collect();
        assert_eq!(channels, [0, 1, 2]);
    }
    Ok(())
}

/// What a RAM block backed by a file of the test is called.
const RAM: &str = "ram0";

/// Memory with known content, as a file and as bytes.
fn prepare(dir: &Path) -> Result<(std::path::PathBuf, Vec<u8>)> {
    let file = dir.join("ram");
    guest::write_memory(&file, u64::from(MEMORY) << 20, Content::Mixed)?;
    let content = fs::read(&file)?;
    Ok((file, content))
}

/// Decodes a stream, encodes it again, compares, and holds its sections against its description.
fn check_round_trip(bytes: &[u8]) -> Result<Whole> {
    let stream = Whole::decode(bytes)?;
    guest::compare("stream", bytes, &stream.encode()?)?;
    assert_eq!(stream.devices(), stream.described_devices()?);
    Ok(stream)
}

fn check_return_path(bytes: &[u8]) -> Result<()> {
    let mut reader = Reader::new(bytes, 0);
    let mut encoded = Vec::new();
    let mut messages = Vec::new();
    while !reader.rest().is_empty() {
        let message = ReturnPathMessage::decode(&mut reader)?;
        message.encode(&mut encoded);
        messages.push(message);
    }
    assert_eq!(encoded, bytes);
    let expected = [
        ReturnPathMessage::Pong(1),
        ReturnPathMessage::Shut { status: 0 },
    ];
    assert_eq!(messages, expected);
    Ok(())
}
