//! Where a migration is sent, and listened for.

use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::{fmt, io};

/// A transport that takes several connections: what follows `migrate`'s and `migrate-incoming`'s
/// scheme in QEMU's spelling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `tcp:host:port`; an IPv6 host in brackets. An empty host listens on every IPv4 address, and
    /// is this machine where it is connected to.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// `unix:path`.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(s: &str) -> Result<Self, AddressError> {
        let refuse = || AddressError::Syntax {
            address: s.to_owned(),
        };
        match s.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(refuse)?;
                let port = port.parse().map_err(|_| refuse())?;
                let host = match host.strip_prefix('[') {
                    Some(v6) => v6.strip_suffix(']').ok_or_else(refuse)?,
                    None if host.contains(':') => return Err(refuse()),
                    None => host,
                };
                Ok(Self::Tcp {
                    host: host.to_owned(),
                    port,
                })
            }
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A unix stream socket.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on `address`. The path of a unix socket must not exist; it is not removed later.
    ///
    /// # Errors
    /// [`AddressError::Busy`] when somebody listens there already, [`AddressError::Bind`].
    pub fn bind(address: &Address) -> Result<Self, AddressError> {
        let bound = match address {
            Address::Tcp { host, port } => {
                let host = if host.is_empty() { "0.0.0.0" } else { host };
                TcpListener::bind((host, *port)).map(Self::Tcp)
            }
            Address::Unix(path) => UnixListener::bind(path).map(Self::Unix),
        };
        bound.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => AddressError::Busy {
                address: address.clone(),
                source,
            },
            _ => AddressError::Bind {
                address: address.clone(),
                source,
            },
        })
    }

    /// The address it listens on, with the port that the kernel chose if none was asked for.
    ///
    /// # Errors
    /// Those of `getsockname`.
    pub fn local_address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(|a| Address::Tcp {
                host: a.ip().to_string(),
                port: a.port(),
            }),
            Self::Unix(listener) => listener
                .local_addr()
                .map(|a| Address::Unix(a.as_pathname().map(PathBuf::from).unwrap_or_default())),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl From<UnixListener> for Listener {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

/// Why an address is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// Not an address of a transport that takes several connections.
    #[error("'{address}' is not tcp:host:port or unix:path")]
    Syntax {
        /// What was given.
        address: String,
    },
    /// Somebody listens there already.
    #[error("{address} is in use")]
    Busy {
        /// The address.
        address: Address,
        /// The system's words for it.
        #[source]
        source: io::Error,
    },
    /// It cannot be listened on.
    #[error("listening on {address}")]
    Bind {
        /// The address.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_qemu_spells_them() {
        for text in [
            "tcp:localhost:4444",
            "tcp::0",
            "tcp:[::1]:9",
            "unix:/run/a:b",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "tcp:4444",
            "tcp:h:70000",
            "tcp:::1:9",
            "tcp:[::1:9",
            "unix:",
            "fd:3",
        ] {
            assert!(
                matches!(text.parse::<Address>(), Err(AddressError::Syntax { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn a_busy_port_is_said_to_be_busy() {
        let first = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let second = Listener::bind(&first.local_address().unwrap());
        assert!(matches!(second, Err(AddressError::Busy { .. })));
    }
}
