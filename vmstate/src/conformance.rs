//! A check that a [`Device`] keeps the promises that migration and COLO build on.

use crate::{Device, DeviceError, DeviceStep, LoadError, Reader, SaveError, VmState, to_bytes};

/// Checks a device, and leaves it in the state in which it was given.
///
/// Bring the device into a state that differs from the one after a reset, and as unusual as can
/// be, before. Then: saving does not change it; its bytes can be read, from a stream as well as
/// from a buffer, and no part of them passes for the whole; damaged bytes give a value or an
/// error; a reset changes it, to one and the same state each time; the saved state can be
/// installed after a reset, and saving gives the same bytes again.
///
/// # Errors
/// The first promise that is not kept.
pub fn conformance<D: Device>(device: &mut D) -> Result<(), Nonconformance> {
    let saved = save(device)?;
    same("saving twice", &saved, &save(device)?)?;
    check_codec::<D::State>(&saved)?;

    let state = load::<D::State>(&saved)?;
    device.check(&state).map_err(failed(DeviceStep::Check))?;
    device.reset().map_err(failed(DeviceStep::Reset))?;
    let reset = save(device)?;
    if reset == saved {
        return Err(Nonconformance::ResetChangesNothing);
    }
    device.reset().map_err(failed(DeviceStep::Reset))?;
    same("a second reset", &reset, &save(device)?)?;

    device.install(state).map_err(failed(DeviceStep::Install))?;
    same("installing the saved state", &saved, &save(device)?)?;
    device.reset().map_err(failed(DeviceStep::Reset))?;
    same("a reset after loading", &reset, &save(device)?)?;
    device
        .install(load(&saved)?)
        .map_err(failed(DeviceStep::Install))?;
    same("installing a second time", &saved, &save(device)?)
}

/// The promises that bytes alone can show.
fn check_codec<T: VmState>(saved: &[u8]) -> Result<(), Nonconformance> {
    let mut stream = saved.to_vec();
    // What comes next in a stream is the footer.
    stream.push(0x7e);
    let mut input = Reader::partial(&stream);
    input.description::<T>(T::VERSION)?;
    if input.offset() != saved.len() {
        return Err(Nonconformance::Length {
            written: saved.len(),
            read: input.offset(),
        });
    }
    for len in 0..=saved.len() {
        match Reader::partial(&stream[..len]).description::<T>(T::VERSION) {
            Err(error) if error.is_truncated() => {}
            _ => {
                return Err(Nonconformance::PartTakenForWhole {
                    len,
                    of: saved.len(),
                });
            }
        }
    }
    for i in 0..saved.len() {
        let mut damaged = saved.to_vec();
        damaged[i] = !damaged[i];
        // A value or an error: what counts is that it returns.
        let _ = Reader::complete(&damaged).description::<T>(T::VERSION);
    }
    Ok(())
}

fn save<D: Device>(device: &mut D) -> Result<Vec<u8>, Nonconformance> {
    let state = device.save().map_err(failed(DeviceStep::Save))?;
    Ok(to_bytes(&state)?)
}

fn load<T: VmState>(bytes: &[u8]) -> Result<T, Nonconformance> {
    Ok(crate::from_bytes(bytes, T::VERSION)?)
}

fn same(after: &'static str, expected: &[u8], found: &[u8]) -> Result<(), Nonconformance> {
    if expected == found {
        return Ok(());
    }
    let common = expected.iter().zip(found).take_while(|(a, b)| a == b);
    Err(Nonconformance::Differs {
        after,
        offset: common.count(),
        expected: expected.len(),
        found: found.len(),
    })
}

fn failed(step: DeviceStep) -> impl Fn(DeviceError) -> Nonconformance {
    move |source| Nonconformance::Device { step, source }
}

/// A promise that a device does not keep.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Nonconformance {
    /// The device refused.
    #[error("the device cannot {step}")]
    Device {
        /// What it was asked to do.
        step: DeviceStep,
        /// Why it did not.
        #[source]
        source: DeviceError,
    },
    /// The state contradicts itself.
    #[error("the state cannot be written")]
    Save(#[from] SaveError),
    /// What was written cannot be read.
    #[error("the state cannot be read")]
    Load(#[from] LoadError),
    /// More or fewer bytes are read than were written.
    #[error("{written} bytes written, {read} of them read")]
    Length {
        /// Bytes written.
        written: usize,
        /// Bytes read.
        read: usize,
    },
    /// The first bytes of a state, with more to come, were not called truncated.
    #[error("the first {len} of {of} bytes are not told from a whole state")]
    PartTakenForWhole {
        /// Number of bytes given.
        len: usize,
        /// Number of bytes in all.
        of: usize,
    },
    /// The state after a reset is the one before. Either `reset` does nothing, or the device was
    /// given in the state that it has after a reset.
    #[error("a reset changes nothing")]
    ResetChangesNothing,
    /// The bytes of two states that should be one differ.
    #[error(
        "after {after} the state differs from byte {offset} on \
         ({found} bytes, expected {expected})"
    )]
    Differs {
        /// What was done.
        after: &'static str,
        /// The first byte that differs.
        offset: usize,
        /// Length of what should be there.
        expected: usize,
        /// Length of what is there.
        found: usize,
    },
}

#[cfg(test)]
#[cfg(feature = "derive")]
mod tests {
    use super::*;

    #[derive(vmstate::VmState, Debug, Clone, Default, PartialEq)]
    #[vmstate(name = "counter", version = 1)]
    struct CounterState {
        count: u32,
        fifo_len: u8,
        #[vmstate(len = "fifo_len", max = 16)]
        fifo: Vec<u8>,
    }

    /// A device with a fault to choose.
    #[derive(Default)]
    struct Counter {
        state: CounterState,
        hidden: u32,
        fault: &'static str,
    }

    impl Counter {
        fn used(fault: &'static str) -> Self {
            Self {
                state: CounterState {
                    count: 7,
                    fifo_len: 2,
                    fifo: vec![5, 6],
                },
                hidden: 0,
                fault,
            }
        }
    }

    impl Device for Counter {
        type State = CounterState;

        fn save(&mut self) -> Result<CounterState, DeviceError> {
            if self.fault == "save counts" {
                self.state.count += 1;
            }
            Ok(self.state.clone())
        }

        fn reset(&mut self) -> Result<(), DeviceError> {
            self.hidden += 1;
            match self.fault {
                "no reset" => {}
                "reset counts" => self.state.count = 100 + self.hidden,
                _ => self.state = CounterState::default(),
            }
            Ok(())
        }

        fn install(&mut self, state: CounterState) -> Result<(), DeviceError> {
            match self.fault {
                "install fails" => return Err("no".into()),
                "install forgets" => self.state.count = state.count,
                _ => self.state = state,
            }
            Ok(())
        }
    }

    #[test]
    fn a_good_device_conforms_and_keeps_its_state() {
        let mut device = Counter::used("");
        conformance(&mut device).unwrap();
        assert_eq!(device.state, Counter::used("").state);
    }

    #[test]
    fn every_broken_promise_is_found() {
        for (fault, said) in [
            ("save counts", "after saving twice the state differs"),
            ("no reset", "a reset changes nothing"),
            ("reset counts", "after a second reset the state differs"),
            ("install fails", "the device cannot be given its state"),
            (
                "install forgets",
                "after installing the saved state the state differs from byte 4 on",
            ),
        ] {
            let error = conformance(&mut Counter::used(fault)).unwrap_err();
            assert!(error.to_string().starts_with(said), "{fault}: {error}");
        }
    }
}
