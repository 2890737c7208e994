//! A guest that has come: confirmed, given back, or gone on with as a COLO secondary.

use super::checkpoints::CheckpointReceiver;
use super::link::Link;
use super::pages::Received;
use crate::DecodeError;
use crate::configuration::Configuration;
use crate::decoder::StreamDecoder;
use crate::dirty_bitmap::BitmapSections;
use crate::precopy::TargetError;
use crate::ram::RamError;
use crate::return_path::ReturnPathMessage;

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
        let mut receiver = self.into_checkpoints()?;
        match receiver.confirm() {
            Err(_) if cancel.is_some_and(|token| token.is_cancelled()) => {
                Err(TargetError::Cancelled)
            }
            told => told.map(|()| receiver),
        }
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
        let offset = self.link.reader.offset();
        let missing = |what| TargetError::Missing { what, offset };
        let decoder = self
            .decoder
            .into_checkpoint_decoder()
            .map_err(|e| match e {
                RamError::NotSetUp => missing("a complete RAM section"),
                other => DecodeError::new(offset, other).into(),
            })?;
        let out = self.link.return_path.filter(|_| self.link.open);
        let link = Link {
            return_path: None,
            // COLO ends by a request to its driver.
            cancel: None,
            open: false,
            acks: None,
            idle: None,
            confirms_first: false,
            postcopy: self.link.postcopy,
            reader: self.link.reader,
        };
        let out = out.ok_or(missing("a return path"))?;
        Ok(CheckpointReceiver { decoder, link, out })
    }
}
