//! Bytes in, values out: a bounded reader that knows where in the stream it is.

use std::fmt;

use bytes::BufMut;

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

/// The name of a section, a device or a RAM block as it goes on the wire: a counted string of 1 to
/// 255 bytes, UTF-8 without NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdStr(Box<str>);

impl IdStr {
    /// The longest name, bytes.
    pub const MAX_LEN: usize = 255;

    /// `name` as an idstr.
    ///
    /// # Errors
    /// The name is empty, longer than [`IdStr::MAX_LEN`] bytes, or contains NUL.
    pub fn new(name: impl Into<Box<str>>) -> Result<Self, IdStrError> {
        let name = name.into();
        if name.is_empty() || name.len() > Self::MAX_LEN {
            Err(IdStrError::Length { len: name.len() })
        } else if name.bytes().any(|b| b == 0) {
            Err(IdStrError::Nul)
        } else {
            Ok(Self(name))
        }
    }

    /// The name in these bytes, without a length byte.
    ///
    /// # Errors
    /// As for [`IdStr::new`], and when the bytes are not UTF-8.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IdStrError> {
        Self::new(std::str::from_utf8(bytes).map_err(|_| IdStrError::NotUtf8)?)
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the RAM section.
    pub(crate) fn ram() -> Self {
        Self(crate::raw::ram::RAM_IDSTR.into())
    }

    /// The name of the section of dirty bitmaps.
    pub(crate) fn dirty_bitmap() -> Self {
        Self(crate::raw::dirty_bitmap::DIRTY_BITMAP_IDSTR.into())
    }

    /// Appends the counted string.
    pub fn encode(&self, out: &mut impl BufMut) {
        put_counted(out, &self.0);
    }
}

impl AsRef<str> for IdStr {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for IdStr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for IdStr {
    /// Writes the name as [`Escaped`](crate::Escaped) does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        crate::Escaped(&self.0).fmt(f)
    }
}

impl TryFrom<&str> for IdStr {
    type Error = IdStrError;

    fn try_from(name: &str) -> Result<Self, IdStrError> {
        Self::new(name)
    }
}

/// Why a string is no [`IdStr`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdStrError {
    /// Empty or too long.
    #[error("name of {len} bytes, expected 1 to 255")]
    Length {
        /// Its length, bytes.
        len: usize,
    },
    /// It contains a zero byte.
    #[error("name with a nul byte")]
    Nul,
    /// It is not UTF-8.
    #[error("name that is not utf-8")]
    NotUtf8,
}

/// Appends a counted string. The callers' types limit `s` to 255 bytes.
pub(crate) fn put_counted(out: &mut impl BufMut, s: &str) {
    debug_assert!(s.len() <= IdStr::MAX_LEN);
    #[allow(clippy::cast_possible_truncation)] // at most 255, see above
    out.put_u8(s.len() as u8);
    out.put_slice(s.as_bytes());
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

    #[test]
    fn an_idstr_is_neither_empty_nor_too_long_and_has_no_nul() {
        assert_eq!(IdStr::new(""), Err(IdStrError::Length { len: 0 }));
        assert!(IdStr::new("x".repeat(255)).is_ok());
        assert_eq!(
            IdStr::new("x".repeat(256)),
            Err(IdStrError::Length { len: 256 })
        );
        assert_eq!(IdStr::new("a\0"), Err(IdStrError::Nul));
        assert_eq!(IdStr::from_bytes(&[0xff]), Err(IdStrError::NotUtf8));
    }
}
