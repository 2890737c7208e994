//! Which part of a large matrix of cases a run takes.
//!
//! A run takes a sample in which every value of every axis is. The sample is another one each time:
//! it depends on a seed, which is printed, and which `COLO_SEED` names to repeat a run. `COLO_ALL=1`
//! takes every case.

use std::collections::BTreeSet;
use std::env;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use fastrand::Rng;

use crate::Result;

/// Takes every case if it is in the environment, and neither empty nor 0.
pub const ALL: &str = "COLO_ALL";
/// The seed of this run's samples and random moments.
pub const SEED: &str = "COLO_SEED";

/// Whether every case is to be taken.
#[must_use]
pub fn is_everything() -> bool {
    env::var(ALL).is_ok_and(|all| !all.is_empty() && all != "0")
}

/// The seed of this process: what [`SEED`] says, the clock's otherwise.
///
/// # Errors
/// [`SEED`] is no number.
pub fn seed() -> Result<u64> {
    static BY_CLOCK: OnceLock<u64> = OnceLock::new();
    match env::var(SEED) {
        Ok(seed) => Ok(seed.parse().map_err(|e| format!("{SEED}={seed}: {e}"))?),
        Err(_) => Ok(*BY_CLOCK.get_or_init(by_clock)),
    }
}

fn by_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    // Six digits: a person may have to type them.
    since.map_or(0, |since| u64::from(since.subsec_nanos()) % 1_000_000)
}

/// The random numbers of `what` in this run. Others' have no influence on them.
///
/// # Errors
/// See [`seed`].
pub fn random(what: &str) -> Result<Rng> {
    Ok(random_of(seed()?, what))
}

fn random_of(seed: u64, what: &str) -> Rng {
    // FNV-1a.
    let hash = what.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    Rng::with_seed(seed ^ hash)
}

/// Takes every case, or a sample of at least `least` in which each value of each axis is. `axes` are
/// the values of a case, in the order of the axes. The cases that are taken come first, each part in
/// the order of `cases`.
///
/// # Errors
/// See [`seed`].
pub fn take<T>(
    what: &str,
    cases: Vec<T>,
    least: usize,
    axes: impl Fn(&T) -> Vec<String>,
) -> Result<(Vec<T>, Vec<T>)> {
    if is_everything() {
        return Ok((cases, Vec::new()));
    }
    Ok(take_by(&mut random(what)?, cases, least, axes))
}

fn take_by<T>(
    random: &mut Rng,
    cases: Vec<T>,
    least: usize,
    axes: impl Fn(&T) -> Vec<String>,
) -> (Vec<T>, Vec<T>) {
    let values: Vec<Vec<(usize, String)>> = (cases.iter())
        .map(|case| axes(case).into_iter().enumerate().collect())
        .collect();
    let mut left: Vec<usize> = (0..cases.len()).collect();
    random.shuffle(&mut left);
    let mut seen = BTreeSet::new();
    let mut taken = BTreeSet::new();
    while !left.is_empty() {
        let news = |case: usize| values[case].iter().filter(|v| !seen.contains(*v)).count();
        // The first of those that add most.
        let mut best = 0;
        for at in 1..left.len() {
            if news(left[at]) > news(left[best]) {
                best = at;
            }
        }
        if news(left[best]) == 0 && taken.len() >= least {
            break;
        }
        let case = left.remove(best);
        seen.extend(values[case].iter());
        taken.insert(case);
    }
    let (mut sample, mut rest) = (Vec::new(), Vec::new());
    for (index, case) in cases.into_iter().enumerate() {
        if taken.contains(&index) {
            sample.push(case);
        } else {
            rest.push(case);
        }
    }
    (sample, rest)
}

/// Deals the cases of several ways of one thing: each way has all of its own, or each case is dealt
/// to one of the ways that have it, so that every way has about as many.
///
/// # Errors
/// See [`seed`].
pub fn deal<T: Clone + Ord>(what: &str, ways: &[BTreeSet<T>]) -> Result<Vec<BTreeSet<T>>> {
    if is_everything() {
        return Ok(ways.to_vec());
    }
    Ok(deal_by(&mut random(what)?, ways))
}

fn deal_by<T: Clone + Ord>(random: &mut Rng, ways: &[BTreeSet<T>]) -> Vec<BTreeSet<T>> {
    let all: BTreeSet<&T> = ways.iter().flatten().collect();
    let mut all: Vec<&T> = all.into_iter().collect();
    random.shuffle(&mut all);
    let mut dealt = vec![BTreeSet::new(); ways.len()];
    for case in all {
        let mut having: Vec<usize> = (0..ways.len())
            .filter(|&w| ways[w].contains(case))
            .collect();
        random.shuffle(&mut having);
        if let Some(way) = having.into_iter().min_by_key(|&way| dealt[way].len()) {
            dealt[way].insert(case.clone());
        }
    }
    dealt
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (u32, u32, u32);

    fn matrix() -> Vec<Case> {
        let mut cases = Vec::new();
        for a in 0..3 {
            for b in 0..7 {
                for c in 0..3 {
                    cases.push((a, b, c));
                }
            }
        }
        cases
    }

    fn axes(&(a, b, c): &Case) -> Vec<String> {
        [a, b, c].map(|value| value.to_string()).to_vec()
    }

    fn sample(seed: u64, least: usize) -> Vec<Case> {
        take_by(&mut random_of(seed, "matrix"), matrix(), least, axes).0
    }

    #[test]
    fn every_value_of_every_axis_is_in_every_sample() {
        for seed in 0..200 {
            let sample = sample(seed, 0);
            for (axis, values) in [3, 7, 3].into_iter().enumerate() {
                let found: BTreeSet<String> = sample.iter().map(|c| axes(c).remove(axis)).collect();
                assert_eq!(found.len(), values, "seed {seed}: {sample:?}");
            }
            // The longest axis is enough for all of them.
            assert_eq!(sample.len(), 7, "seed {seed}: {sample:?}");
        }
    }

    #[test]
    fn a_value_that_one_case_has_is_in_every_sample() {
        let mut cases = matrix();
        cases.push((0, 0, 9));
        for seed in 0..50 {
            let random = &mut random_of(seed, "matrix");
            let (sample, _) = take_by(random, cases.clone(), 0, axes);
            assert!(sample.contains(&(0, 0, 9)), "seed {seed}: {sample:?}");
        }
    }

    #[test]
    fn a_sample_is_as_large_as_is_asked_for_and_no_larger_than_the_matrix() {
        assert_eq!(sample(1, 20).len(), 20);
        assert_eq!(sample(1, 1000), matrix());
        let nothing: Vec<Case> = Vec::new();
        let (sample, rest) = take_by(&mut random_of(1, ""), nothing, 5, axes);
        assert!(sample.is_empty() && rest.is_empty());
    }

    #[test]
    fn a_seed_repeats_its_sample_and_another_seed_has_another() {
        assert_eq!(sample(5, 9), sample(5, 9));
        assert!((0..20).any(|seed| sample(seed, 9) != sample(5, 9)));
    }

    #[test]
    fn every_case_has_its_turn() {
        let taken: BTreeSet<Case> = (0..200).flat_map(|seed| sample(seed, 0)).collect();
        assert_eq!(taken.len(), matrix().len());
    }

    #[test]
    fn what_is_not_taken_is_the_rest() {
        let (sample, rest) = take_by(&mut random_of(3, "matrix"), matrix(), 9, axes);
        let mut all = [sample, rest].concat();
        all.sort_unstable();
        assert_eq!(all, matrix());
    }

    #[test]
    fn every_case_is_dealt_once_to_a_way_that_has_it_and_every_way_has_its_part() {
        let common = 0..80;
        let ways: Vec<BTreeSet<u32>> = (0..4)
            .map(|way| common.clone().chain([100 + way, 200]).collect())
            .collect();
        let all: BTreeSet<u32> = ways.iter().flatten().copied().collect();
        for seed in 0..50 {
            let dealt = deal_by(&mut random_of(seed, "ways"), &ways);
            assert!(
                dealt
                    .iter()
                    .zip(&ways)
                    .all(|(part, way)| part.is_subset(way))
            );
            assert!(dealt.iter().all(|part| part.len() >= 20), "{dealt:?}");
            let once: Vec<u32> = dealt.into_iter().flatten().collect();
            assert_eq!(once.len(), all.len());
            assert_eq!(once.into_iter().collect::<BTreeSet<u32>>(), all);
        }
    }

    #[test]
    fn two_matrices_of_one_run_are_sampled_apart() {
        let of = |what| random_of(7, what).u64(..);
        assert_ne!(of("colo_boundaries"), of("colo_partition"));
    }
}
