//! One client: a thread that talks to it, and one that executes its commands.

use std::collections::VecDeque;
use std::error::Error;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};
use qmp_types::{Command, OutputFull, RequestId, Session, SessionConfig};
use vmm_sys_util::epoll::EventSet;

use super::hub::{Hub, Mail, Mailbox};
use super::listener::Stream;
use super::wait::Waiter;
use crate::operator::Operator;

/// How much is read at a time, bytes.
const READ_SIZE: usize = 16 << 10;

/// Why a client is left before it has left.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    OutputFull(#[from] OutputFull),
    #[error("the client has gone without waiting for its replies")]
    HungUp,
    #[error("the thread that executes commands has panicked")]
    WorkerGone,
}

/// The thread that talks to the client. It waits for nothing but its waiter.
struct Talker {
    stream: Stream,
    waiter: Waiter,
    session: Session,
    mailbox: Arc<Mailbox>,
    hub: Arc<Hub>,
    operator: Arc<dyn Operator>,
    /// To the worker. There is never more than one job in it.
    jobs: Sender<Job>,
    /// Whether the worker has one.
    executing: bool,
    /// What is being sent.
    output: VecDeque<u8>,
    /// The client has sent something.
    heard: bool,
    /// The client sends no more.
    ended: bool,
    /// Set by [`Mail::Close`].
    deadline: Option<Instant>,
}

type Job = (Command, RequestId);

/// Talks to a client until it leaves, or the server ends.
///
/// # Errors
/// The host has no descriptors or threads left.
pub(super) fn start(
    stream: Stream,
    config: SessionConfig,
    mailbox: Arc<Mailbox>,
    hub: Arc<Hub>,
    operator: Arc<dyn Operator>,
) -> io::Result<JoinHandle<()>> {
    let waiter = Waiter::new(&stream, &mailbox.waker)?;
    let (jobs, worker_jobs) = unbounded();
    let worker = Worker {
        jobs: worker_jobs,
        mailbox: Arc::clone(&mailbox),
        hub: Arc::clone(&hub),
        operator: Arc::clone(&operator),
    };
    let mut talker = Talker {
        stream,
        waiter,
        session: Session::new(config),
        mailbox,
        hub,
        operator,
        jobs,
        executing: false,
        output: VecDeque::new(),
        heard: false,
        ended: false,
        deadline: None,
    };
    let worker = thread::Builder::new()
        .name("qmp-worker".to_owned())
        .spawn(move || worker.run())?;
    thread::Builder::new()
        .name("qmp-client".to_owned())
        .spawn(move || {
            match talker.run() {
                Ok(()) => tracing::debug!("a qmp client has left"),
                Err(error) => {
                    let error: &dyn Error = &error;
                    tracing::info!(error, "a qmp client is disconnected");
                }
            }
            let idle = !talker.executing;
            // Closes the connection, and the channel of jobs.
            drop(talker);
            // A command may hang for ever. Its thread then ends when the command does.
            if idle && worker.join().is_err() {
                tracing::debug!("a qmp worker has panicked");
            }
        })
}

impl Talker {
    fn run(&mut self) -> Result<(), Lost> {
        loop {
            self.take_mail()?;
            // Sending makes room for further requests, which make output.
            while self.dispatch()? | self.send()? {}

            let idle = !self.executing && self.output.is_empty();
            let closing = self.ended || self.deadline.is_some();
            if closing && idle {
                return Ok(());
            }
            let timeout = match self.deadline {
                Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                    Some(left) if !left.is_zero() => Some(left),
                    _ => return Ok(()),
                },
                None => None,
            };

            let mut interest = EventSet::empty();
            if !closing && self.session.wants_input() {
                interest |= EventSet::IN;
            }
            if !self.output.is_empty() {
                interest |= EventSet::OUT;
            }
            let ready = self.waiter.wait(&self.mailbox.waker, interest, timeout)?;
            if ready.readable {
                self.receive()?;
            } else if ready.hung_up {
                return Err(Lost::HungUp);
            }
        }
    }

    /// Looks what the other threads have to say.
    fn take_mail(&mut self) -> Result<(), Lost> {
        for mail in self.mailbox.take() {
            match mail {
                Mail::Event(event, timestamp) => self.session.emit(&event, timestamp)?,
                Mail::Reply(id, result) => {
                    self.executing = false;
                    self.session.reply(id, result);
                }
                Mail::WorkerGone => return Err(Lost::WorkerGone),
                Mail::Close(deadline) => self.deadline = Some(deadline),
            }
        }
        Ok(())
    }

    /// Executes what may be executed now, or has it executed. Whether there was anything.
    fn dispatch(&mut self) -> Result<bool, Lost> {
        let mut any = false;
        while self.deadline.is_none()
            && let Some(request) = self.session.poll_request()
        {
            any = true;
            if request.oob {
                let result = self.operator.execute(request.command);
                // What it has made happen is told before its reply. That the bus is gone is the
                // end of events, not of commands.
                let _ = self.hub.distribute();
                self.take_mail()?;
                self.session.reply(request.id, result);
            } else {
                self.executing = true;
                self.jobs
                    .send((request.command, request.id))
                    .map_err(|_| Lost::WorkerGone)?;
            }
        }
        Ok(any)
    }

    /// Sends what the connection takes. Whether the session had anything to be sent.
    fn send(&mut self) -> Result<bool, Lost> {
        let mut any = false;
        loop {
            if self.output.is_empty() {
                // Only then: the session counts what waits, to stop a client that does not read.
                let Some(output) = self.session.take_output() else {
                    return Ok(any);
                };
                any = true;
                if self.heard {
                    self.mailbox.spoke();
                }
                self.output = output.into();
            }
            let (first, _) = self.output.as_slices();
            match self.stream.write(first) {
                Ok(0) => return Err(io::Error::from(ErrorKind::WriteZero).into()),
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads once: what there is more of is told again.
    fn receive(&mut self) -> Result<(), Lost> {
        let mut buffer = [0; READ_SIZE];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                self.heard = true;
                self.session.feed(buffer.get(..count).unwrap_or_default());
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// The thread that executes the client's commands one after the other.
struct Worker {
    jobs: Receiver<Job>,
    mailbox: Arc<Mailbox>,
    hub: Arc<Hub>,
    operator: Arc<dyn Operator>,
}

impl Worker {
    fn run(self) {
        for (command, id) in &self.jobs {
            let result = self.operator.execute(command);
            // An event that the command has caused precedes its reply: of `stop`, `cont` and
            // `quit` management software relies on it.
            let _ = self.hub.distribute();
            self.mailbox.put(Mail::Reply(id, result));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if thread::panicking() {
            self.mailbox.put(Mail::WorkerGone);
        }
    }
}
