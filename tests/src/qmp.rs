//! A blocking QMP client: one command at a time, events kept until somebody asks for them, and a
//! deadline on every wait. It speaks to QEMU and to `colo-vmm` alike.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Error, PATIENCE, Result};

/// How often the socket of a process that is still starting is tried.
const POLL: Duration = Duration::from_millis(5);

/// A negotiated QMP session with out-of-band commands enabled.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Value>,
    greeting: Value,
    next_id: u64,
}

/// An `error` reply: what a command was refused with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The command.
    pub command: String,
    /// QMP's error class, for example `GenericError`.
    pub class: String,
    /// The description.
    pub desc: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}", self.command, self.class, self.desc)
    }
}

impl std::error::Error for Refusal {}

impl Qmp {
    /// Connects to the socket as soon as `alive` allows (an error from it ends the wait: the
    /// process has died), takes the greeting and negotiates `oob`.
    ///
    /// # Errors
    /// No greeting within [`PATIENCE`], or `alive`'s.
    pub fn connect(path: &Path, mut alive: impl FnMut() -> Result<()>) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if Instant::now() >= deadline => {
                    return Err(format!("no QMP at {}: {e}", path.display()).into());
                }
                Err(_) => alive()?,
            }
            thread::sleep(POLL);
        };
        let mut qmp = Self {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
            next_id: 0,
        };
        qmp.greeting = qmp.message(deadline)?;
        if qmp.greeting["QMP"].is_null() {
            return Err(format!("not a QMP greeting: {}", qmp.greeting).into());
        }
        qmp.execute("qmp_capabilities", json!({"enable": ["oob"]}))?;
        Ok(qmp)
    }

    /// The greeting the session began with.
    #[must_use]
    pub const fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Switches migration capabilities on.
    ///
    /// # Errors
    /// The other end refuses one.
    pub fn enable(&mut self, capabilities: &[&str]) -> Result<()> {
        self.set_capabilities(capabilities, true)
    }

    /// Switches migration capabilities on or off.
    ///
    /// # Errors
    /// The other end refuses one.
    pub fn set_capabilities(&mut self, capabilities: &[&str], state: bool) -> Result<()> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|name| json!({"capability": name, "state": state}))
            .collect();
        self.execute("migrate-set-capabilities", json!({"capabilities": list}))?;
        Ok(())
    }

    /// Sets migration parameters.
    ///
    /// # Errors
    /// The other end refuses one.
    pub fn set_parameters(&mut self, parameters: Value) -> Result<()> {
        self.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Runs a command and returns what it returned. `arguments` may be null.
    ///
    /// # Errors
    /// A [`Refusal`] (downcast to see its class), no reply within [`PATIENCE`], a lost connection.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.request("execute", command, arguments)
    }

    /// Runs a command out of band: it overtakes those that wait.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_oob(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.request("exec-oob", command, arguments)
    }

    /// Runs a command that must be refused, and returns with what.
    ///
    /// # Errors
    /// It was not refused, or could not be run.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Result<Refusal> {
        match self.execute(command, arguments) {
            Ok(value) => Err(format!("{command} was not refused but returned {value}").into()),
            Err(e) => e.downcast::<Refusal>().map(|r| *r),
        }
    }

    /// Sends a command without waiting for its reply, for a peer that is about to die.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn send(&mut self, command: &str) -> Result<()> {
        Ok(self
            .stream
            .write_all(json!({"execute": command}).to_string().as_bytes())?)
    }

    /// The next event called `name` among those not taken yet; earlier events of other names
    /// stay for whoever asks for them.
    ///
    /// # Errors
    /// None came within [`PATIENCE`], or the connection is lost.
    pub fn wait_event(&mut self, name: &str) -> Result<Value> {
        self.wait_event_if(name, |_| true)
    }

    /// As [`Qmp::wait_event`], for one whose `data` is as wanted.
    ///
    /// # Errors
    /// As there.
    pub fn wait_event_if(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Instant::now() + PATIENCE;
        let matches = |e: &Value| e["event"] == name && wanted(&e["data"]);
        loop {
            let at = self.events.iter().position(&matches);
            if let Some(event) = at.and_then(|at| self.events.remove(at)) {
                return Ok(event);
            }
            let message = self
                .message(deadline)
                .map_err(|e| -> Error { format!("waiting for event {name}: {e}").into() })?;
            if !message["event"].is_null() {
                self.events.push_back(message);
            }
        }
    }

    /// All events that have come and were not taken yet, in order.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn take_events(&mut self) -> Result<Vec<Value>> {
        // A command's reply comes after the events before it.
        self.execute("query-status", Value::Null)?;
        Ok(self.events.drain(..).collect())
    }

    /// The events that have been read and were not taken yet, in order.
    pub fn events(&self) -> impl Iterator<Item = &Value> {
        self.events.iter()
    }

    /// Reads what a peer that is gone has left behind. Its events can be taken as before.
    ///
    /// # Errors
    /// The connection is still open after [`PATIENCE`].
    pub fn hear_out(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.message(deadline) {
                Ok(message) if !message["event"].is_null() => self.events.push_back(message),
                // A reply that nobody waits for any more.
                Ok(_) => {}
                Err(_) if Instant::now() < deadline => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    fn request(&mut self, how: &str, command: &str, arguments: Value) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let mut request = json!({how: command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        self.stream.write_all(request.to_string().as_bytes())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut message = self
                .message(deadline)
                .map_err(|e| -> Error { format!("{command}: {e}").into() })?;
            if !message["event"].is_null() {
                self.events.push_back(message);
            } else if message["id"] == id {
                if let Some(error) = message.get("error") {
                    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                    return Err(Box::new(Refusal {
                        command: command.to_owned(),
                        class: text("class"),
                        desc: text("desc"),
                    }));
                }
                return Ok(message["return"].take());
            }
        }
    }

    /// The next message; both QEMU and `colo-vmm` write one a line.
    fn message(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("nothing came in time".into());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = [0; 16384];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err("the QMP connection was closed".into()),
                Ok(n) => self.buffer.extend_from_slice(&piece[..n]),
                Err(e) if is_retry(&e) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn is_retry(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A peer that answers each line it gets with the next of `replies`.
    fn session(replies: &'static [&'static str]) -> (Qmp, thread::JoinHandle<Vec<Value>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            let mut reader =
                serde_json::Deserializer::from_reader(BufReader::new(stream.try_clone().unwrap()))
                    .into_iter::<Value>();
            let mut seen = Vec::new();
            for reply in ["{\"return\": {}, \"id\": 1}\r\n"].iter().chain(replies) {
                seen.push(reader.next().unwrap().unwrap());
                stream.write_all(reply.as_bytes()).unwrap();
            }
            seen
        });
        (Qmp::connect(&path, || Ok(())).unwrap(), peer)
    }

    #[test]
    fn events_before_a_reply_are_kept_for_whoever_asks() {
        let (mut qmp, peer) = session(&[
            "{\"event\": \"STOP\"}\r\n{\"event\": \"RESUME\"}\r\n{\"return\": 7, \"id\": 2}\r\n",
        ]);
        assert_eq!(qmp.execute("stop", Value::Null).unwrap(), 7);
        assert_eq!(qmp.wait_event("RESUME").unwrap()["event"], "RESUME");
        assert_eq!(qmp.wait_event("STOP").unwrap()["event"], "STOP");
        let seen = peer.join().unwrap();
        assert_eq!(seen[0]["arguments"]["enable"][0], "oob");
        assert_eq!(seen[1], json!({"execute": "stop", "id": 2}));
    }

    #[test]
    fn a_refusal_keeps_its_class() {
        let (mut qmp, _peer) = session(&[
            "{\"id\": 2, \"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}\r\n",
        ]);
        let refusal = qmp.refused("nosuch", json!({})).unwrap();
        assert_eq!(refusal.to_string(), "nosuch: CommandNotFound: no");
    }

    #[test]
    fn what_a_dead_peer_has_said_can_still_be_heard() {
        let (mut qmp, peer) = session(&["{\"event\": \"STOP\"}\r\n{\"ev"]);
        qmp.send("stop").unwrap();
        peer.join().unwrap();
        qmp.hear_out().unwrap();
        let names: Vec<_> = qmp.events().map(|e| e["event"].clone()).collect();
        assert_eq!(names, ["STOP"]);
    }

    #[test]
    fn a_closed_connection_is_an_error_that_says_so() {
        let (mut qmp, peer) = session(&[]);
        peer.join().unwrap();
        let error = qmp.wait_event("STOP").unwrap_err().to_string();
        assert_eq!(
            error,
            "waiting for event STOP: the QMP connection was closed"
        );
    }

    #[test]
    fn a_socket_of_a_dead_process_is_not_waited_for() {
        let error = Qmp::connect(Path::new("/nonexistent/qmp"), || Err("it died".into()));
        assert_eq!(error.unwrap_err().to_string(), "it died");
    }
}
