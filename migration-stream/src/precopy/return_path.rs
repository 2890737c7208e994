//! The source's end of the return path.

use std::time::Instant;
use std::{fmt, io};

use super::error::SourceError;
use super::handover::{Answer, CONFIRMS_FIRST};
use crate::io::{ByteSource, CancelToken};
use crate::raw::codec::Reader;
use crate::raw::return_path::ReturnPathMessage as Message;

/// The value of the PING behind device sections before RAM. A destination answers in order: the PONG says
/// that it has taken them.
pub(super) const EARLY_TAKEN: u32 = 0x7461_6b65;

/// Reads return-path messages, and never a byte beyond the message it is at: behind the final SHUT
/// COLO's own messages follow on the same channel.
pub struct ReturnPathReader {
    source: Box<dyn ByteSource>,
    partial: Vec<u8>,
    offset: u64,
    acks: u32,
    /// The answer to the PING behind the early sections has come.
    early_taken: bool,
    /// The destination has said that it confirms before it runs the guest.
    confirms_first: bool,
}

/// What a wait for the answer to everything came to.
pub(super) struct Heard {
    pub(super) answer: Answer,
    pub(super) confirms_first: bool,
    /// Nothing more can come on this connection.
    pub(super) is_over: bool,
    /// Why the answer is none, or a refusal.
    pub(super) error: Option<SourceError>,
}

impl Heard {
    /// Without a return path nothing is ever heard.
    pub(super) const fn nothing() -> Self {
        Self {
            answer: Answer::Impossible,
            confirms_first: false,
            is_over: true,
            error: None,
        }
    }
}

impl ReturnPathReader {
    /// The return path over the reverse direction of the main channel.
    #[must_use]
    pub fn new(source: impl ByteSource + 'static) -> Self {
        Self {
            source: Box::new(source),
            partial: Vec::new(),
            offset: 0,
            acks: 0,
            early_taken: false,
            confirms_first: false,
        }
    }

    /// Looks at what has arrived while the migration runs, without waiting.
    ///
    /// # Errors
    /// The destination reported a failure or closed the connection, or it sent what it must not
    /// before everything was sent.
    pub fn check_progress(&mut self) -> Result<(), SourceError> {
        while let Some(message) = self.try_next()? {
            match message {
                Message::Pong(value) => self.note_pong(value),
                Message::SwitchoverAck => self.acks = self.acks.saturating_add(1),
                Message::Shut { status: 0 } => return Err(SourceError::Unconfirmed),
                Message::Shut { status } => return Err(SourceError::Refused { status }),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    /// Waits for the SHUT message that answers everything, until `deadline`.
    pub(super) fn wait_for_answer(&mut self, deadline: Instant) -> Heard {
        self.source.set_read_deadline(Some(deadline));
        let (answer, error) = loop {
            match self.next() {
                Ok(Message::Shut { status: 0 }) => break (Answer::Confirmed, None),
                Ok(Message::Shut { status }) => {
                    break (Answer::Refused, Some(SourceError::Refused { status }));
                }
                Ok(Message::Pong(value)) => self.note_pong(value),
                Ok(Message::SwitchoverAck) => self.acks = self.acks.saturating_add(1),
                Ok(other) => break (Answer::None, Some(unexpected(&other))),
                // Nothing of a message may be missing: an end within one is no end in order.
                Err(SourceError::Unconfirmed) if self.partial.is_empty() => {
                    break (Answer::Closed, Some(SourceError::Unconfirmed));
                }
                Err(e) => break (Answer::None, Some(e)),
            }
        };
        self.source.set_read_deadline(None);
        Heard {
            answer,
            confirms_first: self.confirms_first,
            is_over: !error.as_ref().is_some_and(is_late),
            error,
        }
    }

    const fn note_pong(&mut self, value: u32) {
        self.early_taken |= value == EARLY_TAKEN;
        self.confirms_first |= value == CONFIRMS_FIRST;
    }

    /// Whether the destination has read past the device sections before RAM.
    pub(super) const fn has_taken_early_sections(&self) -> bool {
        self.early_taken
    }

    /// Lets `token` end every wait for a message.
    pub fn set_cancel(&mut self, token: &CancelToken) {
        self.source.set_cancel(token);
    }

    /// How many SWITCHOVER_ACK messages have come.
    #[must_use]
    pub const fn switchover_acks(&self) -> u32 {
        self.acks
    }

    /// The channel, to be read from behind the last message.
    #[must_use]
    pub fn into_source(self) -> Box<dyn ByteSource> {
        self.source
    }

    fn next(&mut self) -> Result<Message, SourceError> {
        loop {
            let missing = match self.decode()? {
                Ok(message) => return Ok(message),
                Err(missing) => missing,
            };
            let at = self.partial.len();
            self.partial.resize(at + missing, 0);
            let read = self.source.read(&mut self.partial[at..]).map_err(broken);
            // After a wait that ran out the next one goes on with what has come.
            self.partial.truncate(at + read.as_ref().map_or(0, |n| *n));
            if read? == 0 {
                return Err(self.ended());
            }
        }
    }

    fn try_next(&mut self) -> Result<Option<Message>, SourceError> {
        loop {
            let missing = match self.decode()? {
                Ok(message) => return Ok(Some(message)),
                Err(missing) => missing,
            };
            let at = self.partial.len();
            self.partial.resize(at + missing, 0);
            let read = self
                .source
                .try_read(&mut self.partial[at..])
                .map_err(broken);
            self.partial
                .truncate(at + read.as_ref().ok().copied().flatten().unwrap_or(0));
            match read? {
                None => return Ok(None),
                Some(0) => return Err(self.ended()),
                Some(_) => {}
            }
        }
    }

    /// Why nothing more comes: the peer has closed the connection, unless this side has.
    fn ended(&self) -> SourceError {
        if self.source.was_shut() {
            broken(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the connection was cut on this side",
            ))
        } else {
            SourceError::Unconfirmed
        }
    }

    /// The message that is complete, or how many bytes it still lacks.
    fn decode(&mut self) -> Result<Result<Message, usize>, SourceError> {
        match Message::decode(&mut Reader::new(&self.partial, self.offset)) {
            Ok(message) => {
                self.offset += self.partial.len() as u64;
                self.partial.clear();
                Ok(Ok(message))
            }
            Err(e) => e
                .missing()
                .map(Err)
                .ok_or_else(|| SourceError::ReturnPath(e.into())),
        }
    }
}

/// The answer may still come.
fn is_late(error: &SourceError) -> bool {
    match error {
        SourceError::ReturnPath(cause) => cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::TimedOut),
        _ => false,
    }
}

fn broken(error: io::Error) -> SourceError {
    SourceError::ReturnPath(error.into())
}

fn unexpected(message: &Message) -> SourceError {
    SourceError::ReturnPath(format!("message {message:?} has no place in precopy").into())
}

impl fmt::Debug for ReturnPathReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReturnPathReader")
            .field("partial", &self.partial.len())
            .finish_non_exhaustive()
    }
}
