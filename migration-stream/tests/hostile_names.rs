//! Names from outside in errors: nothing in them reaches a terminal or a log as more than text.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

use std::error::Error;

use migration_stream::ram::{RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::decoder::StreamDecoder;
use migration_stream::raw::dirty_bitmap::DirtyBitmapDecoder;
use migration_stream::raw::header;
use migration_stream::raw::ram::{RAM_IDSTR, RAM_VERSION, RecordDecoder, encode_setup_list};
use migration_stream::raw::section::Announcement;
use migration_stream::raw::vmdesc::VmDescription;
use migration_stream::{
    Configuration, ConfigurationRule, DecoderConfig, IdStr, InstanceId, MachineName, SectionHeader,
    SectionId, Tail, TailLimits,
};

/// A control sequence, one of C1, a line break, a bell, a character that turns text around, an invisible
/// one.
const HOSTILE: &str = "x\u{1b}[2J\u{9b}31m\n\r\u{7}\u{202e}\u{2066}\u{200b}y";

#[track_caller]
fn assert_plain(error: &dyn Error) {
    let said: Vec<String> = std::iter::successors(Some(error), |&e| e.source())
        .map(ToString::to_string)
        .collect();
    let text = said.join(": ");
    assert!(
        text.contains(r"x\u{1b}[2J\u{9b}31m\n\r\u{7}\u{202e}"),
        "{text:?}"
    );
    let is_harmful = |c: char| c.is_control() || "\u{202e}\u{2066}\u{200b}".contains(c);
    assert!(!text.contains(is_harmful), "{text:?}");
}

fn header(idstr: &str, version: u32, out: &mut Vec<u8>) {
    let header = SectionHeader {
        kind: Announcement::Start,
        id: SectionId(1),
        idstr: IdStr::new(idstr).unwrap(),
        instance: InstanceId(0),
        version,
    };
    header.encode(out);
}

/// The error with which a stream is refused.
fn refused(config: DecoderConfig, blocks: Option<RamBlockTable>, bytes: &[u8]) -> impl Error {
    let mut decoder = StreamDecoder::new(config, blocks);
    let mut r = Reader::new(bytes, 0);
    loop {
        match decoder.next(&mut r) {
            Err(e) => return e,
            Ok(step) => assert!(
                matches!(step, migration_stream::raw::decoder::Step::Item(_)),
                "{step:?}"
            ),
        }
    }
}

fn configured(name: &str) -> Configuration {
    Configuration::new(MachineName::new(name).unwrap())
}

fn table(name: &str) -> RamBlockTable {
    RamBlockTable::new(vec![RamBlock::new(name, 1 << 20).unwrap()]).unwrap()
}

#[test]
fn machine_types_capabilities_and_sections_are_escaped() {
    let any = || DecoderConfig::new(ConfigurationRule::Any);
    let mut bytes = Vec::new();
    header::encode(&mut bytes);
    configured(HOSTILE).encode(&mut bytes);
    bytes.push(0);
    let expected = DecoderConfig::new(ConfigurationRule::Matching(configured("pc")));
    assert_plain(&refused(expected, None, &bytes));

    let mut bytes = Vec::new();
    header::encode(&mut bytes);
    configured("pc").with(HOSTILE).encode(&mut bytes);
    bytes.push(0);
    let expected = DecoderConfig::new(ConfigurationRule::Matching(configured("pc")));
    assert_plain(&refused(expected, None, &bytes));

    let mut bytes = Vec::new();
    header::encode(&mut bytes);
    configured("pc").encode(&mut bytes);
    header(RAM_IDSTR, RAM_VERSION, &mut bytes);
    encode_setup_list(&table(HOSTILE), &mut bytes);
    assert_plain(&refused(any(), Some(table("pc.ram")), &bytes));
}

#[test]
fn ram_blocks_are_escaped() {
    assert_plain(&RamBlock::new(HOSTILE, 1).unwrap_err());
    let twice = [HOSTILE, HOSTILE].map(|name| RamBlock::new(name, 4096).unwrap());
    assert_plain(&RamBlockTable::new(twice.to_vec()).unwrap_err());
    // A page of an unknown block.
    let mut record = 8u64.to_be_bytes().to_vec();
    record.push(u8::try_from(HOSTILE.len()).unwrap());
    record.extend_from_slice(HOSTILE.as_bytes());
    let mut r = Reader::new(&record, 0);
    let error = RecordDecoder::new().decode(&mut r, &table("pc.ram"));
    assert_plain(&error.unwrap_err());
}

#[test]
fn dirty_bitmaps_and_descriptions_are_escaped() {
    let name = u8::try_from(HOSTILE.len()).unwrap();
    let mut chunk = vec![0x12 | 0x20];
    for text in [HOSTILE, HOSTILE] {
        chunk.push(name);
        chunk.extend_from_slice(text.as_bytes());
    }
    chunk.extend([0; 64]);
    let mut r = Reader::new(&chunk, 0);
    if let Err(error) = DirtyBitmapDecoder::new().next(&mut r) {
        let text = error.to_string();
        assert!(!text.contains('\u{1b}'), "{text:?}");
    }
    let json = serde_json::json!({"page_size": 4096, "devices": [{"name": HOSTILE, "instance_id": 0,
        "fields": [{"size": u64::MAX, "array_len": 2}]}]});
    let error = VmDescription::parse(json.to_string().as_bytes()).unwrap_err();
    assert_plain(&error);
    let mut tail = Vec::new();
    header(HOSTILE, 1, &mut tail);
    tail[0] = 4;
    tail.extend(b"\x7e\0\0\0\x01\0\x06");
    let json = serde_json::json!({"page_size": 4096, "devices": [
        {"name": format!("{HOSTILE}z"), "instance_id": 0}]});
    let json = json.to_string();
    tail.extend(u32::try_from(json.len()).unwrap().to_be_bytes());
    tail.extend(json.as_bytes());
    assert_plain(&Tail::decode(&tail, TailLimits::default()).unwrap_err());
}
