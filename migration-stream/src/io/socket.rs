//! Options of sockets whose value is an integer.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

#[allow(clippy::cast_possible_truncation)] // four bytes
const LEN: libc::socklen_t = size_of::<libc::c_int>() as libc::socklen_t;

/// The value of an option.
pub(super) fn option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = LEN;
    // SAFETY: value and length live for the call, the length is the value's.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// Gives an option a value.
pub(super) fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the value is an int that lives for the call, the length is its own.
    let ret = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            LEN,
        )
    };
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has TCP ask an idle peer's host whether the connection still is, so that a host which is gone is noticed within some
/// `limit`, also where a peer may be silent for longer. A connection that asks already is left as it is.
pub(super) fn keep_alive(socket: BorrowedFd<'_>, limit: Duration) {
    if !option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE).is_ok_and(|on| on == 0) {
        return;
    }
    let seconds = |part: u32| {
        let seconds = limit.as_secs() / u64::from(part);
        libc::c_int::try_from(seconds.clamp(1, MOST_SECONDS)).unwrap_or(1)
    };
    // A system without an option asks at its own pace.
    let _ = set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, seconds(2));
    let _ = set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, seconds(4));
    let _ = set_option(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 2);
    let _ = set_option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
}

/// What Linux takes for the times of keep-alive, seconds.
const MOST_SECONDS: u64 = 32_767;
