//! Waits for the connections of an incoming migration, without letting any of them be waited for.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use migration_stream::io::{ByteSource, CancelToken, FdChannel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::classifier::{MAIN_MAGIC, Refusal};
use super::collection::{Collection, Limits};
use super::error::IncomingError;
use crate::address::Listener;
use crate::channels::Channels;

/// Connections that the kernel keeps until they are accepted. The source connects all channels at
/// once, perhaps behind a flood: with a shorter backlog, connections are dropped and tried again a
/// second later.
const BACKLOG: i32 = 1024;
/// Connections that are accepted before those that are there are looked at again.
const BURST: usize = 64;

/// The connection that was to be accepted is gone, or its network is; Linux reports that by `accept`.
const IS_OF_THE_CONNECTION: [Errno; 12] = [
    Errno::INTR,
    Errno::CONNABORTED,
    Errno::CONNRESET,
    Errno::PROTO,
    Errno::NETDOWN,
    Errno::NOPROTOOPT,
    Errno::HOSTDOWN,
    Errno::NONET,
    Errno::HOSTUNREACH,
    Errno::OPNOTSUPP,
    Errno::NETUNREACH,
    Errno::PERM,
];

/// The connections of an incoming migration.
#[derive(Debug)]
#[non_exhaustive]
pub struct Incoming {
    /// The main channel, without its first four bytes.
    pub main: FdChannel,
    /// Those bytes: [`MAIN_MAGIC`], which the reader of the stream wants back.
    pub prefix: [u8; 4],
    /// Multifd's channels in the order of their ids. Their handshakes were read.
    pub channels: Vec<FdChannel>,
}

/// Listens until a main channel and all of multifd's are there.
///
/// A connection that is not part of the migration is closed, reported to the hook of
/// [`Acceptor::on_refused`], and changes nothing for the others. How many may say nothing, and for
/// how long, is in [`Collection`]. Nobody connecting is waited out without end, until cancelled.
pub struct Acceptor {
    listener: Listener,
    collection: Collection<FdChannel>,
    limits: Limits,
    on_refused: Box<dyn FnMut(&Refusal) + Send>,
}

impl Acceptor {
    /// Accepts the main channel and `channels` from `listener`, which is made non-blocking and given a backlog for all channels.
    ///
    /// # Errors
    /// [`IncomingError::Listen`].
    pub fn new(
        listener: impl Into<Listener>,
        channels: impl Into<Channels>,
        limits: Limits,
    ) -> Result<Self, IncomingError> {
        let listener = listener.into();
        listener
            .set_backlog(BACKLOG)
            .map_err(IncomingError::Listen)?;
        Ok(Self {
            listener,
            collection: Collection::new(channels, limits),
            limits,
            on_refused: Box::new(|_| {}),
        })
    }

    /// Has `hook` called for every connection that is closed, so that it can be logged.
    #[must_use]
    pub fn on_refused(mut self, hook: impl FnMut(&Refusal) + Send + 'static) -> Self {
        self.on_refused = Box::new(hook);
        self
    }

    /// Waits for all connections of one migration, or until `cancel` is cancelled, which ends the waits
    /// of the connections afterwards too. What else is open by then is closed.
    ///
    /// After an error that [is the source's](IncomingError::is_of_the_source) it can be called again,
    /// for another source.
    ///
    /// # Errors
    /// [`IncomingError`]. It comes at once when a connection of the source closes before all are
    /// there.
    pub fn accept(&mut self, cancel: Option<&CancelToken>) -> Result<Incoming, IncomingError> {
        let collected = self.collect(cancel);
        self.tell();
        match collected {
            Ok((mut main, mut channels)) => {
                if let Some(token) = cancel {
                    for channel in channels.iter_mut().chain([&mut main]) {
                        ByteSource::set_cancel(channel, token);
                    }
                }
                Ok(Incoming {
                    main,
                    prefix: MAIN_MAGIC,
                    channels,
                })
            }
            Err(error) => {
                if !error.is_of_the_source() {
                    self.collection.close();
                }
                Err(error)
            }
        }
    }

    fn collect(
        &mut self,
        cancel: Option<&CancelToken>,
    ) -> Result<(FdChannel, Vec<FdChannel>), IncomingError> {
        while !self.collection.is_complete() {
            self.turn(cancel, false)?;
            self.tell();
        }
        // The source writes to its main channel when all others are connected. One more than are
        // wanted here is to be found now, and not by the pages that are missing later.
        for _ in 0..2 {
            self.turn(cancel, true)?;
        }
        self.collection.finish()
    }

    fn tell(&mut self) {
        while let Some(refusal) = self.collection.next_refusal() {
            (self.on_refused)(&refusal);
        }
    }

    /// Waits until something happens, and deals with it; or deals with what has happened.
    fn turn(
        &mut self,
        cancel: Option<&CancelToken>,
        is_complete: bool,
    ) -> Result<(), IncomingError> {
        let now = Instant::now();
        let accepts_from = self.collection.accepts_from(now);
        let until = if is_complete {
            Some(now)
        } else {
            let moments = [accepts_from, self.collection.deadline()];
            moments.into_iter().flatten().min()
        };
        let ready = self
            .poll(cancel, accepts_from.is_none(), until)
            .map_err(IncomingError::Poll)?;
        if cancel.is_some_and(CancelToken::is_cancelled) {
            return Err(IncomingError::Cancelled);
        }
        let now = Instant::now();
        if !is_complete {
            // What has arrived goes before what is late: a slow scheduler must not refuse anybody.
            self.collection.left(&ready.left)?;
        }
        // Whoever came first is heard first.
        let mut gone = 0;
        for index in ready.speaking {
            let left = (self.collection).hear(index - gone, now, FdChannel::try_read);
            gone += usize::from(left);
        }
        if ready.connecting {
            self.let_in()?;
        }
        self.collection.check(Instant::now())
    }

    fn poll(
        &self,
        cancel: Option<&CancelToken>,
        accepts: bool,
        until: Option<Instant>,
    ) -> io::Result<Ready> {
        let unknown = self.collection.unknown();
        let known = self.collection.known();
        let known_at = 1 + unknown.len();
        let known_end = known_at + known.len();
        let mut fds = Vec::with_capacity(known_end + 1);
        let connecting = if accepts {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let listener = self.listener.as_fd();
        fds.push(PollFd::from_borrowed_fd(listener, connecting));
        fds.extend(unknown.map(|channel| PollFd::new(channel, PollFlags::IN)));
        // Those that are known may say more, which is not for us; only their leaving is.
        fds.extend(known.map(|(_, channel)| PollFd::new(channel, PollFlags::RDHUP)));
        fds.extend(cancel.map(|token| PollFd::from_borrowed_fd(token.as_fd(), PollFlags::IN)));
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: i64::MAX,
                tv_nsec: 0,
            })
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(e) => return Err(e.into()),
        }
        let is_ready = |i: &usize| fds.get(*i).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            connecting: accepts && is_ready(&0),
            speaking: (1..known_at).filter(is_ready).map(|i| i - 1).collect(),
            left: (known_at..known_end)
                .filter(is_ready)
                .map(|i| i - known_at)
                .collect(),
        })
    }

    /// Accepts those who wait, as long as there are places and not too many at once.
    fn let_in(&mut self) -> Result<(), IncomingError> {
        for _ in 0..BURST {
            let now = Instant::now();
            if self.collection.accepts_from(now).is_some() {
                return Ok(());
            }
            match self.listener.accept() {
                Ok(fd) => match FdChannel::new(fd, self.limits.channel) {
                    Ok(channel) => self.collection.accepted(channel, now),
                    Err(e) => self.collection.unusable(e),
                },
                Err(e) => match Errno::from_io_error(&e) {
                    Some(Errno::AGAIN) => return Ok(()),
                    // The listener itself is of no use any more.
                    Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK) => {
                        return Err(IncomingError::Accept(e));
                    }
                    Some(e) if IS_OF_THE_CONNECTION.contains(&e) => {}
                    // The host has no descriptors or no memory. Whatever else there may be would be
                    // told at once again, too.
                    _ => {
                        self.collection.exhausted(e, now);
                        return Ok(());
                    }
                },
            }
        }
        Ok(())
    }
}

/// Positions of what is ready, ascending.
#[derive(Debug, Default)]
struct Ready {
    connecting: bool,
    speaking: Vec<usize>,
    left: Vec<usize>,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor")
            .field("listener", &self.listener)
            .field("collection", &self.collection)
            .finish_non_exhaustive()
    }
}
