//! The QMP server: sockets and threads around [`qmp_types::Session`].
//!
//! ```text
//!   socket ◀──▶ qmp-client ──jobs──▶ qmp-worker ──▶ Operator      (both once for each client)
//!                  ▲  │ out of band                    │
//!                  │  └───────────────────────────▶ Operator
//!               mailbox ◀── replies ── qmp-worker      │
//!                  ▲                                   ▼
//!                  └──────── events ◀── Hub ◀──────  EventBus
//! ```
//!
//! Each client has a session of its own. A thread talks to it, and waits for nothing but the socket
//! and its mailbox; it executes commands that were given out of band itself. The others it gives to
//! a second thread, so that a connection that hangs in one command can be cut with `yank`.
//!
//! Events precede the reply to the command that caused them, provided the [`Operator`] publishes
//! them before `execute` returns.
//!
//! A client that does not read costs a few MiB and is disconnected then; nobody waits for it.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, Instant};
//!
//! use colo_vmm::operator::{EventBus, Operator};
//! use colo_vmm::qmp;
//! use qmp_types::{Command, CommandKind, CommandResult, QmpError, SessionConfig, VersionInfo};
//!
//! struct Nothing;
//!
//! impl Operator for Nothing {
//!     fn execute(&self, _: Command) -> CommandResult {
//!         Err(QmpError::generic("there is no VM"))
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let events = EventBus::new();
//! let server = qmp::serve(
//!     &"tcp:127.0.0.1:0,server=on,wait=off".parse()?,
//!     SessionConfig {
//!         version: VersionInfo::new(11, 1, 0, "my-vmm"),
//!         oob: true,
//!         commands: CommandKind::ALL,
//!     },
//!     Arc::new(Nothing),
//!     &events,
//! )?;
//! println!("qmp on {}", server.address());
//! // ... until the VM has ended; then the last replies go out.
//! server.shutdown(Instant::now() + Duration::from_secs(1));
//! # Ok(())
//! # }
//! ```

mod address;
mod client;
mod hub;
pub(crate) mod listener;
#[cfg(test)]
mod tests;
mod wait;

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, bounded};
use qmp_types::SessionConfig;
use vmm_sys_util::epoll::EventSet;

pub use self::address::{QmpAddress, QmpAddressError};
use self::hub::{Hub, Mailbox};
use self::listener::{Listener, Stream};
use self::wait::{Waiter, Waker};
use crate::operator::{EventBus, Operator};

/// How long no client is accepted after the host had no descriptor or thread for one.
const EXHAUSTED_PAUSE: Duration = Duration::from_secs(1);

/// A server that listens. Dropped, it disconnects its clients at once, whatever is still to be sent
/// to them; [`QmpServer::shutdown`] is kinder.
///
/// All its threads end with it, except that a thread in [`Operator::execute`] of a command that was
/// not given out of band is not waited for, and ends when the command does.
#[derive(Debug)]
pub struct QmpServer {
    address: QmpAddress,
    hub: Arc<Hub>,
    threads: Option<Threads>,
}

#[derive(Debug)]
struct Threads {
    acceptor: JoinHandle<Vec<JoinHandle<()>>>,
    acceptor_waker: Arc<Waker>,
    postman: JoinHandle<()>,
    /// Dropped to end the postman.
    postman_end: Sender<()>,
}

/// Serves QMP on `address`: gives clients' commands to `operator`, and tells them of `events`.
///
/// A socket file that an ended process has left behind is replaced. The server's own is removed
/// with the server.
///
/// # Errors
/// The address cannot be listened on, or the host has no threads or descriptors left.
pub fn serve(
    address: &QmpAddress,
    config: SessionConfig,
    operator: Arc<dyn Operator>,
    events: &EventBus,
) -> io::Result<QmpServer> {
    let (listener, bound) = Listener::bind(address).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen for QMP on {address}: {error}"),
        )
    })?;
    let hub = Arc::new(Hub::new(events.subscribe()));
    let acceptor_waker = Arc::new(Waker::new()?);
    let acceptor = Acceptor {
        waiter: Waiter::new(&listener, &acceptor_waker)?,
        waker: Arc::clone(&acceptor_waker),
        listener,
        config,
        operator,
        hub: Arc::clone(&hub),
        clients: Vec::new(),
    };
    let (postman_end, end) = bounded(0);
    let postman_hub = Arc::clone(&hub);
    let postman = thread::Builder::new()
        .name("qmp-events".to_owned())
        .spawn(move || carry_events(&postman_hub, &end))?;
    let acceptor = thread::Builder::new()
        .name("qmp-accept".to_owned())
        .spawn(move || acceptor.run())?;
    Ok(QmpServer {
        address: bound,
        hub,
        threads: Some(Threads {
            acceptor,
            acceptor_waker,
            postman,
            postman_end,
        }),
    })
}

impl QmpServer {
    /// Where it listens, with the port that was found if port 0 was asked for.
    #[must_use]
    pub fn address(&self) -> &QmpAddress {
        &self.address
    }

    /// Ends the server when clients have been told all there is to tell, or at `deadline`.
    ///
    /// No further command is begun. Those that are executing are waited for, in particular the
    /// `quit` that may be the reason for this; one that hangs makes this last until `deadline`.
    pub fn shutdown(mut self, deadline: Instant) {
        self.close(deadline);
    }

    fn close(&mut self, deadline: Instant) {
        let Some(threads) = self.threads.take() else {
            return;
        };
        // What was published so far is still told.
        let _ = self.hub.distribute();
        self.hub.close(deadline);
        threads.acceptor_waker.wake();
        drop(threads.postman_end);
        let clients = join(threads.acceptor).unwrap_or_default();
        join(threads.postman);
        for client in clients {
            join(client);
        }
    }
}

impl Drop for QmpServer {
    fn drop(&mut self) {
        self.close(Instant::now());
    }
}

fn join<T>(thread: JoinHandle<T>) -> Option<T> {
    thread
        .join()
        .inspect_err(|_| tracing::error!("a thread of the qmp server has panicked"))
        .ok()
}

/// Puts events into the clients' mailboxes as they come.
fn carry_events(hub: &Hub, end: &Receiver<()>) {
    let mut select = Select::new();
    select.recv(hub.events());
    let ended = select.recv(end);
    // Not received here: whoever takes an event holds the hub's lock.
    while select.ready() != ended && hub.distribute().is_ok() {}
}

struct Acceptor {
    listener: Listener,
    waiter: Waiter,
    waker: Arc<Waker>,
    config: SessionConfig,
    operator: Arc<dyn Operator>,
    hub: Arc<Hub>,
    clients: Vec<JoinHandle<()>>,
}

impl Acceptor {
    /// Accepts clients until it is woken; returns the threads of those that are left.
    fn run(mut self) -> Vec<JoinHandle<()>> {
        loop {
            // While nobody can be given a place, clients wait in the listener's backlog.
            let pause = self.hub.wait_for_place(Instant::now());
            let interest = match pause {
                Some(_) => EventSet::empty(),
                None => EventSet::IN,
            };
            match self.waiter.wait(&self.waker, interest, pause) {
                Ok(ready) if ready.woken => break,
                Ok(_) if pause.is_some() => continue,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "no more qmp clients are accepted");
                    break;
                }
            }
            let result = match self.listener.accept() {
                Ok(stream) => self.admit(stream),
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock
                            | ErrorKind::Interrupted
                            | ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    // The client that waits would be told at once again.
                    tracing::warn!(%error, "cannot accept a qmp client");
                    let pause =
                        self.waiter
                            .wait(&self.waker, EventSet::empty(), Some(EXHAUSTED_PAUSE));
                    if pause.map_or(true, |ready| ready.woken) {
                        break;
                    }
                }
            }
        }
        self.clients
    }

    fn admit(&mut self, stream: Stream) -> io::Result<()> {
        self.clients.retain(|client| !client.is_finished());
        let mailbox = Arc::new(Mailbox::new()?);
        if !self.hub.add(&mailbox) {
            tracing::warn!(
                most = hub::CLIENTS_MAX,
                "too many qmp clients, one is turned away"
            );
            return Ok(());
        }
        let client = client::start(
            stream,
            self.config.clone(),
            mailbox,
            Arc::clone(&self.hub),
            Arc::clone(&self.operator),
        )?;
        self.clients.push(client);
        Ok(())
    }
}
