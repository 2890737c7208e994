//! Writes without signals: an error is reported by the call, never by the death of the process.
//!
//! `MSG_NOSIGNAL` exists for `send(2)` and `sendmsg(2)` alone. A write to a pipe, and a splice to a socket, raise
//! SIGPIPE when the peer has gone; a write beyond the process's file size limit raises SIGXFSZ. What the process
//! does about them is the host's choice, not a library's: both are blocked for the calling thread around such a
//! call and taken away behind it.

use std::{io, mem, ptr};

/// The signals of a write that fails. The kernel sends them to the thread that writes.
const OF_WRITES: [libc::c_int; 2] = [libc::SIGPIPE, libc::SIGXFSZ];

/// Calls `call` and lets no SIGPIPE or SIGXFSZ that it raises reach the process. It costs three system calls.
///
/// Signals of these kinds that were pending before stay pending.
///
/// # Errors
/// Those of `call`; that of `pthread_sigmask`, before `call` is called.
pub fn without_write_signals<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let blocked = Blocked::new()?;
    let result = call();
    // A call that wrote a part may have raised one all the same.
    blocked.take_away();
    result
}

/// Does the same for a call that raises a signal only when it writes nothing and fails: one system call less.
pub(in crate::io) fn without_failure_signals<T>(
    call: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let blocked = Blocked::new()?;
    let result = call();
    if result.is_err() {
        blocked.take_away();
    }
    result
}

/// While it lives the calling thread gets neither signal.
struct Blocked {
    /// The thread's mask before.
    before: libc::sigset_t,
    /// The signals that may be taken away: those that were not pending before.
    ours: libc::sigset_t,
}

impl Blocked {
    fn new() -> io::Result<Self> {
        let signals = set_of(&OF_WRITES);
        let mut before = set_of(&[]);
        // SAFETY: both sets live for the call.
        let error =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, &raw mut before) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let mut ours = signals;
        // Only a signal that was blocked before can have been pending.
        if OF_WRITES.iter().any(|&signal| contains(&before, signal)) {
            let mut pending = set_of(&[]);
            // SAFETY: the set lives for the call.
            unsafe { libc::sigpending(&raw mut pending) };
            let of_others = |signal: &libc::c_int| contains(&pending, *signal);
            let left: Vec<_> = OF_WRITES.into_iter().filter(|s| !of_others(s)).collect();
            ours = set_of(&left);
        }
        Ok(Self { before, ours })
    }

    /// Takes away what the thread's writes have raised.
    fn take_away(&self) {
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: set and time live for the call; nobody asks for the signal's details.
        while unsafe { libc::sigtimedwait(&raw const self.ours, ptr::null_mut(), &raw const now) }
            > 0
        {}
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set lives for the call, which cannot fail: it is the mask that was.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut())
        };
    }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: an all-zero set is a value that sigemptyset may overwrite.
    let mut set = unsafe { mem::zeroed() };
    // SAFETY: the set lives for the call.
    unsafe { libc::sigemptyset(&raw mut set) };
    for &signal in signals {
        // SAFETY: the set was made by sigemptyset and lives for the call.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

fn contains(set: &libc::sigset_t, signal: libc::c_int) -> bool {
    // SAFETY: the set lives for the call.
    unsafe { libc::sigismember(ptr::from_ref(set), signal) == 1 }
}

#[cfg(test)]
mod tests;
