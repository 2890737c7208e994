//! One side of the pair: its process, its serial line, and its operator's QMP connection.
//!
//! Everything that waits has a deadline, gives way to Ctrl-C, and fails with what was waited for
//! and what the process wrote last.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration_net::{Address, ResolvedAddress};
use qmp_types::{Client, ColoCheckpoint, Command, Event, QmpCapability, QmpError, ServerMessage};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmm_sys_util::signal::register_signal_handler;

use super::error::{DemoError, LastWords};

/// Which side of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The side whose guest's output goes out.
    Primary,
    /// The side that takes over.
    Secondary,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How long a process may take to listen, to answer a command, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a wait goes on without a look at what it waits for.
pub const SLICE: Duration = Duration::from_millis(10);
/// The same where it decides over a figure: waiting for a file to grow, or a process to end.
const FINE: Duration = Duration::from_micros(100);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on Ctrl-C and the like do not end this process: they end its waits, and what is dropped
/// then ends the other processes.
pub fn catch_interrupts() -> Result<(), DemoError> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        register_signal_handler(signal, interrupted)
            .map_err(|error| DemoError::host("handle signals")(error.into()))?;
    }
    Ok(())
}

fn check_interrupt() -> Result<(), DemoError> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        return Err(DemoError::Interrupted);
    }
    Ok(())
}

/// A process that does not outlive this value.
#[derive(Debug)]
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One side of the pair.
#[derive(Debug)]
pub struct Side {
    role: Role,
    process: Process,
    stderr: PathBuf,
    serial: PathBuf,
    stream: UnixStream,
    client: Client,
    reply: Option<(u64, Result<Value, QmpError>)>,
    events: VecDeque<(Instant, Event)>,
    checkpoints: Vec<ColoCheckpoint>,
}

impl Side {
    /// Starts `program` with `args`, and with its serial line, QMP socket and standard error in
    /// `dir`; connects, and enables out-of-band commands.
    pub fn start(
        role: Role,
        program: &Path,
        args: &[String],
        dir: &Path,
    ) -> Result<Self, DemoError> {
        let file = |extension| dir.join(format!("{role}.{extension}"));
        let (serial, qmp, stderr) = (file("serial"), file("qmp"), file("stderr"));
        let log = File::create(&stderr)
            .map_err(DemoError::host(format!("create {}", stderr.display())))?;
        let child = Program::new(program)
            .args(args)
            .arg("--serial")
            .arg(format!("file:{}", serial.display()))
            .arg("--qmp")
            .arg(format!("unix:{}", qmp.display()))
            // The log is read by people, but not by a terminal.
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(DemoError::host(format!("start {}", program.display())))?;
        let mut process = Process(child);
        let stream = connect(role, &mut process, &qmp, &stderr)?;
        let mut side = Self {
            role,
            process,
            stderr,
            serial,
            stream,
            client: Client::new(),
            reply: None,
            events: VecDeque::new(),
            checkpoints: Vec::new(),
        };
        side.execute(&Command::QmpCapabilities {
            enable: vec![QmpCapability::Oob],
        })?;
        Ok(side)
    }

    /// Which side it is.
    pub const fn role(&self) -> Role {
        self.role
    }

    /// The checkpoints it has told of so far.
    pub fn checkpoints(&self) -> &[ColoCheckpoint] {
        &self.checkpoints
    }

    /// The end of what it wrote to its standard error.
    pub fn last_words(&self) -> LastWords {
        LastWords::of(self.role, &self.stderr)
    }

    /// How much its guest has printed, bytes.
    pub fn printed(&self) -> u64 {
        length(&self.serial)
    }

    /// What its guest has printed.
    pub fn output(&self) -> Result<Vec<u8>, DemoError> {
        fs::read(&self.serial).map_err(DemoError::host(format!("read {}", self.serial.display())))
    }

    /// Watches for the next byte its guest prints.
    pub fn watch_output(&self) -> OutputWatch {
        OutputWatch::start(self.serial.clone(), self.printed())
    }

    /// Gives a command, and waits for its answer.
    pub fn execute(&mut self, command: &Command) -> Result<Value, DemoError> {
        let name = command.kind().name();
        let id = self.send(command)?;
        let result = self.wait(&format!("answer to {name}"), PATIENCE, |side| {
            Ok(side.reply.take_if(|(of, _)| *of == id))
        })?;
        result.1.map_err(|error| DemoError::Refused {
            role: self.role,
            command: name,
            error,
            stderr: self.last_words(),
        })
    }

    /// The same, with the answer's type.
    pub fn query<T: DeserializeOwned>(&mut self, command: &Command) -> Result<T, DemoError> {
        let value = self.execute(command)?;
        serde_json::from_value(value).map_err(|source| DemoError::Answer {
            role: self.role,
            what: format!("answer to {}", command.kind().name()),
            source,
        })
    }

    fn send(&mut self, command: &Command) -> Result<u64, DemoError> {
        let (id, bytes) = self.client.command(command);
        self.stream.write_all(&bytes).map_err(|source| {
            let what = format!("send {} to the {}", command.kind().name(), self.role);
            DemoError::Host { what, source }
        })?;
        Ok(id)
    }

    /// Waits until `check` gives something. It is asked whenever the side has said something, and
    /// every few milliseconds.
    pub fn wait<T>(
        &mut self,
        waiting_for: &str,
        limit: Duration,
        mut check: impl FnMut(&mut Self) -> Result<Option<T>, DemoError>,
    ) -> Result<T, DemoError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(value) = check(self)? {
                return Ok(value);
            }
            if Instant::now() >= deadline {
                return Err(self.too_late(waiting_for, limit));
            }
            self.listen(waiting_for, SLICE)?;
        }
    }

    /// The error of a deadline that has passed.
    pub fn too_late(&self, waiting_for: &str, limit: Duration) -> DemoError {
        DemoError::Deadline {
            role: self.role,
            waiting_for: waiting_for.to_owned(),
            limit,
            stderr: self.last_words(),
        }
    }

    /// When the first event came, of those not taken yet, that `wanted` accepts. It and those
    /// before it are forgotten.
    pub fn take_event(&mut self, wanted: impl Fn(&Event) -> bool) -> Option<Instant> {
        while let Some((at, event)) = self.events.pop_front() {
            if wanted(&event) {
                return Some(at);
            }
        }
        None
    }

    /// Fails if the side has left COLO. Forgets all events.
    pub fn check_colo(&mut self) -> Result<(), DemoError> {
        for (_, event) in self.events.drain(..) {
            if let Event::ColoExit { reason, .. } = event {
                return Err(DemoError::ColoEnded {
                    role: self.role,
                    reason,
                    stderr: LastWords::of(self.role, &self.stderr),
                });
            }
        }
        Ok(())
    }

    /// Takes what the side says, waiting at most `limit` for it to say something.
    pub fn listen(&mut self, waiting_for: &str, limit: Duration) -> Result<(), DemoError> {
        if self.hear(limit)? {
            return Ok(());
        }
        Err(self.gone(waiting_for))
    }

    /// The same; false at the end of the connection.
    fn hear(&mut self, limit: Duration) -> Result<bool, DemoError> {
        check_interrupt()?;
        let mut bytes = [0; 16 << 10];
        let read = self
            .stream
            .set_read_timeout(Some(limit.max(Duration::from_millis(1))))
            .and_then(|()| self.stream.read(&mut bytes));
        match read {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.client.feed(bytes.get(..count).unwrap_or_default());
                self.take_messages().map(|()| true)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::TimedOut
                | io::ErrorKind::Interrupted => check_interrupt().map(|()| true),
                io::ErrorKind::ConnectionReset => Ok(false),
                _ => Err(DemoError::host(format!("hear the {}", self.role))(error)),
            },
        }
    }

    fn take_messages(&mut self) -> Result<(), DemoError> {
        let at = Instant::now();
        while let Some(message) = self.client.poll() {
            let message = message.map_err(|source| DemoError::Protocol {
                role: self.role,
                source,
            })?;
            match message {
                ServerMessage::Greeting(_) => {}
                ServerMessage::Return { id, value } => {
                    self.reply = id.map(|id| (id, Ok(value)));
                }
                ServerMessage::Error { id, error } => {
                    self.reply = id.map(|id| (id, Err(error)));
                }
                // Events that this crate does not know are none of the operator's business.
                ServerMessage::Event(event) => match event.known() {
                    Some(Event::ColoCheckpoint(checkpoint)) => self.checkpoints.push(*checkpoint),
                    other => self.events.extend(other.map(|event| (at, event))),
                },
            }
        }
        Ok(())
    }

    /// The connection has ended: with the process, or without it?
    fn gone(&mut self, waiting_for: &str) -> DemoError {
        if let Err(interrupted) = check_interrupt() {
            return interrupted;
        }
        let waiting_for = waiting_for.to_owned();
        match self.exited_within(Duration::from_secs(1)) {
            Some(status) => DemoError::Ended {
                role: self.role,
                status,
                waiting_for,
                stderr: self.last_words(),
            },
            None => DemoError::Closed {
                role: self.role,
                waiting_for,
                stderr: self.last_words(),
            },
        }
    }

    fn exited_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.process.0.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(FINE),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Pulls its plug: SIGKILL. Says when, and does not wait: taking a VM apart takes the host a
    /// while, in which the survivor can already be told to go on.
    pub fn kill(&mut self) -> Result<Instant, DemoError> {
        let at = Instant::now();
        self.process
            .0
            .kill()
            .map_err(DemoError::host(format!("kill the {}", self.role)))?;
        Ok(at)
    }

    /// Ends it the way an operator does, and checks that it ends well.
    pub fn quit(&mut self) -> Result<(), DemoError> {
        self.send(&Command::Quit)?;
        let status = self.end()?;
        if status.success() {
            return Ok(());
        }
        Err(DemoError::Ended {
            role: self.role,
            status,
            waiting_for: "end after quit".to_owned(),
            stderr: self.last_words(),
        })
    }

    /// Takes all that a side which is about to end still says, and waits for the end.
    pub fn end(&mut self) -> Result<ExitStatus, DemoError> {
        let deadline = Instant::now() + PATIENCE;
        while self.hear(SLICE)? && Instant::now() < deadline {}
        let left = deadline.saturating_duration_since(Instant::now());
        self.exited_within(left)
            .ok_or_else(|| self.too_late("end", PATIENCE))
    }
}

/// Connects as soon as the process listens.
fn connect(
    role: Role,
    process: &mut Process,
    socket: &Path,
    stderr: &Path,
) -> Result<UnixStream, DemoError> {
    const WAITING_FOR: &str = "QMP socket";
    let to = Address::Unix(socket.to_owned());
    let deadline = Instant::now() + PATIENCE;
    loop {
        check_interrupt()?;
        let soon = Instant::now() + SLICE;
        let connected =
            ResolvedAddress::new(&to, soon, None).and_then(|route| route.connect(soon, None));
        let refused = match connected {
            Ok(connection) => return Ok(connection.into()),
            Err(error) => error,
        };
        if !matches!(
            refused.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
        ) {
            let what = format!("connect to {}", socket.display());
            return Err(DemoError::host(what)(refused));
        }
        let status = process
            .0
            .try_wait()
            .map_err(DemoError::host(format!("wait for the {role}")))?;
        if let Some(status) = status {
            return Err(DemoError::Ended {
                role,
                status,
                waiting_for: WAITING_FOR.to_owned(),
                stderr: LastWords::of(role, stderr),
            });
        }
        if Instant::now() >= deadline {
            return Err(DemoError::Deadline {
                role,
                waiting_for: WAITING_FOR.to_owned(),
                limit: PATIENCE,
                stderr: LastWords::of(role, stderr),
            });
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Length of a file, 0 if it is not there yet.
fn length(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |metadata| metadata.len())
}

/// A thread that looks at a serial line's file every 0.1 ms, so that the time of the first byte
/// does not depend on what the operator is doing.
#[derive(Debug)]
pub struct OutputWatch {
    seen: thread::JoinHandle<Option<Instant>>,
    stop: Arc<AtomicBool>,
}

impl OutputWatch {
    fn start(serial: PathBuf, beyond: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let seen = thread::spawn(move || {
            loop {
                if length(&serial) > beyond {
                    return Some(Instant::now());
                }
                if stopped.load(Ordering::Relaxed) {
                    return None;
                }
                thread::sleep(FINE);
            }
        });
        Self { seen, stop }
    }

    /// Whether it has come.
    pub fn is_finished(&self) -> bool {
        self.seen.is_finished()
    }

    /// When it came; `None` if it has not.
    pub fn finish(self) -> Option<Instant> {
        self.stop.store(true, Ordering::Relaxed);
        self.seen.join().ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_does_not_outlive_its_side() {
        let child = Program::new("sleep").arg("1000").spawn().unwrap();
        let entry = PathBuf::from(format!("/proc/{}", child.id()));
        assert!(entry.exists());
        drop(Process(child));
        assert!(!entry.exists());
    }

    #[test]
    fn a_process_that_ends_before_it_listens_is_an_error_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let script = ["-c", "echo no room >&2; exit 3"].map(str::to_owned);
        let error =
            Side::start(Role::Secondary, Path::new("/bin/sh"), &script, dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the secondary ended (exit status: 3) before its QMP socket; the secondary wrote:\n\
             no room\n"
        );
    }

    #[test]
    fn the_first_byte_is_timed_when_it_is_printed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("serial");
        let watch = OutputWatch::start(file.clone(), 0);
        let before = Instant::now();
        fs::write(&file, "x").unwrap();
        let deadline = before + PATIENCE;
        while !watch.is_finished() && Instant::now() < deadline {
            thread::sleep(FINE);
        }
        assert!(watch.finish().is_some_and(|at| at >= before));
        assert_eq!(OutputWatch::start(file, 1).finish(), None);
    }
}
