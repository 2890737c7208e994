//! Postcopy's codecs on bytes from anywhere: bitmaps of received pages, requests for pages, page records,
//! ranges to discard. Shared by a seeded test and the fuzz target `postcopy`.

use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::Command;
use migration_stream::raw::postcopy::{
    PostcopyRecords, ReceivedBitmap, RequestDecoder, RequestEncoder,
};
use migration_stream::raw::ram::{PageAddress, Record, RecordDecoder};
use migration_stream::raw::return_path::ReturnPathMessage;
use migration_stream::{DecodeError, IdStr, PAGE_SIZE};

/// What came of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// This many things were read.
    Read(usize),
    /// They were refused.
    Refused,
}

/// The first byte says as what the others are read. Bytes are put in front where random ones would
/// hardly ever get beyond the head.
pub fn run(data: &[u8]) -> Ending {
    let Some((choice, bytes)) = data.split_first() else {
        return Ending::Read(0);
    };
    match choice % 5 {
        0 => bitmap(bytes),
        1 => requests(bytes),
        2 => records(PostcopyRecords::of_preempt_channel(), bytes),
        3 => records(
            PostcopyRecords::of_main_stream(RecordDecoder::with_xbzrle(choice & 0x80 != 0)),
            bytes,
        ),
        _ => discard(bytes),
    }
}

fn blocks() -> RamBlockTable {
    let block = |name, pages| RamBlock::new(name, pages * PAGE_SIZE).expect("a block");
    RamBlockTable::new(vec![block("a", 16), block("pc.ram", 200)]).expect("a table")
}

/// More bytes would help only where they are missing, and as many as that.
fn refused(error: &DecodeError) -> Ending {
    assert!(error.missing() != Some(0));
    assert!(!error.to_string().is_empty());
    Ending::Refused
}

fn bitmap(bytes: &[u8]) -> Ending {
    let (pages, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    let pages = u64::from(*pages) + 1;
    let block = RamBlock::new("pc.ram", pages * PAGE_SIZE).expect("a block");
    let (form, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    let len = pages.div_ceil(64) * 8;
    let whole = [&len.to_be_bytes(), bytes].concat();
    // Half of them have the right length in front.
    let bytes = if form % 2 == 0 { &whole } else { bytes };
    let mut r = Reader::new(bytes, 0);
    let mut bitmap = match ReceivedBitmap::decode(&mut r, &block) {
        Ok(bitmap) => bitmap,
        Err(error) => {
            assert_eq!(r.consumed(), 0, "nothing is read of what is refused");
            return refused(&error);
        }
    };
    assert_eq!(r.consumed() as u64, 8 + len + 8);
    let count = (0..pages).filter(|page| bitmap.has(*page)).count() as u64;
    assert_eq!(bitmap.received(), count);
    for beyond in [pages, pages + 63, u64::MAX] {
        assert!(!bitmap.has(beyond) && !bitmap.set(beyond) && !bitmap.clear(beyond));
    }
    let mut out = Vec::new();
    let name = IdStr::new("pc.ram").expect("a name");
    bitmap.encode(name.clone(), &mut out);
    let mut r = Reader::new(&out, 0);
    let message = ReturnPathMessage::decode(&mut r);
    assert_eq!(message, Ok(ReturnPathMessage::RecvBitmap { block: name }));
    assert_eq!(ReceivedBitmap::decode(&mut r, &block).as_ref(), Ok(&bitmap));
    assert!(r.rest().is_empty());
    let first = (0..pages).find(|page| !bitmap.has(*page));
    if let Some(page) = first {
        assert!(bitmap.set(page) && bitmap.set(page) && bitmap.has(page));
        assert_eq!(bitmap.received(), count + 1);
        assert!(bitmap.clear(page) && !bitmap.has(page));
        assert_eq!(bitmap.received(), count);
    }
    Ending::Read(1)
}

fn requests(bytes: &[u8]) -> Ending {
    let blocks = blocks();
    let (mut decoder, mut encoder, mut checker) = (
        RequestDecoder::new(),
        RequestEncoder::new(),
        RequestDecoder::new(),
    );
    // Messages made of the bytes, so that most are well-formed, and then the bytes themselves.
    let (form, rest) = bytes.split_first().unwrap_or((&1, &[]));
    let made = rest.chunks(4).filter(|_| form % 2 == 0).flat_map(|chunk| {
        let at = |i: usize| chunk.get(i).copied().unwrap_or_default();
        let start = u64::from(at(1)) * 1024;
        let length = u32::from(at(2)) * 1024;
        let name = ["a", "pc.ram", "b"][usize::from(at(3)) % 3];
        let block = IdStr::new(name).expect("a name");
        let message = match at(0) % 3 {
            0 => ReturnPathMessage::ReqPages { start, length },
            1 => ReturnPathMessage::ReqPagesId {
                start,
                length,
                block,
            },
            _ => ReturnPathMessage::Pong(length),
        };
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    });
    let mut bytes: Vec<u8> = made.collect();
    bytes.extend_from_slice(rest);
    let mut r = Reader::new(&bytes, 0);
    let mut read = 0;
    loop {
        let before = r.consumed();
        let mut attempt = r.clone();
        let message = match ReturnPathMessage::decode(&mut attempt) {
            Ok(message) => message,
            Err(error) if read == 0 => return refused(&error),
            Err(_) => return Ending::Read(read),
        };
        r = attempt;
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(bytes.get(before..r.consumed()), Some(&again[..]));
        let Ok(Some(request)) = decoder.request(&message, &blocks) else {
            continue;
        };
        let block = blocks.get(request.block).expect("a block of the table");
        assert!(request.length > 0 && request.start.is_multiple_of(PAGE_SIZE));
        assert!(request.start + u64::from(request.length) <= block.used_length());
        // The other side asks for the same.
        let asked = encoder.request(request, &blocks).expect("a request");
        assert_eq!(checker.request(&asked, &blocks), Ok(Some(request)));
        read += 1;
    }
}

fn records(mut records: PostcopyRecords, bytes: &[u8]) -> Ending {
    let blocks = blocks();
    let (form, rest) = bytes.split_first().unwrap_or((&1, &[]));
    // The flags of zero, page, end, flush, continued, differences, set-up.
    let flags = [0x02u16, 0x08, 0x10, 0x200, 0x22, 0x28, 0x40, 0x04];
    let made = rest.chunks(3).filter(|_| form % 2 == 0).flat_map(|chunk| {
        let at = |i: usize| chunk.get(i).copied().unwrap_or_default();
        let flag = flags[usize::from(at(0)) % flags.len()];
        let word = (u64::from(at(1)) * PAGE_SIZE) | u64::from(flag);
        let mut out = word.to_be_bytes().to_vec();
        if matches!(flag, 0x02 | 0x08) {
            let name = ["a", "pc.ram", "b"][usize::from(at(2)) % 3];
            out.push(u8::try_from(name.len()).expect("short"));
            out.extend_from_slice(name.as_bytes());
        }
        if flag & 0x02 != 0 {
            out.push(0);
        }
        if flag & 0x08 != 0 {
            out.resize(out.len() + 4096, at(2));
        }
        out
    });
    let mut bytes: Vec<u8> = made.collect();
    bytes.extend_from_slice(rest);
    let mut r = Reader::new(&bytes, 0);
    let mut read = 0;
    let mut has_ended = false;
    loop {
        let before = r.consumed();
        let record = match records.next(&mut r, &blocks) {
            Ok(record) => record,
            Err(error) if read == 0 => return refused(&error),
            Err(_) => return Ending::Read(read),
        };
        assert!(!has_ended, "a record after the end");
        assert!(r.consumed() > before, "every record takes bytes");
        let within = |page: &PageAddress| {
            let block = blocks.get(page.block).expect("a block of the table");
            assert!(page.offset.is_multiple_of(PAGE_SIZE) && page.offset < block.used_length());
        };
        match &record {
            Record::Page(page) => {
                within(page);
                if r.take(4096).is_err() {
                    return Ending::Read(read);
                }
            }
            Record::Zero(page) => within(page),
            Record::MultifdFlush => {}
            // A main stream goes on with its next section.
            Record::EndOfSection => {
                let mut after = records.clone();
                has_ended = after
                    .next(&mut Reader::new(&[0; 8], 0), &blocks)
                    .is_err_and(|e| e.to_string().contains("has ended"));
            }
            Record::MemSize { .. } | Record::Xbzrle { .. } => {
                panic!("{record:?} in postcopy");
            }
        }
        read += 1;
    }
}

fn discard(bytes: &[u8]) -> Ending {
    let (form, rest) = bytes.split_first().unwrap_or((&1, &[]));
    let mut bytes = Vec::new();
    if form % 2 == 0 {
        // A head with the right length.
        let len = u16::try_from(3 + 1 + rest.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&[0, 6]);
        bytes.extend_from_slice(&len.to_be_bytes());
        bytes.extend_from_slice(&[0, 1, b'a', 0]);
    }
    bytes.extend_from_slice(rest);
    let mut r = Reader::new(&bytes, 0);
    match Command::decode(&mut r) {
        Err(error) => refused(&error),
        Ok(command) => {
            let mut again = Vec::new();
            command.encode(&mut again);
            assert_eq!(again.get(1..), bytes.get(..r.consumed()));
            if let Command::PostcopyRamDiscard(discard) = &command {
                assert!(!discard.ranges().is_empty());
                assert!(discard.ranges().len() * 16 <= r.consumed());
            }
            Ending::Read(1)
        }
    }
}
