//! Real QEMU writes files with `mapped-ram`, and leaves shared memory where it is: what our `Target`
//! reads from them has to be what QEMU's own `pmemsave` says.

use std::fs::{self, File};
use std::num::NonZeroU8;
use std::process::ExitCode;
use std::sync::Arc;

use migration_stream::io::PositionedFile;
use migration_stream::mapped_ram::{FileReader, MappedRamError};
use migration_stream::precopy::{Target, TargetConfig, TargetError};
use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::{ConfigurationRule, StreamReader, TailLimits};
use serde_json::json;
use tests::Result;
use tests::guest::{self, Content};
use tests::harness::{self, Needs};
use tests::qemu::{Binary, Machine};
use tests::store;

const MEMORY: u32 = 32;
const RAM: &str = "ram0";

fn main() -> ExitCode {
    let trial =
        |name, test: fn(&Binary) -> Result<()>| Needs::NOTHING.qemu((9, 0)).test_qemu(name, test);
    // 10.0.2 itself fails to write such a file ("Failed to write bitmap to file: Bad address").
    let shared =
        |name, test: fn(&Binary) -> Result<()>| Needs::NOTHING.qemu((11, 1)).test_qemu(name, test);
    harness::run([
        trial("a_file_of_qemu_is_read", |q| read(q, 0, None, false)),
        trial("a_file_that_begins_further_on_is_read", |q| {
            read(q, 0x5000, None, false)
        }),
        trial("a_file_written_by_channels_is_read_by_threads", |q| {
            read(q, 0, Some(4), false)
        }),
        shared("a_file_without_shared_memory_is_read", |q| {
            read(q, 0, None, true)
        }),
    ])
}

fn read(qemu: &Binary, offset: u64, channels: Option<u8>, ignore_shared: bool) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (memory, path) = (dir.path().join("memory"), dir.path().join("file"));
    guest::write_memory(&memory, u64::from(MEMORY) << 20, Content::Mixed)?;
    let mut source = Machine::new("q35", MEMORY).memory_in(&memory).start(qemu)?;
    let blocks = source.ram_blocks()?.into_iter().map(|(name, len)| {
        let block = RamBlock::new(name, len)?;
        let is_shared = block.name() == RAM;
        Ok(if is_shared { block.shared() } else { block })
    });
    let blocks = RamBlockTable::new(blocks.collect::<Result<Vec<_>>>()?)?;
    source.qmp.enable(&["mapped-ram"])?;
    if let Some(count) = channels {
        source.qmp.enable(&["multifd"])?;
        source
            .qmp
            .set_parameters(json!({"multifd-channels": count}))?;
    }
    let blocks = if ignore_shared {
        source.qmp.enable(&["x-ignore-shared"])?;
        blocks.ignoring_shared()
    } else {
        blocks
    };
    source.migrate(&format!("file:{},offset={offset:#x}", path.display()))?;
    source.wait_migration("completed")?;

    let threads = channels.and_then(NonZeroU8::new).unwrap_or(NonZeroU8::MIN);
    let landed = store::memory(blocks)?;
    let file: Arc<dyn PositionedFile> = Arc::new(File::open(&path)?);
    let config = TargetConfig::new(ConfigurationRule::Any).max_devices(1 << 20);
    let load = || {
        let reader = StreamReader::from_file(Arc::clone(&file), offset);
        Target::new(config.clone(), reader, None, &landed).load_opaque(
            &landed,
            &mut FileReader::new(Arc::clone(&file)).with_threads(threads),
            TailLimits::default(),
        )
    };
    let (loaded, tail) = load()?;
    assert!(tail.sections().len() > 10);
    assert!(loaded.received().zero_pages > 0);
    let ram = store::bytes(&landed, RAM)?;
    if ignore_shared {
        assert!(ram.iter().all(|b| *b == 0xa5), "shared memory was touched");
    } else {
        guest::compare("RAM and its file", &fs::read(&memory)?, &ram)?;
    }
    let firmware = store::bytes(&landed, "pc.bios")?;
    let expected = source.pmemsave((1 << 32) - firmware.len() as u64, firmware.len() as u64)?;
    guest::compare("firmware and pmemsave", &expected, &firmware)?;

    // The first block that has pages in the file is longer than what is left of it.
    File::options()
        .write(true)
        .open(&path)?
        .set_len(0x11_0000)?;
    let Err(TargetError::Transport(error)) = load() else {
        return Err("a truncated file was loaded".into());
    };
    let cause = error.source.downcast_ref::<MappedRamError>();
    let size = 0x11_0000;
    if !matches!(cause, Some(MappedRamError::Truncated { size: s, .. }) if *s == size) {
        return Err(format!("{error:?}").into());
    }
    Ok(())
}
