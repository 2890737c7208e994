//! The main channel in both directions: the stream, and the answers to it.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, io};

use bytes::BytesMut;

use crate::io::{ByteSink, CancelToken, Chunk};
use crate::precopy::TargetError;
use crate::precopy::handover::{CONFIRMS_FIRST, WHO_CONFIRMS};
use crate::precopy::switchover_ack::SwitchoverAcks;
use crate::raw::codec::Reader;
use crate::raw::command::Command;
use crate::raw::decoder::{Item, MAX_ITEM_LEN, Step};
use crate::raw::postcopy::PostcopyOrder;
use crate::raw::return_path::ReturnPathMessage;
use crate::{DecodeError, StreamReader};

/// A pause that does not end.
const A_YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The two directions of the main channel.
pub(super) struct Link {
    pub(super) reader: StreamReader,
    pub(super) return_path: Option<Box<dyn ByteSink>>,
    /// Ends the migration.
    pub(super) cancel: Option<CancelToken>,
    /// The source has asked for the return path.
    pub(super) open: bool,
    /// The devices that acknowledge the switch-over, and for how many of them it was done.
    pub(super) acks: Option<(Arc<SwitchoverAcks>, u32)>,
    /// How long the source may say nothing between two items, if not as long as within one.
    pub(super) idle: Option<Duration>,
    /// The guest runs here only after a confirmation, and the source may know.
    pub(super) confirms_first: bool,
    /// What the source has said of postcopy, which never begins here.
    pub(super) postcopy: PostcopyOrder,
}

impl Link {
    pub(super) fn new(reader: StreamReader, mut return_path: Option<Box<dyn ByteSink>>) -> Self {
        let cancel = reader.cancel_token().cloned();
        if let (Some(token), Some(out)) = (&cancel, &mut return_path) {
            out.set_cancel(token);
        }
        Self {
            reader,
            return_path,
            cancel,
            open: false,
            acks: None,
            idle: None,
            confirms_first: false,
            postcopy: PostcopyOrder::of_any_source(),
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(CancelToken::is_cancelled)
    }

    /// The cause of `error`: that it was cancelled, if it was.
    pub(super) fn cause(&self, error: TargetError) -> TargetError {
        if self.is_cancelled() {
            TargetError::Cancelled
        } else {
            error
        }
    }

    pub(super) fn seek(&mut self, offset: u64) -> Result<(), TargetError> {
        self.reader.seek(offset).map_err(|e| self.broken(e))
    }

    /// The migration has failed already: that the source cannot be told changes nothing.
    pub(super) fn refuse(&mut self) {
        let _ = self.send(&ReturnPathMessage::Shut { status: 1 });
    }

    pub(super) fn fill(&mut self, limit: usize) -> Result<(), TargetError> {
        self.reader.fill(limit).map_err(|e| self.broken(e))
    }

    pub(super) fn broken(&self, source: io::Error) -> TargetError {
        TargetError::Stream {
            offset: self.reader.offset(),
            source,
        }
    }

    pub(super) fn send(&mut self, message: &ReturnPathMessage) -> Result<(), TargetError> {
        if let (Some(out), true) = (&mut self.return_path, self.open) {
            let mut bytes = BytesMut::new();
            message.encode(&mut bytes);
            out.write_all(&[Chunk::Bytes(&bytes)])
                .map_err(TargetError::ReturnPath)?;
        }
        Ok(())
    }

    /// The source still waits for an answer.
    pub(super) fn check_source(&mut self) -> Result<(), TargetError> {
        if self.reader.has_ended().unwrap_or(true) {
            let offset = self.reader.offset();
            return Err(TargetError::SourceGone { offset });
        }
        Ok(())
    }

    /// The next item, as `decode` finds it in what has come, and where it began.
    pub(super) fn item(
        &mut self,
        mut decode: impl FnMut(&mut Reader<'_>) -> Result<Step, DecodeError>,
    ) -> Result<(Item, u64), TargetError> {
        loop {
            // A source that never lets this side wait is heard no longer either.
            if self.is_cancelled() {
                return Err(TargetError::Cancelled);
            }
            self.acknowledge()?;
            let offset = self.reader.offset();
            let mut r = Reader::new(self.reader.buffered(), offset);
            let step = decode(&mut r)?;
            let consumed = r.consumed();
            self.reader.consume(consumed);
            match step {
                Step::NeedMore { .. } => self.fill_item()?,
                Step::Item(item) => return Ok((item, offset)),
            }
        }
    }

    /// Whether something of the next item is there, or comes within `patience`.
    pub(super) fn goes_on(&mut self, patience: Duration) -> Result<bool, TargetError> {
        if !self.reader.buffered().is_empty() {
            return Ok(true);
        }
        self.reader
            .fill_within(MAX_ITEM_LEN, patience)
            .map_err(|e| self.broken(e))
    }

    /// Reads more of an item. If nothing of it is there, the source may stand between two items for a
    /// reason.
    fn fill_item(&mut self) -> Result<(), TargetError> {
        let idle = self.idle.filter(|_| self.reader.buffered().is_empty());
        let Some(idle) = idle else {
            return self.fill(MAX_ITEM_LEN);
        };
        let now = Instant::now();
        let deadline = now.checked_add(idle).or_else(|| now.checked_add(A_YEAR));
        self.reader.set_deadline(deadline);
        let filled = self.fill(MAX_ITEM_LEN);
        self.reader.set_deadline(None);
        filled
    }

    /// Sends the acknowledgements that are due.
    fn acknowledge(&mut self) -> Result<(), TargetError> {
        while let Some((devices, sent)) = &mut self.acks
            && self.open
            && *sent < devices.owed()
        {
            *sent += 1;
            self.send(&ReturnPathMessage::SwitchoverAck)?;
        }
        Ok(())
    }

    pub(super) fn command(&mut self, command: &Command, offset: u64) -> Result<(), TargetError> {
        match command {
            Command::OpenReturnPath if self.return_path.is_some() => {
                self.open = true;
                Ok(())
            }
            Command::Ping(WHO_CONFIRMS) if self.open && self.confirms_first => {
                self.send(&ReturnPathMessage::Pong(CONFIRMS_FIRST))
            }
            Command::Ping(value) if self.open => self.send(&ReturnPathMessage::Pong(*value)),
            Command::OpenReturnPath | Command::Ping(_) => Err(TargetError::NoReturnPath {
                command: command.number(),
                offset,
            }),
            // The guest stands still at the source: nothing to do for those who load at the end.
            Command::SwitchoverStart => Ok(()),
            // A source with `postcopy-ram` or `dirty-bitmaps` may go over to postcopy, and need not:
            // until it does the stream is that of a precopy migration.
            Command::PostcopyAdvise(_) => Ok(self
                .postcopy
                .command(command)
                .map_err(|e| DecodeError::new(offset, e))?),
            Command::PostcopyRamDiscard(_)
            | Command::PostcopyListen
            | Command::PostcopyRun
            | Command::PostcopyResume
            | Command::RecvBitmap(_)
            | Command::Packaged { .. } => Err(TargetError::Postcopy {
                command: command.number(),
                offset,
            }),
        }
    }

    /// Reads and drops `len` bytes.
    pub(super) fn skip(&mut self, mut len: usize) -> Result<(), TargetError> {
        while len > 0 {
            let here = len.min(self.reader.buffered().len());
            self.reader.consume(here);
            len -= here;
            if len > 0 && here == 0 {
                self.fill(MAX_ITEM_LEN)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("reader", &self.reader)
            .field("return_path", &self.return_path.is_some())
            .field("open", &self.open)
            .finish()
    }
}
