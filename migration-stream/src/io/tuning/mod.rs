//! What a connection does beyond plain reads and writes, and when.
//!
//! - Quick acknowledgements, over TCP, on unless [`SocketTuning::set_quick_ack`] says otherwise.
//! - Zero-copy send, over TCP, for who asks ([`SendMode::ZeroCopy`]).
//! - Splice send, over unix sockets, for who asks ([`SendMode::Splice`], which tells what can go wrong).
//!
//! A channel has one [`SocketTuning`]; nothing else of the crate knows of these.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{ipproto, sockopt};

use super::descriptor::{Descriptor, Ready};
use super::{Chunk, SendMode, deadline_after};

mod splice;
mod zero_copy;

use splice::{SpliceSend, is_spliced};
use zero_copy::ZeroCopy;

/// How long TCP's next bytes may be on their way before those that came are acknowledged: as long as they
/// keep coming, acknowledgements are the system's business, and cost throughput where they are many.
const ACK_AFTER: Duration = Duration::from_micros(200);

/// What one handle of a connection does beyond plain reads and writes.
#[derive(Debug)]
pub(super) struct SocketTuning {
    quick_ack: bool,
    sending: Sending,
}

#[derive(Debug)]
enum Sending {
    Copies,
    ZeroCopy(ZeroCopy),
    Splice(SpliceSend),
}

impl SocketTuning {
    /// Copies are sent, and over TCP acknowledgements are quick.
    pub(super) fn new(fd: BorrowedFd<'_>) -> Self {
        let protocol = sockopt::socket_protocol(fd);
        Self {
            quick_ack: protocol.is_ok_and(|protocol| protocol == Some(ipproto::TCP)),
            sending: Sending::Copies,
        }
    }

    /// That of another handle on the same connection.
    pub(super) const fn shared(&self) -> Self {
        Self {
            quick_ack: self.quick_ack,
            sending: Sending::Copies,
        }
    }

    /// Switches quick acknowledgements off, or on again where `socket` is TCP.
    pub(super) fn set_quick_ack(&mut self, socket: BorrowedFd<'_>, on: bool) {
        self.quick_ack = on && Self::new(socket).quick_ack;
    }

    /// Waits for input, for `other`, or until `until`. If nothing comes soon, the system is to acknowledge what TCP
    /// has received: it may put that off for 40 ms, during which a peer without `TCP_NODELAY` (QEMU's main channel)
    /// holds a small piece back.
    pub(super) fn poll_input(
        &self,
        socket: &Descriptor<'_>,
        other: Option<BorrowedFd<'_>>,
        until: Option<Instant>,
    ) -> io::Result<Ready> {
        if self.quick_ack {
            let soon = deadline_after(ACK_AFTER);
            let soon = until.map_or(soon, |until| until.min(soon));
            let ready = socket.poll(PollFlags::IN, other, Some(soon))?;
            if ready != Ready::TimedOut {
                return Ok(ready);
            }
            // Without it the peer waits, and that is all.
            let _ = sockopt::set_tcp_quickack(socket.fd, true);
        }
        socket.poll(PollFlags::IN, other, until)
    }

    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: the connection cannot; the mode is what it was.
    pub(super) fn set_send_mode(
        &mut self,
        socket: &Descriptor<'_>,
        mode: SendMode,
    ) -> io::Result<()> {
        self.sending = match mode {
            SendMode::Copy => Sending::Copies,
            SendMode::ZeroCopy => Sending::ZeroCopy(ZeroCopy::enable(socket)?),
            SendMode::Splice => Sending::Splice(SpliceSend::new(socket)?),
        };
        Ok(())
    }

    /// Returns whether every byte that leaves is counted where it is written.
    pub(super) const fn counts_taken(&self) -> bool {
        !matches!(self.sending, Sending::Splice(_))
    }

    /// Writes all of `chunks`, our own bytes and guest memory as they may be, and adds the bytes that were taken to
    /// `taken`, but for those that are spliced.
    pub(super) fn write_all(
        &mut self,
        socket: &Descriptor<'_>,
        chunks: &[Chunk<'_>],
        taken: &mut u64,
    ) -> io::Result<()> {
        let is_guest = |chunk: &Chunk<'_>| matches!(chunk, Chunk::Guest(_));
        if !chunks.iter().any(is_guest) {
            return match &mut self.sending {
                Sending::ZeroCopy(zero_copy) => zero_copy.write_all(socket, chunks, 0, taken),
                _ => socket.write_copies(chunks, 0, taken),
            };
        }
        match &mut self.sending {
            Sending::Copies => socket.write_copies(chunks, 0, taken),
            // Our own bytes are copied: their buffer is used again at once.
            Sending::ZeroCopy(zero_copy) => in_parts(chunks, is_guest, |part, is_guest, more| {
                let pinned = if is_guest { libc::MSG_ZEROCOPY } else { 0 };
                zero_copy.write_all(socket, part, pinned | more_flag(more), taken)
            }),
            Sending::Splice(splice) => in_parts(chunks, is_spliced, |part, is_spliced, more| {
                if is_spliced && part.iter().any(is_guest) {
                    splice.write_all(socket, part, more)
                } else {
                    socket.write_copies(part, more_flag(more), taken)
                }
            }),
        }
    }

    /// Waits until nobody reads guest memory for what was written, and returns how many sends of
    /// [`SendMode::ZeroCopy`] the kernel copied after all.
    pub(super) fn wait_until_released(&mut self, socket: &Descriptor<'_>) -> io::Result<u64> {
        match &mut self.sending {
            Sending::Copies => Ok(0),
            Sending::ZeroCopy(zero_copy) => zero_copy.wait_until_released(socket),
            Sending::Splice(splice) => splice.wait_until_released(socket).map(|()| 0),
        }
    }
}

const fn more_flag(more: bool) -> libc::c_int {
    if more { libc::MSG_MORE } else { 0 }
}

/// Calls `write` with parts of `chunks` that are all such as `is` has, or all not, and with whether another follows.
fn in_parts<'a>(
    chunks: &[Chunk<'a>],
    is: impl Fn(&Chunk<'a>) -> bool,
    mut write: impl FnMut(&[Chunk<'a>], bool, bool) -> io::Result<()>,
) -> io::Result<()> {
    let mut parts = chunks.chunk_by(|a, b| is(a) == is(b)).peekable();
    while let Some(part) = parts.next() {
        let of_kind = part.first().is_some_and(&is);
        write(part, of_kind, parts.peek().is_some())?;
    }
    Ok(())
}
