//! Frames over a connection, framed as QEMU's `-netdev stream` does: the length as 32 bits, big
//! endian, then the frame, without a header.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::backend::{MAX_FRAME, MAX_PACKET, NetBackend, Offloads};
use super::header::HEADER_BYTES;

const LENGTH_BYTES: usize = 4;

/// A connected unix or TCP socket.
#[derive(Debug)]
pub struct Stream {
    fd: Arc<OwnedFd>,
    /// What was received of the next frame and its length.
    received: Vec<u8>,
    /// What has not been sent of the last frame.
    unsent: Vec<u8>,
    /// The connection is lost.
    lost: bool,
}

impl Stream {
    /// Takes a connected stream socket.
    ///
    /// # Errors
    /// The host cannot make it non-blocking.
    pub fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let fd = socket.into();
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            fd: Arc::new(fd),
            received: Vec::new(),
            unsent: Vec::new(),
            lost: false,
        })
    }

    /// The length of the frame that comes next, if it is there.
    fn next_length(&self) -> io::Result<Option<usize>> {
        let Some(bytes) = self.received.first_chunk::<LENGTH_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*bytes)).unwrap_or(usize::MAX);
        if length == 0 || length > MAX_FRAME {
            let problem = format!("a frame of {length} bytes is announced");
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        Ok(Some(length))
    }

    /// Receives until the frame that comes next is whole.
    fn fill(&mut self) -> io::Result<usize> {
        loop {
            let length = self.next_length()?;
            let wanted = LENGTH_BYTES + length.unwrap_or(0);
            let had = self.received.len();
            if let Some(length) = length
                && had >= wanted
            {
                return Ok(length);
            }
            self.received.resize(wanted, 0);
            let read = rustix::io::read(&*self.fd, &mut self.received[had..]);
            let count = *read.as_ref().unwrap_or(&0);
            self.received.truncate(had + count);
            if read? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn guard<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() != io::ErrorKind::WouldBlock
            && error.kind() != io::ErrorKind::Interrupted
        {
            self.lost = true;
            self.unsent.clear();
        }
        result
    }
}

impl NetBackend for Stream {
    fn has_vnet_header(&self) -> bool {
        false
    }

    fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    fn set_offloads(&mut self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, packet: &mut [u8; MAX_PACKET]) -> io::Result<usize> {
        if self.lost {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let filled = self.fill();
        let length = self.guard(filled)?;
        packet[..HEADER_BYTES].fill(0);
        packet[HEADER_BYTES..HEADER_BYTES + length]
            .copy_from_slice(&self.received[LENGTH_BYTES..LENGTH_BYTES + length]);
        self.received.clear();
        Ok(HEADER_BYTES + length)
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        if self.lost {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if self.has_unsent() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let frame = packet.get(HEADER_BYTES..).unwrap_or(&[]);
        let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        self.unsent.extend(length.to_be_bytes());
        self.unsent.extend(frame);
        match self.flush() {
            // What is left goes out when it can: the packet was taken.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }

    fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.has_unsent() {
            let flags = rustix::net::SendFlags::NOSIGNAL;
            let sent = rustix::net::send(&*self.fd, &self.unsent, flags);
            let sent = self.guard(sent.map_err(io::Error::from))?;
            self.unsent.drain(..sent);
        }
        Ok(())
    }
}
