//! Streams that no QEMU is needed for.
#![allow(dead_code)] // not every test wants each of them

use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::raw::configuration::MAPPED_RAM;
use migration_stream::raw::header;
use migration_stream::raw::mapped_ram::MappedArea;
use migration_stream::raw::ram::{
    PageAddress, RAM_IDSTR, RAM_VERSION, RecordEncoder, encode_end_of_section, encode_setup_list,
};
use migration_stream::raw::section::{
    Announcement, Continuation, encode_continuation, encode_eof, encode_footer,
    encode_vm_description,
};
use migration_stream::{Configuration, IdStr, InstanceId, MachineName, SectionHeader, SectionId};

/// Its RAM section.
pub const RAM: SectionId = SectionId(2);
/// A device section before RAM.
const EARLY: SectionId = SectionId(9);
/// Its device section.
pub const DEVICE: SectionId = SectionId(3);

pub fn section(kind: Announcement, id: SectionId, idstr: &str, version: u32, out: &mut Vec<u8>) {
    let header = SectionHeader {
        kind,
        id,
        idstr: IdStr::new(idstr).unwrap(),
        instance: InstanceId(0),
        version,
    };
    header.encode(out);
}

/// A block of eight pages: 1 and 2 with content, 2 again, 3 zero, a difference to 1; and a device.
pub fn whole() -> Vec<u8> {
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new("pc-q35-11.1").unwrap()).encode(&mut out);
    ram(&mut out);
    device("device", "level", &mut out);
    out
}

/// The same with a device before RAM, whose body has `early`.
pub fn with_early(early: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new("pc-q35-11.1").unwrap()).encode(&mut out);
    section(Announcement::Full, EARLY, "first", 1, &mut out);
    out.extend(early);
    encode_footer(EARLY, &mut out);
    ram(&mut out);
    section(Announcement::Full, DEVICE, "device", 3, &mut out);
    out.extend([0, 0, 1, 2]);
    encode_footer(DEVICE, &mut out);
    encode_eof(&mut out);
    let json = serde_json::json!({"page_size": 4096, "devices": [
        {"name": "first", "instance_id": 0, "vmsd_name": "first", "version": 1,
            "fields": [{"name": "bytes", "type": "buffer", "size": early.len()}]},
        {"name": "device", "instance_id": 0, "vmsd_name": "device", "version": 3,
            "fields": [{"name": "level", "type": "uint32", "size": 4}]}]});
    let json = json.to_string();
    encode_vm_description(u32::try_from(json.len()).unwrap(), &mut out);
    out.extend(json.as_bytes());
    out
}

/// [`whole`] with a device body of `len` bytes.
pub fn with_device_state(len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new("pc-q35-11.1").unwrap()).encode(&mut out);
    ram(&mut out);
    section(Announcement::Full, DEVICE, "device", 3, &mut out);
    out.resize(out.len() + len, 0);
    encode_footer(DEVICE, &mut out);
    encode_eof(&mut out);
    let json = serde_json::json!({"page_size": 4096, "devices": [{"name": "device", "instance_id": 0,
        "vmsd_name": "device", "version": 3,
        "fields": [{"name": "memory", "type": "buffer", "size": len}]}]});
    let json = json.to_string();
    encode_vm_description(u32::try_from(json.len()).unwrap(), &mut out);
    out.extend(json.as_bytes());
    out
}

/// The same of a source that sends no configuration section (`send-configuration=off`).
pub fn without_configuration() -> Vec<u8> {
    let mut out = Vec::new();
    header::encode(&mut out);
    ram(&mut out);
    device("device", "level", &mut out);
    out
}

/// The same with this name for the device and for its field.
pub fn named(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new(name).unwrap()).encode(&mut out);
    ram(&mut out);
    device(name, name, &mut out);
    out
}

/// The beginning of a stream whose second section has this name and is in use.
pub fn cut(name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new("pc").unwrap()).encode(&mut out);
    ram(&mut out);
    section(Announcement::Full, RAM, name, 1, &mut out);
    out
}

/// A stream with mapped-ram as far as the place of its first block.
pub fn mapped() -> Vec<u8> {
    let blocks = RamBlockTable::new(vec![RamBlock::new("ram", 8 << 12).unwrap()]).unwrap();
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new("pc").unwrap())
        .with(MAPPED_RAM)
        .encode(&mut out);
    section(Announcement::Start, RAM, RAM_IDSTR, RAM_VERSION, &mut out);
    encode_setup_list(&blocks, &mut out);
    let header_end = out.len() as u64 + 28;
    MappedArea::place(header_end, 8 << 12)
        .unwrap()
        .encode(&mut out);
    out.resize(3 << 20, 0);
    out
}

/// Length of what stands between the header and the stream of an image of libvirt, bytes.
const LIBVIRT_DATA: u32 = 0x1_079e;

/// An image as `virsh save` writes it, of this format (0: not compressed).
pub fn libvirt(format: u32, stream: &[u8]) -> Vec<u8> {
    let mut out = b"LibvirtQemudSave".to_vec();
    let xml = b"<domain type='kvm'>...</domain>\0";
    // As libvirt 9.0 has them: the stream begins where the XML, a cookie and 64 KiB of room end.
    for word in [2, LIBVIRT_DATA, 1, format, 0x6b2] {
        out.extend(word.to_le_bytes());
    }
    out.resize(92, 0);
    out.extend(xml);
    out.resize(92 + usize::try_from(LIBVIRT_DATA).unwrap(), 0);
    out.extend(stream);
    out
}

/// A stream of a guest with so many pages, each with content.
pub fn of_pages(count: u64) -> Vec<u8> {
    let blocks = RamBlockTable::new(vec![RamBlock::new("ram", count << 12).unwrap()]).unwrap();
    let mut out = Vec::new();
    header::encode(&mut out);
    Configuration::new(MachineName::new("pc-q35-11.1").unwrap()).encode(&mut out);
    section(Announcement::Start, RAM, RAM_IDSTR, RAM_VERSION, &mut out);
    encode_setup_list(&blocks, &mut out);
    encode_end_of_section(&mut out);
    encode_footer(RAM, &mut out);
    encode_continuation(Continuation::End, RAM, &mut out);
    let mut records = RecordEncoder::new();
    for page in 0..count {
        let address = PageAddress {
            block: BlockId::new(0),
            offset: page << 12,
        };
        records.page(address, &blocks, &mut out).unwrap();
        out.extend([9; 4096]);
    }
    encode_end_of_section(&mut out);
    encode_footer(RAM, &mut out);
    device("device", "level", &mut out);
    out
}

fn ram(out: &mut Vec<u8>) {
    let blocks = RamBlockTable::new(vec![RamBlock::new("ram", 8 << 12).unwrap()]).unwrap();
    let page = |page: u64| PageAddress {
        block: BlockId::new(0),
        offset: page << 12,
    };
    section(Announcement::Start, RAM, RAM_IDSTR, RAM_VERSION, out);
    encode_setup_list(&blocks, out);
    encode_end_of_section(out);
    encode_footer(RAM, out);
    encode_continuation(Continuation::End, RAM, out);
    let mut records = RecordEncoder::new();
    for (at, fill) in [(1, 7), (2, 8), (2, 9)] {
        records.page(page(at), &blocks, out).unwrap();
        out.extend([fill; 4096]);
    }
    records.zero(page(3), &blocks, out).unwrap();
    records.xbzrle(page(1), 3, &blocks, out).unwrap();
    out.extend([4, 1, 0xee]);
    encode_end_of_section(out);
    encode_footer(RAM, out);
}

/// A device with one field, and the description.
fn device(name: &str, field: &str, out: &mut Vec<u8>) {
    section(Announcement::Full, DEVICE, name, 3, out);
    out.extend([0, 0, 1, 2]);
    encode_footer(DEVICE, out);
    encode_eof(out);
    let json = serde_json::json!({"page_size": 4096, "devices": [{"name": name, "instance_id": 0,
        "vmsd_name": "device", "version": 3,
        "fields": [{"name": field, "type": "uint32", "size": 4}]}]});
    let json = json.to_string();
    encode_vm_description(u32::try_from(json.len()).unwrap(), out);
    out.extend(json.as_bytes());
}
