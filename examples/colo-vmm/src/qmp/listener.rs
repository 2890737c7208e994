//! Sockets of either family.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use migration_net::Address;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::address::QmpAddress;
use crate::error_chain::chain;

/// A socket that clients connect to. None of its calls waits.
#[derive(Debug)]
pub(crate) struct Listener(migration_net::Listener);

/// A connection. None of its calls waits.
#[derive(Debug)]
pub(crate) struct Stream(OwnedFd);

impl Listener {
    /// Listens. The address returned has the port that was found, if any was to be.
    pub(crate) fn bind(address: &QmpAddress) -> io::Result<(Self, QmpAddress)> {
        let listener = migration_net::Listener::bind(&address.socket())
            .map_err(|error| io::Error::new(error.kind(), chain(&error)))?;
        let bound = match (address, listener.address()) {
            (QmpAddress::Tcp { host, .. }, Address::Tcp { port, .. }) => QmpAddress::Tcp {
                host: host.clone(),
                port: *port,
            },
            _ => address.clone(),
        };
        Ok((Self(listener), bound))
    }

    pub(crate) fn accept(&self) -> io::Result<Stream> {
        let connection = self.0.accept()?;
        rustix::io::ioctl_fionbio(&connection, true)?;
        Ok(Stream(connection))
    }
}

impl Stream {
    /// Tells the client that this was all.
    pub(crate) fn end_writing(&self) {
        // It fails if the client has gone, which the next read tells.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Write);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (read, _) = rustix::net::recv(&self.0, buffer, RecvFlags::empty())?;
        Ok(read)
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use rustix::net::sockopt;

    use super::*;

    #[test]
    fn a_port_that_was_left_open_is_told_and_both_families_reach_it() {
        let (listener, bound) = Listener::bind(&"tcp::0".parse().unwrap()).unwrap();
        let QmpAddress::Tcp { host, port } = bound else {
            panic!("{bound}");
        };
        assert_eq!(host, "");
        assert_ne!(port, 0);
        for to in ["127.0.0.1", "::1"] {
            let _client = TcpStream::connect((to, port)).unwrap();
            let stream = listener.accept().unwrap();
            assert!(sockopt::tcp_nodelay(&stream.0).unwrap());
        }
    }

    #[test]
    fn what_is_in_the_way_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let address = QmpAddress::Unix(path.clone());
        let (listener, _) = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains("is in use"), "{error}");
        drop(listener);
        std::fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(error.to_string().ends_with("is a file that is no socket"));
    }
}
