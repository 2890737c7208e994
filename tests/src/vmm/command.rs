//! A `colo-vmm run` to come.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{QMP, SERIAL, Vmm, program};
use crate::Result;
use crate::netns::{Host, Network};
use crate::process::Process;

/// The guest's, of every pair with a heartbeat.
const UUID: &str = "8f2a3c1e-0b64-4f4e-9a53-4d1f6f0f7a11";

/// A `colo-vmm run` to come: the built-in guest in a small memory, started at once unless
/// [`ColoVmm::incoming`] or an argument says otherwise.
#[derive(Clone, Debug)]
pub struct ColoVmm {
    name: &'static str,
    memory_mib: u32,
    dirty_pages: u32,
    incoming: bool,
    simulated: bool,
    interactive: bool,
    args: Vec<OsString>,
}

impl ColoVmm {
    /// One with 32 MiB of memory, of which the guest dirties 1 MiB. `name` is what errors call it.
    #[must_use]
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            memory_mib: 32,
            dirty_pages: 256,
            incoming: false,
            simulated: false,
            interactive: false,
            args: Vec::new(),
        }
    }

    /// The same by another name.
    #[must_use]
    pub const fn named(mut self, name: &'static str) -> Self {
        self.name = name;
        self
    }

    /// Guest memory, MiB.
    #[must_use]
    pub const fn memory(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Pages that the guest dirties in each pass.
    #[must_use]
    pub const fn dirty_pages(mut self, pages: u32) -> Self {
        self.dirty_pages = pages;
        self
    }

    /// Waits for `migrate-incoming`.
    #[must_use]
    pub const fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// Simulates the guest, which needs no KVM.
    #[must_use]
    pub const fn simulated(mut self) -> Self {
        self.simulated = true;
        self
    }

    /// Has its serial line at the process's standard input and output instead of a file.
    #[must_use]
    pub const fn interactive(mut self) -> Self {
        self.interactive = true;
        self
    }

    /// Exchanges heartbeats at `address`, one every `interval` ms, and does as `policy` says when they
    /// are missing.
    #[must_use]
    pub fn heartbeat(self, address: &str, interval: u32, policy: &str) -> Self {
        let interval = interval.to_string();
        self.args([
            "--uuid",
            UUID,
            "--heartbeat",
            address,
            "--heartbeat-interval",
            &interval,
            "--on-heartbeat-loss",
            policy,
        ])
    }

    /// Asks this arbiter, whose rights last for `term` ms.
    #[must_use]
    pub fn arbiter(self, arbiter: &str, term: u32) -> Self {
        let term = term.to_string();
        self.args(["--arbiter", arbiter, "--arbiter-term", &term])
    }

    /// Further arguments, as they are.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Its command, with sockets and files in `dir`.
    ///
    /// # Errors
    /// `colo-vmm` does not build.
    pub fn command(&self, dir: &Path) -> Result<Command> {
        let mut command = Command::new(program()?);
        command.arg("run");
        command.args(["--memory", &self.memory_mib.to_string()]);
        command.args(["--dirty-pages", &self.dirty_pages.to_string()]);
        command.arg("--qmp");
        command.arg(format!("unix:{}", dir.join(QMP).display()));
        command.arg("--serial");
        if self.interactive {
            command.arg("stdio");
        } else {
            command.arg(format!("file:{}", Self::serial_in(dir).display()));
        }
        if self.simulated {
            command.arg("--sim");
        }
        if self.incoming {
            command.args(["--incoming", "defer"]);
        }
        command.args(&self.args);
        Ok(command)
    }

    /// Where the guest's output goes with a [`ColoVmm::command`] for `dir`: to a new file, or to what is
    /// there.
    #[must_use]
    pub fn serial_in(dir: &Path) -> PathBuf {
        dir.join(SERIAL)
    }

    /// Starts it.
    ///
    /// # Errors
    /// It does not build, or does not come as far as QMP; the error quotes what it said.
    pub fn start(&self) -> Result<Vmm> {
        self.start_as(|command| command)
    }

    /// Starts it on a host of `network`.
    ///
    /// # Errors
    /// As for [`ColoVmm::start`].
    pub fn start_on(&self, network: &Network, host: Host) -> Result<Vmm> {
        self.start_as(|command| network.on(host, &command))
    }

    /// Starts it by the command that `wrap` makes of its own.
    ///
    /// # Errors
    /// As for [`ColoVmm::start`].
    pub fn start_as(&self, wrap: impl FnOnce(Command) -> Command) -> Result<Vmm> {
        let dir = tempfile::Builder::new().prefix("colo-vmm-").tempdir()?;
        let mut command = wrap(self.command(dir.path())?);
        let process = if self.interactive {
            Process::spawn_with_input(self.name, &mut command)?
        } else {
            Process::spawn(self.name, &mut command)?
        };
        Vmm::connect(process, dir)
    }
}
