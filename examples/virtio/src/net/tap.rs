//! A tap interface of the host's.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::backend::{MAX_PACKET, NetBackend, Offloads};
use super::header::HEADER_BYTES;

/// Requests and flags of `linux/if_tun.h`, whose ABI is fixed.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;

/// Bytes of an interface's name, with the 0 behind it.
const NAME_BYTES: usize = 16;

/// `struct ifreq`, as far as a tap needs it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct InterfaceRequest {
    name: [u8; NAME_BYTES],
    flags: u16,
    rest: [u8; 22],
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// The name is empty, too long, or has a 0 in it.
    #[error("'{}' is no name of an interface", .0.escape_debug())]
    Name(String),
    /// The host refused.
    #[error("cannot {what} a tap")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The descriptor is a tap without headers.
    #[error("the tap has no vnet header")]
    NoHeader,
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> TapError {
    move |source| TapError::Host { what, source }
}

/// A tap with headers of 12 bytes.
#[derive(Debug)]
pub struct Tap {
    fd: Arc<OwnedFd>,
}

impl Tap {
    /// Opens the tap of this name, which is made if it is not there.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(name: &str) -> Result<Self, TapError> {
        if name.is_empty() || name.len() >= NAME_BYTES || name.bytes().any(|byte| byte == 0) {
            return Err(TapError::Name(name.to_owned()));
        }
        let fd: OwnedFd = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(host("open"))?
            .into();
        let mut request = InterfaceRequest {
            name: [0; NAME_BYTES],
            flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
            rest: [0; 22],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the request is a `struct ifreq`, which the kernel reads and writes during the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) };
        check(done).map_err(host("attach to"))?;
        Self::set_up(fd)
    }

    /// Takes a tap that someone else has opened, with headers.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let mut request = InterfaceRequest {
            name: [0; NAME_BYTES],
            flags: 0,
            rest: [0; 22],
        };
        // SAFETY: the request is a `struct ifreq`, which the kernel writes during the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF, &raw mut request) };
        check(done).map_err(host("ask"))?;
        if request.flags & (IFF_TAP | IFF_VNET_HDR) != IFF_TAP | IFF_VNET_HDR {
            return Err(TapError::NoHeader);
        }
        rustix::io::ioctl_fionbio(&fd, true).map_err(|error| host("set up")(error.into()))?;
        Self::set_up(fd)
    }

    fn set_up(fd: OwnedFd) -> Result<Self, TapError> {
        let size = libc::c_int::try_from(HEADER_BYTES).unwrap_or(libc::c_int::MAX);
        // SAFETY: the kernel reads one int during the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        check(done).map_err(host("set the header of"))?;
        let mut tap = Self { fd: Arc::new(fd) };
        tap.set_offloads(Offloads::default())
            .map_err(host("set the offloads of"))?;
        Ok(tap)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl NetBackend for Tap {
    fn has_vnet_header(&self) -> bool {
        true
    }

    fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        for (wanted, flag) in [
            (offloads.checksum, TUN_F_CSUM),
            (offloads.tso4, TUN_F_TSO4),
            (offloads.tso6, TUN_F_TSO6),
            (offloads.ecn, TUN_F_TSO_ECN),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        // SAFETY: the request's argument is a number.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, flags) })
    }

    fn receive(&mut self, packet: &mut [u8; MAX_PACKET]) -> io::Result<usize> {
        Ok(rustix::io::read(&*self.fd, &mut packet[..])?)
    }

    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        rustix::io::write(&*self.fd, packet)?;
        Ok(())
    }
}
