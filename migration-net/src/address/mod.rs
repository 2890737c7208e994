//! Socket addresses: how they are written, listened on and connected to.
//!
//! Every socket of this workspace that listens or connects goes through this module: migration,
//! heartbeat, QMP, metrics, relay, inspection.
//!
//! | rule | where |
//! |---|---|
//! | An empty host is every address of this machine, of both IP families. | [`Listener`] |
//! | A name with several addresses is listened on at all of them, and tried at each of them. | [`Listener`], [`ResolvedAddress`] |
//! | A unix socket that a dead process left is replaced. The listener removes its own. | `socket_file` |
//! | An option is done or refused by name. | [`TcpOptions`], [`AddressSyntax`] |

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use migration_stream::Escaped;

mod listener;
mod lookup;
mod options;
mod resolve;
mod resolved;
mod socket_file;
mod text;
mod wait;

pub use listener::Listener;
pub use options::{AddressSyntax, KeepAlive, TcpOptions};
pub use resolved::ResolvedAddress;

/// The longest name of an abstract unix socket, bytes.
const ABSTRACT_LEN: usize = 107;

/// A transport that takes several connections: what follows `migrate`'s and `migrate-incoming`'s
/// scheme in QEMU's spelling.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Address {
    /// `tcp:host:port[,option...]`; an IPv6 host in brackets. An empty host listens on every address
    /// of both IP families, and is this machine where it is connected to.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port. 0 listens on one that is free.
        port: u16,
        /// What may be used, and how.
        options: TcpOptions,
    },
    /// `unix:path`.
    Unix(PathBuf),
    /// A unix socket in Linux's abstract namespace. It has no URI: only QMP's object form names it.
    Abstract(Vec<u8>),
}

impl Address {
    /// A TCP address without options. `host` has no brackets.
    #[must_use]
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::Tcp {
            host: host.into(),
            port,
            options: TcpOptions::default(),
        }
    }

    /// A unix socket in the abstract namespace. QEMU pads a name that is not `tight` with zeros to
    /// the length that an address can have.
    ///
    /// # Errors
    /// [`AddressSyntax::AbstractName`] for a name that is empty or longer than 107 bytes.
    pub fn abstract_unix(name: impl Into<Vec<u8>>, tight: bool) -> Result<Self, AddressSyntax> {
        let mut name = name.into();
        if name.is_empty() || name.len() > ABSTRACT_LEN {
            return Err(AddressSyntax::AbstractName { len: name.len() });
        }
        if !tight {
            name.resize(ABSTRACT_LEN, 0);
        }
        Ok(Self::Abstract(name))
    }

    /// The same place without the options that only matter to who listens or connects there.
    #[must_use]
    pub fn without_options(self) -> Self {
        match self {
            Self::Tcp { host, port, .. } => Self::tcp(host, port),
            other => other,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        let host = match address {
            SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
            other => other.ip().to_string(),
        };
        Self::tcp(host, address.port())
    }
}

/// Why an address is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// Not an address of a transport that takes several connections.
    #[error("'{}' is no address: {problem}", Escaped(.address))]
    Syntax {
        /// What was given.
        address: String,
        /// What is wrong with it.
        problem: AddressSyntax,
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
    /// The path of a unix socket is that of another kind of file. The file is left alone.
    #[error("{address} is a file that is no socket")]
    NotASocket {
        /// The address.
        address: Address,
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

impl AddressError {
    /// The kind of I/O error that it would be.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Syntax { .. } => io::ErrorKind::InvalidInput,
            Self::NotASocket { .. } => io::ErrorKind::AlreadyExists,
            Self::Busy { source, .. } | Self::Bind { source, .. } => source.kind(),
        }
    }
}

impl From<AddressError> for io::Error {
    fn from(error: AddressError) -> Self {
        Self::new(error.kind(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abstract_name_is_padded_unless_it_is_tight() {
        let Ok(Address::Abstract(tight)) = Address::abstract_unix("a", true) else {
            panic!("a tight name");
        };
        assert_eq!(tight, b"a");
        let padded = Address::abstract_unix("a", false).unwrap();
        assert_eq!(padded.to_string(), "abstract unix socket a");
        assert!(matches!(padded, Address::Abstract(name) if name.len() == 107));
        for name in [Vec::new(), vec![b'x'; 108]] {
            let len = name.len();
            assert_eq!(
                Address::abstract_unix(name, true),
                Err(AddressSyntax::AbstractName { len })
            );
        }
    }

    #[test]
    fn a_link_local_address_keeps_its_scope() {
        let address: SocketAddr = "[fe80::1%7]:9".parse().unwrap();
        assert_eq!(Address::from(address).to_string(), "tcp:[fe80::1%7]:9");
    }
}
