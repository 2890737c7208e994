//! What a TCP peer on this host has not read yet, as the system sees its socket (`sock_diag(7)`).
//!
//! An acknowledgement does not say it: TCP acknowledges what has arrived, and on one host that may
//! still lie in the sender's own pages.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// `SOCK_DIAG_BY_FAMILY`: a request for sockets, and an answer that is one.
const BY_FAMILY: u16 = 20;
/// A request: `nlmsghdr` and `inet_diag_req_v2`.
const REQUEST_LEN: u8 = 16 + 56;
/// Where an answer's type is in its `nlmsghdr`.
const TYPE: usize = 4;
/// The error number of an `nlmsgerr`, behind `nlmsghdr`.
const ERROR: usize = 16;
/// `idiag_rqueue` of an `inet_diag_msg`, behind `nlmsghdr`, four bytes, `inet_diag_sockid` and
/// `idiag_expires`.
const RQUEUE: usize = 16 + 4 + 48 + 4;

/// The other end of a TCP connection within one network namespace.
#[derive(Debug)]
pub(super) struct LocalPeer {
    netlink: File,
    request: Vec<u8>,
}

impl LocalPeer {
    /// The peer of `socket`, a TCP connection, if it is here.
    pub(super) fn find(socket: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let socket = TcpStream::from(socket.try_clone_to_owned()?);
        let request = request(socket.peer_addr()?, socket.local_addr()?);
        // SAFETY: socket takes no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                libc::NETLINK_SOCK_DIAG,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: socket succeeded: the descriptor is open and nobody else's.
        let netlink = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let peer = Self { netlink, request };
        Ok(peer.received()?.map(|_| peer))
    }

    /// How much it has received and not read, bytes. One that has gone will read nothing.
    pub(super) fn unread(&self) -> io::Result<u32> {
        Ok(self.received()?.unwrap_or(0))
    }

    /// What is in its receive queue, bytes; `None` if there is no such socket.
    fn received(&self) -> io::Result<Option<u32>> {
        (&self.netlink).write_all(&self.request)?;
        // It is answered before the write returns, so this does not wait.
        let mut answer = [0; 1024];
        let len = (&self.netlink).read(&mut answer)?;
        parse(answer.get(..len).unwrap_or_default())
    }
}

fn parse(answer: &[u8]) -> io::Result<Option<u32>> {
    if field(answer, TYPE).map(u16::from_ne_bytes) == Some(BY_FAMILY) {
        let queue = field(answer, RQUEUE).map(u32::from_ne_bytes);
        return queue.map(Some).ok_or_else(|| unknown(answer));
    }
    match field(answer, ERROR).map(i32::from_ne_bytes) {
        Some(error) if error == -libc::ENOENT => Ok(None),
        Some(error) if error < 0 => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        _ => Err(unknown(answer)),
    }
}

fn unknown(answer: &[u8]) -> io::Error {
    let len = answer.len();
    io::Error::other(format!(
        "sock_diag answered with {len} bytes that are neither a socket nor an error"
    ))
}

/// The bytes from `at` on.
fn field<const N: usize>(answer: &[u8], at: usize) -> Option<[u8; N]> {
    answer.get(at..)?.first_chunk().copied()
}

/// Asks for the TCP socket with the address `local` that is connected to `remote`.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // the constants fit their fields
fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REQUEST_LEN.into());
    // nlmsghdr: length, type, flags; sequence number and port are not needed.
    bytes.extend(u32::from(REQUEST_LEN).to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    bytes.extend([0; 8]);
    // inet_diag_req_v2: family, protocol, no extensions; in whatever state it is.
    let family = match local {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    bytes.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    // inet_diag_sockid: ports and addresses as on the wire, any interface, any cookie.
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(remote.port().to_be_bytes());
    for ip in [local.ip(), remote.ip()] {
        match ip {
            IpAddr::V4(ip) => {
                bytes.extend(ip.octets());
                bytes.extend([0; 12]);
            }
            IpAddr::V6(ip) => bytes.extend(ip.octets()),
        }
    }
    bytes.extend([0; 4]);
    bytes.extend([0xff; 8]);
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn peer_on_this_host_is_found_and_says_what_it_has_not_read() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let port = listener.local_addr().unwrap().port();
            let to = match address {
                // One that speaks IPv4 to a socket of both.
                "[::]:0" => format!("[::ffff:127.0.0.1]:{port}"),
                _ => listener.local_addr().unwrap().to_string(),
            };
            let mut ours = TcpStream::connect(to).unwrap();
            let (mut theirs, _) = listener.accept().unwrap();
            let peer = LocalPeer::find(ours.as_fd()).unwrap().expect(address);
            assert_eq!(peer.unread().unwrap(), 0);
            ours.write_all(&[7; 1000]).unwrap();
            assert_eq!(peer.unread().unwrap(), 1000);
            theirs.read_exact(&mut [0; 600]).unwrap();
            assert_eq!(peer.unread().unwrap(), 400);
            drop(theirs);
            assert_eq!(peer.unread().unwrap(), 0);
        }
    }

    #[test]
    fn peer_that_is_not_here_is_not_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let peer = LocalPeer::find(ours.as_fd()).unwrap().unwrap();
        // Nobody is at the other address.
        let elsewhere = LocalPeer {
            request: request("127.0.0.2:1".parse().unwrap(), theirs.peer_addr().unwrap()),
            ..peer
        };
        assert_eq!(elsewhere.received().unwrap(), None);
    }

    #[test]
    fn answers_are_sockets_or_errors() {
        let answer = |kind: u16, at: usize, value: [u8; 4]| {
            let mut answer = vec![0; at];
            answer[TYPE..TYPE + 2].copy_from_slice(&kind.to_ne_bytes());
            answer.extend(value);
            answer
        };
        let socket = answer(BY_FAMILY, RQUEUE, 4096_u32.to_ne_bytes());
        assert_eq!(parse(&socket).unwrap(), Some(4096));
        assert!(parse(&socket[..RQUEUE + 3]).is_err());
        assert_eq!(
            parse(&answer(2, ERROR, (-libc::ENOENT).to_ne_bytes())).unwrap(),
            None
        );
        let refused = parse(&answer(2, ERROR, (-libc::EPERM).to_ne_bytes())).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        // An acknowledgement, and nothing at all.
        assert!(parse(&answer(2, ERROR, [0; 4])).is_err());
        assert!(parse(&[]).is_err());
    }
}
