//! Bytes in, values out: a bounded reader that knows where in the stream it is.

use crate::IdStr;
use crate::error::{Cause, DecodeError};

/// Reads big-endian values from the front of a slice.
///
/// A read beyond the end is [`Cause::Truncated`], which says how many bytes are missing: for a
/// decoder fed piecemeal that is a request for more, for a complete item it is an error.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    base: u64,
    pos: usize,
}

impl<'a> Reader<'a> {
    /// A reader of `bytes`, the first of which is byte `offset` of the stream.
    #[must_use]
    pub const fn new(bytes: &'a [u8], offset: u64) -> Self {
        Self {
            bytes,
            base: offset,
            pos: 0,
        }
    }

    /// Offset in the stream of the next byte.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.base.saturating_add(self.pos as u64)
    }

    /// How many bytes were read.
    #[must_use]
    pub const fn consumed(&self) -> usize {
        self.pos
    }

    /// The bytes not yet read.
    #[must_use]
    pub fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.pos..).unwrap_or_default()
    }

    /// An error about the next byte.
    pub fn error(&self, cause: impl Into<Cause>) -> DecodeError {
        DecodeError::new(self.offset(), cause)
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let rest = self.rest();
        match rest.get(..n) {
            Some(taken) => {
                self.pos += n;
                Ok(taken)
            }
            None => Err(self.error(Cause::Truncated {
                needed: n - rest.len(),
            })),
        }
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(u8::from_be_bytes)
    }

    /// A big-endian 16-bit number.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn be16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    /// A big-endian 32-bit number.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn be32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    /// A big-endian 64-bit number.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn be64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// A counted string: one length byte, then as many bytes, at most 255.
    ///
    /// # Errors
    /// [`Cause::Truncated`].
    pub fn counted(&mut self) -> Result<&'a [u8], DecodeError> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    /// A counted string that names something.
    ///
    /// # Errors
    /// [`Cause::Truncated`], or [`Cause::IdStr`] when it is no [`IdStr`].
    pub fn idstr(&mut self) -> Result<IdStr, DecodeError> {
        let at = self.clone();
        IdStr::from_bytes(self.counted()?).map_err(|e| at.error(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_read_says_how_many_bytes_are_missing_and_where() {
        let mut r = Reader::new(&[3, b'r', b'a'], 0x100);
        let e = r.counted().unwrap_err();
        assert_eq!((e.offset, e.missing()), (0x101, Some(1)));
        let mut r = Reader::new(&[0, 1, 2], 0);
        assert_eq!(r.be16().unwrap(), 1);
        assert_eq!((r.offset(), r.consumed(), r.rest()), (2, 2, &[2u8][..]));
        assert_eq!(r.be64().unwrap_err().missing(), Some(7));
    }
}
