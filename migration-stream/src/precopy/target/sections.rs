//! The bodies of sections that are not RAM: devices, dirty bitmaps, and a tail that nobody knows.

use std::io;
use std::time::Duration;

use super::link::Link;
use super::vm::SectionLoader;
use crate::BoxError;
use crate::precopy::TargetError;
use crate::raw::codec::Reader;
use crate::raw::decoder::MAX_ITEM_LEN;
use crate::raw::dirty_bitmap::{BitmapSections, DIRTY_BITMAP_IDSTR, DIRTY_BITMAP_VERSION};
use crate::raw::early::{EarlySections, find_end};
use crate::raw::opaque_tail::{Fed, OpaqueTail};
use crate::raw::section::{Continuation, SectionError};
use crate::{DecodeError, InstanceId, SectionHeader, SectionId, Tail, TailLimits};

/// How long a device section's next bytes are waited for before the VMM is shown what there is,
/// the first time.
const FIRST_PATIENCE: Duration = Duration::from_millis(1);
/// The same at most.
const LONGEST_PATIENCE: Duration = Duration::from_secs(16);

/// What becomes of device sections.
pub(super) enum Devices<'a> {
    /// The VMM reads them.
    Known(&'a mut dyn SectionLoader),
    /// They are kept as they are.
    Opaque(TailLimits),
}

impl Link {
    pub(super) fn device(
        &mut self,
        vm: &mut dyn SectionLoader,
        header: &SectionHeader,
        limit: usize,
    ) -> Result<(), TargetError> {
        let offset = self.reader.offset();
        let failed = |source: BoxError| TargetError::Device {
            idstr: header.idstr.as_str().into(),
            instance: header.instance.0,
            offset,
            source,
        };
        let mut patience = FIRST_PATIENCE;
        loop {
            let available = self.reader.buffered();
            let seen = available.len();
            match vm.load(header, available).map_err(failed)? {
                Some(len) if len <= seen => {
                    self.reader.consume(len);
                    return Ok(());
                }
                Some(len) => {
                    return Err(failed(
                        format!("took {len} bytes of the {seen} there were").into(),
                    ));
                }
                None if seen >= limit => {
                    return Err(TargetError::DeviceTooLong {
                        idstr: header.idstr.as_str().into(),
                        instance: header.instance.0,
                        offset,
                        max: limit,
                    });
                }
                None => {}
            }
            // The VMM parses a body from its start each time. It sees the body again when twice as
            // much is there, so that all its looks together are linear in the body's length. A
            // body may end before that, with nothing behind it yet: then the VMM sees it when
            // nothing has come for a while, each time for twice as long.
            self.fill(limit)?;
            let enough = seen.saturating_mul(2).min(limit);
            while self.reader.buffered().len() < enough {
                let more = self.reader.fill_within(limit, patience);
                if !more.map_err(|e| self.broken(e))? {
                    patience = (patience * 2).min(LONGEST_PATIENCE);
                    break;
                }
            }
        }
    }

    /// The body of a section of dirty bitmaps.
    pub(super) fn bitmaps(
        &mut self,
        devices: &mut Devices<'_>,
        sections: &mut BitmapSections,
        kind: Option<Continuation>,
    ) -> Result<(), TargetError> {
        if let Devices::Opaque(_) = devices {
            sections.begin(kind);
        }
        loop {
            let offset = self.reader.offset();
            let mut r = Reader::new(self.reader.buffered(), offset);
            let chunk = match devices {
                Devices::Known(_) => sections.pass(&mut r),
                Devices::Opaque(limits) => sections.next(&mut r, limits.len),
            };
            let consumed = r.consumed();
            self.reader.consume(consumed);
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(e) if e.missing().is_some() => {
                    self.fill(MAX_ITEM_LEN)?;
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            if let (Devices::Known(vm), Some(bitmap), true) =
                (&mut *devices, sections.current(), chunk.is_of_a_bitmap())
            {
                vm.load_dirty_bitmap(bitmap, &chunk)
                    .map_err(|source| TargetError::Device {
                        idstr: DIRTY_BITMAP_IDSTR.into(),
                        instance: 0,
                        offset,
                        source,
                    })?;
            }
            if chunk.is_last {
                return Ok(());
            }
        }
    }

    /// The body of a device section before RAM that nobody knows; `limit` is for all of them
    /// together.
    pub(super) fn early(
        &mut self,
        header: SectionHeader,
        early: &mut EarlySections,
        ram: Option<SectionId>,
        limit: usize,
    ) -> Result<(), TargetError> {
        let offset = self.reader.offset();
        let limit = limit.saturating_sub(early.body_bytes());
        let mut searched = 0;
        let len = loop {
            match find_end(self.reader.buffered(), header.id, ram, searched) {
                Ok(len) if len <= limit => break Some(len),
                Ok(_) => break None,
                Err(from) => searched = from,
            }
            if searched > limit {
                break None;
            }
            // Behind the body stand its footer and the head of another section.
            match self.reader.fill(limit.saturating_add(MAX_ITEM_LEN)) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break None,
                Err(e) => return Err(self.broken(e)),
            }
        };
        let Some(body) = len.and_then(|len| self.reader.buffered().get(..len)) else {
            return Err(TargetError::EarlyEnd {
                idstr: header.idstr.as_str().into(),
                instance: header.instance.0,
                offset,
                searched: searched.min(limit),
            });
        };
        let body = body.to_vec();
        self.reader.consume(body.len());
        early.push(header, body);
        Ok(())
    }

    /// Device sections, EOF and description, beginning with the body of `header`, behind `early`
    /// sections before RAM.
    pub(super) fn tail(
        &mut self,
        header: &SectionHeader,
        limits: TailLimits,
        early: usize,
    ) -> Result<Tail, TargetError> {
        let mut tail = OpaqueTail::beginning_with(header, limits).after_early(early);
        loop {
            match tail.feed(self.reader.buffered())? {
                Fed::Complete { consumed, tail } => {
                    self.reader.consume(consumed);
                    return Ok(tail);
                }
                Fed::NeedMore => {
                    self.reader.consume(self.reader.buffered().len());
                    self.fill(MAX_ITEM_LEN)?;
                }
            }
        }
    }
}

pub(super) fn check_bitmap_section(header: &SectionHeader, offset: u64) -> Result<(), DecodeError> {
    let idstr = header.idstr.clone();
    let error = if header.instance != InstanceId(0) {
        SectionError::Instance {
            idstr,
            instance: header.instance,
        }
    } else if header.version != DIRTY_BITMAP_VERSION {
        SectionError::Version {
            idstr,
            version: header.version,
            expected: DIRTY_BITMAP_VERSION,
        }
    } else {
        return Ok(());
    };
    Err(DecodeError::new(offset, error))
}
