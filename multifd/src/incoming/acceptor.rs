//! Waits for the connections of an incoming migration, without letting any of them be waited for.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::io::{ByteSource, FdChannel};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::classifier::{Classifier, Greeting, MAIN_MAGIC, Refusal, Role};
use crate::address::Listener;
use crate::config::{ChannelId, MultifdConfig};

/// Connections beyond those expected that may be open without having said what they are.
const STRANGERS: usize = 64;

/// How long an incoming migration waits for its peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A connection must have said what it is this long after it was accepted.
    pub greeting: Duration,
    /// All connections must be there this long after the first of them said what it is.
    pub complete: Duration,
    /// How long the channels wait for the peer afterwards (see [`FdChannel::new`]).
    pub channel: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            complete: Duration::from_secs(15),
            channel: Duration::from_secs(30),
        }
    }
}

/// The connections of an incoming migration.
#[derive(Debug)]
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
/// [`Acceptor::on_refused`], and changes nothing for the others. One that says nothing has until
/// [`Limits::greeting`]. Nobody connecting is waited out without end, until cancelled.
pub struct Acceptor {
    listener: Listener,
    multifd: Option<MultifdConfig>,
    limits: Limits,
    on_refused: Box<dyn FnMut(&Refusal) + Send>,
}

impl Acceptor {
    /// Accepts from `listener`, which is made non-blocking and given a backlog for all channels.
    ///
    /// # Errors
    /// [`IncomingError::Listen`].
    pub fn new(
        listener: impl Into<Listener>,
        multifd: Option<&MultifdConfig>,
        limits: Limits,
    ) -> Result<Self, IncomingError> {
        let listener = listener.into();
        let backlog = 1 + multifd.map_or(0, |config| i32::from(config.channels.get()));
        match &listener {
            Listener::Tcp(l) => l.set_nonblocking(true),
            Listener::Unix(l) => l.set_nonblocking(true),
        }
        // The source connects all channels at once: with a shorter backlog than that, connections
        // are dropped and tried again a second later.
        .and_then(|()| Ok(rustix::net::listen(&listener, backlog.max(128))?))
        .map_err(IncomingError::Listen)?;
        Ok(Self {
            listener,
            multifd: multifd.cloned(),
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

    /// Waits for all connections of one migration, or until `cancel` can be read. What else is
    /// open by then is closed. After an error it can be called again.
    ///
    /// # Errors
    /// [`IncomingError`].
    pub fn accept(&mut self, cancel: Option<BorrowedFd<'_>>) -> Result<Incoming, IncomingError> {
        let classifier = Classifier::new(self.multifd.as_ref());
        let mut lobby = Lobby {
            acceptor: self,
            classifier,
            strangers: VecDeque::new(),
            known: Vec::new(),
            due: None,
            last_refusal: None,
        };
        while !lobby.classifier.is_complete() {
            lobby.wait(cancel)?;
        }
        lobby.finish()
    }

    fn accept_one(&self) -> io::Result<OwnedFd> {
        match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(stream.into())
            }
            Listener::Unix(listener) => Ok(listener.accept()?.0.into()),
        }
    }
}

/// A connection that has not said yet what it is.
struct Stranger {
    channel: FdChannel,
    greeting: Greeting,
    deadline: Instant,
}

/// The connections of one call of [`Acceptor::accept`].
struct Lobby<'a> {
    acceptor: &'a mut Acceptor,
    classifier: Classifier,
    /// In the order in which they came, and so in that of their deadlines.
    strangers: VecDeque<Stranger>,
    known: Vec<(Role, FdChannel)>,
    /// When all must be there.
    due: Option<Instant>,
    last_refusal: Option<Refusal>,
}

impl Lobby<'_> {
    /// Waits until something happens, and deals with it.
    fn wait(&mut self, cancel: Option<BorrowedFd<'_>>) -> Result<(), IncomingError> {
        let first_deadline = self.strangers.front().map(|s| s.deadline);
        let until = [first_deadline, self.due].into_iter().flatten().min();
        let ready = self.poll(cancel, until).map_err(IncomingError::Poll)?;
        if ready.cancelled {
            return Err(IncomingError::Cancelled);
        }
        // What has arrived goes before what is late: a slow scheduler must not refuse anybody.
        for index in ready.left.into_iter().rev() {
            let (role, _) = self.known.swap_remove(index);
            self.classifier.release(role);
            self.refuse(Refusal::Left { role });
        }
        for index in ready.speaking.into_iter().rev() {
            self.listen_to(index);
        }
        if ready.connecting && !self.classifier.is_complete() {
            self.let_in()?;
        }
        if self.known.is_empty() {
            self.due = None;
        }
        let now = Instant::now();
        while self.strangers.front().is_some_and(|s| s.deadline <= now) {
            self.strangers.pop_front();
            self.refuse(Refusal::Silent {
                limit: self.acceptor.limits.greeting,
            });
        }
        if self.due.is_some_and(|due| due <= now) && !self.classifier.is_complete() {
            return Err(IncomingError::Incomplete {
                main: self.classifier.has_main(),
                missing: self.classifier.missing_channels().collect(),
                last_refusal: self.last_refusal.take(),
            });
        }
        Ok(())
    }

    fn poll(&self, cancel: Option<BorrowedFd<'_>>, until: Option<Instant>) -> io::Result<Ready> {
        let listener = self.acceptor.listener.as_fd();
        let mut fds = Vec::with_capacity(2 + self.strangers.len() + self.known.len());
        fds.push(PollFd::from_borrowed_fd(listener, PollFlags::IN));
        fds.extend(
            self.strangers
                .iter()
                .map(|s| PollFd::new(&s.channel, PollFlags::IN)),
        );
        // Those that are known may say more, which is not for us; only their leaving is.
        fds.extend(
            self.known
                .iter()
                .map(|(_, c)| PollFd::new(c, PollFlags::RDHUP)),
        );
        let cancel_at = fds.len();
        fds.extend(cancel.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or(Timespec {
                tv_sec: i64::MAX,
                tv_nsec: 0,
            })
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(e) => return Err(e.into()),
        }
        let is_ready = |i: &usize| fds.get(*i).is_some_and(|fd| !fd.revents().is_empty());
        let known_at = 1 + self.strangers.len();
        Ok(Ready {
            connecting: is_ready(&0),
            speaking: (1..known_at).filter(is_ready).map(|i| i - 1).collect(),
            left: (known_at..cancel_at)
                .filter(is_ready)
                .map(|i| i - known_at)
                .collect(),
            cancelled: is_ready(&cancel_at),
        })
    }

    /// Accepts everybody who is waiting at the door.
    fn let_in(&mut self) -> Result<(), IncomingError> {
        loop {
            match self.acceptor.accept_one() {
                Ok(fd) => {
                    let limits = self.acceptor.limits;
                    match FdChannel::new(fd, limits.channel) {
                        Ok(channel) => self.strangers.push_back(Stranger {
                            channel,
                            greeting: Greeting::new(),
                            deadline: Instant::now() + limits.greeting,
                        }),
                        Err(e) => self.refuse(Refusal::Io(Arc::new(e))),
                    }
                    let limit = STRANGERS + 1 + self.classifier.missing_channels().count();
                    if self.strangers.len() > limit {
                        self.strangers.pop_front();
                        self.refuse(Refusal::Crowded { limit });
                    }
                }
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    // The peer was gone before it was accepted.
                    io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::InvalidInput => {}
                    _ => return Err(IncomingError::Accept(e)),
                },
            }
        }
    }

    /// Reads what a connection says of itself, as far as it is there.
    fn listen_to(&mut self, index: usize) {
        let Some(stranger) = self.strangers.get_mut(index) else {
            return;
        };
        let verdict = loop {
            match stranger.channel.try_read(stranger.greeting.wanted()) {
                Ok(None) => return,
                Ok(Some(n)) => match self.classifier.advance(&mut stranger.greeting, n) {
                    Ok(None) => {}
                    Ok(Some(role)) => break Ok(role),
                    Err(refusal) => break Err(refusal),
                },
                Err(e) => break Err(Refusal::Io(Arc::new(e))),
            }
        };
        let Some(stranger) = self.strangers.remove(index) else {
            return;
        };
        match verdict {
            Ok(role) => {
                self.known.push((role, stranger.channel));
                self.due
                    .get_or_insert_with(|| Instant::now() + self.acceptor.limits.complete);
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    fn refuse(&mut self, refusal: Refusal) {
        (self.acceptor.on_refused)(&refusal);
        self.last_refusal = Some(refusal);
    }

    fn finish(self) -> Result<Incoming, IncomingError> {
        let mut main = None;
        let mut channels = Vec::new();
        for (role, channel) in self.known {
            match role {
                Role::Main => main = Some(channel),
                Role::Channel(id) => channels.push((id, channel)),
            }
        }
        channels.sort_unstable_by_key(|(id, _)| *id);
        let channels = channels.into_iter().map(|(_, channel)| channel).collect();
        match main {
            Some(main) => Ok(Incoming {
                main,
                prefix: MAIN_MAGIC,
                channels,
            }),
            None => Err(IncomingError::Incomplete {
                main: false,
                missing: self.classifier.missing_channels().collect(),
                last_refusal: self.last_refusal,
            }),
        }
    }
}

/// Positions of what is ready, ascending.
#[derive(Debug, Default)]
struct Ready {
    connecting: bool,
    speaking: Vec<usize>,
    left: Vec<usize>,
    cancelled: bool,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor")
            .field("listener", &self.listener)
            .field("multifd", &self.multifd)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Why there is no incoming migration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IncomingError {
    /// It was cancelled.
    #[error("waiting for a migration was cancelled")]
    Cancelled,
    /// Some connections came, and the others did not.
    #[error("connections are missing: {}", describe_missing(*.main, .missing))]
    Incomplete {
        /// Whether the main channel was there.
        main: bool,
        /// The multifd channels that were not.
        missing: Vec<ChannelId>,
        /// Why the last connection that was closed was closed: probably the reason.
        #[source]
        last_refusal: Option<Refusal>,
    },
    /// The listening socket could not be set up.
    #[error("setting up the listening socket")]
    Listen(#[source] io::Error),
    /// A connection could not be accepted.
    #[error("accepting a connection")]
    Accept(#[source] io::Error),
    /// The connections could not be waited for.
    #[error("waiting for connections")]
    Poll(#[source] io::Error),
}

fn describe_missing(main: bool, missing: &[ChannelId]) -> String {
    let main = (!main).then(|| "the main channel".to_owned());
    let channels = missing.iter().map(ToString::to_string);
    main.into_iter()
        .chain(channels)
        .collect::<Vec<_>>()
        .join(", ")
}
