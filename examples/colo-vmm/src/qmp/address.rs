//! Where an operator connects: what follows `-qmp` on the command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use migration_net::Address;
use migration_stream::Escaped;

/// Where the server listens.
///
/// Spelled as for QEMU's `-qmp`: `unix:PATH` or `tcp:HOST:PORT`, then options. An empty host is any
/// address of this machine, of both IP families, and `HOST` in brackets is an IPv6 address. A comma in a path is written
/// twice.
///
/// The server only listens, and the VM never waits for a client: `server=on` and `wait=off` are
/// what it does anyway (QEMU's defaults are the opposite of both), and may be said, also as
/// `server` and `nowait`. Every other option is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum QmpAddress {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A TCP port. Whoever can reach it commands the VM.
    Tcp {
        /// Name or address; empty: any address of this machine.
        host: String,
        /// Port; 0: one that is free.
        port: u16,
    },
}

impl QmpAddress {
    /// The socket that it means.
    pub(crate) fn socket(&self) -> Address {
        match self {
            Self::Unix(path) => Address::Unix(path.clone()),
            Self::Tcp { host, port } => Address::tcp(host.clone(), *port),
        }
    }
}

/// An address that cannot be listened on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QmpAddressError {
    /// It begins like none that is known.
    #[error("'{}' is neither unix:PATH nor tcp:HOST:PORT", Escaped(.address))]
    Kind {
        /// All of it.
        address: String,
    },
    /// Nothing after `unix:`.
    #[error("unix: lacks the path of the socket")]
    NoPath,
    /// What follows `tcp:` has no port, or an IPv6 address without brackets.
    #[error("'{}' is not HOST:PORT", Escaped(.authority))]
    Authority {
        /// What there is.
        authority: String,
    },
    /// The port is not one.
    #[error("'{}' is not a port number, 0 to 65535", Escaped(.port))]
    Port {
        /// What there is.
        port: String,
    },
    /// There is no such option here.
    #[error("option '{}' is unknown, expected server=on or wait=off", Escaped(.option))]
    UnknownOption {
        /// All of it.
        option: String,
    },
    /// The option is known, and something else is wanted of it.
    #[error("option '{}' is not supported, only {supported}", Escaped(.option))]
    Unsupported {
        /// All of it.
        option: String,
        /// What could be written.
        supported: &'static str,
    },
}

impl FromStr for QmpAddress {
    type Err = QmpAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = split_options(text).into_iter();
        let place = parts.next().unwrap_or_default();
        let address = if let Some(path) = place.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(QmpAddressError::NoPath);
            }
            Self::Unix(PathBuf::from(path))
        } else if let Some(authority) = place.strip_prefix("tcp:") {
            parse_authority(authority)?
        } else {
            return Err(QmpAddressError::Kind {
                address: text.to_owned(),
            });
        };
        parts.try_for_each(check_option)?;
        Ok(address)
    }
}

/// Splits at commas; a doubled comma is one that belongs to the text.
fn split_options(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

fn parse_authority(authority: &str) -> Result<QmpAddress, QmpAddressError> {
    let malformed = || QmpAddressError::Authority {
        authority: authority.to_owned(),
    };
    let (host, port) = authority.rsplit_once(':').ok_or_else(malformed)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').ok_or_else(malformed)?,
        None if host.contains(':') => return Err(malformed()),
        None => host,
    };
    let port = port.parse().map_err(|_| QmpAddressError::Port {
        port: port.to_owned(),
    })?;
    Ok(QmpAddress::Tcp {
        host: host.to_owned(),
        port,
    })
}

fn check_option(option: String) -> Result<(), QmpAddressError> {
    let (name, value) = option.split_once('=').unwrap_or((&option, "on"));
    let (supported, wanted) = match name {
        "server" => ("server=on", true),
        "wait" => ("wait=off", false),
        "nowait" => ("wait=off", true),
        _ => return Err(QmpAddressError::UnknownOption { option }),
    };
    let value = match value {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    };
    if value != Some(wanted) {
        return Err(QmpAddressError::Unsupported { option, supported });
    }
    Ok(())
}

impl QmpAddress {
    /// Returns the address as it is written, to be read again.
    #[must_use]
    pub fn spelled(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix:{}", path.to_string_lossy().replace(',', ",,")),
            Self::Tcp { host, port } if host.contains(':') => format!("tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => format!("tcp:{host}:{port}"),
        }
    }
}

/// As it is written, but for what could do harm on a terminal, which is escaped.
impl fmt::Display for QmpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Escaped(&self.spelled()).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<QmpAddress, String> {
        text.parse()
            .map_err(|error: QmpAddressError| error.to_string())
    }

    fn unix(path: &str) -> Result<QmpAddress, String> {
        Ok(QmpAddress::Unix(path.into()))
    }

    fn tcp(host: &str, port: u16) -> Result<QmpAddress, String> {
        let host = host.to_owned();
        Ok(QmpAddress::Tcp { host, port })
    }

    #[test]
    fn qemus_spellings_are_understood() {
        assert_eq!(parse("unix:/run/q.sock"), unix("/run/q.sock"));
        assert_eq!(parse("unix:q,server=on,wait=off"), unix("q"));
        assert_eq!(parse("unix:q,server,nowait"), unix("q"));
        assert_eq!(parse("unix:a,,b,server=on"), unix("a,b"));
        assert_eq!(
            parse("tcp:localhost:4444,server=on"),
            tcp("localhost", 4444)
        );
        assert_eq!(parse("tcp::4444"), tcp("", 4444));
        assert_eq!(parse("tcp:[::1]:0,wait=no"), tcp("::1", 0));
    }

    #[test]
    fn an_address_is_shown_as_it_is_parsed() {
        for text in ["unix:a,,b", "tcp:localhost:1", "tcp:[::1]:65535", "tcp::0"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        for (text, error) in [
            ("stdio", "'stdio' is neither unix:PATH nor tcp:HOST:PORT"),
            ("", "'' is neither unix:PATH nor tcp:HOST:PORT"),
            ("unix:,server=on", "unix: lacks the path of the socket"),
            ("tcp:4444", "'4444' is not HOST:PORT"),
            ("tcp:::1:4444", "'::1:4444' is not HOST:PORT"),
            ("tcp:[::1:4444", "'[::1:4444' is not HOST:PORT"),
            ("tcp:h:qmp", "'qmp' is not a port number, 0 to 65535"),
            ("tcp:h:65536", "'65536' is not a port number, 0 to 65535"),
            (
                "unix:q,reconnect-ms=1",
                "option 'reconnect-ms=1' is unknown, expected server=on or wait=off",
            ),
            (
                "unix:q,",
                "option '' is unknown, expected server=on or wait=off",
            ),
            (
                "unix:q,server=off",
                "option 'server=off' is not supported, only server=on",
            ),
            (
                "tcp:h:1,server=on,wait=on",
                "option 'wait=on' is not supported, only wait=off",
            ),
            (
                "unix:q,wait=maybe",
                "option 'wait=maybe' is not supported, only wait=off",
            ),
        ] {
            assert_eq!(parse(text), Err(error.to_owned()), "{text}");
        }
    }
}
