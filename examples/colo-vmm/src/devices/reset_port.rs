//! The reset line of a keyboard controller, which is how most guests reboot: command 0xfe at port
//! 0x64. Nothing else of the controller is there, and it has no state.

use super::PortDevice;
use crate::machine::GuestExit;

/// The controller's port for commands and status.
pub const RESET_PORT: u16 = 0x64;
/// The command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;

/// The device.
#[derive(Clone, Copy, Debug, Default)]
pub struct ResetPort;

impl PortDevice for ResetPort {
    /// It has taken every command, and has nothing to say.
    fn read(&mut self, _offset: u16) -> u8 {
        0
    }

    fn write(&mut self, _offset: u16, value: u8) -> Option<GuestExit> {
        (value == PULSE_RESET).then_some(GuestExit::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_command_resets_and_the_others_do_nothing() {
        let mut port = ResetPort;
        for value in 0..=0xff {
            let exit = (value == 0xfe).then_some(GuestExit::Reset);
            assert_eq!(port.write(0, value), exit, "{value:#x}");
        }
        assert_eq!(port.read(0), 0);
    }
}
