//! Connecting to an address.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::{Address, TcpOptions, resolve};

/// An address whose name was looked up, ready to be connected to as often as need be.
#[derive(Clone, Debug)]
pub struct Route {
    to: Resolved,
}

#[derive(Clone, Debug)]
enum Resolved {
    Tcp(Vec<SocketAddr>, TcpOptions),
    Unix(SocketAddrUnix),
}

impl Route {
    /// Looks the host's name up, which takes what the system's resolver allows itself.
    ///
    /// # Errors
    /// The name means nothing, has no address of a family that may be used, or an option is one for
    /// listening.
    pub fn new(address: &Address) -> io::Result<Self> {
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
            } => Resolved::Tcp(resolve::to_connect(host, *port, options)?, options.clone()),
            Address::Unix(path) => Resolved::Unix(SocketAddrUnix::new(path)?),
            Address::Abstract(name) => Resolved::Unix(SocketAddrUnix::new_abstract_name(name)?),
        };
        Ok(Self { to })
    }

    /// Connects, by `deadline`. The connection blocks in its reads and writes, is closed on `exec`,
    /// and has `TCP_NODELAY` if it is TCP.
    ///
    /// The addresses of a name are tried one after the other, each for an equal share of the time that
    /// is left.
    ///
    /// # Errors
    /// Those of `connect`, the last address's if there are several. `TimedOut` when the peer does not
    /// answer, `WouldBlock` when a unix listener's backlog stays full.
    pub fn connect(&self, deadline: Instant) -> io::Result<OwnedFd> {
        match &self.to {
            Resolved::Tcp(addresses, options) => connect_tcp(addresses, options, deadline),
            Resolved::Unix(address) => connect_unix(address, deadline),
        }
    }
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

fn connect_tcp(
    addresses: &[SocketAddr],
    options: &TcpOptions,
    deadline: Instant,
) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for (address, left) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let share = remaining(deadline)? / u32::try_from(left).unwrap_or(u32::MAX);
        match connect_one(address, options, share) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connect_one(address: &SocketAddr, options: &TcpOptions, limit: Duration) -> io::Result<OwnedFd> {
    let socket = resolve::socket(address, options, SocketFlags::NONBLOCK)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) => {}
        Err(Errno::INPROGRESS | Errno::INTR) => {
            wait_connected(&socket, limit)?;
            sockopt::socket_error(&socket)??;
        }
        Err(errno) => return Err(errno.into()),
    }
    sockopt::set_tcp_nodelay(&socket, true)?;
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(socket)
}

fn wait_connected(socket: &OwnedFd, limit: Duration) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        let left = limit
            .checked_sub(begun.elapsed())
            .ok_or(io::ErrorKind::TimedOut)?;
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::OUT)];
        match poll(&mut fds, Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Connecting to a unix socket blocks while the listener's backlog is full, as long as a send may
/// block: that is where the deadline goes.
fn connect_unix(address: &SocketAddrUnix, deadline: Instant) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(remaining(deadline)?))?;
    rustix::io::retry_on_intr(|| rustix::net::connect(&socket, address))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, None)?;
    Ok(socket)
}
