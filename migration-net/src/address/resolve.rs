//! From a host's name to the addresses of the families that may be used, and sockets for them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use migration_stream::Escaped;
use migration_stream::io::{CancelToken, deadline_after};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, ipproto, sockopt};

use super::TcpOptions;
use super::lookup::look_up;

/// How long the name of a host to listen on may take to be looked up.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);

/// Addresses for a listener. An empty host is the wildcard of each family.
pub(super) fn to_listen(host: &str, options: &TcpOptions) -> io::Result<Vec<SocketAddr>> {
    let wildcards = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let deadline = deadline_after(LISTEN_LIMIT);
    resolve(host, 0, options, wildcards, deadline, None)
}

/// Addresses of a peer, by `deadline`. An empty host is this machine.
pub(super) fn to_connect(
    host: &str,
    port: u16,
    options: &TcpOptions,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<Vec<SocketAddr>> {
    let loopback = [
        IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ];
    resolve(host, port, options, loopback, deadline, cancel)
}

fn resolve(
    host: &str,
    port: u16,
    options: &TcpOptions,
    of_nobody: [IpAddr; 2],
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<Vec<SocketAddr>> {
    let (ipv4, ipv6) = options.families();
    let all: Vec<SocketAddr> = if host.is_empty() {
        of_nobody.map(|ip| SocketAddr::new(ip, port)).to_vec()
    } else if options.numeric {
        let v4 = host.parse().map(|ip| SocketAddr::new(ip, port));
        // The bracketed form knows scopes.
        let numeric = v4.or_else(|_| format!("[{host}]:{port}").parse());
        vec![numeric.map_err(|_| {
            let what = format!(
                "'{}' is not a numeric address, which option 'numeric' wants",
                Escaped(host)
            );
            io::Error::new(io::ErrorKind::InvalidInput, what)
        })?]
    } else {
        look_up(host, port, deadline, cancel)?
    };
    let mut found = Vec::new();
    for address in all {
        let may = if address.is_ipv4() { ipv4 } else { ipv6 };
        if may && !found.contains(&address) {
            found.push(address);
        }
    }
    if found.is_empty() {
        let family = match (ipv4, ipv6) {
            (true, false) => "IPv4 address",
            (false, true) => "IPv6 address",
            _ => "address",
        };
        let what = format!("'{}' has no {family}", Escaped(host));
        return Err(io::Error::new(io::ErrorKind::AddrNotAvailable, what));
    }
    Ok(found)
}

/// A stream socket of the address's family that has the options which belong to a socket.
pub(super) fn socket(
    address: &SocketAddr,
    options: &TcpOptions,
    flags: SocketFlags,
) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let protocol: Option<Protocol> = options.mptcp.then_some(ipproto::MPTCP);
    let flags = flags | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, protocol)?;
    if let Some(keep_alive) = &options.keep_alive {
        let seconds = |s: u32| Duration::from_secs(s.into());
        sockopt::set_socket_keepalive(&socket, true)?;
        if let Some(count) = keep_alive.count {
            named("keep-alive-count", sockopt::set_tcp_keepcnt(&socket, count))?;
        }
        if let Some(idle) = keep_alive.idle {
            let set = sockopt::set_tcp_keepidle(&socket, seconds(idle));
            named("keep-alive-idle", set)?;
        }
        if let Some(interval) = keep_alive.interval {
            let set = sockopt::set_tcp_keepintvl(&socket, seconds(interval));
            named("keep-alive-interval", set)?;
        }
    }
    Ok(socket)
}

/// An error that says which option the system did not take.
fn named(option: &str, set: rustix::io::Result<()>) -> io::Result<()> {
    set.map_err(|errno| {
        let source = io::Error::from(errno);
        io::Error::new(source.kind(), format!("option '{option}': {source}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(change: impl FnOnce(&mut TcpOptions)) -> TcpOptions {
        let mut options = TcpOptions::default();
        change(&mut options);
        options
    }

    #[test]
    fn a_family_that_is_asked_for_excludes_the_other() {
        let listened = |options| to_listen("", &options).unwrap();
        assert_eq!(listened(TcpOptions::default()).len(), 2);
        for only4 in [
            options(|o| o.ipv4 = Some(true)),
            options(|o| o.ipv6 = Some(false)),
        ] {
            assert_eq!(listened(only4), ["0.0.0.0:0".parse().unwrap()]);
        }
        for only6 in [
            options(|o| o.ipv6 = Some(true)),
            options(|o| o.ipv4 = Some(false)),
        ] {
            assert_eq!(listened(only6), ["[::]:0".parse().unwrap()]);
        }
    }

    #[test]
    fn an_address_of_the_wrong_family_is_named() {
        let connected = |host, options| {
            let late = deadline_after(Duration::from_secs(20));
            to_connect(host, 1, &options, late, None)
        };
        let error = connected("127.0.0.1", options(|o| o.ipv6 = Some(true))).unwrap_err();
        assert_eq!(error.to_string(), "'127.0.0.1' has no IPv6 address");
        let error = connected("localhost", options(|o| o.numeric = true)).unwrap_err();
        assert!(error.to_string().contains("'localhost' is not a numeric"));
        let error = connected("h\x1b[2J", options(|o| o.numeric = true)).unwrap_err();
        assert!(error.to_string().contains(r"'h\u{1b}[2J' is not a numeric"));
    }

    #[test]
    fn keep_alive_is_set_as_it_was_asked_for() {
        let settings = super::super::KeepAlive::new(Some(3), Some(40), Some(5));
        let options = options(|o| o.keep_alive = Some(settings));
        let at = "127.0.0.1:0".parse().unwrap();
        let socket = socket(&at, &options, SocketFlags::empty()).unwrap();
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        assert_eq!(sockopt::tcp_keepcnt(&socket).unwrap(), 3);
        assert_eq!(sockopt::tcp_keepidle(&socket).unwrap().as_secs(), 40);
        assert_eq!(sockopt::tcp_keepintvl(&socket).unwrap().as_secs(), 5);
    }

    #[test]
    fn a_setting_that_the_system_does_not_take_is_named() {
        let settings = super::super::KeepAlive::new(None, Some(u32::MAX), None);
        let options = options(|o| o.keep_alive = Some(settings));
        let at = "127.0.0.1:0".parse().unwrap();
        let error = socket(&at, &options, SocketFlags::empty()).unwrap_err();
        assert!(error.to_string().contains("keep-alive-idle"), "{error}");
    }
}
