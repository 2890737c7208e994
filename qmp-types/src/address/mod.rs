//! Where a migration goes, or comes from: `uri` and `channels` of `migrate` and
//! `migrate-incoming`.
//!
//! | URI | address |
//! |---|---|
//! | `tcp:HOST:PORT`, `tcp:[::1]:PORT`, `tcp::PORT`, each with `,to=N`, `,ipv4=on`, ... | inet |
//! | `unix:PATH` | unix |
//! | `vsock:CID:PORT` | vsock |
//! | `fd:NAME` | fd |
//! | `file:PATH`, `file:PATH,offset=N` | file |
//! | `exec:COMMAND` | exec, through `/bin/sh -c` |
//! | `rdma:HOST:PORT` | rdma |

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::QmpError;
use crate::text::escaped;
use crate::visit::{FromQapi, Members, Place};

mod inet;

pub use inet::InetSocketAddress;

qapi_enum! {
    /// The kinds of socket addresses (`SocketAddressType`).
    pub enum SocketAddressType {
        /// Internet.
        Inet = "inet",
        /// Unix.
        Unix = "unix",
        /// Between a VM and its host.
        Vsock = "vsock",
        /// A file descriptor that was passed before.
        Fd = "fd",
    }
}

/// Where a socket connects or listens (`SocketAddress`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// Internet.
    Inet(InetSocketAddress),
    /// Unix.
    Unix {
        /// The socket's path.
        path: String,
        /// Whether it is in Linux' abstract namespace.
        #[serde(default, rename = "abstract", skip_serializing_if = "Option::is_none")]
        is_abstract: Option<bool>,
        /// Whether an abstract name ends with its text instead of being padded.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tight: Option<bool>,
    },
    /// Between a VM and its host.
    Vsock {
        /// The VM's number.
        cid: String,
        /// The port.
        port: String,
    },
    /// A file descriptor that was passed before.
    Fd {
        /// Its name, or number.
        str: String,
    },
}

impl SocketAddress {
    /// A Unix socket in the file system.
    #[must_use]
    pub fn unix(path: impl Into<String>) -> Self {
        Self::Unix {
            path: path.into(),
            is_abstract: None,
            tight: None,
        }
    }

    fn take(mut members: Members<'_>) -> Result<Self, QmpError> {
        let this = match members.take("type")? {
            SocketAddressType::Inet => {
                return InetSocketAddress::take(members).map(Self::Inet);
            }
            SocketAddressType::Unix => Self::Unix {
                path: members.take("path")?,
                is_abstract: members.take("abstract")?,
                tight: members.take("tight")?,
            },
            SocketAddressType::Vsock => Self::Vsock {
                cid: members.take("cid")?,
                port: members.take("port")?,
            },
            SocketAddressType::Fd => Self::Fd {
                str: members.take("str")?,
            },
        };
        members.finish()?;
        Ok(this)
    }
}

qapi_enum! {
    /// The kinds of migration addresses (`MigrationAddressType`).
    pub enum MigrationAddressType {
        /// A socket.
        Socket = "socket",
        /// A command's standard input or output.
        Exec = "exec",
        /// RDMA.
        Rdma = "rdma",
        /// A file.
        File = "file",
    }
}

/// Where a migration goes, or comes from (`MigrationAddress`).
///
/// [`FromStr`] reads a URI. `Display` writes one; see [`MigrationAddress::has_uri`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "transport", rename_all = "kebab-case")]
pub enum MigrationAddress {
    /// A socket.
    Socket(SocketAddress),
    /// A command's standard input or output.
    Exec {
        /// The command and its arguments.
        args: Vec<String>,
    },
    /// RDMA.
    Rdma(InetSocketAddress),
    /// A file.
    File {
        /// Its path.
        filename: String,
        /// Where in it, bytes.
        offset: u64,
    },
}

impl MigrationAddress {
    /// Whether there is a URI for this address. A path with a comma, for example, has none.
    #[must_use]
    pub fn has_uri(&self) -> bool {
        self.uri().parse().as_ref() == Ok(self)
    }
}

impl FromStr for MigrationAddress {
    type Err = QmpError;

    fn from_str(uri: &str) -> Result<Self, QmpError> {
        let unknown = || QmpError::generic(format!("unknown migration protocol: {uri}"));
        let (protocol, rest) = uri.split_once(':').ok_or_else(unknown)?;
        match protocol {
            "tcp" => {
                InetSocketAddress::parse(rest).map(|inet| Self::Socket(SocketAddress::Inet(inet)))
            }
            "unix" if rest.is_empty() => Err(QmpError::generic("invalid Unix socket address")),
            "unix" => Ok(Self::Socket(SocketAddress::unix(rest))),
            "vsock" => match rest.split_once(':') {
                Some((cid, port)) if !cid.is_empty() && !port.is_empty() => {
                    Ok(Self::Socket(SocketAddress::Vsock {
                        cid: cid.to_owned(),
                        port: port.to_owned(),
                    }))
                }
                _ => Err(QmpError::generic(format!("error parsing address '{rest}'"))),
            },
            "fd" if rest.is_empty() => Err(QmpError::generic("invalid file descriptor address")),
            "fd" => Ok(Self::Socket(SocketAddress::Fd {
                str: rest.to_owned(),
            })),
            "exec" => Ok(Self::Exec {
                args: ["/bin/sh", "-c", rest].map(str::to_owned).to_vec(),
            }),
            "rdma" => InetSocketAddress::parse(rest).map(Self::Rdma),
            "file" => file(rest),
            _ => Err(unknown()),
        }
    }
}

const OFFSET_OPTION: &str = ",offset=";

fn file(text: &str) -> Result<MigrationAddress, QmpError> {
    let (filename, offset) = match text.split_once(OFFSET_OPTION) {
        Some((filename, offset)) => (filename, size(offset)?),
        None => (text, 0),
    };
    if filename.is_empty() {
        return Err(QmpError::generic("file URI has no file name"));
    }
    Ok(MigrationAddress::File {
        filename: filename.to_owned(),
        offset,
    })
}

/// A number of bytes: decimal, with a suffix of B, K, M, G, T, P or E if need be, or hexadecimal.
fn size(text: &str) -> Result<u64, QmpError> {
    let bad = |why| QmpError::generic(format!("file URI has bad offset {text}: {why}"));
    let invalid = || bad("Invalid argument");
    let too_large = || bad("Numerical result out of range");
    if text
        .strip_prefix('-')
        .is_some_and(|digits| digits.parse::<u64>().is_ok())
    {
        return Err(too_large());
    }
    let parse = |digits: &str, radix| {
        if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
            return Err(invalid());
        }
        u64::from_str_radix(digits, radix).map_err(|_| too_large())
    };
    if let Some(digits) = text.strip_prefix("0x") {
        return parse(digits, 16);
    }
    let suffixes = ["B", "K", "M", "G", "T", "P", "E"];
    let (digits, shift) = (0u32..)
        .zip(suffixes)
        .find_map(|(power, suffix)| Some((text.strip_suffix(suffix)?, 10 * power)))
        .unwrap_or((text, 0));
    parse(digits, 10)?
        .checked_mul(1 << shift)
        .ok_or_else(too_large)
}

impl MigrationAddress {
    /// Returns the address as a URI, as it is written to a server.
    pub(crate) fn uri(&self) -> String {
        match self {
            Self::Socket(SocketAddress::Inet(inet)) => format!("tcp:{}", inet.spelled()),
            Self::Socket(SocketAddress::Unix { path, .. }) => format!("unix:{path}"),
            Self::Socket(SocketAddress::Vsock { cid, port }) => format!("vsock:{cid}:{port}"),
            Self::Socket(SocketAddress::Fd { str }) => format!("fd:{str}"),
            Self::Exec { args } => match args.as_slice() {
                [shell, option, command] if shell == "/bin/sh" && option == "-c" => {
                    format!("exec:{command}")
                }
                _ => format!("exec:{}", args.join(" ")),
            },
            Self::Rdma(inet) => format!("rdma:{}", inet.spelled()),
            Self::File {
                filename,
                offset: 0,
            } => format!("file:{filename}"),
            Self::File { filename, offset } => format!("file:{filename}{OFFSET_OPTION}{offset}"),
        }
    }
}

/// As a URI. What could do harm on a terminal is escaped.
impl fmt::Display for MigrationAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escaped(&self.uri()))
    }
}

impl FromQapi for MigrationAddress {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        let mut members = Members::new(value, place)?;
        let this = match members.take("transport")? {
            MigrationAddressType::Socket => {
                return SocketAddress::take(members).map(Self::Socket);
            }
            MigrationAddressType::Rdma => {
                return InetSocketAddress::take(members).map(Self::Rdma);
            }
            MigrationAddressType::Exec => Self::Exec {
                args: members.take("args")?,
            },
            MigrationAddressType::File => Self::File {
                filename: members.take("filename")?,
                offset: members.take("offset")?,
            },
        };
        members.finish()?;
        Ok(this)
    }
}

qapi_enum! {
    /// What a channel is for (`MigrationChannelType`).
    pub enum MigrationChannelType {
        /// The migration stream.
        Main = "main",
        /// The state that a `cpr-transfer` needs before it.
        Cpr = "cpr",
    }
}

/// A channel of a migration (`MigrationChannel`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationChannel {
    /// What it is for.
    pub channel_type: MigrationChannelType,
    /// Where it goes, or comes from.
    pub addr: MigrationAddress,
}

from_qapi_struct!(MigrationChannel {
    channel_type = "channel-type",
    addr = "addr",
});

/// The address that `uri` or `channels` give, one of which must be there.
pub(crate) fn main_address(
    uri: Option<String>,
    channels: Option<Vec<MigrationChannel>>,
) -> Result<MigrationAddress, QmpError> {
    let channels = match (uri, channels) {
        (Some(uri), None) => return uri.parse(),
        (None, Some(channels)) if !channels.is_empty() => channels,
        _ => {
            return Err(QmpError::generic(
                "need either 'uri' or 'channels' argument",
            ));
        }
    };
    let mut main = None;
    for channel in channels {
        match channel.channel_type {
            MigrationChannelType::Cpr => {
                return Err(QmpError::generic(
                    "Channel type 'cpr' is not supported by this VMM",
                ));
            }
            MigrationChannelType::Main if main.is_some() => {
                return Err(QmpError::generic(
                    "Channel list has more than one main entry",
                ));
            }
            MigrationChannelType::Main => main = Some(channel.addr),
        }
    }
    main.ok_or_else(|| QmpError::generic("Channel list has no main entry"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inet(host: &str, port: &str) -> MigrationAddress {
        MigrationAddress::Socket(SocketAddress::Inet(InetSocketAddress::new(host, port)))
    }

    #[test]
    fn every_kind_of_uri_is_understood_and_written_back() {
        let mut with_options = InetSocketAddress::new("localhost", "1");
        with_options.ipv4 = Some(true);
        with_options.keep_alive = Some(false);
        with_options.to = Some(5);
        for (uri, address) in [
            ("tcp:10.0.0.2:4444", inet("10.0.0.2", "4444")),
            ("tcp:[fe80::1]:4444", inet("fe80::1", "4444")),
            ("tcp::0", inet("", "0")),
            (
                "tcp:localhost:1,ipv4=on,keep-alive=off,to=5",
                MigrationAddress::Socket(SocketAddress::Inet(with_options)),
            ),
            (
                "unix:/run/a,b",
                MigrationAddress::Socket(SocketAddress::unix("/run/a,b")),
            ),
            (
                "vsock:3:1024",
                MigrationAddress::Socket(SocketAddress::Vsock {
                    cid: "3".into(),
                    port: "1024".into(),
                }),
            ),
            (
                "fd:7",
                MigrationAddress::Socket(SocketAddress::Fd { str: "7".into() }),
            ),
            (
                "exec:cat >x",
                MigrationAddress::Exec {
                    args: vec!["/bin/sh".into(), "-c".into(), "cat >x".into()],
                },
            ),
            // QEMU 11.1.3 reads such hosts, and says that they do not resolve.
            ("tcp:[[]:a", inet("[", "a")),
            ("tcp:a]b:1", inet("a]b", "1")),
            (
                "rdma:h:1",
                MigrationAddress::Rdma(InetSocketAddress::new("h", "1")),
            ),
            (
                "file:/tmp/x",
                MigrationAddress::File {
                    filename: "/tmp/x".into(),
                    offset: 0,
                },
            ),
            (
                "file:/tmp/x,offset=4096",
                MigrationAddress::File {
                    filename: "/tmp/x".into(),
                    offset: 4096,
                },
            ),
        ] {
            assert_eq!(uri.parse(), Ok(address.clone()), "{uri}");
            assert_eq!(address.to_string(), uri);
            assert!(address.has_uri());
        }
    }

    #[test]
    fn what_is_no_address_is_refused_in_qemus_words() {
        for (uri, text) in [
            ("", "unknown migration protocol: "),
            ("noprefix", "unknown migration protocol: noprefix"),
            ("bogus:x", "unknown migration protocol: bogus:x"),
            ("tcp:", "error parsing address ''"),
            ("tcp:localhost", "error parsing address 'localhost'"),
            ("tcp:localhost:", "error parsing address 'localhost:'"),
            ("tcp:[::1", "error parsing IPv6 address '[::1'"),
            ("tcp:[]:1", "error parsing IPv6 address '[]:1'"),
            ("tcp:localhost:1,foo=1", "Invalid parameter 'foo'"),
            ("tcp:localhost:1,to=x", "Parameter 'to' expects a number"),
            ("unix:", "invalid Unix socket address"),
            ("vsock:1", "error parsing address '1'"),
            ("fd:", "invalid file descriptor address"),
            (
                "file:/x,offset=abc",
                "file URI has bad offset abc: Invalid argument",
            ),
            (
                "file:/x,offset=",
                "file URI has bad offset : Invalid argument",
            ),
            (
                "file:/x,offset=18446744073709551616",
                "file URI has bad offset 18446744073709551616: Numerical result out of range",
            ),
            (
                "file:/x,offset=16E",
                "file URI has bad offset 16E: Numerical result out of range",
            ),
        ] {
            assert_eq!(
                uri.parse::<MigrationAddress>(),
                Err(QmpError::generic(text)),
                "{uri}"
            );
        }
    }

    #[test]
    fn an_offset_may_be_hexadecimal_or_have_a_suffix() {
        for (text, offset) in [("0x10", 16), ("1M", 1 << 20), ("3", 3), ("5B", 5)] {
            assert_eq!(size(text), Ok(offset));
        }
    }

    #[test]
    fn an_address_that_no_uri_can_say_is_known_as_such() {
        for address in [
            MigrationAddress::Exec {
                args: vec!["cat".into()],
            },
            MigrationAddress::File {
                filename: "/x,offset=1".into(),
                offset: 0,
            },
            MigrationAddress::Socket(SocketAddress::Unix {
                path: "x".into(),
                is_abstract: Some(true),
                tight: None,
            }),
        ] {
            assert!(!address.has_uri());
        }
    }
}
