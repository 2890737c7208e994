//! What the threads of the server tell each other.
//!
//! Events come to the server once and are put into the mailbox of every client. Whoever has
//! something to put there that must not overtake an event calls [`Hub::distribute`] first: all
//! that was published before is then in front of it.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use qmp_types::{CommandResult, Event, RequestId, Timestamp};

use super::wait::Waker;

/// How many clients there can be at a time, counting those that have gone while a command of theirs
/// is still executing. Each costs two threads.
pub(super) const CLIENTS_MAX: usize = 32;
/// How long a client has to say something, however many others come. One that has said nothing gives
/// way after that when all places are taken.
pub(super) const GRACE: Duration = Duration::from_millis(200);

/// Something for the thread that talks to a client.
#[derive(Debug)]
pub(super) enum Mail {
    /// To be told to the client.
    Event(Event, Timestamp),
    /// A command has been executed.
    Reply(RequestId, CommandResult),
    /// The thread that executes commands has panicked.
    WorkerGone,
    /// Take no more commands, and end when nothing is left to be said, or at this time.
    Close(Instant),
}

/// Where it is put.
#[derive(Debug)]
pub(super) struct Mailbox {
    mail: Mutex<VecDeque<Mail>>,
    pub(super) waker: Waker,
    since: Instant,
    /// The client has said something that was answered.
    has_spoken: AtomicBool,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            mail: Mutex::default(),
            waker: Waker::new()?,
            since: Instant::now(),
            has_spoken: AtomicBool::new(false),
        })
    }

    /// The client has said something that was answered.
    pub(super) fn spoke(&self) {
        // Relaxed: nothing else is told by it.
        self.has_spoken.store(true, Ordering::Relaxed);
    }

    fn is_silent(&self) -> bool {
        !self.has_spoken.load(Ordering::Relaxed)
    }

    pub(super) fn put(&self, mail: Mail) {
        lock(&self.mail).push_back(mail);
        self.waker.wake();
    }

    pub(super) fn take(&self) -> VecDeque<Mail> {
        std::mem::take(&mut lock(&self.mail))
    }
}

/// No more events will come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BusGone;

/// All clients.
#[derive(Debug)]
pub(super) struct Hub {
    events: Receiver<(Event, Timestamp)>,
    clients: Mutex<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    /// Of threads that hold on to them: those of a client, and the one that executes its command.
    mailboxes: Vec<Weak<Mailbox>>,
    closed: bool,
}

impl Clients {
    /// The client that has said nothing for the longest, with its position.
    fn oldest_silent(&self) -> Option<(usize, Arc<Mailbox>)> {
        let mailboxes = self.mailboxes.iter().enumerate();
        mailboxes
            .filter_map(|(at, mailbox)| Some((at, mailbox.upgrade()?)))
            .find(|(_, mailbox)| mailbox.is_silent())
    }

    fn put(&self, mut mail: impl FnMut() -> Mail) {
        for mailbox in self.mailboxes.iter().filter_map(Weak::upgrade) {
            mailbox.put(mail());
        }
    }
}

impl Hub {
    pub(super) fn new(events: Receiver<(Event, Timestamp)>) -> Self {
        Self {
            events,
            clients: Mutex::default(),
        }
    }

    /// How long the next client has to wait for its place, because one that has said nothing is to
    /// give way and has not had its time. None if there is a place, or will not be one.
    pub(super) fn wait_for_place(&self, now: Instant) -> Option<Duration> {
        let mut clients = lock(&self.clients);
        clients.mailboxes.retain(|other| other.strong_count() > 0);
        if clients.mailboxes.len() < CLIENTS_MAX {
            return None;
        }
        let (_, oldest) = clients.oldest_silent()?;
        let had = now.saturating_duration_since(oldest.since);
        GRACE.checked_sub(had).filter(|left| !left.is_zero())
    }

    /// Adds a client, in the place of one that says nothing if all are taken; false if there is no
    /// room.
    pub(super) fn add(&self, mailbox: &Arc<Mailbox>) -> bool {
        let mut clients = lock(&self.clients);
        clients.mailboxes.retain(|other| other.strong_count() > 0);
        if clients.closed {
            return false;
        }
        if clients.mailboxes.len() >= CLIENTS_MAX {
            let now = Instant::now();
            match clients.oldest_silent() {
                Some((at, oldest)) if now.saturating_duration_since(oldest.since) >= GRACE => {
                    oldest.put(Mail::Close(now));
                    clients.mailboxes.remove(at);
                }
                _ => return false,
            }
        }
        clients.mailboxes.push(Arc::downgrade(mailbox));
        true
    }

    /// Puts the events published so far into the mailboxes.
    pub(super) fn distribute(&self) -> Result<(), BusGone> {
        // Locked before an event is taken: two threads at once must not change the order, and none
        // may go on while another still holds an event.
        let clients = lock(&self.clients);
        loop {
            match self.events.try_recv() {
                Ok((event, timestamp)) => clients.put(|| Mail::Event(event.clone(), timestamp)),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => return Err(BusGone),
            }
        }
    }

    /// The channel that [`Hub::distribute`] empties, to wait for.
    pub(super) fn events(&self) -> &Receiver<(Event, Timestamp)> {
        &self.events
    }

    /// Tells all clients to end, and takes no others.
    pub(super) fn close(&self, deadline: Instant) {
        let mut clients = lock(&self.clients);
        clients.closed = true;
        clients.put(|| Mail::Close(deadline));
    }
}

/// Both lists are whole at every moment, also if a thread panics.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::EventBus;

    #[test]
    fn every_client_gets_every_event_in_order() {
        let bus = EventBus::new();
        let hub = Hub::new(bus.subscribe());
        let mailboxes = [(); 2].map(|()| Arc::new(Mailbox::new().unwrap()));
        for mailbox in &mailboxes {
            assert!(hub.add(mailbox));
        }
        bus.publish(&Event::Stop);
        bus.publish(&Event::Resume);
        assert_eq!(hub.distribute(), Ok(()));
        for mailbox in &mailboxes {
            assert!(matches!(
                mailbox.take().make_contiguous(),
                [Mail::Event(Event::Stop, _), Mail::Event(Event::Resume, _)]
            ));
        }
    }

    #[test]
    fn the_end_of_the_bus_is_told_once_it_is_empty() {
        let bus = EventBus::new();
        let hub = Hub::new(bus.subscribe());
        let mailbox = Arc::new(Mailbox::new().unwrap());
        assert!(hub.add(&mailbox));
        bus.publish(&Event::Stop);
        drop(bus);
        assert_eq!(hub.distribute(), Err(BusGone));
        assert_eq!(mailbox.take().len(), 1);
    }

    #[test]
    fn there_is_room_again_when_a_client_has_gone() {
        let hub = Hub::new(EventBus::new().subscribe());
        let mut mailboxes: Vec<_> = (0..CLIENTS_MAX)
            .map(|_| Arc::new(Mailbox::new().unwrap()))
            .collect();
        assert!(mailboxes.iter().all(|mailbox| hub.add(mailbox)));
        let late = Arc::new(Mailbox::new().unwrap());
        assert!(!hub.add(&late));
        mailboxes.pop();
        assert!(hub.add(&late));
    }

    #[test]
    fn nobody_comes_in_after_the_end() {
        let hub = Hub::new(EventBus::new().subscribe());
        hub.close(Instant::now());
        assert!(!hub.add(&Arc::new(Mailbox::new().unwrap())));
    }
}
