//! I/O ports: which device answers for which.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::machine::GuestExit;

/// A device behind I/O ports.
pub trait PortDevice: Send {
    /// The guest reads one byte at `offset` from the device's first port.
    fn read(&mut self, offset: u16) -> u8;

    /// The guest writes one byte at `offset`. `Some` ends the guest.
    fn write(&mut self, offset: u16, value: u8) -> Option<GuestExit>;
}

/// All port devices of a machine.
#[derive(Default)]
pub struct PortBus {
    devices: Vec<Entry>,
}

struct Entry {
    ports: Range<u16>,
    device: Arc<Mutex<dyn PortDevice>>,
}

impl fmt::Debug for PortBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.devices.iter().map(|entry| &entry.ports))
            .finish()
    }
}

impl PortBus {
    /// Puts `device` behind `ports`; of two that overlap the first answers.
    pub fn insert(&mut self, ports: Range<u16>, device: Arc<Mutex<dyn PortDevice>>) {
        self.devices.push(Entry { ports, device });
    }

    fn find(&self, port: u16) -> Option<(u16, &Mutex<dyn PortDevice>)> {
        self.devices
            .iter()
            .find(|entry| entry.ports.contains(&port))
            .map(|entry| (port - entry.ports.start, &*entry.device))
    }

    /// The guest reads `data.len()` bytes from `port`. KVM hands over string instructions as
    /// several bytes for one port, and wide accesses likewise: each goes to the device by
    /// itself. Ports without a device read all ones.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        match self.find(port) {
            Some((offset, device)) => {
                let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
                data.fill_with(|| device.read(offset));
            }
            None => data.fill(0xff),
        }
    }

    /// The guest writes `data` to `port`; see [`PortBus::read`]. Writes that nobody answers for
    /// are lost.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<GuestExit> {
        let (offset, device) = self.find(port)?;
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        data.iter()
            .filter_map(|byte| device.write(offset, *byte))
            .next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::DebugExit;

    #[test]
    fn an_empty_port_reads_all_ones_and_ignores_writes() {
        let mut bus = PortBus::default();
        bus.insert(0xf4..0xf5, Arc::new(Mutex::new(DebugExit)));
        let mut data = [0; 2];
        bus.read(0xf5, &mut data);
        assert_eq!(data, [0xff; 2]);
        assert_eq!(bus.write(0xf5, &[1]), None);
        assert_eq!(bus.write(0xf4, &[9]), Some(GuestExit::DebugExit(9)));
    }
}
