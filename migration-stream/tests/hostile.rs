//! Every codec gives back what it was given, and takes any bytes whatever for a value or an error:
//! no panic, and never more memory than a stated bound.
#![allow(clippy::tests_outside_test_module)] // this whole file is tests

mod common;

use std::collections::BTreeSet;
use std::convert::Infallible;

use common::{bytes_of, decode_all, payload_len};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::raw::codec::Reader;
use migration_stream::raw::command::{Command, DiscardRange, PostcopyAdvice, RamDiscard};
use migration_stream::raw::decoder::{Item, RamItem, Step, StreamDecoder};
use migration_stream::raw::device_blob::{DeviceSection, decode_device_blob, encode_device_blob};
use migration_stream::raw::opaque_tail::{Fed, OpaqueTail};
use migration_stream::raw::ram::PageAddress;
use migration_stream::raw::return_path::ReturnPathMessage;
use migration_stream::raw::section::{Announcement, Continuation};
use migration_stream::raw::vmdesc::VmDescription;
use migration_stream::{
    Configuration, ConfigurationRule, DecoderConfig, IdStr, InstanceId, MachineName, PAGE_SIZE,
    SectionHeader, SectionId, TailLimits,
};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::Index;

fn idstr() -> impl Strategy<Value = IdStr> {
    prop_oneof![
        "[a-z][a-z0-9./@:-]{0,20}",
        "[a-zé]{100}",
        Just("x".repeat(255))
    ]
    .prop_map(|s| IdStr::new(s).unwrap())
}

fn configuration() -> impl Strategy<Value = Configuration> {
    let machine = "[a-z0-9.-]{1,30}".prop_map(|s| MachineName::new(s).unwrap());
    (
        machine,
        prop_oneof![Just(None), Just(Some(12))],
        btree_set(idstr(), 0..4),
        any::<Option<[u8; 16]>>(),
    )
        .prop_map(|(machine, page_bits, capabilities, uuid)| Configuration {
            machine,
            page_bits,
            capabilities,
            uuid,
        })
}

fn discard() -> impl Strategy<Value = RamDiscard> {
    let range = any::<(u64, u64)>().prop_map(|(start, length)| DiscardRange { start, length });
    (idstr(), vec(range, 1..20)).prop_map(|(block, ranges)| RamDiscard::new(block, ranges).unwrap())
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::OpenReturnPath),
        any::<u32>().prop_map(Command::Ping),
        any::<Option<(u64, u64)>>().prop_map(|advice| Command::PostcopyAdvise(advice.map(
            |(ram_page_sizes, target_page_size)| PostcopyAdvice {
                ram_page_sizes,
                target_page_size
            }
        ))),
        Just(Command::PostcopyListen),
        Just(Command::PostcopyRun),
        discard().prop_map(Command::PostcopyRamDiscard),
        any::<u32>().prop_map(|size| Command::Packaged { size }),
        Just(Command::PostcopyResume),
        idstr().prop_map(Command::RecvBitmap),
        Just(Command::SwitchoverStart),
    ]
}

fn message() -> impl Strategy<Value = ReturnPathMessage> {
    prop_oneof![
        any::<u32>().prop_map(|status| ReturnPathMessage::Shut { status }),
        any::<u32>().prop_map(ReturnPathMessage::Pong),
        (any::<u64>(), any::<u32>(), idstr()).prop_map(|(start, length, block)| {
            ReturnPathMessage::ReqPagesId {
                start,
                length,
                block,
            }
        }),
        any::<(u64, u32)>()
            .prop_map(|(start, length)| ReturnPathMessage::ReqPages { start, length }),
        idstr().prop_map(|block| ReturnPathMessage::RecvBitmap { block }),
        any::<u32>().prop_map(|value| ReturnPathMessage::ResumeAck { value }),
        Just(ReturnPathMessage::SwitchoverAck),
    ]
}

fn header() -> impl Strategy<Value = SectionHeader> {
    (
        any::<bool>(),
        any::<u32>(),
        idstr(),
        any::<u32>(),
        any::<u32>(),
    )
        .prop_map(|(full, id, idstr, instance, version)| SectionHeader {
            kind: if full {
                Announcement::Full
            } else {
                Announcement::Start
            },
            id: SectionId(id),
            idstr,
            instance: InstanceId(instance),
            version,
        })
}

fn blocks() -> impl Strategy<Value = RamBlockTable> {
    btree_set(idstr(), 1..4)
        .prop_flat_map(|names| (Just(names.clone()), vec(1u64..1000, names.len())))
        .prop_map(|(names, pages)| {
            let blocks = names.iter().zip(pages);
            RamBlockTable::new(
                blocks
                    .map(|(name, pages)| RamBlock::new(name.as_str(), pages * PAGE_SIZE).unwrap())
                    .collect(),
            )
            .unwrap()
        })
}

/// The items of one RAM section's body.
fn ram_items(blocks: &RamBlockTable) -> impl Strategy<Value = Vec<Item>> + use<> {
    let blocks = blocks.clone();
    vec((any::<Index>(), any::<Index>(), 0..6u8), 0..8).prop_map(move |records| {
        let items = records.into_iter().map(|(block, page, kind)| {
            let index = block.index(blocks.len());
            let block = BlockId::new(u32::try_from(index).unwrap());
            let pages = usize::try_from(blocks.get(block).unwrap().pages()).unwrap();
            let page = PageAddress {
                block,
                offset: page.index(pages) as u64 * PAGE_SIZE,
            };
            Item::Ram(match kind {
                0 => RamItem::Page(page),
                1 => RamItem::MultifdFlush,
                _ => RamItem::Zero(page),
            })
        });
        items.chain([Item::Ram(RamItem::EndOfSection)]).collect()
    })
}

/// The items of a whole stream without device sections.
fn stream() -> impl Strategy<Value = Vec<Item>> {
    let id = SectionId(1);
    blocks()
        .prop_flat_map(move |blocks| {
            let section = (any::<bool>(), ram_items(&blocks)).prop_map(move |(end, items)| {
                let kind = if end {
                    Continuation::End
                } else {
                    Continuation::Part
                };
                let mut all = vec![Item::Continuation { kind, id }];
                all.extend(items);
                all.push(Item::Footer(id));
                all
            });
            let command = command().prop_map(|c| vec![Item::Command(c)]);
            (
                Just(blocks.clone()),
                configuration(),
                ram_items(&blocks),
                vec(prop_oneof![section, command], 0..4),
                0u32..100,
            )
        })
        .prop_map(move |(blocks, configuration, set_up, loops, len)| {
            let ram = SectionHeader {
                kind: Announcement::Start,
                id,
                idstr: IdStr::new("ram").unwrap(),
                instance: InstanceId(0),
                version: 4,
            };
            let mut items = vec![
                Item::Header,
                Item::Configuration(configuration),
                Item::Section(ram),
                Item::Ram(RamItem::BlockList(blocks)),
            ];
            items.extend(set_up);
            items.push(Item::Footer(id));
            items.extend(loops.into_iter().flatten());
            items.extend([Item::Eof, Item::VmDescription { len }]);
            items
        })
}

fn encoded(items: &[Item]) -> Vec<u8> {
    let mut payloads = items
        .iter()
        .map(payload_len)
        .filter(|len| *len > 0)
        .map(|len| vec![0xa5; len]);
    bytes_of(items, &mut payloads)
}

/// A change of valid bytes: some overwritten, some cut out, some put in.
#[derive(Clone, Debug)]
enum Mutation {
    Set(Index, u8),
    Flip(Index, u8),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    Truncate(Index),
}

fn mutations() -> impl Strategy<Value = Vec<Mutation>> {
    let one = prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(i, b)| Mutation::Set(i, b)),
        (any::<Index>(), 0u8..8).prop_map(|(i, b)| Mutation::Flip(i, b)),
        (any::<Index>(), 1usize..9).prop_map(|(i, n)| Mutation::Remove(i, n)),
        (any::<Index>(), vec(any::<u8>(), 1..9)).prop_map(|(i, b)| Mutation::Insert(i, b)),
        any::<Index>().prop_map(Mutation::Truncate),
    ];
    vec(one, 1..5)
}

fn mutate(bytes: &mut Vec<u8>, mutations: &[Mutation]) {
    for mutation in mutations {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        match mutation {
            Mutation::Set(i, b) => bytes[i.index(len)] = *b,
            Mutation::Flip(i, bit) => bytes[i.index(len)] ^= 1 << bit,
            Mutation::Remove(i, n) => {
                let i = i.index(len);
                bytes.drain(i..(i + n).min(len));
            }
            Mutation::Insert(i, new) => {
                let i = i.index(len);
                bytes.splice(i..i, new.iter().copied());
            }
            Mutation::Truncate(i) => bytes.truncate(i.index(len)),
        }
    }
}

fn any_config() -> DecoderConfig {
    DecoderConfig::new(ConfigurationRule::Any)
}

/// The bodies of these tests begin with the number of bytes that follow.
fn body_len(_: &SectionHeader, rest: &[u8]) -> Result<usize, Infallible> {
    Ok(rest.first().map_or(0, |n| 1 + usize::from(*n)))
}

fn blob() -> impl Strategy<Value = (Vec<SectionHeader>, Vec<Vec<u8>>)> {
    let body = vec(any::<u8>(), 0..40).prop_map(|mut body| {
        let len = u8::try_from(body.len()).unwrap();
        body.insert(0, len);
        body
    });
    let header = header().prop_map(|header| SectionHeader {
        kind: Announcement::Full,
        ..header
    });
    vec((header, body), 0..5).prop_map(|sections| sections.into_iter().unzip())
}

fn blob_bytes(headers: &[SectionHeader], bodies: &[Vec<u8>]) -> Vec<u8> {
    let mut out = Vec::new();
    let sections = headers.iter().zip(bodies);
    encode_device_blob(
        sections.map(|(header, body)| DeviceSection {
            header: header.clone(),
            body,
        }),
        &mut out,
    );
    out
}

proptest! {
    #[test]
    fn commands_read_back(command in command()) {
        let mut out = Vec::new();
        command.encode(&mut out);
        let mut r = Reader::new(&out[1..], 1);
        prop_assert_eq!(Command::decode(&mut r).unwrap(), command);
        prop_assert!(r.rest().is_empty());
        // Any beginning of it asks for more.
        for n in 1..out.len() {
            prop_assert!(Command::decode(&mut Reader::new(&out[1..n], 1)).unwrap_err().missing().is_some());
        }
    }

    #[test]
    fn return_path_messages_read_back(message in message()) {
        let mut out = Vec::new();
        message.encode(&mut out);
        prop_assert!(out.len() <= 4 + 512);
        let mut r = Reader::new(&out, 0);
        prop_assert_eq!(ReturnPathMessage::decode(&mut r).unwrap(), message);
        prop_assert!(r.rest().is_empty());
    }

    #[test]
    fn configurations_read_back_and_match_themselves(configuration in configuration()) {
        let mut out = Vec::new();
        configuration.encode(&mut out);
        out.push(0);
        let mut r = Reader::new(&out[1..], 9);
        prop_assert_eq!(&Configuration::decode_matching(&mut r, &configuration).unwrap(), &configuration);
        prop_assert_eq!(r.rest(), &[0]);
    }

    #[test]
    fn another_machine_type_never_matches(a in configuration(), b in configuration()) {
        let b = Configuration {
            capabilities: BTreeSet::clone(&a.capabilities),
            page_bits: a.page_bits,
            uuid: a.uuid,
            ..b
        };
        prop_assert_eq!(a.check(&b).is_ok(), a.machine == b.machine);
    }

    #[test]
    fn section_headers_read_back(header in header()) {
        let mut out = Vec::new();
        header.encode(&mut out);
        let mut r = Reader::new(&out[1..], 1);
        prop_assert_eq!(SectionHeader::decode(header.kind, &mut r).unwrap(), header);
        prop_assert!(r.rest().is_empty());
    }

    #[test]
    fn streams_read_back_item_by_item_however_they_are_cut_up(
        items in stream(),
        piece in 1usize..5000,
    ) {
        let bytes = encoded(&items);
        let mut decoder = StreamDecoder::new(any_config(), None);
        prop_assert_eq!(decode_all(&mut decoder, &bytes, piece).unwrap(), items);
    }

    #[test]
    fn device_blobs_read_back((headers, bodies) in blob()) {
        let bytes = blob_bytes(&headers, &bodies);
        let sections = decode_device_blob(&bytes, body_len).unwrap();
        prop_assert_eq!(sections.len(), headers.len());
        for ((section, header), body) in sections.iter().zip(&headers).zip(&bodies) {
            prop_assert_eq!(&section.header, header);
            prop_assert_eq!(section.body, body);
        }
    }

    #[test]
    fn a_mutated_stream_gives_items_or_an_error_and_never_asks_for_more_than_an_item(
        items in stream(),
        mutations in mutations(),
    ) {
        let mut bytes = encoded(&items);
        mutate(&mut bytes, &mutations);
        let mut decoder = StreamDecoder::new(any_config(), None);
        let mut start = 0;
        loop {
            let visible = bytes.get(start..).unwrap_or_default();
            let mut r = Reader::new(visible, start as u64);
            let Ok(step) = decoder.next(&mut r) else { break };
            start += r.consumed();
            match step {
                Step::Item(item) => start += payload_len(&item),
                Step::NeedMore { at_least } => {
                    let rest = visible.len() - r.consumed();
                    prop_assert!(rest + at_least <= migration_stream::raw::decoder::MAX_ITEM_LEN);
                    break;
                }
            }
        }
        // What is left goes through a checkpoint's decoder the same way.
        if let Ok(mut decoder) = decoder.into_checkpoint_decoder() {
            let mut r = Reader::new(bytes.get(start..).unwrap_or_default(), start as u64);
            while let Ok(Step::Item(_)) = decoder.next(&mut r) {}
        }
    }

    #[test]
    fn mutated_frames_give_a_value_or_an_error(
        command in command(),
        message in message(),
        configuration in configuration(),
        mutations in mutations(),
    ) {
        let mut bytes = Vec::new();
        command.encode(&mut bytes);
        mutate(&mut bytes, &mutations);
        let _ = Command::decode(&mut Reader::new(&bytes, 0));
        bytes.clear();
        message.encode(&mut bytes);
        mutate(&mut bytes, &mutations);
        if let Err(e) = ReturnPathMessage::decode(&mut Reader::new(&bytes, 0)) {
            prop_assert!(e.missing().unwrap_or(0) <= 4 + 512);
        }
        bytes.clear();
        configuration.encode(&mut bytes);
        mutate(&mut bytes, &mutations);
        let _ = Configuration::decode(&mut Reader::new(&bytes, 0));
    }

    #[test]
    fn a_mutated_blob_gives_sections_or_an_error(
        (headers, bodies) in blob(),
        mutations in mutations(),
    ) {
        let mut bytes = blob_bytes(&headers, &bodies);
        mutate(&mut bytes, &mutations);
        if let Ok(sections) = decode_device_blob(&bytes, body_len) {
            // What is taken for valid encodes to the same bytes.
            let mut again = Vec::new();
            encode_device_blob(sections, &mut again);
            prop_assert_eq!(again, bytes);
        }
    }
}

proptest! {
    // 19 KiB a case.
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_mutated_tail_gives_a_tail_or_an_error_within_its_limit(
        mutations in mutations(),
        piece in 1usize..9000,
        len in prop_oneof![Just(16usize << 10), Just(32 << 10)],
    ) {
        let mut bytes = include_bytes!("data/microvm-11.1.3.tail").to_vec();
        let mut r = Reader::new(&bytes[1..], 1);
        let header = SectionHeader::decode(Announcement::Full, &mut r).unwrap();
        let start = 1 + r.consumed();
        bytes.drain(..start);
        mutate(&mut bytes, &mutations);
        let limits = TailLimits { len, ..TailLimits::default() };
        let mut tail = OpaqueTail::beginning_with(&header, limits);
        for piece in bytes.chunks(piece) {
            match tail.feed(piece) {
                Ok(Fed::NeedMore) => {}
                Ok(Fed::Complete { tail, .. }) => {
                    prop_assert!(tail.as_bytes().len() <= limits.len);
                    break;
                }
                Err(_) => break,
            }
        }
    }

    #[test]
    fn a_mutated_description_gives_a_value_or_an_error(mutations in mutations()) {
        let tail = include_bytes!("data/microvm-11.1.3.tail");
        let mut json = tail[tail.len() - 15317..].to_vec();
        assert!(VmDescription::parse(&json).is_ok());
        mutate(&mut json, &mutations);
        let _ = VmDescription::parse(&json);
    }
}
