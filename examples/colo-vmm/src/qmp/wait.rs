//! Waiting for a socket and for another thread at once.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Wakes a thread that waits.
#[derive(Debug)]
pub(super) struct Waker(EventFd);

impl Waker {
    pub(super) fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }

    /// Ends the current wait, or the next if there is none.
    pub(super) fn wake(&self) {
        // It fails only if the counter is full, and then the other thread is as good as awake.
        let _ = self.0.write(1);
    }

    fn clear(&self) {
        // It fails only if nobody woke us, and then there is nothing to clear.
        let _ = self.0.read();
    }
}

/// What has come of waiting. All false: time is up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    /// Another thread has called [`Waker::wake`].
    pub(super) woken: bool,
    /// There is something to be read, or the end.
    pub(super) readable: bool,
    /// The other side is gone. Told whether it was asked for or not, and again each time.
    pub(super) hung_up: bool,
}

/// What a thread waits with.
#[derive(Debug)]
pub(super) struct Waiter {
    epoll: Epoll,
    socket: RawFd,
    interest: EventSet,
}

const SOCKET: u64 = 0;
const WAKER: u64 = 1;

impl Waiter {
    /// Waits for `socket`, which has to be open as long as this is used, and `waker`.
    pub(super) fn new(socket: &impl AsRawFd, waker: &Waker) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let socket = socket.as_raw_fd();
        let interest = EventSet::empty();
        epoll.ctl(
            ControlOperation::Add,
            socket,
            EpollEvent::new(interest, SOCKET),
        )?;
        epoll.ctl(
            ControlOperation::Add,
            waker.0.as_raw_fd(),
            EpollEvent::new(EventSet::IN, WAKER),
        )?;
        Ok(Self {
            epoll,
            socket,
            interest,
        })
    }

    /// Waits until the socket can do one of `interest`, `waker` is used or `timeout` is over.
    pub(super) fn wait(
        &mut self,
        waker: &Waker,
        interest: EventSet,
        timeout: Option<Duration>,
    ) -> io::Result<Ready> {
        if interest != self.interest {
            self.epoll.ctl(
                ControlOperation::Modify,
                self.socket,
                EpollEvent::new(interest, SOCKET),
            )?;
            self.interest = interest;
        }
        let mut events = [EpollEvent::default(); 2];
        let count = match self.epoll.wait(milliseconds(timeout), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut ready = Ready::default();
        for event in events.iter().take(count) {
            let set = event.event_set();
            if event.data() == WAKER {
                ready.woken = true;
            } else {
                ready.readable |= set.contains(EventSet::IN);
                ready.hung_up |= set.intersects(EventSet::HANG_UP | EventSet::ERROR);
            }
        }
        if ready.woken {
            waker.clear();
        }
        Ok(ready)
    }
}

/// A timeout as epoll has it. Rounded up: rounded down, the last millisecond would be spent
/// asking again and again.
fn milliseconds(timeout: Option<Duration>) -> i32 {
    const FOREVER: i32 = -1;
    timeout.map_or(FOREVER, |timeout| {
        i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn a_wake_ends_one_wait_however_often_it_was_given() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        let waker = Waker::new().unwrap();
        let mut waiter = Waiter::new(&socket, &waker).unwrap();
        waker.wake();
        waker.wake();
        assert!(waiter.wait(&waker, EventSet::IN, None).unwrap().woken);
        let ready = waiter.wait(&waker, EventSet::IN, NOW).unwrap();
        assert_eq!(ready, Ready::default());
    }

    #[test]
    fn only_what_was_asked_for_is_told_except_that_the_peer_is_gone() {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let waker = Waker::new().unwrap();
        let mut waiter = Waiter::new(&socket, &waker).unwrap();
        io::Write::write_all(&mut peer, b"x").unwrap();
        let ready = waiter.wait(&waker, EventSet::empty(), NOW).unwrap();
        assert_eq!(ready, Ready::default());
        assert!(waiter.wait(&waker, EventSet::IN, None).unwrap().readable);
        drop(peer);
        let ready = waiter.wait(&waker, EventSet::empty(), None).unwrap();
        assert!(ready.hung_up && !ready.readable);
    }

    #[test]
    fn a_part_of_a_millisecond_is_waited_for() {
        assert_eq!(milliseconds(Some(Duration::from_micros(1))), 1);
        assert_eq!(milliseconds(Some(Duration::ZERO)), 0);
        assert_eq!(milliseconds(Some(Duration::MAX)), i32::MAX);
        assert_eq!(milliseconds(None), -1);
    }
}
