//! A VM that keeps books: what it is, what it was when it last ran, and what it was told.

use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use colo_core::{
    CheckpointReport, ColoExit, ColoObserver, Outcome, PacketGate, Replication, Role, Step,
    StepPhase, VmError, Wait,
};
use migration_stream::ram::{BlockId, RamBlock, RamBlockTable};
use migration_stream::{
    BoxError, DeviceSections, DeviceState, DirtyLog, GuestRamMmap, MemoryError, PAGE_SIZE, Parsed,
    SectionHeader, VmControl,
};
use vm_memory::{Bytes as _, VolatileMemory};

use super::oracle;
use super::script::{Ask, BLOCK, PAGES, device_blob};
use super::world::{Shared, lock};

/// A call that fails, the first time.
#[derive(Clone, Default)]
pub struct Fault(Arc<Mutex<Option<u8>>>);

impl Fault {
    /// `byte` names the call; 0 none.
    pub fn of(byte: u8) -> Self {
        Self(Arc::new(Mutex::new((byte > 0).then_some(byte))))
    }

    fn check(&self, call: u8) -> Result<(), VmError> {
        let mut fault = lock(&self.0);
        if *fault == Some(call) {
            *fault = None;
            return Err(VmError::new("a test", "an injected fault"));
        }
        Ok(())
    }
}

/// What the guest has written since it was last asked.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<u64>>);

impl DirtyLog for Log {
    fn start(&mut self) -> Result<(), MemoryError> {
        *lock(&self.0) = 0;
        Ok(())
    }
    fn sync(&mut self, sink: &mut dyn FnMut(BlockId, u64, u64)) -> Result<(), MemoryError> {
        let written = std::mem::take(&mut *lock(&self.0));
        if written != 0 {
            sink(BlockId::new(0), 0, written);
        }
        Ok(())
    }
    fn stop(&mut self) -> Result<(), MemoryError> {
        Ok(())
    }
}

pub struct Guest {
    pub ram: Arc<GuestRamMmap>,
    pub log: Log,
    pub world: Shared,
    pub fault: Fault,
    /// Who decides when nobody has.
    pub decision: Ask,
    pub running: bool,
    pub exits: Vec<ColoExit>,
    device: u64,
    /// What the guest itself has made of its memory, from the state that it was last let run in.
    own: Vec<u8>,
    /// What its memory is if nothing but whole checkpoints has been sent. `None` where pages come on
    /// channels, which nobody here counts.
    model: Option<Vec<u8>>,
    /// Checkpoints that were installed, and that were complete on this side.
    pub installed: u64,
    pub complete: u64,
    /// Another state than its own was put in place.
    pub fresh: bool,
    ticks: u8,
    broken: bool,
}

pub fn memory() -> GuestRamMmap {
    let block = RamBlock::new(BLOCK, PAGES * PAGE_SIZE).expect("a block");
    let table = RamBlockTable::new(vec![block]).expect("a table");
    GuestRamMmap::anonymous(table).expect("memory")
}

fn bytes(ram: &GuestRamMmap) -> Vec<u8> {
    let region = &ram.regions()[0];
    let mut bytes = vec![0; region.size()];
    region.as_volatile_slice().copy_to(&mut bytes[..]);
    bytes
}

impl Guest {
    pub fn new(world: &Shared, fault: Fault, decision: Ask, channels: bool) -> Self {
        let ram = memory();
        let own = bytes(&ram);
        Self {
            log: Log::default(),
            world: Arc::clone(world),
            fault,
            decision,
            running: false,
            exits: Vec::new(),
            device: 0,
            model: (!channels).then(|| own.clone()),
            own,
            ram: Arc::new(ram),
            installed: 0,
            complete: 0,
            fresh: false,
            ticks: 0,
            broken: false,
        }
    }

    fn write(&mut self) {
        self.ticks = self.ticks.wrapping_add(1);
        let page = u64::from(self.ticks) % PAGES;
        let at = usize::try_from(page * PAGE_SIZE).expect("a small guest") + 8;
        let region = self.ram.regions()[0].as_volatile_slice();
        region
            .write_obj(self.ticks, at)
            .expect("a page of the guest");
        *lock(&self.log.0) |= 1 << page;
    }

    /// The driver has ended with this.
    pub fn check_end(&self, outcome: Outcome) {
        assert_eq!(self.exits.len(), 1, "{:?}", self.exits);
        match outcome {
            Outcome::TookOver => assert!(self.running),
            Outcome::Quit => {}
            Outcome::Broken(_) => assert!(self.broken || !self.running),
        }
    }
}

impl VmControl for Guest {
    fn pause(&mut self) -> Result<(), BoxError> {
        self.fault.check(1).inspect_err(|_| self.broken = true)?;
        if self.running {
            assert!(bytes(&self.ram) == self.own, "a running guest was changed");
        }
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<Instant, BoxError> {
        self.fault.check(2)?;
        let now = bytes(&self.ram);
        if std::mem::take(&mut self.fresh) {
            if let Some(model) = &self.model {
                assert!(now == *model, "a mixture of two checkpoints runs");
            }
        } else {
            assert!(now == self.own, "part of a checkpoint runs");
        }
        let resumed = Instant::now();
        self.running = true;
        self.world.begin();
        self.write();
        self.write();
        self.own = bytes(&self.ram);
        Ok(resumed)
    }
}

impl DeviceState for Guest {
    type Section = Infallible;
    type Staged = u64;
    type Reset = u64;

    fn save(&mut self, out: &mut DeviceSections<'_>) -> Result<(), BoxError> {
        self.fault.check(3)?;
        assert!(!self.running);
        self.device += 1;
        out.append(|_, out| out.extend(device_blob(self.device)));
        Ok(())
    }

    fn parse(&mut self, _: &SectionHeader, _: &[u8]) -> Result<Parsed<Infallible>, BoxError> {
        Err("no device was sent".into())
    }

    fn stage(&mut self, _: Vec<Infallible>) -> Result<u64, BoxError> {
        Ok(0)
    }

    fn stage_checkpoint(&mut self, state: &[u8]) -> Result<u64, BoxError> {
        assert!(!self.running);
        let value = state.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        match value {
            Some(value) if state == device_blob(value) => Ok(value),
            _ => Err("it is not sound".into()),
        }
    }

    fn reset(&mut self, staged: u64) -> Result<u64, BoxError> {
        self.fault.check(4)?;
        assert!(!self.running);
        assert!(
            self.installed < self.world.promised.load(Ordering::Relaxed),
            "a checkpoint that was not promised"
        );
        self.write();
        Ok(staged)
    }

    fn install(&mut self, reset: u64) -> Result<(), BoxError> {
        self.fault.check(5)?;
        self.device = reset;
        self.installed += 1;
        self.fresh = true;
        if let Some(model) = &mut self.model {
            let delivered = lock(&self.world.delivered);
            let all = oracle::complete(&delivered, false);
            let at = usize::try_from(self.installed - 1).expect("few checkpoints");
            for (page, content) in &all[at] {
                let at = usize::try_from(page * PAGE_SIZE).expect("a small guest");
                model[at..at + 4096].copy_from_slice(content);
            }
        }
        Ok(())
    }
}

impl ColoObserver for Guest {
    fn on_step(&mut self, step: Step, phase: StepPhase) {
        if (step, phase) == (Step::Await(Wait::Decision), StepPhase::Begins) {
            self.world.decide(self.decision);
        }
    }

    fn colo_exit(&mut self, exit: &ColoExit) {
        self.exits.push(*exit);
    }

    fn checkpoint_done(&mut self, report: &CheckpointReport) {
        assert!(self.running);
        self.complete += 1;
        assert_eq!(report.number, self.complete);
    }
}

/// Disks and output that may fail.
pub struct Outside(pub Fault);

impl Replication for Outside {
    fn start(&mut self, _: Role) -> Result<(), VmError> {
        self.0.check(6)
    }
    fn check(&mut self) -> Result<(), VmError> {
        self.0.check(7)
    }
    fn checkpoint(&mut self) -> Result<(), VmError> {
        self.0.check(8)
    }
    fn stop(&mut self, _: bool) -> Result<(), VmError> {
        self.0.check(9)
    }
}

impl PacketGate for Outside {
    fn hold(&mut self) -> Result<(), VmError> {
        self.0.check(10)
    }
    fn cut(&mut self) -> Result<(), VmError> {
        self.0.check(11)
    }
    fn release(&mut self) -> Result<(), VmError> {
        self.0.check(12)
    }
    fn discard(&mut self) -> Result<(), VmError> {
        self.0.check(13)
    }
    fn open(&mut self) {}
}
