//! The sockets: one thread that waits for nobody.

use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::http::{MAX_HEAD, answer, judge};
use crate::qmp::QmpAddress;
use crate::qmp::listener::{Listener, Stream};

/// The most connections at a time. One more takes the place of one that has asked for nothing yet, or
/// that has its answer; of one that is being answered only if there is none of these.
pub(super) const CLIENTS_MAX: usize = 16;
/// How long a connection may take from its beginning to its end.
pub(super) const LIMIT: Duration = Duration::from_secs(5);
/// How long a connection has to ask for something, however many others come. Nobody is accepted while all
/// places are taken by some that have had less.
const GRACE: Duration = Duration::from_millis(100);
/// How long nobody is accepted after the host had no descriptor for one.
const EXHAUSTED_PAUSE: Duration = Duration::from_secs(1);

/// A server of figures. It ends when it is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    address: QmpAddress,
    thread: Option<JoinHandle<()>>,
    /// Dropped to end the thread.
    open: Option<PipeWriter>,
}

impl MetricsServer {
    /// Serves `GET /metrics` on `address`. `figures` makes the text, in the server's thread, as often
    /// as it is asked for.
    ///
    /// # Errors
    /// The address cannot be listened on, or the host has no threads or descriptors left.
    pub fn start(
        address: &QmpAddress,
        figures: impl Fn() -> String + Send + 'static,
    ) -> io::Result<Self> {
        let (listener, address) = Listener::bind(address)?;
        let (quit, open) = io::pipe()?;
        let server = Server {
            listener,
            quit,
            figures,
            clients: Vec::new(),
            accepts_from: Instant::now(),
        };
        let thread = thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || server.run())?;
        Ok(Self {
            address,
            thread: Some(thread),
            open: Some(open),
        })
    }

    /// Where it listens, with the port that was found if port 0 was asked for.
    #[must_use]
    pub const fn address(&self) -> &QmpAddress {
        &self.address
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        self.open = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the metrics has panicked");
        }
    }
}

struct Server<F> {
    listener: Listener,
    quit: PipeReader,
    figures: F,
    /// The oldest first.
    clients: Vec<Client>,
    /// Not before: see [`EXHAUSTED_PAUSE`].
    accepts_from: Instant,
}

struct Client {
    stream: Stream,
    since: Instant,
    state: State,
}

impl Client {
    fn deadline(&self) -> Instant {
        self.since + LIMIT
    }
}

enum State {
    /// The head of the request so far.
    Reads(Vec<u8>),
    /// The answer, and how much of it has gone.
    Writes(Vec<u8>, usize),
    /// What still comes is thrown away: closing on it could cost the client its answer.
    Drains,
}

impl<F: Fn() -> String> Server<F> {
    fn run(mut self) {
        loop {
            let ready = match self.wait() {
                Ok(ready) => ready,
                Err(error) => {
                    tracing::error!(%error, "metrics are served no more");
                    return;
                }
            };
            if ready.quit {
                return;
            }
            let now = Instant::now();
            let mut ready_clients = ready.clients.into_iter();
            self.clients.retain_mut(|client| {
                let is_ready = ready_clients.next().unwrap_or(false);
                now < client.deadline() && (!is_ready || client.go_on(&self.figures))
            });
            if ready.listener {
                self.accept(now);
            }
        }
    }

    /// Waits until a socket can go on, or the first deadline.
    fn wait(&self) -> io::Result<Ready> {
        let now = Instant::now();
        let accepts_from = match self.gives_way() {
            Some((_, from)) => from.max(self.accepts_from),
            None => self.accepts_from,
        };
        let pauses = now < accepts_from;
        let until = self.clients.iter().map(Client::deadline);
        let until = until.chain(pauses.then_some(accepts_from)).min();
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(now);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let accepts = if pauses {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.quit.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.listener.as_fd(), accepts),
        ];
        fds.extend(self.clients.iter().map(|client| {
            let flags = match client.state {
                State::Writes(..) => PollFlags::OUT,
                State::Reads(_) | State::Drains => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(client.stream.as_fd(), flags)
        }));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Ready {
            quit: ready.next().unwrap_or(true),
            listener: !pauses && ready.next().unwrap_or(false),
            clients: fds
                .iter()
                .skip(2)
                .map(|fd| !fd.revents().is_empty())
                .collect(),
        })
    }

    /// Which client gives way to the next one, and from when on, if all places are taken.
    fn gives_way(&self) -> Option<(usize, Instant)> {
        if self.clients.len() < CLIENTS_MAX {
            return None;
        }
        let first = |wanted: fn(&State) -> bool| {
            let at = self.clients.iter().position(|c| wanted(&c.state))?;
            Some((at, self.clients.get(at)?))
        };
        if let Some((at, client)) = first(|state| matches!(state, State::Drains)) {
            return Some((at, client.since));
        }
        let silent = first(|state| matches!(state, State::Reads(_)));
        let (at, client) = silent.or_else(|| Some((0, self.clients.first()?)))?;
        Some((at, client.since + GRACE))
    }

    fn accept(&mut self, now: Instant) {
        match self.listener.accept() {
            Ok(stream) => {
                if let Some((at, _)) = self.gives_way() {
                    self.clients.remove(at);
                    tracing::debug!(most = CLIENTS_MAX, "a client of the metrics gives way");
                }
                self.clients.push(Client {
                    stream,
                    since: now,
                    state: State::Reads(Vec::new()),
                });
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) => {}
            Err(error) => {
                // The client that waits would be told at once again.
                tracing::warn!(%error, "cannot accept a client of the metrics");
                self.accepts_from = now + EXHAUSTED_PAUSE;
            }
        }
    }
}

struct Ready {
    quit: bool,
    listener: bool,
    clients: Vec<bool>,
}

impl Client {
    /// Goes on as far as it can without waiting; false when it is over.
    fn go_on(&mut self, figures: &impl Fn() -> String) -> bool {
        match self.try_go_on(figures) {
            Ok(goes_on) => goes_on,
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }

    fn try_go_on(&mut self, figures: &impl Fn() -> String) -> io::Result<bool> {
        let mut piece = [0; 1024];
        match &mut self.state {
            State::Reads(head) => {
                let room = piece.len().min(MAX_HEAD - head.len());
                let count = self.stream.read(&mut piece[..room])?;
                head.extend_from_slice(&piece[..count]);
                match judge(head) {
                    Some(status) => self.state = State::Writes(answer(status, figures), 0),
                    None => return Ok(count > 0),
                }
            }
            State::Writes(answer, sent) => {
                *sent += self.stream.write(answer.get(*sent..).unwrap_or_default())?;
                if *sent == answer.len() {
                    self.stream.end_writing();
                    self.state = State::Drains;
                }
            }
            State::Drains => return Ok(self.stream.read(&mut piece)? > 0),
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    fn serve() -> (MetricsServer, impl Fn() -> TcpStream) {
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        let server = MetricsServer::start(&address, || "up 1\n".repeat(100_000)).unwrap();
        let QmpAddress::Tcp { host, port } = server.address().clone() else {
            panic!("{}", server.address());
        };
        (server, move || {
            TcpStream::connect((host.as_str(), port)).unwrap()
        })
    }

    fn scrape(mut client: TcpStream) -> String {
        client
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn a_scrape_gets_all_of_it_whoever_else_is_silent_or_does_not_read() {
        let (_server, connect) = serve();
        let silent = connect();
        let mut stuck = connect();
        stuck.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let mut half = connect();
        half.write_all(b"GET /met").unwrap();
        for _ in 0..2 * CLIENTS_MAX {
            let answer = scrape(connect());
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"));
            assert_eq!(answer.matches("up 1\n").count(), 100_000);
        }
        drop((silent, stuck, half));
    }

    #[test]
    fn those_who_do_nothing_give_way_to_those_who_come() {
        let (_server, connect) = serve();
        let idle: Vec<_> = (0..CLIENTS_MAX + 1).map(|_| connect()).collect();
        assert!(scrape(connect()).contains("up 1"));
        // The first of them is gone, long before its time.
        let mut first = &idle[0];
        first.set_read_timeout(Some(LIMIT)).unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_scrape_behind_a_flood_of_silent_connections_gets_all_of_it() {
        let (_server, connect) = serve();
        let mut slow = connect();
        slow.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let _flood: Vec<_> = (0..8 * CLIENTS_MAX)
            .map(|i| {
                let mut client = connect();
                client.write_all([&b""[..], b"GET /met"][i % 2]).unwrap();
                client
            })
            .collect();
        assert_eq!(scrape(connect()).matches("up 1\n").count(), 100_000);
        // Whoever was being answered was not disturbed.
        let mut answer = String::new();
        slow.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.matches("up 1\n").count(), 100_000);
    }

    #[test]
    fn garbage_is_refused() {
        let (_server, connect) = serve();
        for (garbage, status) in [
            (&b"\0\0\0\x05hello\n"[..], "400 Bad Request"),
            (&[b'x'; 2 * MAX_HEAD][..], "431 "),
            (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405 "),
            (b"GET /other HTTP/1.1\r\n\r\n", "404 Not Found"),
        ] {
            let mut client = connect();
            client.write_all(garbage).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{answer}"
            );
        }
        assert!(scrape(connect()).contains("up 1"));
    }
}
