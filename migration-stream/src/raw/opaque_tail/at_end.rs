//! The length of a tail in a file that ends with it, known before anything else of the file is read.

use std::io;

use crate::io::PositionedFile;
use crate::raw::vmdesc::VmDescription;

use super::TailLimits;
use super::frame::{END_LEN, FOOTER_LEN, end_at, header_at};

/// How much of a file's end is read first, bytes. A description longer than that costs further reads.
const FIRST_READ: u64 = 128 << 10;
/// The longest header of a section, bytes: type, id, a counted name, instance and version.
const MAX_HEADER: usize = 1 + 4 + 1 + 255 + 4 + 4;

/// Returns the length of the tail that ends where `file` ends, in bytes: the device sections behind RAM,
/// EOF and the description. `early` is how many sections, which came before RAM, the description names
/// before those of the tail.
///
/// `None` if no tail is found there: something follows the stream, the source has sent no description,
/// or the description is longer than `limits` allow or not exact. The length is then known when the
/// tail has been read. A length is returned only if the first section that the description names
/// begins so far before the end of the file. In a file that holds a stream and behind it the end of an
/// older one, it is the older one's.
///
/// At most the longest description and a header are read.
///
/// # Errors
/// The file's.
pub fn tail_at_end(
    file: &dyn PositionedFile,
    early: usize,
    limits: TailLimits,
) -> io::Result<Option<u64>> {
    let size = file.size()?;
    let longest = size.min(u64::from(limits.description) + END_LEN as u64);
    let mut want = longest.min(FIRST_READ);
    loop {
        let end = read(file, size - want, want)?;
        if end.last() != Some(&b'}') {
            return Ok(None);
        }
        if let Some(json) = description_in(&end, limits) {
            return described(file, size, json, early);
        }
        if want == longest {
            return Ok(None);
        }
        want = longest.min(want * 4);
    }
}

/// The text of the description that ends where `end` ends.
fn description_in(end: &[u8], limits: TailLimits) -> Option<&[u8]> {
    end.windows(END_LEN + 1)
        .enumerate()
        .filter_map(|(at, window)| Some((at, end_at(window, limits.description)?)))
        .find_map(|(at, len)| {
            let json = end.get(at + END_LEN..)?;
            (json.len() as u64 == u64::from(len)).then_some(json)
        })
}

/// The length of the tail with this description, if it is where the description says.
fn described(
    file: &dyn PositionedFile,
    size: u64,
    json: &[u8],
    early: usize,
) -> io::Result<Option<u64>> {
    let Ok(description) = VmDescription::parse(json) else {
        return Ok(None);
    };
    let devices = description.devices.get(early..).unwrap_or_default();
    let Some(first) = devices.first() else {
        return Ok(None);
    };
    let frames = devices.iter().try_fold(0u64, |sum, device| {
        let header = 1 + 4 + 1 + device.idstr.as_str().len() as u64 + 4 + 4;
        sum.checked_add(header + FOOTER_LEN as u64)?
            .checked_add(device.body_len)
    });
    let behind = (END_LEN - FOOTER_LEN) as u64 + json.len() as u64;
    let length = frames.and_then(|frames| frames.checked_add(behind));
    let Some((length, begin)) = length.and_then(|l| Some((l, size.checked_sub(l)?))) else {
        return Ok(None);
    };
    let head = read(file, begin, length.min(MAX_HEADER as u64))?;
    Ok(header_at(&head, 0, first).is_ok().then_some(length))
}

/// Reads `len` bytes at byte `offset`, or as many as there still are.
fn read(file: &dyn PositionedFile, offset: u64, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?];
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match file.read_at(offset + have as u64, rest)? {
            0 => break,
            n => have += n,
        }
    }
    bytes.truncate(have);
    Ok(bytes)
}
