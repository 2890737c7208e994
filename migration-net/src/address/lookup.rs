//! Looking a host's name up, which the system's resolver does for as long as it likes.
//!
//! The resolver runs in a thread of its own. A look-up that is late or cancelled is abandoned: its thread ends by
//! itself when the resolver returns. How many there may be at a time is bounded.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Instant;

use migration_stream::Escaped;
use migration_stream::io::CancelToken;
use rustix::event::PollFlags;

use super::wait::{check, wait_for};

/// Look-ups at a time, those included that nobody waits for any more.
const MOST: usize = 64;

static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Returns the addresses of `host` at `port`, by `deadline`.
///
/// # Errors
/// The resolver's, `TimedOut`, that of [`CancelToken::check`] when `cancel` ended the wait.
pub(super) fn look_up(
    host: &str,
    port: u16,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<Vec<SocketAddr>> {
    check(cancel)?;
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let name = host.to_owned();
    let ask = move || Ok((name.as_str(), port).to_socket_addrs()?.collect());
    beside(&RUNNING, ask, deadline, cancel).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => {
            let what = format!("looking '{}' up took too long", Escaped(host));
            io::Error::new(io::ErrorKind::TimedOut, what)
        }
        _ => error,
    })
}

/// Calls `ask` in another thread, one of [`MOST`] that `running` counts, and waits for what it returns.
fn beside<T: Send + 'static>(
    running: &'static AtomicUsize,
    ask: impl FnOnce() -> io::Result<T> + Send + 'static,
    deadline: Instant,
    cancel: Option<&CancelToken>,
) -> io::Result<T> {
    let turn = Turn::begin(running)?;
    let (done, over) = io::pipe()?;
    let (tell, told) = sync_channel(1);
    thread::Builder::new()
        .name("name-lookup".to_owned())
        .spawn(move || {
            // The end of the pipe is closed last, however this thread ends.
            let _over = over;
            let _turn = turn;
            // Nobody may wait for it any more.
            let _ = tell.send(ask());
        })?;
    wait_for(done.as_fd(), PollFlags::IN, deadline, cancel)?;
    told.try_recv().unwrap_or_else(|_| {
        Err(io::Error::other(
            "the thread that looks a name up has ended",
        ))
    })
}

/// One of the look-ups that run.
struct Turn(&'static AtomicUsize);

impl Turn {
    fn begin(running: &'static AtomicUsize) -> io::Result<Self> {
        let turn = Self(running);
        if running.fetch_add(1, Ordering::Relaxed) < MOST {
            return Ok(turn);
        }
        // Dropping the turn gives it back.
        Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            format!("{MOST} names are being looked up, and the system's resolver does not answer"),
        ))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Duration;

    use migration_stream::io::is_cancelled;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A resolver that answers when it is told to.
    fn stuck(until: Receiver<()>) -> impl FnOnce() -> io::Result<u8> + Send {
        move || {
            let _ = until.recv();
            Ok(7)
        }
    }

    #[test]
    fn a_resolver_that_does_not_answer_is_waited_for_until_the_deadline() {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        let (release, until) = channel();
        let soon = Instant::now() + Duration::from_millis(20);
        let error = beside(&RUNNING, stuck(until), soon, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        // Its thread ends by itself.
        assert_eq!(RUNNING.load(Ordering::Relaxed), 1);
        drop(release);
        let late = Instant::now() + LONG;
        while RUNNING.load(Ordering::Relaxed) > 0 && Instant::now() < late {
            thread::yield_now();
        }
        assert_eq!(RUNNING.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_look_up_is_cancelled_whatever_the_resolver_does() {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        let (_release, until) = channel();
        let token = CancelToken::new().unwrap();
        let (begun, other) = (Instant::now(), token.clone());
        let canceller = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            other.cancel();
        });
        let error = beside(&RUNNING, stuck(until), begun + LONG, Some(&token)).unwrap_err();
        assert!(is_cancelled(&error), "{error}");
        assert!(begun.elapsed() < LONG / 2);
        canceller.join().unwrap();
        // None begins afterwards.
        let late = Instant::now() + LONG;
        assert!(is_cancelled(
            &look_up("localhost", 1, late, Some(&token)).unwrap_err()
        ));
    }

    #[test]
    fn what_the_resolver_says_is_returned() {
        static RUNNING: AtomicUsize = AtomicUsize::new(0);
        let late = Instant::now() + LONG;
        assert_eq!(beside(&RUNNING, || Ok(7), late, None).unwrap(), 7);
        let refused = || Err::<u8, _>(io::ErrorKind::AddrNotAvailable.into());
        let error = beside(&RUNNING, refused, late, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }

    #[test]
    fn abandoned_look_ups_are_bounded() {
        static RUNNING: AtomicUsize = AtomicUsize::new(MOST);
        let late = Instant::now() + LONG;
        let error = beside(&RUNNING, || Ok(7), late, None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(RUNNING.load(Ordering::Relaxed), MOST);
    }
}
