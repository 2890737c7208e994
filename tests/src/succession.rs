//! A guest that outlives its hosts: a COLO pair of `colo-vmm` of which one side dies, the other goes on
//! and is given a new secondary, again and again.

use serde_json::json;

use crate::Result;
use crate::vmm::{ColoVmm, Connection, Side, Vmm};

/// The guest with its present hosts.
#[derive(Debug)]
pub struct Succession {
    vmm: ColoVmm,
    connection: Connection,
    delay: u32,
    /// Where the guest is heard.
    pub primary: Vmm,
    /// Who stands by; `None` between a death and a [`rejoin`](Succession::rejoin).
    pub secondary: Option<Vmm>,
}

impl Succession {
    /// Starts the guest, and gives it a secondary. `vmm` is what every side of it runs; a checkpoint
    /// is taken every `delay` ms.
    ///
    /// # Errors
    /// A side does not start, or the pair does not come to its first checkpoint.
    pub fn begin(vmm: ColoVmm, connection: Connection, delay: u32) -> Result<Self> {
        let primary = vmm.start()?;
        let mut this = Self {
            vmm,
            connection,
            delay,
            primary,
            secondary: None,
        };
        this.rejoin()?;
        Ok(this)
    }

    /// Kills a side. The survivor is the primary from here on, and has not noticed yet. Returns the
    /// dead one, for what it has left behind.
    ///
    /// # Errors
    /// There is no secondary, or the system call's.
    pub fn kill(&mut self, victim: Side) -> Result<Vmm> {
        let secondary = self.secondary.take().ok_or("there is no secondary")?;
        let mut dead = match victim {
            Side::Primary => std::mem::replace(&mut self.primary, secondary),
            Side::Secondary => secondary,
        };
        dead.process.kill()?;
        Ok(dead)
    }

    /// Has the survivor go on alone.
    ///
    /// # Errors
    /// It does not.
    pub fn go_on_alone(&mut self) -> Result<()> {
        self.primary.go_on_alone()
    }

    /// Gives the survivor a new secondary, and waits until both have taken a checkpoint.
    ///
    /// # Errors
    /// It does not come to that.
    pub fn rejoin(&mut self) -> Result<()> {
        let mut secondary = self.vmm.clone().incoming().start()?;
        // What is waited for is the new pair's.
        self.primary.qmp.take_events()?;
        let parameters = json!({
            "x-checkpoint-delay": self.delay,
            "max-bandwidth": 0,
            "downtime-limit": 2000,
        });
        for side in [&mut secondary, &mut self.primary] {
            self.connection
                .prepare(side, &["events", "return-path", "x-colo"])?;
            side.qmp.set_parameters(parameters.clone())?;
        }
        let uri = self.connection.listen(&mut secondary)?;
        self.primary.migrate(&uri)?;
        for side in [&mut self.primary, &mut secondary] {
            side.wait_migration("colo")?;
        }
        for side in [&mut self.primary, &mut secondary] {
            side.wait_checkpoints(1)?;
        }
        self.secondary = Some(secondary);
        Ok(())
    }
}
