//! The device tree on the wire: a device blob out, staged state in.

use migration_stream::PAGE_SIZE;
use migration_stream::codec::IdStr;
use migration_stream::device_blob::{DeviceSection, decode_device_blob, encode_device_blob};
use migration_stream::precopy::{BoxError, FIRST_DEVICE_SECTION};
use migration_stream::section::{Announcement, InstanceId, SectionHeader, SectionId};
use vmstate::{DeviceTree, LoadError, SavedSection, Staged};

/// Appends the state of all devices to `out`, as a COLO checkpoint carries it.
///
/// # Errors
/// The device that could not be saved.
pub fn save(tree: &mut DeviceTree, out: &mut Vec<u8>) -> Result<(), BoxError> {
    let sections = tree.save_all()?;
    encode(&sections, out)
}

/// As [`save`], and returns the JSON text that describes it.
///
/// # Errors
/// As there.
pub fn save_described(tree: &mut DeviceTree, out: &mut Vec<u8>) -> Result<String, BoxError> {
    let (sections, description) = tree.save_all_described()?;
    encode(&sections, out)?;
    Ok(description.to_json(PAGE_SIZE))
}

fn encode(sections: &[SavedSection], out: &mut Vec<u8>) -> Result<(), BoxError> {
    let mut framed = Vec::with_capacity(sections.len());
    for (id, section) in (FIRST_DEVICE_SECTION.0..).map(SectionId).zip(sections) {
        let header = SectionHeader {
            kind: Announcement::Full,
            id,
            idstr: IdStr::new(section.idstr.as_str())?,
            instance: InstanceId(section.instance_id),
            version: section.version,
        };
        framed.push(DeviceSection {
            header,
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
