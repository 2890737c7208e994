//! The client's end of a session, without I/O: commands in, bytes out; bytes in, messages out.
//!
//! ```
//! use qmp_types::{Client, Command, ServerMessage};
//!
//! let mut client = Client::new();
//! let (id, bytes) = client.command(&Command::QueryStatus);
//! assert_eq!(bytes, b"{\"execute\": \"query-status\", \"id\": 1}\r\n");
//!
//! client.feed(b"{\"return\": {\"status\": \"running\", \"running\": true}, \"id\": 1}\r\n");
//! let message = client.poll().unwrap().unwrap();
//! assert!(matches!(message, ServerMessage::Return { id: Some(i), .. } if i == id));
//! ```

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::command::{Command, QmpCapability};
use crate::error::QmpError;
use crate::event::{Event, Timestamp};
use crate::json::{self, JsonError, JsonReader, Limits};
use crate::status::VersionInfo;
use crate::text::escaped;

/// What a server says first (`QMP`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// What it is.
    pub version: VersionInfo,
    /// What can be enabled; names, as there may be some this crate does not know.
    pub capabilities: Vec<String>,
}

impl Greeting {
    /// Whether commands can be given out of band.
    #[must_use]
    pub fn has_oob(&self) -> bool {
        self.capabilities
            .iter()
            .any(|name| name == QmpCapability::Oob.name())
    }
}

/// An event as it came, of this crate or any other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventMessage {
    /// Its name.
    pub event: String,
    /// What it tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
    /// When it happened.
    pub timestamp: Timestamp,
}

impl EventMessage {
    /// The event, if it is one of this crate's.
    #[must_use]
    pub fn known(&self) -> Option<Event> {
        let mut message = serde_json::json!({ "event": self.event });
        if let Some(data) = &self.data {
            message["data"] = data.clone();
        }
        serde_json::from_value(message).ok()
    }
}

/// Something a server says.
#[derive(Clone, Debug, PartialEq)]
pub enum ServerMessage {
    /// It is there.
    Greeting(Greeting),
    /// A command has succeeded.
    Return {
        /// Which; `None` if the id is not one of a [`Client`].
        id: Option<u64>,
        /// What it answers.
        value: Value,
    },
    /// A command was refused or has failed.
    Error {
        /// Which; `None` if the server could not tell.
        id: Option<u64>,
        /// Why.
        error: QmpError,
    },
    /// Something has happened.
    Event(EventMessage),
}

/// What a server said is not QMP.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// It is not JSON.
    #[error("the server sent something that is not json")]
    Json(#[from] JsonError),
    /// It is JSON, but neither greeting, reply nor event.
    #[error("the server sent neither greeting, reply nor event: {}", escaped(.message))]
    NotQmp {
        /// The beginning of it.
        message: String,
        /// What is wrong with it, if it looked like one of them.
        #[source]
        source: Option<serde_json::Error>,
    },
}

/// How much of a message that is not QMP is repeated, characters.
const MESSAGE_MAX: usize = 200;

#[derive(Serialize)]
struct Envelope<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    execute: Option<&'a str>,
    #[serde(rename = "exec-oob", skip_serializing_if = "Option::is_none")]
    exec_oob: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a Value>,
    id: u64,
}

/// The client's end of a session.
#[derive(Debug)]
pub struct Client {
    json: JsonReader,
    last_id: u64,
    messages: VecDeque<Result<ServerMessage, ClientError>>,
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

impl Client {
    /// A new connection.
    #[must_use]
    pub fn new() -> Self {
        Self {
            json: JsonReader::new(Limits::REPLY),
            last_id: 0,
            messages: VecDeque::new(),
        }
    }

    /// The bytes that ask for a command, and the id its reply will have.
    pub fn command(&mut self, command: &Command) -> (u64, Vec<u8>) {
        self.raw(command.kind().name(), command.arguments().as_ref())
    }

    /// The same out of band; `oob` must have been enabled.
    pub fn command_oob(&mut self, command: &Command) -> (u64, Vec<u8>) {
        let arguments = command.arguments();
        self.envelope(None, Some(command.kind().name()), arguments.as_ref())
    }

    /// The same for a command that this crate does not know.
    pub fn raw(&mut self, name: &str, arguments: Option<&Value>) -> (u64, Vec<u8>) {
        self.envelope(Some(name), None, arguments)
    }

    fn envelope(
        &mut self,
        execute: Option<&str>,
        exec_oob: Option<&str>,
        arguments: Option<&Value>,
    ) -> (u64, Vec<u8>) {
        self.last_id += 1;
        let envelope = Envelope {
            execute,
            exec_oob,
            arguments,
            id: self.last_id,
        };
        (self.last_id, json::line(&envelope))
    }

    /// Takes bytes of the server, cut anywhere.
    pub fn feed(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some(parsed) = self.json.next(&mut rest) {
            let message = parsed.map_err(ClientError::from).and_then(message);
            self.messages.push_back(message);
        }
    }

    /// The next thing the server has said.
    pub fn poll(&mut self) -> Option<Result<ServerMessage, ClientError>> {
        self.messages.pop_front()
    }
}

fn message(value: Value) -> Result<ServerMessage, ClientError> {
    let id = value.get("id").and_then(Value::as_u64);
    let parsed = if let Some(greeting) = value.get("QMP") {
        Greeting::deserialize(greeting).map(ServerMessage::Greeting)
    } else if let Some(value) = value.get("return") {
        Ok(ServerMessage::Return {
            id,
            value: value.clone(),
        })
    } else if let Some(error) = value.get("error") {
        QmpError::deserialize(error).map(|error| ServerMessage::Error { id, error })
    } else if value.get("event").is_some() {
        EventMessage::deserialize(&value).map(ServerMessage::Event)
    } else {
        return Err(not_qmp(&value, None));
    };
    parsed.map_err(|error| not_qmp(&value, Some(error)))
}

fn not_qmp(value: &Value, source: Option<serde_json::Error>) -> ClientError {
    ClientError::NotQmp {
        message: value.to_string().chars().take(MESSAGE_MAX).collect(),
        source,
    }
}
