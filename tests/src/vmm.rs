//! `colo-vmm`: a running one with its QMP session and its guest's serial line, and two of them as a
//! pair.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::netns::{Host, Network};
use crate::process::{Process, workspace_program};
use crate::qmp::Qmp;
use crate::{PATIENCE, Result};

/// How often a state that there is no event for is asked after.
const POLL: Duration = Duration::from_millis(5);

/// What a run of the guest prints is known to the byte: its n-th line is n, as eight hexadecimal
/// digits and a line feed.
pub const LINE: u64 = 9;

/// Checks that `text` is what the guest prints from its `from`-th byte on, and returns the complete
/// lines in it. A guest that finds its memory damaged prints something else.
///
/// # Errors
/// Where the text first differs, and how.
pub fn check_count(from: u64, text: &[u8]) -> Result<usize> {
    let wrong = (from..).zip(text).position(|(at, byte)| {
        let line = format!("{:08x}\n", at / LINE + 1);
        let place = usize::try_from(at % LINE).unwrap_or(usize::MAX);
        line.as_bytes().get(place) != Some(byte)
    });
    match wrong {
        None => Ok(text.iter().filter(|b| **b == b'\n').count()),
        Some(at) => {
            let around = &text[at.saturating_sub(20)..text.len().min(at + 40)];
            let around = String::from_utf8_lossy(around);
            let line = (from + at as u64) / LINE + 1;
            Err(
                format!("line {line} of the guest's output is not its number, around {around:?}")
                    .into(),
            )
        }
    }
}

/// Where the guest's output begins of which `text` is all but what came before, and the number of its
/// first whole line: a survivor is heard from some byte on.
///
/// # Errors
/// There are no two line ends in it, or no number between them.
pub fn first_line(text: &[u8]) -> Result<(u64, u64)> {
    let end = text.iter().position(|b| *b == b'\n').ok_or("no line")? + 1;
    let digits = text.get(end..end + 8).ok_or("no second line")?;
    let number = u64::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    let lines = number.checked_sub(1).ok_or("line 0")?;
    let begin = (lines * LINE).checked_sub(end as u64);
    Ok((begin.ok_or("a line that is too long")?, number))
}

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
        let dir = tempfile::Builder::new().prefix("colo-vmm-").tempdir()?;
        let mut command = self.command(dir.path())?;
        if self.interactive {
            let process = Process::spawn_with_input(self.name, &mut command)?;
            return Vmm::connect(process, dir);
        }
        Vmm::start(self.name, command, dir)
    }

    /// Starts it on a host of `network`.
    ///
    /// # Errors
    /// As for [`ColoVmm::start`].
    pub fn start_on(&self, network: &Network, host: Host) -> Result<Vmm> {
        let dir = tempfile::Builder::new().prefix("colo-vmm-").tempdir()?;
        let command = network.on(host, &self.command(dir.path())?);
        Vmm::start(self.name, command, dir)
    }
}

/// Names of the socket and the file in the directory of a [`Vmm`].
const QMP: &str = "qmp";
const SERIAL: &str = "serial";

/// The program `colo-vmm`, built once for all trials of a test program.
///
/// # Errors
/// It does not build.
pub fn program() -> Result<&'static Path> {
    static BUILT: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| workspace_program("colo-vmm", "colo-vmm").map_err(|e| e.to_string()))
        .as_deref()
        .map_err(|e| e.as_str().into())
}

/// A running `colo-vmm`; dropping it kills it.
#[derive(Debug)]
pub struct Vmm {
    /// Its QMP session.
    pub qmp: Qmp,
    /// The process: to kill it, and for what it said.
    pub process: Process,
    dir: TempDir,
}

impl Vmm {
    /// Runs a command of [`ColoVmm::command`], possibly wrapped in another.
    ///
    /// # Errors
    /// It does not come as far as QMP; the error quotes what it said.
    pub fn start(name: &str, mut command: Command, dir: TempDir) -> Result<Self> {
        Self::connect(Process::spawn(name, &mut command)?, dir)
    }

    fn connect(mut process: Process, dir: TempDir) -> Result<Self> {
        let qmp = Qmp::connect(&dir.path().join(QMP), || {
            if process.is_running()? {
                Ok(())
            } else {
                Err(process.failure("ended before QMP"))
            }
        })?;
        Ok(Self { qmp, process, dir })
    }

    /// Starts `colo-vmm standby` with these arguments, besides the address of QMP.
    ///
    /// # Errors
    /// It does not come as far as QMP; the error quotes what it said.
    pub fn standby<T: Into<OsString>>(args: impl IntoIterator<Item = T>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("standby-").tempdir()?;
        let mut command = Command::new(program()?);
        command.arg("standby");
        command.arg("--qmp");
        command.arg(format!("unix:{}", dir.path().join(QMP).display()));
        command.args(args.into_iter().map(Into::into));
        Self::start("standby", command, dir)
    }

    /// A directory that lives as long as this process, for its sockets and files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// All that its guest's serial line has let out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn output(&self) -> Result<Vec<u8>> {
        match fs::read(self.dir.path().join(SERIAL)) {
            // It is at the process's own output: see `ColoVmm::interactive`.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(self.process.stdout().bytes()),
            result => Ok(result?),
        }
    }

    /// Waits until the guest has printed `lines` more lines than now.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`].
    pub fn wait_lines(&mut self, lines: u64) -> Result<()> {
        let wanted = self.output()?.len() as u64 + lines * LINE;
        self.poll("more lines of the guest", |vmm| {
            Ok((vmm.output()?.len() as u64 >= wanted).then_some(()))
        })
    }

    /// Starts an outgoing migration without waiting for it.
    ///
    /// # Errors
    /// It refuses.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.qmp.execute("migrate", json!({"uri": uri}))?;
        Ok(())
    }

    /// Listens on a free port of this machine, and returns its URI.
    ///
    /// # Errors
    /// It refuses.
    pub fn listen(&mut self) -> Result<String> {
        self.listen_on("tcp:127.0.0.1:0")
    }

    /// Listens, without ending the process should the migration fail, and returns where, as a URI.
    ///
    /// # Errors
    /// It refuses.
    pub fn listen_on(&mut self, uri: &str) -> Result<String> {
        let arguments = json!({"uri": uri, "exit-on-error": false});
        self.qmp.execute("migrate-incoming", arguments)?;
        let address = self.migration()?["socket-address"][0].take();
        let text = |key: &str| address[key].as_str().unwrap_or_default().to_owned();
        match address["type"].as_str() {
            Some("inet") => Ok(format!("tcp:{}:{}", text("host"), text("port"))),
            Some("unix") => Ok(format!("unix:{}", text("path"))),
            _ => Err(format!("listens nowhere: {address}").into()),
        }
    }

    /// What `query-migrate` answers.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn migration(&mut self) -> Result<Value> {
        self.qmp.execute("query-migrate", Value::Null)
    }

    /// Waits until `query-migrate` gives `status`, and returns all that it gives.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`], or has failed instead.
    pub fn wait_migration(&mut self, status: &str) -> Result<Value> {
        self.poll(&format!("migration status {status}"), |vmm| {
            let migration = vmm.migration()?;
            if migration["status"] == status {
                return Ok(Some(migration));
            }
            if ["failed", "cancelled"]
                .map(Value::from)
                .contains(&migration["status"])
            {
                return Err(vmm
                    .process
                    .failure(&format!("has no migration in status {status}: {migration}")));
            }
            Ok(None)
        })
    }

    /// Waits until the migration has failed, and returns why.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`], or gives no reason.
    pub fn wait_failure(&mut self) -> Result<String> {
        let migration = self.wait_migration("failed")?;
        let reason = migration["error-desc"].as_str();
        Ok(reason
            .ok_or_else(|| format!("no error-desc in {migration}"))?
            .to_owned())
    }

    /// The run state.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn status(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", Value::Null)?;
        let name = status["status"].as_str().unwrap_or_default();
        assert_eq!(status["running"], name == "running");
        Ok(name.to_owned())
    }

    /// Waits for a run state.
    ///
    /// # Errors
    /// It is another one after [`PATIENCE`].
    pub fn wait_status(&mut self, status: &str) -> Result<()> {
        self.poll(&format!("run state {status}"), |vmm| {
            Ok((vmm.status()? == status).then_some(()))
        })
    }

    /// COLO's checkpoints so far: the data of their events.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn checkpoints(&mut self) -> Result<Vec<Value>> {
        if self.process.is_running()? {
            self.status()?;
        } else {
            self.qmp.hear_out()?;
        }
        let checkpoints = self
            .qmp
            .events()
            .filter(|e| e["event"] == "X_COLO_CHECKPOINT");
        Ok(checkpoints.map(|e| e["data"].clone()).collect())
    }

    /// Waits until COLO has taken so many checkpoints.
    ///
    /// # Errors
    /// It has not within [`PATIENCE`], or has ended.
    pub fn wait_checkpoints(&mut self, count: usize) -> Result<()> {
        self.poll(&format!("{count} checkpoints"), |vmm| {
            if vmm.qmp.events().any(|e| e["event"] == "COLO_EXIT") {
                let migration = vmm.migration()?;
                return Err(vmm.process.failure(&format!("has left COLO: {migration}")));
            }
            Ok((vmm.checkpoints()?.len() >= count).then_some(()))
        })
    }

    /// Has it go on alone, its peer being dead, and waits until its guest runs.
    ///
    /// # Errors
    /// It refuses, or does not go on within [`PATIENCE`].
    pub fn go_on_alone(&mut self) -> Result<()> {
        let instances = self.qmp.execute_oob("query-yank", Value::Null)?;
        self.qmp
            .execute_oob("yank", json!({"instances": instances}))?;
        self.qmp.execute("x-colo-lost-heartbeat", Value::Null)?;
        self.wait_migration("completed")?;
        self.wait_status("running")
    }

    /// Stops the process, which does not notice: a host that says nothing any more.
    ///
    /// # Errors
    /// There is no such process.
    pub fn freeze(&self) -> Result<()> {
        self.process.freeze()
    }

    /// Lets a stopped process go on.
    ///
    /// # Errors
    /// There is no such process.
    pub fn thaw(&self) -> Result<()> {
        self.process.thaw()
    }

    /// Asks `found` until it gives something.
    ///
    /// # Errors
    /// It gives nothing within [`PATIENCE`], or an error.
    pub fn poll<T>(
        &mut self,
        what: &str,
        mut found: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = found(self)? {
                return Ok(value);
            }
            if Instant::now() >= deadline {
                return Err(self.process.failure(&format!("has no {what}")));
            }
            thread::sleep(POLL);
        }
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
        let named = |name, vmm: &ColoVmm| ColoVmm {
            name,
            ..vmm.clone()
        };
        let mut pair = Self {
            primary: named("primary", primary).start()?,
            secondary: named("secondary", secondary).incoming().start()?,
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
        for side in [&mut pair.secondary, &mut pair.primary] {
            side.qmp.enable(&["events", "return-path", "x-colo"])?;
            side.qmp
                .set_parameters(json!({"x-checkpoint-delay": delay}))?;
        }
        pair.primary.wait_lines(1)?;
        for side in [&mut pair.primary, &mut pair.secondary] {
            side.poll("heard peer", |vmm| {
                let beat = vmm.qmp.execute("x-query-colo-heartbeat", Value::Null)?;
                Ok((beat["peer"] == "alive").then_some(()))
            })?;
        }
        pair.primary
            .qmp
            .set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 2000}))?;
        pair.migrate(Connection::default())?;
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_prints_is_known_from_any_byte_on() {
        let text = b"00000001\n00000002\n00000003\n0000";
        assert_eq!(check_count(0, text).unwrap(), 3);
        assert_eq!(check_count(13, &text[13..]).unwrap(), 2);
        assert_eq!(check_count(5, b"").unwrap(), 0);
        let e = check_count(9, &text[18..]).unwrap_err();
        assert!(
            e.to_string().starts_with("line 2 of the guest's output"),
            "{e}"
        );
        assert!(check_count(0, b"00000001\nE0000").is_err());
        assert_eq!(first_line(b"0002\n00000003\n").unwrap(), (13, 3));
        assert!(first_line(b"\n00000001\n").is_err());
    }
}
