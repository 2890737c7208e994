//! Connecting to an address, whose name was looked up.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use migration_stream::io::{CancelToken, deadline_after};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::wait::{check, pause, remaining, wait_for};
use super::{Address, TcpOptions, resolve};

/// How often a unix listener whose backlog is full is tried.
const BACKLOG_POLL: Duration = Duration::from_millis(5);

/// An address whose name was looked up, ready to be connected to as often as need be.
#[derive(Clone, Debug)]
pub struct ResolvedAddress {
    to: Resolved,
}

#[derive(Clone, Debug)]
enum Resolved {
    Tcp(Vec<SocketAddr>, TcpOptions),
    Unix(SocketAddrUnix),
}

impl ResolvedAddress {
    /// Looks the host's name up, by `deadline` and until `cancel` ends it. The system's resolver is
    /// not waited for any longer than that.
    ///
    /// # Errors
    /// The name means nothing, has no address of a family that may be used, or an option is one for
    /// listening. `TimedOut`; that of [`CancelToken::check`].
    pub fn new(
        address: &Address,
        deadline: Instant,
        cancel: Option<&CancelToken>,
    ) -> io::Result<Self> {
        let to = match address {
            Address::Tcp {
                options: TcpOptions { to: Some(_), .. },
                ..
            } => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "option 'to' is for listening",
                ));
            }
            Address::Tcp {
                host,
                port,
                options,
            } => {
                let found = resolve::to_connect(host, *port, options, deadline, cancel)?;
                Resolved::Tcp(found, options.clone())
            }
            Address::Unix(path) => Resolved::Unix(SocketAddrUnix::new(path)?),
            Address::Abstract(name) => Resolved::Unix(SocketAddrUnix::new_abstract_name(name)?),
        };
        Ok(Self { to })
    }

    /// Connects, by `deadline` and until `cancel` ends it. The connection blocks in its reads and
    /// writes, is closed on `exec`, and has `TCP_NODELAY` if it is TCP.
    ///
    /// The addresses of a name are tried one after the other, each for an equal share of the time that
    /// is left.
    ///
    /// # Errors
    /// Those of `connect`, the last address's if there are several. `TimedOut` when the peer does not
    /// answer, `WouldBlock` when a unix listener's backlog stays full, and that of
    /// [`CancelToken::check`].
    pub fn connect(&self, deadline: Instant, cancel: Option<&CancelToken>) -> io::Result<OwnedFd> {
        check(cancel)?;
        match &self.to {
            Resolved::Tcp(addresses, options) => connect_tcp(addresses, options, deadline, cancel),
            Resolved::Unix(address) => connect_unix(address, deadline, cancel),
        }
    }
}

fn connect_tcp(
    addresses: &[SocketAddr],
    options: &TcpOptions,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for (address, left) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let share = remaining(deadline)? / u32::try_from(left).unwrap_or(u32::MAX);
        match connect_one(address, options, deadline_after(share), cancel) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
        check(cancel)?;
    }
    Err(last)
}

fn connect_one(
    address: &SocketAddr,
    options: &TcpOptions,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<OwnedFd> {
    let socket = resolve::socket(address, options, SocketFlags::NONBLOCK)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            wait_for(socket.as_fd(), PollFlags::OUT, deadline, cancel)?;
            sockopt::socket_error(&socket)??;
        }
        Err(errno) => return Err(errno.into()),
    }
    sockopt::set_tcp_nodelay(&socket, true)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

/// A listener whose backlog is full refuses a connection that does not block, and nothing can be
/// polled for its having room again: it is tried until it has.
fn connect_unix(
    address: &SocketAddrUnix,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    loop {
        match rustix::io::retry_on_intr(|| rustix::net::connect(&socket, address)) {
            Ok(()) => break,
            Err(Errno::AGAIN) => match pause(BACKLOG_POLL, deadline, cancel) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    return Err(Errno::AGAIN.into());
                }
                other => other?,
            },
            Err(errno) => return Err(errno.into()),
        }
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}
