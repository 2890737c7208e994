//! The debug-exit port: a guest writes a byte, and the VM ends with it. As QEMU's
//! `isa-debug-exit` at `iobase=0xf4,iosize=1`. It has no state.

use super::PortDevice;
use crate::machine::GuestExit;

/// The device's port.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;

/// The device.
#[derive(Clone, Copy, Debug, Default)]
pub struct DebugExit;

impl PortDevice for DebugExit {
    fn read(&mut self, _offset: u16) -> u8 {
        0xff
    }

    fn write(&mut self, _offset: u16, value: u8) -> Option<GuestExit> {
        Some(GuestExit::DebugExit(value))
    }
}
