//! The server's end of a session, without I/O: bytes in, requests out; results and events in,
//! bytes out.
//!
//! ```text
//!              feed(bytes)              poll_request()
//!   socket ─────────────────▶ Session ─────────────────▶ the VMM
//!          ◀─────────────────         ◀─────────────────
//!             take_output()             reply(), emit()
//! ```
//!
//! The session begins with a greeting and takes `qmp_capabilities` only; from then on it takes
//! commands, and events are sent. Commands are handed out one at a time and in order: the next
//! after the reply to the one before, so that replies are in order too. A command that was given
//! out of band (`exec-oob`, if the client has enabled `oob`) is handed out at once, whatever else
//! is still executing. It is meant for the thread that reads the socket, and must not wait.
//!
//! Memory is bounded whatever the client does: one request of at most [`Limits::REQUEST`] is read
//! at a time, at most [`QUEUE_MAX`] wait (one, before `oob` is enabled), and nothing is read while
//! replies of more than [`OUTPUT_HIGH`] bytes have not been taken. [`Session::wants_input`] says
//! whether to read from the socket. Events wait up to [`OUTPUT_MAX`] bytes; a client that does not
//! read them is to be disconnected then.

use std::collections::VecDeque;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::command::{Command, CommandKind, QmpCapability};
use crate::error::{CommandResult, ErrorClass, QmpError, done};
use crate::event::{Event, Timestamp};
use crate::json::{self, JsonError, JsonReader, Limits};
use crate::status::VersionInfo;

/// How many requests wait while one is executing, once `oob` is enabled (QEMU's
/// `QMP_REQ_QUEUE_LEN_MAX`).
pub const QUEUE_MAX: usize = 8;

/// With more than this to be sent, bytes, no further request is read.
pub const OUTPUT_HIGH: usize = 64 << 10;

/// With more than this to be sent, bytes, no further event is taken.
pub const OUTPUT_MAX: usize = 4 << 20;

/// What a server is and can do.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// Told in the greeting.
    pub version: VersionInfo,
    /// Whether commands can be executed out of band.
    pub oob: bool,
    /// The commands that are there. `qmp_capabilities` always is.
    pub commands: &'static [CommandKind],
}

/// A command to be executed.
#[derive(Debug)]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// Whether to do it at once, also while another is executing.
    pub oob: bool,
    /// To be given to [`Session::reply`], whatever comes of the command: until then no other is
    /// handed out in band.
    pub id: RequestId,
}

/// Which request a reply is for. There is one reply to a request, hence no `Clone`.
#[derive(Debug)]
pub struct RequestId {
    client_id: Option<Value>,
    oob: bool,
}

/// The client does not read: more than [`OUTPUT_MAX`] bytes are waiting for it. The connection is
/// to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client does not read: {waiting} bytes of output are waiting")]
pub struct OutputFull {
    /// How many bytes.
    pub waiting: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Negotiation,
    Commands { oob: bool },
}

/// A request that waits for its turn, or the reply to one that was wrong.
#[derive(Debug)]
enum Queued {
    Command(Command, Option<Value>),
    Reply(CommandResult, Option<Value>),
}

/// The server's end of a session.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    mode: Mode,
    json: JsonReader,
    /// Bytes that have not been looked at, because too much is waiting.
    input: Vec<u8>,
    /// How many of them have been looked at since.
    input_at: usize,
    queue: VecDeque<Queued>,
    oob_queue: VecDeque<(Command, Option<Value>)>,
    /// Whether a command has been handed out in band and not been replied to.
    executing: bool,
    output: Vec<u8>,
}

#[derive(Serialize)]
struct Reply<'a> {
    #[serde(rename = "return", skip_serializing_if = "Option::is_none")]
    value: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a QmpError>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a Value>,
}

#[derive(Serialize)]
struct TimedEvent<'a> {
    timestamp: Timestamp,
    #[serde(flatten)]
    event: &'a Event,
}

impl Session {
    /// A new connection. The greeting is ready to be sent.
    #[must_use]
    pub fn new(config: SessionConfig) -> Self {
        let offered: &[QmpCapability] = if config.oob {
            &[QmpCapability::Oob]
        } else {
            &[]
        };
        let greeting = serde_json::json!({
            "QMP": { "version": config.version, "capabilities": offered }
        });
        Self {
            config,
            mode: Mode::Negotiation,
            json: JsonReader::new(Limits::REQUEST),
            input: Vec::new(),
            input_at: 0,
            queue: VecDeque::new(),
            oob_queue: VecDeque::new(),
            executing: false,
            output: json::line(&greeting),
        }
    }

    /// Takes bytes of the client, cut anywhere.
    ///
    /// Bytes given while [`Session::wants_input`] is false are kept for later.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.input_at);
        self.input_at = 0;
        self.input.extend_from_slice(bytes);
        self.advance();
    }

    /// Whether to read from the client. False while what has been read is still to be worked off;
    /// [`Session::reply`], [`Session::poll_request`] and [`Session::take_output`] change it.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.input_at == self.input.len() && self.may_parse()
    }

    /// The next command to be executed: first those out of band, then, if none is executing, the
    /// next in band.
    pub fn poll_request(&mut self) -> Option<Request> {
        let request = if let Some((command, client_id)) = self.oob_queue.pop_front() {
            Request {
                command,
                oob: true,
                id: RequestId {
                    client_id,
                    oob: true,
                },
            }
        } else {
            if self.executing || !matches!(self.queue.front(), Some(Queued::Command(..))) {
                return None;
            }
            let Some(Queued::Command(command, client_id)) = self.queue.pop_front() else {
                return None;
            };
            self.executing = true;
            Request {
                command,
                oob: false,
                id: RequestId {
                    client_id,
                    oob: false,
                },
            }
        };
        self.advance();
        Some(request)
    }

    /// Takes the result of a command.
    pub fn reply(&mut self, id: RequestId, result: CommandResult) {
        self.write_reply(&result, id.client_id.as_ref());
        if !id.oob {
            self.executing = false;
        }
        self.advance();
    }

    /// Tells the client of an event. Before the negotiation is over it is not told.
    ///
    /// # Errors
    /// The client does not read. The event is lost, and the connection should be closed.
    pub fn emit(&mut self, event: &Event, timestamp: Timestamp) -> Result<(), OutputFull> {
        if self.mode == Mode::Negotiation {
            return Ok(());
        }
        if self.output.len() > OUTPUT_MAX {
            return Err(OutputFull {
                waiting: self.output.len(),
            });
        }
        json::write_line(&mut self.output, &TimedEvent { timestamp, event });
        Ok(())
    }

    /// The bytes to be sent, if there are any.
    pub fn take_output(&mut self) -> Option<Vec<u8>> {
        if self.output.is_empty() {
            return None;
        }
        let output = std::mem::take(&mut self.output);
        self.advance();
        Some(output)
    }

    /// Whether another request may be read now.
    fn may_parse(&self) -> bool {
        let room = match self.mode {
            Mode::Commands { oob: true } => {
                self.queue.len() < QUEUE_MAX && self.oob_queue.len() < QUEUE_MAX
            }
            Mode::Negotiation | Mode::Commands { oob: false } => {
                self.queue.is_empty() && !self.executing
            }
        };
        room && self.output.len() <= OUTPUT_HIGH
    }

    /// Reads requests as far as there is room, and sends replies whose turn it is.
    fn advance(&mut self) {
        let input = std::mem::take(&mut self.input);
        let mut rest = input.get(self.input_at..).unwrap_or_default();
        loop {
            while !self.executing
                && let Some(Queued::Reply(..)) = self.queue.front()
            {
                if let Some(Queued::Reply(result, client_id)) = self.queue.pop_front() {
                    self.write_reply(&result, client_id.as_ref());
                }
            }
            if !self.may_parse() {
                break;
            }
            match self.json.next(&mut rest) {
                Some(parsed) => self.take(parsed),
                None => break,
            }
        }
        self.input_at = input.len() - rest.len();
        self.input = input;
    }

    /// Takes a request, or what was meant to be one.
    fn take(&mut self, parsed: Result<Value, JsonError>) {
        let mut members = match parsed {
            Ok(Value::Object(members)) => members,
            Ok(_) => {
                return self.refuse(QmpError::generic("QMP input must be a JSON object"));
            }
            Err(error) => return self.refuse(QmpError::generic(error.to_string())),
        };
        let client_id = members.remove("id");
        let oob = members.contains_key("exec-oob") && !members.contains_key("execute");
        match (self.command(members), oob) {
            (Ok(Command::QmpCapabilities { enable }), _) => {
                let result = self.negotiate(&enable);
                self.queue.push_back(Queued::Reply(result, client_id));
            }
            (Ok(command), true) => self.oob_queue.push_back((command, client_id)),
            (Ok(command), false) => self.queue.push_back(Queued::Command(command, client_id)),
            (Err(error), true) => self.write_reply(&Err(error), client_id.as_ref()),
            (Err(error), false) => self.queue.push_back(Queued::Reply(Err(error), client_id)),
        }
    }

    /// Answers something that has no id.
    fn refuse(&mut self, error: QmpError) {
        self.queue.push_back(Queued::Reply(Err(error), None));
    }

    /// The command of a request whose `id` has been taken out.
    fn command(&self, mut members: Map<String, Value>) -> Result<Command, QmpError> {
        let may_oob = self.mode == Mode::Commands { oob: true };
        let execute = member_string(&mut members, "execute")?;
        let exec_oob = if may_oob {
            member_string(&mut members, "exec-oob")?
        } else {
            None
        };
        let arguments = match members.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => {
                return Err(QmpError::generic(
                    "QMP input member 'arguments' must be an object",
                ));
            }
        };
        if let Some(name) = members.keys().next() {
            return Err(QmpError::generic(format!(
                "QMP input member '{name}' is unexpected"
            )));
        }
        let oob = exec_oob.is_some();
        let name = match (execute, exec_oob) {
            (Some(name), None) | (None, Some(name)) => name,
            (Some(_), Some(_)) => {
                return Err(QmpError::generic(
                    "QMP input member 'execute' clashes with 'exec-oob'",
                ));
            }
            (None, None) => return Err(QmpError::generic("QMP input lacks member 'execute'")),
        };

        let kind = CommandKind::from_name(&name);
        if self.mode == Mode::Negotiation && kind != Some(CommandKind::QmpCapabilities) {
            return Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        let kind = kind
            .filter(|kind| {
                *kind == CommandKind::QmpCapabilities || self.config.commands.contains(kind)
            })
            .ok_or_else(|| QmpError::command_not_found(&name))?;
        if oob && !kind.supports_oob() {
            return Err(QmpError::oob_not_supported(&name));
        }
        Command::parse(kind, arguments)
    }

    fn negotiate(&mut self, enable: &[QmpCapability]) -> CommandResult {
        if self.mode != Mode::Negotiation {
            return Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Capabilities negotiation is already complete, command ignored",
            ));
        }
        let oob = enable.contains(&QmpCapability::Oob);
        if oob && !self.config.oob {
            return Err(QmpError::generic("Capability 'oob' is not available"));
        }
        self.mode = Mode::Commands { oob };
        done()
    }

    fn write_reply(&mut self, result: &CommandResult, id: Option<&Value>) {
        let reply = Reply {
            value: result.as_ref().ok(),
            error: result.as_ref().err(),
            id,
        };
        json::write_line(&mut self.output, &reply);
    }
}

/// A member of a request that must be a string if it is there.
fn member_string(members: &mut Map<String, Value>, name: &str) -> Result<Option<String>, QmpError> {
    match members.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(QmpError::generic(format!(
            "QMP input member '{name}' must be a string"
        ))),
    }
}
