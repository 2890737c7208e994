//! What a COLO secondary receives after the migration: RAM and device state, again and again.

use std::fmt;
use std::time::Instant;

use bytes::BytesMut;

use super::complete::{CheckpointComplete, Progress};
use super::link::Link;
use super::pages::{Pages, Received};
use crate::io::{ByteSink, Chunk};
use crate::precopy::TargetError;
use crate::raw::decoder::{CheckpointDecoder, Item};
use crate::raw::return_path::ReturnPathMessage;
use crate::raw::transport::PageBarrier;
use crate::{PageStore, StreamReader};

/// The receiving side of COLO's checkpoints.
pub struct CheckpointReceiver {
    pub(super) decoder: CheckpointDecoder,
    pub(super) link: Link,
    pub(super) out: Box<dyn ByteSink>,
}

impl CheckpointReceiver {
    /// The main stream, for what is no RAM: messages and device state.
    pub const fn reader(&mut self) -> &mut StreamReader {
        &mut self.link.reader
    }

    /// The return path, which carries no return-path messages any more.
    pub fn out(&mut self) -> &mut dyn ByteSink {
        &mut *self.out
    }

    /// Tells the source, which has to wait for it still, that the guest has arrived.
    pub(super) fn confirm(&mut self) -> Result<(), TargetError> {
        self.link.check_source()?;
        let mut bytes = BytesMut::new();
        ReturnPathMessage::Shut { status: 0 }.encode(&mut bytes);
        self.out
            .write_all(&[Chunk::Bytes(&bytes)])
            .map_err(TargetError::ReturnPath)
    }

    /// No read or write of the main channel waits longer than until `deadline`.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.link.reader.set_deadline(deadline);
        self.out.set_write_deadline(deadline);
    }

    /// Receives the RAM of one checkpoint, to its EOF, into `store`. The channels are held at
    /// their last synchronisation until the result is used up or dropped.
    ///
    /// # Errors
    /// Whatever is wrong with the stream; [`TargetError::Missing`] for one that ends without the
    /// END section of RAM, or with channels without a flush in it; the barrier's for pages that
    /// came on a channel after its last SYNC packet. What was stored until then is part of no
    /// checkpoint.
    pub fn receive_ram(
        &mut self,
        store: &dyn PageStore,
        barrier: &mut dyn PageBarrier,
    ) -> Result<CheckpointComplete, TargetError> {
        let begun = self.link.reader.offset();
        let mut received = Received::default();
        let mut progress = Progress::new(barrier.has_channels());
        let mut pages = Pages { store, barrier };
        loop {
            let (item, offset) = self.link.item(|r| self.decoder.next(r))?;
            progress.note(&item);
            match item {
                Item::Ram(item) => self.link.ram(item, &mut pages, &mut received)?,
                Item::Command(command) => self.link.command(&command, offset)?,
                Item::Eof => {
                    if let Some(what) = progress.missing() {
                        return Err(TargetError::Missing { what, offset });
                    }
                    break;
                }
                _ => {}
            }
        }
        received.bytes = self.link.reader.offset() - begun;
        let held = pages.barrier.hold()?;
        Ok(CheckpointComplete::new(received, held))
    }
}

impl fmt::Debug for CheckpointReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointReceiver")
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}
