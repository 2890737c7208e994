//! The heartbeat's connection: made, lost and made again, never waited for.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use migration_stream::io::without_write_signals;
use multifd::Address;

use super::beat::BEAT_LEN;

/// Which end of the connection a side is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// It waits there.
    Listen(Address),
    /// It goes there.
    Connect(Address),
}

/// Connections that have not shown a beat yet: enough for a peer that comes again and a few
/// strangers.
const CANDIDATES: usize = 8;
/// How long a stranger may be silent.
const CANDIDATE_LIMIT: Duration = Duration::from_secs(5);

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn prepare(self) -> io::Result<Self> {
        match &self {
            Self::Tcp(s) => {
                s.set_nodelay(true)?;
                s.set_nonblocking(true)?;
            }
            Self::Unix(s) => s.set_nonblocking(true)?,
        }
        Ok(self)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.read(buffer),
            Self::Unix(s) => s.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(s) => s.write(bytes),
            // The standard library's own writes to unix sockets raised SIGPIPE for long.
            Self::Unix(s) => without_write_signals(|| s.write(bytes)),
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Tcp { .. } => {
                let listener = TcpListener::bind(&*resolve(address)?)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
            Address::Unix(path) => {
                // What a process that was killed has left there.
                let stale = path
                    .symlink_metadata()
                    .is_ok_and(|m| m.file_type().is_socket())
                    && UnixStream::connect(path).is_err();
                if stale {
                    std::fs::remove_file(path)?;
                }
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(listener))
            }
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(l) => Stream::Tcp(l.accept()?.0).prepare(),
            Self::Unix(l) => Stream::Unix(l.accept()?.0).prepare(),
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(l) => l.as_fd(),
            Self::Unix(l) => l.as_fd(),
        }
    }
}

fn resolve(address: &Address) -> io::Result<Vec<SocketAddr>> {
    match address {
        Address::Tcp { host, port } => {
            let host = if host.is_empty() { "0.0.0.0" } else { host };
            Ok((host, *port).to_socket_addrs()?.collect())
        }
        Address::Unix(_) => Ok(Vec::new()),
    }
}

fn connect(address: &Address, limit: Duration) -> io::Result<Stream> {
    match address {
        Address::Tcp { .. } => {
            let mut last = ErrorKind::NotFound.into();
            for address in resolve(address)? {
                match TcpStream::connect_timeout(&address, limit) {
                    Ok(stream) => return Stream::Tcp(stream).prepare(),
                    Err(e) => last = e,
                }
            }
            Err(last)
        }
        Address::Unix(path) => Stream::Unix(UnixStream::connect(path)?).prepare(),
    }
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

/// Connections to the peer, or to whoever says that it is.
pub(super) struct Link {
    endpoint: Endpoint,
    listener: Option<Listener>,
    connections: Vec<Connection>,
    connecting: Option<Receiver<io::Result<Stream>>>,
    /// When the next attempt to connect may begin.
    retry: Instant,
    timeout: Duration,
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
        })
    }

    /// What to wait for until something can be read.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let listener = self.listener.iter().map(Listener::fd);
        listener.chain(self.connections.iter().map(|c| c.stream.fd()))
    }

    /// Is there a connection on which the peer was heard?
    pub(super) fn is_connected(&self) -> bool {
        self.connections.iter().any(|c| c.proven)
    }

    /// This side has not looked for so long, which is no fault of the connections'.
    pub(super) fn excuse(&mut self, late: Duration) {
        for connection in &mut self.connections {
            connection.heard += late;
        }
    }

    /// Makes and takes connections. What has come on those that are there has been [read](Link::read).
    pub(super) fn attend(
        &mut self,
        now: Instant,
        wake: impl Fn() + Send + 'static,
        mut event: impl FnMut(LinkEvent),
    ) {
        if let Some(listener) = &self.listener {
            while let Ok(stream) = listener.accept() {
                if self.connections.len() >= CANDIDATES
                    && let Some(at) = self.connections.iter().position(|c| !c.proven)
                {
                    self.connections.remove(at);
                }
                self.connections.push(Connection::new(stream, now));
            }
            self.connections
                .retain(|c| c.proven || now.saturating_duration_since(c.since) < CANDIDATE_LIMIT);
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
                self.retry = now + stale / 2;
            }
            None if self.connections.is_empty() && now >= self.retry => {
                let (sender, receiver) = channel();
                let (address, limit) = (address.clone(), self.timeout.max(stale * 2));
                // The name may have to be asked for, and the host may not answer.
                let attempt = thread::Builder::new().name("heartbeat-connect".into());
                let attempt = attempt.spawn(move || {
                    let _ = sender.send(connect(&address, limit));
                    wake();
                });
                match attempt {
                    Ok(_) => self.connecting = Some(receiver),
                    Err(_) => self.retry = now + stale,
                }
            }
            None => {}
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
            let ended = loop {
                match connection.read() {
                    Ok(None) => break false,
                    Ok(Some(beat)) if take(&beat) => {
                        connection.heard = now;
                        if !connection.proven {
                            connection.proven = true;
                            newest = Some(at);
                        }
                    }
                    Ok(Some(_)) | Err(_) => break true,
                }
            };
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
