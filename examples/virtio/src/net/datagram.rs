//! Frames as datagrams of a socket that someone else has connected, one each, without a header.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::backend::{MAX_PACKET, NetBackend, Offloads};
use super::header::HEADER_BYTES;

/// A connected datagram or sequenced-packet socket.
#[derive(Debug)]
pub struct Datagram {
    fd: Arc<OwnedFd>,
}

impl Datagram {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// The host cannot make it non-blocking.
    pub fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let fd = socket.into();
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self { fd: Arc::new(fd) })
    }
}

impl NetBackend for Datagram {
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
        packet[..HEADER_BYTES].fill(0);
        match rustix::io::read(&*self.fd, &mut packet[HEADER_BYTES..]) {
            // A sequenced-packet socket ends so; a frame is never empty.
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => Ok(HEADER_BYTES + length),
            // An earlier frame found nobody: later ones may.
            Err(rustix::io::Errno::CONNREFUSED) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        let frame = packet.get(HEADER_BYTES..).unwrap_or(&[]);
        rustix::net::send(&*self.fd, frame, rustix::net::SendFlags::NOSIGNAL)?;
        Ok(())
    }
}
