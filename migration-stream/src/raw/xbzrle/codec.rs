//! The runs of an encoded page.
//!
//! Alternately a length of bytes that stay and a length of bytes that change with those bytes,
//! beginning with bytes that stay (which may be none); bytes that stay at the end are left out.
//! A length is one byte below 128, else two of 7 bits each, low ones first, the first with its high
//! bit set.

use super::{PAGE, PageBytes};

/// Bytes that stay are not worth a run of their own up to this many: its two lengths cost as much.
const SHORT_GAP: usize = 2;

/// What came of encoding a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// The pages are equal: nothing needs to be sent, and nothing was appended.
    Unchanged,
    /// So many bytes were appended.
    Bytes(usize),
    /// The difference is no shorter than the page. Nothing was appended.
    Overflow,
}

/// Appends to `out` what turns `old` into `new`.
pub fn encode(old: &PageBytes, new: &PageBytes, out: &mut Vec<u8>) -> Encoded {
    let start = out.len();
    let mut at = 0;
    loop {
        let begin = first_difference(old, new, at);
        if begin == PAGE {
            break;
        }
        let mut end = first_equal(old, new, begin);
        // Equal bytes that a run of their own would not save are sent along.
        loop {
            let next = first_difference(old, new, end);
            if next == PAGE || next - end > SHORT_GAP {
                break;
            }
            end = first_equal(old, new, next);
        }
        put_len(begin - at, out);
        put_len(end - begin, out);
        out.extend_from_slice(new.get(begin..end).unwrap_or_default());
        if out.len() - start >= PAGE {
            out.truncate(start);
            return Encoded::Overflow;
        }
        at = end;
    }
    match out.len() - start {
        0 => Encoded::Unchanged,
        len => Encoded::Bytes(len),
    }
}

/// Where, from `from` on, the pages first differ; the page's length if nowhere.
fn first_difference(a: &PageBytes, b: &PageBytes, from: usize) -> usize {
    search(a, b, from, |x| x, |equal| !equal)
}

/// Where, from `from` on, the pages first agree; the page's length if nowhere.
fn first_equal(a: &PageBytes, b: &PageBytes, from: usize) -> usize {
    const LOW: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = LOW << 7;
    // The lowest byte of 0x80 in the result is the lowest byte of 0 in x.
    search(
        a,
        b,
        from,
        |x| x.wrapping_sub(LOW) & !x & HIGH,
        |equal| equal,
    )
}

/// The first byte from `from` on that `byte` wants; `word` marks it in the difference of 8 bytes.
fn search(
    a: &PageBytes,
    b: &PageBytes,
    from: usize,
    word: impl Fn(u64) -> u64,
    byte: impl Fn(bool) -> bool,
) -> usize {
    let mut at = from;
    while at < PAGE {
        if let (Some(x), Some(y)) = (eight(a, at), eight(b, at)) {
            let found = word(x ^ y);
            if found != 0 {
                return at + found.trailing_zeros() as usize / 8;
            }
            at += 8;
        } else {
            if byte(a.get(at) == b.get(at)) {
                return at;
            }
            at += 1;
        }
    }
    PAGE
}

fn eight(page: &PageBytes, at: usize) -> Option<u64> {
    page.get(at..)?
        .first_chunk()
        .map(|c| u64::from_le_bytes(*c))
}

fn put_len(len: usize, out: &mut Vec<u8>) {
    #[allow(clippy::cast_possible_truncation)] // at most 4096
    let len = len as u16;
    let [low, high] = (len << 1).to_le_bytes();
    if high == 0 {
        out.push(low >> 1);
    } else {
        out.extend([low >> 1 | 0x80, high]);
    }
}

/// Bytes of a page that change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run<'a> {
    /// Where in the page.
    pub offset: usize,
    /// The new bytes; never empty, and inside the page.
    pub bytes: &'a [u8],
}

/// The runs of an encoded page, in order. After an error there are no more.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    encoded: &'a [u8],
    read: usize,
    page: usize,
}

impl<'a> Runs<'a> {
    /// The runs of `encoded`. None was checked: whoever writes them into memory looks at all of
    /// them first ([`Runs::check`]).
    #[must_use]
    pub const fn new(encoded: &'a [u8]) -> Self {
        Self {
            encoded,
            read: 0,
            page: 0,
        }
    }

    /// Whether all of them are sound.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), XbzrleError> {
        self.clone().try_for_each(|run| run.map(drop))
    }

    fn len(&mut self) -> Result<usize, XbzrleError> {
        let at = self.read;
        let mut byte = || {
            let byte = self.encoded.get(self.read);
            self.read += 1;
            byte.map(|b| usize::from(*b))
                .ok_or(XbzrleError::Truncated { at })
        };
        let low = byte()?;
        if low < 0x80 {
            return Ok(low);
        }
        match byte()? {
            high @ 0..0x80 => Ok(low & 0x7f | high << 7),
            _ => Err(XbzrleError::Length { at }),
        }
    }

    fn run(&mut self) -> Result<Run<'a>, XbzrleError> {
        let (at, first) = (self.read, self.page == 0);
        let stay = self.len()?;
        if stay == 0 && !first {
            return Err(XbzrleError::EmptyRun { at });
        }
        let at = self.read;
        let change = self.len()?;
        if change == 0 {
            return Err(XbzrleError::EmptyRun { at });
        }
        let offset = self.page + stay;
        let end = offset + change;
        if end > PAGE {
            return Err(XbzrleError::OutOfPage { at, end });
        }
        let bytes = self
            .encoded
            .get(self.read..self.read + change)
            .ok_or(XbzrleError::Truncated { at: self.read })?;
        self.read += change;
        self.page = end;
        Ok(Run { offset, bytes })
    }
}

impl<'a> Iterator for Runs<'a> {
    type Item = Result<Run<'a>, XbzrleError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.read >= self.encoded.len() {
            return None;
        }
        let run = self.run();
        if run.is_err() {
            self.read = self.encoded.len();
        }
        Some(run)
    }
}

/// What is wrong with an encoded page; `at` counts its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XbzrleError {
    /// It ends inside a run.
    #[error("xbzrle data ends inside the run at byte {at}")]
    Truncated {
        /// Where the run's part that is missing begins.
        at: usize,
    },
    /// A length of more than two bytes.
    #[error("xbzrle length of more than two bytes at byte {at}")]
    Length {
        /// Where.
        at: usize,
    },
    /// A run of no bytes where one has to be longer.
    #[error("empty xbzrle run at byte {at}")]
    EmptyRun {
        /// Where.
        at: usize,
    },
    /// A run that goes on after the end of the page.
    #[error("xbzrle run at byte {at} ends at {end} of a page of {PAGE} bytes")]
    OutOfPage {
        /// Where.
        at: usize,
        /// Where in the page it would end.
        end: usize,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(old: &PageBytes, encoded: &[u8]) -> Result<PageBytes, XbzrleError> {
        let mut page = *old;
        for run in Runs::new(encoded) {
            let Run { offset, bytes } = run?;
            page[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        Ok(page)
    }

    fn encoded(old: &PageBytes, new: &PageBytes) -> Vec<u8> {
        let mut out = vec![0xee];
        assert!(matches!(encode(old, new, &mut out), Encoded::Bytes(n) if n == out.len() - 1));
        out.split_off(1)
    }

    #[test]
    fn equal_pages_are_encoded_as_nothing() {
        let mut out = Vec::new();
        assert_eq!(encode(&[7; PAGE], &[7; PAGE], &mut out), Encoded::Unchanged);
        assert!(out.is_empty());
    }

    #[test]
    fn bytes_that_stay_are_lengths_and_bytes_that_change_are_there() {
        let old = [0; PAGE];
        let mut new = old;
        new[3] = 1;
        new[300..304].copy_from_slice(b"page");
        new[4095] = 9;
        assert_eq!(
            encoded(&old, &new),
            [
                &[3, 1, 1][..],
                &[0x80 | 0x28, 2, 4][..],
                b"page",
                &[0x80 | 0x4f, 29, 1, 9],
            ]
            .concat()
        );
    }

    #[test]
    fn a_gap_that_costs_more_than_it_saves_is_sent_along() {
        let old = [0; PAGE];
        let mut new = old;
        (new[0], new[3], new[7]) = (1, 2, 3);
        assert_eq!(encoded(&old, &new), [0, 4, 1, 0, 0, 2, 3, 1, 3]);
    }

    #[test]
    fn a_page_with_nothing_in_common_overflows() {
        let mut out = b"before".to_vec();
        assert_eq!(encode(&[0; PAGE], &[1; PAGE], &mut out), Encoded::Overflow);
        assert_eq!(out, b"before");
    }

    #[test]
    fn malformed_runs_are_refused_where_they_are() {
        use XbzrleError as E;
        for (bytes, error) in [
            (&[3][..], E::Truncated { at: 1 }),
            (&[0x80], E::Truncated { at: 0 }),
            (&[0x80, 0x80, 1], E::Length { at: 0 }),
            (&[0, 0], E::EmptyRun { at: 1 }),
            (&[0, 1, 7, 0, 1, 8], E::EmptyRun { at: 3 }),
            (&[0, 2, 7], E::Truncated { at: 2 }),
            (&[0xff, 0x1f, 2, 1, 1], E::OutOfPage { at: 2, end: 4097 }),
            (
                &[0xff, 0x7f, 0xff, 0x7f],
                E::OutOfPage { at: 2, end: 32766 },
            ),
        ] {
            assert_eq!(Runs::new(bytes).check(), Err(error), "{bytes:x?}");
            assert_eq!(Runs::new(bytes).last(), Some(Err(error)));
        }
        assert_eq!(Runs::new(&[]).check(), Ok(()));
    }

    /// Pages that have parts in common, with changes anywhere.
    fn pages() -> impl Strategy<Value = (PageBytes, PageBytes)> {
        let change = (0..PAGE, proptest::collection::vec(any::<u8>(), 1..200));
        (any::<u8>(), proptest::collection::vec(change, 0..40)).prop_map(|(fill, changes)| {
            let old = [fill; PAGE];
            let mut new = old;
            for (at, bytes) in changes {
                let end = PAGE.min(at + bytes.len());
                new[at..end].copy_from_slice(&bytes[..end - at]);
            }
            (old, new)
        })
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded((old, new) in pages()) {
            let mut out = Vec::new();
            match encode(&old, &new, &mut out) {
                Encoded::Unchanged => prop_assert_eq!(old, new),
                Encoded::Bytes(n) => {
                    prop_assert_eq!(n, out.len());
                    prop_assert!(n < PAGE);
                    prop_assert_eq!(decode(&old, &out), Ok(new));
                }
                Encoded::Overflow => prop_assert!(out.is_empty()),
            }
        }

        #[test]
        fn any_bytes_are_runs_inside_the_page_or_an_error(bytes: Vec<u8>) {
            let _ = decode(&[0; PAGE], &bytes);
        }
    }
}
