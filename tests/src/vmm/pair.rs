//! Two `colo-vmm`, and how they are connected.

use std::fmt;

use serde_json::{Value, json};

use super::{ColoVmm, Vmm, check_count, first_line};
use crate::Result;

/// The two sides of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one whose guest the world hears.
    Primary,
    /// The other one.
    Secondary,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Primary, Self::Secondary];

    /// As QMP calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Primary => Self::Secondary,
            Self::Secondary => Self::Primary,
        }
    }

    /// This side of `pair`, and the other.
    #[must_use]
    pub const fn of(self, pair: &mut Pair) -> (&mut Vmm, &mut Vmm) {
        match self {
            Self::Primary => (&mut pair.primary, &mut pair.secondary),
            Self::Secondary => (&mut pair.secondary, &mut pair.primary),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a pair is connected.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connection {
    /// Multifd channels and how they are compressed; `None` is the main stream alone.
    pub multifd: Option<(u8, &'static str)>,
    /// By a unix socket instead of TCP.
    pub unix: bool,
}

impl Connection {
    /// By the main stream alone, through TCP.
    pub const PLAIN: Self = Self {
        multifd: None,
        unix: false,
    };

    /// By this many channels, without compression.
    #[must_use]
    pub const fn channels(count: u8) -> Self {
        Self {
            multifd: Some((count, "none")),
            unix: false,
        }
    }

    fn capabilities<'a>(&self, others: &[&'a str]) -> Vec<&'a str> {
        let multifd = self.multifd.map(|_| "multifd");
        others.iter().copied().chain(multifd).collect()
    }

    /// Sets a side's capabilities, these and those of the connection, and its parameters.
    ///
    /// # Errors
    /// It refuses one.
    pub fn prepare(&self, side: &mut Vmm, capabilities: &[&str]) -> Result<()> {
        side.qmp.enable(&self.capabilities(capabilities))?;
        side.qmp.set_parameters(self.parameters())
    }

    /// Has the target listen, and returns where, as a URI.
    ///
    /// # Errors
    /// It refuses.
    pub fn listen(&self, target: &mut Vmm) -> Result<String> {
        if self.unix {
            let path = target.dir().join("migration");
            target.listen_on(&format!("unix:{}", path.display()))
        } else {
            target.listen()
        }
    }

    fn parameters(&self) -> Value {
        match self.multifd {
            None => json!({}),
            Some((count, compression)) => {
                json!({"multifd-channels": count, "multifd-compression": compression})
            }
        }
    }
}

/// A source and a target, or a primary and a secondary.
#[derive(Debug)]
pub struct Pair {
    /// Where the guest comes from.
    pub primary: Vmm,
    /// Where it goes to.
    pub secondary: Vmm,
}

impl Pair {
    /// Starts both, with `capabilities` besides multifd and `events`, and waits until the guest
    /// counts. `vmm` says what both have in common.
    ///
    /// # Errors
    /// One does not start, or refuses a capability.
    pub fn start(vmm: &ColoVmm, connection: Connection, capabilities: &[&str]) -> Result<Self> {
        Self::start_both(vmm, vmm, connection, capabilities)
    }

    /// As [`Pair::start`], with sides that differ.
    ///
    /// # Errors
    /// As there.
    pub fn start_both(
        primary: &ColoVmm,
        secondary: &ColoVmm,
        connection: Connection,
        capabilities: &[&str],
    ) -> Result<Self> {
        let mut pair = Self {
            primary: primary.clone().named("primary").start()?,
            secondary: secondary.clone().named("secondary").incoming().start()?,
        };
        let capabilities = [&["events"], capabilities].concat();
        for side in [&mut pair.secondary, &mut pair.primary] {
            connection.prepare(side, &capabilities)?;
        }
        // Not before the guest has dirtied memory of its own.
        pair.primary.wait_lines(1)?;
        // What is being tested comes after precopy.
        pair.primary
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        Ok(pair)
    }

    /// Tells both sides of COLO by `connection`, with a checkpoint every `delay` ms. Precopy will be
    /// short: what is being tested comes after it.
    ///
    /// # Errors
    /// A side refuses.
    pub fn set_up(&mut self, connection: Connection, delay: u32) -> Result<()> {
        let parameters = json!({
            "x-checkpoint-delay": delay,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        });
        for side in [&mut self.secondary, &mut self.primary] {
            connection.prepare(side, &["events", "return-path", "x-colo"])?;
            side.qmp.set_parameters(parameters.clone())?;
        }
        Ok(())
    }

    /// Waits until both have heard the other's heart.
    ///
    /// # Errors
    /// One has no heartbeat, or does not hear.
    pub fn wait_heard(&mut self) -> Result<()> {
        for side in [&mut self.primary, &mut self.secondary] {
            side.poll("heard peer", |vmm| {
                Ok((vmm.heartbeat()?["peer"] == "alive").then_some(()))
            })?;
        }
        Ok(())
    }

    /// Starts both, waits until their heartbeats are heard, and brings them into COLO until the first
    /// three checkpoints have been taken, one every `delay` ms. Their arguments say how the hearts
    /// beat.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn with_heartbeat(primary: &ColoVmm, secondary: &ColoVmm, delay: u32) -> Result<Self> {
        let mut pair = Self {
            secondary: secondary.clone().incoming().start()?,
            primary: primary.start()?,
        };
        pair.set_up(Connection::PLAIN, delay)?;
        pair.primary.wait_lines(1)?;
        pair.wait_heard()?;
        pair.migrate(Connection::PLAIN)?;
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.wait_migration("colo")?;
            side.wait_checkpoints(3)?;
        }
        Ok(pair)
    }

    /// Begins the migration.
    ///
    /// # Errors
    /// A side refuses.
    pub fn migrate(&mut self, connection: Connection) -> Result<()> {
        let uri = connection.listen(&mut self.secondary)?;
        self.primary.migrate(&uri)
    }

    /// Starts both with `x-colo`, migrates, and waits until the first three checkpoints have been
    /// taken, one every `delay` ms.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn in_colo(vmm: &ColoVmm, connection: Connection, delay: u32) -> Result<Self> {
        let mut pair = Self::start(vmm, connection, &["return-path", "x-colo"])?;
        for side in [&mut pair.secondary, &mut pair.primary] {
            side.qmp
                .set_parameters(json!({"x-checkpoint-delay": delay}))?;
        }
        pair.migrate(connection)?;
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.wait_migration("colo")?;
        }
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.wait_checkpoints(3)?;
        }
        Ok(pair)
    }

    /// Checks that what the guest has said, on either side, is one history, of which `survivor` has
    /// lost nothing that it could have.
    ///
    /// # Errors
    /// The guest's output is not its count, or has a gap, or begins before the last checkpoint that the
    /// primary knew to be complete.
    pub fn check_history(&mut self, survivor: Side) -> Result<()> {
        if survivor == Side::Primary {
            check_count(0, &self.primary.output()?)?;
            assert_eq!(self.secondary.output()?, b"", "the secondary was heard");
            return Ok(());
        }
        let begin = self.secondary_begins()?;
        let said = self.primary.output()?.len() as u64;
        assert!(begin <= said, "the secondary is ahead of its primary");
        Ok(())
    }

    /// The byte of all that the guest has said from which a secondary is heard that has gone on. What
    /// either has let out is checked.
    ///
    /// # Errors
    /// As for [`Pair::check_history`], but that there may be a gap.
    pub fn secondary_begins(&mut self) -> Result<u64> {
        check_count(0, &self.primary.output()?)?;
        let heard = self.secondary.output()?;
        let (begin, _) = first_line(&heard)?;
        check_count(begin, &heard)?;
        if let Some(last) = self.primary.checkpoints()?.pop() {
            let at = last["serial-bytes"].as_u64().ok_or("no serial-bytes")?;
            assert!(begin >= at, "byte {begin}, the checkpoint was at {at}");
        }
        Ok(begin)
    }
}
