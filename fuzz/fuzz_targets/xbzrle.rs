//! XBZRLE: runs stay inside the page whatever is read, and what the encoder says of two pages turns one
//! into the other.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::raw::xbzrle::{Encoded, PageBytes, Runs, encode};

/// A page that begins as `bytes` says and goes on with `fill`.
fn page(fill: u8, bytes: &[u8]) -> PageBytes {
    let mut page = [fill; 4096];
    let n = bytes.len().min(page.len());
    page[..n].copy_from_slice(&bytes[..n]);
    page
}

fuzz_target!(|data: &[u8]| {
    let runs = Runs::new(data);
    let is_sound = runs.check().is_ok();
    let mut written = 0;
    for run in runs {
        let Ok(run) = run else {
            assert!(!is_sound);
            break;
        };
        assert!(!run.bytes.is_empty() && run.offset >= written);
        written = run.offset + run.bytes.len();
        assert!(written <= 4096);
    }

    let (before, now) = data.split_at(data.len() / 2);
    let (before, now) = (page(0, before), page(0, now));
    let mut encoded = Vec::new();
    match encode(&before, &now, &mut encoded) {
        Encoded::Unchanged => assert_eq!(before, now),
        Encoded::Bytes(len) => {
            assert_eq!(len, encoded.len());
            let mut page = before;
            for run in Runs::new(&encoded) {
                let run = run.expect("what we have encoded");
                page[run.offset..][..run.bytes.len()].copy_from_slice(run.bytes);
            }
            assert!(page == now);
        }
        // Then the page goes as it is.
        _ => {}
    }
});
