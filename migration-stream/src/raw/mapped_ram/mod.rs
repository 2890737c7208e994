//! Where a block's pages are (`migration/ram.c`, QEMU 9.0 to 11.1).
//!
//! ```text
//! be32 version 1  be64 page size  be64 offset of the bitmap  be64 offset of page 0
//! ```
//!
//! Offsets count from the beginning of the file, wherever the stream begins in it. Page `i` is bit
//! `i % 8` of the bitmap's byte `i / 8` (words of an x86 host).

mod error;

use self::error::VERSION;
pub use self::error::{HEADER_LEN, LayoutError};
use bytes::BufMut;

use crate::PAGE_SIZE;
use crate::raw::codec::Reader;
/// Where in a file pages begin that we write, bytes: what direct I/O and huge pages are content with.
const PAGES_ALIGNMENT: u64 = 1 << 20;

/// How many pages a block had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedPages {
    /// In the file.
    pub normal: u64,
    /// Zero, which the file has not.
    pub zero: u64,
}

/// The part of a file that belongs to one block: its bitmap, and behind that its pages.
///
/// An area that exists lies in a file: its end is within 63 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedArea {
    bitmap: u64,
    pages: u64,
    used_length: u64,
}

impl MappedArea {
    /// Reads the header of a block of `used_length` bytes that ends at byte `header_end` of the
    /// file. The stream goes on behind the area, so that no two areas overlap.
    ///
    /// # Errors
    /// [`LayoutError`]; [`LayoutError::NoArea`] when both offsets are 0, as those of a block are that
    /// both sides share.
    pub fn decode(
        bytes: &[u8; HEADER_LEN],
        header_end: u64,
        used_length: u64,
    ) -> Result<Self, LayoutError> {
        let mut r = Reader::new(bytes, 0);
        let cut = |_| LayoutError::Cut;
        let version = r.be32().map_err(cut)?;
        if version != VERSION {
            return Err(LayoutError::Version { version });
        }
        let page_size = r.be64().map_err(cut)?;
        let (bitmap, pages) = (r.be64().map_err(cut)?, r.be64().map_err(cut)?);
        if page_size != PAGE_SIZE {
            return Err(LayoutError::PageSize { page_size });
        }
        if (bitmap, pages) == (0, 0) {
            return Err(LayoutError::NoArea);
        }
        let area = Self {
            bitmap,
            pages,
            used_length,
        };
        if bitmap < header_end {
            return Err(LayoutError::Bitmap { bitmap, header_end });
        }
        let bitmap_end = bitmap.checked_add(area.bitmap_len());
        if !pages.is_multiple_of(PAGE_SIZE) || bitmap_end.is_none_or(|end| end > pages) {
            return Err(LayoutError::Pages { bitmap, pages });
        }
        let end = pages.checked_add(used_length);
        if end.is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(LayoutError::TooFar { pages });
        }
        Ok(area)
    }

    /// The area of a block of `used_length` bytes whose header ends at byte `header_end` of the file:
    /// the bitmap directly behind it, the pages from the next mebibyte on, as QEMU has it.
    ///
    /// # Errors
    /// [`LayoutError::TooFar`].
    pub fn place(header_end: u64, used_length: u64) -> Result<Self, LayoutError> {
        let mut area = Self {
            bitmap: header_end,
            pages: header_end,
            used_length,
        };
        let pages = header_end
            .checked_add(area.bitmap_len())
            .and_then(|end| end.checked_next_multiple_of(PAGES_ALIGNMENT))
            .filter(|pages| {
                let end = pages.checked_add(used_length);
                end.is_some_and(|end| i64::try_from(end).is_ok())
            });
        area.pages = pages.ok_or(LayoutError::TooFar { pages: header_end })?;
        Ok(area)
    }

    /// Appends the header.
    pub fn encode(&self, out: &mut impl BufMut) {
        put_header(self.bitmap, self.pages, out);
    }

    /// Appends the header of a block that has no area: one that both sides share.
    pub fn encode_none(out: &mut impl BufMut) {
        put_header(0, 0, out);
    }

    /// Where the bitmap begins in the file.
    #[must_use]
    pub const fn bitmap(&self) -> u64 {
        self.bitmap
    }

    /// Length of the bitmap in bytes, whole words of 64 pages.
    #[must_use]
    pub const fn bitmap_len(&self) -> u64 {
        (self.used_length / PAGE_SIZE).div_ceil(64) * 8
    }

    /// Where page 0 begins in the file.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Length of the block, bytes.
    #[must_use]
    pub const fn used_length(&self) -> u64 {
        self.used_length
    }

    /// Where the stream goes on in the file.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.pages.saturating_add(self.used_length)
    }
}

fn put_header(bitmap: u64, pages: u64, out: &mut impl BufMut) {
    out.put_u32(VERSION);
    out.put_u64(PAGE_SIZE);
    out.put_u64(bitmap);
    out.put_u64(pages);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Block header at 0x6f of a file that QEMU 11.1.3 wrote for 32 MiB.
    fn header(version: u32, page_size: u64, bitmap: u64, pages: u64) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&version.to_be_bytes());
        bytes[4..12].copy_from_slice(&page_size.to_be_bytes());
        bytes[12..20].copy_from_slice(&bitmap.to_be_bytes());
        bytes[20..].copy_from_slice(&pages.to_be_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_LEN]) -> Result<MappedArea, LayoutError> {
        MappedArea::decode(bytes, 0x8b, 32 << 20)
    }

    #[test]
    fn an_area_is_where_qemu_puts_it() {
        let area = decode(&header(1, 4096, 0x8b, 0x10_0000)).unwrap();
        assert_eq!((area.bitmap(), area.bitmap_len()), (0x8b, 1024));
        assert_eq!((area.pages(), area.end()), (0x10_0000, 0x210_0000));
    }

    #[test]
    fn every_header_that_is_not_sound_is_refused_by_name() {
        let wrong = |version, page_size, bitmap, pages| {
            decode(&header(version, page_size, bitmap, pages)).unwrap_err()
        };
        assert_eq!(
            wrong(2, 4096, 0x8b, 0x10_0000),
            LayoutError::Version { version: 2 }
        );
        assert_eq!(
            wrong(0, 4096, 0x8b, 0x10_0000),
            LayoutError::Version { version: 0 }
        );
        assert_eq!(
            wrong(1, 8192, 0x8b, 0x10_0000),
            LayoutError::PageSize { page_size: 8192 }
        );
        assert_eq!(wrong(1, 4096, 0, 0), LayoutError::NoArea);
        assert!(matches!(
            wrong(1, 4096, 0x8a, 0x10_0000),
            LayoutError::Bitmap { .. }
        ));
        // Over the bitmap, beside a page's boundary, behind a bitmap that does not end.
        assert!(matches!(
            wrong(1, 4096, 0x10_0000, 0x10_0000),
            LayoutError::Pages { .. }
        ));
        assert!(matches!(
            wrong(1, 4096, 0x8b, 0x10_0001),
            LayoutError::Pages { .. }
        ));
        assert!(matches!(
            wrong(1, 4096, u64::MAX, 0x10_0000),
            LayoutError::Pages { .. }
        ));
        assert!(matches!(
            wrong(1, 4096, 0x8b, !0xfff),
            LayoutError::TooFar { .. }
        ));
        let far = i64::MAX.unsigned_abs() & !0xfff;
        assert!(matches!(
            wrong(1, 4096, 0x8b, far),
            LayoutError::TooFar { .. }
        ));
    }
}
