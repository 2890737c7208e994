//! What the decoder of the main stream promises: every item of QEMU's bytes, however they arrive,
//! and a named error for what cannot be.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use common::{bytes_of, decode_all, table};
use migration_stream::ram::BlockId;
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::Command;
use migration_stream::raw::decoder::{Item, RamItem, Step, StreamDecoder};
use migration_stream::raw::ram::{PageAddress, RamError};
use migration_stream::raw::section::{Announcement, Continuation, SectionError};
use migration_stream::{
    Cause, Configuration, ConfigurationError, ConfigurationRule, DecodeError, DecoderConfig, IdStr,
    InstanceId, MachineName, SectionHeader, SectionId,
};

/// Header and configuration of a q35 of QEMU 11.1, and the head of its RAM section, as captured.
const START: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1\
    \x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04";
const RAM_LIST: &[u8] =
    b"\0\0\0\0\0\x02\0\x04\x06pc.ram\0\0\0\0\0\x01\xe0\0\x03vga\0\0\0\0\0\0\x20\0";
const EOS: &[u8] = b"\0\0\0\0\0\0\0\x10";
const FLUSH: &[u8] = b"\0\0\0\0\0\0\x02\0";
const FOOTER_1: &[u8] = b"\x7e\0\0\0\x01";

fn config() -> DecoderConfig {
    let machine = MachineName::new("pc-q35-11.1").unwrap();
    DecoderConfig::new(ConfigurationRule::Matching(Configuration::new(machine)))
}

fn decoder() -> StreamDecoder {
    let blocks = table(&[("pc.ram", 0x1e000), ("vga", 0x2000)]);
    StreamDecoder::new(config(), Some(blocks))
}

fn ram_header() -> Item {
    Item::Section(SectionHeader {
        kind: Announcement::Start,
        id: SectionId(1),
        idstr: IdStr::new("ram").unwrap(),
        instance: InstanceId(0),
        version: 4,
    })
}

fn set_up() -> Vec<u8> {
    [START, RAM_LIST, EOS, FOOTER_1].concat()
}

/// Why a decoder that has read the set-up refuses what follows.
fn refused_after_set_up(bytes: &[u8]) -> Cause {
    refused(&[&set_up(), bytes].concat())
}

fn refused(bytes: &[u8]) -> Cause {
    decode_all(&mut decoder(), bytes, bytes.len())
        .unwrap_err()
        .cause
}

/// A stream with everything that precopy with multifd and a return path has in it.
fn whole_stream() -> (Vec<u8>, Vec<Item>) {
    let page = |block, offset| PageAddress {
        block: BlockId::new(block),
        offset,
    };
    let end = |kind| Item::Continuation {
        kind,
        id: SectionId(1),
    };
    let bytes = [
        START,
        RAM_LIST,
        FLUSH,
        EOS,
        FOOTER_1,
        b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01",
        b"\x02\0\0\0\x01",
        b"\0\0\0\0\0\0\0\x08\x06pc.ram",
        &[0xa5; 4096],
        b"\0\0\0\0\0\0\x10\x22\0",
        EOS,
        FOOTER_1,
        b"\x08\0\x0b\0\0",
        b"\x03\0\0\0\x01",
        // The block is still the one named in the section before.
        b"\0\0\0\0\0\0\x20\x28",
        &[0x5a; 4096],
        EOS,
        FOOTER_1,
        b"\0\x06\0\0\0\x02{}",
    ]
    .concat();
    let items = vec![
        Item::Header,
        Item::Configuration(Configuration::new(MachineName::new("pc-q35-11.1").unwrap())),
        ram_header(),
        Item::Ram(RamItem::BlockList(table(&[
            ("pc.ram", 0x1e000),
            ("vga", 0x2000),
        ]))),
        Item::Ram(RamItem::MultifdFlush),
        Item::Ram(RamItem::EndOfSection),
        Item::Footer(SectionId(1)),
        Item::Command(Command::OpenReturnPath),
        Item::Command(Command::Ping(1)),
        end(Continuation::Part),
        Item::Ram(RamItem::Page(page(0, 0))),
        Item::Ram(RamItem::Zero(page(0, 0x1000))),
        Item::Ram(RamItem::EndOfSection),
        Item::Footer(SectionId(1)),
        Item::Command(Command::SwitchoverStart),
        end(Continuation::End),
        Item::Ram(RamItem::Page(page(0, 0x2000))),
        Item::Ram(RamItem::EndOfSection),
        Item::Footer(SectionId(1)),
        Item::Eof,
        Item::VmDescription { len: 2 },
    ];
    (bytes, items)
}

#[test]
fn a_stream_decodes_to_the_same_items_however_it_is_cut_up() {
    let (bytes, items) = whole_stream();
    for piece in [1, 2, 3, 7, 64, 4096, bytes.len()] {
        assert_eq!(decode_all(&mut decoder(), &bytes, piece).unwrap(), items);
    }
}

#[test]
fn what_was_decoded_encodes_to_the_same_bytes() {
    let (bytes, items) = whole_stream();
    let mut payloads =
        vec![[0xa5; 4096].to_vec(), [0x5a; 4096].to_vec(), b"{}".to_vec()].into_iter();
    assert_eq!(bytes_of(&items, &mut payloads), bytes);
}

#[test]
fn a_tool_without_memory_learns_the_blocks_from_the_stream() {
    let (bytes, items) = whole_stream();
    let mut decoder = StreamDecoder::new(DecoderConfig::new(ConfigurationRule::Any), None);
    assert_eq!(decode_all(&mut decoder, &bytes, 100).unwrap(), items);
    assert_eq!(decoder.blocks().unwrap().total_bytes(), 0x20000);
}

#[test]
fn a_stream_without_configuration_and_footers_is_read_when_that_was_agreed() {
    let mut config = DecoderConfig::new(ConfigurationRule::Absent);
    config = config.footers(false);
    let bytes = [
        b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04",
        RAM_LIST,
        EOS,
        b"\x03\0\0\0\x01",
        EOS,
        b"\0",
    ]
    .concat();
    let items = decode_all(&mut StreamDecoder::new(config, None), &bytes, 5).unwrap();
    assert_eq!(items.last(), Some(&Item::Eof));
    assert!(!items.iter().any(|i| matches!(i, Item::Footer(_))));
}

#[test]
fn a_tool_reads_a_stream_with_a_configuration_section_and_without() {
    let (bytes, items) = whole_stream();
    let config = || DecoderConfig::new(ConfigurationRule::AnyOrAbsent);
    for piece in [1, 100] {
        let mut decoder = StreamDecoder::new(config(), None);
        assert_eq!(decode_all(&mut decoder, &bytes, piece).unwrap(), items);
    }
    let old = [
        b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04",
        RAM_LIST,
        EOS,
        b"\x7e\0\0\0\x01\0",
    ]
    .concat();
    for piece in [1, 100] {
        let mut decoder = StreamDecoder::new(config(), None);
        let items = decode_all(&mut decoder, &old, piece).unwrap();
        assert!(matches!(items[..2], [Item::Header, Item::Section(_)]));
        assert_eq!(items.last(), Some(&Item::Eof));
    }
    // Nothing that can stand there.
    let mut decoder = StreamDecoder::new(config(), None);
    assert!(decode_all(&mut decoder, b"QEVM\0\0\0\x03\x09", 100).is_err());
}

#[test]
fn a_block_list_has_page_sizes_after_an_advice_that_names_them() {
    // As QEMU 11.1 sends it with postcopy-ram and RAM in huge pages of 2 MiB.
    let bytes = [
        b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-11.1".as_slice(),
        b"\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0",
        b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
        b"\0\0\0\0\x02\x04\0\x04",
        b"\x03mem\0\0\0\0\x02\0\0\0\0\0\0\0\0\x20\0\0",
        b"\x0bpc.bios.rom\0\0\0\0\0\x04\0\0",
        EOS,
        b"\x7e\0\0\0\x02\0",
    ]
    .concat();
    for piece in [1, 7, 1000] {
        let mut decoder = StreamDecoder::new(DecoderConfig::new(ConfigurationRule::Any), None);
        let items = decode_all(&mut decoder, &bytes, piece).unwrap();
        assert_eq!(items.last(), Some(&Item::Eof));
        let blocks = decoder.blocks().unwrap();
        assert_eq!((blocks.len(), blocks.total_bytes()), (2, 0x204_0000));
    }
}

#[test]
fn more_is_asked_for_as_long_as_an_item_is_not_there() {
    let mut r = Reader::new(b"QEVM\0", 0);
    let step = decoder().next(&mut r).unwrap();
    assert_eq!(step, Step::NeedMore { at_least: 3 });
    assert_eq!(r.consumed(), 0);
}

#[test]
fn c4_a_prefix_of_the_machine_type_is_refused_before_another_byte_comes() {
    assert!(matches!(
        refused(b"QEVM\0\0\0\x03\x07\0\0\0\x06pc-q35"),
        Cause::Configuration(ConfigurationError::Machine { .. })
    ));
}

#[test]
fn c5_part_and_end_of_id_0_are_refused_like_any_that_was_not_announced() {
    for kind in [2, 3] {
        for id in [0u8, 7] {
            assert_eq!(
                refused_after_set_up(&[kind, 0, 0, 0, id]),
                SectionError::NotAnnounced {
                    id: SectionId(id.into())
                }
                .into()
            );
        }
    }
    // On a fresh stream, where QEMU takes its first device for it.
    assert_eq!(
        refused(&[&START[..24], &[2, 0, 0, 0, 0]].concat()),
        SectionError::NotAnnounced { id: SectionId(0) }.into()
    );
}

#[test]
fn c18_a_block_list_that_overruns_its_total_is_refused() {
    let mut list = RAM_LIST.to_vec();
    list[5] = 1;
    assert_eq!(
        refused(&[START, &list].concat()),
        RamError::SetupOverrun {
            name: "pc.ram".into(),
            used_length: 0x1e000,
            remaining: 0x10000,
        }
        .into()
    );
}

#[test]
fn c18_a_block_list_that_ends_early_is_not_taken_for_complete() {
    let mut list = RAM_LIST.to_vec();
    list[6] = 0x10; // 4 KiB more than the blocks have
    let stream = [START, &list, EOS, FOOTER_1].concat();
    // The bytes of EOS are read as an entry, and are none.
    assert!(matches!(refused(&stream), Cause::IdStr(_)));
}

#[test]
fn c19_a_description_beyond_the_limit_is_refused_by_its_length_alone() {
    assert_eq!(
        refused_after_set_up(b"\0\x06\xff\xff\xff\xff"),
        SectionError::DescriptionLength {
            len: u32::MAX,
            max: DecoderConfig::DEFAULT_MAX_DESCRIPTION,
        }
        .into()
    );
}

#[test]
fn a_section_ends_with_its_own_footer() {
    let end_of_ram = [START, RAM_LIST, EOS].concat();
    assert_eq!(
        refused(&[&end_of_ram, &b"\x04"[..]].concat()),
        SectionError::FooterMissing {
            id: SectionId(1),
            found: 4
        }
        .into()
    );
    assert_eq!(
        refused(&[&end_of_ram, &b"\x7e\0\0\0\x02"[..]].concat()),
        SectionError::FooterMismatch {
            id: SectionId(1),
            found: SectionId(2)
        }
        .into()
    );
}

#[test]
fn unknown_and_misplaced_section_types_are_refused() {
    for found in [5, 6, 7, 9, 0x7e, 0xff] {
        assert_eq!(
            refused_after_set_up(&[found]),
            SectionError::UnexpectedType { found }.into()
        );
    }
    let e = decode_all(&mut decoder(), b"QEVM\0\0\0\x03\x01", 9).unwrap_err();
    assert_eq!(
        (e.offset, e.cause),
        (8, ConfigurationError::Missing { found: 1 }.into())
    );
}

#[test]
fn pages_before_the_block_list_are_refused() {
    assert_eq!(
        refused(&[START, b"\0\0\0\0\0\0\0\x08\x03vga"].concat()),
        RamError::SetupMissing { flags: 8 }.into()
    );
}

#[test]
fn ram_is_set_up_once() {
    assert_eq!(
        refused_after_set_up(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04"),
        RamError::UnexpectedSetup.into()
    );
    assert_eq!(
        refused_after_set_up(&[b"\x02\0\0\0\x01", RAM_LIST].concat()),
        RamError::UnexpectedSetup.into()
    );
}

#[test]
fn there_is_one_ram_section() {
    assert_eq!(
        refused(&[&START[..24], b"\x01\0\0\0\x01\x03ram\0\0\0\x01\0\0\0\x04"].concat()),
        SectionError::Instance {
            idstr: IdStr::new("ram").unwrap(),
            instance: InstanceId(1)
        }
        .into()
    );
}

#[test]
fn an_id_stands_for_one_section() {
    assert_eq!(
        refused_after_set_up(b"\x04\0\0\0\x01\x01x\0\0\0\0\0\0\0\x01"),
        SectionError::AnnouncedTwice {
            id: SectionId(1),
            idstr: IdStr::new("x").unwrap()
        }
        .into()
    );
}

#[test]
fn a_device_body_is_the_drivers_and_its_footer_the_decoders() {
    let mut decoder = decoder();
    let bytes = [&set_up(), &b"\x04\0\0\0\x09\x05timer\0\0\0\0\0\0\0\x02"[..]].concat();
    let items = decode_all(&mut decoder, &bytes, 11).unwrap();
    assert!(matches!(items.last(), Some(Item::Section(h)) if h.idstr.as_str() == "timer"));
    // The driver has taken 24 bytes of body.
    let mut r = Reader::new(b"\x7e\0\0\0\x09\0", bytes.len() as u64 + 24);
    assert_eq!(
        decoder.next(&mut r).unwrap(),
        Step::Item(Item::Footer(SectionId(9)))
    );
    assert_eq!(decoder.next(&mut r).unwrap(), Step::Item(Item::Eof));
}

#[test]
fn nothing_follows_the_description() {
    let (bytes, _) = whole_stream();
    let mut decoder = decoder();
    decode_all(&mut decoder, &bytes, bytes.len()).unwrap();
    assert_eq!(
        decoder.next(&mut Reader::new(b"\0", 0)).unwrap_err().cause,
        SectionError::AfterEnd.into()
    );
}

#[test]
fn a_new_connection_goes_on_with_a_section_and_names_the_block_again() {
    let page: &[u8] = b"\0\0\0\0\0\0\x10\x02\x03vga\0";
    let mut decoder = decoder();
    assert!(decoder.reconnected().is_err());
    let broken = [&set_up()[..], b"\x02\0\0\0\x01", page, &EOS[..3]].concat();
    decode_all(&mut decoder, &broken, broken.len()).unwrap();
    decoder.reconnected().unwrap();
    let mut again = decoder;
    let items = decode_all(
        &mut again,
        &[b"\x08\0\x09\0\0", &b"\x02\0\0\0\x01"[..], page].concat(),
        1,
    )
    .unwrap();
    assert_eq!(items[0], Item::Command(Command::PostcopyResume));
    assert!(matches!(items[2], Item::Ram(RamItem::Zero(_))));
    again.reconnected().unwrap();
    let e = decode_all(&mut again, b"\x02\0\0\0\x01\0\0\0\0\0\0\x20\x22\0", 1).unwrap_err();
    assert_eq!(e.cause, RamError::NothingToContinue.into());
}

mod checkpoint {
    use super::*;
    use migration_stream::raw::decoder::CheckpointDecoder;

    fn decoder() -> CheckpointDecoder {
        let (bytes, _) = whole_stream();
        let mut decoder = super::decoder();
        decode_all(&mut decoder, &bytes, bytes.len()).unwrap();
        decoder.into_checkpoint_decoder().unwrap()
    }

    fn next(decoder: &mut CheckpointDecoder, r: &mut Reader<'_>) -> Result<Item, DecodeError> {
        match decoder.next(r)? {
            Step::Item(item) => Ok(item),
            Step::NeedMore { .. } => panic!("complete items only"),
        }
    }

    #[test]
    fn checkpoints_go_on_with_the_ids_and_blocks_of_the_stream() {
        let mut decoder = decoder();
        for _ in 0..2 {
            let bytes = [
                b"\x03\0\0\0\x01",
                b"\0\0\0\0\0\0\x10\x22\0".as_slice(),
                FLUSH,
                FLUSH,
                EOS,
                FOOTER_1,
                b"\0",
            ]
            .concat();
            let mut r = Reader::new(&bytes, 0x9999);
            let mut items = Vec::new();
            while items.last() != Some(&Item::Eof) {
                items.push(next(&mut decoder, &mut r).unwrap());
            }
            assert_eq!(items.len(), 7);
            // The block was named in the precopy part, two sections ago.
            assert_eq!(
                items[1],
                Item::Ram(RamItem::Zero(PageAddress {
                    block: BlockId::new(0),
                    offset: 0x1000
                }))
            );
        }
    }

    #[test]
    fn ram_cannot_be_set_up_again() {
        let e = next(
            &mut decoder(),
            &mut Reader::new(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04", 0),
        )
        .unwrap_err();
        assert!(matches!(
            e.cause,
            Cause::Section(SectionError::AnnouncedInCheckpoint { .. })
        ));
        let mut decoder = decoder();
        let bytes = [b"\x03\0\0\0\x01", RAM_LIST].concat();
        let mut r = Reader::new(&bytes, 0);
        next(&mut decoder, &mut r).unwrap();
        assert_eq!(
            next(&mut decoder, &mut r).unwrap_err().cause,
            RamError::UnexpectedSetup.into()
        );
    }

    #[test]
    fn c5_id_0_is_not_announced_in_a_checkpoint_either() {
        let e = next(&mut decoder(), &mut Reader::new(&[3, 0, 0, 0, 0], 0)).unwrap_err();
        assert_eq!(
            e.cause,
            SectionError::NotAnnounced { id: SectionId(0) }.into()
        );
    }

    #[test]
    fn there_are_no_checkpoints_before_ram_is_set_up() {
        assert_eq!(
            super::decoder().into_checkpoint_decoder().unwrap_err(),
            RamError::NotSetUp
        );
        let mut decoder = super::decoder();
        let bytes = [START, RAM_LIST].concat();
        decode_all(&mut decoder, &bytes, bytes.len()).unwrap();
        assert!(decoder.into_checkpoint_decoder().is_err());
    }
}
