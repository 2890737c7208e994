//! The first serial port: an 8250 at 0x3f8 on interrupt 4.
//!
//! The interrupt is raised by an ioctl and not through an irqfd. KVM may deliver an irqfd's
//! interrupt later, from a kernel thread: after the VM was stopped and its state saved.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vm_superio::serial::{Error as SerialError, NoEvents, Serial, SerialState as Registers};
use vmstate::{Device, DeviceError, VmState};

use super::{KvmDeviceError, PortDevice};
use crate::machine::{GuestExit, SerialSink};

/// The ports of COM1.
pub const COM1_PORTS: Range<u16> = 0x3f8..0x400;
/// Its interrupt.
const COM1_IRQ: u32 = 4;

/// Bytes the receive buffer holds.
const FIFO: usize = 64;

/// The port's registers.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "serial", version = 1)]
pub struct SerialState {
    /// Divisor latch, low and high byte.
    pub divisor: [u8; 2],
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Interrupt identification.
    pub interrupt_identification: u8,
    /// Line control and line status.
    pub line: [u8; 2],
    /// Modem control and modem status.
    pub modem: [u8; 2],
    /// Scratch.
    pub scratch: u8,
    /// How many bytes have been received and not been read.
    pub received_count: u32,
    /// Those bytes.
    #[vmstate(len = received_count, max = FIFO)]
    pub received: Vec<u8>,
}

/// Interrupt 4, as an edge.
#[derive(Clone)]
struct Interrupt {
    // None: there is no interrupt controller to tell.
    vm: Option<Arc<VmFd>>,
    // vm-superio raises pending interrupts when it takes state; but the interrupt controllers
    // have state of their own, which says whether it was delivered.
    muted: Arc<AtomicBool>,
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.muted.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Some(vm) = &self.vm {
            vm.set_irq_line(COM1_IRQ, true)?;
            vm.set_irq_line(COM1_IRQ, false)?;
        }
        Ok(())
    }
}

type Uart = Serial<Interrupt, NoEvents, SharedSink>;

/// The sink outlives the UART, which is made anew when state is installed.
#[derive(Clone)]
struct SharedSink(Arc<Mutex<SerialSink>>);

impl io::Write for SharedSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .flush()
    }
}

/// The serial port: shared between the bus, the device tree and whoever types.
#[derive(Clone)]
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    interrupt: Interrupt,
    sink: SharedSink,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port at power-on that writes to `sink`. Without an interrupt controller in `vm` pass
    /// `None`.
    #[must_use]
    pub fn new(vm: Option<Arc<VmFd>>, sink: SerialSink) -> Self {
        let interrupt = Interrupt {
            vm,
            muted: Arc::default(),
        };
        let sink = SharedSink(Arc::new(Mutex::new(sink)));
        Self {
            uart: Arc::new(Mutex::new(Serial::new(interrupt.clone(), sink.clone()))),
            interrupt,
            sink,
        }
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives as many of `bytes` as there is room for, and says how many.
    ///
    /// # Errors
    /// The interrupt cannot be raised.
    pub fn receive(&self, bytes: &[u8]) -> Result<usize, KvmDeviceError> {
        let mut uart = self.uart();
        let room = bytes.len().min(uart.fifo_capacity());
        uart.enqueue_raw_bytes(&bytes[..room])
            .map_err(|error| KvmDeviceError::Interrupt(into_io(error)))
    }

    fn set(&self, registers: &Registers) -> Result<(), KvmDeviceError> {
        self.interrupt.muted.store(true, Ordering::Relaxed);
        let uart = Serial::from_state(
            registers,
            self.interrupt.clone(),
            NoEvents,
            self.sink.clone(),
        );
        self.interrupt.muted.store(false, Ordering::Relaxed);
        *self.uart() = uart.map_err(|error| KvmDeviceError::Interrupt(into_io(error)))?;
        Ok(())
    }
}

fn into_io(error: SerialError<io::Error>) -> io::Error {
    match error {
        SerialError::Trigger(error) | SerialError::IOError(error) => error,
        SerialError::FullFifo => io::Error::new(io::ErrorKind::StorageFull, "the fifo is full"),
    }
}

impl PortDevice for SerialPort {
    fn read(&mut self, offset: u16) -> u8 {
        u8::try_from(offset).map_or(0xff, |offset| self.uart().read(offset))
    }

    fn write(&mut self, offset: u16, value: u8) -> Option<GuestExit> {
        let offset = u8::try_from(offset).ok()?;
        // A real port does not notice that nobody listens, and neither does the guest.
        if let Err(error) = self.uart().write(offset, value) {
            tracing::debug!(%error, "serial output lost");
        }
        None
    }
}

impl Device for SerialPort {
    type State = SerialState;

    fn save(&mut self) -> Result<SerialState, DeviceError> {
        let r = self.uart().state();
        Ok(SerialState {
            divisor: [r.baud_divisor_low, r.baud_divisor_high],
            interrupt_enable: r.interrupt_enable,
            interrupt_identification: r.interrupt_identification,
            line: [r.line_control, r.line_status],
            modem: [r.modem_control, r.modem_status],
            scratch: r.scratch,
            received_count: u32::try_from(r.in_buffer.len()).unwrap_or(u32::MAX),
            received: r.in_buffer,
        })
    }

    fn check(&self, _state: &SerialState) -> Result<(), DeviceError> {
        // Every byte is a value of its register, and the parser bounds the buffer.
        Ok(())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(self.set(&Registers::default())?)
    }

    fn install(&mut self, state: SerialState) -> Result<(), DeviceError> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let [line_control, line_status] = state.line;
        let [modem_control, modem_status] = state.modem;
        Ok(self.set(&Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        })?)
    }
}
