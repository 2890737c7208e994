//! A pair of `colo-vmm` on two hosts that can be cut apart, with a heartbeat and an arbiter, and who of
//! the two is left.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::etcd::Etcd;
use crate::netns::{Host, Network, Traffic};
use crate::vmm::{ColoVmm, Connection, Pair, Side, Vmm};
use crate::{PATIENCE, Result};

/// Where the secondary listens for the primary's guest, on its host.
pub const MIGRATION: u16 = 7000;
/// The same for the heartbeat.
pub const HEARTBEAT: u16 = 7001;

/// Between checkpoints, ms.
const DELAY: u32 = 20;
/// How long a lease lasts, ms.
const TERM: u32 = 2000;
/// Lines that show that the guest goes on.
const ENCORE: u64 = 3;
/// How long nothing has to happen at a side that has stopped, once the network is healed: far more
/// than a heartbeat needs to connect again.
const SETTLED: Duration = Duration::from_millis(1500);

/// Two hosts, and who tells them which of them goes on.
#[derive(Debug)]
pub struct Hosts {
    /// The cables between them.
    pub network: Network,
    /// What they share beside the network, lock file included.
    pub storage: TempDir,
    /// On a third host.
    etcd: Option<Etcd>,
}

/// What a pair is told.
#[derive(Debug)]
pub struct Options<'a> {
    /// The guest needs no KVM.
    pub is_simulated: bool,
    /// What each side does when it has lost the other: the primary, then the secondary.
    pub policies: [&'a str; 2],
    /// A further argument of one side, with its value.
    pub extra: Option<(Side, [String; 2])>,
}

impl Options<'_> {
    /// Both ask the arbiter.
    #[must_use]
    pub const fn asking(is_simulated: bool) -> Self {
        Self {
            is_simulated,
            policies: ["ask", "ask"],
            extra: None,
        }
    }
}

/// What has become of a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It has gone on with the guest, alone.
    Runs,
    /// Its guest does not run, and will not.
    Stopped,
    /// Its guest stands still until the arbiter says who runs.
    Suspended,
    /// It is not decided yet.
    Open,
}

impl Fate {
    /// What has become of `side` by now.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn of(side: &mut Vmm) -> Result<Self> {
        let migration = side.migration()?["status"]
            .as_str()
            .unwrap_or("none")
            .to_owned();
        Ok(match (side.status()?.as_str(), migration.as_str()) {
            ("internal-error", _) => Self::Stopped,
            // In the middle of precopy or a checkpoint, or not.
            (status, _) if status != "running" && side.heartbeat()?["state"] == "suspended" => {
                Self::Suspended
            }
            // Its guest has not come, and nobody sends it any more.
            ("inmigrate", "none" | "setup" | "failed") => Self::Stopped,
            ("running", "none" | "failed" | "completed") => Self::Runs,
            _ => Self::Open,
        })
    }
}

/// The host that a side is on.
#[must_use]
pub const fn host(side: Side) -> Host {
    match side {
        Side::Primary => Host::A,
        Side::Secondary => Host::B,
    }
}

impl Hosts {
    /// Two hosts that share a lock file.
    ///
    /// # Errors
    /// See [`netns::missing`](crate::netns::missing).
    pub fn new() -> Result<Self> {
        Ok(Self {
            network: Network::new()?,
            storage: tempfile::tempdir()?,
            etcd: None,
        })
    }

    /// Two hosts that share nothing, with an etcd on a third one.
    ///
    /// # Errors
    /// As for [`Hosts::new`], or etcd does not come up.
    pub fn with_etcd(program: &Path) -> Result<Self> {
        let network = Network::of_three()?;
        Ok(Self {
            etcd: Some(Etcd::start_on(program, &network, Host::C)?),
            network,
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
        let arbiter = match &self.etcd {
            _ if policy != "ask" => "none".to_owned(),
            Some(etcd) => format!("etcd:{}", etcd.endpoint()),
            None => format!("file:{}", self.storage.path().join("right").display()),
        };
        let heartbeat = format!("tcp:{}:{HEARTBEAT}", Host::B.address());
        let mut vmm = ColoVmm::new("colo-vmm")
            .named(side.name())
            .memory(16)
            .dirty_pages(64)
            .heartbeat(&heartbeat, 200, policy)
            .arbiter(&arbiter, TERM)
            .args(["--peer-timeout", "1500"]);
        if options.is_simulated {
            // Not to keep the processor busy.
            vmm = vmm.simulated().args(["--pass-delay", "2000000"]);
        }
        if side == Side::Secondary {
            vmm = vmm.incoming();
        }
        if let Some((_, extra)) = options.extra.as_ref().filter(|(of, _)| *of == side) {
            vmm = vmm.args(extra);
        }
        vmm.start_on(&self.network, host(side))
    }

    /// Starts both sides.
    ///
    /// # Errors
    /// One does not start.
    pub fn pair(&self, options: &Options<'_>) -> Result<Pair> {
        Ok(Pair {
            secondary: self.start(Side::Secondary, options)?,
            primary: self.start(Side::Primary, options)?,
        })
    }

    /// Starts both sides, and waits until they have taken their first checkpoints.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn pair_in_colo(&self, options: &Options<'_>, connection: Connection) -> Result<Pair> {
        let mut pair = self.pair(options)?;
        Self::migrate(&mut pair, connection)?;
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.wait_checkpoints(5)?;
            assert_eq!(side.heartbeat()?["state"], "paired");
        }
        Ok(pair)
    }

    /// Has a pair whose sides hear each other begin.
    ///
    /// # Errors
    /// A side refuses, or does not hear.
    pub fn migrate(pair: &mut Pair, connection: Connection) -> Result<()> {
        pair.set_up(connection, DELAY)?;
        pair.primary.wait_lines(1)?;
        pair.wait_heard()?;
        let address = format!("tcp:{}:{MIGRATION}", Host::B.address());
        let uri = pair.secondary.listen_on(&address)?;
        pair.primary.migrate(&uri)
    }

    /// As [`Hosts::migrate`], with `happens` at a moment of one side, which waits there for it. The
    /// pair's [`Options::extra`] is what [`Hosts::halt`] has made of the moment.
    ///
    /// # Errors
    /// A side refuses, the moment does not come, or what `happens` gives.
    pub fn migrate_until(
        &self,
        pair: &mut Pair,
        connection: Connection,
        happens: impl FnOnce() -> Result<()> + Send,
    ) -> Result<()> {
        let fifo = self.fifo();
        thread::scope(|scope| {
            let happened = scope.spawn(move || -> Result<()> {
                let halted = opened(&fifo)?;
                happens()?;
                drop(halted);
                Ok(())
            });
            Self::migrate(pair, connection)?;
            happened.join().map_err(|_| "panicked")?
        })
    }

    /// What a side is told that is to wait at `moment`.
    ///
    /// # Errors
    /// There can be no FIFO.
    pub fn halt(&self, moment: &str) -> Result<[String; 2]> {
        let fifo = self.fifo();
        if !Command::new("mkfifo").arg(&fifo).status()?.success() {
            return Err("no FIFO".into());
        }
        Ok([
            "--halt-at".to_owned(),
            format!("{moment}={}", fifo.display()),
        ])
    }

    fn fifo(&self) -> std::path::PathBuf {
        self.storage.path().join("halt")
    }

    /// Cuts a side off from the other and from etcd, in both directions.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn isolate(&self, side: Side) -> Result<()> {
        self.network
            .cut_apart(host(side), host(side.other()), Traffic::All)?;
        self.network.cut_apart(host(side), Host::C, Traffic::All)
    }

    /// Heals all that was cut.
    ///
    /// # Errors
    /// The packet filter's.
    pub fn heal(&self) -> Result<()> {
        self.network.heal(Host::A, Host::B)?;
        if self.etcd.is_some() {
            self.network.heal(Host::A, Host::C)?;
            self.network.heal(Host::B, Host::C)?;
        }
        Ok(())
    }

    /// Waits until it is decided who goes on, and checks that, and that it stays so when the network is
    /// healed. Returns who it is. A side that may not know without the arbiter is let reach it again.
    ///
    /// # Errors
    /// Both go on, or neither does, or the guest has not gone on from where it may.
    pub fn outcome(&self, pair: &mut Pair) -> Result<Side> {
        let winner = match decided(pair)? {
            Some(winner) => winner,
            None => {
                // Only the arbiter can say who runs, and one of them reaches it again.
                self.heal()?;
                pair.primary.poll("fate after all", |primary| {
                    Ok((Fate::of(primary)? != Fate::Suspended).then_some(()))
                })?;
                decided(pair)?.ok_or_else(|| format!("nobody goes on: {}", said(pair)))?
            }
        };
        let (survivor, loser) = winner.of(pair);
        let last_words = loser.output()?;
        survivor.wait_lines(ENCORE)?;
        self.heal()?;
        // One that has stood still hears that the other runs.
        loser.poll("end", |loser| {
            Ok((Fate::of(loser)? == Fate::Stopped).then_some(()))
        })?;
        let stopped = loser.status()?;
        thread::sleep(SETTLED);
        survivor.wait_lines(ENCORE)?;
        assert_eq!(survivor.status()?, "running");
        assert_eq!(loser.status()?, stopped);
        assert_eq!(loser.output()?, last_words, "the {winner} is not alone");
        if stopped == "internal-error" {
            loser.qmp.refused("cont", Value::Null)?;
        }
        pair.check_history(winner)?;
        Ok(winner)
    }
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

/// Waits until one side runs alone and the other does not, or neither can without the arbiter.
fn decided(pair: &mut Pair) -> Result<Option<Side>> {
    let Pair { primary, secondary } = pair;
    let fates = primary.poll("fate", |primary| {
        let fates = [Fate::of(primary)?, Fate::of(secondary)?];
        Ok((!fates.contains(&Fate::Open)).then_some(fates))
    })?;
    match fates {
        [Fate::Runs, Fate::Stopped | Fate::Suspended] => Ok(Some(Side::Primary)),
        [Fate::Stopped | Fate::Suspended, Fate::Runs] => Ok(Some(Side::Secondary)),
        [Fate::Suspended, Fate::Stopped] => Ok(None),
        _ => Err(format!("{fates:?}: {}", said(pair)).into()),
    }
}

/// What both say of themselves.
fn said(pair: &mut Pair) -> String {
    let of = |side: &mut Vmm| {
        let beat = side.heartbeat();
        let beat = beat.map_or_else(|e| e.to_string(), |b| b.to_string());
        format!("\n{beat}\n{}", side.process.stderr().text())
    };
    of(&mut pair.primary) + &of(&mut pair.secondary)
}
