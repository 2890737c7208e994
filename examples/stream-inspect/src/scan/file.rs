//! Reading a file by position.

use std::io;

use migration_stream::io::PositionedFile;

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
