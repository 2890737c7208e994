//! Something cut at each moment of either side of a pair.

use std::collections::BTreeSet;
use std::env;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;

use tests::Result;
use tests::hosts::{Hosts, Options};
use tests::moments::{self, noted};
use tests::vmm::{Connection, Side};

/// Checkpoints of which every moment is tried: the first, and one that the others are like.
const CHECKPOINTS: [u32; 2] = [1, 3];
/// Every moment is tried if this is in the environment, and otherwise one of [`SPREAD`].
const EVERY_MOMENT: &str = "COLO_EVERY_MOMENT";
/// See [`EVERY_MOMENT`].
const SPREAD: usize = 24;
/// Those that are tried in any case: between them the secondary has all that it needs to begin, and the
/// primary does not know whether it has begun.
const DECISIVE: [&str; 4] = [
    "primary:devices saved#1",
    "secondary:device section#1",
    "secondary:stream loaded#1",
    "secondary:to confirm#1",
];
/// Pairs at a time.
const AT_ONCE: usize = 6;
/// What is cut, and of which pairs.
pub struct Cuts<'a> {
    /// For the report.
    pub what: String,
    pub is_simulated: bool,
    pub connection: Connection,
    /// Asked who goes on; a lock file if there is none.
    pub etcd: Option<&'a Path>,
    pub cut: fn(&Hosts, Side) -> Result<()>,
    /// Of which side.
    pub side: Side,
}

pub fn report(what: &str, winners: &[Side], failures: &[String]) -> Result<()> {
    let won = |winner| winners.iter().filter(|w| **w == winner).count();
    println!(
        "{what}: {} runs, the primary went on in {}, the secondary in {}, {} failures",
        winners.len() + failures.len(),
        won(Side::Primary),
        won(Side::Secondary),
        failures.len()
    );
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("\n").into())
    }
}

impl Cuts<'_> {
    /// Tries it at each moment of either side.
    pub fn everywhere(&self) -> Result<()> {
        let mut all = Vec::new();
        for side in Side::BOTH {
            let moments = self.moments_of(side)?;
            // A checkpoint has more steps than that on either side, and is there twice.
            assert!(moments.len() > 40, "{moments:?}");
            all.extend(moments.iter().map(|moment| format!("{side}:{moment}")));
        }
        let points = all.len();
        if env::var_os(EVERY_MOMENT).is_none() {
            // Another part of them each time, so that in the end each has its turn.
            let first = usize::try_from(RandomState::new().hash_one(()) % SPREAD as u64)?;
            let chosen = all.iter().skip(first).step_by(SPREAD).cloned();
            let chosen: BTreeSet<String> = chosen.chain(DECISIVE.map(str::to_owned)).collect();
            assert!(DECISIVE.iter().all(|d| all.iter().any(|m| m == d)));
            all = chosen.into_iter().collect();
        }
        let (winners, failures) = moments::each(&all, AT_ONCE, |moment| self.at(moment));
        let what = format!("{} at {} of {points} moments", self.what, all.len());
        report(&what, &winners, &failures)
    }

    fn hosts(&self) -> Result<Hosts> {
        self.etcd.map_or_else(Hosts::new, Hosts::with_etcd)
    }

    /// The moments of a side's life, of precopy and of the checkpoints that are tried.
    fn moments_of(&self, side: Side) -> Result<BTreeSet<String>> {
        let hosts = self.hosts()?;
        let log = hosts.storage.path().join("boundaries");
        let options = Options {
            extra: Some((side, ["--boundaries".into(), log.display().to_string()])),
            ..Options::asking(self.is_simulated)
        };
        let _pair = hosts.pair_in_colo(&options, self.connection)?;
        noted(&log, &CHECKPOINTS)
    }

    fn at(&self, moment: &str) -> Result<Side> {
        let (side, name) = moment.split_once(':').ok_or("no side")?;
        let of = match side {
            "primary" => Side::Primary,
            _ => Side::Secondary,
        };
        let hosts = self.hosts()?;
        let options = Options {
            extra: Some((of, hosts.halt(name)?)),
            ..Options::asking(self.is_simulated)
        };
        let mut pair = hosts.pair(&options)?;
        hosts.migrate_until(&mut pair, self.connection, || (self.cut)(&hosts, self.side))?;
        hosts.outcome(&mut pair)
    }
}
