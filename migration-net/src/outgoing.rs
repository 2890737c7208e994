//! Connecting an outgoing migration: the main channel first, then multifd's.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSink, CancelToken, Chunk, FdChannel, deadline_after, is_cancelled};
use rustix::net::sockopt;

use crate::address::{Address, ResolvedAddress};
use crate::channels::{ChannelId, Channels};
use crate::incoming::Role;

/// What a connection to this host may hold that was sent and not read, bytes (the kernel doubles it for
/// its own use). More, and the system's own choice grows to megabytes on each connection, has left
/// the processor's caches before it is read, where there is no wire that it could fill.
const HELD_LOCALLY: usize = 256 << 10;

/// The connections of an outgoing migration.
#[derive(Debug)]
#[non_exhaustive]
pub struct Outgoing {
    /// The main channel. Nothing was written to it.
    pub main: FdChannel,
    /// Multifd's channels in the order of their ids. Their handshakes were written.
    pub channels: Vec<FdChannel>,
}

/// Connects the main channel, and `channels` if there are any. TCP connections have
/// `TCP_NODELAY`: a COLO checkpoint is made of small messages that somebody waits for. Those to this host
/// itself have a bounded send buffer, so that pages are read while the processor's caches still have them.
///
/// All of it takes at most `timeout`, and ends when `cancel` is cancelled; so do the waits of the
/// connections afterwards. `limit` is how long the channels wait for the peer afterwards
/// (see [`FdChannel::new`]).
///
/// # Errors
/// [`ConnectError`], which says which connection it was.
pub fn connect(
    address: &Address,
    channels: impl Into<Channels>,
    timeout: Duration,
    limit: Duration,
    cancel: Option<&CancelToken>,
) -> Result<Outgoing, ConnectError> {
    let expected: Channels = channels.into();
    let wait = Wait {
        deadline: deadline_after(timeout),
        limit,
        cancel,
    };
    let to = ResolvedAddress::new(address, wait.deadline, cancel).map_err(|source| {
        if is_cancelled(&source) {
            return ConnectError::Cancelled {
                address: address.clone(),
            };
        }
        ConnectError::Resolve {
            address: address.clone(),
            source,
        }
    })?;
    let main = open(&to, address, Role::Main, wait)?;
    let mut channels = Vec::new();
    if let Some(set) = expected.0 {
        for id in set.ids() {
            let mut channel = open(&to, address, Role::Channel(id), wait)?;
            let hello = set.hello(id);
            channel.set_write_deadline(Some(wait.deadline));
            channel
                .write_all(&[Chunk::Bytes(&hello)])
                .map_err(|source| {
                    if is_cancelled(&source) {
                        return ConnectError::Cancelled {
                            address: address.clone(),
                        };
                    }
                    ConnectError::Hello {
                        channel: id,
                        source,
                    }
                })?;
            channel.set_write_deadline(None);
            channels.push(channel);
        }
    }
    Ok(Outgoing { main, channels })
}

/// How long connections are waited for, and how long they wait.
#[derive(Clone, Copy)]
struct Wait<'a> {
    deadline: Instant,
    limit: Duration,
    cancel: Option<&'a CancelToken>,
}

fn open(
    to: &ResolvedAddress,
    address: &Address,
    role: Role,
    wait: Wait<'_>,
) -> Result<FdChannel, ConnectError> {
    to.connect(wait.deadline, wait.cancel)
        .and_then(|fd| {
            if matches!(address, Address::Tcp { .. }) && is_local(&fd)? {
                sockopt::set_socket_send_buffer_size(&fd, HELD_LOCALLY)?;
            }
            Ok(fd)
        })
        .and_then(|fd| {
            let mut channel = FdChannel::new(fd, wait.limit)?;
            if let Some(token) = wait.cancel {
                ByteSink::set_cancel(&mut channel, token);
            }
            Ok(channel)
        })
        .map_err(|source| {
            let address = address.clone();
            match source.kind() {
                _ if is_cancelled(&source) => ConnectError::Cancelled { address },
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

/// Whether both ends of a connection are this host's.
fn is_local(fd: &OwnedFd) -> io::Result<bool> {
    let ours: SocketAddr = rustix::net::getsockname(fd)?.try_into()?;
    let theirs: Option<SocketAddr> = rustix::net::getpeername(fd)?.and_then(|a| a.try_into().ok());
    Ok(theirs.is_some_and(|theirs| theirs.ip() == ours.ip()))
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
    /// It was cancelled.
    #[error("connecting to {address} was cancelled")]
    Cancelled {
        /// Where to.
        address: Address,
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
