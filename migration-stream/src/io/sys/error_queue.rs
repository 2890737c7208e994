//! The error queue of a socket, on which the kernel reports zero-copy sends.

use std::mem;

use super::*;

/// `SO_EE_ORIGIN_ZEROCOPY`: the report is about zero-copy sends.
const ORIGIN_ZEROCOPY: u8 = 5;
/// `SO_EE_CODE_ZEROCOPY_COPIED`: the kernel copied after all.
const CODE_COPIED: u8 = 1;
/// Room for the one control message of a report, which brings an address of at most
/// `sockaddr_in6`.
const CONTROL_LEN: usize = 128;

/// What one report says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::io) struct Report {
    pub(in crate::io) sends: u32,
    pub(in crate::io) is_copied: bool,
}

/// The next report on the socket's error queue; `None` when there is none. An error of the socket
/// is an error.
pub(in crate::io) fn next_report(fd: BorrowedFd<'_>) -> io::Result<Option<Report>> {
    #[repr(align(8))]
    struct Control([u8; CONTROL_LEN]);
    let mut control = Control([0; CONTROL_LEN]);
    // SAFETY: an all-zero msghdr is valid: no address, no data, no control buffer.
    let mut msg: libc::msghdr = unsafe { mem::zeroed() };
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = CONTROL_LEN;
    let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
    // SAFETY: `msg` and the control buffer live for the call, and lengths are theirs.
    if unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, flags) } < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::WouldBlock => socket_error(fd).map(|()| None),
            io::ErrorKind::Interrupted => next_report(fd),
            _ => Err(error),
        };
    }
    // SAFETY: `msg` was filled by recvmsg, its control buffer is aligned for cmsghdr and alive.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const msg) };
    if header.is_null() {
        return Err(unexpected("has a report without content"));
    }
    // SAFETY: not null, so it points to a whole cmsghdr in the control buffer.
    let cmsg = unsafe { header.read_unaligned() };
    let is_error = matches!(
        (cmsg.cmsg_level, cmsg.cmsg_type),
        (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
    );
    // SAFETY: CMSG_LEN only computes a length.
    let least = unsafe { libc::CMSG_LEN(size_of_u32::<libc::sock_extended_err>()) };
    if !is_error || cmsg.cmsg_len < least as usize {
        return Err(unexpected("has a report of another kind"));
    }
    // SAFETY: the message is long enough for a sock_extended_err, of which every bit pattern is
    // valid.
    let error = unsafe {
        libc::CMSG_DATA(header)
            .cast::<libc::sock_extended_err>()
            .read_unaligned()
    };
    if error.ee_origin != ORIGIN_ZEROCOPY {
        let code = i32::try_from(error.ee_errno).unwrap_or(libc::EIO);
        return Err(io::Error::from_raw_os_error(code));
    }
    Ok(Some(Report {
        // Both ends of the range are part of it; the numbers wrap around.
        sends: error.ee_data.wrapping_sub(error.ee_info).wrapping_add(1),
        is_copied: error.ee_code & CODE_COPIED != 0,
    }))
}

/// The socket's pending error.
fn socket_error(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::net::sockopt::socket_error(fd)??)
}

pub(in crate::io) fn unexpected(what: &str) -> io::Error {
    io::Error::other(format!("the socket's error queue {what}"))
}

#[allow(clippy::cast_possible_truncation)] // a few bytes
const fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}
