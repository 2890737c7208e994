//! Names on the wire.

use std::fmt;

use bytes::BufMut;

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

    /// A name of QEMU's own, which is not empty, not longer than [`IdStr::MAX_LEN`], and without NUL.
    pub(crate) fn known(name: &'static str) -> Self {
        debug_assert!(Self::new(name).is_ok());
        Self(name.into())
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
