//! What the threads of the server tell each other.
//!
//! Events come to the server once and are put into the mailbox of every client. Whoever has
//! something to put there that must not overtake an event calls [`Hub::distribute`] first: all
//! that was published before is then in front of it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use crossbeam_channel::{Receiver, TryRecvError};
use qmp_types::{CommandResult, Event, RequestId, Timestamp};

use super::wait::Waker;

/// How many clients there can be at a time, counting those that have gone while a command of theirs
/// is still executing. Each costs two threads.
pub(super) const CLIENTS_MAX: usize = 32;

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
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            mail: Mutex::default(),
            waker: Waker::new()?,
        })
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

    /// Adds a client; false if there is no room.
    pub(super) fn add(&self, mailbox: &Arc<Mailbox>) -> bool {
        let mut clients = lock(&self.clients);
        clients.mailboxes.retain(|other| other.strong_count() > 0);
        if clients.closed || clients.mailboxes.len() >= CLIENTS_MAX {
            return false;
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
