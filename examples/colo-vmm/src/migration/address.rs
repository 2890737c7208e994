//! QMP's addresses and those of connections.

use std::net::ToSocketAddrs;

use multifd::Address;
use qmp_types::{InetSocketAddress, MigrationAddress, QmpError, SocketAddress};

/// The socket that an address means, if it means one.
pub(crate) fn socket(address: &MigrationAddress) -> Result<Address, QmpError> {
    match address {
        MigrationAddress::Socket(SocketAddress::Inet(inet)) => {
            let port = inet.port.parse().ok().or_else(|| {
                // A service's name.
                inet.authority()
                    .to_socket_addrs()
                    .ok()?
                    .next()
                    .map(|a| a.port())
            });
            let host = inet.host.clone();
            port.map(|port| Address::Tcp { host, port })
                .ok_or_else(|| QmpError::generic(format!("'{}' is not a port", inet.port)))
        }
        MigrationAddress::Socket(SocketAddress::Unix { path, .. }) => {
            Ok(Address::Unix(path.into()))
        }
        other => Err(QmpError::generic(format!(
            "address '{other}' is not supported by this VMM, expected tcp:host:port or unix:path"
        ))),
    }
}

/// An address as QMP has it.
pub(crate) fn qmp_address(address: &Address) -> SocketAddress {
    match address {
        Address::Tcp { host, port } => {
            SocketAddress::Inet(InetSocketAddress::new(host.clone(), port.to_string()))
        }
        Address::Unix(path) => SocketAddress::unix(path.to_string_lossy()),
    }
}
