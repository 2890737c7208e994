//! The device tree on the wire: a device blob out, staged state in.

use migration_stream::PAGE_SIZE;
use migration_stream::codec::IdStr;
use migration_stream::device_blob::{DeviceSection, decode_device_blob, encode_device_blob};
use migration_stream::early::EarlySections;
use migration_stream::precopy::{BoxError, FIRST_DEVICE_SECTION};
use migration_stream::section::{Announcement, InstanceId, SectionHeader, SectionId};
use vmstate::{DeviceTree, LoadError, SavedSection, Staged, Vmdesc};

/// Appends the state of all devices to `out`, as a COLO checkpoint carries it.
///
/// # Errors
/// The device that could not be saved.
pub fn save(tree: &mut DeviceTree, out: &mut Vec<u8>) -> Result<(), BoxError> {
    let sections = tree.save_all()?;
    encode(&sections, 0, out)
}

/// As [`save`], behind the sections of `early` that were sent before RAM, and returns the JSON text that
/// describes both.
///
/// # Errors
/// As there.
pub fn save_described(
    tree: &mut DeviceTree,
    early: Early,
    out: &mut Vec<u8>,
) -> Result<String, BoxError> {
    let (sections, description) = tree.save_all_described()?;
    encode(&sections, early.sections.len(), out)?;
    Ok(description.after(early.description).to_json(PAGE_SIZE))
}

/// What is sent before RAM.
#[derive(Debug)]
pub struct Early {
    /// Its sections.
    pub sections: EarlySections,
    description: Vmdesc,
}

/// What `common` says of a machine, to be sent before RAM.
///
/// # Errors
/// What could not be saved.
pub fn save_early(common: &mut DeviceTree) -> Result<Early, BoxError> {
    let (saved, description) = common.save_early_described()?;
    let mut sections = EarlySections::new();
    for section in saved {
        sections.push(header(&section, FIRST_DEVICE_SECTION)?, section.body);
    }
    Ok(Early {
        sections,
        description,
    })
}

fn header(section: &SavedSection, id: SectionId) -> Result<SectionHeader, BoxError> {
    Ok(SectionHeader {
        kind: Announcement::Full,
        id,
        idstr: IdStr::new(section.idstr.as_str())?,
        instance: InstanceId(section.instance_id),
        version: section.version,
    })
}

/// The sections, numbered behind `early` others.
fn encode(sections: &[SavedSection], early: usize, out: &mut Vec<u8>) -> Result<(), BoxError> {
    let mut framed = Vec::with_capacity(sections.len());
    let ids = (FIRST_DEVICE_SECTION.0..).map(SectionId).skip(early);
    for (id, section) in ids.zip(sections) {
        framed.push(DeviceSection {
            header: header(section, id)?,
            body: &section.body,
        });
    }
    encode_device_blob(framed, out);
    Ok(())
}

/// Parses and checks a blob. No device changes.
///
/// # Errors
/// What is wrong with it, and where.
pub fn stage(tree: &DeviceTree, blob: &[u8]) -> Result<Staged, BoxError> {
    let mut parsed = Vec::new();
    decode_device_blob(blob, |header, rest| -> Result<usize, LoadError> {
        let idstr = header.idstr.as_str();
        let device = tree.parse_section(idstr, header.instance.0, header.version, rest, false)?;
        parsed.push(device.section);
        Ok(device.consumed)
    })?;
    Ok(tree.stage(parsed)?)
}
