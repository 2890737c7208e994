//! Commands, the order of those of postcopy, and packages: what is read is written again in the same
//! bytes.
#![no_main]
#![allow(missing_docs)] // a target has no API

use libfuzzer_sys::fuzz_target;
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::Command;
use migration_stream::raw::postcopy::{PackageDecoder, PackageItem, PackageStep, PostcopyOrder};

/// What the device of every section takes.
const BODY: usize = 3;

/// Reads a package, and checks that nothing of it reaches beyond its end.
fn package(size: u32, bytes: &[u8], order: &mut PostcopyOrder) {
    let Ok(mut decoder) = PackageDecoder::new(size, 0, 1 << 20, true) else {
        return;
    };
    let mut at = 0;
    loop {
        let mut reader = Reader::new(bytes.get(at..).unwrap_or_default(), at as u64);
        let Ok(step) = decoder.next(&mut reader, order) else {
            return;
        };
        let read = reader.consumed();
        assert!((at + read) as u64 <= decoder.end());
        let mut again = Vec::new();
        match step {
            PackageStep::Item(PackageItem::Command(command)) => {
                command.encode(&mut again);
                assert_eq!(again, bytes[at..at + read]);
            }
            PackageStep::Item(PackageItem::Section(header)) => {
                header.encode(&mut again);
                assert_eq!(again, bytes[at..at + read]);
                at += BODY;
            }
            PackageStep::Item(PackageItem::Footer(_)) => assert_eq!(read, 5),
            PackageStep::NeedMore { at_least } => {
                assert!((at + reader.rest().len() + at_least) as u64 <= decoder.end());
                return;
            }
            PackageStep::End => return,
        }
        at += read;
    }
}

fuzz_target!(|data: &[u8]| {
    let mut order = PostcopyOrder::of_any_source();
    let mut rest = data;
    loop {
        let mut reader = Reader::new(rest, 0);
        let Ok(command) = Command::decode(&mut reader) else {
            break;
        };
        let (read, left) = rest.split_at(reader.consumed());
        let mut again = Vec::new();
        command.encode(&mut again);
        // The byte that says that it is one has been read before.
        assert_eq!(again.split_first(), Some((&8, read)));
        let state = order.state();
        if order.command(&command).is_err() {
            assert_eq!(order.state(), state);
        } else if let Command::Packaged { size } = command {
            package(size, left, &mut order);
        }
        // Another may follow, as in the stream.
        match left.split_first() {
            Some((8, left)) => rest = left,
            _ => break,
        }
    }
});
