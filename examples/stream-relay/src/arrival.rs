//! A guest that is still on its way, and what of its memory has landed so far: enough to send it on.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration_stream::ram::BlockId;
use migration_stream::raw::early::EarlySections;
use migration_stream::{Configuration, DirtyLog, MemoryError};

use crate::guest::Devices;
use crate::memory::Memory;

/// How long pages are collected before they are sent on.
const COLLECT: Duration = Duration::from_millis(20);

/// A guest whose pages are landing.
#[derive(Debug)]
pub struct Arrival {
    /// Its memory, as far as it is there.
    pub memory: Arc<Memory>,
    /// Its configuration; `None` if its source sends none.
    pub configuration: Option<Configuration>,
    /// Devices whose state goes before memory.
    pub early: EarlySections,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
enum State {
    Coming,
    /// With these devices, and nothing more lands.
    Here(Devices),
    Failed,
}

impl Arrival {
    /// A guest of which nothing has landed yet.
    #[must_use]
    pub fn new(
        memory: Arc<Memory>,
        configuration: Option<Configuration>,
        early: EarlySections,
    ) -> Self {
        Self {
            memory,
            configuration,
            early,
            state: Mutex::new(State::Coming),
            changed: Condvar::new(),
        }
    }

    /// Nothing more lands: the guest is here with these devices, or it does not come.
    pub fn end(&self, devices: Option<Devices>) {
        *self.lock() = devices.map_or(State::Failed, State::Here);
        self.changed.notify_all();
    }

    /// Whether it still comes.
    #[must_use]
    pub fn is_coming(&self) -> bool {
        matches!(*self.lock(), State::Coming)
    }

    /// Whether it does not come.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        matches!(*self.lock(), State::Failed)
    }

    /// Waits until it is here, and returns its devices. The wait ends when the receiving side does,
    /// which has its own deadlines.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait(&self) -> Result<Devices, NotComing> {
        let state = self.lock();
        let state = self
            .changed
            .wait_while(state, |state| matches!(state, State::Coming))
            .unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Here(devices) => Ok(devices.clone()),
            State::Coming | State::Failed => Err(NotComing),
        }
    }

    /// Waits for a moment, or until nothing more lands.
    fn collect(&self) {
        let state = self.lock();
        let coming = |state: &mut State| matches!(state, State::Coming);
        // Whether it was over or the time was is looked at again.
        drop(self.changed.wait_timeout_while(state, COLLECT, coming));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What has landed is what is dirty. When nothing has, it waits until something has or the guest is
/// here: a migration that sends it on is over only when there is nothing left to wait for.
#[derive(Clone, Debug)]
pub struct LandedLog(pub Arc<Arrival>);

impl DirtyLog for LandedLog {
    fn start(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        loop {
            self.0.collect();
            if self.0.has_failed() {
                return Err(MemoryError::Backend {
                    what: "sending on what arrives",
                    source: Box::new(NotComing),
                });
            }
            // First this: what lands later is found by the next look.
            let is_coming = self.0.is_coming();
            let mut any = false;
            self.0.memory.take_landed(&mut |block, first, word| {
                any = true;
                sink(block, first, word);
            });
            if any || !is_coming {
                return Ok(());
            }
        }
    }

    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }

    fn begins_with_every_page(&self) -> bool {
        false
    }
}

/// The guest does not come, for a reason that the receiving side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest does not arrive")]
pub struct NotComing;

#[cfg(test)]
mod tests {
    use std::thread;

    use migration_stream::ram::{RamBlock, RamBlockTable};
    use migration_stream::raw::dirty_bitmap::BitmapSections;
    use migration_stream::{MachineName, PAGE_SIZE, PageStore, Tail, TailLimits};

    use super::*;

    fn arrival() -> Arc<Arrival> {
        let blocks = RamBlockTable::new(vec![
            RamBlock::new("pc.ram", 200 * PAGE_SIZE).unwrap(),
            RamBlock::new("rom", PAGE_SIZE).unwrap(),
        ]);
        let memory = Memory::new(blocks.unwrap(), u64::MAX, Arc::default()).unwrap();
        let configuration = Some(Configuration::new(MachineName::new("microvm").unwrap()));
        let early = EarlySections::new();
        Arc::new(Arrival::new(Arc::new(memory), configuration, early))
    }

    fn synced(log: &mut LandedLog) -> Vec<(usize, u64, u64)> {
        let mut words = Vec::new();
        log.sync(&mut |block, first, word| words.push((block.index(), first, word)))
            .unwrap();
        words
    }

    fn devices() -> Devices {
        let bytes = include_bytes!("../../../migration-stream/tests/data/microvm-11.1.3.tail");
        Devices {
            tail: Tail::decode(bytes, TailLimits::default()).unwrap(),
            bitmaps: BitmapSections::new(),
        }
    }

    #[test]
    fn what_landed_is_reported_once_and_by_whole_words() {
        let arrival = arrival();
        let mut log = LandedLog(Arc::clone(&arrival));
        let (ram, rom) = (BlockId::new(0), BlockId::new(1));
        arrival
            .memory
            .landed(ram, 62 * PAGE_SIZE, 4 * 4096)
            .unwrap();
        arrival.memory.zero(ram, 199 * PAGE_SIZE, 4096).unwrap();
        arrival.memory.landed(rom, 0, 4096).unwrap();
        assert_eq!(
            synced(&mut log),
            [(0, 0, 3 << 62), (0, 64, 3), (0, 192, 1 << 7), (1, 0, 1)]
        );
        arrival.memory.landed(ram, 0, 4096).unwrap();
        assert_eq!(synced(&mut log), [(0, 0, 1)]);
        arrival.end(Some(devices()));
        assert_eq!(synced(&mut log), []);
        assert!(arrival.wait().is_ok());
    }

    #[test]
    fn a_log_waits_for_pages_as_long_as_the_guest_is_coming() {
        let arrival = arrival();
        let mut log = LandedLog(Arc::clone(&arrival));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| synced(&mut log));
            thread::sleep(3 * COLLECT);
            assert!(!waiting.is_finished());
            arrival.memory.landed(BlockId::new(1), 0, 4096).unwrap();
            assert_eq!(waiting.join().unwrap(), [(1, 0, 1)]);
        });
    }

    #[test]
    fn nobody_waits_for_a_guest_that_does_not_come() {
        let arrival = arrival();
        thread::scope(|scope| {
            let log = scope.spawn(|| LandedLog(Arc::clone(&arrival)).sync(&mut |_, _, _| {}));
            let devices = scope.spawn(|| arrival.wait());
            arrival.end(None);
            assert!(log.join().unwrap().is_err());
            assert_eq!(devices.join().unwrap().unwrap_err(), NotComing);
        });
        assert!(arrival.has_failed() && !arrival.is_coming());
    }
}
