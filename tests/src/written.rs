//! The dirty log of a guest that a test writes for.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migration_stream::ram::BlockId;
use migration_stream::{DirtyLog, MemoryError};

/// Pages that were written and not asked for yet. Clones are the same log.
#[derive(Clone, Debug, Default)]
pub struct Written(Arc<Mutex<Vec<(BlockId, u64)>>>);

impl Written {
    /// A page of `block` was written.
    pub fn note(&self, block: BlockId, page: u64) {
        self.pages().push((block, page));
    }

    /// Whether all that was written has been asked for.
    #[must_use]
    pub fn is_read(&self) -> bool {
        self.pages().is_empty()
    }

    /// A list is whole at every moment: a thread that panicked does not spoil it.
    fn pages(&self) -> MutexGuard<'_, Vec<(BlockId, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyLog for Written {
    fn start(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        for (block, page) in self.pages().drain(..) {
            sink(block, page / 64 * 64, 1 << (page % 64));
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_told_once_by_its_word_and_bit() {
        let (mut log, block) = (Written::default(), BlockId::new(1));
        log.clone().note(block, 3);
        log.note(block, 130);
        assert!(!log.is_read());
        let mut told = Vec::new();
        log.sync(&mut |block, first, word| told.push((block, first, word)))
            .unwrap();
        assert_eq!(told, [(block, 0, 1 << 3), (block, 128, 1 << 2)]);
        assert!(log.is_read());
    }
}
