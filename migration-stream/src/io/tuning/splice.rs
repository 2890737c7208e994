//! Splice send: a unix stream socket holds references to the pages, and the peer, on the same host, copies them once,
//! into its own memory.
//!
//! A page gets there by way of a pipe (`vmsplice(2)`, `splice(2)`). The socket's count of bytes that the peer has not
//! read (`SIOCOUTQ`) says when it holds no reference any more.
//!
//! Short pieces between pages, such as the header of each on a main stream, go the same way: a system call for each
//! would cost more than the copies that are saved.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use super::super::descriptor::{Descriptor, Ready};
use super::super::sys::signal::without_write_signals;
use super::super::sys::{self, Gather, MAX_IOVECS};
use super::super::{Chunk, deadline_after};

/// Bytes that pipe and socket are asked to hold: as much as a process without privileges may have of a pipe.
const AT_A_TIME: usize = 1 << 20;
/// Our own bytes go with the pages around them if a piece has at most this many.
const SHORT: usize = 256;
/// Room for such pieces: for as many as one call takes.
const NOTES_LEN: usize = MAX_IOVECS * SHORT;
/// Between two looks at what the peer has read. It has at most a few hundred KB to copy.
const LOOK: Duration = Duration::from_micros(20);

/// The way of pages into one socket.
#[derive(Debug)]
pub(super) struct SpliceSend {
    pipe: Pipe,
    /// Something was sent since [`SpliceSend::wait_until_released`].
    has_sent: bool,
    notes: Option<Notes>,
}

#[derive(Debug)]
struct Pipe {
    reading: OwnedFd,
    writing: OwnedFd,
    /// What is in it, bytes.
    inside: usize,
}

/// Copies of our own short pieces. No byte of them is written again while the peer may read it.
#[derive(Debug)]
struct Notes {
    region: MmapRegion,
    used: usize,
}

impl Notes {
    fn new() -> io::Result<Self> {
        Ok(Self {
            region: MmapRegion::new(NOTES_LEN).map_err(io::Error::other)?,
            used: 0,
        })
    }

    /// Copies `bytes` behind `at`, which it advances.
    fn keep(&self, bytes: &[u8], at: &mut usize) -> io::Result<VolatileSlice<'_>> {
        let copy = self
            .region
            .get_slice(*at, bytes.len())
            .map_err(io::Error::other)?;
        copy.copy_from(bytes);
        *at += bytes.len();
        Ok(copy)
    }
}

/// Returns whether a piece goes by the pipe: guest memory, or short.
pub(super) fn is_spliced(chunk: &Chunk<'_>) -> bool {
    matches!(chunk, Chunk::Guest(_)) || chunk.len() <= SHORT
}

impl SpliceSend {
    /// A way into `socket`.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`]: it is no unix stream socket; those of making a pipe.
    pub(super) fn new(socket: &Descriptor<'_>) -> io::Result<Self> {
        let fd = socket.fd;
        if !socket.is_socket
            || sockopt::socket_domain(fd)? != AddressFamily::UNIX
            || sockopt::socket_type(fd)? != SocketType::STREAM
        {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "splice send needs a unix stream socket",
            ));
        }
        let (reading, writing) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // More at a time is fewer calls, and fewer waits for the peer. Whatever the system grants
        // does, as does what it has granted without being asked.
        let _ = fcntl_setpipe_size(&writing, AT_A_TIME);
        let _ = sockopt::set_socket_send_buffer_size(fd, AT_A_TIME);
        Ok(Self {
            pipe: Pipe {
                reading,
                writing,
                inside: 0,
            },
            has_sent: false,
            notes: None,
        })
    }

    /// Sends all of `chunks`, which are such as [`is_spliced`] has; `more` will be written behind them.
    pub(super) fn write_all(
        &mut self,
        socket: &Descriptor<'_>,
        chunks: &[Chunk<'_>],
        more: bool,
    ) -> io::Result<()> {
        let mut batches = chunks.chunks(MAX_IOVECS).peekable();
        while let Some(batch) = batches.next() {
            let more = more || batches.peek().is_some();
            self.has_sent = true;
            self.write_batch(socket, batch, more)?;
        }
        Ok(())
    }

    fn write_batch(
        &mut self,
        socket: &Descriptor<'_>,
        chunks: &[Chunk<'_>],
        more: bool,
    ) -> io::Result<()> {
        let own = |chunk: &Chunk<'_>| match chunk {
            Chunk::Bytes(bytes) => bytes.len(),
            Chunk::Guest(_) => 0,
        };
        let wanted: usize = chunks.iter().map(own).sum();
        if wanted == 0 {
            return self.pipe.write(socket, Gather::new(chunks), more);
        }
        let notes = match &mut self.notes {
            Some(notes) if wanted <= NOTES_LEN - notes.used => notes,
            // The peer reads what is in the old ones yet: the socket keeps their pages, and nobody can
            // write to them any more.
            notes => notes.insert(Notes::new()?),
        };
        let mut used = notes.used;
        // Our own bytes are copied, because their buffers are used again at once.
        let copies: Vec<_> = chunks
            .iter()
            .map(|chunk| match chunk {
                Chunk::Bytes(bytes) => notes.keep(bytes, &mut used).map(Chunk::Guest),
                Chunk::Guest(guest) => Ok(Chunk::Guest(*guest)),
            })
            .collect::<io::Result<_>>()?;
        let written = self.pipe.write(socket, Gather::new(&copies), more);
        notes.used = used;
        written
    }

    /// Waits until the peer has read everything that was spliced, and what was sent behind it.
    pub(super) fn wait_until_released(&mut self, socket: &Descriptor<'_>) -> io::Result<()> {
        let until = socket.until();
        let is_read = || Ok::<_, io::Error>(sys::unread(socket.fd)? == 0);
        while self.has_sent && !is_read()? {
            socket.check_cancelled()?;
            // A connection that has ended, at either side, is POLLHUP, which needs no asking for.
            let look = Some(until.min(deadline_after(LOOK)));
            let ended = socket.poll(PollFlags::empty(), None, look)? != Ready::TimedOut;
            if ended && !is_read()? {
                return Err(io::Error::new(
                    io::ErrorKind::BrokenPipe,
                    "the connection ended before the peer had read the pages that were spliced",
                ));
            }
            if Instant::now() >= until {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer did not read the pages that were spliced before the deadline",
                ));
            }
        }
        self.has_sent = false;
        if let Some(notes) = &mut self.notes {
            notes.used = 0;
        }
        Ok(())
    }
}

impl Pipe {
    /// Gives the socket all of `memory`.
    fn write(
        &mut self,
        socket: &Descriptor<'_>,
        mut memory: Gather<'_>,
        more: bool,
    ) -> io::Result<()> {
        while !(memory.is_empty() && self.inside == 0) {
            if self.inside == 0 {
                // No SIGPIPE: the pipe's other end is ours too, and open.
                let n = sys::vmsplice(self.writing.as_fd(), &memory)?;
                memory.skip(n);
                self.inside += n;
            }
            match self.pass(socket, more || !memory.is_empty()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => socket.wait_writable()?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Gives the socket what it takes now; [`io::ErrorKind::WouldBlock`] if that is nothing. `more`: it
    /// need not send the last of it before there is more.
    fn pass(&mut self, socket: &Descriptor<'_>, more: bool) -> io::Result<()> {
        let mut flags = SpliceFlags::NONBLOCK;
        flags.set(SpliceFlags::MORE, more);
        // There is no flag for a splice without SIGPIPE.
        let n = without_write_signals(|| {
            let moved = splice(&self.reading, None, socket.fd, None, self.inside, flags);
            Ok(moved?)
        })?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.inside = self.inside.saturating_sub(n);
        Ok(())
    }
}
