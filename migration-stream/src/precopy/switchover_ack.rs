//! The capability `switchover-ack`: devices of the destination that have to be ready before the
//! guest stops at the source.

use std::sync::atomic::{AtomicU32, Ordering};

/// The devices of a target that acknowledge the switch-over; shared between them and the
/// [`Target`](super::Target), which sends the messages.
///
/// Who counts changed with QEMU 11.1's machine types: before, the destination sends one message
/// when all devices are ready (also when there are none); since then the source counts one message
/// for each device.
#[derive(Debug)]
pub struct SwitchoverAcks {
    devices: u32,
    one_for_all: bool,
    ready: AtomicU32,
}

impl SwitchoverAcks {
    /// Each of `devices` devices acknowledges for itself (machine types of QEMU 11.1 on).
    #[must_use]
    pub const fn each(devices: u32) -> Self {
        Self {
            devices,
            one_for_all: false,
            ready: AtomicU32::new(0),
        }
    }

    /// One message when all of `devices` devices are ready (machine types before QEMU 11.1,
    /// `switchover-ack-legacy`).
    #[must_use]
    pub const fn one_for_all(devices: u32) -> Self {
        Self {
            devices,
            one_for_all: true,
            ready: AtomicU32::new(0),
        }
    }

    /// A device is ready; the message leaves with the next item of the stream. `false` if all were
    /// ready already: there is nothing more to acknowledge.
    pub fn device_is_ready(&self) -> bool {
        let one_more = |ready| (ready < self.devices).then_some(ready + 1);
        // Nothing else is published by it.
        self.ready
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .is_ok()
    }

    /// How many messages should have left by now.
    pub(super) fn owed(&self) -> u32 {
        let ready = self.ready.load(Ordering::Relaxed);
        if self.one_for_all {
            u32::from(ready == self.devices)
        } else {
            ready
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_11_1_one_message_stands_for_all_devices_even_for_none() {
        assert_eq!(SwitchoverAcks::one_for_all(0).owed(), 1);
        let acks = SwitchoverAcks::one_for_all(2);
        assert_eq!(acks.owed(), 0);
        assert!(acks.device_is_ready());
        assert_eq!(acks.owed(), 0);
        assert!(acks.device_is_ready());
        assert_eq!(acks.owed(), 1);
        assert!(!acks.device_is_ready());
        assert_eq!(acks.owed(), 1);
    }

    #[test]
    fn since_11_1_each_device_has_its_message_and_none_more() {
        assert_eq!(SwitchoverAcks::each(0).owed(), 0);
        let acks = SwitchoverAcks::each(2);
        for owed in [1, 2] {
            assert!(acks.device_is_ready());
            assert_eq!(acks.owed(), owed);
        }
        assert!(!acks.device_is_ready());
        assert_eq!(acks.owed(), 2);
    }
}
