//! Ownership in a *register*: one value on a service that both sides reach, which is read as of now
//! and replaced only by who knows its present version. etcd has such, as have ZooKeeper, Consul and
//! databases; whoever implements [`Register`] for one has an arbiter in [`RegisterArbiter`].
//!
//! What is in it is an [`Entry`]: the [`Record`] with a mark. An owner renews its lease by *reading*
//! that the entry is its own and unmarked, which costs the service no write, however long a pair
//! lives. A claimant *asks* first, by marking the entry. An owner that lives sees the mark
//! when it renews the next time, and takes it off. A mark that has stood for a term says that the
//! owner has not renewed since it was set, and so has stopped its guest: then another may take it.
//!
//! ```text
//!        owner                     register                    claimant
//!          |-- read -------------> A, unmarked                     |
//!          |   renewed             |                               |
//!          |                       | <------- read, replace -------|
//!          |-- read -------------> A, asked                        |
//!          |-- replace ----------> A, unmarked (2 renewals)        |
//!          |   renewed             | <---------------------- read -|  it lives: ask again
//!          |                       A, asked                        |
//!          x                       | <------ read, many times -----|  unchanged for a term
//!                                  B, alone <---------- replace ---|
//! ```
//!
//! Only the claimant's own monotonic clock measures the term, from when it has read the mark. No
//! clock of the service's is relied on, nor a lease that it ends by itself. Every replacement names
//! the version it replaces, so one whose answer is lost may be tried again, and one that arrives late
//! does nothing if anything has happened since.
//!
//! [`Seat`] decides without I/O what is to be done about what was read; `tests/arbitration` tries it in
//! every order of requests, answers that are lost and replacements that take effect late.

use std::fmt::Write;
use std::thread;
use std::time::{Duration, Instant};

use super::record::{self, Lease, Owner, Record, RecordError, TEXT_LEN, Verdict};
use super::{Answer, Arbiter, ArbiterError, Grant, POLL};

/// What has been said about a record since its owner wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mark {
    /// Nothing.
    #[default]
    None,
    /// Somebody else wants to know whether the owner still renews it.
    Asked,
    /// The owner has given it up: its guest stands still for good.
    Released,
}

impl Mark {
    const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Asked => "asked",
            Self::Released => "released",
        }
    }
}

/// What the register has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Who owns the guest.
    pub record: Record,
    /// What has been said since.
    pub mark: Mark,
}

/// The most that [`Entry::parse`] takes for one, bytes.
pub const ENTRY_LEN: usize = TEXT_LEN + 16;

impl Entry {
    /// As lines of text: the record's, and one for the mark.
    #[must_use]
    pub fn to_text(&self, session: [u8; 16]) -> String {
        let mut text = self.record.to_text(session);
        // Writing to a string does not fail.
        let _ = writeln!(text, "mark {}", self.mark.word());
        text
    }

    /// Reads an entry of `session`.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn parse(text: &[u8], session: [u8; 16]) -> Result<Self, RecordError> {
        let (record, mark) = match text.split_at_checked(TEXT_LEN) {
            Some(parts) if text.len() <= ENTRY_LEN => parts,
            _ => return Err(RecordError::Damaged),
        };
        let record = Record::parse(record, session)?.ok_or(RecordError::Damaged)?;
        let mark = match mark {
            b"mark none\n" => Mark::None,
            b"mark asked\n" => Mark::Asked,
            b"mark released\n" => Mark::Released,
            _ => return Err(RecordError::Damaged),
        };
        Ok(Self { record, mark })
    }
}

/// What a side wants of its [`Seat`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Want {
    /// A primary's lease, or its renewal.
    Hold,
    /// The guest for good.
    Claim,
    /// To give it up.
    Release,
}

/// What is to be done about what was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// Nothing more: the guest is this side's, by what was read.
    Won(Grant),
    /// Nothing more: it is another's for good.
    Lost(Owner),
    /// Nothing more: this side has nothing that it could give up.
    Released,
    /// This has to replace the version that was read. If it does, [`Seat::replaced`] knows more, and
    /// if not, the register has to be read again.
    Replace(Entry),
    /// It is to be read again, a little later.
    Wait,
}

/// One side's part, without I/O.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Seat {
    me: Owner,
    term: Duration,
    /// The version that stands unanswered, and when that was first read.
    standing: Option<(u64, Instant)>,
    /// The owner that has taken a mark off since [`Seat::begin`].
    lives: Option<Owner>,
    /// A mark was seen, or set, since [`Seat::begin`].
    asked: bool,
    /// The guest was won for good, and runs perhaps.
    alone: bool,
}

impl Seat {
    /// The seat of `me`. A lease lasts for `term` after it was renewed, the same on both sides.
    #[must_use]
    pub const fn new(me: Owner, term: Duration) -> Self {
        Self {
            me,
            term,
            standing: None,
            lives: None,
            asked: false,
            alone: false,
        }
    }

    /// A new request begins. What was learnt for the last one is not forgotten.
    pub const fn begin(&mut self) {
        self.lives = None;
        self.asked = false;
    }

    /// What is to be done about a register that was read. `version` is the entry's, or the one by
    /// which its absence is known; `sent` is when the reading began, and `now` is after it.
    pub fn judge(
        &mut self,
        want: Want,
        version: u64,
        entry: Option<Entry>,
        sent: Instant,
        now: Instant,
    ) -> Next {
        if want == Want::Release {
            return self.release(entry);
        }
        let unanswered = match entry {
            // A record that is gone may be one that somebody still relies on.
            None => self.observe(version, now),
            Some(e) if e.record.owner != self.me && e.mark == Mark::Asked => {
                self.asked = true;
                self.observe(version, now)
            }
            Some(e) => {
                if e.record.owner != self.me && self.asked {
                    self.lives = Some(e.record.owner);
                }
                self.standing = None;
                false
            }
        };
        let own = |e: &Entry| e.record.owner == self.me && e.mark == Mark::None;
        let lease = match entry.map(|e| e.mark) {
            Some(Mark::Released) => Lease::Gone,
            Some(_) if unanswered => Lease::Lapsed,
            _ => Lease::Valid,
        };
        let current = entry.map(|e| e.record);
        let verdict = match (want, entry) {
            (Want::Hold, Some(e)) if own(&e) && !e.record.alone => return self.won(e.record, sent),
            (Want::Claim, Some(e)) if own(&e) && e.record.alone => return self.won(e.record, sent),
            (Want::Claim, None) if !unanswered => return Next::Wait,
            (Want::Hold, _) => record::hold(current, self.me, lease),
            _ => record::claim(current, self.me, lease),
        };
        match (verdict, entry) {
            (Verdict::Write(record), _) => Next::Replace(Entry {
                record,
                mark: Mark::None,
            }),
            (Verdict::Lost(owner), _) => Next::Lost(owner),
            (Verdict::Wait(_), Some(e)) if e.mark == Mark::None => Next::Replace(Entry {
                mark: Mark::Asked,
                ..e
            }),
            (Verdict::Wait(_), _) => Next::Wait,
        }
    }

    /// `entry` has replaced what was read; `sent` is when the replacement was sent. If that is not
    /// yet what was wanted, the register has to be read again.
    pub fn replaced(&mut self, entry: Entry, sent: Instant) -> Option<Next> {
        match entry {
            Entry {
                mark: Mark::Asked, ..
            } => {
                self.asked = true;
                None
            }
            Entry {
                mark: Mark::Released,
                ..
            } => Some(Next::Released),
            Entry { record, .. } => Some(self.won(record, sent)),
        }
    }

    /// Time is up for a request of which the last that was known is [`Next::Wait`]: has an owner
    /// shown meanwhile that it lives?
    #[must_use]
    pub fn resigns(&self, now: Instant) -> Option<Owner> {
        // An owner asks four times in a term. One that has been silent for half of it may be gone.
        let silent = self
            .standing
            .is_some_and(|(_, since)| now.saturating_duration_since(since) > self.term / 2);
        self.lives.filter(|_| !silent)
    }

    fn won(&mut self, record: Record, sent: Instant) -> Next {
        self.alone |= record.alone;
        Next::Won(Grant {
            generation: record.generation,
            until: (!record.alone).then(|| super::until(sent, self.term)),
        })
    }

    fn release(&self, entry: Option<Entry>) -> Next {
        match entry {
            Some(e) if e.record.owner == self.me && e.mark != Mark::Released => {
                Next::Replace(Entry {
                    record: Record {
                        // What a guest has done alone stays its own. A claim of whose success
                        // this side has not heard was used by nobody.
                        alone: e.record.alone && self.alone,
                        ..e.record
                    },
                    mark: Mark::Released,
                })
            }
            _ => Next::Released,
        }
    }

    /// Has this version stood for a term?
    fn observe(&mut self, version: u64, now: Instant) -> bool {
        match self.standing {
            Some((same, since)) if same == version => {
                now.saturating_duration_since(since) >= self.term
            }
            _ => {
                self.standing = Some((version, now));
                false
            }
        }
    }
}

/// What was read of a register. The default is a value that is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Which value it is. Another number with every replacement, and none that ever comes again,
    /// but for that of a value that is not there.
    pub version: u64,
    /// The value, `None` if there is none.
    pub value: Option<Vec<u8>>,
}

/// A value that several read and replace. Nothing waits for longer than until the deadline; what was
/// attempted until then may take effect later.
pub trait Register: Send {
    /// What it is, for reports.
    fn kind(&self) -> &'static str;

    /// Reads it, as it is at some moment between the call and its return (*linearizably*).
    ///
    /// # Errors
    /// It was not read.
    fn read(&mut self, deadline: Instant) -> Result<Content, ArbiterError>;

    /// Replaces `version` by `text`, in one step that does nothing where another version is there;
    /// says whether it was replaced.
    ///
    /// # Errors
    /// It is not known whether it was replaced, or will be.
    fn replace(
        &mut self,
        version: u64,
        text: &str,
        deadline: Instant,
    ) -> Result<bool, ArbiterError>;
}

/// An arbiter out of a [`Register`].
#[derive(Debug)]
pub struct RegisterArbiter<R> {
    register: R,
    session: [u8; 16],
    seat: Seat,
}

impl<R: Register> RegisterArbiter<R> {
    /// The ownership of the guest of `session` in this register. `term` is how long a lease lasts that
    /// is not renewed, the same on both sides.
    pub const fn new(register: R, session: [u8; 16], me: Owner, term: Duration) -> Self {
        Self {
            register,
            session,
            seat: Seat::new(me, term),
        }
    }

    fn step(&mut self, want: Want, deadline: Instant) -> Result<Option<Next>, ArbiterError> {
        let sent = Instant::now();
        let Content { version, value } = self.register.read(deadline)?;
        let entry = value
            .map(|text| Entry::parse(&text, self.session))
            .transpose()
            .map_err(|e| {
                let what = format!("using what {} has", self.register.kind());
                ArbiterError::because(what, e)
            })?;
        match self.seat.judge(want, version, entry, sent, Instant::now()) {
            Next::Replace(entry) => {
                let sent = Instant::now();
                let text = entry.to_text(self.session);
                let replaced = self.register.replace(version, &text, deadline)?;
                Ok(if replaced {
                    self.seat.replaced(entry, sent)
                } else {
                    None
                })
            }
            next => Ok(Some(next)),
        }
    }

    fn ask(&mut self, want: Want, deadline: Instant) -> Answer {
        // A claimant looks often enough to lose little of a term, and no more often.
        let pause = (self.seat.term / 32).clamp(POLL, POLL * 10);
        self.seat.begin();
        loop {
            match self.step(want, deadline) {
                Err(error) => return Answer::Unreachable(error),
                Ok(Some(Next::Won(grant))) => return Answer::Won(grant),
                Ok(Some(Next::Lost(owner))) => return Answer::Lost(owner),
                Ok(Some(Next::Released | Next::Replace(_) | Next::Wait) | None) => {}
            }
            let now = Instant::now();
            if now >= deadline {
                return match self.seat.resigns(now) {
                    Some(owner) => Answer::Lost(owner),
                    None => Answer::Unreachable(ArbiterError::new(
                        "the time was too short to see whether the owner has gone",
                    )),
                };
            }
            thread::sleep(pause.min(deadline.saturating_duration_since(now)));
        }
    }
}

impl<R: Register> Arbiter for RegisterArbiter<R> {
    fn kind(&self) -> &'static str {
        self.register.kind()
    }

    fn term(&self) -> Option<Duration> {
        Some(self.seat.term)
    }

    fn hold(&mut self, deadline: Instant) -> Answer {
        self.ask(Want::Hold, deadline)
    }

    fn claim(&mut self, deadline: Instant) -> Answer {
        self.ask(Want::Claim, deadline)
    }

    fn release(&mut self, deadline: Instant) {
        loop {
            match self.step(Want::Release, deadline) {
                Ok(Some(_)) => return,
                // Somebody has marked it meanwhile, or it is out of reach for the moment.
                Ok(None) | Err(_) if Instant::now() < deadline => thread::sleep(POLL),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "the lease was not given up and has to expire");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
