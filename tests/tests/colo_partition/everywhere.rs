//! Something cut at each moment of either side of a pair.

use std::collections::BTreeSet;
use std::path::Path;

use tests::hosts::{Hosts, Options};
use tests::moments::{self, noted};
use tests::vmm::{Connection, Side};
use tests::{Result, sample};

/// Checkpoints of which every moment is tried: the first, and one that the others are like.
const CHECKPOINTS: [u32; 2] = [1, 3];
/// One of so many moments is in a sample.
const SPREAD: usize = 32;
/// Those of which some are in each sample: between them the secondary has all that it needs to begin, and
/// the primary does not know whether it has begun.
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
        Err(format!("seed {}:\n{}", sample::seed()?, failures.join("\n")).into())
    }
}

/// What a moment is part of: each sample has moments of every part.
fn part(moment: &str) -> &'static str {
    let is = |side: &str| moment.starts_with(side);
    let is_late = CHECKPOINTS[1..]
        .iter()
        .any(|n| moment.ends_with(&format!("#{n}")));
    match (DECISIVE.contains(&moment), is("primary:"), is_late) {
        (true, true, _) => "decision of the primary",
        (true, false, _) => "decision of the secondary",
        (false, true, false) => "beginning of the primary",
        (false, true, true) => "later checkpoint of the primary",
        (false, false, false) => "beginning of the secondary",
        (false, false, true) => "later checkpoint of the secondary",
    }
}

impl Cuts<'_> {
    /// Tries it at each moment of either side, or at a sample of them.
    pub fn everywhere(&self) -> Result<()> {
        let mut all = Vec::new();
        for side in Side::BOTH {
            let moments = self.moments_of(side)?;
            // A checkpoint has more steps than that on either side, and is there twice.
            assert!(moments.len() > 40, "{moments:?}");
            all.extend(moments.iter().map(|moment| format!("{side}:{moment}")));
        }
        let points = all.len();
        assert!(DECISIVE.iter().all(|d| all.iter().any(|m| m == d)));
        let (all, _) = sample::take(&self.name(), all, points / SPREAD, |moment| {
            vec![part(moment).to_owned()]
        })?;
        let (winners, failures) = moments::each(&all, AT_ONCE, |moment| self.at(moment));
        let what = format!("{} at {} of {points} moments", self.what, all.len());
        report(&what, &winners, &failures)
    }

    /// What no other trial is called.
    fn name(&self) -> String {
        format!("{} {} {:?}", self.what, self.is_simulated, self.connection)
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
