//! A side's QMP socket, from an operator's end.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use migration_net::ResolvedAddress;
use migration_stream::Escaped;
use qmp_types::{Client, ClientError, Command, Event, QmpError, ServerMessage};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::PATIENCE;
use crate::qmp::QmpAddress;

/// How long a wait goes on without a look at what it waits for.
const SLICE: Duration = Duration::from_millis(10);

/// A connection to a side.
pub(super) struct Remote {
    name: &'static str,
    stream: Box<dyn Stream>,
    client: Client,
    reply: Option<(u64, Result<Value, QmpError>)>,
    events: VecDeque<Event>,
}

trait Stream: Read + Write {
    fn set_timeout(&self, limit: Duration) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(PATIENCE))?;
        self.set_read_timeout(Some(limit))
    }
}

impl Stream for TcpStream {
    fn set_timeout(&self, limit: Duration) -> io::Result<()> {
        self.set_write_timeout(Some(PATIENCE))?;
        self.set_read_timeout(Some(limit))
    }
}

impl Remote {
    /// Connects. `name` is what errors call it.
    pub(super) fn connect(name: &'static str, address: &QmpAddress) -> Result<Self, RemoteError> {
        Self::try_connect(name, address).map_err(|source| RemoteError::Connect {
            name,
            address: address.clone(),
            source,
        })
    }

    /// The same, as soon as somebody listens there, while `goes_on` says so.
    pub(super) fn connect_when_ready(
        name: &'static str,
        address: &QmpAddress,
        mut goes_on: impl FnMut() -> bool,
    ) -> Result<Self, RemoteError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::try_connect(name, address) {
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) && goes_on()
                        && Instant::now() < deadline =>
                {
                    thread::sleep(SLICE);
                }
                other => {
                    return other.map_err(|source| RemoteError::Connect {
                        name,
                        address: address.clone(),
                        source,
                    });
                }
            }
        }
    }

    fn try_connect(name: &'static str, address: &QmpAddress) -> io::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let route = ResolvedAddress::new(&address.socket(), deadline, None)?;
        let connected = route.connect(deadline, None)?;
        let stream: Box<dyn Stream> = match address {
            QmpAddress::Unix(_) => Box::new(UnixStream::from(connected)),
            QmpAddress::Tcp { .. } => Box::new(TcpStream::from(connected)),
        };
        let mut remote = Self {
            name,
            stream,
            client: Client::new(),
            reply: None,
            events: VecDeque::new(),
        };
        let enable = Vec::new();
        remote
            .execute(&Command::QmpCapabilities { enable })
            .map_err(io::Error::other)?;
        Ok(remote)
    }

    /// What errors call it.
    pub(super) const fn name(&self) -> &'static str {
        self.name
    }

    /// Gives a command, and waits for its answer.
    pub(super) fn execute(&mut self, command: &Command) -> Result<Value, RemoteError> {
        let sent = self.client.command(command);
        self.answer(command, sent)
    }

    /// The same, with the answer's type.
    pub(super) fn query<T: DeserializeOwned>(
        &mut self,
        command: &Command,
    ) -> Result<T, RemoteError> {
        let value = self.execute(command)?;
        serde_json::from_value(value).map_err(|source| RemoteError::Answer {
            name: self.name,
            command: command.kind().name(),
            source,
        })
    }

    fn answer(
        &mut self,
        command: &Command,
        (id, bytes): (u64, Vec<u8>),
    ) -> Result<Value, RemoteError> {
        let name = self.name;
        self.stream
            .write_all(&bytes)
            .map_err(|source| RemoteError::Connection { name, source })?;
        let command = command.kind().name();
        let (_, reply) = self.wait(&format!("answer to {command}"), |remote| {
            Ok(remote.reply.take_if(|(of, _)| *of == id))
        })?;
        reply.map_err(|error| RemoteError::Refused {
            name,
            command,
            error,
        })
    }

    /// Waits until `check` gives something. It is asked whenever the side has said something, and every
    /// few milliseconds.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        check: impl FnMut(&mut Self) -> Result<Option<T>, RemoteError>,
    ) -> Result<T, RemoteError> {
        self.wait_until(what, Some(Instant::now() + PATIENCE), check)
    }

    /// The same until `deadline`, or for as long as it takes.
    pub(super) fn wait_until<T>(
        &mut self,
        what: &str,
        deadline: Option<Instant>,
        mut check: impl FnMut(&mut Self) -> Result<Option<T>, RemoteError>,
    ) -> Result<T, RemoteError> {
        let begun = Instant::now();
        loop {
            if let Some(value) = check(self)? {
                return Ok(value);
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(RemoteError::Deadline {
                    name: self.name,
                    what: what.to_owned(),
                    seconds: begun.elapsed().as_secs(),
                });
            }
            self.hear(SLICE)?;
        }
    }

    /// The events that have come since the last call.
    pub(super) fn take_events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    fn hear(&mut self, limit: Duration) -> Result<(), RemoteError> {
        let name = self.name;
        let mut bytes = [0; 16 << 10];
        let read = self
            .stream
            .set_timeout(limit)
            .and_then(|()| self.stream.read(&mut bytes));
        match read {
            Ok(0) => Err(RemoteError::Gone { name }),
            Ok(count) => {
                self.client.feed(bytes.get(..count).unwrap_or_default());
                self.take_messages()
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::TimedOut
                | io::ErrorKind::Interrupted => Ok(()),
                io::ErrorKind::ConnectionReset => Err(RemoteError::Gone { name }),
                _ => Err(RemoteError::Connection {
                    name,
                    source: error,
                }),
            },
        }
    }

    fn take_messages(&mut self) -> Result<(), RemoteError> {
        while let Some(message) = self.client.poll() {
            let message = message.map_err(|source| RemoteError::Protocol {
                name: self.name,
                source,
            })?;
            match message {
                ServerMessage::Greeting(_) => {}
                ServerMessage::Return { id, value } => self.reply = id.map(|id| (id, Ok(value))),
                ServerMessage::Error { id, error } => self.reply = id.map(|id| (id, Err(error))),
                ServerMessage::Event(event) => self.events.extend(event.known()),
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Why a side did not do what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// Nobody could be reached there.
    #[error("connecting to the {name} at {address}")]
    Connect {
        /// Which side.
        name: &'static str,
        /// Where.
        address: QmpAddress,
        /// Why.
        source: io::Error,
    },
    /// The connection failed.
    #[error("the connection to the {name}")]
    Connection {
        /// Which side.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It has closed the connection: its process has ended, as a rule.
    #[error("the {name} is gone")]
    Gone {
        /// Which side.
        name: &'static str,
    },
    /// It does not speak QMP.
    #[error("the {name} speaks no QMP")]
    Protocol {
        /// Which side.
        name: &'static str,
        /// What is wrong with it.
        source: ClientError,
    },
    /// Its answer is not of the shape expected.
    #[error("the {name}'s answer to {command}")]
    Answer {
        /// Which side.
        name: &'static str,
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It has refused.
    #[error("the {name} refuses {command}: {}", Escaped(&.error.desc))]
    Refused {
        /// Which side.
        name: &'static str,
        /// The command.
        command: &'static str,
        /// Its words.
        error: QmpError,
    },
    /// It has not done in time what was waited for.
    #[error("the {name} has no {what} after {seconds} s")]
    Deadline {
        /// Which side.
        name: &'static str,
        /// What was waited for.
        what: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// Two sides did not come into COLO in the time that they were given.
    #[error("the {name} has no {what} within {seconds} s (--timeout): {advice}")]
    TooLate {
        /// Which side.
        name: &'static str,
        /// What was waited for.
        what: String,
        /// How long it was waited for.
        seconds: u64,
        /// How far precopy was, or why it does not come to its end.
        advice: String,
    },
    /// It is in no state for what is wanted of it.
    #[error("the {name} {what}")]
    State {
        /// Which side.
        name: &'static str,
        /// How it is.
        what: String,
    },
}
