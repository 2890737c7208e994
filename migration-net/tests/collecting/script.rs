//! A collection of connections under a script of bytes, against what must hold whatever the peers do.
//! The tests run it on random scripts, and the fuzz target on those that it finds.

use std::io;
use std::time::{Duration, Instant};

use migration_net::incoming::{Collection, IncomingError, Limits, Refusal, Role};
use multifd::packet::Hello;
use multifd::{ChannelCount, ChannelId, MultifdConfig};

const UUID: [u8; 16] = [7; 16];
const GRACE: Duration = Duration::from_secs(1);
const GREETING: Duration = Duration::from_secs(10);
const COMPLETE: Duration = Duration::from_secs(15);
const UNKNOWN: usize = 6;

/// A connection of the model: what its peer will say, and what was read of it.
#[derive(Debug)]
struct Connection {
    number: usize,
    since: Instant,
    says: Vec<u8>,
    sent: usize,
    read: usize,
    ended: bool,
    broken: bool,
}

/// What a script has led to, to see that scripts lead everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Migrations that were complete.
    pub complete: usize,
    /// Connections that gave way.
    pub crowded: usize,
    /// Connections that were silent for too long.
    pub silent: usize,
    /// Migrations whose connections left, or did not come.
    pub failed: usize,
    /// Sources with more channels than are wanted.
    pub surplus: usize,
}

/// Runs a script.
///
/// # Panics
/// Something did not hold.
pub fn run(script: &[u8]) -> Outcome {
    let mut bytes = script.iter().copied();
    let mut next = move || bytes.next();
    let channels = ChannelCount::new(next().unwrap_or(0) % 4);
    let config = channels.map(|channels| MultifdConfig::new(channels).uuid(UUID));
    let limits = Limits::default()
        .greeting(GREETING)
        .complete(COMPLETE)
        .channel(COMPLETE)
        .unknown(UNKNOWN)
        .grace(GRACE);
    let mut model = Model {
        collection: Collection::new(config.as_ref(), limits),
        wanted: channels.map_or(0, ChannelCount::get),
        now: Instant::now(),
        accepted: 0,
        outcome: Outcome::default(),
    };
    while let Some(action) = next() {
        let argument = next().unwrap_or(0);
        model.act(action, argument);
        model.check();
    }
    model.outcome
}

struct Model {
    collection: Collection<Connection>,
    wanted: u8,
    now: Instant,
    accepted: usize,
    outcome: Outcome,
}

impl Model {
    fn act(&mut self, action: u8, argument: u8) {
        match action % 8 {
            0 | 1 => self.connect(argument),
            2 => self.speak(argument, usize::from(argument % 5) * 16 + 1),
            3 => self.speak(argument, 64),
            4 => self.end(argument, action & 8 != 0),
            5 => self.leave(argument),
            6 => self.pass(Duration::from_millis(u64::from(argument) * 20)),
            _ => self.exhaust(),
        }
    }

    /// A peer connects. It is accepted if the collection wants it.
    fn connect(&mut self, kind: u8) {
        if let Some(from) = self.collection.accepts_from(self.now) {
            assert!(
                from > self.now && from <= self.now + GRACE,
                "nobody is kept out for longer"
            );
            return;
        }
        let hello = |uuid, id| {
            Hello {
                uuid,
                channel: ChannelId::new(id),
            }
            .encode()
            .to_vec()
        };
        let says = match kind % 8 {
            0 | 1 => b"QEVM".to_vec(),
            2..=4 => hello(UUID, kind / 8 % 4),
            5 => hello([9; 16], 0),
            6 => b"GET / HTTP/1.1\r\n".to_vec(),
            _ => Vec::new(),
        };
        let connection = Connection {
            number: self.accepted,
            since: self.now,
            says,
            sent: 0,
            read: 0,
            ended: false,
            broken: false,
        };
        let number = self.accepted;
        self.accepted += 1;
        let before: Vec<_> = self.unknown();
        self.collection.accepted(connection, self.now);
        let after = self.unknown();
        assert_eq!(
            after.last().map(|(n, _)| *n),
            Some(number),
            "whoever is wanted is taken"
        );
        self.gave_way(&before, &after);
    }

    /// The numbers of the unknown connections, and when they came.
    fn unknown(&self) -> Vec<(usize, Instant)> {
        let unknown = self.collection.unknown();
        unknown.map(|c| (c.number, c.since)).collect()
    }

    /// At most one has, of the younger half, after its grace.
    fn gave_way(&self, before: &[(usize, Instant)], after: &[(usize, Instant)]) {
        let gone: Vec<_> = (before.iter().enumerate())
            .filter(|(_, (number, _))| after.iter().all(|(n, _)| n != number))
            .collect();
        assert!(gone.len() <= 1);
        for (at, (_, since)) in gone {
            assert!(at >= before.len() / 2, "one of the older half gave way");
            assert!(self.now - *since >= GRACE, "it had no time");
        }
    }

    /// The peer of an unknown connection sends some of what it says, and is heard.
    fn speak(&mut self, which: u8, len: usize) {
        self.hear(which, |connection| {
            connection.sent = (connection.sent + len).min(connection.says.len());
        });
    }

    fn end(&mut self, which: u8, broken: bool) {
        self.hear(which, |connection| {
            connection.ended = true;
            connection.broken = broken;
        });
    }

    fn hear(&mut self, which: u8, what: impl FnOnce(&mut Connection)) {
        let unknown = self.collection.unknown().len();
        if unknown == 0 {
            return;
        }
        let index = usize::from(which) % unknown;
        let mut what = Some(what);
        let known = self.collection.known().len();
        let mut was_asked_for_nothing = false;
        let left = self.collection.hear(index, self.now, |connection, room| {
            if let Some(what) = what.take() {
                what(connection);
            }
            was_asked_for_nothing |= room.is_empty();
            let there = connection
                .says
                .get(connection.read..connection.sent)
                .unwrap_or_default();
            let n = there.len().min(room.len());
            if n == 0 {
                return match (connection.broken, connection.ended) {
                    (true, _) => Err(io::ErrorKind::ConnectionReset.into()),
                    (_, true) => Ok(Some(0)),
                    _ => Ok(None),
                };
            }
            room[..n].copy_from_slice(&there[..n]);
            connection.read += n;
            Ok(Some(n))
        });
        assert!(!was_asked_for_nothing, "no room is no end");
        assert_eq!(self.collection.unknown().len(), unknown - usize::from(left));
        assert!(self.collection.known().len() <= known + 1);
        self.finish();
    }

    /// All are there: they are taken out.
    fn finish(&mut self) {
        if !self.collection.is_complete() {
            return;
        }
        match self.collection.finish() {
            Ok((main, channels)) => {
                assert_eq!((main.says.as_slice(), main.read), (&b"QEVM"[..], 4));
                assert_eq!(channels.len(), usize::from(self.wanted));
                for (id, channel) in (0..).zip(&channels) {
                    assert_eq!((channel.says[24], channel.read), (id, 64));
                }
                self.outcome.complete += 1;
            }
            Err(IncomingError::ChannelCount { channel, channels }) => {
                assert!(channel.get() >= channels.get());
                self.outcome.surplus += 1;
            }
            Err(error) => panic!("{error:?}"),
        }
        assert_eq!(self.collection.known().len(), 0);
    }

    /// Known connections are closed by their peers.
    fn leave(&mut self, which: u8) {
        let known = self.collection.known().len();
        let positions: Vec<_> = (0..known).filter(|at| which >> (at % 8) & 1 == 1).collect();
        let left = self.collection.left(&positions);
        assert_eq!(self.collection.known().len(), known - positions.len());
        if let Err(error) = left {
            assert!(!positions.is_empty());
            self.failed(&error);
        }
    }

    fn failed(&mut self, error: &IncomingError) {
        assert!(error.is_of_the_source());
        let (main, opened, missing) = match error {
            IncomingError::Left {
                main,
                opened,
                missing,
                ..
            }
            | IncomingError::Incomplete {
                main,
                opened,
                missing,
                ..
            } => (*main, opened, missing),
            other => panic!("{other:?}"),
        };
        assert_eq!(opened.len() + missing.len(), usize::from(self.wanted));
        assert!(!main || !missing.is_empty(), "nothing is missing");
        self.outcome.failed += 1;
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        if let Err(error) = self.collection.check(self.now) {
            self.failed(&error);
            assert_eq!(self.collection.known().len(), 0);
        }
        for (_, since) in self.unknown() {
            assert!(self.now - since < GREETING, "it was silent for too long");
        }
        assert!(self.collection.deadline().is_none_or(|at| at > self.now));
    }

    /// The host has no descriptor for the next connection.
    fn exhaust(&mut self) {
        let before = self.unknown();
        self.collection
            .exhausted(io::Error::other("no descriptors"), self.now);
        self.gave_way(&before, &self.unknown());
        assert!(
            self.collection.accepts_from(self.now).is_some(),
            "it would spin"
        );
    }

    fn check(&mut self) {
        while let Some(refusal) = self.collection.next_refusal() {
            match refusal {
                Refusal::Crowded { .. } => self.outcome.crowded += 1,
                Refusal::Silent { limit } => {
                    assert_eq!(limit, GREETING);
                    self.outcome.silent += 1;
                }
                _ => {}
            }
        }
        let unknown = self.collection.unknown().len();
        assert!(unknown <= UNKNOWN + 1 + usize::from(self.wanted));
        let mut roles: Vec<_> = self.collection.known().map(|(role, _)| role).collect();
        let all = roles.len();
        roles.sort_by_key(|role| match role {
            Role::Main => -1,
            Role::Channel(id) => i16::from(id.get()),
        });
        roles.dedup();
        assert_eq!(roles.len(), all, "a role is taken twice");
        assert!(!self.collection.is_complete());
    }
}
