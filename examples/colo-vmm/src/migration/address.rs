//! QMP's addresses and those of connections.
//!
//! Every option of an address is done, or refused by its name.

use migration_net::{Address, AddressSyntax, KeepAlive, Listener, TcpOptions};
use qmp_types::{InetSocketAddress, MigrationAddress, QmpError, SocketAddress};

/// The socket of a peer that is to be connected to.
pub(crate) fn peer(address: &MigrationAddress) -> Result<Address, QmpError> {
    let address = socket(address)?;
    match &address {
        Address::Tcp { options, .. } if options.to.is_some() => {
            Err(refused("to", "is for listening"))
        }
        _ => Ok(address),
    }
}

/// The socket that is to be listened on.
pub(crate) fn listening_address(address: &MigrationAddress) -> Result<Address, QmpError> {
    socket(address)
}

fn socket(address: &MigrationAddress) -> Result<Address, QmpError> {
    match address {
        MigrationAddress::Socket(SocketAddress::Inet(inet)) => tcp(inet),
        MigrationAddress::Socket(SocketAddress::Unix {
            path,
            is_abstract: Some(true),
            tight,
        }) => Address::abstract_unix(path.as_bytes(), tight.unwrap_or(true)).map_err(syntax),
        MigrationAddress::Socket(SocketAddress::Unix { tight: Some(_), .. }) => {
            Err(refused("tight", "is for abstract sockets"))
        }
        MigrationAddress::Socket(SocketAddress::Unix { path, .. }) if path.is_empty() => {
            Err(syntax(AddressSyntax::NoPath))
        }
        MigrationAddress::Socket(SocketAddress::Unix { path, .. }) => {
            Ok(Address::Unix(path.into()))
        }
        other => Err(QmpError::generic(format!(
            "address '{other}' is not supported by this VMM, expected tcp:host:port or unix:path"
        ))),
    }
}

fn tcp(inet: &InetSocketAddress) -> Result<Address, QmpError> {
    let port = inet.port.parse().map_err(|_| {
        syntax(AddressSyntax::Port {
            port: inet.port.clone(),
        })
    })?;
    let mut options = TcpOptions::default();
    options.ipv4 = inet.ipv4;
    options.ipv6 = inet.ipv6;
    options.to = inet.to;
    options.numeric = inet.numeric.unwrap_or(false);
    options.mptcp = inet.mptcp.unwrap_or(false);
    options.keep_alive = keep_alive(inet)?;
    options.check(port).map_err(syntax)?;
    Ok(Address::Tcp {
        host: inet.host.clone(),
        port,
        options,
    })
}

fn keep_alive(inet: &InetSocketAddress) -> Result<Option<KeepAlive>, QmpError> {
    let (count, idle) = (inet.keep_alive_count, inet.keep_alive_idle);
    let interval = inet.keep_alive_interval;
    if inet.keep_alive == Some(true) {
        return Ok(Some(KeepAlive::new(count, idle, interval)));
    }
    for (option, value) in [
        ("keep-alive-count", count),
        ("keep-alive-idle", idle),
        ("keep-alive-interval", interval),
    ] {
        if value.is_some() {
            return Err(refused(option, "needs keep-alive=on"));
        }
    }
    Ok(None)
}

fn syntax(problem: AddressSyntax) -> QmpError {
    QmpError::generic(problem.to_string())
}

fn refused(option: &str, why: &str) -> QmpError {
    QmpError::generic(format!("option '{option}' {why}"))
}

/// All addresses of a listener, as QMP has them.
pub(crate) fn qmp_addresses(listener: &Listener) -> Vec<SocketAddress> {
    listener.addresses().iter().map(qmp_address).collect()
}

/// An address as QMP has it. A listener's says of which family it is, as QEMU's does.
fn qmp_address(address: &Address) -> SocketAddress {
    match address {
        Address::Tcp { host, port, .. } => {
            let mut inet = InetSocketAddress::new(host.clone(), port.to_string());
            if host.contains(':') {
                inet.ipv6 = Some(true);
            } else {
                inet.ipv4 = Some(true);
            }
            SocketAddress::Inet(inet)
        }
        Address::Unix(path) => SocketAddress::unix(path.to_string_lossy()),
        Address::Abstract(name) => SocketAddress::Unix {
            path: String::from_utf8_lossy(name).into_owned(),
            is_abstract: Some(true),
            tight: None,
        },
        other => SocketAddress::unix(other.to_string()),
    }
}

/// An address that an operator was given, with all of its options, as QMP has it.
pub(crate) fn socket_address(address: &Address) -> SocketAddress {
    let Address::Tcp {
        host,
        port,
        options,
    } = address
    else {
        return qmp_address(address);
    };
    let mut inet = InetSocketAddress::new(host.clone(), port.to_string());
    inet.ipv4 = options.ipv4;
    inet.ipv6 = options.ipv6;
    inet.to = options.to;
    inet.numeric = options.numeric.then_some(true);
    inet.mptcp = options.mptcp.then_some(true);
    if let Some(keep_alive) = options.keep_alive {
        inet.keep_alive = Some(true);
        inet.keep_alive_count = keep_alive.count;
        inet.keep_alive_idle = keep_alive.idle;
        inet.keep_alive_interval = keep_alive.interval;
    }
    SocketAddress::Inet(inet)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inet(change: impl FnOnce(&mut InetSocketAddress)) -> MigrationAddress {
        let mut inet = InetSocketAddress::new("localhost", "4444");
        change(&mut inet);
        MigrationAddress::Socket(SocketAddress::Inet(inet))
    }

    #[test]
    fn every_option_of_an_address_reaches_the_socket() {
        let given = inet(|inet| {
            inet.ipv6 = Some(false);
            inet.ipv4 = Some(true);
            inet.to = Some(4450);
            inet.numeric = Some(true);
            inet.mptcp = Some(true);
            inet.keep_alive = Some(true);
            inet.keep_alive_count = Some(1);
            inet.keep_alive_idle = Some(2);
            inet.keep_alive_interval = Some(3);
        });
        let uri = "tcp:localhost:4444,to=4450,ipv4=on,ipv6=off,numeric=on,mptcp=on,keep-alive=on,\
                   keep-alive-count=1,keep-alive-idle=2,keep-alive-interval=3";
        assert_eq!(listening_address(&given).unwrap().to_string(), uri);
        // The URI form says the same.
        let parsed = uri.parse().unwrap();
        assert_eq!(listening_address(&parsed), listening_address(&given));
        let address = listening_address(&given).unwrap();
        let again = MigrationAddress::Socket(socket_address(&address));
        assert_eq!(again, given);
        let unix = MigrationAddress::Socket(SocketAddress::Unix {
            path: "name".into(),
            is_abstract: Some(true),
            tight: Some(false),
        });
        assert!(matches!(peer(&unix), Ok(Address::Abstract(name)) if name.len() == 107));
    }

    #[test]
    fn an_option_that_cannot_be_done_is_refused_by_name() {
        let unix = MigrationAddress::Socket(SocketAddress::Unix {
            path: "/run/s".into(),
            is_abstract: None,
            tight: Some(true),
        });
        for (address, why) in [
            (unix, "option 'tight' is for abstract sockets"),
            (
                inet(|inet| inet.to = Some(5000)),
                "option 'to' is for listening",
            ),
            (
                inet(|inet| inet.to = Some(5)),
                "option 'to' names port 5, below the first port 4444",
            ),
            (
                inet(|inet| inet.keep_alive_idle = Some(5)),
                "option 'keep-alive-idle' needs keep-alive=on",
            ),
            (
                inet(|inet| (inet.ipv4, inet.ipv6) = (Some(false), Some(false))),
                "options 'ipv4' and 'ipv6' cannot both be off",
            ),
            (
                inet(|inet| inet.port = "ssh".into()),
                "'ssh' is not a port, a number from 0 to 65535",
            ),
        ] {
            assert_eq!(peer(&address).unwrap_err().desc, why);
        }
    }
}
