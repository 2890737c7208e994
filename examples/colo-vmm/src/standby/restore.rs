//! A held guest into a fresh QEMU.

use std::fmt;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use migration_net::Address;
use migration_net::outgoing::ConnectError;
use migration_stream::Escaped;
use migration_stream::ram::ZeroPageDetection;
use stream_relay::Channels;
use stream_relay::endpoint::Endpoint;
use stream_relay::guest::Guest;
use stream_relay::outgoing::{self, OutgoingConfig, OutgoingError};
use stream_relay::progress::{Figures, Progress};

use crate::event_loop::unblock_signals;

/// How often a QEMU that is still starting is tried.
const POLL: Duration = Duration::from_millis(5);

/// The place in a command line where the address goes.
const PLACE: &str = "{}";

/// Into what a guest is restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A QEMU that waits there with `-incoming`, or a file that one can load.
    Waiting(Endpoint),
    /// A QEMU that this command line starts, for a shell. It has to listen (`-incoming`) at the
    /// address that stands in place of `{}`, a unix socket.
    Started(String),
}

/// How a guest is restored.
#[derive(Clone, Debug)]
pub struct RestoreConfig {
    /// Into what.
    pub into: Destination,
    /// Multifd's channels, if the fresh QEMU has the capability.
    pub channels: Option<Channels>,
    /// The UUID with which channels introduce themselves, zero if the guest has none.
    pub uuid: [u8; 16],
    /// How long the fresh QEMU may take until it listens.
    pub start_timeout: Duration,
    /// How long it may be silent afterwards.
    pub timeout: Duration,
}

impl RestoreConfig {
    /// Restores `guest`, which is called `name`. When it returns, a QEMU has confirmed that it has
    /// everything, or a file is on disk under its name.
    pub(super) fn restore(&self, guest: &Guest, name: &str) -> Result<Figures, RestoreError> {
        let deadline = Instant::now() + self.start_timeout;
        match &self.into {
            Destination::Waiting(endpoint) => self.send(guest, endpoint, deadline, None),
            Destination::Started(line) => {
                let dir = tempfile::Builder::new()
                    .prefix("colo-standby-")
                    .tempdir()
                    .map_err(RestoreError::Directory)?;
                let path = dir.path().join("incoming");
                // Not as it is shown to people.
                let uri = format!("unix:{}", path.display());
                let address = Address::Unix(path);
                let line = line.replace(PLACE, &uri);
                tracing::info!(guest = name, command = %Escaped(&line), "starting a QEMU");
                let mut shell = Command::new("/bin/sh");
                unblock_signals(&mut shell);
                let child = shell
                    .args(["-c", &line])
                    .env("COLO_GUEST", name)
                    .env("COLO_INCOMING", uri)
                    .stdin(Stdio::null())
                    // What ends this process at its terminal does not end the guest.
                    .process_group(0)
                    .spawn()
                    .map_err(RestoreError::Start)?;
                let mut started = Started(Some(child));
                self.send(
                    guest,
                    &Endpoint::Socket(address),
                    deadline,
                    Some(&mut started),
                )
            }
        }
    }

    fn send(
        &self,
        guest: &Guest,
        to: &Endpoint,
        deadline: Instant,
        mut started: Option<&mut Started>,
    ) -> Result<Figures, RestoreError> {
        let config = OutgoingConfig {
            to: to.clone(),
            channels: self.channels,
            mapped_ram: None,
            zero_pages: ZeroPageDetection::Legacy,
            max_bandwidth: 0,
            machine_version: None,
            uuid: self.uuid,
            timeout: self.timeout,
        };
        loop {
            match outgoing::send(guest, &config, &Progress::default()) {
                Err(OutgoingError::Connect(error))
                    if is_starting(&error) && Instant::now() < deadline =>
                {
                    if let Some(status) = started.as_mut().and_then(|s| s.failed()) {
                        return Err(RestoreError::Command { status });
                    }
                    thread::sleep(POLL);
                }
                other => return Ok(other?),
            }
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waiting(endpoint) => endpoint.fmt(f),
            Self::Started(line) => write!(f, "'{}'", Escaped(line)),
        }
    }
}

/// Whether whoever is to listen there may only need more time. One that took a connection is not
/// asked again: it may have begun to load.
fn is_starting(error: &ConnectError) -> bool {
    use migration_net::incoming::Role;

    let (role, source) = match error {
        ConnectError::Refused { role, source, .. } | ConnectError::Io { role, source, .. } => {
            (role, source)
        }
        _ => return false,
    };
    matches!(role, Role::Main)
        && matches!(
            source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
}

/// A command that was started; what it has become is for its shell to say.
struct Started(Option<Child>);

impl Started {
    /// How it has failed, if it has. A command that has ended well has left its QEMU behind.
    fn failed(&mut self) -> Option<ExitStatus> {
        let status = self.0.as_mut()?.try_wait().ok().flatten()?;
        (!status.success()).then_some(status)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It lives on, or ends by itself, and somebody has to take note of its end.
        if let Some(mut child) = self.0.take() {
            let reaper = thread::Builder::new().name("restored".to_owned());
            if let Err(error) = reaper.spawn(move || child.wait()) {
                tracing::warn!(%error, "the end of the restored QEMU will not be noticed");
            }
        }
    }
}

/// Why a guest was not restored. It is still held.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// There is no place for a socket.
    #[error("a directory for the fresh QEMU's socket")]
    Directory(#[source] io::Error),
    /// No shell could be started.
    #[error("starting the restore command")]
    Start(#[source] io::Error),
    /// The command has failed.
    #[error("the restore command has failed: {status}")]
    Command {
        /// How.
        status: ExitStatus,
    },
    /// The fresh QEMU did not take it, or did not say so.
    #[error(transparent)]
    Outgoing(#[from] OutgoingError),
}

impl RestoreError {
    /// Returns whether the fresh QEMU may run the guest all the same.
    pub(super) const fn is_uncertain(&self) -> bool {
        matches!(self, Self::Outgoing(OutgoingError::Unconfirmed(_)))
    }
}
