//! The first eight bytes of a stream: magic and version (`migration/savevm.c`, QEMU 11.1).

mod error;

pub use self::error::{HeaderError, MAGIC, VERSION};
use bytes::BufMut;

use crate::error::DecodeError;
use crate::raw::codec::Reader;

/// Appends the header.
pub fn encode(out: &mut impl BufMut) {
    out.put_u32(MAGIC);
    out.put_u32(VERSION);
}

/// Reads the header.
///
/// # Errors
/// [`HeaderError`], or the bytes end before it does.
pub fn decode(r: &mut Reader<'_>) -> Result<(), DecodeError> {
    let at = r.clone();
    let magic = r.be32()?;
    if magic != MAGIC {
        return Err(at.error(HeaderError::Magic { found: magic }));
    }
    match r.be32()? {
        VERSION => Ok(()),
        found => Err(at.error(HeaderError::Version { found })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;

    fn cause(bytes: &[u8]) -> Cause {
        decode(&mut Reader::new(bytes, 0)).unwrap_err().cause
    }

    #[test]
    fn the_header_is_qevm_and_3() {
        let mut out = Vec::new();
        encode(&mut out);
        assert_eq!(out, [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3]);
        decode(&mut Reader::new(&out, 0)).unwrap();
    }

    #[test]
    fn another_magic_is_refused_before_the_version_is_there() {
        assert_eq!(
            cause(b"GET "),
            HeaderError::Magic { found: 0x4745_5420 }.into()
        );
    }

    #[test]
    fn another_version_is_refused() {
        for found in [2, 4] {
            let mut bytes = b"QEVM\0\0\0\0".to_vec();
            bytes[7] = found;
            let found = u32::from(found);
            assert_eq!(cause(&bytes), HeaderError::Version { found }.into());
        }
    }
}
