//! The guest's serial line on its way to the world, and the gate that COLO puts in between.
//!
//! Under COLO both sides run the guest, and the world must hear it once. The secondary's output is
//! held: a checkpoint drops what is held, because the primary has said it, and a failover lets out
//! what was said since, from exactly the byte behind the checkpoint on.
//!
//! The primary has two ways. *At once*: its output goes straight out, and what it said after its last
//! checkpoint is said again after a failover, the same or something else. *Output commit*: it is held
//! too, until the secondary has received the checkpoint that contains what it came from. Then no
//! survivor contradicts what the world has heard; the price is that the world waits for a checkpoint.
//! What a primary was about to let out when it died is lost, as on a line with noise: whoever waits
//! for an answer asks again.
//!
//! The guest does not notice that its output is not read: a disk that is full, a pipe that nobody
//! reads ([`LossyWriter`](crate::lossy_writer::LossyWriter)). That is lost, as on a real line, and a warning says so.

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use colo_core::{PacketGate, VmError};

/// The most output that is held back, bytes. A guest that says more between two checkpoints loses
/// the rest, and a warning says so.
const MAX_HELD: usize = 16 << 20;

/// The guest's serial line. Clones are the same line.
#[derive(Clone)]
pub struct Console {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    out: Box<dyn Write + Send>,
    held: Option<Vec<u8>>,
    /// How much of what is held came before the checkpoint that is being taken.
    covered: usize,
    /// Bytes that there was no room for since the last checkpoint.
    lost: u64,
    said: u64,
    /// Bytes that the way out has not taken since it last took any.
    unheard: u64,
}

impl Console {
    /// A line that ends in `out`, which has no buffer of its own.
    #[must_use]
    pub fn new(out: Box<dyn Write + Send>) -> Self {
        let shared = Shared {
            out,
            held: None,
            covered: 0,
            lost: 0,
            said: 0,
            unheard: 0,
        };
        Self {
            shared: Arc::new(Mutex::new(shared)),
        }
    }

    /// Bytes that the guest of this process has put out so far, held or not.
    #[must_use]
    pub fn said(&self) -> u64 {
        self.lock().said
    }

    /// Bytes that are held back now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.lock().held.as_ref().map_or(0, Vec::len)
    }

    /// What the machine writes into.
    #[must_use]
    pub fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // A panic of another writer leaves at worst a byte out.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Lets out the first `count` bytes that are held.
    fn let_out(&mut self, count: usize) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        let count = count.min(held.len());
        self.put(&held[..count]);
        held.drain(..count);
        self.held = Some(held);
    }

    /// Tells of output that there was no room for, once.
    fn report_lost(&mut self) {
        let bytes = std::mem::take(&mut self.lost);
        if bytes > 0 {
            tracing::warn!(bytes, "serial output since the last checkpoint was lost");
        }
    }

    /// Lets bytes out.
    fn put(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        let mut error = None;
        while !rest.is_empty() && error.is_none() {
            match self.out.write(rest) {
                Ok(0) => error = Some(ErrorKind::WriteZero.into()),
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => error = Some(e),
            }
        }
        match error {
            Some(error) => {
                if self.unheard == 0 {
                    tracing::warn!(%error, "the serial line's reader takes nothing: the guest's output is lost");
                }
                self.unheard += rest.len() as u64;
            }
            None if self.unheard > 0 => {
                let bytes = std::mem::take(&mut self.unheard);
                tracing::warn!(bytes, "the guest's serial output is taken again");
            }
            None => {}
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut shared = self.lock();
        shared.said += bytes.len() as u64;
        let room = match &mut shared.held {
            None => {
                shared.put(bytes);
                return Ok(bytes.len());
            }
            Some(held) => {
                let room = bytes.len().min(MAX_HELD - held.len());
                held.extend_from_slice(&bytes[..room]);
                room
            }
        };
        shared.lost += (bytes.len() - room) as u64;
        // Lost bytes were said all the same: the guest does not wait for them.
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Nothing is kept back.
        Ok(())
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shared = self.lock();
        f.debug_struct("Console")
            .field("said", &shared.said)
            .field("held", &shared.held.as_ref().map(Vec::len))
            .finish_non_exhaustive()
    }
}

/// The gate of one side.
#[derive(Debug)]
pub struct ConsoleGate {
    console: Console,
    holds: bool,
}

impl ConsoleGate {
    /// The primary's. Without `output_commit` everything goes out at once.
    #[must_use]
    pub const fn primary(console: Console, output_commit: bool) -> Self {
        Self {
            console,
            holds: output_commit,
        }
    }

    /// The secondary's.
    #[must_use]
    pub const fn secondary(console: Console) -> Self {
        Self {
            console,
            holds: true,
        }
    }
}

impl PacketGate for ConsoleGate {
    fn hold(&mut self) -> Result<(), VmError> {
        if self.holds {
            self.console.lock().held.get_or_insert_default();
        }
        Ok(())
    }

    fn cut(&mut self) -> Result<(), VmError> {
        let mut shared = self.console.lock();
        shared.covered = shared.held.as_ref().map_or(0, Vec::len);
        Ok(())
    }

    fn release(&mut self) -> Result<(), VmError> {
        let mut shared = self.console.lock();
        shared.report_lost();
        // The guest may have gone on since it was copied, and said more.
        let covered = std::mem::take(&mut shared.covered);
        shared.let_out(covered);
        Ok(())
    }

    fn discard(&mut self) -> Result<(), VmError> {
        let mut shared = self.console.lock();
        shared.covered = 0;
        shared.lost = 0;
        if let Some(held) = &mut shared.held {
            held.clear();
        }
        Ok(())
    }

    fn open(&mut self) {
        let mut shared = self.console.lock();
        shared.report_lost();
        shared.let_out(usize::MAX);
        shared.covered = 0;
        shared.held = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Out(Arc<Mutex<Vec<u8>>>);

    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_secondary_says_after_a_failover_exactly_what_came_after_the_checkpoint() {
        let out = Out::default();
        let console = Console::new(Box::new(out.clone()));
        let mut gate = ConsoleGate::secondary(console.clone());
        let mut sink = console.sink();
        sink.write_all(b"before ").unwrap();
        gate.hold().unwrap();
        sink.write_all(b"the primary said this").unwrap();
        gate.discard().unwrap();
        sink.write_all(b"since ").unwrap();
        assert_eq!(out.0.lock().unwrap().as_slice(), b"before ");
        gate.open();
        sink.write_all(b"after").unwrap();
        assert_eq!(out.0.lock().unwrap().as_slice(), b"before since after");
        assert_eq!(console.said(), 7 + 21 + 6 + 5);
    }

    #[test]
    fn a_guest_does_not_notice_that_nobody_takes_what_it_says() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let console = Console::new(Box::new(Full));
        let mut sink = console.sink();
        sink.write_all(b"0123").unwrap();
        sink.write_all(b"4567").unwrap();
        assert_eq!((console.said(), console.lock().unheard), (8, 8));
        let out = Out::default();
        console.lock().out = Box::new(out.clone());
        sink.write_all(b"89").unwrap();
        assert_eq!((console.said(), console.lock().unheard), (10, 0));
        assert_eq!(out.0.lock().unwrap().as_slice(), b"89");
    }

    #[test]
    fn a_primary_is_heard_at_once() {
        let out = Out::default();
        let console = Console::new(Box::new(out.clone()));
        let mut gate = ConsoleGate::primary(console.clone(), false);
        gate.hold().unwrap();
        console.sink().write_all(b"x").unwrap();
        assert_eq!(out.0.lock().unwrap().as_slice(), b"x");
    }

    #[test]
    fn output_commit_lets_out_what_the_checkpoint_contains_and_no_more() {
        let out = Out::default();
        let console = Console::new(Box::new(out.clone()));
        let mut gate = ConsoleGate::primary(console.clone(), true);
        let mut sink = console.sink();
        let heard = || String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        gate.hold().unwrap();
        sink.write_all(b"one ").unwrap();
        assert_eq!(heard(), "");
        // A checkpoint that does not come to its end lets nothing out.
        gate.cut().unwrap();
        sink.write_all(b"two ").unwrap();
        gate.cut().unwrap();
        sink.write_all(b"three ").unwrap();
        assert_eq!(heard(), "");
        gate.release().unwrap();
        assert_eq!(heard(), "one two ");
        assert_eq!(console.held(), 6);
        // Nothing belongs to a checkpoint that was not begun.
        gate.release().unwrap();
        assert_eq!(heard(), "one two ");
        // The peer is lost: nobody will contradict this side.
        gate.open();
        sink.write_all(b"four").unwrap();
        assert_eq!(heard(), "one two three four");
    }

    #[test]
    fn what_is_held_is_bounded() {
        let console = Console::new(Box::new(io::sink()));
        let mut gate = ConsoleGate::secondary(console.clone());
        gate.hold().unwrap();
        let piece = vec![0; 1 << 20];
        for _ in 0..20 {
            console.sink().write_all(&piece).unwrap();
        }
        assert_eq!(console.lock().held.as_ref().map(Vec::len), Some(MAX_HELD));
        assert_eq!(console.lock().lost, 4 << 20);
    }
}
