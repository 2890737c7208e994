//! The rules of ownership, without I/O: what is recorded of it, and what each request makes of the
//! record.
//!
//! Whoever stores the record reads it, asks [`hold`] or [`claim`], and writes the answer in one step
//! that fails if the record has changed meanwhile (under a lock, or in a transaction).

use std::fmt;

/// One side, for the life of its process: a random number, so that a process that was started again
/// is another owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner(u64);

impl Owner {
    /// The owner of this number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub(crate) const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Who owns the guest, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// Whose it is.
    pub owner: Owner,
    /// How often it has changed hands.
    pub generation: u64,
    /// How often the owner has renewed it: one that does not move for a term has run out.
    pub renewals: u64,
    /// The owner goes on alone, for good.
    pub alone: bool,
    /// The owner has a lock that ends with its process, which [`Lease::Gone`] is concluded from.
    /// Set by whoever stores the record.
    pub locked: bool,
}

/// What is known of another owner's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lease {
    /// It may be valid.
    Valid,
    /// It has not been renewed for its term: its owner has stopped its guest.
    Lapsed,
    /// The owner's process is gone, and its guest with it.
    Gone,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Granted, once this has replaced what was read.
    Write(Record),
    /// Refused for good.
    Lost(Owner),
    /// Refused as long as this owner's lease is valid.
    Wait(Owner),
}

/// The primary of a pair takes the lease, or renews it.
#[must_use]
pub fn hold(current: Option<Record>, me: Owner, lease: Lease) -> Verdict {
    match current {
        Some(r) if r.owner == me => Verdict::Write(Record {
            renewals: r.renewals.wrapping_add(1),
            alone: false,
            ..r
        }),
        // A survivor's ownership does not expire. It ends with its process.
        Some(r) if r.alone && lease != Lease::Gone => Verdict::Lost(r.owner),
        Some(r) if lease == Lease::Valid => Verdict::Wait(r.owner),
        other => Verdict::Write(next(other, me, false)),
    }
}

/// A side takes the guest for good.
#[must_use]
pub fn claim(current: Option<Record>, me: Owner, lease: Lease) -> Verdict {
    match current {
        Some(r) if r.owner == me => Verdict::Write(Record { alone: true, ..r }),
        // What its guest has done alone is not to be undone, not even by its death.
        Some(r) if r.alone => Verdict::Lost(r.owner),
        Some(r) if lease == Lease::Valid => Verdict::Wait(r.owner),
        other => Verdict::Write(next(other, me, true)),
    }
}

fn next(current: Option<Record>, owner: Owner, alone: bool) -> Record {
    Record {
        owner,
        generation: current.map_or(0, |r| r.generation).wrapping_add(1),
        renewals: 0,
        alone,
        locked: false,
    }
}

/// The most that [`Record::parse`] looks at, and exactly what [`Record::to_text`] gives, bytes: one
/// length for all records, so that a file is replaced by one write.
pub const TEXT_LEN: usize = 224;

const HEAD: &str = "colo-arbiter 1";

impl Record {
    /// As lines of text, filled up with spaces.
    #[must_use]
    pub fn to_text(&self, session: [u8; 16]) -> String {
        let state = if self.alone { "alone" } else { "paired" };
        let locked = if self.locked { "yes" } else { "no" };
        let text = format!(
            "{HEAD}\nsession {:032x}\nowner {}\ngeneration {}\nrenewals {}\nstate {state}\nlocked {locked}\n",
            u128::from_be_bytes(session),
            self.owner,
            self.generation,
            self.renewals,
        );
        format!("{text:<width$}\n", width = TEXT_LEN - 1)
    }

    /// Reads a record of `session`. Spaces at the end alone are none.
    ///
    /// # Errors
    /// See [`RecordError`].
    pub fn parse(text: &[u8], session: [u8; 16]) -> Result<Option<Self>, RecordError> {
        let text = text.get(..TEXT_LEN).unwrap_or(text);
        let text = std::str::from_utf8(text).map_err(|_| RecordError::Damaged)?;
        let text = text.trim_end_matches([' ', '\n', '\0']);
        if text.is_empty() {
            return Ok(None);
        }
        let mut lines = text.lines();
        if lines.next() != Some(HEAD) {
            return Err(RecordError::Damaged);
        }
        let mut field = |name: &str| {
            let (key, value) = lines.next()?.split_once(' ')?;
            (key == name).then_some(value)
        };
        let mut parsed = || {
            let other = u128::from_str_radix(field("session")?, 16).ok()?;
            let record = Self {
                owner: Owner(u64::from_str_radix(field("owner")?, 16).ok()?),
                generation: field("generation")?.parse().ok()?,
                renewals: field("renewals")?.parse().ok()?,
                alone: match field("state")? {
                    "alone" => true,
                    "paired" => false,
                    _ => return None,
                },
                locked: match field("locked")? {
                    "yes" => true,
                    "no" => false,
                    _ => return None,
                },
            };
            Some((other.to_be_bytes(), record))
        };
        match parsed() {
            None => Err(RecordError::Damaged),
            Some((other, _)) if other != session => Err(RecordError::OtherSession),
            Some((_, record)) => Ok(Some(record)),
        }
    }
}

/// Why a record cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It is not one, or was written in part. Nobody is granted anything until an operator has
    /// removed it.
    #[error("not an ownership record")]
    Damaged,
    /// It belongs to another pair.
    #[error("the record of another guest")]
    OtherSession,
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Owner = Owner::new(1);
    const B: Owner = Owner::new(2);
    const SESSION: [u8; 16] = [7; 16];

    fn written(verdict: Verdict) -> Record {
        match verdict {
            Verdict::Write(record) => record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_secondary_inherits_a_right_that_has_run_out_and_no_other() {
        let held = written(hold(None, A, Lease::Valid));
        assert_eq!(claim(Some(held), B, Lease::Valid), Verdict::Wait(A));
        let renewed = written(hold(Some(held), A, Lease::Valid));
        assert_eq!(renewed.generation, held.generation);
        assert_ne!(renewed.renewals, held.renewals);
        for lease in [Lease::Lapsed, Lease::Gone] {
            let won = written(claim(Some(renewed), B, lease));
            assert!(won.alone && won.owner == B);
            assert_eq!(won.generation, held.generation + 1);
            // The one that lost it does not get it back.
            for lease in [Lease::Valid, Lease::Lapsed] {
                assert_eq!(hold(Some(won), A, lease), Verdict::Lost(B));
                assert_eq!(claim(Some(won), A, lease), Verdict::Lost(B));
            }
        }
    }

    #[test]
    fn what_a_primary_has_claimed_is_never_inherited() {
        let held = written(hold(None, A, Lease::Valid));
        let alone = written(claim(Some(held), A, Lease::Valid));
        for lease in [Lease::Valid, Lease::Lapsed, Lease::Gone] {
            assert_eq!(claim(Some(alone), B, lease), Verdict::Lost(A));
        }
        // The survivor may form a new pair, and a new guest may begin once it is gone.
        assert!(!written(hold(Some(alone), A, Lease::Valid)).alone);
        assert_eq!(hold(Some(alone), B, Lease::Lapsed), Verdict::Lost(A));
        assert_eq!(written(hold(Some(alone), B, Lease::Gone)).owner, B);
    }

    #[test]
    fn a_record_survives_its_text_and_nothing_else_is_one() {
        for alone in [false, true] {
            let record = Record {
                owner: Owner::new(u64::MAX),
                generation: u64::MAX,
                renewals: u64::MAX,
                alone,
                locked: !alone,
            };
            let text = record.to_text(SESSION);
            assert_eq!(text.len(), TEXT_LEN);
            assert_eq!(Record::parse(text.as_bytes(), SESSION), Ok(Some(record)));
            let other = Record::parse(text.as_bytes(), [8; 16]);
            assert_eq!(other, Err(RecordError::OtherSession));
            // Written in part: spaces follow whatever the cut has left.
            let content = text.trim_end().len();
            for cut in 1..content - 1 {
                let part = Record::parse(&text.as_bytes()[..cut], SESSION);
                assert!(part.is_err(), "{cut}: {part:?}");
            }
        }
        assert_eq!(Record::parse(b"", SESSION), Ok(None));
        assert_eq!(
            Record::parse(b"\xff\xfe", SESSION),
            Err(RecordError::Damaged)
        );
    }
}
