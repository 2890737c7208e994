//! What carries a network device's frames.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::header::HEADER_BYTES;

/// Bytes of the largest frame: a segment of 64 KiB with its link header.
pub const MAX_FRAME: usize = 65_550;
/// Bytes of a frame with its header.
pub const MAX_PACKET: usize = HEADER_BYTES + MAX_FRAME;

/// Which offloads of received frames a driver has agreed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames whose checksum is open.
    pub checksum: bool,
    /// TCP over IPv4 in large segments.
    pub tso4: bool,
    /// TCP over IPv6 in large segments.
    pub tso6: bool,
    /// Large segments with ECN.
    pub ecn: bool,
}

/// Frames to and from a network. No call waits.
pub trait NetBackend: Debug + Send {
    /// Returns whether frames pass with their header, so that checksums and large segments are left
    /// to the other side. Without, frames are whole and no longer than the MTU allows.
    fn has_vnet_header(&self) -> bool;

    /// Returns the descriptor that can be read when a frame has come, and written when one may leave.
    fn fd(&self) -> Arc<OwnedFd>;

    /// Has frames come with these offloads, and no others.
    ///
    /// # Errors
    /// The host refused.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;

    /// Receives a packet: a header (zeroes, if the back end has none) and a frame. Returns its length.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`]: there is none; any other: none will come any more.
    fn receive(&mut self, packet: &mut [u8; MAX_PACKET]) -> io::Result<usize>;

    /// Sends a packet: a header, which a back end without headers leaves out, and a frame.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`]: not now; any other: the packet is lost.
    fn send(&mut self, packet: &[u8]) -> io::Result<()>;

    /// Returns whether the back end has bytes left of a packet that it took.
    fn has_unsent(&self) -> bool {
        false
    }

    /// Sends what is left.
    ///
    /// # Errors
    /// As [`NetBackend::send`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
