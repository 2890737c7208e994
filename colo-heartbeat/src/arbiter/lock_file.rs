//! Ownership as a file on storage that both hosts have.
//!
//! Two locks of the kind that belongs to an open file (`F_OFD_SETLK`, Linux 3.15) are in it. Byte 0
//! is held while ownership changes hands; byte 1 for as long as the process of the record's owner
//! lives. Whoever gets byte 1 knows that the owner's process is gone. An owner that lives but does not
//! renew (it is stopped, or has lost the storage) is known by a record and a *beat* that do not change
//! for a term of the observer's own monotonic clock: no two clocks are compared.
//!
//! An owner renews without byte 0, because it may be stopped at any moment, and would keep the lock. So it
//! and a claimant write and then look, each at what the other writes:
//!
//! | owner, renewing | claimant, when nothing has changed for a term |
//! |---|---|
//! | writes its beat | writes the record |
//! | looks at the record: is it still its own? | looks at the beat: has it moved? |
//!
//! One of the two sees the other. A beat that has not moved: whoever moves it later finds the record
//! another's. One that has: the owner may have looked before the record was written, and its lease
//! lasts a term from before that at most; the claimant waits for a term then.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::record::{self, Lease, Owner, Record, TEXT_LEN, Verdict};
use super::{Answer, Arbiter, ArbiterError, Grant, POLL};

/// Held while the record is read and written.
const RECORD: libc::off_t = 0;
/// Held while the owner lives.
const ALIVE: libc::off_t = 1;
/// The first of those that a side locks for itself.
const OWN: libc::off_t = 2;

/// Where the beat is: a sector behind the record's, so that neither is damaged by a write of the other.
const BEAT_AT: u64 = 512;
/// Its length, bytes.
const BEAT_LEN: usize = 64;

/// An arbiter in a file that both hosts have.
///
/// On a file system whose locks work across its hosts, the death of an owner is known at once. On NFS 4 the
/// server releases a dead host's locks after its own lease (90 s on Linux). Until then the owner's beat in the
/// file decides, after the term: the term has to be shorter than that lease, and the mount must not have
/// `nolock` or `local_lock`.
///
/// A process that is stopped while it *claims* blocks other claims until it goes on or ends. A process that is
/// stopped while it renews blocks nobody.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    session: [u8; 16],
    me: Owner,
    term: Duration,
    /// Opened at the first request, so that storage that is not there yet is only unreachable.
    file: Option<Arc<File>>,
    /// This side holds byte 1.
    alive: bool,
    /// The record of this side's lease, and how often it was renewed.
    held: Option<(Record, u64)>,
    /// This side has written itself over an owner that lives, whose beat was this; whether that has
    /// moved since is still to be looked at.
    taken: Option<Beat>,
}

type Beat = Vec<u8>;

impl LockFile {
    /// Returns the arbiter in the file at `path` for the guest of `session`. The file is made at its first use.
    /// `term` is how long a lease lasts without renewal, the same on both sides.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, session: [u8; 16], me: Owner, term: Duration) -> Self {
        Self {
            path: path.into(),
            session,
            me,
            term,
            file: None,
            alive: false,
            held: None,
            taken: None,
        }
    }

    fn error(&self, what: &str, source: impl Into<io::Error>) -> ArbiterError {
        ArbiterError::because(format!("{what} {}", self.path.display()), source.into())
    }

    fn open(&mut self) -> Result<Arc<File>, ArbiterError> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.path)
            .map_err(|e| self.error("opening", e))?;
        let file = Arc::new(file);
        self.file = Some(Arc::clone(&file));
        // Its locks are another's.
        self.alive = false;
        self.held = None;
        self.taken = None;
        Ok(file)
    }

    /// Reads the record, has `decide` say what is to become of it, and writes that.
    fn exchange(
        &mut self,
        deadline: Instant,
        observed: &mut Observed,
        decide: fn(Option<Record>, Owner, Lease) -> Verdict,
    ) -> Result<Verdict, ArbiterError> {
        self.held = None;
        let file = &*self.open()?;
        let locked = Locked::wait(file, deadline).map_err(|e| self.error("locking", e))?;
        if locked.is_none() {
            return Err(self.error("waiting for", io::ErrorKind::TimedOut));
        }
        // A lock in a file that nobody else finds any more is none.
        if !is_at(file, &self.path) {
            self.file = None;
            self.alive = false;
            let what = format!("{} was removed or replaced", self.path.display());
            return Err(ArbiterError::new(what));
        }
        let current = self.record(file)?;
        let beat = self.beat(file)?;
        // An attempt at byte 1 is at the same time the question whether its holder lives.
        let mine = self.alive;
        let free = mine || lock(file, ALIVE).map_err(|e| self.error("locking", e))?;
        let lease = match current {
            Some(r) if r.owner != self.me && r.locked && free && !mine => Lease::Gone,
            Some(r) if r.owner != self.me => observed.lease(r, &beat, self.term),
            _ => Lease::Valid,
        };
        let mut verdict = decide(current, self.me, lease);
        if let Verdict::Write(record) = &mut verdict {
            if !record.alone && !free {
                // Who holds by a lease has to be known as gone when it is.
                verdict = Verdict::Wait(current.map_or(self.me, |r| r.owner));
            } else {
                record.locked = free;
                if current.is_none() {
                    // A renewal is not to fail for want of space.
                    self.write(file, &[b' '; BEAT_LEN], BEAT_AT)?;
                }
                // Before: what fails may have been written all the same.
                if lease == Lease::Lapsed {
                    self.taken = Some(beat);
                }
                self.write(file, record.to_text(self.session).as_bytes(), 0)?;
            }
        }
        let owns = matches!(verdict, Verdict::Write(_));
        if free && !owns {
            unlock(file, ALIVE);
        }
        self.alive = free && owns;
        self.held = match verdict {
            Verdict::Write(record) if !record.alone => Some((record, 0)),
            _ => None,
        };
        Ok(verdict)
    }

    /// Renews this side's lease, without the lock that another needs to take it. `None` if it has none,
    /// or if the record is not as this side has written it.
    fn renew(&mut self) -> Result<Option<Record>, ArbiterError> {
        if self.held.is_none() {
            return Ok(None);
        }
        self.write_beat()?;
        self.held_record()
    }

    /// Says that this owner lives.
    fn write_beat(&mut self) -> Result<(), ArbiterError> {
        let Some((record, beats)) = &mut self.held else {
            return Ok(());
        };
        *beats = beats.wrapping_add(1);
        let text = format!("beat {} {} {beats}", record.owner, record.generation);
        let text = format!("{text:<width$}\n", width = BEAT_LEN - 1);
        let file = self.open()?;
        self.write(&file, text.as_bytes(), BEAT_AT)
    }

    /// The record of this side's lease, if that is the file's.
    fn held_record(&self) -> Result<Option<Record>, ArbiterError> {
        let (Some((held, _)), Some(file)) = (self.held, self.file.as_deref()) else {
            return Ok(None);
        };
        if !is_at(file, &self.path) {
            return Ok(None);
        }
        self.refresh(file)?;
        // Another's that is half written is not this side's either.
        let now = self.record(file).ok().flatten();
        Ok(now.filter(|now| *now == held))
    }

    /// Waits until a guest that was taken from an owner that lives is this side's alone.
    fn wait_for_the_other(&mut self) -> Result<(), ArbiterError> {
        if let Some(until) = self.other_may_run_until()? {
            thread::sleep(until.saturating_duration_since(Instant::now()));
        }
        self.taken = None;
        Ok(())
    }

    /// When the lease ends that an owner may have renewed before it could see that it was taken.
    fn other_may_run_until(&self) -> Result<Option<Instant>, ArbiterError> {
        let (Some(seen), Some(file)) = (&self.taken, self.file.as_deref()) else {
            return Ok(None);
        };
        let written = Instant::now();
        self.refresh(file)?;
        let has_moved = self.beat(file)? != *seen;
        Ok(has_moved.then(|| migration_stream::io::deadline_from(written, self.term)))
    }

    fn record(&self, file: &File) -> Result<Option<Record>, ArbiterError> {
        let text = read(file, 0, TEXT_LEN).map_err(|e| self.error("reading", e))?;
        Record::parse(&text, self.session)
            .map_err(|e| ArbiterError::because(format!("using {}", self.path.display()), e))
    }

    fn beat(&self, file: &File) -> Result<Beat, ArbiterError> {
        read(file, BEAT_AT, BEAT_LEN).map_err(|e| self.error("reading", e))
    }

    fn write(&self, file: &File, text: &[u8], at: u64) -> Result<(), ArbiterError> {
        file.write_all_at(text, at)
            .and_then(|()| file.sync_data())
            .map_err(|e| self.error("writing", e))
    }

    /// Makes what is read next what the storage has now: a client of NFS forgets what it has read when
    /// it is given a lock. Nobody else asks for this one.
    fn refresh(&self, file: &File) -> Result<(), ArbiterError> {
        let own =
            libc::off_t::try_from(self.me.number() & (u64::MAX >> 2)).unwrap_or_default() + OWN;
        lock(file, own).map_err(|e| self.error("locking", e))?;
        unlock(file, own);
        Ok(())
    }

    fn won(&self, record: Record, asked: Instant) -> Answer {
        Answer::Won(Grant {
            generation: record.generation,
            until: (!record.alone).then(|| super::until(asked, self.term)),
        })
    }

    fn ask(
        &mut self,
        deadline: Instant,
        decide: fn(Option<Record>, Owner, Lease) -> Verdict,
    ) -> Answer {
        let mut observed = Observed::default();
        loop {
            let asked = Instant::now();
            let verdict = match self.exchange(deadline, &mut observed, decide) {
                Ok(verdict) => verdict,
                Err(error) => return Answer::Unreachable(error),
            };
            match verdict {
                Verdict::Write(record) => {
                    return match self.wait_for_the_other() {
                        Ok(()) => self.won(record, asked),
                        Err(error) => Answer::Unreachable(error),
                    };
                }
                Verdict::Lost(owner) => return Answer::Lost(owner),
                Verdict::Wait(owner) if Instant::now() >= deadline => return Answer::Lost(owner),
                Verdict::Wait(_) => thread::sleep(POLL),
            }
        }
    }
}

/// Up to `len` bytes from `at` on, less at the file's end.
fn read(file: &File, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut text = vec![0; len];
    let mut len = 0;
    while let Some(rest) = text.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    text.truncate(len);
    Ok(text)
}

/// Since when another's record and beat have been the same.
#[derive(Debug, Default)]
struct Observed(Option<(Record, Beat, Instant)>);

impl Observed {
    fn lease(&mut self, record: Record, beat: &Beat, term: Duration) -> Lease {
        match &self.0 {
            Some((same, still, since)) if *same == record && still == beat => {
                if since.elapsed() >= term {
                    Lease::Lapsed
                } else {
                    Lease::Valid
                }
            }
            _ => {
                // From when it has been read on: it may have been written a moment before.
                self.0 = Some((record, beat.clone(), Instant::now()));
                Lease::Valid
            }
        }
    }
}

impl Arbiter for LockFile {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn term(&self) -> Option<Duration> {
        Some(self.term)
    }

    fn hold(&mut self, deadline: Instant) -> Answer {
        let asked = Instant::now();
        match self.renew() {
            Ok(Some(record)) => self.won(record, asked),
            Ok(None) => self.ask(deadline, record::hold),
            Err(error) => Answer::Unreachable(error),
        }
    }

    fn claim(&mut self, deadline: Instant) -> Answer {
        self.ask(deadline, record::claim)
    }

    fn release(&mut self, _deadline: Instant) {
        // The locks go with the file; an owner without byte 1 is gone.
        self.file = None;
        self.alive = false;
        self.held = None;
        self.taken = None;
    }
}

/// Is the file the one at this path?
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;

    match (file.metadata(), path.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// The record's lock, for as long as it lives.
struct Locked<'a>(&'a File);

impl<'a> Locked<'a> {
    fn wait(file: &'a File, deadline: Instant) -> Result<Option<Self>, Errno> {
        while !lock(file, RECORD)? {
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(POLL / 10);
        }
        Ok(Some(Self(file)))
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        unlock(self.0, RECORD);
    }
}

/// Takes the exclusive lock of a byte; false if another open file has it.
fn lock(file: &File, byte: libc::off_t) -> Result<bool, Errno> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, byte))) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(e),
    }
}

fn unlock(file: &File, byte: libc::off_t) {
    if let Err(error) = fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_UNLCK, byte))) {
        tracing::warn!(%error, byte, "a lock was not released");
    }
}

fn range(kind: libc::c_int, start: libc::off_t) -> libc::flock {
    libc::flock {
        // F_WRLCK and F_UNLCK are 1 and 2.
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: 0, // SEEK_SET
        l_start: start,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: [u8; 16] = [3; 16];
    const TERM: Duration = Duration::from_millis(400);

    fn path(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("colo-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        path
    }

    fn side(path: &Path, owner: u64) -> LockFile {
        LockFile::new(path, SESSION, Owner::new(owner), TERM)
    }

    fn patient() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn soon() -> Instant {
        Instant::now() + TERM / 8
    }

    #[test]
    fn a_secondary_wins_at_once_when_the_owners_process_is_gone() {
        let path = path("gone");
        let (mut primary, mut secondary) = (side(&path, 1), side(&path, 2));
        let Answer::Won(held) = primary.hold(patient()) else {
            panic!("not held")
        };
        assert!(held.until.is_some());
        assert!(matches!(secondary.claim(soon()), Answer::Lost(owner) if owner == Owner::new(1)));
        // What the kernel does for a process that dies.
        drop(primary.file.take());
        let Answer::Won(won) = secondary.claim(soon()) else {
            panic!("not won")
        };
        assert_eq!((won.generation, won.until), (2, None));
        assert!(matches!(primary.hold(soon()), Answer::Lost(owner) if owner == Owner::new(2)));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn a_secondary_inherits_from_an_owner_that_lives_and_does_not_renew() {
        let path = path("lapsed");
        let (mut primary, mut secondary) = (side(&path, 1), side(&path, 2));
        let Answer::Won(held) = primary.hold(patient()) else {
            panic!("not held")
        };
        let until = held.until.unwrap();
        assert!(matches!(secondary.claim(patient()), Answer::Won(_)));
        // By then the owner's guest had to stand still.
        assert!(Instant::now() > until);
        assert!(matches!(primary.hold(soon()), Answer::Lost(_)));
        assert!(matches!(primary.claim(soon()), Answer::Lost(_)));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn a_right_that_is_renewed_is_kept_and_one_that_was_claimed_is_final() {
        let path = path("renewed");
        let (mut primary, mut secondary) = (side(&path, 1), side(&path, 2));
        assert!(matches!(primary.hold(patient()), Answer::Won(_)));
        let renewing = thread::spawn(move || {
            for _ in 0..20 {
                assert!(matches!(primary.hold(patient()), Answer::Won(_)));
                thread::sleep(TERM / 10);
            }
            assert!(matches!(primary.claim(patient()), Answer::Won(g) if g.until.is_none()));
            primary
        });
        // Nine terms would do for an owner that does not renew.
        assert!(matches!(secondary.claim(patient()), Answer::Lost(_)));
        drop(renewing.join().unwrap());
        assert!(matches!(secondary.claim(soon()), Answer::Lost(_)));
        // A new guest may begin when the survivor's process is gone.
        assert!(matches!(secondary.hold(soon()), Answer::Won(g) if g.generation == 2));
        let _ = std::fs::remove_file(path);
    }

    /// A lease of the primary's, which a secondary has watched for a term, and taken in the end.
    fn taken(name: &str) -> (PathBuf, LockFile, LockFile) {
        let path = path(name);
        let (mut primary, mut secondary) = (side(&path, 1), side(&path, 2));
        assert!(matches!(primary.hold(patient()), Answer::Won(_)));
        let mut observed = Observed::default();
        let since = Instant::now();
        while !matches!(
            secondary.exchange(patient(), &mut observed, record::claim),
            Ok(Verdict::Write(_))
        ) {
            assert!(since.elapsed() < 20 * TERM, "never taken");
            thread::sleep(POLL);
        }
        (path, primary, secondary)
    }

    #[test]
    fn an_owner_that_is_stopped_while_it_renews_keeps_nobody_from_its_right() {
        let path = path("stopped");
        let (mut primary, mut secondary) = (side(&path, 1), side(&path, 2));
        assert!(matches!(primary.hold(patient()), Answer::Won(_)));
        // It has written its beat, and gets no further.
        primary.write_beat().unwrap();
        assert!(matches!(secondary.claim(patient()), Answer::Won(g) if g.until.is_none()));
        assert!(primary.held_record().unwrap().is_none());
        assert!(matches!(primary.hold(soon()), Answer::Lost(owner) if owner == Owner::new(2)));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn an_owner_renews_while_somebody_else_has_the_record() {
        let path = path("record");
        let mut primary = side(&path, 1);
        assert!(matches!(primary.hold(patient()), Answer::Won(_)));
        let other = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        assert!(lock(&other, RECORD).unwrap());
        let len = || other.metadata().unwrap().len();
        let before = len();
        assert!(matches!(primary.hold(soon()), Answer::Won(g) if g.until.is_some()));
        assert_eq!(len(), before, "a renewal takes no space");
        let Answer::Unreachable(error) = primary.claim(soon()) else {
            panic!("claimed")
        };
        assert!(error.to_string().contains("waiting for"), "{error}");
        unlock(&other, RECORD);
        assert!(matches!(primary.claim(soon()), Answer::Won(_)));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn a_right_whose_owner_stood_still_is_the_takers_at_once() {
        let (path, mut primary, mut secondary) = taken("still");
        assert_eq!(secondary.other_may_run_until().unwrap(), None);
        // It moves its beat too late, and finds out.
        primary.write_beat().unwrap();
        assert!(primary.held_record().unwrap().is_none());
        secondary.wait_for_the_other().unwrap();
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn a_right_whose_owner_renewed_at_the_last_moment_is_the_takers_after_a_term() {
        let (path, mut primary, mut secondary) = taken("moved");
        primary.write_beat().unwrap();
        let until = secondary.other_may_run_until().unwrap().unwrap();
        assert!(until > Instant::now() + TERM / 2);
        // What has failed meanwhile does not make it the taker's any sooner.
        let Answer::Won(_) = secondary.claim(patient()) else {
            panic!("not won")
        };
        assert!(Instant::now() >= until);
        assert!(secondary.taken.is_none());
        assert!(matches!(primary.hold(soon()), Answer::Lost(_)));
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn of_many_that_claim_at_once_one_wins() {
        let path = path("many");
        let won = thread::scope(|scope| {
            let threads: Vec<_> = (1..=8)
                .map(|owner| {
                    let mut side = side(&path, owner);
                    scope.spawn(move || {
                        let won = matches!(side.claim(patient()), Answer::Won(_));
                        (won, side)
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .filter(|(won, _)| *won)
                .count()
        });
        assert_eq!(won, 1);
        let _ = std::fs::remove_file(path);
    }

    #[test]
    fn a_file_that_is_no_record_or_was_replaced_grants_nothing() {
        let path = path("damaged");
        let mut primary = side(&path, 1);
        assert!(matches!(primary.hold(patient()), Answer::Won(_)));
        std::fs::remove_file(&path).unwrap();
        let Answer::Unreachable(error) = primary.hold(patient()) else {
            panic!("granted")
        };
        assert!(error.to_string().contains("replaced"), "{error}");
        std::fs::write(&path, "something else").unwrap();
        assert!(matches!(primary.hold(patient()), Answer::Unreachable(_)));
        assert!(matches!(primary.claim(patient()), Answer::Unreachable(_)));
        let mut nowhere = side(Path::new("/nonexistent/arbiter"), 1);
        assert!(matches!(nowhere.claim(patient()), Answer::Unreachable(_)));
        let _ = std::fs::remove_file(path);
    }
}
