//! What is looked up in a file besides reading it from its beginning.

use std::io;

use migration_stream::decoder::DecoderConfig;
use migration_stream::io::PositionedFile;
use migration_stream::section::SectionType;
use migration_stream::vmdesc::VmDescription;

use super::ScanError;

/// The description that a file ends with.
pub(super) fn description_at_end(
    file: &dyn PositionedFile,
) -> Result<Option<VmDescription>, ScanError> {
    let max = u64::from(DecoderConfig::DEFAULT_MAX_DESCRIPTION) + 5;
    let failed = |offset| move |source| ScanError::Stream { offset, source };
    let size = file.size().map_err(failed(0))?;
    let begin = size.saturating_sub(max);
    let mut end = vec![0; usize::try_from(size - begin).unwrap_or_default()];
    read_exact(file, begin, &mut end).map_err(failed(begin))?;
    let head = |window: &[u8]| match *window {
        [kind, a, b, c, d, b'{'] => {
            (kind == SectionType::VmDescription.byte()).then(|| u32::from_be_bytes([a, b, c, d]))
        }
        _ => None,
    };
    let whole = end.len();
    Ok(end.windows(6).enumerate().find_map(|(i, window)| {
        let len = usize::try_from(head(window)?).ok()?;
        (i + 5 + len == whole)
            .then(|| VmDescription::parse(end.get(i + 5..)?).ok())
            .flatten()
    }))
}

pub(super) fn read_exact(
    file: &dyn PositionedFile,
    mut offset: u64,
    mut buf: &mut [u8],
) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(offset, buf)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => {
                offset += n as u64;
                buf = buf.get_mut(n..).unwrap_or_default();
            }
        }
    }
    Ok(())
}
