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

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::{fmt, io};

use migration_stream::Escaped;

mod listener;
mod lookup;
mod options;
mod resolve;
mod resolved;
mod socket_file;
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

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parsed = match text.split_once(':') {
            Some(("unix", "")) => Err(AddressSyntax::NoPath),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => options::parse_tcp(rest),
            _ => Err(AddressSyntax::Kind),
        };
        parsed.map_err(|problem| AddressError::Syntax {
            address: text.to_owned(),
            problem,
        })
    }
}

/// In QEMU's spelling. What could do harm on a terminal or in a log is [escaped](Escaped).
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp {
                host,
                port,
                options,
            } if host.contains(':') => write!(f, "tcp:[{}]:{port}{options}", Escaped(host)),
            Self::Tcp {
                host,
                port,
                options,
            } => write!(f, "tcp:{}:{port}{options}", Escaped(host)),
            Self::Unix(path) => write!(f, "unix:{}", Escaped(&path.to_string_lossy())),
            Self::Abstract(name) => {
                let name = name.trim_ascii_end();
                let end = name
                    .iter()
                    .rposition(|byte| *byte != 0)
                    .map_or(0, |at| at + 1);
                write!(f, "abstract unix socket {}", name[..end].escape_ascii())
            }
        }
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
    fn addresses_are_read_as_qemu_spells_them() {
        for text in [
            "tcp:localhost:4444",
            "tcp::0",
            "tcp:[::1]:9",
            "tcp:[fe80::1%eth0]:9",
            "tcp::4444,to=4450,ipv4=on,ipv6=off",
            "tcp:h:1,numeric=on,mptcp=on",
            "tcp:h:1,keep-alive=on,keep-alive-count=3,keep-alive-idle=4,keep-alive-interval=5",
            "unix:/run/a:b",
            "unix:/run/a,b=c",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_named() {
        for (text, problem) in [
            ("", "expected tcp:HOST:PORT or unix:PATH"),
            ("fd:3", "expected tcp:HOST:PORT or unix:PATH"),
            ("unix:", "unix: lacks the path of the socket"),
            ("tcp:4444", "':PORT' is missing"),
            ("tcp:h:", "'' is not a port, a number from 0 to 65535"),
            (
                "tcp:h:70000",
                "'70000' is not a port, a number from 0 to 65535",
            ),
            ("tcp:h:-1", "'-1' is not a port, a number from 0 to 65535"),
            ("tcp:::1:9", "an IPv6 address wants brackets: [::1]"),
            ("tcp:[::1:9", "']:PORT' is missing after '['"),
            ("tcp:[::1]9", "']:PORT' is missing after '['"),
            ("tcp:h:1,tos=4", "option 'tos' is unknown"),
            (
                "tcp:h:1,ipv4=maybe",
                "option 'ipv4' is 'on' or 'off', not 'maybe'",
            ),
            (
                "tcp:h:1,to=x",
                "option 'to' is a number from 0 to 65535, not 'x'",
            ),
            (
                "tcp:h:9,to=8",
                "option 'to' names port 8, below the first port 9",
            ),
            (
                "tcp:h:1,ipv4=off,ipv6=off",
                "options 'ipv4' and 'ipv6' cannot both be off",
            ),
            (
                "tcp:h:1,keep-alive-idle=4",
                "option 'keep-alive-idle' needs keep-alive=on",
            ),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert_eq!(error, format!("'{text}' is no address: {problem}"));
        }
    }

    #[test]
    fn hostile_text_in_an_address_is_escaped() {
        let hostile = "\x1b[2J\r\n\u{202e}";
        let shown = r"\u{1b}[2J\r\n\u{202e}";
        for text in [
            format!("tcp:{hostile}:1"),
            format!("tcp:[::{hostile}]:1"),
            format!("unix:/run/{hostile}"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text.replace(hostile, shown));
        }
        let named = Address::abstract_unix(hostile, true).unwrap().to_string();
        assert!(!named.contains(char::is_control), "{named}");
        for text in [
            format!("{hostile}:1"),
            format!("tcp:h:{hostile}"),
            format!("tcp:{hostile}::1:9"),
            format!("tcp:h:1,{hostile}"),
            format!("tcp:h:1,ipv4={hostile}"),
            format!("tcp:h:1,to={hostile}"),
            format!("tcp:h:1,keep-alive-{hostile}=1"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            let AddressError::Syntax { problem, .. } = &error else {
                panic!("{error}");
            };
            for said in [error.to_string(), problem.to_string()] {
                assert!(
                    !said.contains(|c: char| c.is_control() || c == '\u{202e}'),
                    "{said:?}"
                );
            }
        }
    }

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
