use std::sync::{Arc, Mutex};

use super::*;

const SESSION: [u8; 16] = [3; 16];
const TERM: Duration = Duration::from_millis(400);
const A: Owner = Owner::new(1);
const B: Owner = Owner::new(2);

/// A register in memory. `down`: requests fail, and those to replace take effect nevertheless.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<(Content, bool)>>);

impl Memory {
    fn set_down(&self, down: bool) {
        self.0.lock().unwrap().1 = down;
    }

    fn version(&self) -> u64 {
        self.0.lock().unwrap().0.version
    }

    fn arbiter(&self, me: Owner) -> RegisterArbiter<Self> {
        RegisterArbiter::new(self.clone(), SESSION, me, TERM)
    }
}

impl Register for Memory {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn read(&mut self, _deadline: Instant) -> Result<Content, ArbiterError> {
        let shared = self.0.lock().unwrap();
        if shared.1 {
            return Err(ArbiterError::new("no answer"));
        }
        Ok(shared.0.clone())
    }

    fn replace(&mut self, version: u64, text: &str, _: Instant) -> Result<bool, ArbiterError> {
        let mut shared = self.0.lock().unwrap();
        let fits = shared.0.version == version;
        if fits {
            shared.0 = Content {
                version: version + 1,
                value: Some(text.into()),
            };
        }
        if shared.1 {
            return Err(ArbiterError::new("no answer"));
        }
        Ok(fits)
    }
}

fn patient() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn soon() -> Instant {
    Instant::now() + TERM / 8
}

fn won(answer: &Answer) -> Grant {
    match answer {
        Answer::Won(grant) => *grant,
        other => panic!("{other}"),
    }
}

#[test]
fn a_right_is_renewed_without_a_write_and_no_claimant_gets_it() {
    let register = Memory::default();
    let mut primary = register.arbiter(A);
    let held = won(&primary.hold(patient()));
    let version = register.version();
    for _ in 0..10 {
        let again = won(&primary.hold(patient()));
        assert_eq!(again.generation, held.generation);
        assert!(again.until > held.until);
    }
    assert_eq!(register.version(), version);
    let renewing = thread::spawn(move || {
        for _ in 0..30 {
            won(&primary.hold(patient()));
            thread::sleep(TERM / 10);
        }
        assert_eq!(won(&primary.claim(patient())).until, None);
    });
    let mut secondary = register.arbiter(B);
    let limit = Instant::now() + TERM * 2;
    assert!(matches!(secondary.claim(limit), Answer::Lost(owner) if owner == A));
    renewing.join().unwrap();
    assert!(matches!(secondary.claim(soon()), Answer::Lost(owner) if owner == A));
}

#[test]
fn a_right_that_is_not_renewed_is_inherited_after_a_term_and_stays_so() {
    let register = Memory::default();
    let (mut primary, mut secondary) = (register.arbiter(A), register.arbiter(B));
    let held = won(&primary.hold(patient()));
    // Too short to know anything.
    assert!(matches!(secondary.claim(soon()), Answer::Unreachable(_)));
    let claimed = won(&secondary.claim(patient()));
    assert!(Instant::now() > held.until.unwrap());
    assert_eq!(
        (claimed.generation, claimed.until),
        (held.generation + 1, None)
    );
    assert!(matches!(primary.hold(soon()), Answer::Lost(owner) if owner == B));
    assert!(matches!(primary.claim(soon()), Answer::Lost(owner) if owner == B));
    // A survivor that is asked again has it, and does not lose it by resting.
    thread::sleep(TERM * 2);
    assert!(matches!(primary.claim(soon()), Answer::Lost(owner) if owner == B));
    assert_eq!(won(&secondary.claim(soon())).until, None);
}

#[test]
fn a_claim_whose_answer_was_lost_is_found_to_have_been_granted() {
    let register = Memory::default();
    let (mut primary, mut secondary) = (register.arbiter(A), register.arbiter(B));
    won(&primary.hold(patient()));
    // Read and marked, and then nothing answers: the claim arrives all the same.
    let mut seat = Seat::new(A, TERM);
    let now = Instant::now();
    let content = register.0.lock().unwrap().0.clone();
    let entry = Entry::parse(content.value.as_deref().unwrap(), SESSION).unwrap();
    let Next::Replace(claim) = seat.judge(Want::Claim, content.version, Some(entry), now, now)
    else {
        panic!("no claim")
    };
    register.set_down(true);
    let answer = primary
        .register
        .replace(content.version, &claim.to_text(SESSION), soon());
    assert!(answer.is_err());
    assert!(matches!(primary.claim(soon()), Answer::Unreachable(_)));
    register.set_down(false);
    assert!(matches!(secondary.claim(soon()), Answer::Lost(owner) if owner == A));
    assert_eq!(won(&primary.claim(soon())).until, None);
}

#[test]
fn what_was_given_up_is_another_s_at_once_unless_it_was_used_alone() {
    let register = Memory::default();
    let (mut primary, mut secondary) = (register.arbiter(A), register.arbiter(B));
    won(&primary.hold(patient()));
    primary.release(soon());
    assert_eq!(won(&secondary.claim(soon())).generation, 2);
    secondary.release(soon());
    // Nobody inherits what the secondary's guest has become; a new pair may begin.
    assert!(matches!(primary.claim(soon()), Answer::Lost(owner) if owner == B));
    assert_eq!(won(&primary.hold(soon())).generation, 3);
}

#[test]
fn of_many_that_claim_at_once_one_wins() {
    let register = Memory::default();
    won(&register.arbiter(A).hold(patient()));
    let winners = thread::scope(|scope| {
        let threads: Vec<_> = (2..=9)
            .map(|owner| {
                let mut side = register.arbiter(Owner::new(owner));
                scope.spawn(move || matches!(side.claim(patient()), Answer::Won(_)))
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| usize::from(thread.join().unwrap()))
            .sum::<usize>()
    });
    assert_eq!(winners, 1);
}

#[test]
fn an_entry_that_is_not_there_is_claimed_only_when_no_owner_can_rely_on_it() {
    let mut seat = Seat::new(B, TERM);
    let start = Instant::now();
    let mut at = |ms| {
        let now = start + Duration::from_millis(ms);
        seat.judge(Want::Claim, 0, None, now, now)
    };
    assert_eq!(at(0), Next::Wait);
    assert_eq!(at(399), Next::Wait);
    assert!(matches!(at(400), Next::Replace(entry) if entry.record.alone));
}

#[test]
fn an_entry_survives_its_text_and_nothing_else_is_one() {
    let record = Record {
        owner: Owner::new(u64::MAX),
        generation: u64::MAX,
        renewals: u64::MAX,
        alone: true,
        locked: false,
    };
    for mark in [Mark::None, Mark::Asked, Mark::Released] {
        let entry = Entry { record, mark };
        let text = entry.to_text(SESSION).into_bytes();
        assert!(text.len() <= ENTRY_LEN);
        assert_eq!(Entry::parse(&text, SESSION), Ok(entry));
        assert_eq!(Entry::parse(&text, [4; 16]), Err(RecordError::OtherSession));
        for len in 0..text.len() {
            let cut = Entry::parse(&text[..len], SESSION);
            assert_eq!(cut, Err(RecordError::Damaged), "{len}");
        }
        let long = [text.as_slice(), b"\n"].concat();
        assert_eq!(Entry::parse(&long, SESSION), Err(RecordError::Damaged));
        let huge = [text.as_slice(), &[b' '; 4096]].concat();
        assert_eq!(Entry::parse(&huge, SESSION), Err(RecordError::Damaged));
    }
    assert_eq!(
        Entry::parse(&[b' '; TEXT_LEN + 10], SESSION),
        Err(RecordError::Damaged)
    );
}
