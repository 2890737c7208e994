//! Channels in memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use colo_core::Message;
use colo_core::raw::encode_message;
use migration_stream::io::{ByteSink, ByteSource, Chunk, Readiness};
use vm_memory::VolatileSlice;

use super::oracle;
use super::script::Piece;
use super::world::{Shared, lock};

/// The main channel, as the driver reads it.
pub struct Read {
    pub pieces: VecDeque<Piece>,
    pub world: Shared,
}

fn take(bytes: &mut Vec<u8>, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> Vec<u8> {
    let room = guest.iter().map(VolatileSlice::len).sum::<usize>() + buf.len();
    let rest = bytes.split_off(room.min(bytes.len()));
    let taken = std::mem::replace(bytes, rest);
    let mut left = &taken[..];
    for slice in guest {
        let n = slice.len().min(left.len());
        slice.copy_from(&left[..n]);
        left = &left[n..];
    }
    buf[..left.len()].copy_from_slice(left);
    taken
}

impl ByteSource for Read {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.world.is_closed() {
                return Ok(0);
            }
            match self.pieces.front_mut() {
                None => return Ok(0),
                Some(Piece::Bytes(bytes)) if !bytes.is_empty() => {
                    let taken = take(bytes, guest, buf);
                    lock(&self.world.delivered).extend(&taken);
                    return Ok(taken.len());
                }
                Some(Piece::Bytes(_) | Piece::Early) => {}
                Some(Piece::Silence) => {
                    self.pieces.pop_front();
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Some(Piece::Reset) => return Err(io::ErrorKind::ConnectionReset.into()),
                Some(Piece::Asked(ask)) => {
                    self.world.ask(*ask);
                }
            }
            self.pieces.pop_front();
        }
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.read_scatter(&[], buf).map(Some)
    }

    fn wait(
        &mut self,
        other: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> io::Result<Readiness> {
        loop {
            if self.world.is_closed() {
                return Ok(Readiness::Channel);
            }
            match self.pieces.front() {
                Some(Piece::Asked(ask)) => {
                    let woken = self.world.ask(*ask) && other.is_some();
                    self.pieces.pop_front();
                    if woken {
                        return Ok(Readiness::Other);
                    }
                }
                Some(Piece::Early) => {
                    self.pieces.pop_front();
                    return Ok(Readiness::Channel);
                }
                None | Some(Piece::Reset) => return Ok(Readiness::Channel),
                Some(Piece::Bytes(_) | Piece::Silence) => {
                    let Some(deadline) = deadline else {
                        return Ok(Readiness::Channel);
                    };
                    let left = deadline.saturating_duration_since(Instant::now());
                    thread::sleep(left.min(Duration::from_millis(1)));
                    return Ok(Readiness::TimedOut);
                }
            }
        }
    }

    fn set_read_deadline(&mut self, _: Option<Instant>) {}
}

/// One of multifd's channels, as its thread reads it: the migration's bytes, the script's, and then
/// nothing until it ends.
pub struct ReadChannel {
    pub bytes: Vec<u8>,
    /// What follows when COLO has begun.
    pub then: Vec<u8>,
    pub world: Shared,
}

impl ByteSource for ReadChannel {
    fn read_scatter(&mut self, guest: &[VolatileSlice<'_>], buf: &mut [u8]) -> io::Result<usize> {
        if self.bytes.is_empty() {
            self.world.wait_until_begun();
            self.bytes.append(&mut self.then);
        }
        if self.bytes.is_empty() {
            self.world.wait_until_closed();
        }
        if self.world.is_closed() {
            return Ok(0);
        }
        Ok(take(&mut self.bytes, guest, buf).len())
    }

    fn try_read(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.read_scatter(&[], buf).map(Some)
    }

    fn wait(&mut self, _: Option<BorrowedFd<'_>>, _: Option<Instant>) -> io::Result<Readiness> {
        Ok(Readiness::Channel)
    }

    fn set_read_deadline(&mut self, _: Option<Instant>) {}
}

/// A channel that is written: it takes so many writes, and then fails.
pub struct Write {
    pub world: Shared,
    pub writes: u8,
    pub then: io::ErrorKind,
    /// The checkpoints that have to be complete when they are promised to be carried on, and with
    /// channels or without.
    pub promises: Option<bool>,
}

impl ByteSink for Write {
    fn write_all(&mut self, chunks: &[Chunk<'_>]) -> io::Result<()> {
        // The attempt counts: nobody can tell whether the primary has read it.
        if let (Some(channels), [Chunk::Bytes(bytes)]) = (self.promises, chunks)
            && *bytes == &encode_message(Message::VmstateReceived)[..]
        {
            let promised = self.world.promised.fetch_add(1, Ordering::Relaxed) + 1;
            let complete = oracle::complete(&lock(&self.world.delivered), channels).len() as u64;
            assert!(
                promised <= complete,
                "checkpoint {promised} is committed, {complete} are complete"
            );
        }
        if self.world.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        match self.writes.checked_sub(1) {
            None => Err(self.then.into()),
            Some(left) => {
                self.writes = left;
                Ok(())
            }
        }
    }

    fn set_write_deadline(&mut self, _: Option<Instant>) {}
}

/// How a channel fails that does.
pub fn failure(byte: u8) -> io::ErrorKind {
    match byte % 4 {
        0 => io::ErrorKind::TimedOut,
        1 => io::ErrorKind::BrokenPipe,
        2 => io::ErrorKind::ConnectionReset,
        _ => io::ErrorKind::WriteZero,
    }
}
