//! The registers of virtio-mmio, version 2, as a state machine without I/O.
//!
//! ```text
//! reset --ACKNOWLEDGE, DRIVER--> features --FEATURES_OK--> queues --DRIVER_OK--> live
//!   ^                                                                             |
//!   +------------------------- Status = 0, from every state ----------------------+
//! ```
//!
//! A register is written in its state alone; any other write is ignored. Nothing that a driver
//! writes is checked against memory here: the device does that when it becomes live.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as mmio;

use crate::Interrupt;
use crate::state::{QueueSetup, StateError, TransportState};

/// `virt`, little endian.
pub const MAGIC: u32 = 0x7472_6976;
/// The version of the register layout.
pub const VERSION: u32 = 2;
/// Bytes of guest address space that a device's registers take up.
pub const REGION_BYTES: u64 = 0x200;
/// The most queues that a device has.
pub const MAX_QUEUES: usize = 8;

// The offsets are the specification's, as numbers that addresses are compared with.
macro_rules! registers {
    ($($name:ident = $value:ident;)*) => {
        $(
            #[doc = concat!("Offset of ", stringify!($name), ".")]
            pub const $name: u64 = mmio::$value as u64;
        )*
    };
}

/// Offsets of the registers.
#[allow(clippy::cast_lossless)]
pub mod register {
    use super::mmio;

    registers! {
        MAGIC_VALUE = VIRTIO_MMIO_MAGIC_VALUE;
        VERSION = VIRTIO_MMIO_VERSION;
        DEVICE_ID = VIRTIO_MMIO_DEVICE_ID;
        VENDOR_ID = VIRTIO_MMIO_VENDOR_ID;
        DEVICE_FEATURES = VIRTIO_MMIO_DEVICE_FEATURES;
        DEVICE_FEATURES_SEL = VIRTIO_MMIO_DEVICE_FEATURES_SEL;
        DRIVER_FEATURES = VIRTIO_MMIO_DRIVER_FEATURES;
        DRIVER_FEATURES_SEL = VIRTIO_MMIO_DRIVER_FEATURES_SEL;
        QUEUE_SEL = VIRTIO_MMIO_QUEUE_SEL;
        QUEUE_NUM_MAX = VIRTIO_MMIO_QUEUE_NUM_MAX;
        QUEUE_NUM = VIRTIO_MMIO_QUEUE_NUM;
        QUEUE_READY = VIRTIO_MMIO_QUEUE_READY;
        QUEUE_NOTIFY = VIRTIO_MMIO_QUEUE_NOTIFY;
        INTERRUPT_STATUS = VIRTIO_MMIO_INTERRUPT_STATUS;
        INTERRUPT_ACK = VIRTIO_MMIO_INTERRUPT_ACK;
        STATUS = VIRTIO_MMIO_STATUS;
        QUEUE_DESC_LOW = VIRTIO_MMIO_QUEUE_DESC_LOW;
        QUEUE_DESC_HIGH = VIRTIO_MMIO_QUEUE_DESC_HIGH;
        QUEUE_AVAIL_LOW = VIRTIO_MMIO_QUEUE_AVAIL_LOW;
        QUEUE_AVAIL_HIGH = VIRTIO_MMIO_QUEUE_AVAIL_HIGH;
        QUEUE_USED_LOW = VIRTIO_MMIO_QUEUE_USED_LOW;
        QUEUE_USED_HIGH = VIRTIO_MMIO_QUEUE_USED_HIGH;
        SHM_LEN_LOW = VIRTIO_MMIO_SHM_LEN_LOW;
        SHM_LEN_HIGH = VIRTIO_MMIO_SHM_LEN_HIGH;
        SHM_BASE_LOW = VIRTIO_MMIO_SHM_BASE_LOW;
        SHM_BASE_HIGH = VIRTIO_MMIO_SHM_BASE_HIGH;
        CONFIG_GENERATION = VIRTIO_MMIO_CONFIG_GENERATION;
        CONFIG = VIRTIO_MMIO_CONFIG;
    }
}

/// Bits of the status register.
pub mod status {
    use super::{
        VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
        VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    };

    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
    /// The driver can drive it.
    pub const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
    /// Features are agreed on.
    pub const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
    /// The device is live.
    pub const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
    /// The device does nothing more before a reset.
    pub const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
    /// The driver has given up.
    pub const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

    /// The bits that a driver sets.
    pub(crate) const DRIVERS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
    /// Every bit that a status can have.
    pub(crate) const ALL: u32 = DRIVERS | NEEDS_RESET;
}

/// What kind of device the registers are of.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The virtio device id.
    pub device_id: u32,
    /// The features that the device offers. `VIRTIO_F_VERSION_1` is always among them.
    pub features: u64,
    /// Features that need others: the first is refused without all of the second.
    pub dependencies: &'static [(u64, u64)],
    /// The largest size of each queue, descriptors.
    pub queue_sizes: &'static [u16],
}

/// What the device does after a register was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// Nothing.
    None,
    /// Looks at a queue.
    Notify(u16),
    /// Checks its queues, and becomes live.
    Activate,
    /// Forgets queues and features. The registers are reset already.
    Reset,
    /// Uses no buffer of a queue any more.
    StopQueue(u16),
    /// Uses no buffer of any queue any more: the driver has given up.
    Fail,
    /// Takes a write to its configuration space, at this offset in it.
    Config(u64),
}

/// The registers of one device.
#[derive(Debug)]
pub struct Transport {
    identity: Identity,
    interrupt: Arc<Interrupt>,
    status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    generation: u32,
    queues: Vec<QueueSetup>,
    config: Vec<u8>,
}

impl Transport {
    /// Returns the registers of a device after a reset, with `config` as its configuration space.
    #[must_use]
    pub fn new(mut identity: Identity, config: Vec<u8>, interrupt: Arc<Interrupt>) -> Self {
        identity.features |= 1 << VIRTIO_F_VERSION_1;
        let queues = identity.queue_sizes.iter().take(MAX_QUEUES);
        Self {
            queues: queues.map(|max| QueueSetup::new(*max)).collect(),
            identity,
            interrupt,
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            generation: 0,
            config,
        }
    }

    /// Puts the registers into their state after a reset. The configuration stays.
    pub fn reset(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.interrupt.set(0);
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }

    /// Puts the registers into their state at power-on.
    pub fn power_on(&mut self) {
        self.reset();
        self.generation = 0;
    }

    /// Returns the status register.
    #[must_use]
    pub const fn status(&self) -> u32 {
        self.status
    }

    /// Returns the features that device and driver have agreed on; none before they have.
    #[must_use]
    pub const fn features(&self) -> u64 {
        if self.status & status::FEATURES_OK == 0 {
            0
        } else {
            self.driver_features
        }
    }

    /// Returns whether the driver has made the device live, and neither has given up.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::FAILED | status::NEEDS_RESET)
            == status::DRIVER_OK
    }

    /// Returns what the driver has written about its queues. It is not checked.
    #[must_use]
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Returns what kind of device it is.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Tells the driver that the device does nothing more before a reset.
    pub fn needs_reset(&mut self) {
        let live = self.status & status::DRIVER_OK != 0;
        self.status |= status::NEEDS_RESET;
        if live {
            self.interrupt.config_changed();
        }
    }

    /// Changes the configuration space, and tells a driver that has begun to use the device.
    pub fn set_config(&mut self, config: Vec<u8>) {
        if self.config == config {
            return;
        }
        self.config = config;
        self.generation = self.generation.wrapping_add(1);
        if self.status & status::DRIVER_OK != 0 {
            self.interrupt.config_changed();
        }
    }

    /// Changes the configuration space as the driver has asked: it knows.
    pub(crate) fn set_config_silently(&mut self, config: Vec<u8>) {
        self.config = config;
    }

    /// Reads a register, or bytes of the configuration space. What is not there reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(self.config.iter().skip(at)) {
                *byte = *value;
            }
            return;
        }
        let queue = self.queue();
        let value = match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.identity.device_id,
            register::DEVICE_FEATURES => half(self.identity.features, self.device_features_sel),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size.into()),
            register::QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS => self.interrupt.status(),
            register::STATUS => self.status,
            register::CONFIG_GENERATION => self.generation,
            // There is no shared memory: its length reads as all ones.
            register::SHM_LEN_LOW
            | register::SHM_LEN_HIGH
            | register::SHM_BASE_LOW
            | register::SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        };
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = value.to_le_bytes();
        }
    }

    /// Writes a register. Accesses of another width than 32 bits reach the configuration space alone.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let Some(at) = offset.checked_sub(register::CONFIG) {
            return Action::Config(at);
        }
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return Action::None;
        };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES if self.status & status::FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_NUM => {
                self.set_up(|queue| queue.size = u16::try_from(value).unwrap_or(0));
            }
            register::QUEUE_DESC_LOW => self.set_up(|q| set_half(&mut q.desc_table, 0, value)),
            register::QUEUE_DESC_HIGH => self.set_up(|q| set_half(&mut q.desc_table, 1, value)),
            register::QUEUE_AVAIL_LOW => self.set_up(|q| set_half(&mut q.avail_ring, 0, value)),
            register::QUEUE_AVAIL_HIGH => self.set_up(|q| set_half(&mut q.avail_ring, 1, value)),
            register::QUEUE_USED_LOW => self.set_up(|q| set_half(&mut q.used_ring, 0, value)),
            register::QUEUE_USED_HIGH => self.set_up(|q| set_half(&mut q.used_ring, 1, value)),
            register::QUEUE_READY if value == 0 => return self.stop_queue(),
            register::QUEUE_READY => self.set_up(|queue| queue.ready = true),
            register::QUEUE_NOTIFY => {
                if let Ok(queue) = u16::try_from(value)
                    && usize::from(queue) < self.queues.len()
                {
                    return Action::Notify(queue);
                }
            }
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => return self.set_status(value),
            _ => {}
        }
        Action::None
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    /// Changes the selected queue, if its turn is now: features are agreed on, and neither the
    /// queue nor the device is in use.
    fn set_up(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        let phase = status::FEATURES_OK | status::DRIVER_OK | status::FAILED | status::NEEDS_RESET;
        if self.status & phase != status::FEATURES_OK {
            return;
        }
        let selected = usize::try_from(self.queue_sel).ok();
        if let Some(queue) = selected.and_then(|index| self.queues.get_mut(index))
            && !queue.ready
        {
            change(queue);
        }
    }

    fn stop_queue(&mut self) -> Action {
        let selected = usize::try_from(self.queue_sel).ok();
        let Some(queue) = selected.and_then(|index| self.queues.get_mut(index)) else {
            return Action::None;
        };
        queue.ready = false;
        u16::try_from(self.queue_sel).map_or(Action::None, Action::StopQueue)
    }

    fn set_status(&mut self, value: u32) -> Action {
        if value == 0 {
            self.reset();
            return Action::Reset;
        }
        let old = self.status & status::DRIVERS;
        // Only a reset clears a bit.
        if old & !value != 0 {
            return Action::None;
        }
        let mut set = value & status::DRIVERS & !old;
        let with = |set: u32, bit: u32| (old | set) & bit != 0;
        if set & status::FEATURES_OK != 0
            && !(with(set, status::DRIVER) && self.features_acceptable())
        {
            set &= !status::FEATURES_OK;
        }
        if set & status::DRIVER_OK != 0
            && (!with(set, status::FEATURES_OK) || with(set, status::FAILED))
        {
            set &= !status::DRIVER_OK;
        }
        self.status |= set;
        if set & status::DRIVER_OK != 0 {
            Action::Activate
        } else if set & status::FAILED != 0 {
            Action::Fail
        } else {
            Action::None
        }
    }

    fn features_acceptable(&self) -> bool {
        let chosen = self.driver_features;
        chosen & !self.identity.features == 0
            && chosen & (1 << VIRTIO_F_VERSION_1) != 0
            && (self.identity.dependencies.iter())
                .all(|(feature, needs)| chosen & feature == 0 || chosen & needs == *needs)
    }

    /// Returns the registers' state. The positions in the rings are added by who uses the queues.
    #[must_use]
    pub fn save(&self) -> TransportState {
        TransportState {
            device_id: self.identity.device_id,
            status: self.status,
            driver_features: self.driver_features,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            queue_sel: self.queue_sel,
            interrupt_status: self.interrupt.status(),
            config_generation: self.generation,
            // At most MAX_QUEUES.
            queue_count: u16::try_from(self.queues.len()).unwrap_or(u16::MAX),
            queues: self.queues.clone(),
        }
    }

    /// Checks that `state` is one of registers of this device.
    ///
    /// # Errors
    /// The first field that cannot be, or that this device does not have.
    pub fn check(&self, state: &TransportState) -> Result<(), StateError> {
        let refuse = |field, value: u64| Err(StateError::Value { field, value });
        if state.device_id != self.identity.device_id {
            return refuse("device_id", state.device_id.into());
        }
        let is = |bit: u32| state.status & bit != 0;
        if state.status & !status::ALL != 0
            || is(status::FEATURES_OK) && !is(status::DRIVER)
            || is(status::DRIVER_OK) && !is(status::FEATURES_OK)
        {
            return refuse("status", state.status.into());
        }
        if is(status::FEATURES_OK) {
            let probe = Self {
                identity: self.identity.clone(),
                interrupt: Arc::clone(&self.interrupt),
                driver_features: state.driver_features,
                queues: Vec::new(),
                config: Vec::new(),
                ..*self
            };
            if !probe.features_acceptable() {
                let missing = state.driver_features & !self.identity.features;
                return Err(StateError::Features {
                    features: state.driver_features,
                    missing,
                });
            }
        }
        if state.interrupt_status & !Interrupt::MASK != 0 {
            return refuse("interrupt_status", state.interrupt_status.into());
        }
        if state.queues.len() != self.queues.len() {
            return refuse("queue_count", state.queues.len() as u64);
        }
        for (theirs, ours) in state.queues.iter().zip(&self.queues) {
            if theirs.max_size != ours.max_size {
                return refuse("max_size", theirs.max_size.into());
            }
            if theirs.ready && !is(status::FEATURES_OK) {
                return refuse("ready", 1);
            }
        }
        Ok(())
    }

    /// Takes on a state that [`Transport::check`] has accepted.
    pub fn install(&mut self, state: &TransportState) {
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.queue_sel = state.queue_sel;
        self.generation = state.config_generation;
        self.queues.clone_from(&state.queues);
        self.interrupt.set(state.interrupt_status);
    }
}

/// The lower (0) or upper (1) half of a 64-bit value; there are no others.
fn half(value: u64, which: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match which {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(value: &mut u64, which: u32, to: u32) {
    match which {
        0 => *value = *value >> 32 << 32 | u64::from(to),
        1 => *value = *value & u64::from(u32::MAX) | u64::from(to) << 32,
        _ => {}
    }
}
