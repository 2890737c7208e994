//! The arbiter in a real etcd: one side at most is ever given the right, whatever etcd does.

mod secured;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use colo_heartbeat::arbiter::etcd::EtcdOptions;
use colo_heartbeat::arbiter::{Answer, Arbiter, Etcd as Right, Gateway, Owner, Register};
use tests::etcd::Etcd;
use tests::harness::{self, Needs};
use tests::{PATIENCE, Result, sample};

fn main() -> ExitCode {
    let open = [
        Needs::NOTHING.test_etcd(
            "of_two_that_claim_at_once_one_wins_every_time",
            two_claimants,
        ),
        Needs::NOTHING.test_etcd(
            "owner_that_claims_and_heir_that_claims_never_both_win",
            owner_and_heir,
        ),
        Needs::NOTHING.test_etcd("renewing_writes_nothing", renewals),
        Needs::NOTHING.test_etcd(
            "right_passes_on_when_etcd_was_frozen_at_any_moment_of_a_claim",
            frozen,
        ),
        Needs::NOTHING.test_etcd("right_survives_the_death_of_etcd", killed),
        Needs::NOTHING.test_etcd("endpoint_that_is_down_is_made_up_for_by_another", endpoints),
    ];
    harness::run_waiting(open.into_iter().chain(secured::trials()))
}

const SESSION: [u8; 16] = [7; 16];
const A: u64 = 1;
const B: u64 = 2;

/// One that nobody expects to run out while the test is at work.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(300);

fn side(endpoints: &str, key: &str, me: u64, term: Duration) -> Result<Right> {
    side_with(endpoints, key, me, term, EtcdOptions::default())
}

fn side_with(
    endpoints: &str,
    key: &str,
    me: u64,
    term: Duration,
    options: EtcdOptions,
) -> Result<Right> {
    let gateway = Gateway::new(&endpoints.parse()?, key, options)?;
    Ok(Right::new(gateway, SESSION, Owner::new(me), term))
}

fn patient() -> Instant {
    Instant::now() + PATIENCE
}

fn soon() -> Instant {
    Instant::now() + SHORT / 2
}

fn wins(answer: &Answer) -> Result<()> {
    match answer {
        Answer::Won(_) => Ok(()),
        other => Err(format!("{other}").into()),
    }
}

fn loses_to(owner: u64, answer: &Answer) -> Result<()> {
    match answer {
        Answer::Lost(other) if *other == Owner::new(owner) => Ok(()),
        other => Err(format!("{other}").into()),
    }
}

fn two_claimants(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let rounds = if sample::is_everything() { 200 } else { 50 };
    for round in 0..rounds {
        let key = format!("colo/{round}");
        let mut primary = side(etcd.endpoint(), &key, 9, LONG)?;
        wins(&primary.hold(patient()))?;
        // What was given up is anyone's at once.
        primary.release(patient());
        let together = Barrier::new(2);
        let answers = thread::scope(|scope| {
            let claims = [A, B].map(|me| {
                let mut side = side(etcd.endpoint(), &key, me, LONG);
                let together = &together;
                scope.spawn(move || {
                    together.wait();
                    side.as_mut().map(|side| side.claim(patient())).ok()
                })
            });
            claims.map(|claim| claim.join().expect("a thread that claims"))
        });
        match answers {
            [Some(Answer::Won(_)), Some(lost)] => loses_to(A, &lost)?,
            [Some(lost), Some(Answer::Won(_))] => loses_to(B, &lost)?,
            other => return Err(format!("round {round}: {other:?}").into()),
        }
    }
    Ok(())
}

/// The owner claims at about the time when its right has run out for the other side.
fn owner_and_heir(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let mut winners = [0, 0];
    for round in 0..5 {
        // Several keys at a time: most of it is waiting.
        let answers: Vec<_> = thread::scope(|scope| {
            let pairs: Vec<_> = (0..8_u32)
                .map(|n| {
                    let endpoint = etcd.endpoint();
                    scope.spawn(move || -> Result<[Answer; 2]> {
                        let key = format!("colo/{round}-{n}");
                        let mut owner = side(endpoint, &key, A, SHORT)?;
                        let mut heir = side(endpoint, &key, B, SHORT)?;
                        wins(&owner.hold(patient()))?;
                        let claim = thread::spawn(move || heir.claim(patient()));
                        let late = SHORT.mul_f32(0.05f32.mul_add(n as f32, 0.95));
                        thread::sleep(late);
                        let mine = owner.claim(patient());
                        Ok([mine, claim.join().expect("a thread that claims")])
                    })
                })
                .collect();
            let joined = pairs
                .into_iter()
                .map(|p| p.join().expect("a thread of a pair"));
            joined.collect()
        });
        for answers in answers {
            match answers? {
                [Answer::Won(_), lost] => {
                    loses_to(A, &lost)?;
                    winners[0] += 1;
                }
                [lost, Answer::Won(_)] => {
                    loses_to(B, &lost)?;
                    winners[1] += 1;
                }
                other => return Err(format!("round {round}: {other:?}").into()),
            }
        }
    }
    println!("{} owners and {} heirs have won", winners[0], winners[1]);
    Ok(())
}

fn renewals(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let mut primary = side(etcd.endpoint(), "colo/a", A, LONG)?;
    wins(&primary.hold(patient()))?;
    let address = etcd.endpoint().parse()?;
    let mut key = Gateway::new(&address, "colo/a", EtcdOptions::default())?;
    let written = key.read(patient())?;
    assert!(written.value.is_some());
    for _ in 0..50 {
        wins(&primary.hold(patient()))?;
    }
    assert_eq!(key.read(patient())?, written);
    Ok(())
}

/// Whether the claim was carried out or not is not known to who made it, until it asks again.
fn frozen(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    for round in 0..12_u32 {
        let key = format!("colo/{round}");
        let mut owner = side(etcd.endpoint(), &key, A, SHORT)?;
        let mut heir = side(etcd.endpoint(), &key, B, SHORT)?;
        wins(&owner.hold(patient()))?;
        let claim = thread::spawn(move || {
            let answer = owner.claim(Instant::now() + SHORT);
            (owner, answer)
        });
        thread::sleep(Duration::from_micros(500) * round);
        etcd.freeze()?;
        let (mut owner, claimed) = claim.join().expect("a thread that claims");
        match heir.claim(soon()) {
            Answer::Unreachable(_) => {}
            other => return Err(format!("a frozen etcd has said {other}").into()),
        }
        etcd.thaw()?;
        let inherited = heir.claim(patient());
        match (&claimed, &inherited) {
            (Answer::Won(_), lost) => loses_to(A, lost)?,
            (Answer::Unreachable(_), Answer::Won(_)) => loses_to(B, &owner.claim(patient()))?,
            // It had been carried out.
            (Answer::Unreachable(_), lost) => {
                loses_to(A, lost)?;
                wins(&owner.claim(patient()))?;
            }
            other => return Err(format!("round {round}: {other:?}").into()),
        }
    }
    Ok(())
}

fn killed(program: &Path) -> Result<()> {
    let mut etcd = Etcd::start(program)?;
    let mut owner = side(etcd.endpoint(), "colo/a", A, SHORT)?;
    let mut heir = side(etcd.endpoint(), "colo/a", B, SHORT)?;
    wins(&owner.hold(patient()))?;
    etcd.kill()?;
    for side in [&mut owner, &mut heir] {
        match side.claim(soon()) {
            Answer::Unreachable(_) => {}
            other => return Err(format!("a killed etcd has said {other}").into()),
        }
    }
    etcd.restart()?;
    // What an owner knows of its right has run out meanwhile; it may be renewed all the same.
    wins(&owner.hold(patient()))?;
    wins(&heir.claim(patient()))?;
    etcd.kill()?;
    etcd.restart()?;
    thread::sleep(SHORT * 2);
    loses_to(B, &owner.hold(patient()))?;
    loses_to(B, &owner.claim(patient()))?;
    wins(&heir.claim(patient()))
}

fn endpoints(program: &Path) -> Result<()> {
    let etcd = Etcd::start(program)?;
    let mut gone = Etcd::start(program)?;
    gone.kill()?;
    let endpoints = format!("{},{}", gone.endpoint(), etcd.endpoint());
    let mut owner = side(&endpoints, "colo/a", A, LONG)?;
    wins(&owner.hold(patient()))?;
    wins(&owner.claim(patient()))?;
    let mut other = side(etcd.endpoint(), "colo/a", B, LONG)?;
    loses_to(A, &other.claim(patient()))
}
