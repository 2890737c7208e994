//! The connections of one incoming migration as they come, without I/O and without a clock.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use migration_stream::io::deadline_from;

use super::classifier::{Classifier, Greeting, Refusal, Role};
use super::error::IncomingError;
use crate::channels::{self, ChannelId, Channels};

/// How long nobody is accepted after the host had no descriptor, or no memory, for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// How long an incoming migration waits for its peers, and for how many of them.
///
/// A limit of [`Duration::MAX`] is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// A connection must have said what it is this long after it was accepted. Default 10 s.
    pub greeting: Duration,
    /// All connections must be there this long after the first of them said what it is. Default 15 s.
    pub complete: Duration,
    /// How long the channels wait for the peer afterwards
    /// (see [`FdChannel::new`](migration_stream::io::FdChannel::new)). Default 30 s.
    pub channel: Duration,
    /// How many connections beyond those still expected may be open without having said what they
    /// are. Default 256. See [`Collection`] for what happens beyond that.
    pub unknown: usize,
    /// How long a connection can count on, however many others come. Default 1 s. A source
    /// must be able to open all its connections and to write their first bytes within that time to
    /// be taken in during a flood.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self::new()
    }
}

impl Limits {
    /// Returns the limits as by default.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            greeting: Duration::from_secs(10),
            complete: Duration::from_secs(15),
            channel: Duration::from_secs(30),
            unknown: 256,
            grace: Duration::from_secs(1),
        }
    }

    /// Sets how long a connection has [to say what it is](Limits::greeting).
    #[must_use]
    pub const fn greeting(mut self, limit: Duration) -> Self {
        self.greeting = limit;
        self
    }

    /// Sets how long [all connections](Limits::complete) have to be there.
    #[must_use]
    pub const fn complete(mut self, limit: Duration) -> Self {
        self.complete = limit;
        self
    }

    /// Sets how long the collected channels [wait for the peer](Limits::channel). It must exceed every silence of
    /// a healthy peer.
    #[must_use]
    pub const fn channel(mut self, limit: Duration) -> Self {
        self.channel = limit;
        self
    }

    /// Sets how many [unknown connections](Limits::unknown) may be open. Each costs a descriptor.
    #[must_use]
    pub const fn unknown(mut self, connections: usize) -> Self {
        self.unknown = connections;
        self
    }

    /// Sets how long an unknown connection [can count on](Limits::grace).
    #[must_use]
    pub const fn grace(mut self, limit: Duration) -> Self {
        self.grace = limit;
        self
    }
}

/// Collects the connections of one incoming migration, without I/O. [`Acceptor`](super::Acceptor) runs
/// it over a listening socket; an embedder with connections of its own (TLS) can do the same.
///
/// # Floods
/// Anybody who can connect can open connections and say nothing, or half of a greeting. The source
/// itself opens its main channel first and writes to it last. The peer's address does not tell the
/// two apart: a unix socket has none, and an attacker may share the source's host. Time does:
///
/// 1. A connection that has said what it is never gives way to others.
/// 2. Of the others ("unknown"), at most [`Limits::unknown`] are open beyond those still expected.
///    The older half of these keep their places until they have had [`Limits::greeting`].
/// 3. When all places are taken and another connection wants in, the oldest of the younger half gives
///    way, but not before it has had [`Limits::grace`]. Until then nobody is accepted, and whoever
///    connects waits in the listener's backlog.
/// 4. A host without descriptors or memory for a connection is a host whose places are all taken;
///    besides, nobody is accepted for 0.1 s.
///
/// So a source that connects before a flood has all of [`Limits::greeting`]. A source that connects
/// during one has at least [`Limits::grace`], and is accepted within one grace for every half of
/// [`Limits::unknown`] that wait before it (with the defaults a thousand silent connections hold it up
/// by 6 s). Nothing here grows with the length of the flood.
#[derive(Debug)]
pub struct Collection<C> {
    limits: Limits,
    expected: Channels,
    classifier: Classifier,
    /// In the order in which they were accepted, and so in that of their deadlines.
    unknown: VecDeque<Unknown<C>>,
    known: Vec<Known<C>>,
    /// When all must be there.
    due: Option<Instant>,
    /// A channel of this VM that is not configured here has introduced itself.
    surplus: Option<(ChannelId, Instant)>,
    /// Until when the host is not asked for another connection.
    exhausted_until: Option<Instant>,
    /// That was reported, and no connection was accepted since.
    told_exhausted: bool,
    refusals: VecDeque<Refusal>,
    last_refusal: Option<Refusal>,
}

/// A connection that has not said yet what it is.
#[derive(Debug)]
struct Unknown<C> {
    connection: C,
    greeting: Greeting,
    since: Instant,
}

#[derive(Debug)]
struct Known<C> {
    role: Role,
    connection: C,
    /// The migration that it belongs to was reported as failed.
    is_reported: bool,
}

impl<C> Collection<C> {
    /// Expects a main channel, and `channels` if there are any.
    #[must_use]
    pub fn new(channels: impl Into<Channels>, limits: Limits) -> Self {
        let expected: Channels = channels.into();
        Self {
            limits,
            classifier: Classifier::new(expected.clone()),
            expected,
            unknown: VecDeque::new(),
            known: Vec::new(),
            due: None,
            surplus: None,
            exhausted_until: None,
            told_exhausted: false,
            refusals: VecDeque::new(),
            last_refusal: None,
        }
    }

    /// The connections that have not said what they are, the oldest first.
    pub fn unknown(&self) -> impl ExactSizeIterator<Item = &C> {
        self.unknown.iter().map(|unknown| &unknown.connection)
    }

    /// The connections that have, with what they are.
    pub fn known(&self) -> impl ExactSizeIterator<Item = (Role, &C)> {
        self.known
            .iter()
            .map(|known| (known.role, &known.connection))
    }

    /// How many connections may be unknown now.
    #[must_use]
    pub fn most_unknown(&self) -> usize {
        let main = usize::from(!self.classifier.has_main());
        let missing = main + self.classifier.missing_channels().count();
        self.limits.unknown.saturating_add(missing).max(1)
    }

    /// Which unknown connection would give way to another now.
    fn gives_way(&self, now: Instant) -> Option<usize> {
        let at = self.unknown.len() / 2;
        let since = self.unknown.get(at)?.since;
        (now.saturating_duration_since(since) >= self.limits.grace).then_some(at)
    }

    /// From when on another connection is to be accepted; `None` if one can be now.
    #[must_use]
    pub fn accepts_from(&self, now: Instant) -> Option<Instant> {
        let exhausted = self.exhausted_until.filter(|until| *until > now);
        if self.unknown.len() < self.most_unknown() || self.gives_way(now).is_some() {
            return exhausted;
        }
        let since = self.unknown.get(self.unknown.len() / 2).map(|u| u.since);
        let crowded = since.map(|since| deadline_from(since, self.limits.grace));
        exhausted.max(crowded)
    }

    /// Takes a connection that was accepted. If there is no place, and none that can be given up, the
    /// connection itself is refused.
    pub fn accepted(&mut self, connection: C, now: Instant) {
        self.told_exhausted = false;
        let limit = self.most_unknown();
        if self.unknown.len() >= limit {
            self.refuse(Refusal::Crowded { limit });
            let Some(at) = self.gives_way(now) else {
                return;
            };
            self.unknown.remove(at);
        }
        self.unknown.push_back(Unknown {
            connection,
            greeting: Greeting::new(),
            since: now,
        });
    }

    /// The host could not accept a connection because it has no descriptors or no memory left.
    pub fn exhausted(&mut self, error: io::Error, now: Instant) {
        self.exhausted_until = Some(deadline_from(now, EXHAUSTED_PAUSE));
        if !std::mem::replace(&mut self.told_exhausted, true) {
            self.refuse(Refusal::Exhausted(Arc::new(error)));
        }
        if let Some(at) = self.gives_way(now) {
            let limit = self.unknown.len();
            self.unknown.remove(at);
            self.refuse(Refusal::Crowded { limit });
        }
    }

    /// A connection could not be used.
    pub fn unusable(&mut self, error: io::Error) {
        self.refuse(Refusal::Io(Arc::new(error)));
    }

    /// Reads what unknown connection number `index` says, as far as it is there. `read` is asked for
    /// bytes until it has none (`None`); 0 bytes are the end. A connection that says what it is, or
    /// that is refused, leaves the unknown ones, and the next one has its number then. True if so.
    pub fn hear(
        &mut self,
        index: usize,
        now: Instant,
        mut read: impl FnMut(&mut C, &mut [u8]) -> io::Result<Option<usize>>,
    ) -> bool {
        let Some(unknown) = self.unknown.get_mut(index) else {
            return false;
        };
        let verdict = loop {
            match read(&mut unknown.connection, unknown.greeting.wanted()) {
                Ok(None) => return false,
                Ok(Some(n)) => match self.classifier.advance(&mut unknown.greeting, n) {
                    Ok(None) => {}
                    Ok(Some(role)) => break Ok(role),
                    Err(refusal) => break Err(refusal),
                },
                Err(e) => break Err(Refusal::Io(Arc::new(e))),
            }
        };
        let Some(Unknown { connection, .. }) = self.unknown.remove(index) else {
            return false;
        };
        match verdict {
            Ok(role) => {
                self.known.push(Known {
                    role,
                    connection,
                    is_reported: false,
                });
                if self.due.is_none() {
                    self.due = Some(deadline_from(now, self.limits.complete));
                    // One from long before is not this source's.
                    let limit = self.limits.complete;
                    self.surplus
                        .take_if(|(_, at)| now.saturating_duration_since(*at) > limit);
                }
            }
            Err(refusal) => {
                if let Refusal::Hello(error) = &refusal
                    && let Some(channel) = channels::surplus(error)
                {
                    self.surplus = self.surplus.max(Some((channel, now)));
                }
                self.refuse(refusal);
            }
        }
        true
    }

    /// The peer has closed these known connections (ascending positions): the migration that they
    /// belong to has failed. The others stay, in case that these were a stranger's.
    ///
    /// # Errors
    /// [`IncomingError::Left`], once for each migration.
    pub fn left(&mut self, positions: &[usize]) -> Result<(), IncomingError> {
        let first = positions.iter().find_map(|at| {
            let known = self.known.get(*at)?;
            (!known.is_reported).then_some(known.role)
        });
        let error = first.map(|role| IncomingError::Left {
            role,
            main: self.classifier.has_main(),
            opened: self.opened(),
            missing: self.classifier.missing_channels().collect(),
            last_refusal: self.last_refusal.take(),
        });
        for at in positions.iter().rev() {
            if *at < self.known.len() {
                let Known { role, .. } = self.known.swap_remove(*at);
                self.classifier.release(role);
                self.refuse(Refusal::Left { role });
            }
        }
        if self.known.is_empty() && !positions.is_empty() {
            self.fail();
        }
        match error {
            Some(error) => {
                for known in &mut self.known {
                    known.is_reported = true;
                }
                Err(error)
            }
            None => Ok(()),
        }
    }

    /// Time has passed: refuses the connections that have been silent for too long.
    ///
    /// # Errors
    /// [`IncomingError::Incomplete`]: what was there is closed.
    pub fn check(&mut self, now: Instant) -> Result<(), IncomingError> {
        let limit = self.limits.greeting;
        let is_late = |u: &Unknown<C>| now.saturating_duration_since(u.since) >= limit;
        while self.unknown.front().is_some_and(is_late) {
            self.unknown.pop_front();
            self.refuse(Refusal::Silent { limit });
        }
        if self.due.is_some_and(|due| due <= now) && !self.is_complete() {
            let error = IncomingError::Incomplete {
                main: self.classifier.has_main(),
                opened: self.opened(),
                missing: self.classifier.missing_channels().collect(),
                last_refusal: self.last_refusal.take(),
            };
            self.fail();
            return Err(error);
        }
        Ok(())
    }

    /// When [`Collection::check`] has something to do next.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        let silent = self.unknown.front();
        let silent = silent.map(|u| deadline_from(u.since, self.limits.greeting));
        [silent, self.due].into_iter().flatten().min()
    }

    /// The next connection that was closed, for a log.
    pub fn next_refusal(&mut self) -> Option<Refusal> {
        self.refusals.pop_front()
    }

    /// Whether all connections are there.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.classifier.is_complete()
    }

    /// The main channel and multifd's in the order of their ids, when all are there. What is unknown
    /// then is closed.
    ///
    /// # Errors
    /// [`IncomingError::ChannelCount`] if the source has more channels; [`IncomingError::Incomplete`].
    pub fn finish(&mut self) -> Result<(C, Vec<C>), IncomingError> {
        if let (Some((channel, _)), Some(set)) = (self.surplus, &self.expected.0) {
            let channels = set.count();
            self.fail();
            return Err(IncomingError::ChannelCount { channel, channels });
        }
        let mut main = None;
        let mut channels = Vec::new();
        let opened = self.opened();
        let missing = self.classifier.missing_channels().collect();
        for Known {
            role, connection, ..
        } in self.known.drain(..)
        {
            match role {
                Role::Main => main = Some(connection),
                Role::Channel(id) => channels.push((id, connection)),
            }
        }
        channels.sort_unstable_by_key(|(id, _)| *id);
        let channels = channels.into_iter().map(|(_, channel)| channel).collect();
        let is_complete = self.is_complete();
        self.close();
        match main {
            Some(main) if is_complete => Ok((main, channels)),
            main => Err(IncomingError::Incomplete {
                main: main.is_some(),
                opened,
                missing,
                last_refusal: self.last_refusal.take(),
            }),
        }
    }

    /// Closes everything.
    pub fn close(&mut self) {
        self.unknown.clear();
        self.fail();
    }

    /// The channels that are there.
    fn opened(&self) -> Vec<ChannelId> {
        let mut opened: Vec<_> = self.known.iter().filter_map(|k| k.role.channel()).collect();
        opened.sort_unstable();
        opened
    }

    /// What is known is closed, and another migration may come.
    fn fail(&mut self) {
        self.known.clear();
        self.classifier = Classifier::new(self.expected.clone());
        self.due = None;
        self.surplus = None;
    }

    fn refuse(&mut self, refusal: Refusal) {
        self.last_refusal = Some(refusal.clone());
        self.refusals.push_back(refusal);
    }
}
