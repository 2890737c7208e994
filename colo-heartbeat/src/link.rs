//! The heartbeat's connection: made, lost and made again. No call waits.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use migration_net::{Address, Listener, ResolvedAddress};
use migration_stream::io::{deadline_after, deadline_from};
use rustix::net::{RecvFlags, SendFlags};

use super::beat::BEAT_LEN;

/// Which end of the connection a side is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// It listens at this address.
    Listen(Address),
    /// It connects to this address.
    Connect(Address),
}

/// The most connections without a beat of the peer's yet ("candidates").
const CANDIDATES: usize = 64;
/// How long a candidate may be silent.
const CANDIDATE_LIMIT: Duration = Duration::from_secs(5);
/// For how long a candidate is kept however many others connect. The peer beats as soon as it has
/// connected.
const CANDIDATE_GRACE: Duration = Duration::from_millis(100);
/// The most connections accepted in one turn of the thread: what a flood can cost a beat.
const ACCEPTS: usize = 8;
/// The most beats read from one connection in one turn of the thread.
const BEATS: usize = 16;
/// The pause of accepting after the host had no descriptor or no memory for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// A connection, none of whose calls waits.
struct Stream(OwnedFd);

impl Stream {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(fd))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (read, _) = rustix::net::recv(&self.0, buffer, RecvFlags::empty())?;
        Ok(read)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL)?)
    }
}

fn connect(address: &Address, limit: Duration) -> io::Result<Stream> {
    let deadline = deadline_after(limit);
    let route = ResolvedAddress::new(address, deadline, None)?;
    Stream::new(route.connect(deadline, None)?)
}

struct Connection {
    stream: Stream,
    since: Instant,
    input: [u8; BEAT_LEN],
    len: usize,
    /// What a full socket has not taken of a beat.
    output: Vec<u8>,
    /// It has shown a beat of the peer's.
    proven: bool,
    /// When it last did.
    heard: Instant,
}

impl Connection {
    fn new(stream: Stream, now: Instant) -> Self {
        Self {
            stream,
            since: now,
            input: [0; BEAT_LEN],
            len: 0,
            output: Vec::new(),
            proven: false,
            heard: now,
        }
    }

    /// The next whole beat, if it has come.
    fn read(&mut self) -> io::Result<Option<[u8; BEAT_LEN]>> {
        while let Some(rest) = self.input.get_mut(self.len..).filter(|r| !r.is_empty()) {
            match self.stream.read(rest) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.len += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.len = 0;
        Ok(Some(self.input))
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// What has happened on the link.
pub(super) enum LinkEvent {
    /// A new connection, which wants a beat at once.
    Connected,
    /// The peer's connection has ended.
    Closed,
}

/// Connections to the peer, or to processes that claim to be the peer.
///
/// # Floods
/// A flood of connections must neither delay beats nor keep out a peer that connects again:
/// 1. A turn of the thread accepts at most [`ACCEPTS`] connections and takes at most [`BEATS`] beats of
///    each.
/// 2. A connection with a beat of the peer's gives way only to its own successor.
/// 3. At most [`CANDIDATES`] others are open. When another connects, the older half of these stay; the
///    oldest of the younger half gives way, but not before it has had [`CANDIDATE_GRACE`]. Until then
///    nobody is accepted.
/// 4. A host without descriptors or memory has no places either, and is not asked again for
///    [`EXHAUSTED_PAUSE`].
///
/// So a peer that connects again is heard although others flood the listener, after at most one
/// grace for every half of [`CANDIDATES`] that wait in the listener's backlog before it.
pub(super) struct Link {
    endpoint: Endpoint,
    listener: Option<Listener>,
    connections: Vec<Connection>,
    connecting: Option<Receiver<io::Result<Stream>>>,
    /// When the next attempt to connect may begin.
    retry: Instant,
    timeout: Duration,
    /// Until when the host is not asked for another connection.
    exhausted_until: Option<Instant>,
}

impl Link {
    /// Binds a listening end.
    pub(super) fn open(endpoint: Endpoint, timeout: Duration, now: Instant) -> io::Result<Self> {
        let listener = match &endpoint {
            Endpoint::Listen(address) => Some(Listener::bind(address)?),
            Endpoint::Connect(_) => None,
        };
        Ok(Self {
            endpoint,
            listener,
            connections: Vec::new(),
            connecting: None,
            retry: now,
            timeout,
            exhausted_until: None,
        })
    }

    /// What to wait for until something can be read.
    pub(super) fn fds(&self, now: Instant) -> impl Iterator<Item = BorrowedFd<'_>> {
        let accepts = self.accepts_from(now).is_none();
        let listener = self.listener.iter().filter(move |_| accepts);
        let listener = listener.map(AsFd::as_fd);
        listener.chain(self.connections.iter().map(|c| c.stream.fd()))
    }

    /// Is there a connection on which the peer was heard?
    pub(super) fn is_connected(&self) -> bool {
        self.connections.iter().any(|c| c.proven)
    }

    /// This side has not looked for so long, which is no fault of the connections'.
    pub(super) fn excuse(&mut self, late: Duration) {
        for connection in &mut self.connections {
            connection.heard = deadline_from(connection.heard, late);
        }
    }

    /// Makes and takes connections. What has come on those that are there has been [read](Link::read).
    pub(super) fn attend(
        &mut self,
        now: Instant,
        wake: impl Fn() + Send + 'static,
        mut event: impl FnMut(LinkEvent),
    ) {
        if self.listener.is_some() {
            self.connections
                .retain(|c| c.proven || now.saturating_duration_since(c.since) < CANDIDATE_LIMIT);
            self.accept(now);
            return;
        }
        let Endpoint::Connect(address) = &self.endpoint else {
            return;
        };
        // A way that was cut may stay so for a connection whose segments are sent ever more rarely.
        let stale = self.timeout.max(Duration::from_millis(100));
        self.connections
            .retain(|c| now.saturating_duration_since(c.heard) < stale);
        match self.connecting.as_ref().map(Receiver::try_recv) {
            Some(Ok(Ok(stream))) => {
                self.connecting = None;
                self.connections = vec![Connection::new(stream, now)];
                event(LinkEvent::Connected);
            }
            Some(Err(TryRecvError::Empty)) => {}
            Some(Ok(Err(_)) | Err(TryRecvError::Disconnected)) => {
                self.connecting = None;
                self.retry = deadline_from(now, stale / 2);
            }
            None if self.connections.is_empty() && now >= self.retry => {
                let (sender, receiver) = channel();
                let (address, limit) = (address.clone(), stale.saturating_mul(2));
                // The name may have to be asked for, and the host may not answer.
                let attempt = thread::Builder::new().name("heartbeat-connect".into());
                let attempt = attempt.spawn(move || {
                    let _ = sender.send(connect(&address, limit));
                    wake();
                });
                match attempt {
                    Ok(_) => self.connecting = Some(receiver),
                    Err(_) => self.retry = deadline_from(now, stale),
                }
            }
            None => {}
        }
    }

    /// The candidate that gives way to another connection, by position, and from when on.
    fn gives_way(&self) -> Option<(usize, Instant)> {
        let candidates = || {
            self.connections
                .iter()
                .enumerate()
                .filter(|(_, c)| !c.proven)
        };
        let (at, candidate) = candidates().nth(candidates().count() / 2)?;
        Some((at, deadline_from(candidate.since, CANDIDATE_GRACE)))
    }

    /// From when on another connection can be accepted, if that is not now.
    pub(super) fn accepts_from(&self, now: Instant) -> Option<Instant> {
        self.listener.as_ref()?;
        let mut from = self.exhausted_until;
        if self.connections.iter().filter(|c| !c.proven).count() >= CANDIDATES {
            from = from.max(self.gives_way().map(|(_, from)| from));
        }
        from.filter(|from| *from > now)
    }

    fn accept(&mut self, now: Instant) {
        for _ in 0..ACCEPTS {
            if self.accepts_from(now).is_some() {
                return;
            }
            let Some(listener) = &self.listener else {
                return;
            };
            match listener.accept().and_then(Stream::new) {
                Ok(stream) => {
                    let candidates = self.connections.iter().filter(|c| !c.proven).count();
                    if candidates >= CANDIDATES {
                        self.give_way(now);
                    }
                    self.connections.push(Connection::new(stream, now));
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                // The peer was gone before it was accepted.
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::Interrupted
                            | ErrorKind::ConnectionAborted
                            | ErrorKind::ConnectionReset
                    ) => {}
                Err(error) => {
                    tracing::debug!(%error, "the heartbeat cannot accept a connection");
                    self.exhausted_until = Some(deadline_from(now, EXHAUSTED_PAUSE));
                    self.give_way(now);
                    return;
                }
            }
        }
    }

    /// Closes the candidate that has to, if it has had its time.
    fn give_way(&mut self, now: Instant) {
        if let Some((at, from)) = self.gives_way()
            && from <= now
        {
            self.connections.remove(at);
        }
    }

    /// Hands every beat that has come to `take`, which says whether it is the peer's.
    pub(super) fn read(
        &mut self,
        now: Instant,
        mut take: impl FnMut(&[u8; BEAT_LEN]) -> bool,
        mut event: impl FnMut(LinkEvent),
    ) {
        let mut newest = None;
        for (at, connection) in self.connections.iter_mut().enumerate() {
            let mut ended = false;
            for _ in 0..BEATS {
                match connection.read() {
                    Ok(None) => break,
                    Ok(Some(beat)) if take(&beat) => {
                        connection.heard = now;
                        if !connection.proven {
                            connection.proven = true;
                            newest = Some(at);
                        }
                    }
                    Ok(Some(_)) | Err(_) => {
                        ended = true;
                        break;
                    }
                }
            }
            if ended {
                connection.since = now.checked_sub(CANDIDATE_LIMIT).unwrap_or(now);
                connection.len = usize::MAX;
            }
        }
        // The peer has come again: what it had before is of no use.
        if let Some(newest) = newest {
            let mut at = 0;
            self.connections.retain(|c| {
                let keep = at >= newest || !c.proven;
                at += 1;
                keep
            });
            if self.listener.is_some() {
                event(LinkEvent::Connected);
            }
        }
        let was = self.is_connected();
        self.connections.retain(|c| c.len != usize::MAX);
        if was && !self.is_connected() {
            event(LinkEvent::Closed);
        }
    }

    /// Sends a beat wherever the peer is, or may be. One that a full socket does not take is left
    /// out: the next says all that it would have.
    pub(super) fn send(&mut self, beat: &[u8; BEAT_LEN]) {
        let listens = self.listener.is_some();
        self.connections.retain_mut(|c| {
            if listens && !c.proven {
                return true;
            }
            if c.output.is_empty() {
                c.output.extend_from_slice(beat);
            }
            c.flush().is_ok()
        });
    }
}

#[cfg(test)]
mod tests;
