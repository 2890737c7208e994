//! Connecting an outgoing migration: the main channel first, then multifd's.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSink, Chunk, FdChannel, deadline_after};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::address::Address;
use crate::config::{ChannelId, MultifdConfig};
use crate::incoming::Role;
use crate::packet::Hello;

/// What a connection to this host may hold that was sent and not read, bytes (the kernel doubles it for
/// its own use). More, and the system's own choice grows to megabytes on each connection, has left
/// the processor's caches before it is read, where there is no wire that it could fill.
const HELD_LOCALLY: usize = 256 << 10;

/// The connections of an outgoing migration.
#[derive(Debug)]
pub struct Outgoing {
    /// The main channel. Nothing was written to it.
    pub main: FdChannel,
    /// Multifd's channels in the order of their ids. Their handshakes were written.
    pub channels: Vec<FdChannel>,
}

/// Connects the main channel and, if `multifd` is on, its channels. TCP connections have
/// `TCP_NODELAY`: a COLO checkpoint is made of small messages that somebody waits for. Those to this host
/// itself have a bounded send buffer, so that pages are read while the processor's caches still have them.
///
/// All of it takes at most `timeout`, but for the resolution of a host name, which takes what the
/// system's resolver allows itself. `limit` is how long the channels wait for the peer afterwards
/// (see [`FdChannel::new`]).
///
/// # Errors
/// [`ConnectError`], which says which connection it was.
pub fn connect(
    address: &Address,
    multifd: Option<&MultifdConfig>,
    timeout: Duration,
    limit: Duration,
) -> Result<Outgoing, ConnectError> {
    let deadline = deadline_after(timeout);
    let to = Resolved::new(address)?;
    let main = open(&to, address, Role::Main, deadline, limit)?;
    let mut channels = Vec::new();
    if let Some(config) = multifd {
        for id in config.channels.ids() {
            let mut channel = open(&to, address, Role::Channel(id), deadline, limit)?;
            let hello = Hello {
                uuid: config.uuid,
                channel: id,
            }
            .encode();
            channel.set_write_deadline(Some(deadline));
            channel
                .write_all(&[Chunk::Bytes(&hello)])
                .map_err(|source| ConnectError::Hello {
                    channel: id,
                    source,
                })?;
            channel.set_write_deadline(None);
            channels.push(channel);
        }
    }
    Ok(Outgoing { main, channels })
}

enum Resolved<'a> {
    Tcp(Vec<SocketAddr>),
    Unix(&'a Path),
}

impl<'a> Resolved<'a> {
    fn new(address: &'a Address) -> Result<Self, ConnectError> {
        match address {
            Address::Unix(path) => Ok(Self::Unix(path)),
            Address::Tcp { host, port } => (named(host), *port)
                .to_socket_addrs()
                .and_then(|found| {
                    let found: Vec<_> = found.collect();
                    if found.is_empty() {
                        return Err(io::Error::new(io::ErrorKind::NotFound, "no address"));
                    }
                    Ok(Self::Tcp(found))
                })
                .map_err(|source| ConnectError::Resolve {
                    address: address.clone(),
                    source,
                }),
        }
    }
}

/// Nobody's name is this machine's.
fn named(host: &str) -> &str {
    if host.is_empty() { "localhost" } else { host }
}

fn open(
    to: &Resolved<'_>,
    address: &Address,
    role: Role,
    deadline: Instant,
    limit: Duration,
) -> Result<FdChannel, ConnectError> {
    let connected = match to {
        Resolved::Tcp(addresses) => connect_tcp(addresses, deadline),
        Resolved::Unix(path) => connect_unix(path, deadline),
    };
    connected
        .and_then(|fd| FdChannel::new(fd, limit))
        .map_err(|source| {
            let address = address.clone();
            match source.kind() {
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
                    ConnectError::Refused {
                        address,
                        role,
                        source,
                    }
                }
                io::ErrorKind::TimedOut => ConnectError::TimedOut { address, role },
                // A unix listener whose backlog stayed full.
                io::ErrorKind::WouldBlock => ConnectError::Busy { address, role },
                _ => ConnectError::Io {
                    address,
                    role,
                    source,
                },
            }
        })
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

fn connect_tcp(addresses: &[SocketAddr], deadline: Instant) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match TcpStream::connect_timeout(address, remaining(deadline)?) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                if stream.local_addr()?.ip() == stream.peer_addr()?.ip() {
                    sockopt::set_socket_send_buffer_size(&stream, HELD_LOCALLY)?;
                }
                return Ok(stream.into());
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Connecting to a unix socket blocks while the listener's backlog is full, as long as a send may
/// block: that is where the deadline goes.
fn connect_unix(path: &Path, deadline: Instant) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(remaining(deadline)?))?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket)
}

/// Why an outgoing migration could not be connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The host name means nothing.
    #[error("resolving {address}")]
    Resolve {
        /// Where to.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody listens there.
    #[error("nobody listens on {address} for the {}", .role.name())]
    Refused {
        /// Where to.
        address: Address,
        /// Which connection.
        role: Role,
        /// The system's words for it.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("connecting the {} to {address} took too long", .role.name())]
    TimedOut {
        /// Where to.
        address: Address,
        /// Which connection.
        role: Role,
    },
    /// Somebody listens there and takes no connections.
    #[error("{address} took no connection for the {} in time", .role.name())]
    Busy {
        /// Where to.
        address: Address,
        /// Which connection.
        role: Role,
    },
    /// Anything else.
    #[error("connecting the {} to {address}", .role.name())]
    Io {
        /// Where to.
        address: Address,
        /// Which connection.
        role: Role,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The handshake of a channel could not be written.
    #[error("writing the handshake of {channel}")]
    Hello {
        /// The channel.
        channel: ChannelId,
        /// Why.
        #[source]
        source: io::Error,
    },
}
