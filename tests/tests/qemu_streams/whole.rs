//! A captured main stream taken apart by `migration-stream`'s decoder, and put together again by
//! its encoders.

use std::collections::HashMap;

use migration_stream::ram::RamBlockTable;
use migration_stream::raw::codec::Reader;
use migration_stream::raw::decoder::{Item, RamItem, Step, StreamDecoder};
use migration_stream::raw::ram::{PageAddress, RecordEncoder};
use migration_stream::raw::{ram, section};
use migration_stream::{Configuration, ConfigurationRule, DecoderConfig, PAGE_SIZE, SectionId};
use tests::Result;

/// Everything that stood in a stream, in order, with the payloads beside their items.
#[derive(Debug)]
pub struct Whole {
    parts: Vec<(Item, Vec<u8>)>,
    blocks: RamBlockTable,
}

impl Whole {
    /// Decodes `stream` to its last byte.
    pub fn decode(stream: &[u8]) -> Result<Self> {
        let mut decoder = StreamDecoder::new(DecoderConfig::new(ConfigurationRule::Any), None);
        let mut parts = Vec::new();
        let mut at = 0;
        while at < stream.len() {
            let mut reader = Reader::new(&stream[at..], at as u64);
            let item = match decoder.next(&mut reader)? {
                Step::Item(item) => item,
                Step::NeedMore { at_least } => {
                    return Err(format!("{at_least} bytes missing at {at:#x}").into());
                }
            };
            at += reader.consumed();
            let payload = match &item {
                Item::Ram(RamItem::Page(_)) => usize::try_from(PAGE_SIZE)?,
                Item::VmDescription { len } => usize::try_from(*len)?,
                Item::Section(header) if header.idstr.as_str() != ram::RAM_IDSTR => {
                    device_body_len(&stream[at..], header.id)?
                }
                _ => 0,
            };
            let bytes = stream
                .get(at..at + payload)
                .ok_or_else(|| format!("{payload} bytes of payload missing at {at:#x}"))?;
            at += payload;
            parts.push((item, bytes.to_vec()));
        }
        let blocks = decoder.blocks().ok_or("a stream without RAM")?.clone();
        Ok(Self { parts, blocks })
    }

    /// The stream again, from the items alone.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut records = RecordEncoder::new();
        for (item, payload) in &self.parts {
            match item {
                Item::Header => migration_stream::raw::header::encode(&mut out),
                Item::Configuration(configuration) => configuration.encode(&mut out),
                Item::Command(command) => command.encode(&mut out),
                Item::Section(header) => header.encode(&mut out),
                Item::Continuation { kind, id } => {
                    section::encode_continuation(*kind, *id, &mut out);
                }
                Item::Ram(RamItem::BlockList(blocks)) => {
                    ram::encode_setup_list(blocks, &mut out);
                }
                Item::Ram(RamItem::MappedBlock { .. }) => return Err("a mapped block".into()),
                Item::Ram(RamItem::Page(page)) => records.page(*page, &self.blocks, &mut out)?,
                Item::Ram(RamItem::Zero(page)) => records.zero(*page, &self.blocks, &mut out)?,
                Item::Ram(RamItem::Xbzrle { page, len }) => {
                    records.xbzrle(*page, *len, &self.blocks, &mut out)?;
                }
                Item::Ram(RamItem::MultifdFlush) => ram::encode_multifd_flush(&mut out),
                Item::Ram(RamItem::EndOfSection) => ram::encode_end_of_section(&mut out),
                Item::Footer(id) => section::encode_footer(*id, &mut out),
                Item::Eof => section::encode_eof(&mut out),
                Item::VmDescription { len } => section::encode_vm_description(*len, &mut out),
            }
            out.extend_from_slice(payload);
        }
        Ok(out)
    }

    /// The items alone.
    pub fn items(&self) -> impl Iterator<Item = &Item> {
        self.parts.iter().map(|(item, _)| item)
    }

    pub fn configuration(&self) -> Option<&Configuration> {
        self.items().find_map(|item| match item {
            Item::Configuration(configuration) => Some(configuration),
            _ => None,
        })
    }

    /// The idstr, instance and version of each device, in order.
    pub fn devices(&self) -> Vec<(String, u64, u64)> {
        self.items()
            .filter_map(|item| match item {
                Item::Section(h) if h.idstr.as_str() != ram::RAM_IDSTR => Some((
                    h.idstr.as_str().to_owned(),
                    u64::from(h.instance.0),
                    u64::from(h.version),
                )),
                _ => None,
            })
            .collect()
    }

    /// The same as the description after the stream has it.
    pub fn described_devices(&self) -> Result<Vec<(String, u64, u64)>> {
        let Some((Item::VmDescription { .. }, text)) = self.parts.last() else {
            return Err("no description at the end".into());
        };
        let description: serde_json::Value = serde_json::from_slice(text)?;
        assert_eq!(description["page_size"], PAGE_SIZE);
        description["devices"]
            .as_array()
            .ok_or("no devices in the description")?
            .iter()
            .map(|d| {
                let name = d["name"].as_str().ok_or("a device without name")?;
                let instance = d["instance_id"].as_u64().ok_or("no instance")?;
                let version = d["version"].as_u64().ok_or("no version")?;
                Ok((name.to_owned(), instance, version))
            })
            .collect()
    }

    /// The content of the RAM block called `name` after every record was taken in order.
    pub fn memory(&self, name: &str) -> Result<Vec<u8>> {
        let id = self
            .blocks
            .find(name.as_bytes())
            .ok_or_else(|| format!("no RAM block {name} among {:?}", self.blocks))?;
        let length = self.blocks.get(id).map_or(0, |b| b.used_length());
        let mut memory = vec![0; usize::try_from(length)?];
        for (item, payload) in &self.parts {
            let (page, content) = match item {
                Item::Ram(RamItem::Page(page)) => (page, payload.as_slice()),
                Item::Ram(RamItem::Zero(page)) => (page, [0; 4096].as_slice()),
                _ => continue,
            };
            if page.block == id {
                let start = usize::try_from(page.offset)?;
                memory[start..start + content.len()].copy_from_slice(content);
            }
        }
        Ok(memory)
    }

    /// How often each page was sent, with data or as zero.
    pub fn sendings(&self) -> HashMap<PageAddress, u32> {
        let mut sendings = HashMap::new();
        for item in self.items() {
            if let Item::Ram(RamItem::Page(page) | RamItem::Zero(page)) = item {
                *sendings.entry(*page).or_default() += 1;
            }
        }
        sendings
    }
}

/// Length of a device's body, which the stream does not say: up to the device's own footer, where
/// the next section or the stream's end follows.
fn device_body_len(bytes: &[u8], id: SectionId) -> Result<usize> {
    let mut footer = Vec::new();
    section::encode_footer(id, &mut footer);
    let is_next = |rest: &[u8]| matches!(rest, [0x04, ..] | [0x00, 0x06, ..]);
    bytes
        .windows(footer.len())
        .enumerate()
        .find(|(at, w)| *w == footer && is_next(&bytes[at + footer.len()..]))
        .map(|(at, _)| at)
        .ok_or_else(|| format!("section {id} has no footer").into())
}
