//! A guest that is only memory, a log of what it writes and one device, at either end.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use migration_stream::precopy::{Control, Progress, SourceEvent, SourceObserver, SourceStatus};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::{
    BoxError, Configuration, DeviceSections, DeviceState, DirtyLog, GuestRamMmap, MachineName,
    MemoryError, PAGE_SIZE, Parsed, SectionHeader, VmControl,
};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Blocks of memory, as source and as target: name and pages of each.
pub fn memory(blocks: &[(&str, u64)]) -> Arc<GuestRamMmap> {
    let table = blocks
        .iter()
        .map(|(name, pages)| RamBlock::new(*name, pages * PAGE_SIZE).unwrap())
        .collect();
    let memory = GuestRamMmap::anonymous(RamBlockTable::new(table).unwrap());
    Arc::new(memory.unwrap())
}

/// Memory by pages.
pub trait Pages {
    fn write(&self, block: usize, page: u64, value: u64);
    fn assert_equals(&self, other: &Self);
}

impl Pages for GuestRamMmap {
    fn write(&self, block: usize, page: u64, value: u64) {
        let offset = usize::try_from(page * PAGE_SIZE).unwrap();
        self.regions()[block]
            .as_volatile_slice()
            .write_obj(value, offset)
            .unwrap();
    }

    fn assert_equals(&self, other: &Self) {
        for (a, b) in self.regions().iter().zip(other.regions()) {
            let read = |r: &MmapRegion| {
                let mut bytes = vec![0; r.size()];
                r.as_volatile_slice().copy_to(&mut bytes);
                bytes
            };
            assert!(read(a) == read(b), "memory differs");
        }
    }
}

/// The pages a test's guest has written, and whether they are being logged.
#[derive(Clone, Debug, Default)]
pub struct Log(pub Arc<Mutex<(bool, Writes)>>);

/// Block and page of each.
pub type Writes = Vec<(usize, u64)>;

impl DirtyLog for Log {
    fn start(&mut self) -> Result<(), MemoryError> {
        self.0.lock().unwrap().0 = true;
        Ok(())
    }
    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        for (block, page) in self.0.lock().unwrap().1.drain(..) {
            sink(
                BlockId::new(u32::try_from(block).unwrap()),
                page / 64 * 64,
                1 << (page % 64),
            );
        }
        Ok(())
    }
    fn stop(&mut self) -> Result<(), MemoryError> {
        self.0.lock().unwrap().0 = false;
        Ok(())
    }
}

/// A guest that writes pages between steps until it is stopped.
pub struct Guest {
    pub ram: Arc<GuestRamMmap>,
    pub log: Log,
    pub writes_left: u64,
    pub running: bool,
    pub control: Control,
    pub passes: u64,
    /// The downtime that is still good enough to switch over.
    pub downtime: Duration,
    /// What to do in the pause before the switch-over, last first.
    pub paused: Vec<Control>,
    pub events: Vec<SourceEvent>,
    pub uuid: Option<[u8; 16]>,
    /// Sections that go before the device's.
    pub sections: Vec<u8>,
    /// The state of a device that is sent before RAM.
    pub early: Option<Vec<u8>>,
    /// When this has ended the guest is switched over, whatever is left.
    pub until: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    pub fn new(ram: &Arc<GuestRamMmap>, log: &Log) -> Self {
        Self {
            ram: Arc::clone(ram),
            log: log.clone(),
            writes_left: 20,
            running: true,
            control: Control::Continue,
            passes: 0,
            downtime: Duration::from_millis(300),
            paused: Vec::new(),
            events: Vec::new(),
            uuid: None,
            sections: Vec::new(),
            early: None,
            until: None,
        }
    }

    pub fn write(&mut self, page: u64) {
        let clears = self.writes_left.is_multiple_of(7);
        let value = if clears {
            0
        } else {
            0xfeed_0000 + self.writes_left
        };
        self.ram.write(0, page, value);
        self.log.0.lock().unwrap().1.push((0, page));
    }
}

impl VmControl for Guest {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.running = false;
        Ok(())
    }
    fn resume(&mut self) -> Result<Instant, BoxError> {
        self.running = true;
        Ok(Instant::now())
    }
}

impl DeviceState for Guest {
    type Section = ();
    type Staged = ();
    type Reset = ();

    fn save_early(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        match &self.early {
            Some(body) => out.push("cpu", 0, 1, body),
            None => Ok(()),
        }
    }
    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        assert!(!self.running);
        assert!(out.wants_description());
        out.append(|_, bytes| bytes.extend_from_slice(&self.sections));
        out.push("thing", 3, 1, &[5; 100])?;
        out.describe(r#"{"page_size": 4096, "devices": [{"name": "thing", "instance_id": 3, "version": 1, "fields": [{"name": "data", "type": "buffer", "size": 100}]}]}"#.into());
        Ok(())
    }
    fn parse(&mut self, _: &SectionHeader, _: &[u8]) -> Result<Parsed<()>, BoxError> {
        Err("this guest is only saved".into())
    }
    fn stage(&mut self, _: Vec<()>) -> Result<(), BoxError> {
        Err("this guest is only saved".into())
    }
    fn reset(&mut self, (): ()) -> Result<(), BoxError> {
        Err("this guest is only saved".into())
    }
    fn install(&mut self, (): ()) -> Result<(), BoxError> {
        Err("this guest is only saved".into())
    }
}

impl SourceObserver for Guest {
    fn progress(&mut self, progress: &Progress) -> Control {
        if progress.status == SourceStatus::PreSwitchover {
            assert!(!self.running, "the guest stands still in the pause");
            return self.paused.pop().unwrap();
        }
        self.passes = progress.pass;
        // A step may last longer than progress waits: the guest may stand still by then.
        if self.running && self.writes_left > 0 {
            self.writes_left -= 1;
            // Pages that were written before among them.
            self.write(self.writes_left % 20 * 3);
        }
        if self.until.as_ref().is_some_and(|u| u.is_finished()) {
            return Control::SwitchOver;
        }
        self.control
    }
    fn event(&mut self, event: SourceEvent) {
        self.events.push(event);
    }
}

pub fn configuration(name: &str) -> Configuration {
    Configuration::new(MachineName::new(name).unwrap())
}
