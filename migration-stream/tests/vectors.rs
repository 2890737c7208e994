//! What was captured from QEMU 11.1.3, byte for byte, and what it refuses.
//!
//! | captured | test |
//! |---|---|
//! | start of a q35-11.1 and RAM START | [`a_stream_starts`] |
//! | MEM_SIZE, first entry of the block list | [`the_block_list_begins`] |
//! | MULTIFD_FLUSH, EOS | [`flush_and_end_of_section`] |
//! | END of RAM, clean, with multifd | [`a_clean_end_of_ram`] |
//! | OPEN_RETURN_PATH and PING 1, SWITCHOVER_START | [`commands`] |
//! | ADVISE, RAM_DISCARD | [`commands_of_postcopy`] |
//! | PONG, SHUT, SWITCHOVER_ACK, REQ_PAGES_ID, REQ_PAGES | [`return_path_messages`] |
//! | CONFIGURATION with capabilities and UUID | [`a_configuration_with_its_subsections`] |
//! | hello of a multifd channel | `multifd/tests/vectors.rs` |
//! | COLO checkpoint | `colo-core/tests/vectors.rs` |
//!
//! | fed to QEMU's destination | test |
//! |---|---|
//! | header of version 4 | [`refused_header`] |
//! | command 8 of length 0 and 1, 0, 12, PING of length 2 | [`refused_commands`] |
//! | PING without return path, OPEN_RETURN_PATH twice | [`commands_that_want_a_return_path`] |
//! | RAM of version 5 and 3 | [`refused_ram_versions`] |
//! | flag 0x100, CONTINUE first, unknown block, offset beyond it, fill byte 5 | [`refused_records`] |
//! | block list: unknown block, other size | [`refused_block_lists`] |
//! | XBZRLE: other flag byte, longer than a page | [`refused_differences`] |
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::guest::memory;
use common::loads::{Loads, load as load_by};
use common::{bytes_of, decode_all, table};
use migration_stream::io::{ByteSink, ByteSource, Chunk, FdChannel};
use migration_stream::precopy::{Target, TargetConfig, TargetError};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::{
    Command, CommandError, CommandNumber, DiscardRange, PostcopyAdvice, RamDiscard,
};
use migration_stream::raw::decoder::{Item, RamItem, StreamDecoder};
use migration_stream::raw::header::HeaderError;
use migration_stream::raw::postcopy::{OrderError, PostcopyState};
use migration_stream::raw::ram::{
    RamError, Record, RecordDecoder, SetupDecoder, SetupFields, encode_end_of_section,
    encode_multifd_flush, encode_setup_list,
};
use migration_stream::raw::return_path::ReturnPathMessage;
use migration_stream::raw::section::{Announcement, Continuation, SectionError};
use migration_stream::{
    BoxError, Cause, Configuration, ConfigurationRule, DecoderConfig, IdStr, InstanceId,
    MachineName, Parsed, SectionHeader, SectionId, StreamReader,
};

const START: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1\
    \x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04";
const RAM_LIST: &[u8] =
    b"\0\0\0\0\0\x02\0\x04\x06pc.ram\0\0\0\0\0\x01\xe0\0\x03vga\0\0\0\0\0\0\x20\0";
const EOS: &[u8] = b"\0\0\0\0\0\0\0\x10";
const FOOTER_1: &[u8] = b"\x7e\0\0\0\x01";
/// Head of a PART of RAM.
const PART: &[u8] = b"\x02\0\0\0\x01";

fn decoder_config() -> DecoderConfig {
    let machine = MachineName::new("pc-q35-11.1").unwrap();
    DecoderConfig::new(ConfigurationRule::Matching(Configuration::new(machine)))
}

fn decoder(config: DecoderConfig) -> StreamDecoder {
    let blocks = table(&[("pc.ram", 0x1e000), ("vga", 0x2000)]);
    StreamDecoder::new(config, Some(blocks))
}

/// Where a decoder refuses the end of these bytes, and why, however they arrive.
fn refused_by(config: &DecoderConfig, bytes: &[u8]) -> (u64, Cause) {
    let whole = decode_all(&mut decoder(config.clone()), bytes, bytes.len()).unwrap_err();
    let single = decode_all(&mut decoder(config.clone()), bytes, 1).unwrap_err();
    assert_eq!(whole, single);
    (whole.offset, whole.cause)
}

/// The same of what follows `before`, with the offset counted from there.
fn refused(before: &[&[u8]], bytes: &[u8]) -> (u64, Cause) {
    let before = before.concat();
    let (offset, cause) = refused_by(&decoder_config(), &[&before, bytes].concat());
    let begin = u64::try_from(before.len()).unwrap();
    (offset.checked_sub(begin).expect("not before"), cause)
}

fn refused_after_set_up(bytes: &[u8]) -> (u64, Cause) {
    refused(&[START, RAM_LIST, EOS, FOOTER_1], bytes)
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks_exact(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn a_stream_starts() {
    let bytes = unhex(
        "5145564d 00000003 07 0000000b 70632d7133352d31312e31 \
         01 00000001 03 72616d 00000000 00000004",
    );
    let items = vec![
        Item::Header,
        Item::Configuration(Configuration::new(MachineName::new("pc-q35-11.1").unwrap())),
        Item::Section(SectionHeader {
            kind: Announcement::Start,
            id: SectionId(1),
            idstr: IdStr::new("ram").unwrap(),
            instance: InstanceId(0),
            version: 4,
        }),
    ];
    for piece in [1, bytes.len()] {
        assert_eq!(
            decode_all(&mut decoder(decoder_config()), &bytes, piece).unwrap(),
            items
        );
    }
    assert_eq!(bytes_of(&items, &mut std::iter::empty()), bytes);
}

#[test]
fn the_block_list_begins() {
    let blocks = table(&[("pc.ram", 64 << 20), ("vga", 0xc2000)]);
    let mut bytes = Vec::new();
    encode_setup_list(&blocks, &mut bytes);
    assert_eq!(bytes[..8], unhex("00000000040c2004"));
    assert_eq!(bytes[8..23], unhex("06 70632e72616d 0000000004000000"));
    let mut r = Reader::new(&bytes, 0);
    let mut list = SetupDecoder::begin(&mut r, SetupFields::default()).unwrap();
    let first = list.entry(&mut r).unwrap();
    assert_eq!(
        (first.block.name(), first.block.used_length()),
        ("pc.ram", 64 << 20)
    );
    assert_eq!(r.offset(), 23);
}

#[test]
fn flush_and_end_of_section() {
    let mut bytes = Vec::new();
    encode_multifd_flush(&mut bytes);
    encode_end_of_section(&mut bytes);
    assert_eq!(bytes, unhex("0000000000000200 0000000000000010"));
    let blocks = table(&[("pc.ram", 0x1000)]);
    let mut r = Reader::new(&bytes, 0);
    let mut records = RecordDecoder::new();
    assert_eq!(
        records.decode(&mut r, &blocks).unwrap(),
        Record::MultifdFlush
    );
    assert_eq!(
        records.decode(&mut r, &blocks).unwrap(),
        Record::EndOfSection
    );
}

#[test]
fn a_clean_end_of_ram() {
    let end = unhex("03 00000001 0000000000000200 0000000000000010 7e 00000001");
    let bytes = [START, RAM_LIST, EOS, FOOTER_1, &end].concat();
    let items = decode_all(&mut decoder(decoder_config()), &bytes, 1).unwrap();
    let end_items = [
        Item::Continuation {
            kind: Continuation::End,
            id: SectionId(1),
        },
        Item::Ram(RamItem::MultifdFlush),
        Item::Ram(RamItem::EndOfSection),
        Item::Footer(SectionId(1)),
    ];
    assert_eq!(items[items.len() - 4..], end_items);
    assert_eq!(bytes_of(&end_items, &mut std::iter::empty()), end);
}

/// Each command is these bytes, and they are that command, and less of them is none.
fn command_is(command: &Command, bytes: &[u8]) {
    let mut out = Vec::new();
    command.encode(&mut out);
    assert_eq!(out, bytes);
    for n in 1..bytes.len() {
        let e = Command::decode(&mut Reader::new(&bytes[1..n], 1)).unwrap_err();
        assert!(e.missing().is_some(), "{e}");
    }
    assert_eq!(
        Command::decode(&mut Reader::new(&bytes[1..], 1)).unwrap(),
        *command
    );
}

#[test]
fn commands() {
    command_is(&Command::OpenReturnPath, &unhex("08 0001 0000"));
    command_is(&Command::Ping(1), &unhex("08 0002 0004 00000001"));
    command_is(&Command::SwitchoverStart, &unhex("08 000b 0000"));
}

#[test]
fn commands_of_postcopy() {
    let advice = PostcopyAdvice {
        ram_page_sizes: 4096,
        target_page_size: 4096,
    };
    command_is(
        &Command::PostcopyAdvise(Some(advice)),
        &unhex("08 0003 0010 00000000 00001000 00000000 00001000"),
    );
    let whole = vec![DiscardRange {
        start: 0,
        length: 32 << 20,
    }];
    let discard = RamDiscard::new(IdStr::new("pc.ram").unwrap(), whole).unwrap();
    command_is(
        &Command::PostcopyRamDiscard(discard),
        &unhex("08 0006 0019 00 06 70632e72616d 00 0000000000000000 0000000002000000"),
    );
}

#[test]
fn return_path_messages() {
    let block = IdStr::new("pc.ram").unwrap();
    let cases = [
        (ReturnPathMessage::Pong(1), "0002 0004 00000001"),
        (ReturnPathMessage::Shut { status: 0 }, "0001 0004 00000000"),
        (ReturnPathMessage::SwitchoverAck, "0007 0000"),
        (
            ReturnPathMessage::ReqPagesId {
                start: 0xc0000,
                length: 4096,
                block,
            },
            "0003 0013 00000000000c0000 00001000 06 70632e72616d",
        ),
        (
            ReturnPathMessage::ReqPages {
                start: 0xc1000,
                length: 4096,
            },
            "0004 000c 00000000000c1000 00001000",
        ),
    ];
    for (message, hex) in cases {
        let bytes = unhex(hex);
        let mut out = Vec::new();
        message.encode(&mut out);
        assert_eq!(out, bytes);
        for n in 0..bytes.len() {
            let e = ReturnPathMessage::decode(&mut Reader::new(&bytes[..n], 0)).unwrap_err();
            assert!(e.missing().is_some(), "{e}");
        }
        let mut r = Reader::new(&bytes, 0);
        assert_eq!(ReturnPathMessage::decode(&mut r).unwrap(), message);
    }
}

#[test]
fn a_configuration_with_its_subsections() {
    let bytes = unhex(
        "07 0000000b 70632d7133352d31312e31 \
         05 1a 636f6e66696775726174696f6e2f6361706162696c6974696573 00000001 00000001 \
         0f 782d69676e6f72652d736861726564 \
         05 12 636f6e66696775726174696f6e2f75756964 00000001 00112233445566778899aabbccddeeff",
    );
    let configuration = Configuration {
        capabilities: BTreeSet::from([IdStr::new("x-ignore-shared").unwrap()]),
        uuid: Some([
            0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee,
            0xff,
        ]),
        ..Configuration::new(MachineName::new("pc-q35-11.1").unwrap())
    };
    let mut out = Vec::new();
    configuration.encode(&mut out);
    assert_eq!(out, bytes);
    // Where it ends is told by what follows it.
    let followed = [&bytes[1..], &[1]].concat();
    let mut r = Reader::new(&followed, 1);
    assert_eq!(Configuration::decode(&mut r).unwrap(), configuration);
    assert_eq!(r.rest(), [1]);
}

#[test]
fn refused_header() {
    let refused = refused_by(&decoder_config(), b"QEVM\0\0\0\x04");
    assert_eq!(refused, (0, HeaderError::Version { found: 4 }.into()));
}

#[test]
fn refused_commands() {
    // Errors are placed at the number, behind the type byte.
    for len in [0, 1] {
        assert_eq!(
            refused_after_set_up(&[8, 0, 8, 0, len]),
            (1, CommandError::Deprecated { len: len.into() }.into())
        );
    }
    for number in [0, 12] {
        let unknown = CommandError::Unknown {
            number: number.into(),
            len: 0,
        };
        assert_eq!(
            refused_after_set_up(&[8, 0, number, 0, 0]),
            (1, unknown.into())
        );
    }
    let length = CommandError::Length {
        command: CommandNumber::Ping,
        len: 2,
    };
    assert_eq!(
        refused_after_set_up(b"\x08\0\x02\0\x02"),
        (1, length.into())
    );
}

#[test]
fn refused_ram_versions() {
    for version in [3, 5] {
        let (frame, _) = START.split_at(START.len() - 4);
        let (before, header) = frame.split_at(24);
        assert_eq!(
            refused(&[before], &[header, &[0, 0, 0, version]].concat()),
            (
                1,
                SectionError::Version {
                    idstr: IdStr::new("ram").unwrap(),
                    version: version.into(),
                    expected: 4
                }
                .into()
            )
        );
    }
}

#[test]
fn refused_records() {
    let record = |bytes: &[u8]| {
        let (offset, cause) = refused_after_set_up(&[PART, bytes].concat());
        (offset - 5, cause)
    };
    assert_eq!(
        record(b"\0\0\0\0\0\0\x01\0"),
        (0, RamError::Compressed.into())
    );
    // What stands behind the first word is placed where it stands.
    assert_eq!(
        record(b"\0\0\0\0\0\0\0\x28"),
        (8, RamError::NothingToContinue.into())
    );
    assert_eq!(
        record(b"\0\0\0\0\0\0\0\x08\x03foo"),
        (8, RamError::UnknownBlock { name: "foo".into() }.into())
    );
    assert_eq!(
        record(b"\0\0\0\0\x10\0\0\x08\x03vga"),
        (
            0,
            RamError::OutOfBlock {
                name: "vga".into(),
                offset: 0x1000_0000,
                used_length: 0x2000
            }
            .into()
        )
    );
    assert_eq!(
        record(b"\0\0\0\0\0\0\0\x02\x03vga\x05"),
        (12, RamError::FillByte { value: 5 }.into())
    );
}

#[test]
fn refused_block_lists() {
    let list = |bytes: &[u8]| refused(&[START], bytes);
    assert_eq!(
        list(b"\0\0\0\0\0\0\x20\x04\x03foo\0\0\0\0\0\0\x20\0"),
        (8, RamError::UnknownBlock { name: "foo".into() }.into())
    );
    assert_eq!(
        list(b"\0\0\0\0\0\0\x10\x04\x03vga\0\0\0\0\0\0\x10\0"),
        (
            8,
            RamError::BlockLength {
                name: "vga".into(),
                received: 0x1000,
                local: 0x2000
            }
            .into()
        )
    );
}

#[test]
fn refused_differences() {
    let difference = |bytes: &[u8]| {
        let config = decoder_config().xbzrle(true);
        let before = [START, RAM_LIST, EOS, FOOTER_1, PART].concat();
        let (offset, cause) = refused_by(&config, &[&before, bytes].concat());
        (offset - u64::try_from(before.len()).unwrap(), cause)
    };
    assert_eq!(
        difference(b"\0\0\0\0\0\0\0\x40\x03vga\x02\0\x01"),
        (12, RamError::XbzrleEncoding { encoding: 2 }.into())
    );
    assert_eq!(
        difference(b"\0\0\0\0\0\0\0\x40\x03vga\x01\x10\x01"),
        (12, RamError::XbzrleLength { len: 4097 }.into())
    );
    // Where it was not agreed on, there is none at all.
    assert_eq!(
        refused_after_set_up(&[PART, b"\0\0\0\0\0\0\0\x40\x03vga"].concat()),
        (5, RamError::Xbzrle.into())
    );
}

/// No device is expected.
struct NoDevices;

impl Loads for NoDevices {
    fn load_device(&mut self, section: &SectionHeader, _: &[u8]) -> Result<Parsed<()>, BoxError> {
        Err(format!("{section:?}").into())
    }
}

/// What a target makes of these bytes, and what it answers.
fn load(bytes: &[u8], has_return_path: bool) -> (Result<(), TargetError>, Vec<u8>) {
    const LIMIT: Duration = Duration::from_secs(20);
    let (a, b) = UnixStream::pair().unwrap();
    let mut source = FdChannel::new(a, LIMIT).unwrap();
    let channel = FdChannel::new(b, LIMIT).unwrap();
    source.write_all(&[Chunk::Bytes(bytes)]).unwrap();
    let store = memory(&[("pc.ram", 0x1e), ("vga", 2)]);
    let config = TargetConfig::new(decoder_config()).max_devices(1 << 16);
    let sink: Option<Box<dyn ByteSink>> = if has_return_path {
        Some(Box::new(channel.share()))
    } else {
        None
    };
    let target = Target::new(config, StreamReader::new(channel, b""), sink, &*store);
    let result = load_by(target, &*store, &mut NoDevices);
    let result = result.map(drop);
    let mut answer = Vec::new();
    let mut buffer = [0; 64];
    loop {
        match source.read(&mut buffer).unwrap() {
            0 => return (result, answer),
            n => answer.extend_from_slice(&buffer[..n]),
        }
    }
}

#[test]
fn commands_that_want_a_return_path() {
    let ping = unhex("08 0002 0004 00000007");
    let open = unhex("08 0001 0000");
    let end = [RAM_LIST, EOS, FOOTER_1, b"\0\x06\0\0\0\x02{}"].concat();
    let (before, ram) = START.split_at(24);
    for has_return_path in [false, true] {
        let (result, answer) = load(&[before, &ping].concat(), has_return_path);
        assert!(
            matches!(
                result,
                Err(TargetError::NoReturnPath {
                    command: CommandNumber::Ping,
                    offset: 24
                })
            ),
            "{result:?}"
        );
        assert_eq!(answer, b"");
    }
    // What is advised need not happen; what begins postcopy is refused by name.
    let advise = unhex("08 0003 0000");
    let (result, _) = load(&[before, &open, &advise, ram, &end].concat(), true);
    result.unwrap();
    let (result, _) = load(&[before, &advise, &advise].concat(), true);
    assert!(
        matches!(&result, Err(TargetError::Decode(e))
            if (e.offset, &e.cause) == (29, &OrderError::State {
                command: CommandNumber::PostcopyAdvise,
                state: PostcopyState::Advised,
            }.into())),
        "{result:?}"
    );
    let advise = unhex("08 0003 0010 00000000 00001000 00000000 00001000");
    let (result, _) = load(&[before, &open, &advise, ram, &end].concat(), true);
    result.unwrap();
    let package = unhex("08 0007 0004 00000020");
    let (result, answer) = load(
        &[
            before, &open, &advise, ram, RAM_LIST, EOS, FOOTER_1, &package,
        ]
        .concat(),
        true,
    );
    let error = result.unwrap_err().to_string();
    assert!(
        error.contains("Packaged") && error.contains("migrate-start-postcopy"),
        "{error}"
    );
    assert_eq!(answer, unhex("0001 0004 00000001"));
    // Twice is not wrong, and answers go out once.
    let (result, answer) = load(&[before, &open, &open, &ping, ram, &end].concat(), true);
    result.unwrap();
    assert_eq!(answer, unhex("0002 0004 00000007"));
}
