//! Dirty bitmaps of disks beside the guest: kept, shown to a VMM, or refused.

use migration_stream::precopy::TargetError;
use migration_stream::ram::NoMultifd;
use migration_stream::raw::dirty_bitmap;
use migration_stream::raw::dirty_bitmap::{
    BitmapFlags, Chunk, DirtyBitmapEncoder, DirtyBitmapError, MigratedBitmap,
};
use migration_stream::raw::section::{Continuation, encode_continuation, encode_footer};
use migration_stream::{BoxError, IdStr, Parsed, SectionHeader, SectionId, TailLimits};

use crate::common::guest::memory;
use crate::common::loads::{Loads, load};
use crate::rig::{BLOCKS, Devices, channels, send, source, target};

const BITMAP_SECTION: SectionId = SectionId(9);

/// The sections of one bitmap, and what it has in each of its chunks.
fn bitmap_sections() -> Vec<u8> {
    let mut out = Vec::new();
    let mut bitmaps = DirtyBitmapEncoder::new();
    let name = |name| IdStr::new(name).unwrap();
    dirty_bitmap::header(BITMAP_SECTION).encode(&mut out);
    let flags = BitmapFlags::default();
    let bitmap = bitmaps
        .start(&name("disk0"), &name("nightly"), 512, flags, &mut out)
        .unwrap();
    Chunk::end().encode(&mut out);
    encode_footer(BITMAP_SECTION, &mut out);
    for kind in [Continuation::Part, Continuation::End] {
        encode_continuation(kind, BITMAP_SECTION, &mut out);
        if kind == Continuation::End {
            // More than what is read at once.
            for i in 0..20 {
                let bits = vec![0x5a; 8 << 10];
                bitmaps
                    .bits(bitmap, i << 16, 1 << 16, &bits, &mut out)
                    .unwrap();
            }
            bitmaps.complete(bitmap, &mut out).unwrap();
        }
        Chunk::end().encode(&mut out);
        encode_footer(BITMAP_SECTION, &mut out);
    }
    out
}

#[test]
fn dirty_bitmaps_are_kept_with_a_guest_taken_as_it_is_and_sent_on_byte_for_byte() {
    let (_, mut guest) = source();
    guest.sections = bitmap_sections();
    let landed = memory(BLOCKS);
    let (a, b) = channels();
    std::thread::scope(|scope| {
        let sections = guest.sections.clone();
        let sender = scope.spawn(|| send(&mut guest, &a).map(drop));
        let (mut loaded, tail) = target(&b, &landed)
            .keeping_dirty_bitmaps()
            .load_opaque(&*landed, &mut NoMultifd, TailLimits::default())
            .unwrap();
        loaded.confirm().unwrap();
        assert_eq!(tail.sections().len(), 1);
        let bitmaps = loaded.dirty_bitmaps();
        assert_eq!(bitmaps.bitmaps().len(), 1);
        assert!(bitmaps.bitmaps()[0].is_complete);
        let mut again = Vec::new();
        bitmaps.encode_sections(BITMAP_SECTION, &mut again);
        assert_eq!(again, sections);
        sender.join().unwrap().unwrap();
    });
}

#[test]
fn dirty_bitmaps_that_are_not_kept_or_too_long_fail_the_migration() {
    for keeps in [false, true] {
        let (_, mut guest) = source();
        guest.sections = bitmap_sections();
        let landed = memory(BLOCKS);
        let (a, b) = channels();
        let (sent, received) = std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&mut guest, &a).map(drop));
            let mut target = target(&b, &landed);
            if keeps {
                target = target.keeping_dirty_bitmaps();
            }
            let limits = TailLimits {
                len: 100 << 10,
                ..TailLimits::default()
            };
            let received = target.load_opaque(&*landed, &mut NoMultifd, limits);
            b.shutdown();
            (sender.join().unwrap(), received.map(drop))
        });
        assert!(sent.is_err() && guest.running);
        let error = received.unwrap_err();
        if keeps {
            let TargetError::Decode(e) = &error else {
                panic!("{error}")
            };
            let max = 100 << 10;
            assert_eq!(e.cause, DirtyBitmapError::SectionsTooLong { max }.into());
        } else {
            assert!(matches!(error, TargetError::DirtyBitmaps { .. }), "{error}");
        }
    }
}

/// Knows one device, and takes dirty bitmaps.
#[derive(Default)]
struct WithBitmaps(Devices, Vec<Chunk>);

impl Loads for WithBitmaps {
    fn load_device(
        &mut self,
        section: &SectionHeader,
        body: &[u8],
    ) -> Result<Parsed<()>, BoxError> {
        self.0.load_device(section, body)
    }
    fn load_dirty_bitmap(
        &mut self,
        bitmap: &MigratedBitmap,
        chunk: &Chunk,
    ) -> Result<(), BoxError> {
        assert_eq!(
            (bitmap.node.as_str(), bitmap.name.as_str()),
            ("disk0", "nightly")
        );
        self.1.push(chunk.clone());
        Ok(())
    }
}

#[test]
fn a_vmm_is_shown_each_chunk_of_its_bitmaps_or_refuses_them() {
    let run = |vm: &mut dyn Loads| {
        let (_, mut guest) = source();
        guest.sections = bitmap_sections();
        let landed = memory(BLOCKS);
        let (a, b) = channels();
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&mut guest, &a).map(drop));
            let loaded = load(target(&b, &landed), &*landed, vm)
                .map(|settled| settled.confirm().map(drop).unwrap());
            b.shutdown();
            let _ = sender.join().unwrap();
            loaded
        })
    };
    let mut taken = WithBitmaps::default();
    run(&mut taken).unwrap();
    assert_eq!(taken.0.loaded, 1);
    assert_eq!(taken.1.len(), 22);
    let error = run(&mut Devices::default()).unwrap_err();
    assert!(
        matches!(&error, TargetError::Device { idstr, .. } if idstr == "dirty-bitmap"),
        "{error}"
    );
}
