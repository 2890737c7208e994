//! Streams captured from real QEMU.

use std::process::ExitCode;

use tests::capture::{self, Tap};
use tests::guest::{self, Content, Dirtier};
use tests::qemu::{Binary, Machine};
use tests::{Result, harness};

/// Guest memory, MiB.
const MEMORY: u32 = 16;
const MACHINES: [&str; 3] = ["q35", "pc", "microvm"];

fn main() -> ExitCode {
    harness::run(
        [
            harness::on_each_qemu("prepared_ram_is_what_pmemsave_shows", (7, 2), prepared_ram),
            harness::on_each_qemu("the_boot_sector_dirties_its_pages", (7, 2), boot_sector),
            harness::on_each_qemu("a_stream_to_a_file_is_whole", (7, 2), to_file),
            harness::on_each_qemu("multifd_channels_are_captured_apart", (9, 0), multifd),
        ]
        .into_iter()
        .flatten(),
    )
}

fn prepared_ram(qemu: &Binary) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("ram");
    guest::write_memory(&file, u64::from(MEMORY) << 20, Content::Mixed)?;
    let content = std::fs::read(&file)?;
    for machine in ["q35", "pc", "microvm"] {
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
        vm.qmp.execute("stop", serde_json::Value::Null)?;
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

fn to_file(qemu: &Binary) -> Result<()> {
    for machine in ["q35", "microvm"] {
        let mut vm = Machine::new(machine, MEMORY).start(qemu)?;
        let bytes = capture::to_file(&mut vm)?;
        assert_eq!(&bytes[..8], b"QEVM\0\0\0\x03");
    }
    Ok(())
}

fn multifd(qemu: &Binary) -> Result<()> {
    let tap = Tap::sink()?;
    let mut vm = Machine::new("q35", MEMORY).start(qemu)?;
    vm.enable(&["multifd"])?;
    vm.migrate(&tap.uri())?;
    vm.wait_migration("completed")?;
    let capture = tap.finish()?;
    assert_eq!(capture.multifd.len(), 2);
    Ok(())
}
