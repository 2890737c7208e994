//! A guest with memory, devices and dirty bitmaps, and what it means that two are the same.

use std::sync::Arc;

use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::raw::configuration::MAPPED_RAM;
use migration_stream::raw::dirty_bitmap;
use migration_stream::raw::dirty_bitmap::{BitmapFlags, BitmapSections, Chunk, DirtyBitmapEncoder};
use migration_stream::raw::early::EarlySections;
use migration_stream::raw::section::{Continuation, encode_continuation, encode_footer};
use migration_stream::{Configuration, GuestRam, IdStr, MachineName, SectionId, Tail, TailLimits};
use stream_relay::guest::{Devices, Guest};
use stream_relay::memory::Memory;

const TAIL: &[u8] = include_bytes!("../../../../migration-stream/tests/data/microvm-11.1.3.tail");
pub const PAGE: usize = 4096;
pub const PAGES: usize = 700;

/// Two dirty bitmaps of a disk, as a source sends them.
fn bitmaps() -> Vec<u8> {
    let (mut out, id) = (Vec::new(), SectionId(0));
    let mut encoder = DirtyBitmapEncoder::new();
    let name = |name: &str| IdStr::new(name).unwrap();
    let end = |out: &mut Vec<u8>| {
        Chunk::end().encode(out);
        encode_footer(id, out);
    };
    dirty_bitmap::header(id).encode(&mut out);
    for bitmap in ["nightly", "weekly"] {
        let flags = BitmapFlags::default();
        encoder
            .start(&name("disk0"), &name(bitmap), 512, flags, &mut out)
            .unwrap();
    }
    end(&mut out);
    encode_continuation(Continuation::End, id, &mut out);
    encoder.bits(0, 0, 64, &[0xff; 8], &mut out).unwrap();
    encoder.complete(0, &mut out).unwrap();
    encoder.complete(1, &mut out).unwrap();
    end(&mut out);
    out
}

/// Every third page is zero; the others differ.
pub fn guest(machine: &str) -> Guest {
    let blocks = RamBlockTable::new(vec![
        RamBlock::new("pc.ram", (PAGES * PAGE) as u64).unwrap(),
        RamBlock::new("vga.rom", 2 * PAGE as u64).unwrap(),
    ]);
    let memory = Memory::new(blocks.unwrap(), u64::MAX, Arc::default()).unwrap();
    for page in (0..PAGES).filter(|p| p % 3 != 0) {
        let all = memory.slice(BlockId::new(0), 0, PAGES * PAGE).unwrap();
        let bytes: Vec<u8> = (0..PAGE)
            .map(|i| (i * page / 16).to_le_bytes()[0] | 1)
            .collect();
        all.subslice(page * PAGE, PAGE).unwrap().copy_from(&bytes);
    }
    let rom = memory.slice(BlockId::new(1), PAGE as u64, 3).unwrap();
    rom.copy_from(b"rom");
    let mut configuration = Configuration::new(MachineName::new(machine).unwrap());
    configuration.uuid = Some([7; 16]);
    Guest {
        memory: Arc::new(memory),
        configuration: Some(configuration.with(MAPPED_RAM)),
        early: EarlySections::new(),
        devices: Devices {
            tail: Tail::decode(TAIL, TailLimits::default()).unwrap(),
            bitmaps: BitmapSections::decode(&bitmaps()).unwrap(),
        },
    }
}

fn bytes(guest: &Guest) -> Vec<Vec<u8>> {
    let blocks = guest.memory.blocks().iter();
    blocks
        .map(|(id, block)| {
            let len = usize::try_from(block.used_length()).unwrap();
            let mut bytes = vec![0; len];
            guest.memory.slice(id, 0, len).unwrap().copy_to(&mut bytes);
            bytes
        })
        .collect()
}

pub fn assert_same(a: &Guest, b: &Guest) {
    assert_eq!(a.memory.blocks(), b.memory.blocks());
    assert!(bytes(a) == bytes(b), "memory differs");
    let identity = |guest: &Guest| {
        guest
            .configuration
            .as_ref()
            .map(|c| (c.machine.clone(), c.uuid))
    };
    assert_eq!(identity(a), identity(b));
    let (ours, theirs) = (&a.devices, &b.devices);
    assert_eq!(ours.tail.description_text(), theirs.tail.description_text());
    assert_eq!(ours.bitmaps.bitmaps().len(), 2);
    let sections = |g: &Guest| {
        let mut bytes = Vec::new();
        g.devices.bitmaps.encode_sections(SectionId(0), &mut bytes);
        bytes
    };
    assert_eq!(sections(a), sections(b));
    let bodies = |g: &Guest| -> Vec<Vec<u8>> {
        g.devices.tail.sections().map(|s| s.body.to_vec()).collect()
    };
    assert_eq!(bodies(a), bodies(b));
}
