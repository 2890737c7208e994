//! Device sections, whose length only the description at the end of the stream says.

use std::io;
use std::time::{Duration, Instant};

use migration_stream::raw::early::find_end;
use migration_stream::raw::opaque_tail::{Fed, OpaqueTail, tail_at_end};
use migration_stream::raw::section::{Announcement, SectionType};
use migration_stream::{SectionHeader, Tail};

use super::{Ram, Scan, ScanError};
use crate::inspection::{Device, Extent, Inspection, Part, Section};

/// Footer: type byte and section id.
const FOOTER_LEN: usize = 5;

impl Scan<'_> {
    /// A device section before the end of RAM, as those have whose state the destination needs first. Nothing says
    /// how long it is: it ends where its footer is followed by another section. The description at the
    /// end of the stream is compared with what was found.
    pub(super) fn early(&mut self, header: SectionHeader, offset: u64) -> Result<(), ScanError> {
        let unknown = || ScanError::Early {
            idstr: header.idstr.clone(),
            offset,
        };
        if header.kind != Announcement::Full {
            return Err(unknown());
        }
        let ram = match self.ram {
            Ram::Open(id) => Some(id),
            Ram::Unknown | Ram::Ended => None,
        };
        let max = self.limits.len;
        let (mut body, mut from) = (Vec::new(), 0);
        let len = loop {
            let have = body.len();
            body.extend_from_slice(self.reader.buffered());
            match find_end(&body, header.id, ram, from) {
                Ok(len) => {
                    self.reader.consume(len.saturating_sub(have));
                    break len;
                }
                Err(next) if next <= max => from = next,
                Err(_) => {
                    return Err(ScanError::DeviceState {
                        len: None,
                        max,
                        source: None,
                    });
                }
            }
            // What may belong to the end stays in the buffer.
            let done = from.saturating_sub(have);
            self.reader.consume(done);
            body.truncate(have + done);
            self.fill().map_err(|error| match error {
                ScanError::Stream { source, .. }
                    if source.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    unknown()
                }
                other => other,
            })?;
        };
        body.truncate(len);
        self.early.push(header.clone(), body.clone());
        let bytes = self.reader.offset() - offset + FOOTER_LEN as u64;
        self.found.sections.push(Section::Device(Device {
            header,
            body,
            extent: Extent {
                bytes,
                time: Duration::ZERO,
            },
        }));
        Ok(())
    }

    /// Compares the device state behind RAM with its limit before RAM is read, if the file says already how
    /// much it is.
    pub(super) fn check_length(&self) -> Result<(), ScanError> {
        let Some(file) = self.origin.file() else {
            return Ok(());
        };
        let offset = self.reader.offset();
        let len = tail_at_end(&**file, self.early.len(), self.limits)
            .map_err(|source| ScanError::Stream { offset, source })?;
        match len {
            Some(len) if len > self.limits.len as u64 => Err(ScanError::DeviceState {
                len: Some(len),
                max: self.limits.len,
                source: None,
            }),
            _ => Ok(()),
        }
    }

    /// Device sections, EOF and description, beginning with the body of `header`, which begins at
    /// byte `begin` of the stream.
    pub(super) fn tail(
        mut self,
        header: &SectionHeader,
        begin: u64,
    ) -> Result<Inspection, ScanError> {
        let mut tail =
            OpaqueTail::beginning_with(header, self.limits).after_early(self.early.len());
        let mut arrivals = Arrivals::new(self.reader.offset() - begin);
        let mut ending = Vec::new();
        let tail = loop {
            let piece = self.reader.buffered();
            arrivals.add(piece.len());
            ending.extend_from_slice(piece);
            ending.drain(..ending.len().saturating_sub(FOOTER_LEN + 1));
            match tail.feed(piece)? {
                Fed::Complete { consumed, tail } => {
                    self.reader.consume(consumed);
                    break tail;
                }
                Fed::NeedMore => self.reader.consume(piece.len()),
            }
            match self.fill() {
                Ok(()) => {}
                Err(ScanError::Stream { source, offset })
                    if source.kind() == io::ErrorKind::UnexpectedEof =>
                {
                    // The source may have been told to send no description (`suppress-vmdesc`).
                    let [footer, _, _, _, _, eof] = *ending else {
                        return Err(ScanError::Stream { source, offset });
                    };
                    if tail.rejected().is_none()
                        && footer == SectionType::Footer.byte()
                        && eof == SectionType::Eof.byte()
                    {
                        return self.finish();
                    }
                    return Err(ScanError::Stream { source, offset });
                }
                Err(error) => return Err(error),
            }
        };
        self.early.check(tail.description())?;
        let mut end = 0;
        for device in tail.sections() {
            let mut head = Vec::new();
            device.header.encode(&mut head);
            let from = end;
            end += head.len() + device.body.len() + FOOTER_LEN;
            self.found.sections.push(Section::Device(Device {
                header: device.header.clone(),
                body: device.body.to_vec(),
                extent: Extent {
                    bytes: (end - from) as u64,
                    time: arrivals.between(from, end),
                },
            }));
        }
        self.found.description = tail.description_text().to_owned();
        self.end_of_tail(&tail, end, &arrivals);
        self.finish()
    }

    /// What of a tail is devices, and what its description.
    fn end_of_tail(&mut self, tail: &Tail, devices: usize, arrivals: &Arrivals) {
        let whole = tail.as_bytes().len();
        let description = (whole - devices - 1) as u64;
        let time = arrivals.between(devices + 1, whole);
        self.meter.turn(Part::Description, self.reader.offset());
        self.meter.shift(
            Part::Devices,
            Part::Description,
            Extent {
                bytes: description,
                time,
            },
        );
    }
}

/// How much of a tail has come, and when.
struct Arrivals(Vec<(usize, Instant)>);

impl Arrivals {
    fn new(head: u64) -> Self {
        let head = usize::try_from(head).unwrap_or(usize::MAX);
        Self(vec![(head, Instant::now())])
    }

    fn add(&mut self, len: usize) {
        let here = self.0.last().map_or(0, |(upto, _)| *upto);
        self.0.push((here.saturating_add(len), Instant::now()));
    }

    /// How long bytes `from .. to` took to come.
    fn between(&self, from: usize, to: usize) -> Duration {
        let when = |byte| {
            let next = self.0.partition_point(|(upto, _)| *upto < byte);
            self.0.get(next).or(self.0.last()).map(|(_, when)| *when)
        };
        match (when(from), when(to)) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        }
    }
}
