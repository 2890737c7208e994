//! Listening on an address.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::socket_file::{SocketFile, SocketFileError};
use super::{Address, AddressError, TcpOptions, resolve};

/// Connections that may wait for [`Listener::accept`].
const BACKLOG: i32 = 128;
/// How often another free port is looked for, when one that is free in the first family is not free
/// in the second.
const FREE_PORTS: usize = 16;

/// A listening socket, or several that act as one: those of both IP families, or those of all
/// addresses of a name.
///
/// A connection waits to be accepted when [`AsFd::as_fd`] becomes readable. The name of a unix socket
/// is removed when the listener is dropped, unless it is another socket's by then.
#[derive(Debug)]
pub struct Listener {
    // Dropped first: a dead socket's name would be anybody's to take.
    file: Option<SocketFile>,
    first: OwnedFd,
    others: Vec<OwnedFd>,
    /// Readable when one of several sockets is.
    any: Option<OwnedFd>,
    is_tcp: bool,
    address: Address,
    addresses: Vec<Address>,
    /// Which socket is asked first the next time, so that a flood on one does not starve another.
    next: AtomicUsize,
}

impl Listener {
    /// Listens on `address`.
    ///
    /// An empty host is every address of both IP families; a name is all of its addresses. All have
    /// one port. A family that the host does not have is left out, unless the options ask for it. A
    /// unix socket that nobody listens on any more is replaced; a file that is no socket is not.
    ///
    /// # Errors
    /// [`AddressError::Busy`] when somebody listens there already, [`AddressError::NotASocket`],
    /// [`AddressError::Bind`].
    pub fn bind(address: &Address) -> Result<Self, AddressError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => AddressError::Busy {
                address: address.clone(),
                source,
            },
            _ => AddressError::Bind {
                address: address.clone(),
                source,
            },
        };
        match address {
            Address::Tcp {
                host,
                port,
                options,
            } => bind_tcp(host, *port, options)
                .and_then(|bound| Self::of_tcp(bound, host))
                .map_err(failed),
            Address::Unix(path) => {
                let (listener, file) = SocketFile::bind(path).map_err(|error| match error {
                    SocketFileError::NotASocket => AddressError::NotASocket {
                        address: address.clone(),
                    },
                    SocketFileError::Io(source) => failed(source),
                })?;
                let mut this = Self::of_one(listener.into(), address.clone(), false);
                this.file = Some(file);
                this.set_nonblocking().map_err(failed)?;
                Ok(this)
            }
            Address::Abstract(name) => bind_abstract(name)
                .map(|socket| Self::of_one(socket, address.clone(), false))
                .map_err(failed),
        }
    }

    fn of_one(socket: OwnedFd, address: Address, is_tcp: bool) -> Self {
        Self {
            file: None,
            first: socket,
            others: Vec::new(),
            any: None,
            is_tcp,
            addresses: vec![address.clone()],
            address,
            next: AtomicUsize::new(0),
        }
    }

    fn of_tcp((first, others): Bound, host: &str) -> io::Result<Self> {
        let at = local_address(&first)?;
        let mut this = Self::of_one(first, Address::from(at), true);
        if others.is_empty() {
            return Ok(this);
        }
        let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (socket, index) in std::iter::once(&this.first).chain(&others).zip(0u64..) {
            let data = epoll::EventData::new_u64(index);
            epoll::add(&any, socket, data, epoll::EventFlags::IN)?;
        }
        for socket in &others {
            this.addresses.push(Address::from(local_address(socket)?));
        }
        this.address = Address::tcp(host, at.port());
        this.any = Some(any);
        this.others = others;
        Ok(this)
    }

    fn sockets(&self) -> impl Iterator<Item = &OwnedFd> + Clone {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// The address it listens on, with the port that the kernel chose if none was asked for. Where it
    /// listens on several addresses, the host is the one that was asked for.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// All addresses it listens on, in numbers.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// A connection that waits; `WouldBlock` if there is none. It blocks in its own reads and writes,
    /// is closed on `exec`, and has `TCP_NODELAY` if it is TCP.
    ///
    /// # Errors
    /// Those of `accept`.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        let count = 1 + self.others.len();
        let first = self.next.fetch_add(1, Ordering::Relaxed) % count;
        let mut nobody = io::Error::from(Errno::AGAIN);
        for socket in self.sockets().cycle().skip(first).take(count) {
            let accepted = rustix::io::retry_on_intr(|| {
                rustix::net::accept_with(socket, SocketFlags::CLOEXEC)
            });
            match accepted {
                Ok(connection) => {
                    if self.is_tcp {
                        // It fails on a connection that has ended, which the first read tells.
                        let _ = sockopt::set_tcp_nodelay(&connection, true);
                    }
                    return Ok(connection);
                }
                Err(errno) => {
                    let error = io::Error::from(errno);
                    if error.kind() != io::ErrorKind::WouldBlock {
                        nobody = error;
                    }
                }
            }
        }
        Err(nobody)
    }

    /// Lets at least `backlog` connections wait, and makes a socket that came from elsewhere
    /// non-blocking.
    ///
    /// # Errors
    /// Those of `listen` and `fcntl`.
    pub fn set_backlog(&self, backlog: i32) -> io::Result<()> {
        self.set_nonblocking()?;
        for socket in self.sockets() {
            rustix::net::listen(socket, backlog.max(BACKLOG))?;
        }
        Ok(())
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        for socket in self.sockets() {
            rustix::io::ioctl_fionbio(socket, true)?;
        }
        Ok(())
    }
}

fn local_address(socket: &OwnedFd) -> io::Result<SocketAddr> {
    Ok(rustix::net::getsockname(socket)?.try_into()?)
}

fn bind_abstract(name: &[u8]) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new_abstract_name(name)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// At least one socket.
type Bound = (OwnedFd, Vec<OwnedFd>);

fn bind_tcp(host: &str, port: u16, options: &TcpOptions) -> io::Result<Bound> {
    let addresses = resolve::to_listen(host, options)?;
    let mut busy = io::Error::from(io::ErrorKind::AddrInUse);
    for port in port..=options.to.unwrap_or(port) {
        match bind_port(&addresses, port, options) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => busy = error,
            other => return other,
        }
    }
    Err(busy)
}

/// Listens on all `addresses` at one port.
fn bind_port(addresses: &[SocketAddr], port: u16, options: &TcpOptions) -> io::Result<Bound> {
    let mut attempts = if port == 0 { FREE_PORTS } else { 1 };
    loop {
        attempts -= 1;
        match bind_all(addresses, port, options) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && attempts > 0 => {}
            other => return other,
        }
    }
}

fn bind_all(addresses: &[SocketAddr], mut port: u16, options: &TcpOptions) -> io::Result<Bound> {
    let mut sockets: Option<Bound> = None;
    let mut lacks = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        let mut address = *address;
        address.set_port(port);
        let asked = if address.is_ipv4() {
            options.ipv4
        } else {
            options.ipv6
        };
        match bind_one(&address, addresses.len() == 1, options) {
            Ok(socket) => {
                port = local_address(&socket)?.port();
                match &mut sockets {
                    Some((_, others)) => others.push(socket),
                    None => sockets = Some((socket, Vec::new())),
                }
            }
            // The host does not have the family.
            Err(error) if asked != Some(true) && is_absent(&error) => lacks = error,
            Err(error) => return Err(error),
        }
    }
    sockets.ok_or(lacks)
}

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || error.raw_os_error() == Some(rustix::io::Errno::AFNOSUPPORT.raw_os_error())
}

fn bind_one(address: &SocketAddr, is_alone: bool, options: &TcpOptions) -> io::Result<OwnedFd> {
    let socket = resolve::socket(address, options, SocketFlags::NONBLOCK)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if let SocketAddr::V6(v6) = address {
        // An IPv6 wildcard that was written as such takes IPv4 too, as everywhere; one that stands
        // beside the IPv4 wildcard, or is to be alone, does not.
        let is_wildcard = *v6.ip() == Ipv6Addr::UNSPECIFIED;
        let takes_ipv4 = is_alone && is_wildcard && options.families().0;
        sockopt::set_ipv6_v6only(&socket, !takes_ipv4)?;
    }
    rustix::net::bind(&socket, address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.any.as_ref().unwrap_or(&self.first).as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        let address = match listener.local_addr() {
            Ok(address) => Address::from(address),
            Err(_) => Address::tcp("", 0),
        };
        Self::of_one(listener.into(), address, true)
    }
}

impl From<UnixListener> for Listener {
    /// The name of the socket is not removed later.
    fn from(listener: UnixListener) -> Self {
        let path = listener.local_addr().ok();
        let path = path.and_then(|address| address.as_pathname().map(PathBuf::from));
        Self::of_one(
            listener.into(),
            Address::Unix(path.unwrap_or_default()),
            false,
        )
    }
}
