//! The moments that a `colo-vmm` notes with `--boundaries`, and how something is tried at each of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::Result;

/// The moments in the file `log`, each of them as its name and occurrence, of which only these
/// `occurrences` count.
///
/// # Errors
/// The file cannot be read.
pub fn noted(log: &Path, occurrences: &[u32]) -> Result<BTreeSet<String>> {
    let wanted = |line: &&str| {
        let occurrence = line.rsplit_once('#').map(|(_, n)| n.parse());
        matches!(occurrence, Some(Ok(n)) if occurrences.contains(&n))
    };
    let text = fs::read_to_string(log)?;
    Ok(text.lines().filter(wanted).map(str::to_owned).collect())
}

/// Tries something at each of the moments, `at_once` at a time. Returns what came of those that went
/// well, and the errors of the others, each with its moment.
pub fn each<T: Send>(
    moments: &[String],
    at_once: usize,
    attempt: impl Fn(&str) -> Result<T> + Sync,
) -> (Vec<T>, Vec<String>) {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut results, mut failures) = (Vec::new(), Vec::new());
        while let Some(moment) = moments.get(next.fetch_add(1, Ordering::Relaxed)) {
            match attempt(moment) {
                Ok(result) => results.push(result),
                Err(error) => failures.push(format!("{moment}: {error}")),
            }
        }
        (results, failures)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        let (mut results, mut failures) = (Vec::new(), Vec::new());
        for worker in workers {
            match worker.join() {
                Ok((good, bad)) => {
                    results.extend(good);
                    failures.extend(bad);
                }
                Err(_) => failures.push("panicked".to_owned()),
            }
        }
        (results, failures)
    })
}
