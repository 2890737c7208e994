//! The description behind a stream, and the opaque device sections that are cut by it.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::raw::device_blob::encode_device_blob;
use migration_stream::raw::vmdesc::VmDescription;
use migration_stream::{SectionId, Tail, TailLimits};
use stream_inspect::fields::MAX_FIELDS;
use stream_inspect::inspection::{Device, Extent, Inspection};
use stream_inspect::state::Layouts;

/// Every section is read along its description, or not as described: no field is beyond its section.
fn inspect(tail: &Tail) {
    let found = Inspection {
        description: tail.description_text().to_owned(),
        ..Inspection::default()
    };
    let Ok(layouts) = Layouts::of(&found) else {
        return;
    };
    for section in tail.sections() {
        let device = Device {
            header: section.header.clone(),
            body: section.body.to_vec(),
            extent: Extent::default(),
        };
        if let Ok(fields) = layouts.fields(&device) {
            assert!(fields.count <= MAX_FIELDS);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let (choice, bytes) = fuzz::choice(data);
    if choice & 1 == 0 {
        let _ = VmDescription::parse(bytes);
        return;
    }
    let limits = TailLimits::default();
    if let Ok(tail) = Tail::decode(bytes, limits) {
        // The sections that were cut out can be put together again.
        let mut again = Vec::new();
        tail.encode_sections(SectionId(7), &mut again);
        let bodies =
            |tail: &Tail| -> Vec<Vec<u8>> { tail.sections().map(|s| s.body.to_vec()).collect() };
        assert!(again.len() >= bodies(&tail).iter().map(Vec::len).sum());
        inspect(&tail);
        // However they are told apart without the description, nothing is lost.
        if let Ok(later) = tail.followed_by(&again) {
            assert!(later.as_bytes().starts_with(&again));
            let mut blob = Vec::new();
            encode_device_blob(later.sections(), &mut blob);
            assert_eq!(blob, again);
        }
    }
});
