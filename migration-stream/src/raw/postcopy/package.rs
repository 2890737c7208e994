//! The stream inside a package.

use std::collections::HashSet;

use bytes::BufMut;

use super::error::PackageError;
use super::order::PostcopyOrder;
use super::state::PostcopyState;
use crate::error::{Cause, DecodeError};
use crate::raw::codec::Reader;
use crate::raw::command::Command;
use crate::raw::decoder::MAX_SECTIONS;
use crate::raw::section::{Announcement, SectionError, SectionType, decode_footer, encode_footer};
use crate::{SectionHeader, SectionId};

/// What stands in a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackageItem {
    /// LISTEN, PING or RUN. RUN is the last item.
    Command(Command),
    /// A device's FULL section begins. Its body follows, whose length only its handler knows.
    Section(SectionHeader),
    /// The open section ended with its own footer. Absent from streams without footers.
    Footer(SectionId),
}

/// What came of a look at the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackageStep {
    /// An item was read.
    Item(PackageItem),
    /// The next item is not there in full.
    NeedMore {
        /// How many bytes are missing at least. The package has them.
        at_least: usize,
    },
    /// The package was read to its end, and the main stream goes on.
    End,
}

/// Decodes the stream inside a package, which follows [`Command::Packaged`] in the main stream.
///
/// It is driven as a [`StreamDecoder`](crate::raw::decoder::StreamDecoder) is, with readers whose offset
/// is that in the main stream; between [`PackageItem::Section`] and its footer the driver takes the
/// body. Nothing of the package need be in memory at once, and nothing is allocated for it.
///
/// Of the sections there are FULL ones only, and no id twice. QEMU 11.1 would take the others too,
/// and an EOF; its source sends none of them there.
#[derive(Debug)]
pub struct PackageDecoder {
    /// Where the package ends, bytes of the main stream.
    end: u64,
    footers: bool,
    sections: HashSet<SectionId>,
    /// The section whose body the driver takes.
    open: Option<SectionId>,
}

impl PackageDecoder {
    /// The longest package that the command can announce, which is QEMU's own limit; it takes as
    /// much memory at once as is announced.
    pub const QEMU_MAX_LEN: u32 = u32::MAX;

    /// For a package of `size` bytes from byte `offset` of the main stream on, of which at most
    /// `max` are accepted. `footers` is that of the main stream.
    ///
    /// # Errors
    /// [`PackageError::TooLong`].
    pub fn new(size: u32, offset: u64, max: u32, footers: bool) -> Result<Self, DecodeError> {
        let error = |e: PackageError| DecodeError::new(offset, e);
        if size > max {
            return Err(error(PackageError::TooLong {
                len: u64::from(size),
                max,
            }));
        }
        let end = offset.checked_add(u64::from(size));
        Ok(Self {
            end: end.ok_or_else(|| error(PackageError::Overrun { by: 1 }))?,
            footers,
            sections: HashSet::new(),
            open: None,
        })
    }

    /// Where the package ends, bytes of the main stream. A body ends before it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.end
    }

    /// Reads the next item from the front of `r`, and moves `order` on.
    ///
    /// # Errors
    /// [`DecodeError`]. The stream cannot be gone on with.
    pub fn next(
        &mut self,
        r: &mut Reader<'_>,
        order: &mut PostcopyOrder,
    ) -> Result<PackageStep, DecodeError> {
        let left = self.end.checked_sub(r.offset()).ok_or_else(|| {
            let by = r.offset() - self.end;
            r.error(PackageError::Overrun { by })
        })?;
        let has_run = order.state() == PostcopyState::Running;
        match (left, has_run && self.open.is_none()) {
            (0, true) => return Ok(PackageStep::End),
            (0, false) => return Err(r.error(PackageError::NoRun)),
            (left, true) => return Err(r.error(PackageError::AfterRun { len: left })),
            (_, false) => {}
        }
        // No item may reach beyond the end.
        let rest = r.rest();
        let inside = usize::try_from(left).unwrap_or(usize::MAX);
        let view = rest.get(..inside).unwrap_or(rest);
        let mut attempt = Reader::new(view, r.offset());
        match self.attempt(&mut attempt, order) {
            Ok(item) => {
                r.take(attempt.consumed())?;
                Ok(PackageStep::Item(item))
            }
            Err(e) => match e.cause {
                Cause::Truncated { needed } if needed > inside - view.len() => {
                    let by = (needed - (inside - view.len())) as u64;
                    Err(r.error(PackageError::Overrun { by }))
                }
                Cause::Truncated { needed } => Ok(PackageStep::NeedMore { at_least: needed }),
                _ => Err(e),
            },
        }
    }

    fn attempt(
        &mut self,
        r: &mut Reader<'_>,
        order: &mut PostcopyOrder,
    ) -> Result<PackageItem, DecodeError> {
        if let Some(id) = self.open {
            decode_footer(id, r)?;
            self.open = None;
            return Ok(PackageItem::Footer(id));
        }
        let at = r.clone();
        let found = r.u8()?;
        match SectionType::from_byte(found) {
            Some(SectionType::Full) => {
                let header = SectionHeader::decode(Announcement::Full, r)?;
                if self.sections.len() == MAX_SECTIONS {
                    return Err(at.error(SectionError::TooMany { max: MAX_SECTIONS }));
                }
                if !self.sections.insert(header.id) {
                    let (id, idstr) = (header.id, header.idstr);
                    return Err(at.error(SectionError::AnnouncedTwice { id, idstr }));
                }
                self.open = self.footers.then_some(header.id);
                Ok(PackageItem::Section(header))
            }
            Some(SectionType::Command) => {
                let command = Command::decode(r)?;
                order.packaged(&command).map_err(|e| at.error(e))?;
                Ok(PackageItem::Command(command))
            }
            _ => Err(at.error(SectionError::UnexpectedType { found })),
        }
    }
}

/// Makes a package: LISTEN, whatever is put in, RUN.
#[derive(Clone, Debug)]
pub struct PackageEncoder {
    bytes: Vec<u8>,
}

impl Default for PackageEncoder {
    fn default() -> Self {
        Self::new()
    }
}

impl PackageEncoder {
    /// A package without devices.
    #[must_use]
    pub fn new() -> Self {
        let mut bytes = Vec::new();
        Command::PostcopyListen.encode(&mut bytes);
        Self { bytes }
    }

    /// Puts in the section of a device, with its footer. Its kind is FULL, whatever the header says.
    pub fn section(&mut self, header: &SectionHeader, body: &[u8]) {
        let header = SectionHeader {
            kind: Announcement::Full,
            ..header.clone()
        };
        header.encode(&mut self.bytes);
        self.bytes.put_slice(body);
        encode_footer(header.id, &mut self.bytes);
    }

    /// Puts in FULL sections as they are, for instance those of a
    /// [`Tail`](crate::Tail).
    pub fn sections(&mut self, sections: &[u8]) {
        self.bytes.put_slice(sections);
    }

    /// Puts in a PING. QEMU's has 3 before, and 0x42 behind the devices: its PONG says that they are
    /// loaded.
    pub fn ping(&mut self, value: u32) {
        Command::Ping(value).encode(&mut self.bytes);
    }

    /// Appends the command and the package to `out`.
    ///
    /// # Errors
    /// [`PackageError::TooLong`].
    pub fn finish(mut self, out: &mut impl BufMut) -> Result<(), PackageError> {
        Command::PostcopyRun.encode(&mut self.bytes);
        let size = u32::try_from(self.bytes.len()).map_err(|_| PackageError::TooLong {
            len: self.bytes.len() as u64,
            max: PackageDecoder::QEMU_MAX_LEN,
        })?;
        Command::Packaged { size }.encode(out);
        out.put_slice(&self.bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::raw::command::{CommandError, CommandNumber, PostcopyAdvice};
    use crate::raw::postcopy::OrderError;
    use crate::{IdStr, InstanceId};

    const BODY: [u8; 24] = [7; 24];
    const BASE: u64 = 0x1000;

    fn header(id: u32) -> SectionHeader {
        SectionHeader {
            kind: Announcement::Full,
            id: SectionId(id),
            idstr: IdStr::new("timer").unwrap(),
            instance: InstanceId(0),
            version: 2,
        }
    }

    fn advised() -> PostcopyOrder {
        let mut order = PostcopyOrder::of_any_source();
        let advice = Some(PostcopyAdvice {
            ram_page_sizes: 4096,
            target_page_size: 4096,
        });
        order.command(&Command::PostcopyAdvise(advice)).unwrap();
        order
    }

    fn package() -> Vec<u8> {
        let mut package = PackageEncoder::new();
        package.ping(3);
        package.section(&header(2), &BODY);
        package.section(&header(9), &BODY);
        package.ping(0x42);
        let mut out = Vec::new();
        package.finish(&mut out).unwrap();
        assert_eq!(out[..5], [8, 0, 7, 0, 4]);
        assert_eq!(
            out[5..9],
            u32::try_from(out.len() - 9).unwrap().to_be_bytes()
        );
        out.split_off(9)
    }

    /// Decodes a package of which `bytes` arrive, `piece` at a time; `size` were announced.
    fn decode(
        bytes: &[u8],
        size: usize,
        piece: usize,
    ) -> Result<(Vec<PackageItem>, PostcopyState), DecodeError> {
        let size = u32::try_from(size).unwrap();
        let mut decoder = PackageDecoder::new(size, BASE, 1 << 16, true)?;
        let mut order = advised();
        let (mut start, mut end) = (0, 0);
        let mut items = Vec::new();
        loop {
            let visible = &bytes[start.min(bytes.len())..end.max(start).min(bytes.len())];
            let mut r = Reader::new(visible, BASE + start as u64);
            let step = decoder.next(&mut r, &mut order)?;
            start += r.consumed();
            match step {
                PackageStep::End => return Ok((items, order.state())),
                PackageStep::NeedMore { at_least } => {
                    assert!(at_least > 0);
                    if end >= bytes.len() {
                        return Ok((items, order.state()));
                    }
                    end = (end.max(start) + piece).min(bytes.len());
                }
                PackageStep::Item(item) => {
                    if matches!(item, PackageItem::Section(_)) {
                        start += BODY.len();
                    }
                    items.push(item);
                }
            }
        }
    }

    fn refused(bytes: &[u8]) -> (u64, Cause) {
        let whole = decode(bytes, bytes.len(), bytes.len()).unwrap_err();
        let single = decode(bytes, bytes.len(), 1).unwrap_err();
        assert_eq!(whole, single);
        (whole.offset - BASE, whole.cause)
    }

    fn items() -> Vec<PackageItem> {
        vec![
            PackageItem::Command(Command::PostcopyListen),
            PackageItem::Command(Command::Ping(3)),
            PackageItem::Section(header(2)),
            PackageItem::Footer(SectionId(2)),
            PackageItem::Section(header(9)),
            PackageItem::Footer(SectionId(9)),
            PackageItem::Command(Command::Ping(0x42)),
            PackageItem::Command(Command::PostcopyRun),
        ]
    }

    #[test]
    fn a_package_reads_back_however_it_arrives_and_the_guest_runs_after_it() {
        let bytes = package();
        // What the main stream goes on with is not the package's.
        let followed = [&bytes[..], &[0x55; 40]].concat();
        for piece in [1, 2, 7, followed.len()] {
            assert_eq!(
                decode(&followed, bytes.len(), piece).unwrap(),
                (items(), PostcopyState::Running)
            );
        }
    }

    #[test]
    fn a_package_cut_off_anywhere_waits_for_what_it_has_announced() {
        let bytes = package();
        for n in 0..bytes.len() {
            let (items, state) = decode(&bytes[..n], bytes.len(), n.max(1)).unwrap();
            assert!(items.len() < self::items().len());
            assert_ne!(state, PostcopyState::Running);
        }
    }

    #[test]
    fn a_package_announced_shorter_than_it_is_is_refused_at_every_length() {
        let bytes = package();
        for n in 0..bytes.len() {
            let e = decode(&bytes, n, bytes.len()).unwrap_err();
            assert!(
                matches!(
                    e.cause,
                    Cause::Package(PackageError::Overrun { .. } | PackageError::NoRun)
                ),
                "{e}"
            );
        }
    }

    #[test]
    fn a_package_longer_than_accepted_is_refused_by_its_length_alone() {
        let e = PackageDecoder::new(u32::MAX, BASE, 64 << 20, true).unwrap_err();
        assert_eq!(e.offset, BASE);
        assert_eq!(
            e.cause,
            PackageError::TooLong {
                len: u32::MAX.into(),
                max: 64 << 20
            }
            .into()
        );
        assert!(PackageDecoder::new(u32::MAX, BASE, PackageDecoder::QEMU_MAX_LEN, true).is_ok());
        assert!(PackageDecoder::new(1, u64::MAX, 1, true).is_err());
    }

    #[test]
    fn nothing_follows_run_and_nothing_runs_without_it() {
        let mut bytes = package();
        let run = bytes.len() - 5;
        let run_only = [8, 0, 5, 0, 0];
        assert_eq!(bytes[run..], run_only);
        assert_eq!(
            refused(&bytes[..run]),
            (run as u64, PackageError::NoRun.into())
        );
        assert_eq!(refused(b""), (0, PackageError::NoRun.into()));
        bytes.push(0);
        assert_eq!(
            refused(&bytes),
            (run as u64 + 5, PackageError::AfterRun { len: 1 }.into())
        );
        assert_eq!(
            refused(&run_only),
            (
                0,
                OrderError::State {
                    command: CommandNumber::PostcopyRun,
                    state: PostcopyState::Advised
                }
                .into()
            )
        );
    }

    #[test]
    fn what_cannot_be_in_a_package_is_refused() {
        let listen = [8, 0, 4, 0, 0];
        let after = |bytes: &[u8]| {
            let (offset, cause) = refused(&[&listen[..], bytes].concat());
            (offset - 5, cause)
        };
        // A package in it, whose length would be looked for behind this one.
        assert_eq!(
            after(&[8, 0, 7, 0, 4, 0, 0, 0, 1]),
            (
                0,
                OrderError::InPackage {
                    command: CommandNumber::Packaged
                }
                .into()
            )
        );
        assert_eq!(
            after(&[8, 0, 12, 0, 0]),
            (1, CommandError::Unknown { number: 12, len: 0 }.into())
        );
        for found in [0, 1, 2, 3, 5, 6, 7, 0x7e, 0xff] {
            assert_eq!(
                after(&[found]),
                (0, SectionError::UnexpectedType { found }.into())
            );
        }
    }

    #[test]
    fn an_id_stands_for_one_section() {
        let mut package = PackageEncoder::new();
        package.section(&header(2), &BODY);
        package.section(&header(2), &BODY);
        let mut out = Vec::new();
        package.finish(&mut out).unwrap();
        let (_, cause) = refused(&out[9..]);
        assert!(matches!(
            cause,
            Cause::Section(SectionError::AnnouncedTwice {
                id: SectionId(2),
                ..
            })
        ));
    }

    #[test]
    fn a_body_that_runs_over_the_end_of_its_package_is_refused() {
        let mut decoder = PackageDecoder::new(40, BASE, 1 << 16, true).unwrap();
        let mut order = advised();
        let mut r = Reader::new(&[], BASE + 41);
        assert_eq!(
            decoder.next(&mut r, &mut order).unwrap_err().cause,
            PackageError::Overrun { by: 1 }.into()
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_items_or_an_error_and_the_same_in_pieces(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            piece in 1_usize..40,
        ) {
            let whole = decode(&bytes, bytes.len(), bytes.len().max(1));
            prop_assert_eq!(whole, decode(&bytes, bytes.len(), piece));
        }
    }
}
