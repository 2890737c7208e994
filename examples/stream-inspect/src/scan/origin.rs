//! Where a stream comes from: a file, or a source that is answered.

use std::fmt;
use std::sync::Arc;

use migration_stream::io::PositionedFile;
use migration_stream::ram::RamBlockTable;
use migration_stream::raw::command::Command;
use migration_stream::{Configuration, StreamReader};

use super::ScanError;
use crate::pages::PageSet;

/// Where a stream comes from, beside its bytes.
pub trait Origin {
    /// What went wrong beside the stream before the stream itself failed, if something did.
    fn failure(&self) -> Option<ScanError> {
        None
    }

    /// A command has come.
    ///
    /// # Errors
    /// It cannot be answered, or not here.
    fn command(&mut self, command: &Command) -> Result<(), ScanError> {
        let _ = command;
        Ok(())
    }

    /// The list of RAM blocks has come, and pages follow.
    ///
    /// # Errors
    /// The stream is not wanted.
    fn announced(
        &mut self,
        configuration: Option<&Configuration>,
        blocks: &RamBlockTable,
    ) -> Result<(), ScanError> {
        let _ = (configuration, blocks);
        Ok(())
    }

    /// The pages of all channels up to here come before what follows.
    ///
    /// # Errors
    /// A channel broke.
    fn flush(&mut self) -> Result<(), ScanError> {
        Ok(())
    }

    /// Whether [`Origin::flush`] is due at the end of every RAM section.
    fn flushes_each_section(&self) -> bool {
        false
    }

    /// All of RAM has come: what of it crossed beside the stream.
    ///
    /// # Errors
    /// A channel broke.
    fn beside(&mut self) -> Result<Beside, ScanError> {
        Ok(Beside::default())
    }

    /// The file, if it is one.
    fn file(&self) -> Option<&Arc<dyn PositionedFile>> {
        None
    }
}

/// What crossed beside the stream.
#[derive(Clone, Debug, Default)]
pub struct Beside {
    /// Bytes on all channels.
    pub bytes: u64,
    /// Pages of each block.
    pub blocks: Vec<BesideBlock>,
}

/// What of a block crossed beside the stream.
#[derive(Clone, Debug, Default)]
pub struct BesideBlock {
    /// Pages with content, as often as they came.
    pub normal: u64,
    /// Pages that are zero, as often as they came.
    pub zero: u64,
    /// Which.
    pub unique: PageSet,
}

/// A stream in a file.
pub struct FileOrigin(Arc<dyn PositionedFile>);

impl FileOrigin {
    /// The stream that begins at byte `offset` of `file`.
    #[must_use]
    pub fn open(file: Arc<dyn PositionedFile>, offset: u64) -> (Self, StreamReader) {
        let reader = StreamReader::from_file(Arc::clone(&file), offset);
        (Self(file), reader)
    }
}

impl fmt::Debug for FileOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileOrigin").finish_non_exhaustive()
    }
}

/// In a file with mapped-ram pages have their places; in another one there are none on channels.
impl Origin for FileOrigin {
    fn file(&self) -> Option<&Arc<dyn PositionedFile>> {
        Some(&self.0)
    }
}

/// A stream out of a pipe, which cannot be sought in.
#[derive(Clone, Copy, Debug)]
pub struct PipeOrigin;

impl Origin for PipeOrigin {}
