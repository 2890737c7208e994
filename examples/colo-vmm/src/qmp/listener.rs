//! Sockets of either family.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::address::QmpAddress;

/// A socket that clients connect to. None of its calls waits.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(SocketFile),
    Tcp(TcpListener),
}

/// A connection. None of its calls waits.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Listener {
    /// Listens. The address returned has the port that was found, if any was to be.
    pub(crate) fn bind(address: &QmpAddress) -> io::Result<(Self, QmpAddress)> {
        match address {
            QmpAddress::Unix(path) => {
                let socket = SocketFile::bind(path)?;
                socket.listener.set_nonblocking(true)?;
                Ok((Self::Unix(socket), address.clone()))
            }
            QmpAddress::Tcp { host, port } => {
                let listener = bind_tcp(host, *port)?;
                listener.set_nonblocking(true)?;
                let bound = QmpAddress::Tcp {
                    host: host.clone(),
                    port: listener.local_addr()?.port(),
                };
                Ok((Self::Tcp(listener), bound))
            }
        }
    }

    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(socket) => {
                let (stream, _) = socket.listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Stream::Unix(stream))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

impl Stream {
    /// Tells the client that this was all.
    pub(crate) fn end_writing(&self) {
        // It fails if the client has gone, which the next read tells.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Write),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Write),
        };
    }
}

fn bind_tcp(host: &str, port: u16) -> io::Result<TcpListener> {
    if host.is_empty() {
        // The IPv6 wildcard takes IPv4 too, on a host that has IPv6.
        return TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    }
    TcpListener::bind((host, port))
}

/// Listens on a path, if need be in place of a socket whose owner has died.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "the file exists and is not a socket",
                ));
            }
            if !is_abandoned(path)? {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another process uses the socket",
                ));
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// Whether a socket file belongs to nobody any more.
///
/// Asked with a datagram socket: unlike a stream it neither waits when the owner's backlog is full
/// nor disturbs the owner with a client that comes and goes. The kernel refuses the connection if
/// nobody has the file (ECONNREFUSED), and otherwise because the types differ (EPROTOTYPE).
fn is_abandoned(path: &Path) -> io::Result<bool> {
    match UnixDatagram::unbound()?.connect(path) {
        Err(error) => Ok(error.kind() == io::ErrorKind::ConnectionRefused),
        Ok(()) => Ok(false),
    }
}

/// A socket in the file system. Its file is removed with it, unless it is somebody else's by then.
#[derive(Debug)]
pub(crate) struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    fn bind(path: &Path) -> io::Result<Self> {
        Ok(Self {
            listener: bind_unix(path)?,
            path: path.to_owned(),
            id: file_id(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "a socket stays behind");
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(socket) => socket.listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Unix(stream) => stream.as_raw_fd(),
            Self::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(path: &Path) -> io::Result<Listener> {
        Listener::bind(&QmpAddress::Unix(path.to_owned())).map(|(listener, _)| listener)
    }

    #[test]
    fn a_socket_whose_owner_has_died_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        // A plain listener leaves its file behind, as a process that was killed does.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_is_in_use_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let owner = bind(&path).unwrap();
        let error = bind(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        // The owner has not even seen a client.
        assert_eq!(
            owner.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        fs::write(&path, "precious").unwrap();
        let error = bind(&path).unwrap_err();
        assert_eq!(error.to_string(), "the file exists and is not a socket");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_is_somebody_elses_by_now_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let first = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn a_port_that_was_left_open_is_told() {
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        let (listener, bound) = Listener::bind(&address).unwrap();
        let QmpAddress::Tcp { host, port } = bound else {
            panic!("{bound}");
        };
        assert_ne!(port, 0);
        let _client = TcpStream::connect((host.as_str(), port)).unwrap();
        let Stream::Tcp(stream) = listener.accept().unwrap() else {
            panic!("a TCP listener accepts TCP");
        };
        assert!(stream.nodelay().unwrap());
    }
}
