//! A pair of `colo-vmm` on two hosts, with a heartbeat, whose network is cut while both live: in both
//! directions, in each alone, for everything and for one connection, wherever something begins or ends
//! on either side. One guest runs on, and what the network does later changes nothing.

use std::collections::BTreeSet;
use std::env;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tests::moments::{self, noted};
use tests::netns::{Host, Network, Traffic};
use tests::vmm::{ColoVmm, Connection, Pair, Vmm, check_count, first_line};
use tests::{PATIENCE, Result, harness};

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for (guest, is_simulated) in [("kvm", false), ("simulated", true)] {
        trials.push(harness::on_network(
            &format!("{guest}_pair_that_is_cut_apart_goes_on_once"),
            !is_simulated,
            move || cut_apart(is_simulated),
        ));
        for (name, connection) in [("plain", PLAIN), ("multifd", Connection::channels(2))] {
            for from in Side::BOTH {
                trials.push(harness::on_network(
                    &format!("{guest}_{name}_what_the_{from}_sends_may_be_lost_from_any_moment_on"),
                    !is_simulated,
                    move || everywhere(is_simulated, connection, from),
                ));
            }
        }
    }
    for (name, test) in [
        (
            "heartbeat_that_is_cut_alone_ends_colo_by_the_arbiter",
            heartbeat_alone as fn() -> Result<()>,
        ),
        (
            "heartbeat_that_is_cut_alone_ends_colo_by_the_policies",
            heartbeat_alone_by_policy,
        ),
        ("colo_that_is_cut_alone_ends_by_the_arbiter", colo_alone),
        (
            "colo_that_is_cut_alone_waits_for_an_operator_without_an_arbiter",
            colo_alone_by_policy,
        ),
    ] {
        trials.push(harness::on_network(name, false, test));
    }
    harness::run(trials)
}

const PLAIN: Connection = Connection {
    multifd: None,
    unix: false,
};

/// Ports of the secondary's host.
const MIGRATION: u16 = 7000;
const HEARTBEAT: u16 = 7001;

/// Between checkpoints, ms.
const DELAY: u32 = 20;
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
/// How often a pair is cut apart in each trial of that.
const REPETITIONS: usize = 5;
/// Lines that show that the guest goes on.
const ENCORE: u64 = 3;
/// How long nothing has to happen at a side that has stopped, once the network is healed: far more
/// than a heartbeat needs to connect again.
const SETTLED: Duration = Duration::from_millis(1500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Primary,
    Secondary,
}

impl Side {
    const BOTH: [Self; 2] = [Self::Primary, Self::Secondary];

    const fn host(self) -> Host {
        match self {
            Self::Primary => Host::A,
            Self::Secondary => Host::B,
        }
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        })
    }
}

/// Two hosts, and what they share beside the network.
struct Hosts {
    network: Network,
    storage: TempDir,
}

/// What a pair is told.
struct Options<'a> {
    is_simulated: bool,
    /// What each side does when it has lost the other.
    policies: [&'a str; 2],
    /// A further argument of one side, with its value.
    extra: Option<(Side, [String; 2])>,
}

impl Options<'_> {
    /// Both ask the lock file.
    const fn asking(is_simulated: bool) -> Self {
        Self {
            is_simulated,
            policies: ["ask", "ask"],
            extra: None,
        }
    }
}

impl Hosts {
    fn new() -> Result<Self> {
        Ok(Self {
            network: Network::new()?,
            storage: tempfile::tempdir()?,
        })
    }

    /// Starts a side. Beats are slow enough for a busy machine.
    fn start(&self, side: Side, options: &Options<'_>) -> Result<Vmm> {
        let [ours, theirs] = options.policies;
        let policy = match side {
            Side::Primary => ours,
            Side::Secondary => theirs,
        };
        let arbiter = match policy {
            "ask" => format!("file:{}", self.storage.path().join("right").display()),
            _ => "none".to_owned(),
        };
        let heartbeat = format!("tcp:{}:{HEARTBEAT}", Host::B.address());
        let mut vmm = ColoVmm::new("colo-vmm").memory(16).dirty_pages(64).args([
            "--uuid",
            "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a12",
            "--heartbeat",
            &heartbeat,
            "--heartbeat-interval",
            "200",
            "--on-heartbeat-loss",
            policy,
            "--arbiter",
            &arbiter,
            "--arbiter-term",
            "2000",
            "--peer-timeout",
            "1500",
            // A simulated guest is not to keep the processor busy.
            "--pass-delay",
            if options.is_simulated { "2000000" } else { "0" },
        ]);
        if options.is_simulated {
            vmm = vmm.simulated();
        }
        if side == Side::Secondary {
            vmm = vmm.incoming();
        }
        if let Some((_, extra)) = options.extra.as_ref().filter(|(of, _)| *of == side) {
            vmm = vmm.args(extra);
        }
        vmm.start_on(&self.network, side.host())
    }

    fn pair(&self, options: &Options<'_>) -> Result<Pair> {
        Ok(Pair {
            secondary: self.start(Side::Secondary, options)?,
            primary: self.start(Side::Primary, options)?,
        })
    }

    /// A pair that has taken its first checkpoints.
    fn pair_in_colo(&self, options: &Options<'_>, connection: Connection) -> Result<Pair> {
        let mut pair = self.pair(options)?;
        migrate(&mut pair, connection)?;
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.wait_checkpoints(5)?;
            assert_eq!(heartbeat(side)?["state"], "paired");
        }
        Ok(pair)
    }

    /// Waits until it is decided who goes on, and checks that, and that it stays so when the network is
    /// healed. Returns who it is.
    fn outcome(&self, pair: &mut Pair) -> Result<Side> {
        let winner = decided(pair)?;
        let (survivor, loser) = match winner {
            Side::Primary => (&mut pair.primary, &mut pair.secondary),
            Side::Secondary => (&mut pair.secondary, &mut pair.primary),
        };
        let (last_words, stopped) = (loser.output()?, loser.status()?);
        survivor.wait_lines(ENCORE)?;
        self.network.heal()?;
        thread::sleep(SETTLED);
        survivor.wait_lines(ENCORE)?;
        assert_eq!(survivor.status()?, "running");
        assert_eq!(loser.status()?, stopped);
        assert_eq!(loser.output()?, last_words, "the {winner} is not alone");
        if stopped == "internal-error" {
            loser.qmp.refused("cont", Value::Null)?;
        }
        check_history(pair, winner)?;
        Ok(winner)
    }
}

fn migrate(pair: &mut Pair, connection: Connection) -> Result<()> {
    let multifd = connection.multifd.map(|_| "multifd");
    let capabilities: Vec<&str> = ["events", "return-path", "x-colo"]
        .into_iter()
        .chain(multifd)
        .collect();
    for side in [&mut pair.secondary, &mut pair.primary] {
        side.qmp.enable(&capabilities)?;
        side.qmp
            .set_parameters(json!({"x-checkpoint-delay": DELAY}))?;
        if let Some((count, compression)) = connection.multifd {
            side.qmp.set_parameters(
                json!({"multifd-channels": count, "multifd-compression": compression}),
            )?;
        }
    }
    pair.primary.wait_lines(1)?;
    pair.primary
        .qmp
        .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
    // What is watched is a pair whose sides have heard each other.
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.poll("heard peer", |vmm| {
            Ok((heartbeat(vmm)?["peer"] == "alive").then_some(()))
        })?;
    }
    let address = format!("tcp:{}:{MIGRATION}", Host::B.address());
    let uri = pair.secondary.listen_on(&address)?;
    pair.primary.migrate(&uri)
}

fn heartbeat(vmm: &mut Vmm) -> Result<Value> {
    vmm.qmp.execute("x-query-colo-heartbeat", Value::Null)
}

/// What has become of a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Runs,
    Stopped,
    Open,
}

fn fate(side: &mut Vmm) -> Result<Fate> {
    let migration = side.migration()?["status"]
        .as_str()
        .unwrap_or("none")
        .to_owned();
    Ok(match (side.status()?.as_str(), migration.as_str()) {
        ("internal-error", _) => Fate::Stopped,
        // Its guest has not come, and nobody sends it any more.
        ("inmigrate", "none" | "setup" | "failed") => Fate::Stopped,
        ("running", "none" | "failed" | "completed") => Fate::Runs,
        _ => Fate::Open,
    })
}

/// Waits until one side runs alone and the other has stopped.
fn decided(pair: &mut Pair) -> Result<Side> {
    let Pair { primary, secondary } = pair;
    primary.poll("fate", |primary| {
        let fates = [fate(primary)?, fate(secondary)?];
        Ok(match fates {
            [Fate::Runs, Fate::Stopped] => Some(Side::Primary),
            [Fate::Stopped, Fate::Runs] => Some(Side::Secondary),
            [Fate::Stopped, Fate::Stopped] | [Fate::Runs, Fate::Runs] => {
                let said = [&mut *primary, &mut *secondary].map(|side| {
                    let beat = heartbeat(side).map_or_else(|e| e.to_string(), |b| b.to_string());
                    let said = side.process.stderr().text();
                    format!("\n{beat}\n{said}")
                });
                return Err(format!("{fates:?}: {}", said.join("")).into());
            }
            _ => None,
        })
    })
}

/// What the guest has said, on either side, is one history.
fn check_history(pair: &mut Pair, winner: Side) -> Result<()> {
    let (said, heard) = (pair.primary.output()?, pair.secondary.output()?);
    check_count(0, &said)?;
    if winner == Side::Primary {
        assert_eq!(heard, b"", "the secondary was heard");
        return Ok(());
    }
    let (begin, _) = first_line(&heard)?;
    check_count(begin, &heard)?;
    assert!(
        begin <= said.len() as u64,
        "the secondary is ahead of its primary"
    );
    // Not older than the last checkpoint that the primary knew to be complete.
    if let Some(last) = pair.primary.checkpoints()?.pop() {
        let at = last["serial-bytes"].as_u64().ok_or("no serial-bytes")?;
        assert!(begin >= at, "byte {begin}, the checkpoint was at {at}");
    }
    Ok(())
}

/// At some moment, of a checkpoint or between two.
fn cut_apart(is_simulated: bool) -> Result<()> {
    let moments: Vec<String> = (0..REPETITIONS).map(|i| i.to_string()).collect();
    let (winners, failures) = moments::each(&moments, 2, |_| {
        let hosts = Hosts::new()?;
        let mut pair = hosts.pair_in_colo(&Options::asking(is_simulated), PLAIN)?;
        let some = RandomState::new().hash_one(()) % 40_000;
        thread::sleep(Duration::from_micros(some));
        hosts.network.cut_apart(Traffic::All)?;
        hosts.outcome(&mut pair)
    });
    report("both directions cut", &winners, &failures)
}

fn report(what: &str, winners: &[Side], failures: &[String]) -> Result<()> {
    let won = |side| winners.iter().filter(|w| **w == side).count();
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

/// The moments of a side's life, of precopy and of the checkpoints that are tried.
fn moments_of(is_simulated: bool, connection: Connection, side: Side) -> Result<BTreeSet<String>> {
    let hosts = Hosts::new()?;
    let log = hosts.storage.path().join("boundaries");
    let options = Options {
        extra: Some((side, ["--boundaries".into(), log.display().to_string()])),
        ..Options::asking(is_simulated)
    };
    let _pair = hosts.pair_in_colo(&options, connection)?;
    noted(&log, &CHECKPOINTS)
}

/// Cuts what `from` sends at each moment of either side.
fn everywhere(is_simulated: bool, connection: Connection, from: Side) -> Result<()> {
    let mut all = Vec::new();
    for side in Side::BOTH {
        let moments = moments_of(is_simulated, connection, side)?;
        // A checkpoint has more steps than that on either side, and is there twice.
        assert!(moments.len() > 40, "{moments:?}");
        all.extend(moments.iter().map(|moment| format!("{side}:{moment}")));
    }
    let points = all.len();
    if env::var_os(EVERY_MOMENT).is_none() {
        // Another part of them each time, so that in the end each has its turn.
        let first = usize::try_from(RandomState::new().hash_one(()) % SPREAD as u64)?;
        let chosen = all.iter().skip(first).step_by(SPREAD);
        let chosen: BTreeSet<String> = chosen.cloned().chain(DECISIVE.map(str::to_owned)).collect();
        assert!(DECISIVE.iter().all(|d| all.iter().any(|m| m == d)));
        all = chosen.into_iter().collect();
    }
    let (winners, failures) = moments::each(&all, AT_ONCE, |moment| {
        let (side, moment) = moment.split_once(':').ok_or("no side")?;
        let of = match side {
            "primary" => Side::Primary,
            _ => Side::Secondary,
        };
        cut_at(is_simulated, connection, from, of, moment)
    });
    let what = format!(
        "what the {from} sends cut at {} of {points} moments",
        all.len()
    );
    report(&what, &winners, &failures)
}

fn cut_at(
    is_simulated: bool,
    connection: Connection,
    from: Side,
    of: Side,
    moment: &str,
) -> Result<Side> {
    let hosts = Hosts::new()?;
    let fifo = hosts.storage.path().join("halt");
    if !Command::new("mkfifo").arg(&fifo).status()?.success() {
        return Err("no FIFO".into());
    }
    let halt = format!("{moment}={}", fifo.display());
    let options = Options {
        extra: Some((of, ["--halt-at".into(), halt])),
        ..Options::asking(is_simulated)
    };
    let mut pair = hosts.pair(&options)?;
    thread::scope(|scope| {
        let cut = scope.spawn(|| -> Result<()> {
            let halted = opened(&fifo)?;
            hosts.network.cut(from.host(), Traffic::All)?;
            drop(halted);
            Ok(())
        });
        migrate(&mut pair, connection)?;
        cut.join().map_err(|_| "panicked")?
    })?;
    hosts.outcome(&mut pair)
}

/// The FIFO, as soon as somebody reads it.
fn opened(fifo: &Path) -> Result<File> {
    let (sender, receiver) = mpsc::channel();
    let fifo = fifo.to_owned();
    // Left behind with the FIFO if nobody comes.
    thread::spawn(move || sender.send(File::options().write(true).open(fifo)));
    let opened = receiver.recv_timeout(PATIENCE);
    Ok(opened.map_err(|_| "the moment does not come")??)
}

fn heartbeat_alone() -> Result<()> {
    let hosts = Hosts::new()?;
    let mut pair = hosts.pair_in_colo(&Options::asking(true), PLAIN)?;
    hosts.network.cut_apart(Traffic::Only(HEARTBEAT))?;
    // It holds the right, and asks first or second: the other one waits for it to run out.
    assert_eq!(hosts.outcome(&mut pair)?, Side::Primary);
    assert_eq!(heartbeat(&mut pair.primary)?["state"], "alone");
    assert_eq!(heartbeat(&mut pair.secondary)?["state"], "stopped");
    Ok(())
}

fn heartbeat_alone_by_policy() -> Result<()> {
    for (policies, winner) in [
        (["take-over", "stop"], Side::Primary),
        (["stop", "take-over"], Side::Secondary),
    ] {
        let hosts = Hosts::new()?;
        let options = Options {
            policies,
            ..Options::asking(true)
        };
        let mut pair = hosts.pair_in_colo(&options, PLAIN)?;
        hosts.network.cut_apart(Traffic::Only(HEARTBEAT))?;
        assert_eq!(hosts.outcome(&mut pair)?, winner, "{policies:?}");
    }
    Ok(())
}

fn colo_alone() -> Result<()> {
    let hosts = Hosts::new()?;
    let mut pair = hosts.pair_in_colo(&Options::asking(true), PLAIN)?;
    hosts.network.cut_apart(Traffic::AllBut(HEARTBEAT))?;
    // The holder of the right needs no loss of the heartbeat when COLO's own deadlines have passed.
    assert_eq!(hosts.outcome(&mut pair)?, Side::Primary);
    let beat = heartbeat(&mut pair.primary)?;
    assert_eq!(beat["peer"], "alive");
    let beat = heartbeat(&mut pair.secondary)?;
    assert_eq!(beat["stop-reason"], "the peer goes on alone");
    Ok(())
}

/// Neither side is lost to the other, so that nobody may go on by itself.
fn colo_alone_by_policy() -> Result<()> {
    let hosts = Hosts::new()?;
    let options = Options {
        policies: ["stop", "take-over"],
        ..Options::asking(true)
    };
    let mut pair = hosts.pair_in_colo(&options, PLAIN)?;
    hosts.network.cut_apart(Traffic::AllBut(HEARTBEAT))?;
    for side in [&mut pair.primary, &mut pair.secondary] {
        side.wait_migration("failing")?;
        let beat = heartbeat(side)?;
        assert_eq!(
            (&beat["peer"], &beat["state"]),
            (&json!("alive"), &json!("paired"))
        );
    }
    pair.secondary
        .qmp
        .execute("x-colo-lost-heartbeat", Value::Null)?;
    assert_eq!(hosts.outcome(&mut pair)?, Side::Secondary);
    let beat = heartbeat(&mut pair.primary)?;
    assert_eq!(beat["stop-reason"], "the peer goes on alone");
    Ok(())
}
