//! A guest that has come: confirmed, given back, or gone on with as a COLO secondary.

use super::checkpoints::CheckpointReceiver;
use super::link::Link;
use super::pages::Received;
use crate::io::CancelToken;
use crate::precopy::TargetError;
use crate::raw::decoder::StreamDecoder;
use crate::raw::dirty_bitmap::BitmapSections;
use crate::raw::ram::RamError;
use crate::raw::return_path::ReturnPathMessage;
use crate::{Configuration, DecodeError};

/// A guest that was taken over, devices included. The source stands still until
/// [`Loaded::confirm`] and may still take the guest back before.
#[derive(Debug)]
pub struct Loaded {
    pub(super) decoder: StreamDecoder,
    pub(super) configuration: Option<Configuration>,
    pub(super) link: Link,
    pub(super) received: Received,
    pub(super) bitmaps: BitmapSections,
}

impl Loaded {
    /// What came in.
    #[must_use]
    pub const fn received(&self) -> Received {
        self.received
    }

    /// The dirty bitmaps that came with a guest [taken as it is](super::Target::load_opaque), to be
    /// sent on with it.
    #[must_use]
    pub const fn dirty_bitmaps(&self) -> &BitmapSections {
        &self.bitmaps
    }

    /// The source's configuration, if the stream has one. Where it has a UUID and this side's has
    /// none, nothing was compared, and whoever cares should hear of it.
    #[must_use]
    pub const fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// Returns whether the source still waits for [`Loaded::confirm`] or [`Loaded::refuse`].
    pub fn source_waits(&mut self) -> bool {
        self.link.open && self.link.check_source().is_ok()
    }

    /// Tells the source that everything is loaded, if it has opened a return path. From here on the
    /// guest belongs to this side, which must not fail any more: channels are joined, devices are
    /// installed, files are on disk.
    ///
    /// # Errors
    /// [`TargetError::SourceGone`] if the source has given up waiting, and the return path's. The source
    /// was not told anything, so this side must not run the guest.
    pub fn confirm(&mut self) -> Result<(), TargetError> {
        // A source without a return path closes its connection when it has sent everything.
        if self.link.open {
            self.link.check_source()?;
        }
        let told = self.link.send(&ReturnPathMessage::Shut { status: 0 });
        told.map_err(|error| self.link.cause(error))
    }

    /// As [`Loaded::confirm`], and then [`Loaded::into_checkpoints`], for a COLO secondary: whatever can
    /// fail does so before the source is told.
    ///
    /// # Errors
    /// As for both; the source was not told anything.
    pub fn confirm_into_checkpoints(self) -> Result<CheckpointReceiver, TargetError> {
        let cancel = self.link.cancel.clone();
        let receiver = self.into_checkpoints()?;
        UnconfirmedReceiver { receiver, cancel }.confirm()
    }

    /// Gives the guest back to the source, where it runs on: this side cannot keep it after all.
    pub fn refuse(mut self) {
        self.link.refuse();
    }

    /// What a COLO secondary goes on with: the same stream, which from here on carries checkpoints
    /// and cannot set RAM up again.
    ///
    /// # Errors
    /// The source has not opened a return path, without which there is no COLO.
    pub fn into_checkpoints(self) -> Result<CheckpointReceiver, TargetError> {
        self.into_receiver().map_err(|failed| failed.1)
    }

    /// As [`Loaded::into_checkpoints`], which tells the source of a failure.
    pub(super) fn into_checkpoints_unconfirmed(self) -> Result<UnconfirmedReceiver, TargetError> {
        let cancel = self.link.cancel.clone();
        match self.into_receiver() {
            Ok(receiver) => Ok(UnconfirmedReceiver { receiver, cancel }),
            Err(failed) => {
                let (mut link, error) = *failed;
                link.refuse();
                Err(error)
            }
        }
    }

    fn into_receiver(self) -> Result<CheckpointReceiver, Box<(Link, TargetError)>> {
        let mut link = self.link;
        let offset = link.reader.offset();
        let missing = |what| TargetError::Missing { what, offset };
        let decoder = match self.decoder.into_checkpoint_decoder() {
            Ok(decoder) => decoder,
            Err(RamError::NotSetUp) => {
                return Err(Box::new((link, missing("a complete RAM section"))));
            }
            Err(other) => {
                return Err(Box::new((link, DecodeError::new(offset, other).into())));
            }
        };
        let Some(out) = link.return_path.take_if(|_| link.open) else {
            return Err(Box::new((link, missing("a return path"))));
        };
        let link = Link {
            return_path: None,
            // COLO ends by a request to its driver.
            cancel: None,
            open: false,
            acks: None,
            idle: None,
            confirms_first: false,
            postcopy: link.postcopy,
            reader: link.reader,
        };
        Ok(CheckpointReceiver { decoder, link, out })
    }
}

/// What a COLO secondary goes on with, once the source was told.
#[derive(Debug)]
pub(super) struct UnconfirmedReceiver {
    receiver: CheckpointReceiver,
    cancel: Option<CancelToken>,
}

impl UnconfirmedReceiver {
    pub(super) fn confirm(mut self) -> Result<CheckpointReceiver, TargetError> {
        match self.receiver.confirm() {
            Err(_) if self.cancel.is_some_and(|token| token.is_cancelled()) => {
                Err(TargetError::Cancelled)
            }
            told => told.map(|()| self.receiver),
        }
    }
}
